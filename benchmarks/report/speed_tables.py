"""Tables of time and memory."""

import statistics
from collections.abc import Callable

from pandas import DataFrame, Series

from benchmarks.common.rows import Row, Rows
from benchmarks.report.markdown import markdown, mean_and_worst, numbers, source

IMAGE = "image"
MANY = 512  # inputs of a linear layer in one call, from which on its rows stand apart
OWN = ("auto_again", "oracle", "reconstruct", "factorized")
MEASURED = (
    "dense", "dense_again", "auto", "low", *OWN, "tednet", "tltorch", "dense_peak", "auto_peak", "low_peak",
    "flops", "least_flops", "dense_flops",
)  # fmt: skip


def speed(rows: Rows) -> str:
    """Return ratios of time and peak memory by family: the geometric mean over rows, and the worst row."""
    columns: dict[str, Callable[[DataFrame], Series]] = {
        "/ dense, training, batch 32": lambda runs: over(runs, "dense", mode="train", batch="32"),
        "/ dense, training, batch 1": lambda runs: over(runs, "dense", mode="train", batch="1"),
        "/ dense, inference, batch 32": lambda runs: over(runs, "dense", mode="infer", batch="32"),
        "/ dense, inference, batch 1": lambda runs: over(runs, "dense", mode="infer", batch="1"),
        "/ dense, inference, frozen, batch 1": lambda runs: over(runs, "dense", mode="frozen", batch="1"),
        "/ tednet": lambda runs: over(runs, "tednet"),
        "/ tensorly-torch": lambda runs: over(runs, "tltorch"),
        "/ best own plan": lambda runs: over(runs, *OWN),
        "peak memory / dense": lambda runs: over(runs, "dense_peak", ours="auto_peak", mode="train"),
        "memory='low', batch 32: peak / dense": lambda runs: over(
            runs, "dense_peak", ours="low_peak", mode="train", batch="32"
        ),
        "its time / auto": lambda runs: over(runs, "auto", ours="low", mode="train", batch="32"),
    }
    rows = images(rows)
    frame = numbers(rows, *MEASURED)
    table = [
        [family, *(mean_and_worst(ratios(runs)) for ratios in columns.values())]
        for family, runs in frame.groupby("family", sort=False)
    ]
    noise = frame["dense_again"] / frame["dense"]
    cuts = statistics.quantiles(noise, n=20)
    spread = f"{min(noise):.2f} to {max(noise):.2f}, nine in ten {cuts[0]:.2f} to {cuts[-1]:.2f}"
    return (
        f"{markdown(['family', *columns], table)}\n\n"
        f"{len(rows)} rows. The same dense layer against itself: {spread}. {source(rows)}"
    )


def speed_kinds(rows: Rows) -> str:
    """Return ratios of time by kind of layer and family: the geometric mean over rows, and the worst row."""
    columns: dict[str, Callable[[DataFrame], Series]] = {
        "/ dense, training": lambda runs: over(runs, "dense", mode="train"),
        "/ dense, inference": lambda runs: over(runs, "dense", mode="infer"),
        "/ dense, inference, frozen": lambda runs: over(runs, "dense", mode="frozen"),
        "/ best own plan": lambda runs: over(runs, *OWN),
        "/ tednet": lambda runs: over(runs, "tednet"),
        "/ tensorly-torch": lambda runs: over(runs, "tltorch"),
    }
    frame = numbers([row | {"kind": _kind(row)} for row in rows], *MEASURED)
    table = [
        [kind, family, f"{len(runs)}", *(mean_and_worst(ratios(runs)) for ratios in columns.values())]
        for (kind, family), runs in frame.groupby(["kind", "family"], sort=False)
    ]
    noise = frame["dense_again"] / frame["dense"]
    return (
        f"{markdown(['kind', 'family', 'rows', *columns], table)}\n\n"
        f"{len(rows)} rows. The same dense layer against itself: {min(noise):.2f} to {max(noise):.2f}. {source(rows)}"
    )


def _kind(row: Row) -> str:
    """Return the kind of a row. One without that column is of images."""
    kind = row.get("kind", IMAGE)
    if kind != "linear":
        return kind
    return f"linear, {'below' if int(row['batch']) < MANY else 'from'} {MANY} inputs"


def images(rows: Rows) -> Rows:
    """Return the rows of images."""
    return [row for row in rows if row.get("kind", IMAGE) == IMAGE]


def over(frame: DataFrame, *others: str, ours: str = "auto", **only: str) -> Series:
    """Return our time over the fastest of the others, for the rows that have both and match ``only``."""
    for column, value in only.items():
        frame = frame[frame[column] == value]
    return (frame[ours] / frame[[*others]].min(axis=1)).dropna()


