"""tensorly-torch's layers under the variance solver, measured by tensorly-torch's own reconstruction and forward."""

import math
import re
import sys

import pytest
import tensorly
import tensorly.decomposition
import tltorch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import tnlayers
from tnlayers import Init
from tnlayers.interop import tensorly_torch
from tnlayers.interop.tensorly_torch import from_tltorch, initialize_, to_tltorch

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
INPUT = {1: (11,), 2: (9, 10), 3: (5, 6, 7)}


def conv(factorization, kernel_size=(3, 5), *, rank, channels=(6, 8), **kwargs):
    return tltorch.FactorizedConv(*channels, kernel_size, factorization=factorization, rank=rank, **kwargs)


def linear(factorization, *, rank, shapes=((2, 3, 2), (4, 2, 2)), **kwargs):
    return tltorch.FactorizedLinear(*shapes, factorization=factorization, rank=rank, **kwargs)


# Every family and implementation, 1d to 3d; strides, paddings and dilations; unequal ranks; one rank above its axis.
LAYERS = {
    "cp 1d": lambda **k: conv("cp", (3,), rank=5, stride=2, bias=True, **k),
    "cp 2d": lambda **k: conv("cp", rank=7, stride=(2, 1), padding=(1, 0), dilation=(1, 2), **k),
    "cp mobilenet": lambda **k: conv("cp", rank=4, stride=(1, 3), padding=2, implementation="mobilenet", **k),
    "cp 3d reconstructed": lambda **k: conv("cp", (2, 3, 1), rank=4, bias=True, implementation="reconstructed", **k),
    "tucker 1d": lambda **k: conv("tucker", (4,), rank=(7, 3, 2), padding=1, **k),
    "tucker 2d": lambda **k: conv("tucker", rank=(5, 4, 2, 3), stride=2, padding=(0, 2), bias=True, **k),
    "tucker spatial": lambda **k: conv("tucker", rank=(3, 5, 3, 5), fixed_rank_modes="spatial", dilation=(2, 1), **k),
    "tt 1d": lambda **k: conv("tt", (3,), rank=(1, 4, 9, 1), padding=2, **k),
    "tt 2d": lambda **k: conv("tt", rank=(1, 4, 6, 5, 1), stride=(1, 2), dilation=2, bias=True, **k),
    "tt 3d": lambda **k: conv("tt", (1, 2, 3), rank=(1, 3, 2, 4, 2, 1), stride=(2, 1, 1), padding=(0, 1, 1), **k),
    "tt reconstructed": lambda **k: conv("tt", rank=(1, 2, 3, 4, 1), padding=1, implementation="reconstructed", **k),
    "dense": lambda **k: conv("dense", rank=None, stride=2, bias=True, implementation="reconstructed", **k),
    "cp linear": lambda **k: linear("cp", rank=6, **k),
    "cp linear, uneven": lambda **k: linear("cp", rank=6, shapes=((12,), (2, 2, 4)), bias=False, **k),
    "tucker linear": lambda **k: linear("tucker", rank=(2, 2, 3, 2, 3, 1), **k),
    "tucker linear, uneven": lambda **k: linear(
        "tucker", rank=(3, 2, 5), shapes=((2, 6), (16,)), implementation="reconstructed", **k
    ),
    "blocktt": lambda **k: linear("blocktt", rank=(1, 5, 3, 1), bias=False, **k),
    "blocktt reconstructed": lambda **k: linear("blocktt", rank=(1, 7, 2, 1), implementation="reconstructed", **k),
    "blocktt of one": lambda **k: linear("blocktt", rank=(1, 1), shapes=((12,), (16,)), **k),
    "dense linear": lambda **k: linear("dense", rank=None, **k),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def kernel(layer):
    """The dense kernel as tensorly-torch reconstructs it, its axes as torch's."""
    weight = layer.weight
    if isinstance(layer, tltorch.FactorizedLinear):
        return weight.to_matrix().detach()
    dense = weight.to_tensor().detach()
    return dense.movedim(-1, 0) if isinstance(weight, tltorch.TTTensor) else dense


def target(layer, mode):
    """gain^2 / fan of a layer, from its kernel's shape and its stride alone."""
    out, inner, *size = kernel(layer).shape
    stride = math.prod(layer.stride.tolist()) if size else 1
    return 2 / (inner * math.prod(size) if mode == "fan_in" else out * math.prod(size) / stride)


def example(layer, *batch, dtype=torch.float32):
    if isinstance(layer, tltorch.FactorizedLinear | tnlayers.TensorLinear):
        return torch.randn(*batch, layer.in_features, dtype=dtype)
    order = layer.order if isinstance(layer, tltorch.FactorizedConv) else layer.ndim
    return torch.randn(*batch, layer.in_channels, *INPUT[order], dtype=dtype)


def state(module):
    """Copies of everything that an initialisation could change."""
    held = [tensor.detach().clone() for tensor in (*module.parameters(), *module.buffers())]
    return held, [layer.init for layer in module.modules() if isinstance(layer, tnlayers.TensorLayer)]


def assert_same_state(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0, equal_nan=True)
    assert a[1] == b[1]


# ------------------------------------------------------------------ initialisation


@each_layer
def test_second_moments_contract_to_the_target(make, monkeypatch):
    """The variances of the cores in place of their values: then every entry of the kernel that tensorly-torch makes of
    them is its variance, and on inputs (output gradients) of ones, its forward (backward) gives second moments.
    """

    def moments(network, geometry, variance, init, cores):
        return [torch.full_like(core, std**2) for core, std in zip(cores, variance.std, strict=True)]

    monkeypatch.setattr(tensorly_torch, "draw", moments)
    layer = make(dtype=torch.float64)
    for mode in ("fan_in", "fan_out"):
        for split in ("equal", "balanced"):
            initialize_(layer, Init(mode, split=split))
            found = kernel(layer)
            torch.testing.assert_close(found, torch.full_like(found, target(layer, mode)), rtol=1e-10, atol=0)
        x = torch.ones_like(example(layer, 1, dtype=torch.float64)).requires_grad_()
        initialize_(layer, Init(mode, input_size=x.shape[2:] or None))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        y = layer(x)
        y.sum().backward()
        found = y.detach() if mode == "fan_in" else x.grad
        assert float(found.mean()) == pytest.approx(2, rel=1e-10)


@each_layer
def test_every_exact_draw_is_on_target(make):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        layer = make(dtype=dtype).requires_grad_(False)
        parameters = list(layer.parameters())
        for mode in ("fan_in", "fan_out"):
            for distribution in ("normal", "truncated_normal", "uniform"):
                assert initialize_(layer, Init(mode, distribution=distribution)) is layer
                ratio = float(kernel(layer).double().square().mean()) / target(layer, mode)
                assert abs(ratio - 1) < 1e-4
        for before, after in zip(parameters, layer.parameters(), strict=True):
            assert before is after
            assert after.dtype == dtype
            assert not after.requires_grad
        if layer.bias is not None:
            bound = 1 / math.sqrt(kernel(layer)[0].numel())
            assert 0 < float(layer.bias.std()) < float(layer.bias.abs().max()) <= bound


@pytest.mark.parametrize(
    "make",
    [
        lambda: conv("cp", (5, 5), rank=150, channels=(32, 48), stride=2),
        lambda: conv("tucker", (3, 3), rank=(24, 40, 3, 2), channels=(48, 64)),
        lambda: conv("tt", (5, 5), rank=(1, 60, 50, 45, 1), channels=(64, 64)),
        lambda: linear("cp", rank=200, shapes=((8, 8), (6, 8))),
        lambda: linear("tucker", rank=(5, 6, 7, 8), shapes=((8, 8), (6, 8))),
        lambda: linear("blocktt", rank=(1, 40, 1), shapes=((8, 8), (6, 8))),
    ],
)
def test_variance_over_draws(make):
    torch.manual_seed(0)
    layer = make()
    found = torch.stack([kernel(initialize_(layer, "paper")).square().mean() for _ in range(100)]) / target(
        layer, "fan_in"
    )
    error = float(found.std()) / math.sqrt(len(found))
    assert 1e-4 < error < 0.1
    assert abs(float(found.mean()) - 1) < 4 * error


@each_layer
def test_white_noise(make):
    """One exact draw: the signal's second moment doubles, gain squared, and less where taps fall on padding."""
    torch.manual_seed(0)
    layer = initialize_(make())
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    squares, expected = kernel(layer).square(), 2.0
    if isinstance(layer, tltorch.FactorizedConv) and layer.padding.any():
        arguments = (getattr(layer, name).tolist() for name in ("stride", "padding", "dilation"))
        ones = torch.ones_like(example(layer, 1))
        expected = float(CONVOLVE[layer.order](ones, squares, None, *arguments).mean())
        assert expected < 2
    with torch.no_grad():
        y = layer(example(layer, 4000))
    assert float(y.square().mean()) == pytest.approx(expected, rel=0.05)


def test_a_network_of_both_libraries():
    torch.manual_seed(0)
    ours, plain = tnlayers.TRConv2d(8, 8, 3, rank=2), nn.Conv2d(8, 8, 3)
    net = nn.Sequential(conv("tt", rank=4), nn.Sequential(ours, plain), nn.Flatten(), linear("blocktt", rank=3))
    before = state(plain)
    init = Init("fan_out", nonlinearity="tanh")
    assert initialize_(net, init) is net
    assert ours.init is init
    assert ours.variance.gain == init.gain
    for found, fan in ((kernel(net[0]), 8 * 15), (ours.weight, 8 * 9), (kernel(net[3]), 16)):
        assert float(found.detach().square().mean()) == pytest.approx(init.gain**2 / fan, rel=1e-4)
    assert_same_state(state(plain), before)
    for mode in ("fan_in", "fan_avg"):
        assert initialize_(ours, mode).init.mode == mode


def test_shapes_are_read_off_the_factors():
    """Factors replaced behind the back of rank and shape, as truncation and ``init_from_tensor`` do."""
    torch.manual_seed(0)
    for factorization, rank in (("cp", 6), ("tucker", (5, 4, 3, 3)), ("tt", (1, 6, 6, 6, 1))):
        layer = conv(factorization, rank=rank, implementation="reconstructed")
        weight = layer.weight
        if factorization == "tt":
            factors = [weight.factors[k] for k in range(4)]
            factors[0], factors[1] = factors[0][..., :2], factors[1][:2]
        else:
            factors = [weight.factors[k][:, :2] for k in range(4)]
        if factorization == "cp":
            weight.weights = nn.Parameter(weight.weights[:2].detach())
        if factorization == "tucker":
            weight.core = nn.Parameter(weight.core[:2, :2, :2, :2].detach())
        weight.factors = type(weight.factors)([nn.Parameter(factor.detach().clone()) for factor in factors])
        assert layer.rank in (rank, list(rank) if factorization != "cp" else rank)
        for mode in ("fan_in", "fan_out"):
            initialize_(layer, mode)
            assert float(kernel(layer).square().mean()) == pytest.approx(target(layer, mode), rel=1e-4)
        twin, x = from_tltorch(layer), example(layer, 2)
        assert set(twin.rank.values()) <= {2, 6}
        torch.testing.assert_close(twin(x), layer(x), rtol=1e-5, atol=1e-5)


class Scaled(tltorch.CPTensor, name="Scaled"):
    """A factorization of a user's."""


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def changed(layer, change):
    change(layer)
    return layer


def parametrized():
    layer = conv("tt", rank=2)
    parametrize.register_parametrization(layer.weight.factors, "factor_1", Double())
    return layer


def sharing():
    first, second = conv("cp", rank=2), conv("cp", rank=2)
    second.weight.factors[2] = first.weight.factors[2]
    return nn.Sequential(first, second)


def twice():
    layer = conv("cp", (3, 3), rank=2)
    layer.weight.factors[2] = layer.weight.factors[3]
    return layer


def viewed():
    """A core that is a view of another one's values."""
    model = nn.Sequential(*(tnlayers.CPLinear(8, 8, rank=2) for _ in range(2)))
    model[1].cores[0].data = model[0].cores[0].data[:]
    return model


def loose_ends():
    layer = conv("tt", rank=2)
    for k, shape in ((0, (2, 6, 2)), (3, (2, 8, 2))):
        layer.weight.factors[k] = nn.Parameter(torch.ones(shape))
    return layer


def misfit():
    layer = conv("cp", rank=2)
    layer.weight.factors[1] = nn.Parameter(torch.ones(6, 3))
    return layer


def swapped():
    layer = linear("cp", rank=2)
    layer.weight.factors[0] = nn.Parameter(torch.ones(5, 2))
    return layer


UNREADABLE = [
    (lambda: conv("ComplexCP", rank=2, dtype=torch.cfloat), ValueError, "ComplexCPTensor", "CPTensor, TuckerTensor"),
    (lambda: conv("ComplexTucker", rank=(2,) * 4, dtype=torch.cfloat), ValueError, "ComplexTuckerTensor"),
    (lambda: conv("ComplexTT", rank=2, dtype=torch.cfloat), ValueError, "ComplexTTTensor"),
    (lambda: linear("ComplexTT", rank=2, dtype=torch.cfloat), ValueError, "ComplexBlockTT", "CPTensorized, Tucker"),
    (lambda: conv("cp", rank=2, dtype=torch.cfloat), TypeError, "torch.complex64", "torch.float32"),
    (lambda: conv("Scaled", rank=2), ValueError, "Scaled", "CPTensor"),
    (lambda: conv("tucker", rank=0.5, n_layers=3), ValueError, "n_layers is 3", "must be 1"),
    (lambda: conv("cp", rank=2, n_layers=(2, 2)), ValueError, "n_layers is (2, 2)"),
    (lambda: linear("cp", rank=2, n_layers=2), ValueError, "n_layers is 2"),
    (lambda: changed(conv("tucker", rank=0.5), lambda c: tltorch.tensor_dropout(c.weight, 0.5)), ValueError, "Dropout"),
    (loose_ends, ValueError, "(2, 6, 2)", "(2, 8, 2)", "TTTensor"),
    (misfit, ValueError, "(8, 2), (6, 3)", "CPTensor"),
    (swapped, ValueError, "20 x 12 entries of 16 x 12"),
    (lambda: linear("blocktt", rank=2, shapes=((2, 3), (2, 2, 2))), ValueError, "4 x 6 entries of 8 x 6"),
    (lambda: tltorch.FactorizedConv(2, 2, (2,) * 4, rank=2), ValueError, "CPTensor"),
]


@pytest.mark.parametrize(("make", "error", "parts"), [(make, error, parts) for make, error, *parts in UNREADABLE])
def test_unreadable_layers_are_refused_and_nothing_is_changed(make, error, parts):
    sentence = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    bad = make()
    net = nn.Sequential(conv("cp", rank=2), tnlayers.CPConv2d(8, 8, 3, rank=2), nn.Sequential(bad))
    before = state(net)
    with pytest.raises(error, match=sentence) as caught:
        initialize_(net, "fan_out")
    assert str(caught.value).startswith(f"{type(bad).__name__} '2.0': ")
    assert_same_state(state(net), before)
    with pytest.raises(error, match=sentence):
        from_tltorch(bad)


@pytest.mark.parametrize(
    ("make", "init", "error", "sentence"),
    [
        (lambda: nn.Conv2d(4, 4, 3), "fan_in", ValueError, "nothing to initialise"),
        (nn.Sequential, "fan_in", ValueError, "nothing to initialise"),
        (lambda: "net", "fan_in", TypeError, "module is of type str"),
        (lambda: conv("cp", rank=2), "fan", ValueError, "init is 'fan'"),
        (lambda: linear("cp", rank=2), Init(input_size=(4,)), ValueError, "FactorizedLinear.*input_size"),
        (lambda: tnlayers.CPConv1d(4, 4, 3), Init(input_size=(4, 4)), ValueError, "CPConv1d.*input_size"),
        (lambda: conv("cp", rank=2, device="meta"), "fan_in", ValueError, "meta device"),
        (lambda: tnlayers.CPConv1d(4, 4, 3, device="meta"), "fan_in", ValueError, "meta device"),
        (parametrized, "fan_in", TypeError, "computed from other tensors"),
        (sharing, "fan_in", ValueError, "FactorizedConv '1': it shares a core with FactorizedConv '0'"),
        (twice, "fan_in", ValueError, "shares a core"),
        (viewed, "fan_in", ValueError, "CPLinear '1': it shares a core with CPLinear '0'"),
    ],
)
def test_what_cannot_be_initialised_is_refused(make, init, error, sentence):
    module = make()
    before = state(module) if isinstance(module, nn.Module) and "meta" not in sentence else None
    with pytest.raises(error, match=sentence):
        initialize_(module, init)
    if before:
        assert_same_state(state(module), before)


# ------------------------------------------------------------------ conversions


CLASSES = {"cp": "CP", "tucker": "Tucker", "tt": "TT", "dense": "Einsum", "blocktt": "TT"}


@each_layer
def test_from_tltorch_and_back(make):
    torch.manual_seed(0)
    layer = initialize_(make()).eval()
    if isinstance(layer.weight, tltorch.CPTensor):
        layer.weight.weights.data = torch.linspace(-2, 2, len(layer.weight.weights))
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    x = example(layer, 3)
    y, dense = layer(x), kernel(layer)
    if isinstance(layer, tltorch.FactorizedConv):  # what tensorly-torch computes is what it reconstructs
        arguments = (getattr(layer, name).tolist() for name in ("stride", "padding", "dilation"))
        torch.testing.assert_close(CONVOLVE[layer.order](x, dense, layer.bias, *arguments), y, rtol=1e-5, atol=1e-5)
    twin = from_tltorch(layer)
    kind = f"Conv{layer.order}d" if isinstance(layer, tltorch.FactorizedConv) else "Linear"
    assert type(twin) is getattr(tnlayers, CLASSES[layer.weight.name.lower()] + kind)
    torch.testing.assert_close(twin(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twin.weight.detach(), dense, rtol=1e-5, atol=1e-5)
    back = to_tltorch(twin)
    torch.testing.assert_close(back(x), y, rtol=1e-5, atol=1e-5)
    again = from_tltorch(back)
    assert again.geometry == twin.geometry
    if type(twin) is not tnlayers.EinsumLinear:  # which goes by way of a BlockTT of one factor
        assert again.network == twin.network
        assert all(torch.equal(core, other) for core, other in zip(twin.cores, again.cores, strict=True))
    for module in (twin, back, again):
        assert not module.training
        assert (module.bias is None) == (layer.bias is None)
        assert module.bias is None or not module.bias.requires_grad


OURS = [
    lambda: tnlayers.CPConv1d(6, 8, 3, stride=2, padding=1, rank=4),
    lambda: tnlayers.CPConv2d(6, 8, (3, 5), padding="same", dilation=(2, 1), rank=3, bias=False),
    lambda: tnlayers.TuckerConv1d(6, 8, 4, padding="valid", rank=(3, 5)),
    lambda: tnlayers.TuckerConv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), rank=(3, 5)),
    lambda: tnlayers.TuckerConv2d(6, 8, (3, 2), rank={"ri": 3, "ro": 5, "rw": 2}),
    lambda: tnlayers.TuckerConv3d(6, 8, (1, 2, 3), rank=(3, 5, 1, 2, 2)),
    lambda: tnlayers.TTConv2d(6, 8, (3, 2), rank=(3, 4, 5), layout="chain", stride=(1, 2)),
    lambda: tnlayers.TTConv3d(6, 8, (1, 2, 3), rank=3, layout="chain"),
    lambda: tnlayers.EinsumConv2d(6, 8, 3, network="o i h w"),
    lambda: tnlayers.CPLinear(12, 16, rank=4, in_shape=(3, 4), out_shape=(16,)),
    lambda: tnlayers.TuckerLinear(12, 16, rank=3, bias=False, in_shape=(3, 4), out_shape=(4, 4)),
    lambda: tnlayers.TuckerLinear(12, 16, rank=3, in_shape=(3, 4), out_shape=(16,)),
    lambda: tnlayers.TTLinear(12, 16, rank=(4, 3), in_shape=(3, 2, 2), out_shape=(2, 4, 2)),
]


