"""Orders that ``tnlayers.autotune`` timed and kept: one file per device and torch version in the user's cache.

A process reads the file once, when it makes its first plan with strategy 'auto'. A forward writes nothing. Two
processes that write at once leave a whole file. What the first of them adds may be lost, if the second has read the
file before.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tnlayers._version import __version__
from tnlayers.backend.devices import file_words, kind_of, name_of
from tnlayers.backend.rate_tables import cache_folder
from tnlayers.backend.whole_files import write_text
from tnlayers.planning.setting import Setting
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork

FORMAT = 1
"""Version of the file format."""

MOST = 4096
"""Maximum number of choices in a file. Beyond it, the oldest are dropped."""

_ORDER, _DATE = re.compile(r"[0-9]+((\*| > )[0-9]+)*"), re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True)
class Choice:
    """The order that was fastest in a setting.

    Attributes:
        order: valid as a strategy.
        before, after: median seconds of a pass with the planned order, and with this one.
        candidates: maximum number of orders that were timed.
        date: when, as YYYY-MM-DD.

    Raises:
        ValueError: an argument is not as above. The message is the reason, without a full stop.
    """

    order: str
    before: float
    after: float
    candidates: int
    date: str

    def __post_init__(self) -> None:
        for name, form in (("order", _ORDER), ("date", _DATE)):
            value = getattr(self, name)
            if not isinstance(value, str) or not form.fullmatch(value):
                raise ValueError(f"it has the {name} {str(value)[:40]!r}")
        for name, kinds in (("before", int | float), ("after", int | float), ("candidates", int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < math.inf:
                raise ValueError(f"it has the number {str(value)[:40]!r} for {name!r}")


def key(network: TensorNetwork, geometry: Geometry, setting: Setting, memory: str) -> str:
    """Return the text that names a setting in a file: what a plan depends on, threads and the version of tnlayers."""
    words = (
        f"tnlayers {__version__}",
        f"threads {torch.get_num_threads()}",
        f"mode {setting.mode}",
        str(setting.dtype).removeprefix("torch."),
        f"memory {memory}",
        f"channels {setting.layout}",
        " ".join(map(str, ("batch", setting.batch, "size", *setting.size))),
        repr(replace(geometry, input_size=None)),  # it concerns the cores' variance alone
        repr(network),
    )
    return "; ".join(words)


def file_of(device: str) -> Path:
    """Return the path of the file for this machine's device of a type, which need not be there."""
    return cache_folder() / f"tuned-{file_words(*map(str, _header(device).values()))}.json"


def kept(network: TensorNetwork, geometry: Geometry, setting: Setting, memory: str) -> Choice | None:
    """Return the choice for exactly this setting, or None."""
    choices = all_kept(setting.device)
    return choices.get(key(network, geometry, setting, memory)) if choices else None


def refuse(network: TensorNetwork, geometry: Geometry, setting: Setting, memory: str, reason: str) -> None:
    """Drop the choice for a setting in this process, with a warning."""
    all_kept(setting.device).pop(key(network, geometry, setting, memory), None)
    _warn(file_of(setting.device), reason)


def all_kept(device: str) -> dict[str, Choice]:
    """Return the choices for a device type by ``key``, as this process has read and added them."""
    return _read(file_of(device), "cpu" if device == "meta" else device)


def keep(device: str, choices: Mapping[str, Choice]) -> None:
    """Add choices to the file, and to what this process knows. A file that cannot be used is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    path, known = file_of(device), all_kept(device)
    try:
        others = _parsed(path.read_text(encoding="utf-8"), device)  # with what other processes have added
    except (OSError, ValueError):
        others = {}
    merged = {name: choice for name, choice in others.items() if name not in choices} | dict(choices)
    latest = {name: asdict(choice) for name, choice in [*merged.items()][-MOST:]}
    text = json.dumps({"format": FORMAT, **_header(device), "choices": latest}, indent=1)
    write_text(path, text + "\n")
    known.update(choices)


def _header(device: str) -> dict[str, str]:
    """Return what a file is for: the device's kind and name, and torch's version without the last number."""
    version = ".".join(str(torch.__version__).split(".")[:2])
    return {"device": kind_of(device), "machine": name_of(device), "torch": f"torch {version}"}


@lru_cache(maxsize=64)
def _read(path: Path, device: str) -> dict[str, Choice]:
    """Return the choices of a file. One that cannot be used gives a warning."""
    try:
        return _parsed(path.read_text(encoding="utf-8"), device)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _warn(path, "it is no text" if isinstance(error, UnicodeDecodeError) else str(error))
        return {}


def _warn(path: Path, reason: str) -> None:
    warnings.warn(f"{path} is not used: {reason}; tnlayers.autotune(..., cache=True) replaces it", stacklevel=2)


def _parsed(text: str, device: str) -> dict[str, Choice]:
    """Return the choices of a file's text.

    Raises:
        ValueError: it is not a whole and valid file for the device. The message is the reason, without a full stop.
    """
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is no whole JSON file") from None
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError("it holds no tuned orders")
    if data["format"] != FORMAT:
        raise ValueError(f"its format is {str(data['format'])[:20]!r}, and this version reads {FORMAT}")
    for what, here in _header(device).items():
        if data.get(what) != here:
            raise ValueError(f"it is for the {what} {str(data.get(what))[:60]!r}, and this is {here!r}")
    choices = data.get("choices")
    if not isinstance(choices, dict):
        raise ValueError("it lacks 'choices'")
    return {name: _choice(values) for name, values in choices.items()}


def _choice(values: Any) -> Choice:
    try:
        return Choice(**values)
    except TypeError:
        raise ValueError(f"it has the choice {str(values)[:60]!r}") from None
