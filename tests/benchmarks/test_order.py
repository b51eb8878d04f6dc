"""The folders of benchmarks import in one direction, scripts import no other script, and files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
MAY = {
    "common": {"common"},
    "training": {"common", "training"},
    "measure": {"common", "training"},
    "report": {"common", "report"},
    "train": {"training"},
}
"""What each folder, and train.py, may import. measure may import its own helpers, which are in folders of their own."""


def imported(path):
    """Names of the modules of benchmarks that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("benchmarks"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("benchmarks"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "benchmarks")))
def test_a_file_imports_only_what_is_below_it(path):
    folder = path.relative_to(ROOT / "benchmarks").parts[0].removesuffix(".py")
    for name in imported(path):
        _, of, *rest = name.split(".")
        helper = of == "measure" and (ROOT / "benchmarks" / "measure" / rest[0]).is_dir()
        assert of in MAY[folder] or (folder == "measure" and helper), f"{path.name} imports {name}"
    assert len(path.read_text().splitlines()) <= 400


def test_the_report_needs_no_torch():
    code = "import sys, benchmarks.report.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
