"""One reference page per format, written from the registry: a new format needs no page by hand."""

from pathlib import Path

import tnlayers
from tnlayers.layers.recurrent import RECURRENT
from tnlayers.layers.registry import KIND_NAMES

KINDS = (*KIND_NAMES, *(kind.__name__ for kind in RECURRENT))


def write(folder: Path) -> None:
    """Write an index and a page for every format."""
    folder.mkdir(exist_ok=True)
    names = {name: kind.__name__ for name, kind in tnlayers.FORMATS.items()}
    known = {prefix: [prefix + kind for kind in KINDS if hasattr(tnlayers, prefix + kind)] for prefix in names.values()}
    for name, prefix in names.items():
        if known[prefix]:
            _update(folder / f"{name}.md", _page(prefix, known[prefix]))


def _page(prefix: str, layers: list[str]) -> str:
    words = ", ".join(f"`{layer}`" for layer in layers)
    parts = [
        f"# {prefix} layers",
        f"The layers of the format {prefix}: {words}. What every layer has is on the page of "
        "[the base classes](../layers.md).",
        f"## The format\n\n```{{eval-rst}}\n.. autoclass:: tnlayers.formats.{prefix}\n```",
    ]
    parts += ["## The layers", *(f"```{{eval-rst}}\n.. autoclass:: tnlayers.{layer}\n```" for layer in layers)]
    return "\n\n".join(parts) + "\n"


def _update(path: Path, text: str) -> None:
    """Write a file unless it holds the text: Sphinx reads again what is newer."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
