"""The table of the tools that layers work with."""

from benchmarks.common.rows import Rows
from benchmarks.report.markdown import by, markdown, source


def tools(rows: Rows) -> str:
    """Of how many formats the layers of each kind work with each tool, and what the others are told."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    table, told = [], {}
    for name, runs in by(rows, "tool"):
        cells = []
        for kind in kinds:
            results = [run["result"] for run in runs if run["kind"] == kind]
            cells.append(f"{results.count('')} of {len(results)}")
        table.append([name, *cells])
        for error, bad in by([run for run in runs if run["result"]], "result"):
            told.setdefault((name, error.split(":")[0]), []).extend(run["layer"] for run in bad)
    notes = [f"Not: {name}: {', '.join(layers)} ({error})." for (name, error), layers in told.items()]
    return "\n\n".join([markdown(["tool", *kinds], table), *notes, source(rows)])
