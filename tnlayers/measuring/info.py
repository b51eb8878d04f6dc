"""What a report of a bug needs to know of a machine: versions, devices, threads, rate tables, tuned settings."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from tnlayers import text_tables
from tnlayers._version import __version__
from tnlayers.backend.devices import name_of
from tnlayers.backend.rate_files import DERIVED
from tnlayers.backend.rate_tables import VARIABLE, cache_folder, own_file, shipped, table_of
from tnlayers.measuring.measure import DTYPES
from tnlayers.planning.tuned import all_kept, file_of


def devices() -> list[str]:
    """Return the device types that torch can compute on here."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu", *([accelerator.type] if accelerator else [])]


def info() -> str:
    """Return the text of ``python -m tnlayers info``. It names no host, and a user's home is ``~``."""
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    lines = [
        ("tnlayers", __version__),
        ("torch", f"{torch.__version__}{f', CUDA {torch.version.cuda}' if torch.version.cuda else ''}"),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        *((device, _described(device, capability, threads)) for device in devices()),
        ("cache", f"{_short(cache_folder())} ({VARIABLE} names another)"),
        *_tables(),
        *_tuned(),
    ]
    return text_tables.text(lines)


def _short(folder: Path) -> str:
    home = Path(os.path.expanduser("~"))
    return str(Path("~", folder.relative_to(home)) if folder.is_relative_to(home) else folder)


def _described(device: str, capability: str, threads: int) -> str:
    cpu = f"{name_of(device)}, {capability}, {threads} {'thread' if threads == 1 else 'threads'}"
    return cpu if device == "cpu" else name_of(device)


def _tables() -> Iterator[tuple[str, str]]:
    for device in devices():
        for dtype in DTYPES:
            table = table_of(device, dtype)
            if table.origin == DERIVED:
                source = "no table"
            elif table in shipped().values():
                source = "shipped"
            else:
                source = f"own, {own_file(device, table.dtype).name}"
            yield f"rates {device} {dtype}", f"{table} ({source})"


def _tuned() -> Iterator[tuple[str, str]]:
    for device in devices():
        number = len(all_kept(device))
        yield f"tuned {device}", f"{number} {'setting' if number == 1 else 'settings'} ({file_of(device).name})"
