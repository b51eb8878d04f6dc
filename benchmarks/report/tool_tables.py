"""Table of the tools that layers work with."""

from pandas import DataFrame, Series

from benchmarks.common.rows import Rows
from benchmarks.report.markdown import markdown, source


def tools(rows: Rows) -> str:
    """Return how many formats work with each tool, by kind of layer, and the errors of the others."""

    def working(results: Series) -> str:
        return f"{(results == '').sum()} of {len(results)}"

    frame = DataFrame(rows)
    table = frame.pivot_table("result", "tool", "kind", working, sort=False)
    refused = frame[frame["result"] != ""]
    kind_of_error = refused["result"].str.split(":").str[0].rename("error")
    notes = [
        f"Not: {name}: {', '.join(layers)} ({error})."
        for (name, error), layers in refused.groupby(["tool", kind_of_error], sort=False)["layer"]
    ]
    return "\n\n".join([markdown(["tool", *table], table.itertuples()), *notes, source(rows)])
