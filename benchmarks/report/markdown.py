"""Markdown tables, the formats of their cells, and the note below them."""

import math
import statistics
from collections.abc import Iterable, Sequence

from pandas import DataFrame, Series

from benchmarks.common.rows import Rows, groups


class ReportError(Exception):
    """A table that cannot be made. The message is one sentence."""


def by(rows: Rows, key: str) -> Iterable[tuple[str, Rows]]:
    """Group rows by the value of a column, in order of appearance."""
    return [(value, found) for (value,), found in groups(rows, key)]


def numbers(rows: Rows, *columns: str) -> DataFrame:
    """Return rows as a frame. Those of `columns` that exist become numbers; empty cells become NaN."""
    frame = DataFrame(rows)
    found = [column for column in columns if column in frame]
    return frame.assign(**{column: frame[column].replace("", "nan").astype(float) for column in found})


def mean_and_worst(ratios: Series, mean_digits: int = 2, worst_digits: int = 2) -> str:
    """Return the geometric mean and, in brackets, the largest ratio. Without ratios, return an empty string."""
    if not len(ratios):
        return ""
    return f"{statistics.geometric_mean(ratios):.{mean_digits}f} ({max(ratios):.{worst_digits}f})"


def mean_and_error(values: Sequence[float], unit: str, digits: int = 2) -> str:
    """Return the mean and its standard error. A single value has no error."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}{unit}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}{unit}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. `DataFrame.itertuples()` of a frame of strings also gives rows."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def source(rows: Rows) -> str:
    """Return the distinct machines, versions, commits and dates of the rows."""
    columns = {"machine": "{}", "torch": "torch {}", "tnlayers": "tnlayers {}", "commit": "commit {}", "date": "{}"}
    return "; ".join(form.format(", ".join(dict.fromkeys(row[key] for row in rows))) for key, form in columns.items())


def split_tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every table in a Markdown text: by table, by row (the header first), by column."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
        if not line.startswith("|"):
            inside = False
        elif not inside:
            inside = True
            tables.append([cells])
        elif set(cells) != {"---"}:
            tables[-1].append(cells)
    return tables


def folded(title: str, text: str) -> str:
    """Return a text that the site shows when a reader opens it."""
    return f":::{{dropdown}} {title}\n\n{text}\n\n:::"