@pytest.mark.parametrize("make", OURS)
def test_to_tltorch(make):
    """Equal functions, gradients of as many numbers, and cores of its own."""
    torch.manual_seed(0)
    layer = make().double()
    layer.cores[0].requires_grad_(False)
    twin, x = to_tltorch(layer), example(layer, 2, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(twin(x), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernel(twin), layer.weight.detach(), rtol=1e-10, atol=1e-10)

    def trained(module):
        return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

    assert trained(twin) == trained(layer)
    initialize_(twin, "fan_out")
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize(
    ("layer", "error", "sentence"),
    [
        (lambda: tnlayers.CPConv2d(8, 8, 3, groups=2, rank=2), ValueError, "groups is 2"),
        (lambda: tnlayers.CPConv2d(8, 8, 3, padding_mode="reflect", rank=2), ValueError, "padding_mode is 'reflect'"),
        (lambda: tnlayers.CPConv1d(8, 8, 4, padding="same", rank=2), ValueError, r"'same', here \(\(1, 2\),\)"),
        (lambda: tnlayers.CPConvTranspose2d(8, 8, 3, rank=2), ValueError, "transposed"),
        (lambda: tnlayers.CPConv2d(8, 8, 3, in_shape=(4, 2), rank=2), ValueError, "i1 r, i2 r.*channels whole"),
        (lambda: tnlayers.TuckerConv2d(8, 8, 3, out_shape=(4, 2), rank=2), ValueError, "tucker.*channels whole"),
        (lambda: tnlayers.TTConv2d(8, 8, 3, rank=2), ValueError, r"\(tt\).*chain layout"),
        (lambda: tnlayers.TRConv2d(8, 8, 3, rank=2), ValueError, r"\(tr\).*CP, Tucker and TT"),
        (lambda: tnlayers.BTTConv2d(8, 8, 3, rank=1, blocks=1), ValueError, r"\(btt\)"),
        (lambda: tnlayers.BlockTTLinear(8, 8, rank=2), ValueError, r"\(blocktt\).*matrix layout"),
        (lambda: tnlayers.TTLinear(8, 8, rank=2, in_shape=(2, 2, 2), out_shape=(4, 2)), ValueError, "in pairs"),
        (lambda: tnlayers.TTLinear(8, 8, rank=2, layout="chain"), ValueError, "matrix layout"),
        (lambda: tnlayers.EinsumConv1d(8, 8, 3, network="i r, o r, w r, o r", rank=2), ValueError, "einsum"),
        (lambda: nn.Conv2d(8, 8, 3), TypeError, "layer is Conv2d; it must be a layer of tnlayers"),
    ],
)
def test_to_tltorch_refuses(layer, error, sentence):
    with pytest.raises(error, match=sentence):
        to_tltorch(layer())


@pytest.mark.parametrize("name", ["tucker 2d", "tt 2d", "blocktt", "blocktt of one", "dense"])
def test_what_is_frozen_stays_frozen(name):
    """Factor by factor, there and back, also where gradients are off."""
    for k in range(len(list(LAYERS[name]().parameters()))):
        layer = initialize_(LAYERS[name]())
        chosen = list(layer.parameters())[k].requires_grad_(False)
        with torch.no_grad():
            twin = from_tltorch(layer)
            back = to_tltorch(twin)
        for module in (twin, back):
            found = sorted(p.numel() for p in module.parameters() if p.requires_grad)
            assert found == sorted(p.numel() for p in layer.parameters() if p is not chosen)


def test_a_core_with_the_weights_of_cp_is_trained_if_one_of_them_was():
    layer = initialize_(LAYERS["cp 1d"]())
    weight = layer.weight
    for frozen, trained in (([], 4), ([weight.weights], 4), ([weight.factors[1]], 3), ([weight.factors[0]], 4)):
        layer.requires_grad_(True)
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.no_grad():
            twin = from_tltorch(layer)
        assert [p.requires_grad for p in twin.parameters()].count(True) == trained
    assert not to_tltorch(twin).weight.weights.requires_grad


def test_half_precision():
    for dtype, error in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        layer = initialize_(LAYERS["tt 2d"](dtype=dtype))
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        for module in (layer, from_tltorch(layer), to_tltorch(from_tltorch(layer))):
            assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        assert float(kernel(layer.double()).square().mean()) == pytest.approx(target(layer, "fan_in"), rel=error)


def test_from_tltorch_takes_its_own_layers_only():
    joint = conv("tt", rank=2, n_layers=2)
    for layer in (nn.Conv2d(3, 3, 3), tnlayers.CPConv1d(3, 3, 3, rank=2), joint[0], tltorch.TRL((3,), (4,), rank=2)):
        with pytest.raises(TypeError, match=f"layer is {type(layer).__name__}"):
            from_tltorch(layer)


def test_what_from_conv_makes_of_a_convolution_is_what_is_copied():
    """tensorly-torch takes the first stride for both and pads zeros: the layer computes that, and so does ours."""
    plain = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, padding_mode="circular")
    layer = tltorch.FactorizedConv.from_conv(plain, rank=0.5, factorization="tt", implementation="factorized")
    twin, x = from_tltorch(layer), torch.randn(2, 4, 7, 7)
    assert (twin.stride, twin.padding, twin.padding_mode) == ((2, 2), (1, 1), "zeros")
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-5, atol=1e-5)
    assert twin(x).shape != plain(x).shape


