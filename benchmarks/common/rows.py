"""Location, reading and grouping of the results' CSV files. Does not import torch."""

import csv
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"

Row = dict[str, str]
Rows = list[Row]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def groups(rows: Rows, *keys: str) -> Iterable[tuple[tuple[str, ...], Rows]]:
    """Group rows by the values of columns, in order of appearance."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups.items()
