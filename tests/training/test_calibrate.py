"""Scales from data: one second moment behind every layer, nothing changed where anything is refused."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import tnlayers
from cases import FAMILIES
from tnlayers import calibrate_, scale_residual_
from tnlayers.models import resnet20


def plain(layer, depth=12):
    body = [part for _ in range(depth) for part in (layer(8, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *body, nn.Flatten(), nn.Linear(8 * 36, 5))


def moments(model, x):
    found = []
    layers = [part for part in model.modules() if isinstance(part, (tnlayers.TensorLayer, nn.Conv2d, nn.Linear))]
    handles = [
        layer.register_forward_hook(lambda _, __, y: found.append(float(y.detach().double().square().mean())))
        for layer in layers
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("layer", FAMILIES)
def test_every_layer_of_a_mixed_model_has_the_target(layer):
    torch.manual_seed(0)
    model, x = plain(lambda *a, **k: layer(*a, rank=2, **k)), torch.randn(4, 3, 6, 6)
    biases = [parameter.detach().clone() for name, parameter in model.named_parameters() if name.endswith("bias")]
    factors = calibrate_(model, x, target=2.0)
    assert list(factors) == [name for name, part in model.named_children() if hasattr(part, "bias")]
    assert moments(model, x) == pytest.approx([2.0] * 14, rel=1e-3)
    now = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert all(torch.equal(*pair) for pair in zip(biases, now, strict=True))
    assert model.training
    again = calibrate_(model, x, target=2.0)
    assert list(again.values()) == pytest.approx([1.0] * 14, rel=1e-3)


def test_it_follows_the_calls_and_leaves_what_is_not_reached():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.second = tnlayers.TRLinear(16, 16, rank=2)
            self.first = nn.Linear(16, 16, bias=False)
            self.never = nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)
            self.noise = lambda h: h + 1e-6 * torch.randn_like(h)  # draws in eval mode too
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x, scale=1.0):
            h = self.noise(self.norm(self.drop(self.first(x))))
            return self.second(self.second(h)) * scale

    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 16)
    never, mean, random = model.never.weight.clone(), model.norm.running_mean.clone(), torch.get_rng_state()
    calls = []
    model.second.register_forward_hook(lambda _, __, y: calls.append(float(y.detach().square().mean())))
    before = model.second.weight.detach()
    factors = calibrate_(model, {"x": x, "scale": 3.0})
    assert list(factors) == ["first", "second"]
    torch.testing.assert_close(model.second.weight.detach(), before * factors["second"])  # of two calls the first
    assert calls[0] == pytest.approx(1, rel=1e-4)
    assert torch.equal(model.never.weight, never)
    assert torch.equal(model.norm.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), random)
    assert float(model.first(x).detach().square().mean()) == pytest.approx(1, rel=1e-4)
    assert list(calibrate_(model, (x,))) == ["first", "second"]


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def parametrized():
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def embedded():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    return model


def pruned():
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def weight_normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its age
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))


def parametrized_cores():
    model = nn.Sequential(tnlayers.TRLinear(4, 4, rank=2))
    parametrize.register_parametrization(model[0].cores, "0", nn.Identity())
    return model


def distributed():
    model = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(model)
    model.module = nn.Linear(4, 4)
    return model


class Standardised(nn.Linear):
    """Its output does not follow the scale of its weight."""

    def forward(self, x):
        return super().forward(x) / self.weight.norm()


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def silent():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    return model


def biased():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[1].bias, 2.0)
    return model


class Other(nn.Module):
    """Has a layer and does not call it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (nn.ReLU, ValueError, "nothing to calibrate"),
        (Other, ValueError, "batch reaches no layer"),
        (tied, ValueError, "0 shares its weight with 1"),
        (embedded, ValueError, "1 shares its weight with 0"),
        (pruned, TypeError, "0: its weight is computed from other tensors"),
        (weight_normed, TypeError, "0: its weight is computed from other tensors"),
        (parametrized_cores, TypeError, "0: its weight is computed from other tensors"),
        (lambda: nn.Sequential(Standardised(4, 4)), ValueError, "0 does not follow its weight"),
        (lambda: nn.Sequential(Pair(4, 4)), ValueError, "0 puts out tuple"),
        (distributed, TypeError, "model is a DistributedDataParallel"),
        (lambda: nn.Linear(4, 4, device="meta"), ValueError, "Linear is on the meta device"),
        (lambda: nn.LazyLinear(4), ValueError, "LazyLinear is lazy"),
        (parametrized, TypeError, "0: its weight is computed from other tensors"),
        (silent, ValueError, "1: the mean of its squared outputs on the batch is 0"),
        (biased, ValueError, "1: the square of its bias is 4, not below the target 1"),
        (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), ValueError, "0 is on the meta device"),
        (lambda: "model", TypeError, "model is of type str"),
    ],
)
def test_what_is_refused_changes_nothing(make, kind, sentence):
    torch.manual_seed(0)
    model = make()
    there = {} if isinstance(model, str) else model.state_dict()
    state = {name: value.clone() for name, value in there.items() if not nn.parameter.is_lazy(value)}
    with pytest.raises(kind, match=sentence):
        calibrate_(model, torch.randn(8, 4))
    if not isinstance(model, str):
        for name, value in model.state_dict().items():
            assert nn.parameter.is_lazy(value) or value.is_meta or torch.equal(value, state[name])
        assert not any(module._forward_hooks for module in model.modules())


