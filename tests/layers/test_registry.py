import copy
import gc
import inspect
import json
import pickle
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tnlayers
from cases import CASES, Case
from tnlayers import FORMATS, Format, Init, TensorConv2d
from tnlayers.layers import registry
from tnlayers.layers.description import _LATER, build, describe
from tnlayers.layers.registry import KINDS, layer_class


@dataclass(frozen=True)
class Chain(Format):
    """A format of the user's, with an option of any type."""

    sizes: Any = (2, 3)

    def text(self, inputs: Any, outputs: Any, kernel: Any, rank: Any) -> str:
        return ", ".join(["i r", *(f"r {axis}" for axis in kernel), "r o"])


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> type[Format]:
    monkeypatch.setitem(FORMATS, "chain", Chain)
    return Chain


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_description_makes_the_layer_again(case: Case):
    layer = case.make(init=Init("fan_out", split="balanced"), dtype=torch.float64, bias=False)
    description = json.loads(json.dumps(describe(layer), allow_nan=False))
    state = torch.get_rng_state()
    again: Any = build(description, device="meta")
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn on the meta device"
    assert type(again) is type(layer)
    for name in ("network", "geometry", "init", "format", "strategy", "memory", "rank", "variance"):
        assert getattr(again, name) == getattr(layer, name)
    again.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert describe(again) == description
    assert torch.equal(again.weight, layer.weight)


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": (2, 1), "padding": "valid", "groups": 2, "dilation": 2, "strategy": "0 > 1 > 2", "memory": "low"},
        {"padding": 2, "padding_mode": "circular", "init": Init("fan_avg", "leaky_relu", 0.2, input_size=(9, 8))},
        {"init": Init("fan_in", "tanh", None, "uniform", "balanced", False), "dtype": torch.bfloat16},
    ],
)
def test_every_argument_is_described(arguments: dict[str, Any]):
    layer = tnlayers.TRConv2d(8, 12, (3, 2), rank=2, **arguments)
    again = build(json.loads(json.dumps(describe(layer))), device="cpu")
    for name in ("network", "geometry", "init", "strategy", "memory", "rank", "variance"):
        assert getattr(again, name) == getattr(layer, name)
    assert again.cores[0].dtype == layer.cores[0].dtype


def test_a_kind_for_each_of_torch_s_layers():
    assert list(KINDS) == [getattr(nn, f"{kind}{n}d") for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)] + [
        nn.Linear
    ]
    for kind, base in KINDS.items():
        for name, form in FORMATS.items():
            found = layer_class(name, kind)
            assert found is layer_class(form, kind) is getattr(tnlayers, f"{form.__name__}{kind.__name__}")
            assert issubclass(found, base)


def test_classes_are_found_or_made_once(chain: type[Format]):
    class Own(TensorConv2d, format=chain):
        """The user's."""

    assert layer_class("chain", nn.Conv2d) is Own
    made: Any = layer_class("chain", nn.Linear)
    assert made is layer_class(chain, nn.Linear)
    assert made.__name__ == "ChainLinear"
    layer = made(4, 6, rank=2)
    assert pickle.loads(pickle.dumps(layer)).network == layer.network
    with pytest.raises(AttributeError, match="has no attribute 'ChainPool'"):
        _ = registry.ChainPool


@pytest.mark.parametrize(
    ("format", "kind", "sentence"),
    [
        ("dense", nn.Linear, "format is 'dense'; accepted: .*'cp'"),
        (3, nn.Linear, "format is 3; accepted"),
        (nn.Linear, nn.Linear, "must be a registered name or a subclass of tnlayers.Format"),
        ("tr", nn.BatchNorm2d, "kind is .*BatchNorm2d.*accepted: nn.Conv1d"),
    ],
)
def test_no_such_class(format: Any, kind: Any, sentence: str):
    with pytest.raises((TypeError, ValueError), match=sentence):
        layer_class(format, kind)


