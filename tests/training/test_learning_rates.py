"""Decay of kernels and learning rates for their first step."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrize

import tnlayers
from cases import CASES, FAMILIES, Case
from networks import networks
from tnlayers import EinsumConv2d, Init, TRConv2d, TTConv2d, TuckerConv2d
from tnlayers.init.variance import SPLITS
from tnlayers.ops import squared_norm as norm_module
from tnlayers.ops.contraction import contract, reconstruct
from tnlayers.ops.squared_norm import fastest, norm_contractions
from tnlayers.training import learning_rates
from tnlayers.training.learning_rates import column_squares, param_groups
from tnlayers.training.penalty import frobenius_penalty, squared_norm

MANY = ", ".join(["i r0", *(f"r{k} r{k + 1}" for k in range(12)), "r12 h w o"])
RULES = (("sgd", "decrease"), ("adam", "decrease"), ("adam", "norm"))


def make(case: Case) -> tnlayers.TensorLayer:
    torch.manual_seed(0)
    return case.make(dtype=torch.float64)


def check_all_ways(network, cores):
    """Every way to the square equals the dense kernel's, with its gradients."""
    expected = reconstruct(network, cores).square().sum()
    gradients = torch.autograd.grad(expected, cores)
    for way in norm_contractions(network, "cpu", "float64"):
        found = way(cores)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        for one, other in zip(torch.autograd.grad(found, cores), gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))


