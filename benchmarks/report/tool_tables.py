"""Tables of the tools that layers work with, and of FLOP counters."""

from pandas import DataFrame, Series

from benchmarks.common.rows import Rows
from benchmarks.report.markdown import by, markdown, source


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


def counters(rows: Rows) -> str:
    """Return each counter's FLOPs by layer, in millions, with right ones in bold, and what it leaves behind."""
    layers = [*dict.fromkeys(row["layer"] for row in rows)]
    lines = []
    for name, own in by(rows, "counter"):
        found = {row["layer"]: row for row in own}
        counted = [row for row in own if row["params"]]
        wrong = [row["layer"] for row in counted if row["params"] != row["right_params"]]
        params = ("none" if not counted else "right") if not wrong else f"wrong for {len(wrong)} of {len(counted)}"
        left = dict.fromkeys(part for row in own for part in row["left"].split(" + ") if part)
        lines.append([name, own[0]["version"], own[0]["gradients"], *(_count(found[layer]) for layer in layers), params,
                      ", ".join(left) or "nothing"])  # fmt: skip
    header = ["counter", "version", "gradients", *layers, "parameters", "leaves behind"]
    return "\n\n".join([markdown(header, lines), source(rows)])


def _count(row: dict[str, str]) -> str:
    text = "0" if row["flops"] == "0" else f"{int(row['flops']) / 1e6:.2f}"
    return f"**{text}**" if row["flops"] == row["right"] else text
