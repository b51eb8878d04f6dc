"""Tables in Markdown, and what stands in their cells and below."""

import math
import statistics
from collections.abc import Iterable, Sequence

from pandas import DataFrame, Series

from benchmarks.common.rows import Rows, groups


class ReportError(Exception):
    """A table that cannot be made; the message is one sentence."""


def by(rows: Rows, key: str) -> Iterable[tuple[str, Rows]]:
    """Return rows by the value of a column, in order of appearance."""
    return [(value, found) for (value,), found in groups(rows, key)]


def numbers(rows: Rows, *columns: str) -> DataFrame:
    """Return rows as a frame: these columns, where there are such, as numbers; an empty cell becomes NaN."""
    frame = DataFrame(rows)
    found = [column for column in columns if column in frame]
    return frame.assign(**{column: frame[column].replace("", "nan").astype(float) for column in found})


def mean_and_worst(ratios: Series, mean_digits: int = 2, worst_digits: int = 2) -> str:
    """Return the geometric mean and, in brackets, the largest; nothing for no ratios."""
    if not len(ratios):
        return ""
    return f"{statistics.geometric_mean(ratios):.{mean_digits}f} ({max(ratios):.{worst_digits}f})"


def mean_and_error(values: Sequence[float], unit: str, digits: int = 2) -> str:
    """Return the mean and its standard error; one value has no error."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}{unit}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}{unit}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. The tuples of a frame of texts are rows too."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def source(rows: Rows) -> str:
    """Return every machine, version, commit and date that the rows name, once each."""
    columns = {"machine": "{}", "torch": "torch {}", "tnlayers": "tnlayers {}", "commit": "commit {}", "date": "{}"}
    return "; ".join(form.format(", ".join(dict.fromkeys(row[key] for row in rows))) for key, form in columns.items())
