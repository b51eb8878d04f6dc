"""Terms of bonds, their influence on the loss, and ranks lowered to a budget."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

import tnlayers
from cases import CASES
from tnlayers.execution.rank_dropout import scaled
from tnlayers.ops.contraction import contract, reconstruct
from tnlayers.training.bonds import balancing, homes, influence, largest_useful, term_squares
from tnlayers.training.prune_ranks import _choose, _Pruned, prune_ranks_

SOME = [case for case in CASES if case.kind in ("Conv2d", "Linear") and case.make(device="meta").rank]


def make(case):
    torch.manual_seed(0)
    return case.make(dtype=torch.float64)


def turned(layer, bond):
    """The cores with the bond in the basis of ``balancing``."""
    network, cores = layer.network, [core.detach() for core in layer.cores]
    basis = balancing(network, cores, bond)
    places = homes(network, bond)
    if len(places) == 2:
        for place, matrix, axes in zip(places, basis, ((bond, "x"), ("x", bond)), strict=True):
            out = tuple("x" if axis == bond else axis for axis in network.cores[place])
            cores[place] = contract([cores[place], matrix], [network.cores[place], axes], out)
    return basis, cores


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_change_of_basis_keeps_the_kernel_and_influence_is_the_derivative_by_terms(case):
    layer = make(case)
    network, weight = layer.network, torch.randn(layer.network.dense_shape, dtype=torch.float64)
    gradients = torch.autograd.grad((reconstruct(network, list(layer.cores)) * weight).sum(), list(layer.cores))
    kernel = reconstruct(network, [core.detach() for core in layer.cores])
    for bond, size in layer.rank.items():
        basis, cores = turned(layer, bond)
        torch.testing.assert_close(reconstruct(network, cores), kernel, rtol=1e-9, atol=1e-9)
        home = homes(network, bond)[0]
        found = influence(network, bond, layer.cores[home].detach(), gradients[home], basis)
        for one, derivative in zip(torch.eye(size, dtype=torch.float64), found, strict=True):
            term = reconstruct(network, scaled(network, cores, [(bond, one)]))
            torch.testing.assert_close(derivative, (term * weight).sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["TT", "Tucker", "HT"])
def test_terms_of_trees_are_singular_components(name):
    torch.manual_seed(0)
    layer = getattr(tnlayers, f"{name}Linear")(16, 16, rank=3, dtype=torch.float64)
    for bond in layer.rank:
        _, cores = turned(layer, bond)
        squares = term_squares(layer.network, cores, bond)
        kernel = reconstruct(layer.network, cores)
        assert (squares.diff() <= 1e-12).all()
        torch.testing.assert_close(squares.sum(), kernel.square().sum(), rtol=1e-10, atol=0)  # so they are orthogonal


@given(st.integers(2, 6), st.integers(2, 6), st.floats(0.05, 1))
@settings(max_examples=20, deadline=None)
def test_the_choice_is_within_the_budget_and_takes_no_more_than_it_must(one, other, share):
    torch.manual_seed(one * other)
    layers = [tnlayers.CPLinear(8, 8, rank=one), tnlayers.TuckerLinear(8, 8, rank=other)]
    pruned = {str(k): _Pruned(layer, None) for k, layer in enumerate(layers)}
    for each in pruned.values():
        each.add([torch.randn_like(value) for value in each.values])
        each.finish(1)
    least = sum(each.network.resize(dict.fromkeys(each.left, 1)).num_params for each in pruned.values())
    full = sum(each.network.num_params for each in pruned.values())
    limit = max(least, int(share * full))
    _choose(pruned, limit)
    count = sum(each.network.num_params for each in pruned.values())
    largest = max(
        each.network.resize({bond: len(costs) + 1}).num_params - each.network.num_params
        for each in pruned.values()
        for bond, costs in each.left.items()
    )
    assert limit - largest < count <= limit or count == full <= limit


def test_a_bond_beyond_what_its_neighbours_allow_is_cut_for_nothing():
    torch.manual_seed(0)
    each = _Pruned(tnlayers.TTLinear(8, 8, layout="chain", in_shape=(8,), out_shape=(8,), rank=5), None)
    assert largest_useful(each.network, "r1") == 8
    each.add([torch.randn_like(value) for value in each.values])
    each.finish(1)
    for bond, costs in each.left.items():
        costs.extend([1.0] * 7)
        each.network = each.network.resize({bond: 12})
    assert each.step() == (0.0, "r1")


def problem(*layers):
    """A model, batches and a loss, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers).double()
    batches = [(torch.randn(8, 12, dtype=torch.float64), torch.randint(6, (8,))) for _ in range(6)]
    return model, batches, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])


