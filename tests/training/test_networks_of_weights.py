"""What training does to ranks and kernels, on weights that ``parametrize_`` made networks of, beside equal layers."""

import copy

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers import frobenius_penalty, param_groups, prune_ranks_, rank_dropout_, rank_lasso
from tnlayers.formats import FORMATS
from tnlayers.layers.networks import network_layers
from tnlayers.layers.registry import layer_class

NAME = "0.in_proj_weight"


def pair(format="tr", rank=3):
    """Return attention whose projection is a network, and a linear layer with the same cores."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2).double()
    options = {"blocks": 2} if format == "btt" else {}
    tnlayers.parametrize_(attention, "in_proj_weight", format, rank=rank, decompose=False, **options)
    layer = layer_class(format, nn.Linear)(8, 24, rank=rank, bias=False, dtype=torch.float64, **options)
    with torch.no_grad():
        for mine, core in zip(layer.cores, attention.parametrizations.in_proj_weight.parameters(), strict=True):
            mine.copy_(core)
    return nn.Sequential(attention), layer


def cores(model):
    return [*model[0].parametrizations.in_proj_weight.parameters()]


FORMS = [name for name in FORMATS if name != "einsum"]


@pytest.mark.parametrize("format", FORMS)
def test_penalties_and_rates_are_those_of_the_equal_layer(format):
    model, layer = pair(format)
    torch.testing.assert_close(frobenius_penalty(model), frobenius_penalty(layer), rtol=1e-12, atol=0)
    torch.testing.assert_close(frobenius_penalty(model), model[0].in_proj_weight.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(rank_lasso(model), rank_lasso(layer), rtol=1e-12, atol=0)
    rank_lasso(model, include=NAME).backward()
    rank_lasso(layer).backward()
    for mine, core in zip(layer.cores, cores(model), strict=True):
        torch.testing.assert_close(core.grad, mine.grad, rtol=1e-10, atol=1e-12)
    rates = [
        {id(p): group["lr"] for group in param_groups(each, 0.1) for p in group["params"]} for each in (model, layer)
    ]
    for mine, core in zip(layer.cores, cores(model), strict=True):
        assert rates[0][id(core)] == pytest.approx(rates[1][id(mine)], rel=1e-12)
    decays = {id(p): g["weight_decay"] for g in param_groups(model, 0.1, weight_decay=0.5) for p in g["params"]}
    assert [decays[id(core)] for core in cores(model)] == [0.0] * len(cores(model))


def test_dropout_acts_in_training_alone_and_copies_keep_it():
    model, layer = pair()
    full = layer.weight.clone()
    assert rank_dropout_(model, 0.5) == [NAME]
    model, kept = copy.deepcopy(model), model
    x = torch.eye(8, dtype=torch.float64)
    rank_dropout_(layer, 0.5)
    torch.manual_seed(3)
    expected = layer(x).T
    torch.manual_seed(3)
    torch.testing.assert_close(model[0].in_proj_weight, expected, rtol=0, atol=1e-12)
    assert (expected - full).norm() > 0.1
    torch.testing.assert_close(model.eval()[0].in_proj_weight, full, rtol=0, atol=1e-12)
    tnlayers.densify_(kept)  # in training, whole all the same
    assert kept[0].training
    torch.testing.assert_close(kept[0].in_proj_weight, full, rtol=0, atol=1e-12)
    rank_dropout_(model.train(), 0.0)
    torch.testing.assert_close(model[0].in_proj_weight, full, rtol=0, atol=1e-12)


def loss(model, batch):
    return model[0](batch, batch, batch)[0].square().mean()


@pytest.mark.parametrize("format", ["tr", "tucker", "cp"])
def test_pruning_makes_the_networks_of_weights_smaller(format):
    model, layer = pair(format, rank=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [torch.randn(3, 2, 8, dtype=torch.float64) for _ in range(3)]
    loss(model, batches[0]).backward()
    optimizer.step()
    with torch.no_grad():
        for mine, core in zip(layer.cores, cores(model), strict=True):
            mine.copy_(core)
    before = sum(core.numel() for core in cores(model))
    report = prune_ranks_(model, before - 1, batches, loss, optimizer=optimizer)
    assert report.params == (before, sum(core.numel() for core in cores(model)))
    assert report.params[1] < before
    error = layer.truncate_(report[NAME].after)
    assert report[NAME].error == pytest.approx(error, rel=1e-9)
    torch.testing.assert_close(model[0].in_proj_weight, layer.weight, rtol=0, atol=1e-10)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(core) for core in cores(model)} <= held
    network = model[0].parametrizations.in_proj_weight[0]
    assert dict(network.layer.rank) == report[NAME].after
    assert f"rank={next(iter(report[NAME].after.values()))}" in repr(network) or len({*network.layer.rank.values()}) > 1
    was = model[0].in_proj_weight.detach().clone()
    optimizer.zero_grad()
    loss(model, batches[0]).backward()
    optimizer.step()
    assert not torch.equal(model[0].in_proj_weight, was)
    with torch.no_grad():
        model[0].in_proj_weight = was  # fits the smaller network
    assert dict(network.layer.rank) == report[NAME].after


def test_what_was_pruned_is_saved_and_loaded(tmp_path):
    model, _ = pair(rank=4)
    prune_ranks_(model, 0.2, [torch.randn(3, 2, 8, dtype=torch.float64)], loss)
    tnlayers.save_tensorized(model, tmp_path / "model.safetensors")
    again = tnlayers.load_tensorized(
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2).double()), tmp_path / "model.safetensors"
    )
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_layers_and_weights_have_their_names_and_patterns():
    model = nn.Sequential(*pair()[0], tnlayers.TRLinear(8, 8, rank=2, dtype=torch.float64))
    assert [*network_layers(model)] == [NAME, "1"]
    assert rank_dropout_(model, 0.1, include="*_weight") == [NAME]
    assert model[1].rank_dropout == 0
    torch.testing.assert_close(rank_lasso(model), rank_lasso(model[1]) + rank_lasso(model, include=NAME))
    with pytest.raises(ValueError, match=r"which matches none of the tensor layers 0.in_proj_weight, 1"):
        rank_lasso(model, include="2")


def test_what_has_no_cores_of_its_own_says_so():
    model, _ = pair()
    with pytest.raises(ValueError, match=r"describes the network of a weight.*prune_ranks_ of the module changes"):
        model[0].parametrizations.in_proj_weight[0].layer.truncate_(1)
    nn.utils.parametrize.register_parametrization(model[0].parametrizations.in_proj_weight, "original0", nn.Identity())
    with pytest.raises(TypeError, match=r"cores of 0.in_proj_weight are parametrized; remove"):
        rank_lasso(model)