# ------------------------------------------------------------------ the squared norm


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_square_of_every_format(case):
    layer = make(case)
    check_all_ways(layer.network, [*layer.cores])
    expected = layer.weight.square().sum()
    torch.testing.assert_close(squared_norm(layer), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(frobenius_penalty(nn.Sequential(layer)), expected, rtol=1e-10, atol=0)


@settings(max_examples=40, deadline=None)
@given(networks(max_cores=6))
def test_the_square_of_any_network(network):
    torch.manual_seed(0)
    check_all_ways(
        network, [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in network.core_shapes]
    )


def test_the_square_of_many_cores_and_of_groups():
    torch.manual_seed(0)
    layer = EinsumConv2d(4, 6, 3, network=MANY, rank=2, dtype=torch.float64)
    check_all_ways(layer.network, [*layer.cores])
    for family in FAMILIES:
        layer = family(16, 16, 3, groups=4, rank=2, dtype=torch.float64)
        check_all_ways(layer.network, [*layer.cores])
        assert layer.weight.shape[1] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_gradients(family):
    """Numerically, through copies and through the kernel."""
    torch.manual_seed(0)
    layer = family(4, 4, (2, 1), rank=2, dtype=torch.float64)
    cores = [*layer.cores]
    found = list(norm_contractions(layer.network, "cpu", "float64"))
    for way in (found[0], found[-1]):
        assert torch.autograd.gradcheck(lambda *cores, way=way: way(cores), cores, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *cores, way=way: way(cores), cores, fast_mode=True)


def test_torch_func_sees_through():
    torch.manual_seed(0)
    layer = TRConv2d(8, 8, 3, rank=2, dtype=torch.float64)
    way = fastest(layer.network, "cpu", "float64")
    cores = tuple(core.detach() for core in layer.cores)
    expected = torch.autograd.grad(squared_norm(layer), [*layer.cores])
    for one, other in zip(torch.func.grad(way)(cores), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
    scaled = torch.func.vmap(lambda scale: way([scale * core for core in cores]))(scales)
    torch.testing.assert_close(scaled, scales ** (2 * len(cores)) * way(cores), rtol=1e-10, atol=0)


def test_frozen_and_parametrized_cores():
    layer = TRConv2d(8, 8, 3, rank=2, dtype=torch.float64)
    layer.cores[1].requires_grad_(False)
    trained = [layer.cores[0], layer.cores[2]]
    expected = torch.autograd.grad(layer.weight.square().sum(), trained)
    for way in norm_contractions(layer.network, "cpu", "float64"):
        for one, other in zip(torch.autograd.grad(way([*layer.cores]), trained), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    layer.cores.requires_grad_(False)
    assert not squared_norm(layer).requires_grad
    layer = parametrized().double()
    torch.testing.assert_close(squared_norm(layer), layer.weight.square().sum(), rtol=1e-10, atol=0)


def test_precision():
    """Float16 and bfloat16 are squared in float32; autocast changes nothing; the gradients keep the cores' dtype."""
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        layer = TuckerConv2d(64, 64, 3, rank=0.1, dtype=dtype)
        fine = torch.promote_types(dtype, torch.float32)
        exact = copy.deepcopy(layer).double()
        found, expected = squared_norm(layer), exact.weight.square().sum()
        assert found.dtype == fine
        # Sums of 64 and 576 products and their squares, of random signs: a few roundings each.
        assert abs(float(found.detach() / expected.detach()) - 1) < 64 * torch.finfo(fine).eps
        found.backward()
        expected.backward()
        for core, other in zip(layer.cores, exact.cores, strict=True):
            assert core.grad.dtype == dtype
            error = float((core.grad - other.grad).norm() / other.grad.norm())
            assert error < 2 * torch.finfo(dtype).eps + 64 * torch.finfo(fine).eps
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = squared_norm(layer)
            gradients = torch.autograd.grad(cast, [*layer.cores])
        assert torch.equal(cast, found)
        assert all(torch.equal(one, core.grad) for one, core in zip(gradients, layer.cores, strict=True))
    big = TRConv2d(64, 64, 3, rank=0.1, dtype=torch.float16)
    with torch.no_grad():
        big.cores[0].mul_(64)
    assert torch.finfo(torch.float16).max < float(squared_norm(big).detach()) < math.inf
    assert squared_norm(TRConv2d(8, 8, 3, rank=2, device="meta")).is_meta


def test_a_second_call_searches_nothing(monkeypatch):
    layer = TRConv2d(8, 12, 3, rank=3)
    squared_norm(layer)
    monkeypatch.setattr(norm_module, "norm_contractions", None)
    monkeypatch.setattr(norm_module, "order", None)
    squared_norm(layer).backward()


def test_compiles_in_one_graph():
    """With copies (the first layer) and through the kernel (the second), and beside a layer's own forward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(tnlayers.CPConv2d(128, 128, 3, rank=2), TRConv2d(3, 5, 3, rank=2))
    assert [fastest(layer.network, "cpu", "float32").whole is None for layer in model] == [False, True]
    compiled = torch.compile(
        lambda x: model[1](x).mean() + frobenius_penalty(model), fullgraph=True, backend="aot_eager", dynamic=None
    )
    x, parameters = torch.randn(2, 3, 6, 6), [*model[1].parameters(), *model[0].cores]
    for _ in range(2):
        found, expected = compiled(x), model[1](x).mean() + frobenius_penalty(model)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("channels", [128, 256, 512])
@pytest.mark.parametrize("family", [*FAMILIES, "chain"])
def test_no_kernel_is_built_where_few_parameters_are_kept(family, channels):
    """In float32 and at a keep ratio of 0.1 and less: nothing as large as the kernel, and, but for BTT, fewer FLOPs."""
    kind, options = (TTConv2d, {"layout": "chain"}) if family == "chain" else (family, {})
    for keep in (0.05, 0.1):
        try:
            layer = kind(channels, channels, 3, rank=keep, device="meta", **options)
        except ValueError:  # too small for the format
            continue
        network, way = layer.network, fastest(layer.network, "cpu", "float32")
        assert way.whole is not None
        kernel = layer._executor.contraction.flops + 2 * network.dense_params
        assert way.flops < kernel or (family is tnlayers.BTTConv2d and way.flops < 1.5 * kernel)
        steps = [step for contraction in (*way.parts, way.whole) for step in contraction.steps]
        assert max(math.prod(step.shape) for step in steps) < network.dense_params


# ------------------------------------------------------------------ the penalty of a model


def test_shared_layers_and_shared_cores_count_once():
    layer, other = TRConv2d(8, 8, 3, rank=2), TRConv2d(8, 8, 3, rank=2)
    half = TRConv2d(8, 8, 3, rank=2)
    half.cores[0] = other.cores[0]
    for k, core in enumerate(layer.cores):
        other.cores[k] = core
    expected = squared_norm(layer) + squared_norm(half)
    torch.testing.assert_close(frobenius_penalty(nn.ModuleList([layer, other, half, layer])), expected)


def test_a_model_without_tensor_layers_has_no_penalty():
    found = frobenius_penalty(nn.Linear(2, 2))
    assert float(found) == 0
    assert float(frobenius_penalty(nn.ReLU())) == 0
    torch.testing.assert_close(frobenius_penalty(TRConv2d(4, 4, 3, rank=1)).detach().sign(), found + 1)


def test_the_penalty_decays_as_sgd_decays_a_dense_layer():
    """A kernel that is one core takes the very steps of a dense layer."""
    torch.manual_seed(0)
    layer = EinsumConv2d(4, 6, 3, network="o i h w", rank=(), dtype=torch.float64)
    dense = layer.to_conv()
    ours = torch.optim.SGD(param_groups(layer, 0.1), momentum=0.9)
    theirs = torch.optim.SGD([{"params": [dense.weight], "weight_decay": 0.3}, {"params": [dense.bias]}], 0.1, 0.9)
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        ours.zero_grad()
        theirs.zero_grad()
        (layer(x).square().mean() + 0.5 * 0.3 * frobenius_penalty(layer)).backward()
        dense(x).square().mean().backward()
        ours.step()
        theirs.step()
        torch.testing.assert_close(layer.weight, dense.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.bias, dense.bias, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ parameter groups


def model_of_all_kinds() -> nn.Module:
    layer = TRConv2d(8, 8, 3, rank=2)
    model = nn.Sequential(
        layer, nn.BatchNorm2d(8), TuckerConv2d(8, 8, 3, rank=2), layer, nn.Conv2d(8, 8, 1), nn.Embedding(3, 4)
    )
    model[4].weight.requires_grad_(False)
    model[2].cores[1].requires_grad_(False)
    return model


@pytest.mark.parametrize("scale", learning_rates.SCALES)
@pytest.mark.parametrize(("optimizer", "match"), RULES)
def test_every_parameter_is_in_one_group(optimizer, match, scale):
    model = model_of_all_kinds()
    groups = param_groups(model, 0.1, weight_decay=0.01, optimizer=optimizer, match=match, scale=scale)
    found = [parameter for group in groups for parameter in group["params"]]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, found)) == sorted(map(id, wanted))
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    assert [id(p) for p in groups[0]["params"]] == [id(model[5].weight)]
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups[:2]] == [
        ("weights", 0.1, 0.01), ("others", 0.1, 0.0),
    ]  # fmt: skip
    for group in groups[2:]:
        assert group["weight_decay"] == 0
        assert group["lr"] > 0
        assert dict(model.named_parameters())[group["name"]] is group["params"][0]
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        stepper = kind(groups, lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda epoch: 0.5**epoch)
        before = [group["lr"] for group in stepper.param_groups]
        stepper.step()
        schedule.step()
        assert [group["lr"] for group in stepper.param_groups] == [lr / 2 for lr in before]


def test_equal_layers_share_groups_where_rates_are_expected():
    model = nn.Sequential(*(TRConv2d(16, 16, 3, rank=2) for _ in range(4)), TRConv2d(16, 16, 1, rank=2))
    assert len(param_groups(model, 0.1, scale="expected")) == 1 + 2 + 2  # biases; channels' cores and kernels'
    assert len(param_groups(model, 0.1)) == 1 + 15
    assert sum(group["lr"] for group in param_groups(model, 0.0)) == 0


def test_a_core_of_two_layers_has_the_least_rate():
    one, two = TRConv2d(8, 8, 3, rank=2), TRConv2d(8, 8, 3, rank=2)
    with torch.no_grad():
        two.cores[1].mul_(3)
    expected = [min(rates(one)[k], rates(two)[k]) for k in (0, 2)]
    two.cores[0] = one.cores[0]
    found = [group for group in param_groups(nn.ModuleList([one, two]), 1.0) if group["name"] == "0.cores.0"]
    assert found[0]["lr"] == min(rates(one)[0], rates(two)[0])
    assert expected[0] > 0


def rates(layer, **kwargs) -> list[float]:
    """Each core's learning rate at a base rate of 1."""
    groups = param_groups(layer, 1.0, **kwargs)
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    return [found[id(core)] for core in layer.cores]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shares_of_the_cores_are_equal(case):
    """Against the Jacobian, whose columns are the kernels of cores with a single entry."""
    layer = make(case)
    network, cores, columns = layer.network, [core.detach() for core in layer.cores], []
    for k, core in enumerate(network.cores):
        units = torch.eye(cores[k].numel(), dtype=torch.float64).reshape(-1, *cores[k].shape)
        axes = [*network.cores[:k], ("unit", *core), *network.cores[k + 1 :]]
        jacobian = contract([*cores[:k], units, *cores[k + 1 :]], axes, ("unit", *network.dense_axes))
        squares = jacobian.flatten(1).square().sum(1)
        columns.append(squares)
        found = column_squares(network, cores, k)
        others = {axis for axes in (*network.cores[:k], *network.cores[k + 1 :]) for axis in axes}
        spread = found.reshape([network.sizes[axis] if axis in others else 1 for axis in core])
        torch.testing.assert_close(spread.expand(network.shape(core)).flatten(), squares, rtol=1e-9, atol=1e-12)
    share = network.dense_params / len(cores)
    for rate, squares in zip(rates(layer), columns, strict=True):
        assert rate * float(squares.sum()) == pytest.approx(share, rel=1e-9)
    for rate, squares in zip(rates(layer, optimizer="adam"), columns, strict=True):
        assert rate * float(squares.sqrt().sum()) == pytest.approx(share, rel=1e-6)  # roots of what rounds to nothing
    for rate, squares in zip(rates(layer, optimizer="adam", match="norm"), columns, strict=True):
        assert rate**2 * float(squares.sum()) == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("distribution", ["normal", "orthogonal"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_expected_rates_are_those_of_the_mean_jacobian(family, split, distribution):
    """The squared norm of each core's Jacobian, over 60 draws, within four standard errors."""
    torch.manual_seed(0)
    init = Init("fan_out", split=split, exact=False, distribution=distribution)
    layer = family(16, 16, 3, rank=3, init=init, dtype=torch.float64)
    network, count = layer.network, len(layer.cores)
    expected = [network.dense_params / (count * rate) for rate in rates(layer, scale="expected")]
    adam = rates(layer, scale="expected", optimizer="adam")
    norm = rates(layer, scale="expected", optimizer="adam", match="norm")
    for k, core in enumerate(layer.cores):
        draws = torch.empty(60, dtype=torch.float64)
        for draw in range(60):
            layer.reset_parameters()
            draws[draw] = column_squares(network, [*layer.cores], k).mean() * core.numel()
        # Of orthogonal cores the norm may be the same in every draw.
        assert abs(float(draws.mean()) - expected[k]) < 4 * float(draws.std()) / math.sqrt(60) + 1e-9 * expected[k]
        # The others are the same answer, by eq. (2) and (3).
        assert adam[k] == pytest.approx(network.dense_params / (count * math.sqrt(expected[k] * core.numel())))
        assert norm[k] == pytest.approx(math.sqrt(network.dense_params / (count * expected[k])))


# ------------------------------------------------------------------ first steps, as torch takes them

LR = 1e-6
"""So small that the second order of a step is far below every tolerance."""
THREE = [(tnlayers.CPConv2d, {}), (TRConv2d, {}), (TTConv2d, {})]


def step(layer, gradient, groups, kind) -> torch.Tensor:
    """What the first step of a new optimizer does to the kernel; the layer stays as it is."""
    before = [core.detach().clone() for core in layer.cores]
    weight = layer.weight
    optimizer = kind(groups, lr=LR)
    optimizer.zero_grad()
    (weight * gradient).sum().backward()
    optimizer.step()
    with torch.no_grad():
        moved = layer.weight - weight
        for core, old in zip(layer.cores, before, strict=True):
            core.copy_(old)
    return moved.detach()


def simulate(layer, optimizer: str, draws: int, redraw: bool = False, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The decrease of the linearised loss over that expected of a dense layer, with our groups and at equal rates.

    Gradients are white; with ``redraw``, there is one, and the cores are drawn anew each time.
    """
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    mean = LR * layer.network.dense_params * (1 if optimizer == "sgd" else math.sqrt(2 / math.pi))
    found = torch.empty(2, draws, dtype=torch.float64)
    gradient = torch.randn_like(layer.weight)
    if redraw:  # white in the mean only; the dense layer's decrease for this one is its own
        mean = LR * float(gradient.square().sum())
    for draw in range(draws):
        if redraw:
            layer.reset_parameters()
        elif draw:
            gradient = torch.randn_like(gradient)
        groups = param_groups(layer, LR, optimizer=optimizer, **kwargs)
        for number, own in enumerate((groups, layer.cores.parameters())):
            found[number, draw] = -(step(layer, gradient, own, kind) * gradient).sum() / mean
    return found[0], found[1]


def agrees(values: torch.Tensor, expected: float = 1.0) -> bool:
    """The mean, within four standard errors."""
    return abs(float(values.mean()) - expected) < 4 * float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("optimizer", learning_rates.OPTIMIZERS)
@pytest.mark.parametrize(("family", "options"), THREE)
def test_the_first_step_gains_what_a_dense_layer_does(family, options, optimizer, split):
    """And several times less at equal rates, where the split is equal too."""
    torch.manual_seed(0)
    layer = family(32, 32, 3, rank=0.1, init=Init(split=split), dtype=torch.float64, **options)
    ours, equal = simulate(layer, optimizer, 40)
    assert agrees(ours)
    assert float(ours.std()) / math.sqrt(40) < 0.05  # so the test says something
    assert float(equal.mean()) < (0.45 if split == "equal" else 1)


@pytest.mark.parametrize(("family", "options"), THREE)
def test_the_mean_step_over_draws_is_the_dense_layers(family, options):
    """For one gradient, by its projection on it."""
    torch.manual_seed(0)
    layer = family(32, 32, 3, rank=0.1, init=Init(exact=False), dtype=torch.float64, **options)
    ours, _ = simulate(layer, "sgd", 60, redraw=True, scale="expected")
    assert agrees(ours)
    assert float(ours.std()) / math.sqrt(60) < 0.15


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("family", "options"), THREE)
def test_the_norm_of_adams_first_step(family, options, split):
    """The dense layer's for random signs; a little more for a white gradient's; less at equal rates and equal split."""
    torch.manual_seed(0)
    layer = family(32, 32, 3, rank=0.1, init=Init(split=split), dtype=torch.float64, **options)
    groups = param_groups(layer, LR, optimizer="adam", match="norm")
    weight, squares = layer.weight.detach(), torch.empty(60, dtype=torch.float64)
    before = [core.detach().clone() for core in layer.cores]
    for draw in range(60):
        for core in layer.cores:
            core.grad = torch.randn_like(core)  # signs that know nothing of the cores
        torch.optim.Adam(groups).step()
        with torch.no_grad():
            squares[draw] = (layer.weight - weight).square().sum() / (LR**2 * weight.numel())
            for core, old in zip(layer.cores, before, strict=True):
                core.copy_(old)
    assert agrees(squares)
    gradient = torch.randn_like(weight)
    norm = LR * math.sqrt(weight.numel())
    assert 1 < float(step(layer, gradient, groups, torch.optim.Adam).norm()) / norm < 1.5
    at_equal_rates = step(layer, gradient, layer.cores.parameters(), torch.optim.Adam)
    assert float(at_equal_rates.norm()) / norm < (0.75 if split == "equal" else 1)


@pytest.mark.parametrize(("family", "options"), THREE)
def test_the_norm_of_sgds_first_step_is_not_the_dense_layers(family, options):
    """What the docstring warns of: several times as long."""
    torch.manual_seed(0)
    layer = family(32, 32, 3, rank=0.1, dtype=torch.float64, **options)
    gradient = torch.randn_like(layer.weight)
    moved = step(layer, gradient, param_groups(layer, LR), torch.optim.SGD)
    assert 3 < float(moved.norm() / (LR * gradient.norm())) < 30


# ------------------------------------------------------------------ errors


def zeroed() -> nn.Module:
    layer = TRConv2d(8, 8, 3, rank=2)
    nn.init.zeros_(layer.cores[1])
    return nn.Sequential(layer)


def parametrized() -> nn.Module:
    layer = TRConv2d(8, 8, 3, rank=2)
    parametrize.register_parametrization(layer.cores, "0", nn.Softplus())
    return layer


DENSE = nn.Linear(2, 2)
TABLE = [
    (lambda: frobenius_penalty(3), TypeError, "module is of type int", "torch.nn.Module"),
    (lambda: param_groups([DENSE], 0.1), TypeError, "model is of type list", "torch.nn.Module"),
    (lambda: param_groups(DENSE, -0.1), ValueError, "lr is -0.1", ">= 0"),
    (lambda: param_groups(DENSE, math.nan), ValueError, "lr is nan", ">= 0"),
    (lambda: param_groups(DENSE, math.inf), ValueError, "lr is inf", "finite"),
    (lambda: param_groups(DENSE, "0.1"), TypeError, "lr is '0.1'", "number"),
    (lambda: param_groups(DENSE, True), TypeError, "lr is True", "number"),
    (lambda: param_groups(DENSE, 0.1, weight_decay=-1), ValueError, "weight_decay is -1", ">= 0"),
    (lambda: param_groups(DENSE, 0.1, optimizer="adamw"), ValueError, "optimizer is 'adamw'", "'sgd', 'adam'"),
    (lambda: param_groups(DENSE, 1, optimizer="adam", match="no"), ValueError, "match is 'no'", "'decrease', 'norm'"),
    (lambda: param_groups(DENSE, 0.1, match="norm"), ValueError, "match is 'norm'", "'decrease'"),
    (lambda: param_groups(DENSE, 0.1, scale="init"), ValueError, "scale is 'init'", "'measured', 'expected'"),
    (lambda: param_groups(nn.ReLU(), 0.1), ValueError, "model has no parameter", "gradient"),
    (lambda: param_groups(copy.deepcopy(DENSE).requires_grad_(False), 0.1), ValueError, "model has no", "gradient"),
    (lambda: param_groups(zeroed(), 0.1), ValueError, "core 0 of 0", "zero"),
    (lambda: param_groups(parametrized(), 0.1), TypeError, "cores of TRConv2d are parametrized", "remove"),
    (
        lambda: param_groups(TRConv2d(8, 8, 3, rank=2, device="meta"), 0.1), ValueError,
        "scale is 'measured'", "meta", "'expected'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "parts"), [(call, error, parts) for call, error, *parts in TABLE])
def test_errors_name_argument_value_and_what_is_accepted(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    ends = [message.find(part) for part in parts]
    assert all(end >= 0 for end in ends), message
    assert all(a <= b for a, b in itertools.pairwise(ends)), message


def test_zero_cores_and_meta_layers_have_expected_rates():
    biases_channels_kernel = 3
    assert len(param_groups(zeroed(), 0.1, scale="expected")) == biases_channels_kernel
    assert len(param_groups(TRConv2d(8, 8, 3, rank=2, device="meta"), 0.1, scale="expected")) == biases_channels_kernel


def test_few_ways_are_judged_whatever_the_number_of_cores():
    for bonds in (20, 60):
        text = ", ".join(["i h w r0", *(f"r{k} s r{k + 1}" for k in range(bonds)), f"r{bonds} s o"])
        network = tnlayers.TensorNetwork.parse(
            text, {"i": 4, "h": 3, "w": 3, "o": 4, "s": 2, **{f"r{k}": 2 for k in range(bonds + 1)}}
        )
        found = [*norm_contractions(network, "cpu", "float32")]
        assert [len(way.groups) for way in found] == [bonds + 2, *range(norm_module.GROUPS, 0, -1)]
        cores = [torch.randn(shape, dtype=torch.float64) for shape in network.core_shapes]
        expected = reconstruct(network, cores).square().sum()
        for way in found:
            torch.testing.assert_close(way(cores), expected)
