"""Links of the reference: between docstrings, and from an entry to its source."""

import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import tnlayers

ROOT = Path(__file__).parents[1]
NAMES = re.compile(rf"``(?:tnlayers\.)?({'|'.join(tnlayers.__all__)})(?:\(\))?``")
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]


def link_names(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replace public names in double backticks by links, except in their own entry."""
    own = name.removeprefix("tnlayers.")

    def link(found: re.Match[str]) -> str:
        return found[0] if found[1] == own else f":py:obj:`~tnlayers.{found[1]}`"

    lines[:] = [NAMES.sub(link, line) for line in lines]


def source(domain: str, info: dict[str, str]) -> str | None:
    """Return the address of an object's source in the repository, at the line where it begins."""
    found: Any = importlib.import_module(info["module"] or "tnlayers")
    for part in info["fullname"].split("."):
        found = getattr(found, part, None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    try:
        path, (_, line) = inspect.getsourcefile(found), inspect.getsourcelines(found)
    except (OSError, TypeError):  # data, and what torch's base class has
        return None
    if path is None or not Path(path).is_relative_to(ROOT / "tnlayers"):
        return None
    return f"{URLS['Repository']}/blob/main/{Path(path).relative_to(ROOT)}#L{line}"
