"""The configuration of a swap, and the ranks it leaves to a budget or an energy."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tnlayers
from networks import networks
from tnlayers import Init, TensorizeConfig, tensorize_
from tnlayers.backend.name_patterns import matches
from tnlayers.fitting.cuts import cuts, estimate
from tnlayers.ops.contraction import reconstruct
from tnlayers.tensorize.flops import fewest_flops
from tnlayers.tensorize.new_layers import _candidate
from tnlayers.tensorize.sites import LayerSite

FULL = TensorizeConfig(
    "tt",
    rank=(2, 3),
    options={"layout": "chain"},
    include=["a*", "re:b[0-9]+"],
    exclude=["a1"],
    min_params=7,
    overrides=[("a2", None), ("*", {"rank": [4, 4], "init": {"mode": "fan_out", "input_size": [8, 8]}})],
    depthwise=True,
    subclasses=True,
    init=Init("fan_avg", nonlinearity="leaky_relu", param=0.1),
    decompose=False,
    strategy="reconstruct",
    memory="low",
)


@pytest.mark.parametrize(
    "config", [TensorizeConfig(), FULL, TensorizeConfig(budget={"flops": 0.5}), TensorizeConfig(energy=1)]
)
def test_dictionary_json_and_yaml_round_trips(config, tmp_path):
    plain = config.to_dict()
    assert plain["version"] == 1
    assert TensorizeConfig.from_dict(json.loads(json.dumps(plain))) == config
    config.to_yaml(tmp_path / "config.yaml")
    assert TensorizeConfig.from_yaml(tmp_path / "config.yaml") == config
    assert TensorizeConfig().to_dict() == {"version": 1}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"format": "ttt"}, "format is 'ttt'; accepted: "),
        ({"rank": 3, "energy": 0.5}, "rank and energy are given; one of them"),
        ({"budget": 0.2}, "budget is 0.2; it must be a mapping"),
        ({"budget": {"bytes": 0.2}}, "budget is {'bytes': 0.2}; it must be"),
        ({"budget": {"params": 0.2, "flops": 0.2}}, "it must be {'params': share} or {'flops': share}"),
        ({"budget": {"params": 1.5}}, "budget is 1.5; it must be a share in (0, 1]"),
        ({"budget": {"params": math.nan}}, "budget is nan; it must be a share in (0, 1]"),
        ({"budget": {"params": True}}, "budget is True; it must be a share"),
        ({"energy": 0}, "energy is 0; it must be a share in (0, 1]"),
        ({"energy": 0.9, "decompose": False}, "energy is given, but decompose is False"),
        ({"include": "stem"}, "include is 'stem'; it must be a sequence of patterns, such as ['stem']"),
        ({"exclude": [3]}, "exclude has the pattern 3"),
        ({"exclude": ["re:("]}, "exclude has the pattern 're:(', which is no regular expression"),
        ({"min_params": -1}, "min_params is -1"),
        ({"rank": "abc"}, "rank is 'abc'; it must be an integer, integers, a keep ratio in (0, 1], or 'vbmf'"),
        ({"rank": 0}, "rank is 0; it must be an integer >= 1"),
        ({"rank": 1.5}, "rank is 1.5; it must be a share in (0, 1]"),
        ({"memory": "none"}, "memory is 'none'; accepted: 'auto', 'low'"),
        ({"overrides": {"a": {"rank": -3}}}, "overrides['a']: rank is -3"),
        ({"depthwise": 1}, "depthwise is 1; it must be True or False"),
        ({"overrides": ["a"]}, "overrides is ['a']; it must map patterns to mappings or None"),
        ({"overrides": {"a": 3}}, "overrides['a'] is 3; it must be a mapping"),
        ({"overrides": {"a": {"ranks": 3}}}, "overrides['a'] has the key 'ranks'; did you mean 'rank'?"),
        ({"overrides": {"a": {"format": "x"}}}, "overrides['a']: format is 'x'"),
        ({"init": {"mod": 1}}, "init has the key 'mod'; did you mean 'mode'?"),
        ({"init": 3}, "init is 3"),
        ({"fromat": "tr"}, "config has the key 'fromat'; did you mean 'format'?"),
        ({"version": 2}, "version is 2; this library reads up to 1"),
        ([], "config is []; it must be a mapping"),
    ],
)
def test_a_wrong_field_is_named(given, sentence):
    with pytest.raises((TypeError, ValueError)) as caught:
        TensorizeConfig.from_dict(given)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "covered"),
    [
        ("layer1", ["layer1.0.conv", "layer1.1.conv"]),
        ("layer1.0", ["layer1.0.conv"]),
        ("*.conv", ["layer1.0.conv", "layer1.1.conv", "layer10.0.conv"]),
        ("layer1*", ["layer1.0.conv", "layer1.1.conv", "layer10.0.conv"]),
        ("layer1?", ["layer10.0.conv"]),
        ("re:layer1\\..*", ["layer1.0.conv", "layer1.1.conv"]),
        ("re:layer", []),
        ("conv", []),
        ("*", ["layer1.0.conv", "layer1.1.conv", "layer10.0.conv", "stem"]),
    ],
)
def test_patterns(pattern, covered):
    names = ["layer1.0.conv", "layer1.1.conv", "layer10.0.conv", "stem"]
    assert [name for name in names if matches(pattern, [name])] == covered


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 16))


X = torch.zeros(2, 8, 8, 8)
FORMATS = [name for name in tnlayers.FORMATS if name != "einsum"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("decompose", [False, True])
def test_a_budget_of_parameters_is_kept_and_used(name, decompose):
    """What is left would not be enough for the next keep ratio, 10 % larger, or the next level of the error. BlockTT's
    ranks are whole blocks."""
    share = 0.5
    config = TensorizeConfig(name, budget={"params": share}, decompose=decompose)
    report = tensorize_(net(), config, dry_run=True)
    before, after = report.total("params")
    assert 0.75 * share * before < after <= share * before


@pytest.mark.parametrize("name", FORMATS)
def test_a_budget_tries_the_networks_and_flops_of_the_layers(name):
    """Of the layers that would be made, for a rank that a search tries."""
    for module, shape in (
        (nn.Conv2d(8, 16, 3, groups=2), (4, 8, 6, 6)),
        (nn.Linear(16, 12), (4, 16)),
        (nn.Embedding(23, 12), (4,)),
    ):
        site = LayerSite(module, ("0",), [], shapes=[shape])
        site.settings = {"format": name, "options": {}, "decompose": False, "rank": None}
        params = _candidate(site, "params")
        for rank in (1, 2, 0.9):
            layer = site.make(rank)
            network, free = params.build(rank)
            assert (network, free) == (layer.network, layer.rank)
            assert params.build(free)[0] == network
            assert params.cost(network) == sum(core.numel() for core in layer.cores)
            if site.called:
                assert _candidate(site, "flops").cost(network) == fewest_flops(layer, site.shapes, "cpu")


def test_flops_of_rows_are_those_of_their_look_up():
    """A layer that looks rows up has plans of its own kind, not those of a matrix product."""
    layer = tnlayers.TTEmbedding(64, 32, rank=4, device="meta")
    for network in (None, layer.network):
        layer.strategy = "factorized"
        fewest = layer.flops((4, 8))
        layer.strategy = "auto"
        assert fewest_flops(layer, [(4, 8)], "cpu", network) == min(fewest, layer.flops((4, 8)))


def test_a_budget_of_flops_is_kept():
    for decompose in (False, True):
        config = TensorizeConfig("tucker", budget={"flops": 0.4}, decompose=decompose)
        before, after = tensorize_(net(), config, example_input=X, dry_run=True).total("flops")
        assert 0.2 * before < after <= 0.4 * before
    with pytest.raises(ValueError, match="example_input is None"):
        tensorize_(net(), config)


def test_a_budget_goes_where_the_error_falls():
    """One kernel has almost rank one, the other has a flat spectrum."""
    model = net()
    with torch.no_grad():
        thin = torch.randn(16, 1, 1, 1) * torch.randn(1, 8, 1, 1) * torch.randn(1, 1, 3, 3)
        model[0].weight.copy_(thin + 0.01 * torch.randn(16, 8, 3, 3))
    report = tensorize_(model, TensorizeConfig("tucker", budget={"params": 0.5}, exclude=["3"]))
    assert set(report["0"].rank.values()) == {1}
    assert min(report["1"].rank.values()) > 4
    assert report["0"].error < 0.1


def test_a_rank_of_its_own_is_outside_the_budget():
    config = TensorizeConfig("tucker", budget={"params": 0.3}, overrides={"0": {"rank": 2}})
    report = tensorize_(net(), config, dry_run=True)
    assert report["0"].rank == {"ri": 2, "ro": 2}
    before, after = (sum(report[name].params[k] for name in "13") for k in (0, 1))
    assert after <= 0.3 * before


def test_a_budget_too_small_is_refused():
    for decompose in (False, True):
        with pytest.raises(ValueError, match=r"budget is 0\.001, 14 for all chosen layers, but"):
            tensorize_(net(), TensorizeConfig("tr", budget={"params": 1e-3}, decompose=decompose))


def test_wide_layers_are_looked_at_too():
    """A kernel of rank 8, both of whose sides are beyond what a small matrix has."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(2100, 2100, bias=False))
    left, right = torch.randn(2, 8, 2100, generator=generator)
    model[0].weight.data = left.mT @ right
    report = tensorize_(model, TensorizeConfig("tucker", energy=0.999), dry_run=True)
    assert set(report["0"].rank.values()) == {8}


