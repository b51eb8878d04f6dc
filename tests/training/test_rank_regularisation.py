"""Dropout of bond entries and the lasso on them, against their definitions and tensorly-torch."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import tnlayers
from cases import CASES
from tnlayers.execution.rank_dropout import draw_factors, scaled
from tnlayers.ops.contraction import reconstruct
from tnlayers.training.rank_regularisation import rank_dropout_, rank_lasso

ONE_OF_EACH = [case for case in CASES if case.kind in ("Conv2d", "Linear", "ConvTranspose1d")]


def make(case):
    torch.manual_seed(0)
    return case.make(dtype=torch.float64)


# ------------------------------------------------------------------ dropout


@pytest.mark.parametrize(("size", "p"), [(1, 0.4), (2, 0.5), (3, 0.2), (4, 0.7)])
def test_the_factors_have_expectation_one(size, p):
    """Exactly: over all subsets of dropped entries, of which one at least is kept."""
    keep = 1 / float(draw_factors(size, p, torch.empty(0, dtype=torch.float64)).max())
    expected = 0.0
    for dropped in itertools.product((False, True), repeat=size):
        chance = math.prod(p if gone else 1 - p for gone in dropped)
        kept = size - sum(dropped)
        expected += chance * (1 / size if not kept else float(not dropped[0])) / keep
    assert expected == pytest.approx(1, abs=1e-12)


def test_one_entry_is_kept_and_each_is_dropped_as_often():
    torch.manual_seed(0)
    draws = torch.stack([draw_factors(3, 0.6, torch.empty(0)) for _ in range(4000)])
    assert (draws > 0).any(1).all()
    chance = 0.4 + 0.6**3 / 3
    error = (chance * (1 - chance) / 4000) ** 0.5
    assert ((draws > 0).double().mean(0) - chance).abs().max() < 5 * error


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_forward_in_training_is_that_of_the_thinned_kernel(case):
    layer = make(case)
    x = torch.randn(2, 8, *[5] * case.ndim, dtype=torch.float64)
    full = layer(x)
    assert rank_dropout_(layer, 0.5) == [type(layer).__name__]
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    factors = [(bond, draw_factors(size, 0.5, layer.cores[0])) for bond, size in layer.rank.items()]
    twin = layer.to_dense()
    weight = copy.deepcopy(layer)
    with torch.no_grad():
        for core, value in zip(weight.cores, scaled(layer.network, list(layer.cores), factors), strict=True):
            core.copy_(value)
        twin.weight.copy_(weight.weight)
    torch.testing.assert_close(found, twin(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.eval()(x), full, rtol=0, atol=0)
    assert layer.state_dict().keys() == weight.state_dict().keys()
    rank_dropout_(layer, 0)
    torch.testing.assert_close(layer.train()(x), full, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_lookups_in_training_are_those_of_the_thinned_table(kind):
    layer = getattr(tnlayers, f"TR{kind}")(12, 8, rank=3, dtype=torch.float64)
    x = torch.tensor([[0, 3, 11], [5, 5, 7]])
    full = layer(x)
    rank_dropout_(layer, 0.5)
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    factors = [(bond, draw_factors(size, 0.5, layer.cores[0])) for bond, size in layer.rank.items()]
    thin = copy.deepcopy(layer).eval()
    with torch.no_grad():
        for core, value in zip(thin.cores, scaled(layer.network, list(layer.cores), factors), strict=True):
            core.copy_(value)
    torch.testing.assert_close(found, thin(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, full)
    torch.testing.assert_close(layer.eval()(x), full, rtol=0, atol=0)


def test_dropout_stays_in_copies_and_with_other_plans():
    layer = tnlayers.TRConv2d(4, 4, 3, rank=3)
    layer.rank_dropout = 0.3
    layer.strategy = "factorized"
    assert copy.deepcopy(layer).rank_dropout == layer.rank_dropout == 0.3
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(1, 4, 6, 6)
    assert not torch.equal(compiled(x), compiled(x))
    assert torch.equal(compiled.eval()(x), compiled(x))


# ------------------------------------------------------------------ lasso


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_the_lasso_is_the_sum_of_the_terms_norms(case):
    layer = make(case)
    expected = torch.zeros((), dtype=torch.float64)
    for bond, size in layer.rank.items():
        for one in torch.eye(size, dtype=torch.float64):
            term = reconstruct(layer.network, scaled(layer.network, list(layer.cores), [(bond, one)]))
            expected = expected + term.norm()
    found = rank_lasso(layer)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if layer.rank:
        gradients = torch.autograd.grad(found, list(layer.cores))
        expected = torch.autograd.grad(expected, list(layer.cores))
        torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)


def test_the_least_lasso_of_a_matrix_is_its_nuclear_norm():
    layer = tnlayers.CPLinear(6, 5, rank=5, dtype=torch.float64)
    nuclear = torch.linalg.matrix_norm(layer.weight, "nuc")
    assert rank_lasso(layer) > nuclear
    left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    with torch.no_grad():
        ends = {"o": left * values.sqrt(), "i": right.mT * values.sqrt()}
        for core, axes in zip(layer.cores, layer.network.cores, strict=True):
            core.copy_(ends[axes[0]])
    torch.testing.assert_close(rank_lasso(layer), nuclear, rtol=1e-10, atol=0)


def test_layers_with_the_same_cores_count_once_and_zero_terms_have_no_gradient():
    one, other = (tnlayers.CPConv2d(4, 4, 3, rank=2) for _ in range(2))
    other.cores = one.cores
    assert rank_lasso(nn.Sequential(one, other)) == rank_lasso(one)
    with torch.no_grad():
        one.cores[0].zero_()
    rank_lasso(one).backward()
    assert all(not core.grad.any() for core in one.cores)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda model: rank_dropout_(model, 1.0), "p is 1.0; it must be a number of at least 0 and below 1"),
        (lambda model: rank_dropout_(model, "half"), "p is 'half'"),
        (lambda model: rank_dropout_(nn.Linear(2, 2), 0.1), "model has no tensor layer"),
        (lambda model: rank_dropout_(model, 0.1, include="1"), "include is '1', which matches none"),
        (lambda model: rank_lasso(model, include=[]), "include is"),
        (lambda model: rank_lasso(model, include=3), "include is 3"),
        (lambda model: rank_lasso(None), "model is of type NoneType"),
    ],
)
def test_errors_name_the_argument(call, error):
    model = nn.Sequential(tnlayers.CPLinear(4, 4, rank=2))
    with pytest.raises((TypeError, ValueError), match=error):
        call(model)
    assert model[0].rank_dropout == 0


def test_a_layer_shows_its_dropout():
    layer = tnlayers.TTLinear(8, 8, rank=2)
    before = repr(layer)
    layer.rank_dropout = 0.25
    assert repr(layer) == f"{before[:-1]}, rank_dropout=0.25)"
    layer.rank_dropout = 0.0
    assert repr(layer) == before
