"""Files that are either complete or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tnlayers.checkpoint.file import replacing

UNFINISHED = f".{'[0-9a-f]' * 16}.tmp"  # names that `replacing` gives to what is not whole yet


class WriteError(OSError):
    """A file that cannot be written; what was there before is untouched. The message is one sentence."""


@contextmanager
def about_writing(path: Path) -> Iterator[None]:
    """Name the file in every error of the operating system.

    Raises:
        WriteError: in place of any other OSError.
    """
    try:
        yield
    except OSError as error:
        told = str(error) if error.strerror is None else f"{path} cannot be written: {error.strerror}"
        raise WriteError(told) from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    with about_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.stat()  # a name too long or a circle of links, which a rename would tell at the end or never
        with replacing(path) as made:
            yield made


def write(path: Path, content: bytes | memoryview) -> None:
    """Put bytes in the place of a file, all of them or none.

    A link stays, and its target is replaced. A file that is there keeps its permissions. Missing directories are made.

    Raises:
        WriteError: the file cannot be written, or is a directory or a device.
    """
    with _replacing(path) as made:
        made.write_bytes(content)


def check(path: Path, argument: str) -> None:
    """Refuse a file that `write` could not write, before there is anything to write. Missing directories are made.

    Args:
        path: the file.
        argument: what named it, to be named in the sentence.

    Raises:
        WriteError: see `write`.
    """

    class UnwrittenError(Exception):
        pass

    try:
        with suppress(UnwrittenError), _replacing(path):
            raise UnwrittenError
    except WriteError as error:
        raise WriteError(f"{argument} is {path}, but {error}") from error


def remove_unfinished(directory: Path) -> None:
    """Remove what a process left that was killed while it wrote."""
    for file in directory.glob(UNFINISHED):
        with about_writing(file):
            os.unlink(file)
