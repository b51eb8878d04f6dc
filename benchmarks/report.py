"""Rewrite the tables in README.md from benchmarks/results: python benchmarks/report.py [--check].

What stands between `<!-- table: NAME -->` and `<!-- /table -->` is made from benchmarks/results/NAME.csv by the
function registered here under that name, so no number in the README is typed by hand.
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from atomic import replacing
from provenance import REPOSITORY, read_csv

Rows = list[dict[str, str]]
SECTION = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


class ReportError(Exception):
    """A table that cannot be made; the message is one sentence."""


def digits(rows: Rows) -> str:
    """Test accuracy, parameters and keep ratio of each arm, over seeds."""
    if splits := {row["split"] for row in rows} - {"test"}:
        raise ReportError(f"digits.csv holds accuracies on {', '.join(splits)} images, but the table is of test images")
    table = []
    for arm, runs in _group(rows, "arm"):
        table.append(
            [
                arm,
                _mean_and_error([100 * float(run["accuracy"]) for run in runs], " %"),
                f"{int(runs[0]['parameters']):,}",
                f"{int(runs[0]['parameters']) / int(runs[0]['dense_parameters']):.1%}",
                f"{float(runs[0]['keep_ratio']):.3f}",
                str(len(runs)),
            ]
        )
    header = ["convolutions", "test accuracy", "parameters", "of dense", "keep ratio", "seeds"]
    return f"{_markdown(header, table)}\n\n{_source(rows)}"


def speed(rows: Rows) -> str:
    """Ratios of times and of peak memory by family: geometric mean over rows, and the worst row."""

    def ratios(runs: Rows, mode: str, batch: str, *others: str, ours: str = "auto") -> str:
        found = []
        for run in runs:
            rivals = [float(run[other]) for other in others if run[other]]
            if run["mode"] == mode and run["batch"] == batch and rivals:
                found.append(float(run[ours]) / min(rivals))
        return f"{statistics.geometric_mean(found):.2f} ({max(found):.2f})" if found else ""

    table = []
    for family, runs in _group(rows, "family"):
        table.append(
            [
                family,
                ratios(runs, "train", "32", "dense"),
                ratios(runs, "train", "1", "dense"),
                ratios(runs, "infer", "32", "dense"),
                ratios(runs, "infer", "1", "dense"),
                ratios(runs, "train", "32", "tednet"),
                ratios(runs, "train", "32", "tltorch"),
                ratios(runs, "train", "32", "oracle", "reconstruct", "factorized"),
                ratios(runs, "train", "32", "dense_peak", ours="auto_peak"),
            ]
        )
    noise = [float(run["dense_again"]) / float(run["dense"]) for run in rows]
    spread = f"{min(noise):.2f} to {max(noise):.2f}, half of them {_quartiles(noise)}"
    header = [
        "family", "/ dense, training, batch 32", "batch 1", "/ dense, inference, batch 32", "batch 1",
        "/ tednet", "/ tensorly-torch", "/ best own plan", "peak memory / dense",
    ]  # fmt: skip
    return f"{_markdown(header, table)}\n\nThe same dense layer against itself: {spread}. {_source(rows)}"


def _quartiles(values: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.2f} to {high:.2f}"


FORMATTERS: dict[str, Callable[[Rows], str]] = {"digits": digits, "speed": speed}


def rewrite(text: str, results: Path) -> str:
    """The text with every table made anew.

    Raises:
        ReportError: a table has no function, or no CSV file.
    """

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in FORMATTERS:
            raise ReportError(f"README.md asks for the table {name!r}, but there are only {', '.join(FORMATTERS)}")
        path = results / f"{name}.csv"
        if not path.exists():
            raise ReportError(f"README.md asks for the table {name!r}, but there is no benchmarks/results/{name}.csv")
        return f"{match[1]}{FORMATTERS[name](read_csv(path))}\n{match[3]}"

    return SECTION.sub(section, text)


def _group(rows: Rows, key: str) -> Iterable[tuple[str, Rows]]:
    """Rows by the value of a column, in order of appearance."""
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups.items()


def _mean_and_error(values: Sequence[float], unit: str) -> str:
    """Mean and its standard error; of one value, no error is known."""
    if len(values) == 1:
        return f"{values[0]:.2f}{unit}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.2f} ± {error:.2f}{unit}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _source(rows: Rows) -> str:
    """Every machine, version and commit that the rows name, once each."""
    columns = {"machine": "{}", "torch": "torch {}", "tnlayers": "tnlayers {}", "commit": "commit {}", "date": "{}"}
    return "; ".join(form.format(", ".join(dict.fromkeys(row[key] for row in rows))) for key, form in columns.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if README.md is stale")
    check = parser.parse_args(arguments).check
    readme = REPOSITORY / "README.md"
    before = readme.read_text(encoding="utf-8")
    try:
        after = rewrite(before, REPOSITORY / "benchmarks" / "results")
    except ReportError as error:
        sys.exit(f"error: {error}")
    if check and after != before:
        print("README.md is stale: run python benchmarks/report.py")
        return 1
    if after != before:
        with replacing(readme) as file:
            file.write(after.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
