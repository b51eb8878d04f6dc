"""Try PyTorch's tools on our layers. Every cell of the README's table is a run.

    python benchmarks/measure/tools.py

Every tool runs on one layer of every format and kind. A row of the CSV is a tool and a layer. Its result is empty if
the tool works, else the error.
"""

import argparse

from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS, read_csv
from benchmarks.measure.tool_checks import one_process, several_processes  # noqa: F401 - fill TOOLS
from benchmarks.measure.tool_checks.registry import KINDS, TOOLS, layers

OUT = RESULTS / "tools.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    rows: list[dict[str, str]] = []
    if arguments.out.exists():  # rows of other tools are kept
        rows = [row for row in read_csv(arguments.out) if row["tool"] not in arguments.tools]
    for name in arguments.tools:
        found = TOOLS[name](layers())
        print(name, *(f"  {key}: {error}" for key, error in found.items() if error), sep="\n", flush=True)
        kinds = {key: next(kind for kind in KINDS if key.endswith(kind)) for key in found}
        rows += [{"tool": name, "layer": key, "kind": kinds[key], "result": error} for key, error in found.items()]
    write_csv(arguments.out, sorted(rows, key=lambda row: list(TOOLS).index(row["tool"])))


if __name__ == "__main__":
    main()
