"""Tables in Markdown, and what stands in their cells and below."""

import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.common.rows import Rows, groups


class ReportError(Exception):
    """A table that cannot be made; the message is one sentence."""


def by(rows: Rows, key: str) -> Iterable[tuple[str, Rows]]:
    """Rows by the value of a column, in order of appearance."""
    return [(value, found) for (value,), found in groups(rows, key)]


def mean_and_error(values: Sequence[float], unit: str, digits: int = 2) -> str:
    """Mean and its standard error; of one value, no error is known."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}{unit}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}{unit}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def source(rows: Rows) -> str:
    """Every machine, version and commit that the rows name, once each."""
    columns = {"machine": "{}", "torch": "torch {}", "tnlayers": "tnlayers {}", "commit": "commit {}", "date": "{}"}
    return "; ".join(form.format(", ".join(dict.fromkeys(row[key] for row in rows))) for key, form in columns.items())