def promises(rows: Rows) -> str:
    """Return the planner's limits, the number of rows within each, and the worst row."""
    frame = numbers(images(rows), *MEASURED)
    light = frame[frame["family"].isin(["cp", "tucker", "tt-chain", "tr"])]
    inner = light[light["family"] != "tr"]
    # Drop rows in which even the contraction with the fewest FLOPs exceeds the limit.
    attainable = frame[frame["least_flops"] <= 1.5 * frame["dense_flops"]]
    kept = {
        "auto / best own plan": (over(frame, *OWN), 1.25, 1.05),
        "auto / dense, batch 32": (over(frame, "dense", batch="32"), 1.10, None),
        "auto / dense, inference": (over(frame, "dense", mode="infer"), 1.05, None),
        "auto / dense, inference, frozen, batch 1": (over(frame, "dense", mode="frozen"), 1.05, None),
        "auto / dense, training, batch 1": (over(frame, "dense", mode="train", batch="1"), 1.5, None),
        "the same where FLOPs allow it": (over(attainable, "dense", mode="train", batch="1"), 1.5, None),
        "keep 0.1, training: CP, Tucker, TT chain, TR / dense": (
            over(light, "dense", mode="train", rank="0.1"), None, 0.6,
        ),
        "auto / tednet": (over(frame, "tednet"), 1.0, 0.5),
        "auto / tensorly-torch: CP, Tucker, TT chain": (over(inner, "tltorch"), 1.0, 0.9),
        "peak memory of a training step / dense": (
            over(frame, "dense_peak", ours="auto_peak", mode="train"), 1.25, None,
        ),
    }  # fmt: skip
    table = [
        [
            name,
            f"{statistics.geometric_mean(ratios):.2f}" + (f" (wanted {mean})" if mean else ""),
            f"{limit}" if limit else "",
            f"{(ratios <= limit).sum()} of {len(ratios)}" if limit else f"{len(ratios)} rows",
            f"{ratios.max():.2f}: {_row(frame.loc[ratios.idxmax()])}",
        ]
        for name, (ratios, limit, mean) in kept.items()
        if len(ratios)
    ]
    near = frame[frame["auto"] > 1]
    limits = near["flops"] / near["dense_flops"] * near["dense"] / near["auto"]
    mean = statistics.geometric_mean(limits)
    table.append(
        ["distance to the limit, rows above 1 ms", f"{mean:.2f} (wanted 0.6, higher is better)", "",
         f"{len(limits)} rows", f"{limits.min():.2f}: {_row(frame.loc[limits.idxmin()])}"]
    )  # fmt: skip
    return markdown(["ratio", "geometric mean", "limit of a row", "rows within", "worst row"], table)


def _row(row: Series) -> str:
    shape = f"{row['in_channels']}-{row['out_channels']}, {row['size']}x{row['size']}"
    return f"{row['family']} rank {row['rank']}, {shape}, batch {row['batch']}, {row['mode']}"


def operators(rows: Rows) -> str:
    """Return distances to the limit of layers and of their operators alone, and the layer's time over theirs."""
    frame = numbers(rows, "dense", "layer", "operators", "flops", "dense_flops")
    limit = frame["flops"] / frame["dense_flops"] * frame["dense"]
    frame = frame.assign(whole=limit / frame["layer"], alone=limit / frame["operators"])
    frame = frame.assign(between=frame["layer"] / frame["operators"])

    def line(name: str, runs: DataFrame) -> list[str]:
        means = [f"{statistics.geometric_mean(runs[column]):.2f}" for column in ("whole", "alone", "between")]
        return [name, f"{len(runs)}", *means]

    table = [line(family, runs) for family, runs in frame.groupby("family", sort=False)]
    table += [line(f"all, {mode}", runs) for mode, runs in frame.groupby("mode", sort=False)]
    table.append(line("all", frame))
    head = ["family", "rows", "distance of the layer", "distance of its operators alone", "layer / operators"]
    return f"{markdown(head, table)}\n\n{source(rows)}"


def compiled(rows: Rows) -> str:
    """Return milliseconds with and without torch.compile."""
    names = ("dense", "auto", "tednet", "tltorch")
    columns = [column for name in names for column in (name, f"compiled_{name}")]
    table = [
        [row["family"], row["mode"], *(f"{float(row[key]):.1f}" if row[key] else "" for key in columns)] for row in rows
    ]
    header = ["family", "mode"]
    header += [title for name in ("dense", "ours", "tednet", "tensorly-torch") for title in (name, f"{name}, compiled")]
    return f"{markdown(header, table)}\n\n{source(rows)}"


def planning(rows: Rows) -> str:
    """Return milliseconds of a first plan and of one for a new size, by number of cores, over families and modes."""
    frame = numbers(rows, "cores", "first", "most", "new_size", "most_new_size")
    table = [
        [
            f"{cores:.0f}",
            ", ".join(runs["family"].unique()),
            f"{runs['first'].median():.2f} ({runs['most'].max():.2f})",
            f"{runs['new_size'].median():.2f} ({runs['most_new_size'].max():.2f})",
        ]
        for cores, runs in frame.groupby("cores")
    ]
    return f"{markdown(['cores', 'families', 'first', 'new size'], table)}\n\n{source(rows)}"


def penalty(rows: Rows) -> str:
    """Return the penalty's time over that from the kernel, by family and keep ratio, over all numbers of channels."""
    frame = numbers(rows, "ratio", "kernel", "kernel_again")
    table = frame.pivot_table("ratio", "family", "keep", mean_and_worst, fill_value="", sort=False)
    noise = frame["kernel_again"] / frame["kernel"]
    return (
        f"{markdown(['family', *(f'keep {keep}' for keep in table)], table.itertuples())}\n\n"
        f"{len(rows)} rows. The kernel against itself: {min(noise):.2f} to {max(noise):.2f}. {source(rows)}"
    )


def construct(rows: Rows) -> str:
    """Return milliseconds of construction, and in brackets those with the paper's rule, by format and channels."""
    frame = numbers(rows, "dense", "default", "paper", "over_limit")
    frame["cell"] = [f"{ours:.1f} ({paper:.1f})" for ours, paper in zip(frame["default"], frame["paper"], strict=True)]
    table = frame.pivot_table("cell", "family", "channels", "first", fill_value="", sort=False)
    dense = frame.groupby("channels", sort=False)["dense"].median().map("{:.1f}".format)
    worst = frame.loc[frame["over_limit"].idxmax()]
    header = ["format", *(f"{size} channels" for size in table)]
    return (
        f"{markdown(header, [['nn.Conv2d', *dense], *table.itertuples()])}\n\n"
        f"The nearest to its limit is {worst['family']} of {worst['channels']} channels, with "
        f"{worst['over_limit']:.1%} of it. {source(rows)}"
    )
