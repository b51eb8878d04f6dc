"""The code of the site's pages runs, page by page."""

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import tnlayers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        DOCS / "index.md",
        *(page for part in ("how-to", "explanation", "reference") for page in (DOCS / part).glob("*.md")),
    ]
)
PAGES = [page for page in PAGES if page.is_file() and page.stem not in ("coming-from-conv2d", "counting")]
"""The two have tests of their own, which say more."""
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
MODULES = {"scikit-learn": "sklearn", "tensorly-torch": "tltorch", "opt-einsum": "opt_einsum", "pillow": "PIL"}
"""Names of modules that differ from those of their packages."""


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def required(block):
    """Return the modules of the packages that a block's line `# pip install ...` names."""
    for line in re.findall(r"^# pip install (.+)$", block, re.MULTILINE):
        for requirement in map(Requirement, line.replace("'", "").split()):
            packages = [requirement] if requirement.name != "tnlayers" else []
            for extra in requirement.extras if requirement.name == "tnlayers" else ():
                packages += map(Requirement, EXTRAS[extra])
            yield from (MODULES.get(package.name, package.name) for package in packages)


@pytest.fixture
def _formats_as_before():
    before = dict(tnlayers.FORMATS)
    yield
    tnlayers.FORMATS.clear()
    tnlayers.FORMATS.update(before)


@pytest.mark.usefixtures("_formats_as_before")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).with_suffix("").as_posix())
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    """In order, in one namespace, without the blocks whose packages are missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    names, missing = {"__name__": "page"}, []
    for block in blocks(page):
        if block.startswith("# not run"):
            continue
        try:
            for module in required(block):
                pytest.importorskip(module)
        except pytest.skip.Exception as reason:
            missing.append(str(reason))
        else:
            exec(compile(block, page.name, "exec"), names)
    assert "Traceback" not in capsys.readouterr().out
    if missing:
        pytest.skip(f"all blocks ran but {len(missing)}: {'; '.join(missing)}")


def main_entries(text):
    lines = re.findall(r"^```\{index\} (.+)$", text, re.MULTILINE)
    return [word.strip() for line in lines for word in re.findall(r"! ([^,!]+)", line)]


def test_a_word_of_a_guide_has_one_main_entry_in_the_index():
    words = {page: main_entries(page.read_text(encoding="utf-8")) for page in DOCS.rglob("*.md")}
    count = Counter(word for found in words.values() for word in found)
    guides = [word for page, found in words.items() if page.parent.name == "how-to" for word in found]
    assert "rank" in guides
    assert [word for word in guides if count[word] > 1] == []
