"""Embeddings are swapped on request; tied ones stay tied, and the report says so."""

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers import TensorizeConfig, densify_, tensorize_, unfold_

TOKENS = torch.tensor([[0, 5, 52], [3, 8, 9]])


def model(bag=False):
    torch.manual_seed(0)
    table = nn.EmbeddingBag(53, 32) if bag else nn.Embedding(53, 32, padding_idx=3)
    return nn.Sequential(table, nn.Linear(32, 48)).double()


@pytest.mark.parametrize("settings", [{"rank": 0.5}, {"energy": 0.5}, {"budget": {"params": 0.5}}])
@pytest.mark.parametrize("calibration", [None, [TOKENS]])
def test_embeddings_on_request(settings, calibration):
    plain = model()
    report = tensorize_(plain, TensorizeConfig("tt", **settings), example_input=TOKENS)
    assert report["0"].reason == "not in kinds (kinds=('conv', 'linear', 'embedding') swaps it)"
    new = model()
    config = TensorizeConfig("tt", kinds=["linear", "embedding"], **settings)
    report = tensorize_(new, config, example_input=TOKENS, calibration=calibration)
    assert type(new[0]) is tnlayers.TTEmbedding
    assert (report["0"].reason, report["0"].flops) == ("fitted", None)
    assert 0 < report["0"].error < 1
    assert sum(row.held for row in report.layers + report.others) == report.model_params[0]
    y = new(TOKENS)
    y.sum().backward()
    assert all(core.grad is not None for core in new[0].cores)
    densify_(new)
    assert type(new[0]) is nn.Embedding
    torch.testing.assert_close(new(TOKENS), y, rtol=0, atol=1e-10)


def test_bags_and_unfolding():
    new = model(bag=True)
    tensorize_(new, TensorizeConfig("tt", kinds=["embedding"], rank=0.5, decompose=False))
    y = new(TOKENS)
    assert unfold_(new).swapped == ("0",)
    assert type(new[0]) is nn.EmbeddingBag
    torch.testing.assert_close(new(TOKENS), y, rtol=0, atol=1e-10)


def test_drawn_rows_have_std_one_and_tied_ones_stay_tied():
    new = model()
    new.append(nn.Linear(32, 53, dtype=torch.float64))
    new[2].weight = new[0].weight
    config = TensorizeConfig("tt", kinds=["linear", "embedding"], rank=0.5, decompose=False)
    report = tensorize_(new, config, dry_run=True)
    assert report["2"].reason == "tied to 0, with which its weight is counted"
    new[2].weight = nn.Parameter(new[2].weight.detach().clone())
    tensorize_(new, config)
    rows = new[0].weight.detach()[[k for k in range(53) if k != 3]]
    assert float(rows.square().mean()) == pytest.approx(1, rel=0.03)
