"""Atomic writing of files: a file is complete, or it does not exist."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tnlayers.backend.whole_files import check_writable, replacing

UNFINISHED = f".{'[0-9a-f]' * 16}.tmp"  # pattern of the temporary names of `replacing`


class WriteError(OSError):
    """A file that cannot be written. Its old content is untouched. The message is one sentence."""


@contextmanager
def about_writing(path: Path) -> Iterator[None]:
    """Turn every OSError into a WriteError that names the file.

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
        _find_early(path)
        with replacing(path) as made:
            yield made


def _find_early(path: Path) -> None:
    """Raise for too long names and link cycles, which a rename reports late or never."""
    with suppress(FileNotFoundError):
        path.stat()


def write(path: Path, content: bytes | memoryview) -> None:
    """Replace a file's content atomically.

    A symbolic link stays; its target is replaced. An existing file keeps its permissions. Missing directories are made.

    Raises:
        WriteError: the file cannot be written, or is a directory or a device.
    """
    with _replacing(path) as made:
        made.write_bytes(content)


def check(path: Path, argument: str) -> None:
    """Check in advance that `write` can write a file. Missing directories are made.

    Args:
        path: the file.
        argument: name of the argument that gave it, for the error message.

    Raises:
        WriteError: see `write`.
    """
    try:
        with about_writing(path):
            _find_early(path)
            check_writable(path)
    except WriteError as error:
        raise WriteError(f"{argument} is {path}, but {error}") from error


def remove_unfinished(directory: Path) -> None:
    """Remove the temporary files of processes that were killed while writing."""
    for file in directory.glob(UNFINISHED):
        with about_writing(file):
            os.unlink(file)