def test_an_energy_that_saves_nothing_leaves_the_layer_plain():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.init.ones_(model[1].weight)
    report = tensorize_(model, TensorizeConfig("tucker", energy=0.999), dry_run=True)
    assert report["0"].reason == "the energy 0.999 needs no fewer than its 1,024 parameters"
    assert report.swapped == ("1",)


@pytest.mark.parametrize("name", FORMATS)
def test_energy_bounds_what_every_cut_loses(name):
    model = net()
    kernels = [model[k].weight.detach().clone() for k in (0, 1, 3)]
    report = tensorize_(model, TensorizeConfig(name, energy=0.7, rank=None), dry_run=True)
    for layer, kernel, position in zip(report.layers, kernels, (0, 1, 3), strict=True):
        made = tnlayers.layers.registry.layer_class(name, type(model[position]))
        shape = kernel.shape[1], kernel.shape[0], *([3] if kernel.ndim == 4 else [])
        network = made(*shape, rank=layer.rank).network
        found = cuts(network, kernel)
        assert estimate(network, found) <= 0.3 + 1e-9
        # and no bond could be smaller
        for bond, size in layer.rank.items():
            if size > 1 and name in ("tucker", "cp"):
                assert estimate(network.resize({bond: size - 1}), found) > 0.3


@given(networks(), st.integers(0, 99))
def test_no_fit_is_better_than_the_estimate(network, seed):
    """The kernel of a network loses nothing in any cut of it; and a cut's losses fall from all to nothing."""
    generator = torch.Generator().manual_seed(seed)
    cores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in network.core_shapes]
    found = cuts(network, reconstruct(network, cores))
    assert estimate(network, found) < 1e-12
    for cut in found:
        assert (cut.loss.diff() <= 1e-12).all()
        assert cut.loss[-1] == 0


