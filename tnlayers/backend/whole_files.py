"""Files that are whole or not there: a temporary file replaces the old one in one step."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file to write. It replaces ``path`` at the end, or is removed if anything raises."""
    target = Path(os.fsdecode(os.path.realpath(path)))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no directory {target.parent}; make it first")
    if target.exists() and not target.is_file():
        raise OSError(f"{target} cannot be written: it is there, and no regular file")
    made = target.with_name(f".{secrets.token_hex(8)}.tmp")  # a rename is atomic only within one file system
    with open(made, "xb") as file:
        mode = stat.S_IMODE(os.stat(target if target.exists() else made).st_mode)
    try:
        yield made
        with open(made, "rb+") as file:
            os.fsync(file.fileno())  # the content must be on disk before the new name is
        os.chmod(made, mode)  # the writer may have put its own, private file there
        os.replace(made, target)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8: it is whole, or stays as it was. Missing folders are made.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as made:
        made.write_text(text, encoding="utf-8", newline="\n")


def check_writable(path: Path) -> None:
    """Check that a file can be written, and make the folders that it lacks.

    Raises:
        OSError: it cannot.
    """

    class UnwrittenError(Exception):
        pass

    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(UnwrittenError), replacing(path):
        raise UnwrittenError
