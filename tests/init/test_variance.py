import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tnlayers
from cases import FAMILIES
from networks import geometries, networks
from tnlayers import Geometry, Init, TensorNetwork, solve
from tnlayers.init.draw import FINE, draw, flow
from tnlayers.init.exact_gain import smooth
from tnlayers.init.variance import DISTRIBUTIONS, FAN_MODES
from tnlayers.ops.contraction import contract, reconstruct

CONV = {1: F.conv1d, 2: F.conv2d}
DRAWS = 300

# Wide enough that 300 draws settle the mean to within 3 %: every family, unequal ranks, unequal numbers of factors.
WIDE = [
    (tnlayers.CPConv2d, (32, 48, 3), {"rank": 200, "stride": 2}),
    (tnlayers.TuckerConv2d, (48, 64, 3), {"rank": (24, 40), "dilation": 2}),
    (tnlayers.TTConv2d, (64, 96, 7), {"rank": (40, 60, 30), "in_shape": (4, 4, 4), "out_shape": (6, 4, 4)}),
    (tnlayers.TTConv2d, (64, 64, 5), {"rank": (50, 40, 50, 45), "layout": "chain", "in_shape": (8, 8)}),
    (tnlayers.TRConv2d, (60, 64, 5), {"rank": (16, 20, 15, 18), "in_shape": (60,), "out_shape": (8, 8)}),
    (tnlayers.BTTConv2d, (64, 64, 7), {"rank": (6, 5, 6, 5, 6), "blocks": 12}),
    (tnlayers.EinsumConv2d, (64, 64, 5), {"rank": 20, "network": "i1 a, i2 a b, b h c, c w a, a o"}),
    (tnlayers.HTConv2d, (64, 96, 5), {"rank": (20, 40, 30, 40)}),
    (tnlayers.BlockTTConv2d, (64, 64, 5), {"rank": 3, "stride": 2}),
    (tnlayers.TRConvTranspose2d, (64, 48, 4), {"rank": 30, "stride": 2, "padding": 1}),
    (tnlayers.CPLinear, (512, 384), {"rank": 100}),
    (tnlayers.BlockTTLinear, (256, 256), {"rank": 4}),
]
# Small ranks, whose draws differ so much that four standard errors of 300 of them are up to a quarter: rank 1, groups,
# stride, dilation, 1x1 kernels, 1d and 3d. What these cannot see is held by the identities further down.
NARROW = [
    (tnlayers.CPConv2d, (16, 16, 3), {"rank": 1}),
    (tnlayers.CPConv1d, (32, 48, 5), {"rank": 16, "stride": 2, "groups": 2}),
    (tnlayers.TuckerConv2d, (32, 48, 3), {"rank": (6, 11), "dilation": 2}),
    (tnlayers.TuckerConv2d, (32, 48, (3, 5)), {"rank": (8, 12, 2, 4)}),
    (tnlayers.TTConv2d, (32, 48, 3), {"rank": (4, 9, 6), "groups": 4, "in_shape": (2, 2, 2), "out_shape": (4, 4, 3)}),
    (tnlayers.TTConv2d, (36, 64, 1), {"rank": 6, "in_shape": (6, 6), "out_shape": (4, 4, 4), "stride": 2}),
    (tnlayers.TTConv3d, (16, 16, (3, 2, 1)), {"rank": (8, 8, 8, 8), "layout": "chain", "stride": (2, 1, 3)}),
    (tnlayers.TRConv2d, (64, 64, 3), {"rank": (2, 3, 4, 5, 10, 3, 2), "in_shape": (4, 4, 4), "out_shape": (4, 4, 4)}),
    (tnlayers.TRConv2d, (30, 24, 3), {"rank": 5, "in_shape": (30,), "out_shape": (2, 3, 4), "padding": 1}),
    (tnlayers.BTTConv2d, (32, 32, 3), {"rank": (3, 4, 2, 2, 3), "blocks": 5}),
    (tnlayers.BTTConv2d, (64, 32, 1), {"rank": 3, "blocks": 2, "groups": 2, "stride": 2}),
    (
        tnlayers.CPConvTranspose2d,
        (16, 24, (3, 2)),
        {"rank": 9, "stride": (2, 1), "groups": 4, "output_padding": (1, 0)},
    ),
    (tnlayers.TTConvTranspose1d, (32, 48, 5), {"rank": (4, 3), "dilation": 2, "stride": 3}),
    (tnlayers.HTConvTranspose3d, (16, 16, 2), {"rank": 4, "stride": 2}),
    (tnlayers.TuckerLinear, (64, 100), {"rank": (5, 7)}),
    (tnlayers.TTLinear, (64, 48), {"rank": (3, 2), "in_shape": (4, 4, 4), "out_shape": (4, 4, 3)}),
    (tnlayers.TRLinear, (60, 64), {"rank": 3, "in_shape": (6, 10), "out_shape": (8, 8)}),
    (tnlayers.BTTLinear, (64, 64), {"rank": 2, "blocks": 3}),
]
LAYERS = WIDE + NARROW


