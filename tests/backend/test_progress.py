"""The line that shows how far long work is."""

import sys

from tnlayers.backend.progress import Progress


def test_the_line_fits_the_terminal(capsys, monkeypatch):
    """A line that wraps is not rewritten in place."""
    monkeypatch.setenv("COLUMNS", "60")
    with Progress("fitting", 2, shown=True) as bar:
        bar.step("encoder.block." * 10)
        bar.step("a")
    lines = capsys.readouterr().err.split("\r")
    assert max(map(len, lines)) == 59
    assert lines[1].startswith("fitting 1/2 [############............] 0 s encoder.")
    assert lines[-2:] == [" " * len(lines[2].rstrip()), ""]


def test_nothing_is_shown_where_there_is_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("fitting", 1, shown=True) as bar:
        bar.step("a")
    assert bar.done == 1