def test_half_precision_is_calibrated_as_it_rounds():
    """Behind 40 layers in bfloat16, each within a few roundings of the target, not the product of all their errors."""
    torch.manual_seed(0)
    body = [part for _ in range(40) for part in (tnlayers.CPConv2d(8, 8, 3, padding=1, rank=4), nn.ReLU())]
    model, x = nn.Sequential(*body).to(torch.bfloat16), torch.randn(4, 8, 6, 6, dtype=torch.bfloat16)
    calibrate_(model.eval(), x)
    with torch.no_grad():  # as it was calibrated: plans for training round otherwise
        assert moments(model, x) == pytest.approx([1.0] * 40, rel=5 * 2**-8)


def test_under_autocast_and_compiled():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), tnlayers.TRLinear(16, 16, rank=3)), torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        calibrate_(model, x, target=4.0)
        assert moments(model.eval(), x) == pytest.approx([4.0] * 2, rel=0.05)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert list(calibrate_(compiled, x)) == ["_orig_mod.0", "_orig_mod.1"]
    assert moments(model, x) == pytest.approx([1.0] * 2, rel=1e-3)


@pytest.mark.parametrize("target", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_bad_targets(target):
    with pytest.raises(ValueError, match="target is"):
        calibrate_(nn.Linear(4, 4), torch.randn(8, 4), target=target)


def test_a_batch_that_is_not_finite_is_refused_and_changes_nothing():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4)
    before, x[0, 0] = model[0].weight.clone(), float("nan")
    with pytest.raises(ValueError, match="0: the mean of its squared outputs on the batch is nan"):
        calibrate_(model, x)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("layer", FAMILIES)
def test_residual_branches_keep_the_signal(layer):
    """Without normalisation, 9 branches scaled by 1/3: the signal grows by less than e^2; of zero: not at all."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    model = resnet20(lambda *a, **k: layer(*a, rank=3, **k), norm=nn.Identity)
    before = [conv.weight.detach() for conv in (model.layer1[0].conv1, model.layer1[0].conv2)]
    names = scale_residual_(model, ["layer*.conv2"])
    assert names == [f"layer{k}.{block}.conv2" for k in (1, 2, 3) for block in range(3)]
    torch.testing.assert_close(model.layer1[0].conv1.weight.detach(), before[0])
    torch.testing.assert_close(model.layer1[0].conv2.weight.detach(), before[1] / 3)
    with torch.no_grad():
        stem = model.conv1(x).relu()
        grown = model.layer3(model.layer2(model.layer1(stem))).square().mean() / stem.square().mean()
    assert grown < math.exp(2)  # branches of gain 2; the shortcuts of option A and the ReLUs only take from it
    scale_residual_(model, "re:layer.*conv2", 0)
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            h = torch.rand(2, block.conv1.in_channels, 8, 8)
            torch.testing.assert_close(block(h), block.shortcut(h), rtol=0, atol=0)
    # The first step moves the branch: a core of it has a gradient, at its own zero.
    model(x).square().mean().backward()
    assert sum(float(core.grad.abs().sum()) > 0 for core in model.layer3[2].conv2.cores) == 1


def test_residual_mistakes():
    model = resnet20()
    for last, factor, sentence in (
        ("conv9", None, "last is 'conv9', which matches none of the layers conv1, layer1.0.conv1"),
        ("layer*.conv2", -1.0, "factor is -1.0"),
        ("layer*.conv2", float("nan"), "factor is nan"),
    ):
        with pytest.raises(ValueError, match=sentence):
            scale_residual_(model, last, factor)
    with pytest.raises(ValueError, match="no regular expression"):
        scale_residual_(model, "re:(")
    for last in (5, None, [], ["conv1", 3]):
        with pytest.raises(TypeError, match="last is"):
            scale_residual_(model, last)


def test_residual_branches_of_a_model_with_other_ties():
    model = nn.Sequential(*embedded(), nn.Linear(9, 9))
    before = {name: value.clone() for name, value in model[2].state_dict().items()}
    assert scale_residual_(model, "2", 0.5) == ["2"]
    assert all(torch.equal(value, before[name] / 2) for name, value in model[2].state_dict().items())
    with pytest.raises(ValueError, match="1 shares its weight with 0"):
        scale_residual_(model, ["1", "2"])
