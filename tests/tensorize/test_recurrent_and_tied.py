"""Recurrent layers, and embeddings with outputs tied to them, are swapped on request, come back, and are saved."""

import copy

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers import TensorizeConfig, TiedLinear, densify_, load_tensorized, save_tensorized, tensorize_, unfold_

KINDS = "linear", "embedding", "recurrent"


class Model(nn.Module):
    """Two embeddings and an output with one weight, a recurrent layer, and attention."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(53, 16, padding_idx=3)
        self.again = nn.Embedding(53, 16, padding_idx=3)
        self.steps = nn.LSTM(16, 16, 2, dropout=0.1, bidirectional=True, proj_size=8)
        self.attention = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 53)
        self.head.weight = self.again.weight = self.table.weight
        self.steps.tag = "mine"

    def forward(self, x):
        y = self.steps(self.table(x) + self.again(x + 1))[0]
        return self.head(self.attention(y, y, y)[0])


TOKENS = torch.tensor([[1, 2, 3], [5, 6, 50]])


def model():
    torch.manual_seed(0)
    return Model().double().eval()


@pytest.mark.parametrize("decompose", [False, True])
def test_there_and_back(decompose, tmp_path):
    new = model()
    bias = new.steps.bias_ih_l0
    config = TensorizeConfig("tt", rank=0.5, kinds=KINDS, decompose=decompose, parametrize=True)
    report = tensorize_(new, config, example_input=TOKENS)
    assert sum(row.held for row in report.layers + report.others) == report.model_params[0]
    assert type(new.steps) is tnlayers.TTLSTM
    assert (new.steps.tag, new.steps.dropout) == ("mine", 0.1)
    assert new.steps.bias_ih_l0 is bias
    assert type(new.head) is TiedLinear
    assert new.head.embedding is new.table
    assert new.again.cores[0] is new.table.cores[0]
    assert report["head"].reason == report["again"].reason == "tied to table, with which its weight is counted"
    assert report["head"].rank == report["table"].rank
    y = new(TOKENS).detach()
    save_tensorized(new, tmp_path / "model")
    loaded = load_tensorized(model, tmp_path / "model")
    assert torch.equal(loaded(TOKENS), y)
    assert loaded.head.embedding is loaded.table
    assert load_tensorized(lambda: loaded, tmp_path / "model") is loaded
    for back in (densify_, unfold_):
        plain = copy.deepcopy(new)
        back(plain)
        assert type(plain.steps) is nn.LSTM
        assert plain.head.weight is plain.table.weight is plain.again.weight
        torch.testing.assert_close(plain(TOKENS), y, rtol=0, atol=1e-10)


def test_what_stays():
    new = model()
    report = tensorize_(new, TensorizeConfig("tt", rank=0.5, parametrize=True), dry_run=True)
    assert report["steps"].reason == "not in kinds (kinds=('conv', 'linear', 'recurrent') swaps it)"
    assert "table.weight, which stays (not in kinds" in report["head"].reason
    report = tensorize_(new, TensorizeConfig("tt", budget={"params": 0.5}, kinds=KINDS), dry_run=True)
    assert report["steps"].reason == "refused: no rule or budget chooses its ranks; give a rank by overrides"
    config = TensorizeConfig("tt", rank=0.5, kinds=KINDS, overrides={"head": {"rank": 2}})
    reason = "refused: head and table have one weight, but different overrides"
    assert tensorize_(new, config, dry_run=True)["table"].reason == reason


def test_a_swapped_model_again():
    new = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tensorize_(new, TensorizeConfig("cp", rank=2, include=["0"]))
    report = tensorize_(new, TensorizeConfig("cp", rank=2), example_input=torch.ones(1, 16))
    assert report["0"].flops == (128, 128)


def pair(**kwargs):
    """Return an embedding and the output tied to it, swapped."""
    torch.manual_seed(0)
    new = nn.ModuleDict({"e": nn.Embedding(53, 16, padding_idx=0), "h": nn.Linear(16, 53, bias=False)})
    new.add_module("other", nn.Linear(16, 16, bias=False))
    new["h"].weight = new["e"].weight
    tensorize_(new, TensorizeConfig("tt", rank=0.5, decompose=False, kinds=("linear", "embedding"), **kwargs))
    return new.double()


@pytest.mark.parametrize("back", [densify_, unfold_])
@pytest.mark.parametrize(("name", "left"), [("e", "h"), ("h", "e")])
def test_a_tied_pair_goes_back_together_or_not(back, name, left):
    new = pair()
    before = dict(new.named_modules())
    with pytest.raises(ValueError, match=rf"include covers no layer .*{left}.weight, which stays \(not in include\)"):
        back(new, include=[name])
    assert dict(new.named_modules()) == before
    report = back(new, include=[name, "other"])
    assert report.swapped == ("other",)
    assert (
        report[name].reason
        == f"refused: another module has the same weight: {left}.weight, which stays (not in include)"
    )
    assert type(new["h"]) is TiedLinear
    assert new["h"].embedding is new["e"]
    assert back(new).swapped == ("e", "h")
    assert new["h"].weight is new["e"].weight


def test_ranks_of_single_weights_of_recurrent_layers(tmp_path):
    rank = {"ih": 0.5, "hh_l0": (2, 3), "hh_l1": 4}
    config = TensorizeConfig("tucker", rank=rank, decompose=False, kinds=["recurrent"])
    config.to_yaml(tmp_path / "config.yaml")
    assert TensorizeConfig.from_yaml(tmp_path / "config.yaml") == config
    for given in (
        config,
        TensorizeConfig("tucker", decompose=False, kinds=["recurrent"], overrides={"0": {"rank": rank}}),
    ):
        new = nn.Sequential(nn.LSTM(8, 8, 2))
        tensorize_(new, given)
        wanted = tnlayers.TuckerLSTM(8, 8, 2, rank=rank)
        for name, part in wanted.parts.items():
            assert new[0].parts[name].rank == part.rank
    mixed = nn.Sequential(nn.LSTM(8, 8, 2), nn.Linear(8, 8))
    config = TensorizeConfig("tucker", rank=rank, decompose=False, kinds=["recurrent", "linear"])
    assert tensorize_(mixed, config)["1"].reason.startswith("refused: rank names 'ih'; the bonds of network")
    with pytest.raises(TypeError, match=r"rank\['r1'\] is 0.5; it must be an integer"):
        TensorizeConfig(rank={"r1": 0.5})
    with pytest.raises(ValueError, match=r"rank\['ih'\] is 1.5; it must be a share in \(0, 1\]"):
        TensorizeConfig(rank={"ih": 1.5})
    config = TensorizeConfig(
        "tucker", rank={"ih": "vbmf", "hh": 2}, kinds=["recurrent", "linear"], overrides={"1": {"rank": 2}}
    )
    report = tensorize_(nn.Sequential(nn.LSTM(8, 8, 2), nn.Linear(8, 8)), config)
    assert report["0"].reason == "refused: no rule or budget chooses its ranks; give a rank by overrides"


class Twice(nn.Embedding):
    """An embedding that returns its rows twice as large."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_say_what_they_lose_and_why_they_stay():
    def make():
        return nn.ModuleDict({"twice": Twice(53, 16), "linear": nn.Linear(16, 16)})

    config = TensorizeConfig("tt", rank=0.5, kinds=KINDS, decompose=False, subclasses=True)
    assert tensorize_(make(), config)["twice"].reason == "drawn, without Twice's own forward"
    for parametrize in (False, True):
        config = TensorizeConfig("tt", rank=0.5, kinds=KINDS, decompose=False, parametrize=parametrize)
        reason = tensorize_(make(), config)["twice"].reason
        assert reason.removeprefix("refused: ") == "Twice is a subclass of Embedding (subclasses=True swaps it)"
    tied = make()
    tied["head"] = nn.Linear(16, 53)
    tied["head"].weight = tied["twice"].weight
    config = TensorizeConfig("tt", rank=0.5, kinds=KINDS, decompose=False, subclasses=True)
    report = tensorize_(tied, config)
    assert (report["twice"].reason, type(tied["head"])) == ("drawn, without Twice's own forward", TiedLinear)


class Shares(nn.Module):
    """A module with a weight under two names, and a layer."""

    def __init__(self):
        super().__init__()
        self.p = self.q = nn.Parameter(torch.ones(8, 8))
        self.linear = nn.Linear(8, 8, bias=False)


def test_totals_count_each_weight_once():
    report = tensorize_(Shares(), TensorizeConfig("tr", rank=2, decompose=False, parametrize=True))
    assert report.total("params") == (128, report.total("params")[1])
    before, after = (sum(row.params[k] for row in report.layers + report.others) for k in (0, 1))
    assert (before, after) == report.model_params
    other = pair()
    report = densify_(other, include=["other"])
    before, after = (sum(row.params[k] for row in report.layers + report.others) for k in (0, 1))
    assert (before, after) == report.model_params
    cell = tnlayers.parametrize_(nn.LSTMCell(8, 8), "weight_ih", "tr", rank=2, decompose=False)
    assert "\n(model) " in str(cell)
    assert cell[""].name == ""
