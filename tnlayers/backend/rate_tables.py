"""Choice of the rate table for a device: the user's own, a shipped one, or one derived from the device's properties.

``python -m tnlayers rates`` measures the user's own. It lies in the user's cache, and is read once in a process, when
the first plan is made. A forward writes nothing.
"""

import os
import warnings
from functools import cache, lru_cache
from pathlib import Path

from tnlayers.backend.derived import derive, properties_of
from tnlayers.backend.devices import file_words, kind_of, name_of
from tnlayers.backend.rate_files import DERIVED, RateTable, parsed, written
from tnlayers.backend.rates import Rates
from tnlayers.backend.whole_files import write_text

VARIABLE = "TNLAYERS_CACHE"
"""Environment variable that names another folder for the user's tables and tuned orders."""

_SHIPPED = Path(__file__).with_name("rates")
_X86 = "cpu avx512 zen5", "cpu avx512", "cpu avx2"
"""Kinds of CPU that stand in for each other where one lacks a dtype."""


def rates_of(device: str, dtype: str) -> Rates:
    """Return the rates of a device type and dtype, see ``table_of``."""
    return table_of(device, dtype).rates


def table_of(device: str, dtype: str) -> RateTable:
    """Return the table of a device type and dtype.

    The first that is there: the user's own table for this machine's device; the shipped one of its kind; on a CPU those
    of a similar instruction set or of float32; else one that is derived from the device's properties.
    """
    return _table_of(kind_of(device), "cpu" if device == "meta" else device, dtype, cache_folder())


def cache_folder() -> Path:
    """Return the absolute path of the folder of the user's tables, which need not be there; ``~`` is the home."""
    return Path(os.path.abspath(os.path.expanduser(os.environ.get(VARIABLE) or _user_folder())))


def own_file(device: str, dtype: str) -> Path:
    """Return the path of the user's table for this machine's device, which need not be there."""
    return cache_folder() / _file_name(kind_of(device), device, dtype)


def write(table: RateTable, path: Path) -> None:
    """Write a table: the file is whole, or stays as it was. Missing folders are made."""
    write_text(path, written(table))


def _file_name(kind: str, device: str, dtype: str) -> str:
    return f"rates-{file_words(kind, name_of(device), dtype)}.csv"


@cache
def _user_folder() -> str:
    import platformdirs  # noqa: PLC0415  (loaded only when used)

    return platformdirs.user_cache_dir("tnlayers")


@lru_cache(maxsize=64)
def _table_of(kind: str, device: str, dtype: str, folder: Path) -> RateTable:
    kinds = (kind, *(other for other in _X86 if other != kind)) if kind in _X86 else (kind,)
    for name in (dtype, "float32") if device == "cpu" else (dtype,):
        if own := _own(kind, device, name, folder):
            return own
        for each in kinds:
            if (each, name) in shipped():
                return shipped()[each, name]
    return _derived(kind, device, dtype)


@lru_cache(maxsize=64)
def _own(kind: str, device: str, dtype: str, folder: Path) -> RateTable | None:
    """Return the user's own table, or None; a file that cannot be used gives a warning."""
    path = folder / _file_name(kind, device, dtype)
    try:
        table = parsed(path.read_text(encoding="utf-8"))
        for what, found, here in (
            ("device", table.device, kind),
            ("machine", table.machine, name_of(device)),
            ("dtype", table.dtype, dtype),
        ):
            if found != here:
                raise ValueError(f"it is for the {what} {found[:60]!r}, and this is {here!r}")
        if table.origin == DERIVED:
            raise ValueError("it was not measured")
        return table
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = "it is no text" if isinstance(error, UnicodeDecodeError) else str(error)
        command = f"python -m tnlayers rates --device {device} --dtype {dtype}"
        warnings.warn(f"{path} is not used: {reason}; to replace it, run {command}", stacklevel=2)
        return None


@cache
def shipped() -> dict[tuple[str, str], RateTable]:
    """Return the tables of the package by kind of device and dtype."""
    tables = [parsed(path.read_text(encoding="utf-8")) for path in sorted(_SHIPPED.glob("*.csv"))]
    return {(table.device, table.dtype): table for table in tables}


@cache
def _derived(kind: str, device: str, dtype: str) -> RateTable:
    properties = properties_of(device)
    return RateTable(kind, dtype, DERIVED, properties.name, derive(properties, dtype))
