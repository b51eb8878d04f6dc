"""Run README's code, the doctests and a fit of every format where the wheel is installed without extras.

``make test-base`` runs it in a fresh venv. It uses the standard library only: pytest brings packages along that
tnlayers must name itself. An example that needs an extra says ``# pip install 'tnlayers[EXTRA]'``; only such a one is
skipped.
"""

import doctest
import inspect
import os
import pkgutil
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

import tnlayers

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXTRA = re.compile(r"# pip install 'tnlayers\[([\w-]+)\]'")


def needs_extra(code: str) -> bool:
    """Return whether an example says that it needs an extra."""
    declared = metadata("tnlayers").get_all("Provides-Extra", [])
    named = EXTRA.findall(code)
    assert {*named} <= {*declared}, f"{named} are not all among the extras {declared}"
    return bool(named)


def modules() -> list[ModuleType]:
    """Import the package and every module in it."""
    names = [found.name for found in pkgutil.walk_packages(tnlayers.__path__, "tnlayers.")]
    return [tnlayers, *map(import_module, names)]


def examples(readme: str) -> Iterator[tuple[str, doctest.DocTest | str]]:
    """List README's blocks, but for those that are a module's whole file, and the doctests, each with its code."""
    files = [inspect.getsource(module) for module in modules() if module.__spec__.origin]
    yield from ((block, block) for block in BLOCK.findall(readme) if block not in files)
    for module in modules():
        for test in doctest.DocTestFinder().find(module):
            if test.examples:
                yield "".join(each.source for each in test.examples), test


def fit_every_format() -> None:
    """Fit layers of every format and a whole model, each at its defaults."""
    conv = nn.Conv2d(16, 16, 3)
    for name, kind in tnlayers.FORMATS.items():
        if name != "einsum":  # its network is the user's
            layer = getattr(tnlayers, f"{kind.__name__}Conv2d").from_conv(conv, rank=0.5)
            assert layer.set_weight_(conv.weight) < 1
    assert tnlayers.tensorize_(nn.Sequential(nn.Conv2d(16, 16, 3))).swapped == ("0",)


def main(readme: str) -> None:
    """Run everything; print how much that was."""
    assert Path(tnlayers.__file__).is_relative_to(sys.prefix), f"{tnlayers.__file__} is not the installed package"
    warnings.simplefilter("error")
    torch.set_num_threads(1)  # as in conftest.py
    os.environ["TNLAYERS_CACHE"] = os.getcwd()  # no rate tables of the user
    torch.manual_seed(0)
    fit_every_format()
    ran, skipped, runner = 0, 0, doctest.DocTestRunner()
    for code, example in examples(readme):
        if needs_extra(code):
            skipped += 1
            continue
        ran += 1
        if isinstance(example, doctest.DocTest):
            runner.run(example)
        else:
            exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    print(f"{ran} examples ran; {skipped} name the extra that they need")
    sys.exit(runner.summarize().failed > 0)


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # README's code writes files
        main(text)
