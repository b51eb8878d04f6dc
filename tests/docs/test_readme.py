"""The README's code runs, and what it shows is what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tnlayers

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "Traceback" not in capsys.readouterr().out


def test_it_is_two_screens():
    assert len(README.splitlines()) <= 150
    assert len(BLOCKS) == 2


def test_the_layers_in_the_table_have_the_networks_in_the_table():
    for name in ("cp", "tucker", "tt", "tr", "btt", "ht", "blocktt"):
        layer = getattr(tnlayers, f"{tnlayers.FORMATS[name].__name__}Conv2d")(64, 64, 3, device="meta")
        assert f"| `{layer.network!s}` |" in README
        assert f"`{type(layer).__name__.replace('2d', '{1,2,3}d')}`" in README
    assert f"`{tnlayers.TTConv2d(8, 8, 3, layout='chain').network}`" in README


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_source_files_are_short():
    for path in (ROOT / "tnlayers").rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 300, f"{path.name} has {lines} lines"
        if path.parent.name == "formats" and path.stem in tnlayers.FORMATS:
            assert lines <= 60, f"{path.name} does not fit a screen"


def test_importing_does_nothing_visible():
    """No output, no other library loaded that torch does not load itself, no global setting changed."""
    code = (
        "import sys, torch; before = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().sum();"
        "known = set(sys.modules); import tnlayers; new = set(sys.modules) - known;"
        "assert (torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().sum()) == before;"
        "tops = {name.split('.')[0] for name in new} - {'tnlayers'} - set(sys.stdlib_module_names);"
        "print(*tops, end='')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("", "")
