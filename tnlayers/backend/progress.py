"""A line on stderr that shows how far long work is."""

import shutil
import sys
import time
from types import TracebackType
from typing import Self

PATIENCE = 2.0
"""Seconds before a bar appears where nobody asked for one: shorter work needs none."""
WIDTH = 24


class Progress:
    """A bar on stderr, rewritten in place and removed at the end.

    Args:
        what: what is done, such as "fitting".
        total: number of steps.
        shown: whether there is a bar. None: only on a terminal, and after ``PATIENCE`` seconds.

    Example:
        >>> with Progress("fitting", 2, shown=False) as progress:
        ...     progress.step("conv1")
    """

    def __init__(self, what: str, total: int, shown: bool | None) -> None:
        self.what, self.total, self.done, self.last = what, total, 0, ""
        self.begun, self.shown, self.length = time.monotonic(), shown, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.length:
            self._write("")
            sys.stderr.write("\r")
            sys.stderr.flush()

    def step(self, name: str) -> None:
        """Count a step as done."""
        self.done, self.last = self.done + 1, name
        self.show()

    def show(self) -> None:
        """Write the bar anew if it is shown."""
        seconds = time.monotonic() - self.begun
        terminal = sys.stderr is not None and sys.stderr.isatty()
        if sys.stderr is not None and (self.shown or (self.shown is None and terminal and seconds > PATIENCE)):
            full = WIDTH * self.done // max(self.total, 1)
            bar = "#" * full + "." * (WIDTH - full)
            self._write(f"{self.what} {self.done}/{self.total} [{bar}] {seconds:.0f} s {self.last}")

    def _write(self, line: str) -> None:
        line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps is not rewritten in place
        sys.stderr.write("\r" + line.ljust(self.length))
        sys.stderr.flush()
        self.length = len(line)
