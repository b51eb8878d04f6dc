"""Rewrite the tables in README.md from benchmarks/results: python benchmarks/report/tables.py [--check].

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. The function of that name in FORMATTERS makes it
from benchmarks/results/NAME.csv, so nobody types a number. `--show NAME FILE` prints the table of another CSV file.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.rows import REPOSITORY, Rows, read_csv
from benchmarks.report.fit_tables import compress, fits
from benchmarks.report.markdown import ReportError
from benchmarks.report.speed_tables import compiled, construct, penalty, planning, promises, speed
from benchmarks.report.start_tables import convergence, depth, init_scale
from benchmarks.report.tool_tables import tools
from benchmarks.report.training_tables import digits, presets, results, scale, throughput

SECTION = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
FORMATTERS: dict[str, Callable[[Rows], str]] = {
    "digits": digits,
    "speed": speed,
    "promises": promises,
    "compiled": compiled,
    "tools": tools,
    "penalty": penalty,
    "planning": planning,
    "compress": compress,
    "fits": fits,
    "depth": depth,
    "init_scale": init_scale,
    "construct": construct,
    "convergence": convergence,
    "results": results,
    "presets": presets,
    "throughput": throughput,
    "scale": scale,
}
FILES = {"promises": "speed", "compiled": "speed-compile", "presets": "results"}
"""CSV files of the tables whose file has another name."""


def rewrite(text: str, results: Path) -> str:
    """Return the text with every table rewritten.

    Raises:
        ReportError: a table has no function, or no CSV file.
    """

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in FORMATTERS:
            raise ReportError(f"README.md asks for the table {name!r}, but there are only {', '.join(FORMATTERS)}")
        path = results / f"{FILES.get(name, name)}.csv"
        if not path.exists():
            raise ReportError(f"README.md asks for the table {name!r}, but there is no benchmarks/results/{path.name}")
        return f"{match[1]}{FORMATTERS[name](read_csv(path))}\n{match[3]}"

    return SECTION.sub(section, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README.md is stale")
    show = "print the table of a CSV file; write nothing"
    parser.add_argument("--show", nargs=2, action="append", default=[], metavar=("TABLE", "FILE"), help=show)
    options = parser.parse_args(arguments)
    if options.show:
        for name, path in options.show:
            if name not in FORMATTERS:
                parser.error(f"there is no table {name!r}, only {', '.join(FORMATTERS)}")
            print(f"{FORMATTERS[name](read_csv(Path(path)))}\n")
        return 0
    check = options.check
    readme = REPOSITORY / "README.md"
    before = readme.read_text(encoding="utf-8")
    try:
        after = rewrite(before, REPOSITORY / "benchmarks" / "results")
    except ReportError as error:
        sys.exit(f"error: {error}")
    if check and after != before:
        print("README.md is stale: run python benchmarks/report/tables.py")
        return 1
    if after != before:
        from benchmarks.common.atomic import write  # noqa: PLC0415 - imports torch

        write(readme, after.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
