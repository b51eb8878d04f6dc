"""Kernels of zeros, or nearly, and kernels with dead parts learn: from the first steps, with all cores."""

import copy
import math

import pytest
import torch
from torch import nn

import tnlayers
from cases import CASES, CHANNELS, FAMILIES, Case
from tnlayers import TensorizeConfig, scale_residual_, tensorize_, testing
from tnlayers.fitting import gauge
from tnlayers.ops.contraction import reconstruct

RATE = 1.0


@pytest.fixture(autouse=True)
def _short_fits(monkeypatch):
    """How cores share a kernel does not depend on how well they fit it."""
    monkeypatch.setattr("tnlayers.fitting.decompose.SWEEPS", 10)
    monkeypatch.setattr("tnlayers.fitting.sweeps.PROBE", 1)
    monkeypatch.setattr("tnlayers.fitting.starts.RANDOM", 1)


def step(layer: tnlayers.TensorLayer) -> torch.Tensor:
    """A step of gradient descent on random weights of the outputs; how far it moves the kernel.

    The gradient of this loss with respect to the kernel is the same whatever the kernel is.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(testing.example_input(layer, 16).shape, generator=generator).to(layer.cores[0])
    y, before = layer(x), layer.weight.detach().double()
    (y * torch.randn(y.shape, generator=generator).to(y)).double().mean().backward()
    with torch.no_grad():
        for core in layer.cores:
            core.sub_(RATE * core.grad)
    return layer.weight.detach().double() - before


def gradients(layer: tnlayers.TensorLayer) -> list[float]:
    """The norm of every core's gradient."""
    for core in layer.cores:
        core.grad = None
    step(layer)
    return [float(core.grad.double().norm()) for core in layer.cores]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_of_zeros_moves_at_the_first_step_and_all_cores_at_the_second(case: Case):
    torch.manual_seed(0)
    layer = case.make()
    drawn = float(step(case.make()).norm())
    rank, state = layer.rank, torch.get_rng_state()
    assert layer.set_weight_(torch.zeros_like(layer.weight)) == 0
    assert layer.rank == rank
    assert torch.equal(torch.get_rng_state(), state)
    *others, last = layer.cores
    assert not layer.weight.any()
    assert not last.any()
    assert all(core.count_nonzero() == core.numel() for core in others)
    moved = step(layer)
    assert 0.01 * drawn < float(moved.norm()) < 10 * drawn
    assert min(gradients(layer)) > 0


@pytest.mark.parametrize("layer", FAMILIES)
def test_the_others_are_a_draw_of_the_solver_and_always_the_same(layer):
    made = [layer(*CHANNELS, 3, rank=2, init=init) for init in ("fan_in", "fan_in", "paper")]
    for each in made:
        each.set_weight_(torch.zeros_like(each.weight))
        for core, std in zip(each.cores[:-1], each.variance.std[:-1], strict=False):
            spread = float(core.detach().square().mean().sqrt()) / std
            assert abs(spread - 1) < 4 / math.sqrt(core.numel()) + 0.3  # exact draws rescale all cores
    first, second, other = ([*each.cores] for each in made)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layer", FAMILIES)
def test_in_every_dtype(layer, dtype):
    made = layer(*CHANNELS, 3, rank=2, dtype=dtype)
    made.set_weight_(torch.zeros(made.weight.shape))
    assert float(step(made).norm()) > 0
    assert min(gradients(made)) > 0


ZERO = torch.zeros(12, 8, 3, 3)
DENSE = torch.randn(12, 8, 3, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1e-4, 1e-8, 1e-30, 1e-42])
@pytest.mark.parametrize("layer", FAMILIES)
def test_nearly_zero_kernels_are_kept_and_move_as_drawn_ones(layer, scale):
    """Entries of 1e-42 are denormal numbers in float32."""
    torch.manual_seed(0)
    drawn = float(step(layer(*CHANNELS, 3, rank=2)).norm())
    made, same = (layer(*CHANNELS, 3, rank=2) for _ in range(2))
    expected = same.set_weight_(DENSE)
    error = made.set_weight_(DENSE * scale)
    assert error == pytest.approx(expected, abs=1e-3 if scale > 1e-40 else 1e-2)
    assert all(core.norm() > 0.1 * same.cores[0].norm() * gauge.SMALL for core in made.cores[:-1])
    assert 0.01 * drawn < float(step(made).norm())
    assert min(gradients(made)) > 0


@pytest.mark.parametrize("layer", FAMILIES)
def test_ordinary_kernels_are_balanced_down_to_a_hundredth_of_a_draw(layer):
    made = layer(*CHANNELS, 3, rank=2, dtype=torch.float64)
    drawn = made.variance.weight_std * math.sqrt(DENSE.numel())
    for share, balanced in ((1.0, True), (1.01 * gauge.SMALL, True), (0.99 * gauge.SMALL, False)):
        made.set_weight_(DENSE.double() * (share * drawn / DENSE.double().norm()))
        norms = [float(core.detach().norm()) for core in made.cores]
        assert (max(norms) < 1.001 * min(norms)) == balanced
        assert norms[-1] == pytest.approx(min(norms), rel=1e-3)


