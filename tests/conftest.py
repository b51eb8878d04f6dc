"""Settings of the whole test run."""

import gc
import multiprocessing
import os
import tempfile

import pytest
import torch

from tnlayers.backend import devices, rate_tables
from tnlayers.ops import contraction
from tnlayers.planning import choose, core_contractions, options, plan, search_space

# The tensors here are tiny: threads only wait for each other, and the runner keeps the cores busy with several tests.
torch.set_num_threads(1)
# Tests of several processes fork them from one that has imported this: it takes longer than what they do.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["accelerate", "sklearn.datasets", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"]
)


def pytest_configure(config):
    """Many tensors so tiny have more parameters than the dense kernel; test_core_memory.py asks for the warning."""
    config.addinivalue_line("filterwarnings", "ignore::tnlayers.layers.core_memory.LargerThanDense")
    # The developer's own rate tables must not decide what a test sees, in processes of its own too.
    folder = tempfile.TemporaryDirectory(prefix="tnlayers-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ[rate_tables.VARIABLE] = folder.name


@pytest.fixture(scope="module", autouse=True)
def _collector_ignores_what_is_there():
    """What was imported stays: the collector, and a swap that looks for optimizers, need not see it each time."""
    gc.collect()
    gc.freeze()


def _forget_plans():
    for module in (choose, core_contractions, options, plan, search_space, contraction):
        for value in vars(module).values():
            getattr(value, "cache_clear", lambda: None)()


@pytest.fixture
def no_plans():
    """Forget what other tests have planned."""
    _forget_plans()


@pytest.fixture
def avx512(no_plans, monkeypatch):
    """Plan as on a CPU with AVX512, whatever this one has, and forget these plans."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(devices, "amd_family", lambda: 0)
    yield
    _forget_plans()
