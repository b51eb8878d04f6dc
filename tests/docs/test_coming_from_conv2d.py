"""The page for those who come from nn.Conv2d: its code runs, and every row of its table is so."""

import builtins
import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "coming-from-conv2d.md").read_text(encoding="utf-8")
FIRST, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROWS = [
    (before.replace(r"\|", "|"), errors, after)
    for before, errors, after in re.findall(r"^\| `(.+?)` \| ([A-Za-z, ]+) \| `(.+)` \|$", PAGE, re.MULTILINE)
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def names():
    torch.manual_seed(0)
    found = {"__name__": "page"}
    exec(FIRST, found)
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block):
    exec(compile(block, "coming-from-conv2d.md", "exec"), names())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_row(row):
    before, errors, after = row
    with pytest.raises(tuple(getattr(builtins, error) for error in errors.split(", "))) as caught:
        exec(before, names())
    assert not str(caught.value).startswith("attribute 'weight'")
    exec(after, names())


def test_every_row_is_read():
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| for nn.Conv2d")]
    assert len(lines) == len(ROWS) >= 20
