"""The worked example beside the planner, as its text says."""

import doctest
from pathlib import Path

from tnlayers.planning import choose

README = Path(choose.__file__).with_name("README.md")


def test_the_output_is_real(avx512):
    found = doctest.testfile(str(README), module_relative=False)
    assert found.attempted > 20
    assert not found.failed