def two(**options):
    return problem(tnlayers.TuckerLinear(12, 16, rank=8), nn.BatchNorm1d(16), tnlayers.TuckerLinear(16, 6, rank=5))


def test_terms_that_no_loss_sees_go_first():
    """Terms whose output the next layer ignores are large, and yet the first to go."""
    model, batches, loss = two()
    with torch.no_grad():
        model[0].set_weight_(torch.eye(16, 12, dtype=torch.float64) * torch.linspace(3, 2, 12, dtype=torch.float64))
        model[2].set_weight_(torch.eye(6, 16, dtype=torch.float64) * torch.linspace(2, 1, 16, dtype=torch.float64))
    before = [loss(model.eval(), batch) for batch in batches]
    report = prune_ranks_(model, model[2].network.num_params + 200, batches, loss)
    assert report["2"].after == report["2"].before
    assert sum(report["0"].after.values()) < sum(report["0"].before.values())
    assert report["0"].sensitivity == pytest.approx(0, abs=1e-20)
    assert report["0"].error > 0.1
    for batch, value in zip(batches, before, strict=True):
        torch.testing.assert_close(loss(model, batch), value, rtol=1e-8, atol=1e-8)


def test_it_follows_the_lasso_and_the_report_says_what_was_done():
    model, batches, loss = two()
    with torch.no_grad():
        model[0].cores[0][:, 5:] *= 1e-9
    model.train()
    state = {name: value.clone() for name, value in model[1].state_dict().items()}
    random = torch.get_rng_state()
    expected = model[0].weight.detach().clone()
    dense = sum(layer.network.dense_params for layer in (model[0], model[2]))
    count = sum(layer.network.num_params for layer in (model[0], model[2]))
    smaller = model[0].network.resize({"ri": 5})
    report = prune_ranks_(model, count - model[0].network.num_params + smaller.num_params, batches, loss)
    assert report["0"].after == dict(model[0].rank)
    assert min(report["0"].after.values()) >= 5
    assert report["0"].error < 1e-8
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-7, atol=1e-7)
    assert report.params == (count, sum(layer.network.num_params for layer in (model[0], model[2])))
    assert str(report).endswith(
        f"parameters of the cores: {count:,} -> {report.params[1]:,} ({report.params[1] / count:.1%})"
    )
    assert [*report] == ["0", "2"]
    assert "<table>" in report._repr_html_()
    assert model.training
    assert model[0].training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model[1].state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    half = prune_ranks_(model, 0.5, batches, loss)
    assert half.params[1] <= 0.5 * dense
    again = prune_ranks_(model, 0.5, batches, loss)  # within the budget already
    assert again.params == (half.params[1],) * 2
    assert not any(layer.error for layer in again.layers)