def target(layer: tnlayers.TensorLayer) -> float:
    """gain^2 / fan, written out here once more from the arguments alone."""
    g = layer.geometry
    strided = "fan_in" if g.transposed else "fan_out"
    fans = {"fan_in": g.in_channels / g.groups, "fan_out": g.out_channels / g.groups}
    fans = {name: fan * math.prod(g.kernel_size) for name, fan in fans.items()}
    fans[strided] /= math.prod(g.stride)
    return 2 / (fans | {"fan_avg": sum(fans.values()) / 2})[layer.init.mode]


def ratios(layer: tnlayers.TensorLayer) -> torch.Tensor:
    """E[W^2] over its target for 300 draws."""
    found = torch.empty(DRAWS, dtype=torch.float64)
    for k in range(DRAWS):
        if k:
            layer.reset_parameters()
        found[k] = layer.weight.detach().square().mean() / target(layer)
    return found


# That the entries of every other distribution have their moments is a promise, held by the contract test.
@pytest.mark.parametrize(
    ("layer", "args", "arguments", "distribution"),
    [(*case, "normal") for case in WIDE] + [(*WIDE[6], distribution) for distribution in DISTRIBUTIONS[1:]],
)
def test_variance_over_draws(layer, args, arguments, distribution):
    torch.manual_seed(0)
    made = layer(*args, **arguments, init=Init("fan_in", distribution=distribution, exact=False), dtype=torch.float64)
    assert abs(float(ratios(made).mean()) - 1) < 0.03


@pytest.mark.parametrize(
    ("layer", "args", "arguments", "distribution"),
    [(*case, distribution) for case in NARROW for distribution in ("normal", "orthogonal")]
    + [(*NARROW[0], distribution) for distribution in DISTRIBUTIONS if distribution not in ("normal", "orthogonal")],
)
def test_variance_over_draws_at_small_rank(layer, args, arguments, distribution):
    torch.manual_seed(0)
    made = layer(*args, **arguments, init=Init("fan_out", distribution=distribution, exact=False), dtype=torch.float64)
    found = ratios(made)
    # The constant is for rounding alone: at rank 1, every orthogonal draw has the same norm.
    assert abs(float(found.mean()) - 1) < 4 * float(found.std()) / math.sqrt(DRAWS) + 1e-9


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("layer", "args", "arguments"), LAYERS)
def test_every_exact_draw_is_on_target(layer, args, arguments, distribution):
    torch.manual_seed(0)
    for mode in FAN_MODES:
        for dtype in (torch.float32, torch.float64):
            made = layer(*args, **arguments, init=Init(mode, distribution=distribution), dtype=dtype)
            ratio = float(made.weight.detach().double().square().mean()) / target(made)
            assert abs(ratio - 1) < 1e-4


