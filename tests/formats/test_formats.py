import pytest

import tnlayers
from tnlayers import formats, testing
from tnlayers.formats import factorize

# Measured with tednet 0.1.3, bias=False: in_channels, out_channels, kernel_size, our arguments, its parameters.
TEDNET = [
    (
        tnlayers.TRConv2d,
        64,
        64,
        3,
        {"rank": (2, 3, 4, 5, 10, 3, 2), "in_shape": (4, 4, 4), "out_shape": (4, 4, 4)},
        762,
    ),
    (tnlayers.TRConv2d, 3, 16, 3, {"rank": 6, "in_shape": (3,), "out_shape": (4, 2, 2)}, 720),
    (tnlayers.TRConv2d, 32, 64, (3, 5), {"rank": 10, "in_shape": (4, 4, 2), "out_shape": (4, 4, 4)}, 3700),
    (tnlayers.TTConv2d, 64, 64, 3, {"rank": 10, "in_shape": (4, 4, 4), "out_shape": (4, 4, 4)}, 3450),
    (tnlayers.TTConv2d, 3, 16, 3, {"rank": 10, "in_shape": (3,), "out_shape": (4, 2, 2)}, 1510),
    (tnlayers.TTConv2d, 3, 16, 3, {"rank": 10, "in_shape": (3, 1, 1), "out_shape": (4, 2, 2)}, 1510),
    (tnlayers.TTConv2d, 32, 64, 3, {"rank": (5, 6, 7), "in_shape": (4, 4, 2), "out_shape": (4, 4, 4)}, 1253),
    (tnlayers.TuckerConv2d, 64, 64, 3, {"rank": (10, 12)}, 2488),
    (tnlayers.TuckerConv2d, 3, 16, 3, {"rank": 10}, 1090),
    (tnlayers.TuckerConv2d, 3, 16, 5, {"rank": (8, 10)}, 2184),
    (tnlayers.CPConv2d, 64, 64, 3, {"rank": 10}, 1340),
    (tnlayers.CPConv2d, 16, 32, (3, 1), {"rank": 100}, 5200),
    (tnlayers.BTTConv2d, 64, 64, 3, {"rank": 4, "blocks": 2}, 2480),
    (tnlayers.TRLinear, 64, 10, None, {"rank": (5, 4, 3, 2), "in_shape": (4, 4, 4), "out_shape": (10,)}, 252),
    (tnlayers.TRLinear, 64, 10, None, {"rank": 5, "in_shape": (4, 4, 4), "out_shape": (5, 2)}, 475),
    (tnlayers.TTLinear, 64, 10, None, {"rank": (5, 4), "in_shape": (4, 4, 4), "out_shape": (10, 1, 1)}, 296),
    (tnlayers.CPLinear, 64, 10, None, {"rank": 6, "in_shape": (4, 4, 4), "out_shape": (5, 2)}, 114),
    (tnlayers.BTTLinear, 64, 10, None, {"rank": 3, "blocks": 2, "in_shape": (4,) * 3, "out_shape": (5, 2, 1)}, 246),
    # What it calls Tucker-2 keeps two of three input factors whole.
    (
        tnlayers.EinsumLinear,
        64,
        10,
        None,
        {"network": "i1 a, a i2 i3 b, b o", "rank": (4, 5), "in_shape": (4, 4, 4)},
        386,
    ),
]


@pytest.mark.parametrize(("layer", "inputs", "outputs", "kernel", "arguments", "expected"), TEDNET)
def test_parameter_counts_equal_tednet(layer, inputs, outputs, kernel, arguments, expected):
    made = layer(inputs, outputs, *([] if kernel is None else [kernel]), bias=False, **arguments)
    assert sum(parameter.numel() for parameter in made.parameters()) == expected


def test_texts_as_the_literature_lays_them_out():
    channels, kernel = (("i1", "i2", "i3"), ("o1", "o2")), ("h", "w")
    assert formats.TR().text(*channels, kernel, 4) == "r0 i1 r1, r1 i2 r2, r2 i3 r3, r3 h w r4, r4 o1 r5, r5 o2 r0"
    assert formats.TT().text(*channels, kernel, 4) == "h w r1, r1 i1 o1 r2, r2 i2 o2 r3, r3 i3"
    assert formats.TT("chain").text(*channels, ("w",), 4) == "i1 r1, r1 i2 r2, r2 i3 r3, r3 w r4, r4 o1 r5, r5 o2"
    assert formats.BTT(5).text(*channels, ("w",), 4) == "n:5 r1 r2 r3 rw, n i1 o1 r1, n i2 o2 r2, n i3 r3, n w rw"
    assert formats.CP().text(("i",), ("o",), ("d", "h", "w"), 4) == "i r, o r, d r, h r, w r"
    assert formats.Tucker().text(("i",), ("o",), kernel, {"ri": 1, "ro": 1, "rw": 2}) == "i ri, ri ro h rw, ro o, w rw"


