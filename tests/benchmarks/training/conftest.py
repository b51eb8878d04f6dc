"""What the tests of runs share."""

import pytest
import torch

from benchmarks.training import run as running
from benchmarks.training.config import Config
from benchmarks.training.data.in_memory import ImageData


@pytest.fixture
def tiny_data(monkeypatch):
    """Forty images that a network can tell apart, in place of any data set."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    images = torch.randint(100, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(40), 0, labels % 8] += 150
    data = ImageData(images, labels, images[:20], labels[:20], shift=1, flip=True)
    monkeypatch.setattr(running, "load", lambda *_: data)


@pytest.fixture
def one_thread():
    """Nets this small gain nothing from threads, and lose much where tests run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path):
    return Config(epochs=3, batch_size=16, out=tmp_path, device="cpu")