def dead(*index) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel with a part that is zero, and where it is."""
    part = torch.zeros(12, 8, 3, 3, dtype=torch.bool)
    part[index] = True
    return DENSE.masked_fill(part, 0.0), part


def alone(*index) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel that is zero but for a part, and where it is zero."""
    part = dead(*index)[1]
    return DENSE.masked_fill(~part, 0.0), ~part


DEAD = {
    "output channels": dead(slice(3, 7)),
    "input channels": dead(slice(None), slice(2, 5)),
    "taps": dead(..., slice(0, 2), 1),
    "all but one output channel": alone(5),
    "all but one input channel": alone(slice(None), 5),
    "all but one tap": alone(..., 1, 1),
    "all but one entry": alone(5, 3, 1, 2),
}


@pytest.mark.parametrize("kernel", DEAD)
@pytest.mark.parametrize("layer", FAMILIES)
def test_dead_parts_of_a_kernel_learn(layer, kernel):
    """Two steps move every slice of what was dead, along each axis, and no core is torn.

    Slowest is a channel that differs from all living ones in each of three factors: its entries of three cores are
    zero, and the kernel moves by their product.
    """
    weight, part = DEAD[kernel]
    torch.manual_seed(0)
    drawn, made = (layer(*CHANNELS, 3, rank=2) for _ in range(2))
    made.set_weight_(weight * (drawn.weight.norm() / weight.norm()))
    twins = copy.deepcopy([made, drawn])
    found, usual = map(gradients, twins)
    assert 1e-3 * min(usual) < min(found) <= max(found) < 1e3 * max(usual)
    moved, usual = (step(each) + step(each) for each in (made, drawn))
    for axis in range(4):
        rest = [other for other in range(4) if other != axis]
        here, there = ((each * part).square().sum(rest).sqrt() for each in (moved, usual))
        assert bool((here > 1e-5 * there)[there > 0].all())


@pytest.mark.parametrize("how", [{"rank": 2}, {"rank": 0.4}, {}, {"energy": 0.9}, {"budget": {"params": 0.4}}])
@pytest.mark.parametrize("layer", FAMILIES)
def test_a_swap_keeps_room_for_kernels_of_zeros(layer, how):
    """They get the asked rank; where an energy or a budget is to find it, what a kernel without values gets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    for zero in model[1:]:
        nn.init.zeros_(zero.weight)
    report = tensorize_(model, TensorizeConfig(layer.format_type.name, **how))
    if not {"energy", "budget"} & how.keys():
        assert report["1"].rank == report["2"].rank == layer(16, 16, 3, **how).rank
    else:
        assert all(made.keep_ratio > 0.1 for made in model[1:])
    for name in "12":
        assert report[name].error == 0
        assert not model[int(name)].weight.any()
        assert min([float(step(model[int(name)]).norm()), *gradients(model[int(name)])]) > 0


@pytest.mark.parametrize("layer", FAMILIES)
def test_a_budget_of_zeros_alone_is_one_keep_ratio(layer):
    def model(decompose):
        made = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 32, 3))
        for zero in made:
            nn.init.zeros_(zero.weight)
        config = TensorizeConfig(layer.format_type.name, budget={"params": 0.4}, decompose=decompose)
        return [each.rank for each in tensorize_(made, config, dry_run=True).layers]

    assert model(True) == model(False)


@pytest.mark.parametrize("factor", [0.0, 1e-6])
@pytest.mark.parametrize("layer", FAMILIES)
def test_scaled_branches_learn_as_fitted_ones(layer, factor):
    torch.manual_seed(0)
    model = nn.Sequential(layer(*CHANNELS, 3, rank=2))
    drawn = float(step(layer(*CHANNELS, 3, rank=2)).norm())
    before, weight = [core.detach().clone() for core in model[0].cores], model[0].weight.detach()
    scale_residual_(model, "0", factor)
    torch.testing.assert_close(model[0].weight.detach(), weight * factor)
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], model[0].cores, strict=False))
    assert 0.01 * drawn < float(step(model[0]).norm()) < 10 * drawn
    assert min(gradients(model[0])) > 0


def test_weights_that_cannot_be_zero_times_zero_are_zero():
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, math.inf)
    scale_residual_(nn.Sequential(layer), "0", 0)
    assert not layer.weight.any()


def test_a_fit_of_zeros_ignores_the_default_device():
    layer = tnlayers.TRConv2d(*CHANNELS, 3, rank=2)
    with torch.device("meta"):
        assert layer.set_weight_(ZERO) == 0
    assert not reconstruct(layer.network, [*layer.cores]).any()
    assert layer.cores[0].any()
