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
