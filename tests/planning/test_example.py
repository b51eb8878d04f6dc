"""The worked example beside the planner, as its text says."""

import doctest
from pathlib import Path

import pytest
import torch

from tnlayers.planning import choose, options, plan, search_space

README = Path(choose.__file__).with_name("README.md")


@pytest.fixture
def avx512(monkeypatch):
    """Plan as on the CPU that the page is about; forget what was planned for this one, before and after."""

    def forget():
        for module in (choose, options, plan, search_space):
            for value in vars(module).values():
                getattr(value, "cache_clear", lambda: None)()

    forget()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    yield
    forget()


def test_the_output_is_real(avx512):
    found = doctest.testfile(str(README), module_relative=False)
    assert found.attempted > 20
    assert not found.failed