def test_without_tensorly_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "tltorch", None)
    layer = tnlayers.CPConv1d(4, 4, 3, rank=2)
    for convert in (from_tltorch, to_tltorch):
        with pytest.raises(ImportError, match=re.escape("pip install 'tnlayers[tltorch]'")):
            convert(layer)
    assert initialize_(layer, "fan_out").init == Init("fan_out")


def test_factors_from_tensorly_fill_our_cores():
    """The README's recipe: decompose with tensorly, copy factor by factor."""
    torch.manual_seed(0)
    kernel = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    with tensorly.backend_context("pytorch"), torch.no_grad():
        core, (outputs, inputs) = tensorly.decomposition.partial_tucker(kernel, rank=(8, 6), modes=[0, 1])[0]
        tucker = tnlayers.TuckerConv2d(6, 8, 3, rank=(6, 8), dtype=torch.float64)  # i ri, ri ro h w, ro o
        for mine, theirs in zip(tucker.cores, (inputs, core.transpose(0, 1), outputs.T), strict=True):
            mine.copy_(theirs)
        train = tensorly.decomposition.tensor_train(kernel.movedim(0, -1), rank=[1, 6, 18, 8, 1])
        tt = tnlayers.TTConv2d(6, 8, 3, layout="chain", rank=(6, 18, 8), dtype=torch.float64)  # i r1, r1 h r2, ...
        for mine, theirs in zip(tt.cores, train, strict=True):
            mine.copy_(theirs.reshape(mine.shape))
        weights, factors = tensorly.decomposition.parafac(kernel, rank=5, init="random", random_state=0, n_iter_max=3)
        cp = tnlayers.CPConv2d(6, 8, 3, rank=5, dtype=torch.float64)  # i r, o r, h r, w r
        for mine, theirs in zip(cp.cores, (factors[1], factors[0] * weights, *factors[2:]), strict=True):
            mine.copy_(theirs)
        dense = tensorly.cp_to_tensor((weights, factors))
    for layer, expected in ((tucker, kernel), (tt, kernel), (cp, dense)):
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-8, atol=1e-8)
