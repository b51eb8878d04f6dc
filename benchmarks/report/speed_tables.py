"""Tables of time and memory."""

import statistics
from collections.abc import Callable, Sequence

from benchmarks.common.rows import Row, Rows
from benchmarks.report.markdown import by, markdown, source


def speed(rows: Rows) -> str:
    """Ratios of times and of peak memory by family: geometric mean over rows, and the worst row."""

    def cell(found: list[tuple[float, Row]]) -> str:
        values = [value for value, _ in found]
        return f"{statistics.geometric_mean(values):.2f} ({max(values):.2f})" if values else ""

    columns: dict[str, Callable[[Rows], list[tuple[float, Row]]]] = {
        "/ dense, training, batch 32": lambda runs: _over(runs, "dense", mode="train", batch="32"),
        "batch 1": lambda runs: _over(runs, "dense", mode="train", batch="1"),
        "/ dense, inference, batch 32": lambda runs: _over(runs, "dense", mode="infer", batch="32"),
        "batch 1 ": lambda runs: _over(runs, "dense", mode="infer", batch="1"),
        "frozen, batch 1": lambda runs: _over(runs, "dense", mode="frozen", batch="1"),
        "/ tednet": lambda runs: _over(runs, "tednet"),
        "/ tensorly-torch": lambda runs: _over(runs, "tltorch"),
        "/ best own plan": lambda runs: _over(runs, *OWN),
        "peak memory / dense": lambda runs: _over(runs, "dense_peak", ours="auto_peak", mode="train"),
        "memory='low', batch 32: peak / dense": lambda runs: _over(
            runs, "dense_peak", ours="low_peak", mode="train", batch="32"
        ),
        "its time / auto": lambda runs: _over(runs, "auto", ours="low", mode="train", batch="32"),
    }
    table = [[family, *(cell(make(runs)) for make in columns.values())] for family, runs in by(rows, "family")]
    noise = [float(run["dense_again"]) / float(run["dense"]) for run in rows]
    spread = f"{min(noise):.2f} to {max(noise):.2f}, nine in ten {_between(noise)}"
    return (
        f"{markdown(['family', *map(str.strip, columns)], table)}\n\n"
        f"{len(rows)} rows. The same dense layer against itself: {spread}. {source(rows)}"
    )


OWN = ("auto_again", "oracle", "reconstruct", "factorized")


def _over(rows: Rows, *others: str, ours: str = "auto", **only: str) -> list[tuple[float, Row]]:
    """Our time over the fastest of some columns, with its row, where there is one and the row is as ``only`` says."""
    found = []
    for row in rows:
        rivals = [float(row[other]) for other in others if row.get(other)]
        if rivals and row[ours] and all(row[key] == value for key, value in only.items()):
            found.append((float(row[ours]) / min(rivals), row))
    return found


def promises(rows: Rows) -> str:
    """What the planner is to keep to, in how many rows it does, and the worst row."""
    light = [row for row in rows if row["family"] in ("cp", "tucker", "tt-chain", "tr")]
    inner = [row for row in light if row["family"] != "tr"]

    def attainable(found: list[tuple[float, Row]]) -> list[tuple[float, Row]]:
        """Without rows in which the contraction that needs the fewest FLOPs needs more than the limit already."""
        return [(v, row) for v, row in found if int(row["least_flops"]) <= 1.5 * int(row["dense_flops"])]

    near = [row for row in rows if float(row["auto"]) > 1]
    limits = [
        (int(row["flops"]) / int(row["dense_flops"]) * float(row["dense"]) / float(row["auto"]), row) for row in near
    ]
    kept = {
        "auto / best own plan": (_over(rows, *OWN), 1.25, 1.05),
        "auto / dense, batch 32": (_over(rows, "dense", batch="32"), 1.10, None),
        "auto / dense, inference": (_over(rows, "dense", mode="infer"), 1.05, None),
        "auto / dense, inference, frozen, batch 1": (_over(rows, "dense", mode="frozen"), 1.05, None),
        "auto / dense, training, batch 1": (_over(rows, "dense", mode="train", batch="1"), 1.5, None),
        "the same where FLOPs allow it": (attainable(_over(rows, "dense", mode="train", batch="1")), 1.5, None),
        "keep 0.1, training: CP, Tucker, TT chain, TR / dense": (
            _over(light, "dense", mode="train", rank="0.1"), None, 0.6,
        ),
        "auto / tednet": (_over(rows, "tednet"), 1.0, 0.5),
        "auto / tensorly-torch: CP, Tucker, TT chain": (_over(inner, "tltorch"), 1.0, 0.9),
        "peak memory of a training step / dense": (
            _over(rows, "dense_peak", ours="auto_peak", mode="train"), 1.25, None,
        ),
    }  # fmt: skip
    table = []
    for name, (found, limit, mean) in kept.items():
        values = [value for value, _ in found]
        if not values:
            continue
        worst = max(found, key=lambda pair: pair[0])
        within = sum(value <= limit for value in values) if limit else len(values)
        table.append(
            [
                name,
                f"{statistics.geometric_mean(values):.2f}" + (f" (wanted {mean})" if mean else ""),
                f"{limit}" if limit else "",
                f"{within} of {len(values)}" if limit else f"{len(values)} rows",
                f"{worst[0]:.2f}: {_row(worst[1])}",
            ]
        )
    worst = min(limits, key=lambda pair: pair[0])
    mean = statistics.geometric_mean([value for value, _ in limits])
    table.append(
        ["distance to the limit, rows above 1 ms", f"{mean:.2f} (wanted 0.6, higher is better)", "",
         f"{len(limits)} rows", f"{worst[0]:.2f}: {_row(worst[1])}"]
    )  # fmt: skip
    return markdown(["ratio", "geometric mean", "limit of a row", "rows within", "worst row"], table)