def test_options_of_the_user_s_formats(chain: type[Format]):
    made = layer_class(chain, nn.Linear)

    def layer(sizes: Any) -> Any:
        return made(4, 6, rank=2, sizes=sizes)

    assert build(json.loads(json.dumps(describe(layer(((1, 2), "a"))))), device="cpu").format == chain(((1, 2), "a"))
    with pytest.raises(ValueError, match=r"sizes is nan, which JSON cannot hold"):
        describe(layer(float("nan")))
    with pytest.raises(ValueError, match=r"sizes\[1\] is .*object.*, which JSON cannot hold"):
        describe(layer((1, object())))
    with pytest.raises(ValueError, match=r"JSON cannot hold it, it would come back as .*sizes=\(1, 2\)"):
        describe(layer([1, 2]))
    del FORMATS["chain"]
    with pytest.raises(ValueError, match=r"has the format Chain; to be named, register it with tnlayers.register"):
        describe(layer(1))


def test_a_layer_that_does_more_is_refused():
    class Doubled(tnlayers.TRLinear):
        def forward(self, input: Any) -> Any:
            return 2 * super().forward(input)

    class Renamed(tnlayers.TRLinear):
        """Nothing of its own."""

    with pytest.raises(TypeError, match="Doubled has its own forward, which no description holds"):
        describe(Doubled(4, 6, rank=2))
    assert describe(Renamed(4, 6, rank=2)) == describe(tnlayers.TRLinear(4, 6, rank=2))
    with pytest.raises(TypeError, match="layer is Linear; it must be a tensor layer"):
        describe(nn.Linear(2, 2))  # type: ignore[arg-type]
    layer = tnlayers.TRLinear(4, 6, rank=2)
    parametrize.register_parametrization(layer.cores, "0", nn.Identity())
    with pytest.raises(ValueError, match=r"not hold cores\.0, cores\.parametrizations\.0\.original as"):
        describe(layer)
    layer = tnlayers.TRLinear(4, 6, rank=2)
    layer.cores[1] = layer.cores[1].detach().double()
    with pytest.raises(ValueError, match=r"does not hold cores.1 as a layer of its description does"):
        describe(layer)


HOSTILE: list[tuple[tuple[str, ...], Any, str]] = [
    (("format",), "os.system", "format is 'os.system'; accepted"),
    (("format",), ["tr"], "format is .*; accepted"),
    (("kind",), "Module", "kind is 'Module'; accepted"),
    (("kind",), "Conv2d", "'in_features'; accepted: 'in_channels'"),
    (("dtype",), "complex64", "dtype is 'complex64'; accepted"),
    (("dtype",), "load", "dtype is 'load'; accepted"),
    (("extra",), 1, "description has the key 'extra'; accepted"),
    (("rank",), 2, "rank is 2; it must map"),
    (("rank", "r"), 2, "rank names 'r'"),
    (("rank", "r1"), -1, "is -1; it must be an integer >= 1"),
    (("rank", "r1"), True, "is True; it must be an integer"),
    (("rank", "r1"), 2**60, "at most 64 cores and 1,099,511,627,776 parameters"),
    (("rank", "r1"), 10**2000, "at most 64 cores"),
    (("in_shape",), [6], r"in_shape \(6,\) has product 6, but in_features is 8"),
    (("in_shape",), [2, 4], "no size for bond 'r2'"),
    (("in_shape",), 8, "in_shape is 8; it must be a list"),
    (("in_shape",), [], "give each axis of a core its own name"),
    (("in_shape",), [8] + [1] * 10**5, "description has .* characters; at most"),
    (("arguments", "in_features"), 2**60, "in_features is .*; at most 16,777,216 is accepted"),
    (("arguments", "in_features"), [8], "in_features is .*must be an integer"),
    (("arguments", "in_features"), "8", "in_features is '8'"),
    (("arguments", "bias"), 1, "bias is 1; it must be True or False"),
    (("arguments", "device"), "cpu", "arguments has the key 'device'"),
    (("options",), [], "options is .*; it must be a mapping"),
    (("options", "rank"), 3, "options has the key 'rank'; accepted: none"),
    (("init",), "fan_in", "init is 'fan_in'; it must be a mapping"),
    (("init", "param"), 10**200, "description cannot be built: OverflowError|has no parameter"),
    (("init", "param"), float("inf"), "JSON"),
    (("init", "mode"), {}, "mode is {}; accepted"),
    (("init", "nonlinearity"), [], "nonlinearity is"),
    (("init", "input_size"), [2, 2], "has no spatial size"),
    (("strategy",), "0 > 0", "strategy is '0 > 0'"),
    (("strategy",), 5, "strategy is 5"),
    (("memory",), "none", "memory is 'none'; accepted"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), HOSTILE, ids=map(str, range(len(HOSTILE))))
