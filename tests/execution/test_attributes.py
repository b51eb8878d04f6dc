"""torch's arguments and attributes: what its layers take, and what can be set on one that is built."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import tnlayers
from cases import FAMILIES, KINDS
from tnlayers.layers.description import build, describe

LAYERS = [
    getattr(tnlayers, family.__name__.replace("Conv2d", kind))
    for family in FAMILIES
    for kind, ndim in KINDS.items()
    if ndim
]


def example(layer):
    return torch.randn(2, 8, *(9, 8, 7)[: layer.ndim])


def entries(value, ndim):
    return tuple(value + k % 2 for k in range(ndim))


SET = {
    "stride": lambda n: [1, 3, (1,), [1] * n, np.int64(1), entries(1, n), np.array(entries(1, n))],
    "padding": lambda n: [0, (0,), np.int32(1), entries(0, n), torch.Size(entries(0, n))],
    "dilation": lambda n: [2, (2,), [2] * n, entries(1, n), np.full(n, 2)],
    "padding_mode": lambda n: ["reflect", "circular", "replicate", "zeros"],
    "output_padding": lambda n: [0, (1,), entries(0, n)],
}
START = {"stride": 2, "padding": 1}


@pytest.mark.parametrize("name", SET)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_an_attribute_that_is_set_takes_effect(layer, name):
    """The layer is then the one that torch builds with that argument, in all that is derived from it."""
    transposed = issubclass(layer, tnlayers.TensorConvTranspose)
    if (transposed and name == "padding_mode") or (not transposed and name == "output_padding"):
        return
    made, x = layer(8, 8, 2, **START, rank=2), example(layer)
    with torch.no_grad():
        made.eval()(x)  # a plan and weights are kept
    for value in SET[name](layer.ndim):
        setattr(made, name, value)
        twin = layer(8, 8, 2, **START | {name: value}, rank=2).eval()
        twin.load_state_dict(made.state_dict())
        assert made.geometry == twin.geometry
        assert repr(made) == repr(twin)
        assert made.flops(x.shape) == twin.flops(x.shape)
        dense = made.dense_type(8, 8, 2, **START | {name: tuple(value) if isinstance(value, np.ndarray) else value})
        assert repr(made.to_dense()).replace(" ", "") == repr(twin.to_dense()).replace(" ", "")
        with torch.no_grad():
            dense.weight.copy_(made.weight)
            dense.bias.copy_(made.bias)
            expected = dense(x)
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.train()(x), expected, rtol=1e-4, atol=1e-5)
        made.eval()
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), build(describe(made), device="cpu")):
        assert again.geometry == made.geometry
    made.reset_parameters()
    assert made.variance == twin.variance


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_a_value_that_is_refused_changes_nothing(layer):
    made = layer(8, 8, 2, **START, rank=2)
    geometry, executor = made.geometry, made._executor
    for name, value, kind in (
        ("stride", 0, ValueError), ("stride", (1,) * 4, ValueError), ("dilation", 1.5, TypeError),
        ("padding", -1, ValueError), ("padding", "full", ValueError), ("padding_mode", "mirror", ValueError),
        ("output_padding", 5, ValueError), ("geometry", 3, TypeError),
    ):  # fmt: skip
        with pytest.raises(kind, match=f"{name} "):
            setattr(made, name, value)
    assert made.geometry is geometry
    assert made._executor is executor


FIXED = {
    "in_channels": 16,
    "out_channels": 4,
    "kernel_size": 5,
    "groups": 2,
    "rank": 3,
    "format": "cp",
    "network": "i o",
}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_what_the_cores_are_made_for_is_fixed(layer):
    made = layer(8, 8, 3, rank=2)
    for name, value in (FIXED | {"transposed": not made.transposed}).items():
        with pytest.raises(AttributeError, match=f"{name} is .*, and the cores are made for it; .* {layer.__name__}"):
            setattr(made, name, value)
        setattr(made, name, getattr(made, name))
    made.kernel_size = 3
    made.kernel_size = [3] * made.ndim
    made.groups = np.int64(1)
    other = layer(8, 12, 3, rank=2)
    with pytest.raises(AttributeError, match="out_channels is 8, and the cores are made for it; for 12"):
        made.geometry = other.geometry
    assert made.out_channels == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_fixed(family):
    made = getattr(tnlayers, family.__name__.replace("Conv2d", "Linear"))(8, 8, rank=2)
    for name in ("in_features", "out_features"):
        with pytest.raises(AttributeError, match=f"{name} is 8, and the cores are made for it; for 16, make a new"):
            setattr(made, name, 16)
        setattr(made, name, 8)


def test_a_compiled_layer_follows():
    layer, x = tnlayers.CPConv2d(8, 8, 3, stride=2, rank=2), torch.randn(2, 8, 9, 9)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for stride in (2, 1):
        layer.stride = stride
        torch.testing.assert_close(compiled(x), layer.to_conv()(x), rtol=1e-4, atol=1e-5)


def test_a_backbone_is_dilated_as_torchvision_does_it():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), tnlayers.TRConv2d(8, 8, 3, stride=2, padding=1, rank=2))
    dense = copy.deepcopy(nn.Sequential(backbone[0], backbone[1].to_conv()))
    for module in (*backbone, *dense):
        if module.stride == (2, 2):
            module.stride, module.dilation, module.padding = (1, 1), (2, 2), (2, 2)
    x = torch.randn(1, 3, 12, 12)
    torch.testing.assert_close(backbone(x), dense(x), rtol=1e-4, atol=1e-5)


def test_the_start_may_be_set_by_name():
    layer = tnlayers.TRConv2d(8, 8, 3, stride=2, rank=2)
    layer.init = "fan_out"
    layer.reset_parameters()
    assert layer.variance == tnlayers.TRConv2d(8, 8, 3, stride=2, rank=2, init="fan_out").variance


# What torch accepts as an argument, and what is accepted here.

VALUES = [
    1, 2, (1,), (2,), [2], (1, 2), [2, 1], np.int64(2), np.int8(1), np.array([2, 1]), np.array([2]), torch.tensor(2),
    torch.Size((2, 2)), (np.int64(1), np.int64(2)), "same", "valid", None, 1.5, "2", (), (1, 2, 3), 0, -1,
]  # fmt: skip


def accepts(layer, x, arguments):
    try:
        return layer(8, 8, **{"kernel_size": 2} | arguments)(x).shape
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation", "output_padding"])
@pytest.mark.parametrize(
    "kind", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
)
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel", "ignore:Initializing zero-element tensors")
def test_arguments_as_torch_takes_them(kind, name):
    ours, dense, ndim = getattr(tnlayers, f"TR{kind}"), getattr(nn, kind), KINDS[kind]
    if name == "output_padding" and "Transpose" not in kind:
        return
    x = torch.randn(2, 8, *(9, 8, 7)[:ndim])
    for value in VALUES:
        arguments = {"stride": 3} if name == "output_padding" else {}
        expected = accepts(dense, x, arguments | {name: value})
        found = accepts(partial(ours, rank=2), x, arguments | {name: value})
        if expected is not None:
            assert found == expected, f"{name}={value!r}"


@pytest.mark.parametrize("value", [np.True_, np.False_, True, False])
def test_booleans_as_torch_takes_them(value):
    for layer in (tnlayers.TRConv2d(8, 8, 3, bias=value), tnlayers.TRLinear(8, 8, value)):
        assert (layer.bias is not None) == bool(value)


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint16, torch.tensor])
def test_integers_as_torch_takes_them(kind):
    made = tnlayers.TRConv2d(kind(8), kind(16), kind(3), kind(2), kind(1), kind(1), kind(2), rank=2)
    assert made.geometry == tnlayers.TRConv2d(8, 16, 3, 2, 1, 1, 2, rank=2).geometry
    assert {type(value) for value in (made.in_channels, made.groups, *made.stride, *made.rank.values())} == {int}
    assert tnlayers.TRLinear(kind(8), kind(16)).in_features == 8


@pytest.mark.parametrize("name", ["in_channels", "out_channels"])
def test_no_channels_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be an integer >= 1"):
        tnlayers.TRConv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3} | {name: 0})
