"""Rewrite tables and figures of the pages from benchmarks/results: python benchmarks/report/tables.py [--check].

The pages are README.md and docs/**/*.md, without the folders that the site generates.

- A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. The function of that name in FORMATTERS makes it
  from benchmarks/results/NAME.csv. `headline` is made from figures.
- A figure stands in a line of prose, between `<!-- figure: NAME -->` and `<!-- /figure -->`. `figures.py` says what
  names there are.

So nobody types a number. `--check` writes nothing: it tells pages that are stale, and numbers with a unit that are
typed by hand (`prose.py` has the rule). `--show NAME FILE` prints the table of another CSV file.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.common.rows import REPOSITORY, Rows, read_csv
from benchmarks.report.figures import figure
from benchmarks.report.fit_tables import compress, encoder, fits, tuned
from benchmarks.report.headline import headline
from benchmarks.report.markdown import ReportError
from benchmarks.report.prose import numbers_by_hand, prose_of
from benchmarks.report.speed_tables import (
    compiled,
    construct,
    operators,
    penalty,
    planning,
    promises,
    speed,
    speed_kinds,
)
from benchmarks.report.start_tables import convergence, depth, init_scale
from benchmarks.report.tool_tables import counters, tools
from benchmarks.report.training_tables import digits, loop_rate, rank_schedule, recipe, results, scale, throughput

FIGURE = re.compile(r"(<!-- figure: (?P<name>\S+) -->)[^<\n]*(<!-- /figure -->)")
SECTION = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
FORMATTERS: dict[str, Callable[[Rows], str]] = {
    "digits": digits,
    "rank_schedule": rank_schedule,
    "rank_schedule_cifar10": rank_schedule,
    "recipe": recipe,
    "speed": speed,
    "speed_kinds": speed_kinds,
    "operators": operators,
    "promises": promises,
    "compiled": compiled,
    "tools": tools,
    "counters": counters,
    "penalty": penalty,
    "planning": planning,
    "compress": compress,
    "tuned": tuned,
    "fits": fits,
    "encoder": encoder,
    "depth": depth,
    "init_scale": init_scale,
    "construct": construct,
    "convergence": convergence,
    "results": results,
    "throughput": throughput,
    "loop_rate": loop_rate,
    "scale": scale,
}
FILES = {"promises": "speed", "compiled": "speed-compile", "tuned": "compress"}
"""CSV files of the tables whose file has another name."""


GENERATED = ("_build", "tutorials")
"""Folders of docs/ that the site's build writes."""


class Report:
    """The tables and figures of a folder of results. Each file is read once."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._rows: dict[str, Rows] = {}
        self._tables: dict[str, str] = {}

    def rows(self, name: str) -> Rows:
        """Return the rows of the CSV file of this name."""
        path = self.results / f"{name}.csv"
        if name not in self._rows:
            if not path.exists():
                raise ReportError(f"there is no benchmarks/results/{path.name}")
            self._rows[name] = read_csv(path)
        return self._rows[name]

    def table(self, name: str) -> str:
        """Return the text of a table."""
        if name == "headline":
            return headline(self.figure)
        if name not in FORMATTERS:
            raise ReportError(f"there are only {', '.join(FORMATTERS)}, headline")
        if name not in self._tables:
            self._tables[name] = FORMATTERS[name](self.rows(FILES.get(name, name)))
        return self._tables[name]

    def figure(self, name: str) -> str:
        """Return the text of a figure."""
        return figure(name, self.rows, self.table)

    def rewrite(self, text: str, page: str) -> str:
        """Return the text of a page with every table and figure rewritten.

        Raises:
            ReportError: a table or figure has no function, or no CSV file. The sentence names the page.
        """

        def made(kind: str, name: str) -> str:
            try:
                return self.table(name) if kind == "table" else self.figure(name)
            except ReportError as error:
                raise ReportError(f"{page} asks for the {kind} {name!r}, but {error}") from None

        text = SECTION.sub(lambda match: f"{match[1]}{made('table', match['name'])}\n{match[3]}", text)
        return FIGURE.sub(lambda match: f"{match[1]}{made('figure', match['name'])}{match[3]}", text)


def pages(repository: Path) -> Iterator[Path]:
    """Return README.md and the pages of docs/ that are written by hand."""
    yield repository / "README.md"
    for path in sorted((repository / "docs").rglob("*.md")):
        if path.relative_to(repository / "docs").parts[0] not in GENERATED:
            yield path


def prose(repository: Path) -> Iterator[tuple[str, str]]:
    """Return what may hold no number by hand: the pages, the tutorials' text, and the docstrings of the reference."""
    tutorials = repository / "docs" / "tutorial_scripts"
    texts = {path: path.read_text(encoding="utf-8") for path in (*pages(repository), *tutorials.glob("*.rst"))}
    for path in sorted(tutorials.glob("*.py")):
        texts[path] = prose_of(path.read_text(encoding="utf-8"), comments=True)
    for path in sorted((repository / "tnlayers").rglob("*.py")):
        texts[path] = prose_of(path.read_text(encoding="utf-8"))
    for path, text in texts.items():
        yield path.relative_to(repository).as_posix(), text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a page is stale or has numbers by hand"
    )
    show = "print the table of a CSV file; write nothing"
    parser.add_argument("--show", nargs=2, action="append", default=[], metavar=("TABLE", "FILE"), help=show)
    options = parser.parse_args(arguments)
    if options.show:
        for name, path in options.show:
            if name not in FORMATTERS:
                parser.error(f"there is no table {name!r}, only {', '.join(FORMATTERS)}")
            print(f"{FORMATTERS[name](read_csv(Path(path)))}\n")
        return 0
    report = Report(REPOSITORY / "benchmarks" / "results")
    faults = []
    for path in pages(REPOSITORY):
        name = path.relative_to(REPOSITORY).as_posix()
        before = path.read_text(encoding="utf-8")
        try:
            after = report.rewrite(before, name)
        except ReportError as error:
            sys.exit(f"error: {error}")
        if not options.check:
            if after != before:
                from benchmarks.common.atomic import write  # noqa: PLC0415 - imports torch

                write(path, after.encode())
            continue
        if after != before:
            faults.append(f"{name} is stale: run python benchmarks/report/tables.py")
    if options.check:
        for name, text in prose(REPOSITORY):
            faults += [f"{name}:{line}: {why}" for line, why in numbers_by_hand(text)]
    print("\n".join(faults), end="\n" * bool(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
