"""Every bad argument gets its own sentence: its name, its value, and what is accepted."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tnlayers
from tnlayers import (
    BlockTTLinear,
    CPConv2d,
    EinsumConv2d,
    EinsumLinear,
    Geometry,
    Init,
    TensorNetwork,
    TRConv2d,
    TRLinear,
    TTConv2d,
    TuckerConv2d,
)
from tnlayers.fitting.decompose import decompose


def up(**kwargs):
    return tnlayers.CPConvTranspose2d(8, 12, 3, stride=2, rank=2, **kwargs)


def tr(*args, **kwargs):
    return TRConv2d(*(args or (64, 64, 3)), **kwargs)


def einsum(network, **kwargs):
    return EinsumConv2d(64, 64, 3, network=network, **kwargs)


NETWORK = "i:4 r:2, r o:4"

# What is called, the error, and parts of its sentence in order: name, value, what is accepted.
TABLE = [
    # channels and their shapes
    (lambda: tr(0, 64, 3), ValueError, "in_channels is 0", ">= 1"),
    (lambda: tr(64, -2, 3), ValueError, "out_channels is -2", ">= 1"),
    (lambda: tr(64.0, 64, 3), TypeError, "in_channels is 64.0", "integer"),
    (lambda: tr(True, 64, 3), TypeError, "in_channels is True", "integer"),
    (lambda: tr(in_shape=(4, 4, 3)), ValueError, "in_shape (4, 4, 3) has product 48", "in_channels is 64"),
    (lambda: tr(out_shape=(4, 4)), ValueError, "out_shape (4, 4) has product 16", "out_channels is 64"),
    (lambda: tr(in_shape=(8, 8), groups=2), ValueError, "in_shape (8, 8)", "in_channels / groups is 32"),
    (lambda: tr(in_shape=64), TypeError, "in_shape is 64", "sequence of integers with product 64"),
    (lambda: tr(in_shape=()), ValueError, "in_shape () has product 1", "in_channels is 64"),
    (lambda: tr(in_shape=(-8, -8)), ValueError, "in_shape[0] is -8", ">= 1"),
    (lambda: tr(out_shape=(6.4, 10)), TypeError, "out_shape[0] is 6.4", "integer"),
    (lambda: einsum("i1 a, a i2 h w b, b o", in_shape=(4, 4, 4)), ValueError, "in_shape (4, 4, 4) has 3", "i1, i2"),
    # the convolution
    (lambda: tr(64, 64, 0), ValueError, "kernel_size is 0", ">= 1"),
    (lambda: tr(64, 64, (3, 3, 3)), ValueError, "kernel_size (3, 3, 3) has 3 entries", "2 of them"),
    (lambda: tr(64, 64, (3, 0)), ValueError, "kernel_size[1] is 0", ">= 1"),
    (lambda: tr(64, 64, "3"), TypeError, "kernel_size is '3'", "integer"),
    (lambda: tr(stride=0), ValueError, "stride is 0", ">= 1"),
    (lambda: tr(stride=(1, 2, 1)), ValueError, "stride (1, 2, 1) has 3 entries", "2 of them"),
    (lambda: tr(dilation=1.5), TypeError, "dilation is 1.5", "integer"),
    (lambda: tr(stride=(1,), padding=()), ValueError, "padding () has 0 entries", "2 of them"),
    (lambda: tr(64, 64, (3,)), ValueError, "kernel_size (3,) has 1 entries", "2 of them"),
    (lambda: tr(stride=[[2, 2]]), TypeError, "stride[0] is [2, 2]", "integer"),
    (lambda: tr(padding=-1), ValueError, "padding is -1", ">= 0"),
    (lambda: tr(padding="full"), ValueError, "padding is 'full'", "'same', 'valid'"),
    (lambda: tr(padding="same", stride=2), ValueError, "stride is (2, 2)", "padding='same'", "stride 1 only"),
    (lambda: tr(groups=3), ValueError, "groups is 3", "must divide in_channels, which is 64"),
    (lambda: tr(64, 60, 3, groups=8), ValueError, "groups is 8", "must divide out_channels, which is 60"),
    (lambda: tr(groups=0), ValueError, "groups is 0", ">= 1"),
    (lambda: tr(padding_mode="mirror"), ValueError, "padding_mode is 'mirror'", "'zeros', 'reflect'"),
    (lambda: tr(bias=1), TypeError, "bias is 1", "True or False"),
    (lambda: tr(dtype=torch.complex64), TypeError, "dtype is torch.complex64", "torch.float64, torch.float32"),
    (lambda: tr(dtype=torch.int64), TypeError, "dtype is torch.int64", "torch.float16"),
    # rank
    (lambda: tr(rank=0), ValueError, "rank is 0", ">= 1"),
    (lambda: tr(rank=-3), ValueError, "rank is -3", ">= 1"),
    (lambda: tr(rank=True), TypeError, "rank is True", "keep ratio in (0, 1]"),
    (lambda: tr(rank="8"), TypeError, "rank is '8'", "integer"),
    (lambda: tr(rank={3}), TypeError, "rank is {3}", "integer"),
    (lambda: tr(rank=1.5), ValueError, "rank is 1.5", "(0, 1]"),
    (lambda: tr(rank=0.0), ValueError, "rank is 0.0", "(0, 1]"),
    (lambda: tr(rank=float("nan")), ValueError, "rank is nan", "(0, 1]"),
    (lambda: tr(rank=0.0005), ValueError, "rank is 0.0005", "18 of 36864", "at least"),
    (lambda: tr(rank=(2, 3)), ValueError, "rank (2, 3) has 2 entries", "3 bonds: r0, r1, r2"),
    (lambda: tr(rank=(2, 3, 0)), ValueError, "rank[2] is 0", ">= 1"),
    (lambda: TuckerConv2d(8, 8, 3, rank={"ri": 2}), ValueError, "rank {'ri': 2}", "bond 'ro'", "ri, ro"),
    (lambda: TuckerConv2d(8, 8, 3, rank={"ri": 2, "ro": 2, "x": 2}), ValueError, "rank names 'x'", "ri, ro"),
    (lambda: TuckerConv2d(8, 8, 3, rank={"ri": 2.5, "ro": 2}), TypeError, "rank['ri'] is 2.5", "integer"),
    (lambda: einsum("i r:4, r h w o", rank=3), ValueError, "rank is 3", "no bond left"),
    # networks
    (lambda: einsum(7), TypeError, "network is 7", "text such as"),
    (lambda: einsum(""), ValueError, "network '': core 0 is empty", "write its axes"),
    (lambda: einsum("i r,, r h w o"), ValueError, "core 1 is empty", "write its axes"),
    (lambda: einsum("i r, r-h w o"), ValueError, "'r-h' in core 1", "write a letter"),
    (lambda: einsum("i r, r h w o q"), ValueError, "bond 'q' is only in core 1", "at least two cores"),
    (lambda: einsum("i r r, r h w o"), ValueError, "axis 'r' is 2 times in core 0", "its own name"),
    (lambda: einsum("a r, r a h w o"), ValueError, "has no input axis", "name one i"),
    (lambda: einsum("i r, r h w"), ValueError, "has no output axis", "name one o"),
    (lambda: einsum("i r, r h o"), ValueError, "kernel_size (3, 3) has 2 entries", "1 axes", "d, h or w"),
    (lambda: einsum("i h r, r h w o"), ValueError, "kernel_size (3, 3)", "is in one core"),
    (lambda: einsum("i r:4, r:5 h w o"), ValueError, "axis 'r' is given the sizes 4 and 5", "write one"),
    (lambda: einsum("i:32 r, r h w o"), ValueError, "fixes axis 'i' at 32", "64"),
    (lambda: einsum("i r:0, r h w o"), ValueError, "size of axis 'r' is 0", ">= 1"),
    (lambda: TensorNetwork((("i", "r"), ("r", "o")), {"i": 1, "o": 1}), ValueError, "no entry for axis 'r'", "['i'"),
    (lambda: TensorNetwork.parse(NETWORK, {"z": 2}), ValueError, "names axis 'z'", "its axes are"),
    (lambda: TensorNetwork.parse(NETWORK).resize({"r": -1}), ValueError, "size of axis 'r' is -1", ">= 1"),
    (lambda: TensorNetwork((("i", "2x"),), {}), ValueError, "axis '2x'", "a letter"),
    # init
    (lambda: tr(init="kaiming"), ValueError, "init is 'kaiming'", "'fan_in', 'fan_out', 'fan_avg'"),
    (lambda: tr(init=2.0), TypeError, "init is 2.0", "tnlayers.Init"),
    (lambda: Init("fan"), ValueError, "mode is 'fan'", "'fan_in'"),
    (lambda: Init(nonlinearity="swish"), ValueError, "nonlinearity is 'swish'", "'relu'"),
    (lambda: Init(nonlinearity="leaky_relu", param="steep"), ValueError, "param is 'steep'", "a number"),
    (lambda: Init(distribution="cauchy"), ValueError, "distribution is 'cauchy'", "'truncated_normal'"),
    (lambda: Init(split="fair"), ValueError, "split is 'fair'", "'balanced'"),
    (lambda: Init(exact=1), TypeError, "exact is 1", "True or False"),
    (lambda: tr(init=Init(input_size=(8, 8, 8))), ValueError, "input_size (8, 8, 8) has 3 entries", "2 of them"),
    (lambda: tr(init=Init(input_size=(2, 2))), ValueError, "input size (2, 2)", "smaller than the kernel"),
    (lambda: tnlayers.solve(TensorNetwork.parse(NETWORK), Geometry(4, 8, ())), ValueError, "(4, 4)", "(8, 4)"),
    (lambda: Geometry(4, 8, 3), TypeError, "kernel_size is 3", "tuple"),
    # strategy, options, classes
    (lambda: tr(strategy="fast"), ValueError, "strategy is 'fast'", "'auto', 'reconstruct', 'factorized'"),
    (
        lambda: tr(groups=2, out_shape=(1, 64), strategy="factorized"),
        ValueError, "strategy is 'factorized'", "groups (2)", "out_shape (1, 64)",
    ),
    (lambda: TTConv2d(8, 8, 3, layout="ring"), ValueError, "layout is 'ring'", "'matrix', 'chain'"),
    (lambda: tnlayers.BTTConv2d(8, 8, 3, blocks=0), ValueError, "blocks is 0", ">= 1"),
    (lambda: tr(blocks=2), TypeError, "blocks is 2", "no such argument"),
    (lambda: TTConv2d(8, 8, 3, lay_out="chain"), TypeError, "lay_out is 'chain'", "layout"),
    (lambda: EinsumConv2d(8, 8, 3), TypeError, "network is missing", "keyword"),
    (lambda: tnlayers.TensorConv2d(8, 8, 3), TypeError, "TensorConv2d has no format", "subclass"),
    (lambda: type("X", (tnlayers.TensorConv2d,), {}, format="mps"), ValueError, "format is 'mps'", "'cp'"),
    # use
    (lambda: tr()(torch.ones(1, 32, 8, 8)), ValueError, "input has shape (1, 32, 8, 8)", "in_channels is 64"),
    (lambda: tr()(torch.ones(64, 8)), ValueError, "input has shape (64, 8)", "(N, 64, h, w)", "unbatched"),
    (lambda: tr()(torch.ones(1, 1, 64, 8, 8)), ValueError, "input has shape (1, 1, 64, 8, 8)", "(64, h, w)"),
    (lambda: tr()(torch.ones(32, 8, 8)), ValueError, "so 32 channels", "in_channels is 64"),
    (lambda: tr().flops((1, 32, 8, 8)), ValueError, "input has shape (1, 32, 8, 8)", "in_channels is 64"),
    (lambda: tr().flops((1, 64, 2, 8)), ValueError, "input size (2, 8)", "smaller than the kernel"),
    (lambda: tr().set_weight_(torch.ones(64, 64, 3)), ValueError, "weight has shape (64, 64, 3)", "(64, 64, 3, 3)"),
    (lambda: tr().set_weight_(torch.full((64, 64, 3, 3), torch.nan)), ValueError, "weight holds NaN", "finite"),
    # linear and transposed layers
    (lambda: TRLinear(0, 8), ValueError, "in_features is 0", ">= 1"),
    (lambda: TRLinear(8, 8, in_shape=(4, 4)), ValueError, "in_shape (4, 4) has product 16", "in_features is 8"),
    (lambda: TRLinear(8, 8)(torch.ones(2, 9)), ValueError, "input has shape (2, 9)", "(*, 8)"),
    (lambda: TRLinear(8, 8).flops(8), TypeError, "input_shape is 8", "sequence"),
    (lambda: TRLinear(8, 8, init=Init(input_size=(4,))), ValueError, "input_size is (4,)", "None"),
    (lambda: TRLinear(8, 8).set_weight_(torch.ones(8, 9)), ValueError, "weight has shape (8, 9)", "(8, 8)"),
    (lambda: TRLinear.from_linear(nn.Bilinear(8, 8, 8)), TypeError, "linear is Bilinear", "nn.Linear"),
    (lambda: EinsumLinear(8, 8, network="i a, a h b, b o"), ValueError, "kernel axis 'h'", "linear layer has none"),
    (lambda: BlockTTLinear(8, 8, in_shape=(2, 2, 2)), ValueError, "in_shape has 3 factors (i1, i2, i3)", "2"),
    (lambda: up(padding="valid"), ValueError, "padding is 'valid'", "integers only"),
    (lambda: up(padding_mode="reflect"), ValueError, "padding_mode is 'reflect'", "accepted: 'zeros'"),
    (lambda: up(output_padding=2), ValueError, "output_padding is 2", "less than stride (2, 2)"),
    (lambda: up(output_padding=-1), ValueError, "output_padding", "-1", ">= 0"),
    (lambda: Geometry(8, 8, (3,), output_padding=1, stride=2), ValueError, "output_padding is 1", "transposed"),
    (lambda: up(padding=4)(torch.ones(1, 8, 2, 2)), ValueError, "input size (2, 2)", "(-3, -3)", "at least 1"),
    (lambda: up()(torch.ones(1, 8, 5, 5), 11), TypeError, "output_size is 11", "sequence of 2"),
    (lambda: up()(torch.ones(1, 8, 5, 5), (11.5, 11)), TypeError, "output_size[0] is 11.5", "integer"),
    (lambda: up()(torch.ones(1, 8, 5, 5), (11,)), ValueError, "output_size is (11,)", "2 or 4 entries"),
    (lambda: up()(torch.ones(1, 8, 5, 5), (3, 11)), ValueError, "output_size is (3, 11)", "from (11, 11) to (12, 12)"),
    (lambda: up()(torch.ones(8), (11, 11)), ValueError, "input has shape (8,)", "(N, 8, h, w)"),
    (lambda: up().set_weight_(torch.ones(12, 8, 3, 3)), ValueError, "weight has shape (12, 8, 3, 3)", "(8, 12, 3, 3)"),
    (lambda: TRConv2d.from_conv(nn.Conv1d(8, 8, 3)), TypeError, "conv is Conv1d", "nn.Conv2d"),
    (lambda: TRConv2d.from_conv(nn.ConvTranspose2d(8, 8, 3)), TypeError, "conv is ConvTranspose2d", "nn.Conv2d"),
    (lambda: TRConv2d.from_conv(nn.LazyConv2d(8, 3)), TypeError, "conv is LazyConv2d", "nn.Conv2d"),
    (lambda: TRConv2d.from_conv(nn.Conv2d(8, 8, 3, device="meta")), ValueError, "decompose is True", "decompose=False"),
    (lambda: CPConv2d.from_conv(nn.Conv2d(8, 8, 3), decompose="yes"), TypeError, "decompose is 'yes'", "True or False"),
    (lambda: tr().set_weight_(torch.ones(64, 64, 3, 3) + 1j), TypeError, "weight is of type torch.complex64", "real"),
    (lambda: tr().set_weight_([1.0]), TypeError, "weight is of type list", "a tensor of real"),
    (lambda: tr().set_weight_(torch.ones(64, 64, 3, 3, device="meta")), ValueError, "weight is on the meta device"),
    (lambda: tr(device="meta").set_weight_(torch.ones(64, 64, 3, 3)), ValueError, "layer is on the meta", "to_empty"),
    (
        lambda: CPConv2d(4, 4, 3, rank=2, dtype=torch.float16).set_weight_(torch.full((4, 4, 3, 3), 1e30)),
        ValueError, "weight has norm", "torch.float16 cannot hold",
    ),
    (lambda: tr().flops((-1, 64, 8, 8)), ValueError, "input_shape[0] is -1", ">= 0"),
    (lambda: tr().flops((1.5, 64, 8, 8)), TypeError, "input_shape[0] is 1.5", "integer"),
    (lambda: Init(param=0.1), ValueError, "param is 0.1", "'relu' has no parameter"),
    (lambda: Init(input_size="8"), TypeError, "input_size is '8'", "integer"),
    (lambda: Init(input_size=(8, 0)), ValueError, "input_size[1] is 0", ">= 1"),
    (lambda: tr(init=Init(input_size=8)), ValueError, "input_size (8,) has 1 entries", "2 of them"),
    (
        lambda: tr(64, 64, 2, dilation=4, padding=2, init=Init(input_size=(1, 1))),
        ValueError, "input_size is (1, 1)", "on padding",
    ),
    (lambda: tr(64, 64, {3, 5}), TypeError, "kernel_size is {3, 5}", "integer"),
    (lambda: tr(rank=b"ab"), TypeError, "rank is b'ab'", "integer"),
    (lambda: tnlayers.BTTConv2d(3, 16, 3, rank=0.25), ValueError, "rank is 0.25", "at least", "n:4"),
    (lambda: type("X", (tnlayers.TensorConv2d,), {}, format=5), TypeError, "format is 5", "tnlayers.Format"),
    (lambda: decompose(torch.ones(2), TensorNetwork.parse(NETWORK)), ValueError, "tensor has shape (2,)", "(4, 4)"),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[2])
def test_sentence(row):
    call, kind, *parts = row
    with pytest.raises(kind, match=".*".join(map(re.escape, parts))) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_table_is_as_long_as_promised():
    assert len({row[2] for row in TABLE}) >= 40


def test_parametrized_cores_are_refused():
    layer = CPConv2d(4, 4, 3, rank=2)
    parametrize.register_parametrization(layer.cores, "0", nn.Softplus())
    for call in (layer.reset_parameters, lambda: layer.set_weight_(torch.ones(4, 4, 3, 3))):
        with pytest.raises(TypeError, match="cores are parametrized"):
            call()


def test_a_failed_fit_changes_nothing():
    layer = CPConv2d(4, 4, 3, rank=2)
    before = [core.detach().clone() for core in layer.cores]
    with pytest.raises(ValueError, match="NaN"):
        layer.set_weight_(torch.full((4, 4, 3, 3), torch.inf))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.cores, strict=True))