@pytest.mark.parametrize("case", [case for case in SOME if case.kind == "Linear"], ids=str)
def test_every_format_is_pruned_and_trains_on(case):
    layer = make(case)
    model = nn.Sequential(layer, nn.Linear(12, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = [(torch.randn(4, 8, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(3)]

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    least = layer.network.resize(dict.fromkeys(layer.rank, 1)).num_params
    budget = (layer.network.num_params + least) // 2
    loss(model, batches[0]).backward()
    optimizer.step()
    layer.cores[0].requires_grad_(False)
    prune_ranks_(model, budget, batches, loss, optimizer=optimizer)
    assert layer.network.num_params <= budget
    assert [core.requires_grad for core in layer.cores] == [False] + [True] * (len(layer.cores) - 1)
    before = [core.detach().clone() for core in layer.cores]
    loss(model, batches[0]).backward()
    optimizer.step()
    assert any(not torch.equal(core, old) for core, old in zip(layer.cores, before, strict=True))


def shared():
    model, batches, loss = two()
    model.append(tnlayers.CPLinear(6, 6, rank=2, dtype=torch.float64))
    model.append(copy.copy(model[3]))
    return model, batches, loss


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"budget": 0.0}, "budget is 0.0; a float is a share"),
        ({"budget": 1.5}, "budget is 1.5; a float is a share"),
        ({"budget": True}, "budget is True"),
        ({"budget": 5}, "budget is 5, or 5 parameters, but the smallest ranks have 52"),
        ({"batches": []}, "batches is empty"),
        ({"loss": None}, "loss is None; it must be a function"),
        ({"loss": lambda model, batch: model(batch[0])}, "it must return a tensor with one entry"),
        ({"loss": lambda model, batch: torch.ones(2, 3)}, r"loss returned a tensor of shape \(2, 3\); it must"),
        ({"loss": lambda model, batch: torch.ones(())}, "loss returned a tensor without a gradient"),
        ({"loss": lambda model, batch: model[0](batch[0]).sum()}, "no batch reaches 2; leave it out by include"),
        ({"loss": lambda model, batch: model(batch[0]).sum() * math.inf}, "a gradient of 0 is not finite"),
        ({"include": "x"}, "include is 'x', which matches none"),
        ({"optimizer": torch.optim.SGD([torch.ones(1)])}, "holds none of the parameters"),
        ({"optimizer": 3}, "optimizer is 3"),
        ({"model": nn.Sequential(tnlayers.EinsumLinear(2, 2, network="o i"))}, "no tensor layer with a bond"),
    ],
)
def test_errors_change_nothing(change, error):
    model, batches, loss = two()
    before = copy.deepcopy(model.state_dict())
    arguments = {"model": model, "budget": 0.3, "batches": batches, "loss": loss} | change
    with pytest.raises((TypeError, ValueError), match=error):
        prune_ranks_(**arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_are_refused_by_name():
    model, batches, loss = shared()
    with pytest.raises(ValueError, match="4 shares a core with 3; their ranks can only change together"):
        prune_ranks_(model, 0.5, batches, loss)
    model = model[:3]
    nn.utils.parametrize.register_parametrization(model[2].cores, "0", nn.Identity())
    with pytest.raises(TypeError, match="2: cores are parametrized"):
        prune_ranks_(model, 0.5, batches, loss)


def test_nothing_changes_ranks_inside_distributed_data_parallel():
    model, batches, loss = problem(tnlayers.TTLinear(12, 12, rank=3), nn.Linear(12, 6))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        before = [*map(id, model.parameters())]
        with pytest.raises(ValueError, match=r"model is wrapped in DistributedDataParallel, .*; prune its module"):
            prune_ranks_(wrapped, 0.4, batches, loss)
        inside = "the layer is inside a DistributedDataParallel"
        with pytest.raises(ValueError, match=f"0: {inside}"):
            prune_ranks_(model, 0.4, batches, loss)
        for change, rank in ((model[0].truncate_, 2), (model[0].grow_, 4)):
            with pytest.raises(ValueError, match=inside):
                change(rank)
        assert [*map(id, model.parameters())] == before
        model = wrapped.module
        del wrapped
        model[0].truncate_(2)
        nn.parallel.DistributedDataParallel(model)(batches[0][0]).sum().backward()
        assert all(core.grad is not None for core in model[0].cores)
    finally:
        dist.destroy_process_group()