def test_patterns_for_parts_of_layers_and_for_weights_are_explained():
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "mha": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    for pattern, words in (
        (
            "lstm.weight_ih_l0",
            "'lstm.weight_ih_l0', which covers no layer .*; lstm is one layer, and patterns cover it as",
        ),
        ("mha.in_proj_weight", r"it matches weights that no layer covers \(parametrize=True looks at them\)"),
        ("ftc", "near names: fc"),
    ):
        for field in ("include", "exclude"):
            with pytest.raises(ValueError, match=words):
                tensorize_(model, TensorizeConfig(decompose=False, **{field: [pattern]}))


def test_a_drawn_size_needs_drawn_kernels():
    with pytest.raises(ValueError, match=r"^init is 'like', but decompose is True: .*; say decompose=False"):
        TensorizeConfig(init="like", overrides={"0": None})
    with pytest.raises(ValueError, match=r"^overrides\['0'\]: init is 'like', but decompose is True"):
        TensorizeConfig(overrides={"0": {"init": "like"}})
    with pytest.raises(ValueError, match=r"^init is 'like', but decompose is True"):
        TensorizeConfig(init="like", overrides={"0": {"init": "fan_in", "decompose": False}})
    TensorizeConfig(init="like", overrides={"0": {"decompose": False}})
    TensorizeConfig(overrides={"0": {"init": "like", "decompose": False}})