def gains(network: TensorNetwork, geometry: Geometry, cores: list[torch.Tensor]) -> list[float]:
    """E[y^2] for inputs of unit square that are white, constant over taps, and over taps and channels; by sums of the
    kernel along the axes that ``smooth`` names, or all of them.
    """
    kernel = reconstruct(network, cores).reshape(network.shape(network.dense_axes))
    inputs, taps = ([network.dense_axes.index(axis) for axis in axes] for axes in smooth(network, geometry))
    found = [kernel] + [kernel.sum(dims) if dims else kernel for dims in (taps, inputs + taps)]
    return [float(each.square().sum()) / geometry.out_channels for each in found]


@settings(max_examples=100, deadline=None)
@given(
    network=networks(),
    distribution=st.sampled_from(DISTRIBUTIONS),
    stride=st.integers(1, 2),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_exact_draw_has_one_gain_on_white_and_smooth_inputs(network, distribution, stride, transposed, seed):
    torch.manual_seed(seed)
    out, inner, *kernel = network.dense_shape
    geometry, init = Geometry(inner, out, tuple(kernel), stride, transposed=transposed), Init(distribution=distribution)
    answer = solve(network, geometry, init)
    blank = [torch.empty(shape, dtype=torch.float64) for shape in network.core_shapes]
    wanted = answer.weight_std**2 * network.dense_params / geometry.out_channels
    exact = draw(network, geometry, answer, init, blank)
    assert gains(network, geometry, exact) == pytest.approx([wanted] * 3, rel=1e-6)
    white = draw(network, geometry, answer, replace(init, exact="white"), blank)
    assert gains(network, geometry, white)[0] == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("layer", FAMILIES)
def test_exact_draws_on_inputs_that_are_drawn(layer):
    """What the sums of the kernel promise, seen in outputs: behind inputs of every kind, one second moment."""
    torch.manual_seed(0)
    made = layer(16, 12, 3, bias=False, rank=2, dtype=torch.float64)
    n, wanted = 5_000, 2.0
    white = torch.randn(n, 16, 3, 3, dtype=torch.float64)
    smooth = white[:, :, :1, :1].expand_as(white)
    for inputs in (white, white.relu(), smooth, smooth.relu(), torch.ones_like(white[:1])):
        x = inputs / inputs.square().mean().sqrt()
        y = made(x).detach().square().mean(1).flatten()
        error = 5 * float(y.std()) / math.sqrt(n) if len(y) > 1 else 0.0
        shared = "i1" in made.network.sizes and layer is tnlayers.BlockTTConv2d  # an axis of several cores has no mean
        if not (shared and x.min() >= 0):
            assert abs(float(y.mean()) - wanted) < error + 1e-6


@settings(max_examples=50, deadline=None)
@given(network=networks(), seed=st.integers(0, 2**31))
def test_orthogonal_cores_are_semi_orthogonal_along_the_flow(network: TensorNetwork, seed: int):
    torch.manual_seed(seed)
    out, inner, *kernel = network.dense_shape
    geometry, init = Geometry(inner, out, tuple(kernel)), Init(distribution="orthogonal", exact=False)
    answer = solve(network, geometry, init)
    blank = [torch.empty(shape, dtype=torch.float64) for shape in network.core_shapes]
    cores = draw(network, geometry, answer, init, blank)
    for core, std, (came, went, passed) in zip(cores, answer.std, flow(network), strict=True):
        assert sorted([*came, *went, *passed]) == list(range(core.ndim))
        assert float(core.square().mean()) == pytest.approx(std**2, rel=1e-10)
        rows = math.prod(core.shape[dim] for dim in came)
        count = math.prod(core.shape[dim] for dim in passed)
        matrices = core.permute([*passed, *came, *went]).reshape(count, rows, -1)
        gram = matrices @ matrices.mT if rows <= matrices.shape[2] else matrices.mT @ matrices
        eye = torch.eye(gram.shape[1], dtype=gram.dtype)
        torch.testing.assert_close(gram, eye.expand_as(gram) * gram[0, 0, 0], rtol=1e-9, atol=1e-9 * float(gram.max()))


def test_orthogonal_trees_are_partial_isometries():
    """From inputs through narrower bonds to outputs: all singular values alike, as many as the narrowest bond."""
    torch.manual_seed(0)
    for text, rank in (("i:32 a:8, a h:3 w:3 b:6, b o:32", 6), ("i1:4 a:4, a i2:8 h:3 b:5, b o1:4 c:8, c o2:8", 5)):
        network = TensorNetwork.parse(text)
        out, inner, *kernel = network.dense_shape
        geometry, init = Geometry(inner, out, tuple(kernel)), Init(distribution="orthogonal", exact="white")
        blank = [torch.empty(shape, dtype=torch.float64) for shape in network.core_shapes]
        cores = draw(network, geometry, solve(network, geometry, init), init, blank)
        values = torch.linalg.svdvals(reconstruct(network, cores).flatten(1))
        torch.testing.assert_close(values[:rank], values[:1].expand(rank))
        assert float(values[rank:].max()) < 1e-10


def test_the_paper_s_rule_is_one_word():
    made = tnlayers.TRConv2d(8, 8, 3, rank=2, init="paper")
    assert made.init == Init(distribution="normal", split="equal", exact=False)


@pytest.mark.parametrize("exact", ["yes", 1, None, "True"])
def test_bad_exact(exact):
    with pytest.raises(TypeError, match=r"exact is .*; it must be True or False or 'white'"):
        Init(exact=exact)


@settings(max_examples=100, deadline=None)
@given(network=networks(), split=st.sampled_from(["equal", "balanced"]), mode=st.sampled_from(FAN_MODES))
def test_any_network_meets_the_target(network: TensorNetwork, split: str, mode: str):
    """Second moments of independent factors multiply, and of uncorrelated terms add: so the cores' second moments, as
    constant tensors, contract to the kernel's.
    """
    out, inner, *kernel = network.dense_shape
    answer = solve(network, Geometry(inner, out, tuple(kernel), stride=2), Init(mode, split=split))
    moments = [
        torch.full(shape, s**2, dtype=torch.float64) for shape, s in zip(network.core_shapes, answer.std, strict=True)
    ]
    found = reconstruct(network, moments)
    fans = {"fan_in": inner * math.prod(kernel), "fan_out": out * math.prod(kernel) / 2 ** len(kernel)}
    fan = (fans | {"fan_avg": sum(fans.values()) / 2})[mode]
    expected = torch.full_like(found, 2 / fan)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert answer.weight_std == pytest.approx(math.sqrt(answer.gain**2 / answer.fan))


@settings(max_examples=25, deadline=None)
@given(network=networks(max_size=4), seed=st.integers(0, 2**31))
def test_any_network_by_drawing(network: TensorNetwork, seed: int):
    """The same by drawing: 2000 kernels from cores of random signs, which have the variance but no heavy tails."""
    draws, (out, inner, *kernel) = 2000, network.dense_shape
    answer = solve(network, Geometry(inner, out, tuple(kernel)))
    generator = torch.Generator().manual_seed(seed)
    cores = [
        s * (2 * torch.randint(2, (draws, *shape), generator=generator, dtype=torch.float64) - 1)
        for shape, s in zip(network.core_shapes, answer.std, strict=True)
    ]
    kernels = contract(cores, [("draw", *core) for core in network.cores], ("draw", *network.dense_axes))
    ratios = kernels.flatten(1).square().mean(1) * answer.fan / answer.gain**2
    # Five standard errors for 25 networks; the constant covers kernels whose square is the same in every draw.
    assert abs(float(ratios.mean()) - 1) < 5 * float(ratios.std()) / math.sqrt(draws) + 1e-9


def test_one_core_is_kaiming_and_xavier():
    """A dense kernel of one core, stride 1: torch's own standard deviations, exactly in the solver."""
    network = TensorNetwork.parse("o:48 i:32 h:3 w:5")
    geometry = Geometry(32, 48, (3, 5))
    for mode in ("fan_in", "fan_out"):
        for nonlinearity in ("relu", "tanh", "linear", "selu"):
            fans = nn.init._calculate_fan_in_and_fan_out(torch.empty(48, 32, 3, 5))
            expected = nn.init.calculate_gain(nonlinearity) / math.sqrt(fans[mode == "fan_out"])
            assert solve(network, geometry, Init(mode, nonlinearity)).std == (pytest.approx(expected, rel=1e-12),)
    xavier = math.sqrt(2 / sum(fans))
    assert solve(network, geometry, Init("fan_avg", "linear")).std == (pytest.approx(xavier, rel=1e-12),)
    # And against what torch's functions draw, 23,040 entries: the relative error of a standard deviation is 1/sqrt(2N).
    torch.manual_seed(0)
    tolerance = 4 / math.sqrt(2 * 48 * 32 * 15)
    drawn = nn.init.kaiming_normal_(torch.empty(48, 32, 3, 5)).std()
    assert solve(network, geometry).std[0] == pytest.approx(float(drawn), rel=tolerance)
    drawn = nn.init.xavier_normal_(torch.empty(48, 32, 3, 5)).std()
    assert solve(network, geometry, Init("fan_avg", "linear")).std[0] == pytest.approx(float(drawn), rel=tolerance)


def test_leaky_relu_takes_its_slope():
    assert Init(nonlinearity="leaky_relu", param=0.2).gain == pytest.approx(math.sqrt(2 / 1.04))


def test_a_hundred_cores_do_not_overflow():
    """Bonds of 1000 between 100 cores: their product is 10^297, and with a hyperedge on top beyond any float."""
    count = 100
    cores = [
        ["i", "b1", "all"],
        *([f"b{k}", f"b{k + 1}", "all"] for k in range(1, count - 1)),
        [f"b{count - 1}", "o", "all"],
    ]
    sizes = dict.fromkeys({axis for core in cores for axis in core}, 1000) | {"all": 10**15, "i": 64, "o": 64}
    answer = solve(TensorNetwork(cores, sizes), Geometry(64, 64, ()))
    log_bonds = (count - 1) * math.log(1000) + 15 * math.log(10)
    assert 2 * sum(map(math.log, answer.std)) + log_bonds == pytest.approx(math.log(2 / 64), abs=1e-9)


def test_balanced_split_gives_equal_norms():
    network = TensorNetwork.parse("i:64 a:3, a h:3 w:3 b:9, b o:16")
    answer = solve(network, Geometry(64, 16, (3, 3)), Init(split="balanced"))
    norms = [s * math.sqrt(math.prod(shape)) for s, shape in zip(answer.std, network.core_shapes, strict=True)]
    assert norms == pytest.approx([norms[0]] * 3)


# ------------------------------------------------------------------ taps and fans


@settings(max_examples=100, deadline=None)
@given(geometry=geometries())
def test_taps_are_counted_exactly(geometry: Geometry):
    """Convolve ones with ones: every output entry counts its taps, and its gradient counts the pairs of every input."""
    ndim = geometry.ndim
    x = torch.ones(1, 1, *geometry.input_size, dtype=torch.float64, requires_grad=True)
    kernel = torch.ones(1, 1, *geometry.kernel_size, dtype=torch.float64)
    y = CONV[ndim](x, kernel, None, geometry.stride, geometry.padding, geometry.dilation)
    y.sum().backward()
    forward, backward = geometry.taps
    assert forward == pytest.approx(float(y.detach().mean()), rel=1e-12)
    assert backward == pytest.approx(float(x.grad.mean()), rel=1e-12)
    ratio = math.prod(geometry.output_size(geometry.input_size)) / math.prod(geometry.input_size)
    assert backward == pytest.approx(forward * ratio, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(geometry=geometries(), data=st.data())
def test_taps_of_transposed_convolutions_are_counted_exactly(geometry: Geometry, data: st.DataObject):
    """The same through torch's transposed convolution; without an input size, the fans exchange kernel and stride."""
    limits = [max(pair) - 1 for pair in zip(geometry.stride, geometry.dilation, strict=True)]
    extra = tuple(data.draw(st.integers(0, most)) for most in limits)
    least = replace(geometry, padding=0, padding_mode="zeros", input_size=None, transposed=True, output_padding=extra)
    size = least.output_size(geometry.input_size)
    padding = tuple(data.draw(st.integers(0, min(2, (length - 1) // 2))) for length in size)
    made = replace(least, padding=padding, input_size=geometry.input_size)
    ones = {"dtype": torch.float64}
    x = torch.ones(1, 1, *geometry.input_size, **ones, requires_grad=True)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[geometry.ndim - 1]
    kernel = torch.ones(1, 1, *geometry.kernel_size, **ones)
    y = conv(x, kernel, None, made.stride, made.padding, made.output_padding, 1, made.dilation)
    y.sum().backward()
    assert tuple(y.shape[2:]) == made.output_size(geometry.input_size)
    forward, backward = made.taps
    assert forward == pytest.approx(float(y.detach().mean()), rel=1e-12)
    assert backward == pytest.approx(float(x.grad.mean()), rel=1e-12)
    assert least.taps == replace(least, transposed=False, output_padding=0).taps[::-1]


def test_without_an_input_size_the_taps_are_those_away_from_borders():
    """A circular convolution has no border: there the counts of the unknown size are exact."""
    for stride, kernel in ((1, 3), (2, 3), (3, 5), (2, 1)):
        x = torch.ones(1, 1, 12, dtype=torch.float64, requires_grad=True)
        padded = F.pad(x, (kernel // 2, kernel // 2), mode="circular")
        y = F.conv1d(padded, torch.ones(1, 1, kernel, dtype=torch.float64), stride=stride)
        y.sum().backward()
        taps = Geometry(1, 1, (kernel,), stride, kernel // 2).taps
        assert taps == pytest.approx((float(y.detach().mean()), float(x.grad.mean())))


def test_other_padding_makes_every_tap_real():
    kwargs = {"padding": 1, "input_size": (8, 8)}
    assert Geometry(4, 4, (3, 3), padding_mode="circular", **kwargs).taps == (9.0, 9.0)
    assert Geometry(4, 4, (3, 3), **kwargs).taps[0] == pytest.approx((3 - 2 / 8) ** 2)


def test_same_padding_of_an_even_kernel():
    geometry = Geometry(1, 1, (4,), padding="same", dilation=3, input_size=(10,))
    assert geometry.pads == ((4, 5),)
    padded = F.pad(torch.ones(1, 1, 10), (4, 5))
    y = F.conv1d(padded, torch.ones(1, 1, 4), dilation=3)
    assert y.shape[-1] == 10
    assert geometry.taps[0] == pytest.approx(float(y.mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (tnlayers.TRConv2d, {"stride": 2, "padding": 1, "rank": 4}),
        (tnlayers.CPConv2d, {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 2), "rank": 32}),
        (tnlayers.TTConv2d, {"groups": 2, "stride": 3, "rank": 5}),
        (tnlayers.TuckerConv2d, {"stride": 2, "rank": 8, "kernel_size": 1}),
        (tnlayers.BTTConv2d, {"padding": 1, "rank": 2, "blocks": 3}),
        (tnlayers.BlockTTConv2d, {"padding": 1, "rank": 2}),
        (tnlayers.TRConvTranspose2d, {"stride": 2, "padding": 1, "rank": 4}),
        (tnlayers.CPConvTranspose2d, {"stride": (3, 2), "dilation": (1, 2), "output_padding": (2, 1), "rank": 32}),
        (tnlayers.TTConvTranspose2d, {"groups": 2, "stride": 3, "rank": 5, "kernel_size": (2, 4)}),
        (tnlayers.HTLinear, {"rank": 5}),
        (tnlayers.TuckerLinear, {"rank": 6}),
    ],
)
def test_fans_by_autograd(layer, arguments):
    """White input (white output gradient): the solver's fan_in (fan_out) keeps its second moment times gain squared."""
    torch.manual_seed(0)
    linear = issubclass(layer, tnlayers.TensorLinear)
    size, draws = () if linear else (12, 11), 60
    arguments = ({} if linear else {"kernel_size": 3}) | arguments
    for mode, gain in (("fan_in", 2.0), ("fan_out", 2.0)):
        found = torch.empty(draws, dtype=torch.float64)
        for k in range(draws):
            made = layer(16, 24, **arguments, bias=False, init=Init(mode, input_size=size), dtype=torch.float64)
            x = torch.randn(200 if linear else 4, 16, *size, dtype=torch.float64, requires_grad=True)
            y = made(x)
            if mode == "fan_in":
                found[k] = y.detach().square().mean() / x.detach().square().mean()
            else:
                dy = torch.randn_like(y)
                y.backward(dy)
                found[k] = x.grad.square().mean() / dy.square().mean()
        error = float(found.std()) / math.sqrt(draws)
        assert error < 0.05 * gain
        assert abs(float(found.mean()) - gain) < 4 * error


# ------------------------------------------------------------------ the Reproducing Transformation


def reproduced(dy: torch.Tensor, kernel: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The input's gradient as the module docstring of tnlayers.init.variance states it: one stride-1 convolution."""
    groups, out, ndim = geometry.groups, geometry.out_channels, geometry.ndim
    # Put stride - 1 zeros between neighbours.
    spread = dy.new_zeros(*dy.shape[:2], *((n - 1) * s + 1 for n, s in zip(dy.shape[2:], geometry.stride, strict=True)))
    spread[(..., *(slice(None, None, s) for s in geometry.stride))] = dy
    # Pad by the span of the kernel less the padding, on the right also by what the stride left over.
    pad: list[int] = []
    for n, span, p, s in reversed(
        list(zip(geometry.input_size, geometry.spans, geometry.padding, geometry.stride, strict=True))
    ):
        pad += [span - 1 - p, span - 1 - p + (n + 2 * p - span) % s]
    # Flip the kernel and exchange its channel axes, within each group.
    flipped = kernel.flip(tuple(range(2, 2 + ndim))).unflatten(0, (groups, out // groups)).transpose(1, 2).flatten(0, 1)
    return CONV[ndim](F.pad(spread, pad), flipped, dilation=geometry.dilation, groups=groups)


@settings(max_examples=100, deadline=None)
@given(geometry=geometries(), seed=st.integers(0, 2**31))
def test_reproducing_transformation(geometry: Geometry, seed: int):
    """Stride, dilation, padding, groups, asymmetric kernels; 1d and 2d; padding beyond the kernel's span crops."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = randn(2, geometry.in_channels, *geometry.input_size).requires_grad_()
    kernel = randn(geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
    y = CONV[geometry.ndim](
        x, kernel, None, geometry.stride, geometry.padding, geometry.dilation, groups=geometry.groups
    )
    dy = randn(*y.shape)
    (expected,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(reproduced(dy, kernel, geometry), expected, rtol=1e-12, atol=1e-12)


def test_many_input_axes_cost_no_time_and_no_dimensions():
    for shape in ((2,) * 12, (8,) + (1,) * 80):
        made = tnlayers.TRLinear(math.prod(shape), 16, in_shape=shape, rank=1, dtype=torch.float64)
        assert float(made.weight.detach().square().mean()) == pytest.approx(target(made), rel=1e-9)
    assert smooth(made.network, made.geometry) == (("i1",), ())


def test_which_axes_an_input_may_be_constant_along():
    network = TensorNetwork.parse("i1:4 i2:1 a:3, a h:3 w:2 b:3, b o:8")
    for arguments, axes in (
        ({}, (("i1",), ("h", "w"))),
        ({"stride": (2, 1)}, (("i1",), ("h", "w"))),
        ({"stride": (2, 1), "transposed": True}, (("i1",), ("w",))),
        ({"stride": 2, "transposed": True}, (("i1",), ())),
    ):
        assert smooth(network, Geometry(4, 8, (3, 2), **arguments)) == axes
    shared = TensorNetwork.parse("i1:4 i2:2 a:3, i1:4 a:3 o:8")  # i1 is in two cores
    assert smooth(shared, Geometry(8, 8, ())) == (("i2",), ())


def test_large_kernels_are_not_contracted(monkeypatch):
    """Beyond the limit, the norm is still exact, and nothing of the kernel's size is ever made."""
    monkeypatch.setattr(tnlayers.init.draw, "LARGEST", 1000)
    monkeypatch.setattr(tnlayers.init.exact_gain, "reconstruct", None)
    torch.manual_seed(0)
    made = tnlayers.TTConv2d(16, 16, 3, rank=3, dtype=torch.float64)
    monkeypatch.undo()
    assert float(made.weight.detach().square().mean()) == pytest.approx(target(made), rel=1e-5)
    coarse = tnlayers.TTConv2d(128, 128, 3, rank=3)  # in float32 throughout
    assert float(coarse.weight.detach().double().square().mean()) == pytest.approx(target(coarse), rel=1e-4)


def test_fake_tensors():
    with FakeTensorMode():
        made = tnlayers.TRConv2d(8, 8, 3, rank=2)
    assert [tuple(core.shape) for core in made.cores] == list(made.network.core_shapes)


@pytest.mark.parametrize("typical", [False, True])
@pytest.mark.parametrize("channels", [8, 128])  # made exact in float64, and in float32
def test_layers_are_the_same_under_autocast(channels, typical):
    assert 9 * 8**2 <= FINE < 9 * 128**2
    weights = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            weights.append(tnlayers.TRConv2d(channels, channels, 3, rank=4, init=Init(typical=typical)).weight)
    assert torch.equal(*weights)


def between_every_two(cores):
    axes = ["i1", "i2", "i3", "h", "w", "o1", "o2", "o3"]
    bonds = [[f"b{min(k, j)}x{max(k, j)}:2" for j in range(cores) if j != k] for k in range(cores)]
    return ", ".join(" ".join([*axes[k : k + 1], *bonds[k]]) for k in range(cores))


@pytest.mark.parametrize("typical", [False, True])
@pytest.mark.parametrize("cores", [10, 12])
def test_no_draw_goes_through_tensors_far_larger_than_the_kernel(cores, typical, monkeypatch):
    """Ten such cores would contract to a small kernel through 19 GB; the draw then has its norm in expectation."""
    for name in ("exact", "typical", "squared"):
        monkeypatch.setattr(f"tnlayers.init.draw.{name}", None)
    own = {"network": between_every_two(cores), "in_shape": (4,) * 3, "out_shape": (4,) * 3}
    with pytest.warns(tnlayers.layers.core_memory.LargerThanDense) if cores == 12 else nullcontext():
        layer = tnlayers.EinsumConv2d(64, 64, 3, init=Init(typical=typical), **own)
    for core, std in zip(layer.cores, layer.variance.std, strict=True):
        # Orthogonal matrices are scaled to have this mean square; a core is a few of them.
        assert float(core.detach().square().mean().sqrt()) == pytest.approx(std, rel=0.5)