def _row(row: Row) -> str:
    shape = f"{row['in_channels']}-{row['out_channels']}, {row['size']}x{row['size']}"
    return f"{row['family']} rank {row['rank']}, {shape}, batch {row['batch']}, {row['mode']}"


def _between(values: Sequence[float]) -> str:
    cuts = statistics.quantiles(values, n=20)
    return f"{cuts[0]:.2f} to {cuts[-1]:.2f}"


def compiled(rows: Rows) -> str:
    """Milliseconds with and without torch.compile."""
    names = ("dense", "auto", "tednet", "tltorch")
    columns = [column for name in names for column in (name, f"compiled_{name}")]
    table = [
        [row["family"], row["mode"], *(f"{float(row[key]):.1f}" if row[key] else "" for key in columns)] for row in rows
    ]
    header = ["family", "mode"]
    header += [title for name in ("dense", "ours", "tednet", "tensorly-torch") for title in (name, "compiled")]
    return f"{markdown(header, table)}\n\n{source(rows)}"


def planning(rows: Rows) -> str:
    """Milliseconds of a first plan, and of one for a new size, by number of cores, over families and modes."""
    table = []
    for cores, runs in sorted(by(rows, "cores"), key=lambda pair: int(pair[0])):
        cells = []
        for middle, most in (("first", "most"), ("new_size", "most_new_size")):
            found = statistics.median(float(run[middle]) for run in runs)
            cells.append(f"{found:.2f} ({max(float(run[most]) for run in runs):.2f})")
        table.append([cores, ", ".join(dict.fromkeys(run["family"] for run in runs)), *cells])
    return f"{markdown(['cores', 'families', 'first', 'new size'], table)}\n\n{source(rows)}"


def penalty(rows: Rows) -> str:
    """Time of the penalty over that of the kernel's own, by family and keep ratio, over the numbers of channels."""
    keeps = list(dict.fromkeys(row["keep"] for row in rows))
    table = []
    for family, runs in by(rows, "family"):
        cells = []
        for keep in keeps:
            ratios = [float(run["ratio"]) for run in runs if run["keep"] == keep]
            cells.append(f"{statistics.geometric_mean(ratios):.2f} ({max(ratios):.2f})" if ratios else "")
        table.append([family, *cells])
    noise = [float(run["kernel_again"]) / float(run["kernel"]) for run in rows]
    return (
        f"{markdown(['family', *(f'keep {keep}' for keep in keeps)], table)}\n\n"
        f"{len(rows)} rows. The kernel against itself: {min(noise):.2f} to {max(noise):.2f}. {source(rows)}"
    )


def construct(rows: Rows) -> str:
    """Milliseconds of a layer's construction, and in brackets by the paper's rule, by format and channels."""
    sizes = list(dict.fromkeys(row["channels"] for row in rows))
    dense = [statistics.median(float(row["dense"]) for row in rows if row["channels"] == size) for size in sizes]
    table = [["nn.Conv2d", *(f"{median:.1f}" for median in dense)]]
    for family, runs in by(rows, "family"):
        cells = {run["channels"]: f"{float(run['default']):.1f} ({float(run['paper']):.1f})" for run in runs}
        table.append([family, *(cells.get(size, "") for size in sizes)])
    worst = max(rows, key=lambda row: float(row["over_limit"]))
    return (
        f"{markdown(['format', *(f'{size} channels' for size in sizes)], table)}\n\n"
        f"The nearest to its limit is {worst['family']} of {worst['channels']} channels, with "
        f"{float(worst['over_limit']):.1%} of it. {source(rows)}"
    )