def test_a_hostile_description_is_refused(path: tuple[str, ...], value: Any, sentence: str):
    description = describe(tnlayers.TRLinear(8, 12, rank=2))
    place: Any = description
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((TypeError, ValueError), match=sentence):
        build(description, device="meta")


def test_every_key_is_needed():
    description = describe(tnlayers.TRConv2d(8, 12, 3, rank=2))
    for where in (description, description["arguments"], description["init"]):
        for key in where.keys() - _LATER.keys():
            value = where.pop(key)
            with pytest.raises((TypeError, ValueError), match=f"has no '{key}'; it must have"):
                build(description, device="meta")
            where[key] = value
    for other in (None, [], "tr", 3, [description]):
        with pytest.raises(TypeError, match="it must be a mapping"):
            build(other, device="meta")
    with pytest.raises(TypeError, match="not JSON serializable"):
        build(description | {"init": Init()}, device="meta")


def test_the_number_of_cores_is_bounded():
    layer = tnlayers.TRLinear(8, 12, in_shape=[8] + [1] * 70, rank=1)
    with pytest.raises(ValueError, match=r"has 72 cores with .*; at most 64 cores"):
        describe(layer)


def test_taps_of_any_size_are_counted_at_once():
    description = describe(tnlayers.TRConv2d(8, 12, 3, rank=2, init=Init(input_size=(8, 8))))
    for path, value in ((("init", "input_size"), [2**40, 8]), (("arguments", "padding"), [2**24, 1])):
        changed = copy.deepcopy(description)
        changed[path[0]][path[1]] = value
        assert build(changed, device="meta").variance.weight_std > 0


def test_a_class_that_inherits_its_format_stands_for_it_and_dies_with_its_last_reference():
    class Ring(tnlayers.formats.TR):
        pass

    class Base(tnlayers.TensorLayer, format=Ring):
        pass

    class RingLinear(Base, tnlayers.TensorLinear):
        pass

    assert layer_class(Ring, nn.Linear) is RingLinear
    assert layer_class(Ring, nn.Conv2d) is layer_class(Ring, nn.Conv2d)
    gone = weakref.ref(RingLinear)
    del RingLinear, Base
    gc.collect()
    assert gone() is None
    assert layer_class(Ring, nn.Linear).__name__ == "RingLinear"  # made anew


def test_docstrings_of_classes_with_arguments_of_their_own_stay():
    class Own(tnlayers.TensorConv2d, format="tr"):
        """A ring.

        Args:
            n: of channels.
        """

        def __init__(self, n):
            super().__init__(n, n, 3)

    class Bare(tnlayers.TensorLinear, format="tr"):
        def __init__(self, n):
            super().__init__(n, n)

    class Other(tnlayers.BTTConv2d, format="tt"):
        pass

    assert inspect.getdoc(Own) == "A ring.\n\nArgs:\n    n: of channels."
    assert Bare.__doc__ is None
    assert "layout: " in Other.__doc__
    assert "blocks: " not in Other.__doc__