def test_shapes_of_three_factors_are_tednets():
    for channels, shape in ((16, (4, 2, 2)), (32, (4, 4, 2)), (64, (4, 4, 4)), (3, (3,)), (97, (97,)), (1, (1,))):
        assert factorize(channels, 3) == shape


@pytest.mark.parametrize("number", [1, 2, 12, 60, 64, 97, 210, 512, 1000, 2048])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_factorize(number, parts):
    for groups in (k for k in range(1, number + 1) if number % k == 0):
        shape = factorize(number, parts, groups)
        product = 1
        for factor in shape:
            product *= factor
        assert product == number
        assert shape[0] % groups == 0
        assert len(shape) <= parts
        assert len(factorize(number, parts, groups, exact=True)) == parts


@pytest.mark.parametrize("number", [1, 2, 30, 64, 97, 210, 360, 720])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_factors_are_the_best_of_all(number, parts):
    """The smallest sum, then the most factors, then the largest ones first: of every way to write the number."""

    def ways(left, count):
        yield from [()] if left == 1 else []
        for factor in range(2, left + 1) if count else []:
            if left % factor == 0:
                yield from ((factor, *rest) for rest in ways(left // factor, count - 1))

    for groups in (k for k in range(1, number + 1) if number % k == 0):
        firsts = [first for first in range(groups, number + 1, groups) if number % first == 0]
        every = [(first, *rest) for first in firsts for rest in ways(number // first, parts - 1)]
        best = min(every, key=lambda shape: (sum(shape), -len(shape), [-factor for factor in shape]))
        assert factorize(number, parts, groups) == best


@pytest.mark.parametrize(
    ("number", "parts", "expected"),
    [
        (720720 * 64, 3, (364, 360, 352)),  # 528 divisors
        (720720, 10, (13, 11, 7, 5, 3, 3, 2, 2, 2, 2)),
        (2**20, 26, (2,) * 20),
        (2**31 - 1, 3, (2**31 - 1,)),  # a prime
    ],
)
def test_large_numbers_of_channels_are_split_at_once(number, parts, expected, monkeypatch):
    """Each divisor is looked at a few times, where there are 10^12 ways to write the second number."""
    tried = []
    order = formats.base._order
    monkeypatch.setattr(formats.base, "_order", lambda shape: tried.append(shape) or order(shape))
    assert factorize.__wrapped__(number, parts) == expected
    assert len(tried) < 50_000


def test_more_channels_than_any_tensor_has_are_refused():
    with pytest.raises(ValueError, match="4,294,967,297 channels are to be split into factors; at most 4,294,967,296"):
        tnlayers.TRLinear(2**32 + 1, 8, device="meta")


class Sandwich(formats.Format):
    """Two matrices around the kernel axes."""

    def text(self, inputs, outputs, kernel, rank):
        return f"{' '.join(inputs)} a, a {' '.join(kernel)} b, b {' '.join(outputs)}"


class SandwichConv2d(tnlayers.TensorConv2d, format=Sandwich):
    """A layer of it."""


def test_a_new_format_is_one_class_and_one_line():
    layer = SandwichConv2d(8, 12, 3, rank=(2, 3))
    assert str(layer.network) == "i a, a h w b, b o"
    assert layer.rank == {"a": 2, "b": 3}
    assert "format=sandwich" in repr(layer)
    testing.check(SandwichConv2d, 8, 12, (3, 2), rank=2)


def test_registering_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="format name 'tr' is taken by TR"):
        tnlayers.register("tr")(formats.CP)


def test_a_tree_of_many_leaves_has_as_many_bonds_as_edges():
    for leaves in range(1, 30):
        axes = tuple(f"i{k}" for k in range(1, leaves + 1)), tuple(f"o{k}" for k in range(1, leaves + 1))
        network = tnlayers.TensorNetwork.skeleton(formats.HT().text(*axes, (), 2))
        assert len(network.cores) == 2 * leaves - 1
        assert len(network.bonds) == 2 * leaves - 2
