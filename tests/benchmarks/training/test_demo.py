"""The demo: what it measures is what it says, and the picture is written."""

import pytest
import torch
from torch import nn

from benchmarks.training import demo
from benchmarks.training.config import Config
from benchmarks.training.records import Result

DENSE, RING = Config(device="cpu"), Config(conv="tr", rank=0.2, device="cpu")
IMAGES = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_draw(monkeypatch):
    monkeypatch.setattr(demo, "DRAWS", 1)


def test_the_signal_is_the_mean_square_before_and_after_each_convolution():
    first, second = nn.Conv2d(1, 3, 3).double(), nn.Conv2d(3, 2, 1).double()
    x, y = demo.signal(nn.Sequential(first, nn.ReLU(), second), IMAGES)
    hidden = first(IMAGES)
    assert x.tolist() == pytest.approx([t.square().mean().item() for t in (IMAGES, hidden.relu())])
    assert y.tolist() == pytest.approx([t.square().mean().item() for t in (hidden, second(hidden.relu()))])
    assert not first._forward_hooks


def test_profiles_differ_only_in_how_the_cores_are_drawn():
    solver, small = demo.depth_profile(RING, IMAGES), demo.depth_profile(RING, IMAGES, demo.small)
    assert solver.shape == small.shape == (1, 19)
    assert solver[0, 0] == small[0, 0]  # the stem is dense in both
    assert solver.min() > 1e-3
    assert small[0, 1:].max() < 1e-5
    assert small[0, 2::2].max() < 1e-9  # the second convolution of a block sees nothing but the first
    assert torch.equal(solver, demo.depth_profile(RING, IMAGES))


def test_the_picture_and_the_table_show_both_arms(tmp_path):
    row = {"train_loss": 1.0, "loss": 2.0, "accuracy": 0.5, "seconds": 3.0}
    history = [{"epoch": epoch, **row} for epoch in (1, 2)]
    results = [Result(config, config.network(1, 10), history) for config in (DENSE, RING)]
    demo.picture(results, IMAGES, tmp_path / "new" / "demo.png")
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
    table = demo.table(results, IMAGES)
    assert [column.header for column in table.columns] == ["ResNet-20 on digits", "dense", "tr-0.2"]
    assert list(table.columns[2].cells)[:2] == ["50.00%", "54,525"]
