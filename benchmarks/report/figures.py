"""Single figures in the prose of the pages: `<!-- figure: NAME -->TEXT<!-- /figure -->`.

There are two kinds of names:

- `TABLE/ROW/COLUMN` is a cell of a table of `tables.py`, so figure and table cannot differ. ROW is the first cells of
  the row, as many as tell it from the others. COLUMN is the title of the column. Both are in small letters, with
  hyphens between the words: `results/cifar10-resnet20-tr/5x-smaller`. A number behind the name picks one number of the
  cell: of "0.26 (1.03)", `speed/cp/tednet/1` is the first and `speed/cp/tednet/2` the second.
- `FILE/NAME`, with the function's arguments behind further slashes, is a function of FIGURES. It gets the rows of
  benchmarks/results/FILE.csv: `speed/max/dense/family=btt,mode=train`.
"""

import re
import statistics
from collections.abc import Callable

from pandas import DataFrame

from benchmarks.common.chosen import chosen
from benchmarks.common.names import DENSE, DENSE_ARM, REFERENCES
from benchmarks.common.rows import Rows, groups
from benchmarks.report.markdown import ReportError, numbers, split_tables
from benchmarks.report.speed_tables import MEASURED, OWN, over
from benchmarks.report.start_tables import drift_gaps, steps_by_arm
from benchmarks.report.training_tables import check_recipe

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?: ?%)?")


def slug(text: str) -> str:
    """Return a title as it stands in a name: small letters, hyphens between words."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-")


def figure(name: str, rows: Callable[[str], Rows], table: Callable[[str], str]) -> str:
    """Return the text of a figure.

    Args:
        name: see the top of this file.
        rows: returns the rows of a CSV file, by the file's name without its ending.
        table: returns the text of a table, by its name.

    Raises:
        ReportError: there is no such figure.
    """
    first, _, rest = name.partition("/")
    key, *arguments = rest.split("/")
    if function := FIGURES.get(f"{first}/{key}"):
        try:
            return function(rows(first), *arguments)
        except (TypeError, ValueError, KeyError) as error:
            raise ReportError(f"it does not take these arguments ({error})") from None
    if not 1 <= len(arguments) <= 2:
        raise ReportError(f"a name is TABLE/ROW/COLUMN, with a number behind it or none, or begins with {_names()}")
    found = cell(table(first), key, arguments[0])
    if len(arguments) == 1:
        return found
    parts = NUMBER.findall(found)
    if not arguments[1].isdecimal() or not 1 <= int(arguments[1]) <= len(parts):
        raise ReportError(f"its cell holds {len(parts)} numbers: {found!r}")
    return parts[int(arguments[1]) - 1]


def _names() -> str:
    return ", ".join(FIGURES)


def cell(text: str, row: str, column: str) -> str:
    """Return a cell of the first table of the text that has the column, and the row once."""
    columns: dict[str, None] = {}
    for header, *body in split_tables(text):
        titles = [slug(title) for title in header]
        columns |= dict.fromkeys(titles)
        if titles.count(column) != 1:
            continue
        here = [cells for cells in body if row in (slug("-".join(cells[:end])) for end in range(1, len(cells)))]
        if len(here) == 1 and (found := here[0][titles.index(column)]):
            return found
    if column not in columns:
        raise ReportError(f"the table has no column {column!r}, only {', '.join(columns)}")
    raise ReportError(f"no table has one row {row!r} with a text in the column {column!r}")


def _span(values: list[float], form: str) -> str:
    low, high = (form.format(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# Speed


def _ratios(rows: Rows, other: str, only: str) -> DataFrame:
    """Return our time over another's for rows that match `only`, such as "family=btt,batch=1"."""
    frame = numbers(rows, *MEASURED)
    others, ours = {"own": (OWN, "auto"), "dense_peak": (("dense_peak",), "auto_peak"), "dense_low_peak": (
        ("dense_peak",), "low_peak")}.get(other, ((other,), "auto"))  # fmt: skip
    return over(frame, *others, ours=ours, **dict(pair.split("=") for pair in only.split(",") if pair))


def _above(rows: Rows, limit: str, other: str, only: str = "") -> str:
    """Return how many rows have a ratio above a limit."""
    ratios = _ratios(rows, other, only)
    return f"{(ratios > float(limit)).sum()} of {len(ratios)}"


# Starts


def _nearer(rows: Rows, start: str, other: str) -> str:
    """Return in how many rows of the table of depth one start is nearer to the dense network than another."""
    ours, theirs = (drift_gaps(rows, init) for init in (start, other))
    return f"{sum(ours[key] < theirs[key] for key in ours if key in theirs)} of {len(ours.keys() & theirs.keys())}"


def _per_layer(rows: Rows, network: str) -> str:
    """Return how far the forward signal of the default is from the dense network's, per layer."""
    gaps = drift_gaps(rows, "default")
    return _span([gap / int(layers) for (name, layers, end), gap in gaps.items()
                  if end == "forward" and slug(name) == network], "{:.2f}")  # fmt: skip


def _accuracies(rows: Rows, dataset: str, network: str) -> dict[tuple[str, str], float]:
    """Return accuracies by family and start. `all` means all sets of images."""
    return {
        (choice["family"] if dataset != "all" else f"{choice['dataset']} {choice['family']}", slug(choice["arm"])): (
            choice["accuracy"]
        )
        for choice in chosen([row for row in rows if row["network"] == network])
        if dataset in (choice["dataset"], "all") and choice["accuracy"] is not None
    }


def _share(rows: Rows, dataset: str, network: str, arm: str, families: str = "") -> str:
    """Return the accuracy of formats over the dense network's, from the lowest to the highest."""
    reached = _accuracies(rows, dataset, network)
    dense = reached[DENSE, DENSE_ARM]
    shares = [
        value / dense
        for (family, start), value in reached.items()
        if start == arm and family not in REFERENCES and (not families or family in families.split("+"))
    ]
    return _span([100 * share for share in shares], "{:.1f}") + " %"


def _leads(rows: Rows, dataset: str, network: str, arms: str, than: str) -> list[float]:
    """Return by how many points the better of `arms`, joined by "+", is ahead of another start, per family."""
    reached = _accuracies(rows, dataset, network)
    families = dict.fromkeys(family for family, _ in reached if family.split()[-1] not in REFERENCES)
    rivals = {f: [reached[f, arm] for arm in arms.split("+") if (f, arm) in reached] for f in families}
    return [100 * (max(rivals[f]) - reached[f, than]) for f in families if rivals[f] and (f, than) in reached]


def _ahead(rows: Rows, dataset: str, network: str, arms: str, than: str = "default") -> str:
    """Return in how many families the better of some starts has a higher accuracy than another start."""
    leads = _leads(rows, dataset, network, arms, than)
    return f"{sum(lead > 0 for lead in leads)} of {len(leads)}"


def _ahead_by(rows: Rows, dataset: str, network: str, arms: str, than: str = "default") -> str:
    """Return by how many points they are ahead, where they are."""
    return _span([lead for lead in _leads(rows, dataset, network, arms, than) if lead > 0], "{:.1f}")


def _seeds(rows: Rows, dataset: str, network: str, arm: str) -> str:
    """Return the lowest and the highest accuracy of a single seed, over formats, at the chosen rates."""
    rows = [row for row in rows if (row["dataset"], row["network"], slug(row["arm"])) == (dataset, network, arm)]
    rates = {(choice["family"], choice["lr"]) for choice in chosen(rows) if choice["family"] not in REFERENCES}
    runs = [row for row in rows if (row["family"], row["lr"]) in rates]
    return _span([100 * float(run["accuracy_test"] or 0) for run in runs], "{:.0f}") + " %"


def _steps_level(rows: Rows, arm: str, rate: str = "chosen") -> str:
    """Return in how many rows the default needs as few steps as another start, or fewer; `rate`: chosen or fastest."""
    which = ["chosen", "fastest"].index(rate)
    pairs = []
    for runs in steps_by_arm(rows).values():
        means = {slug(name): statistics.fmean(steps) for name, steps in runs[which].items()}
        pairs += [(means["default"], means[arm])] if arm in means else []
    return f"{sum(ours <= theirs for ours, theirs in pairs)} of {len(pairs)}"


def _fewest(rows: Rows, dataset: str, rate: str = "chosen") -> str:
    """Return in how many formats of a set of images no other start needs fewer steps than the default."""
    which = ["chosen", "fastest"].index(rate)
    means = [
        {name: statistics.fmean(steps) for name, steps in runs[which].items()}
        for (place, _), runs in steps_by_arm(rows).items()
        if place == dataset
    ]
    return f"{sum(one['default'] <= min(one.values()) for one in means)} of {len(means)}"


# Trained networks


def _slowest(rows: Rows, batch: str) -> str:
    return f"{max(float(row['over_dense']) for row in rows if row['batch'] == batch):.2f}"


def _throughput(rows: Rows, precision: str, conv: str = "") -> str:
    """Return the lowest throughput over the dense network's."""
    shares = [float(row["over_dense"]) for row in rows
              if row["rank"] and row["precision"] == precision and row["conv"] in (conv or row["conv"])]  # fmt: skip
    return f"{min(shares):.2f}"


def _compressed(rows: Rows, keep: str, formats: str) -> str:
    """Return the points that formats, joined by "+", lose, from the fewest to the most."""
    kept = [
        row for row in rows if row["split"] == "test" and row["keep"] == keep and row["format"] in formats.split("+")
    ]
    return _span([float(row["drop"]) for row in kept], "{:.2f}")


def _behind(rows: Rows, model: str, conv: str, ratio: str) -> str:
    """Return how many points of accuracy a format is behind the dense network, in means over seeds."""
    check_recipe(rows)
    whole, smaller = (
        [float(row["accuracy"]) for row in rows if (row["model"], row["conv"], float(row["ratio"])) == (model, *one)]
        for one in ((DENSE, 1.0), (conv, float(ratio)))
    )
    return f"{100 * (statistics.fmean(whole) - statistics.fmean(smaller)):.2f}"


def _scale(rows: Rows, conv: str, processes: str, way: str, column: str) -> str:
    """Return how many times as many bytes the dense network has in a column as a format."""
    found = {key: float(some[0][column]) for key, some in groups(rows, "conv", "processes", "way")}
    return f"{found[DENSE, processes, way] / found[conv, processes, way]:.1f}"


FIGURES: dict[str, Callable[..., str]] = {
    "speed/max": lambda rows, other, only="": f"{_ratios(rows, other, only).max():.2f}",
    "speed_kinds/max": lambda rows, other, only="": f"{_ratios(rows, other, only).max():.2f}",
    "speed/range": lambda rows, other, only="": _span([*_ratios(rows, other, only)], "{:.2f}"),
    "speed/above": _above,
    "speed/largest": lambda rows, column: f"{max(float(row[column]) for row in rows):.1f}",
    "depth/nearer": _nearer,
    "depth/per-layer": _per_layer,
    "init_scale/dense": lambda rows: "{white_5:.2f} to {white_95:.2f}".format(
        **{end: float(rows[0][end]) for end in ("white_5", "white_95")}
    ),
    "construct/range": lambda rows, column, channels: _span(
        [float(row[column]) for row in rows if row["channels"] == channels], "{:.1f}"
    ),
    "construct/over-limit": lambda rows: f"{max(float(row['over_limit']) for row in rows):.0%}",
    "planning/longest": lambda rows, column: f"{max(float(row[column]) for row in rows):.0f}",
    "convergence/share": _share,
    "convergence/ahead": _ahead,
    "convergence/ahead-by": _ahead_by,
    "convergence/seeds": _seeds,
    "convergence/steps-level": _steps_level,
    "convergence/fewest": _fewest,
    "latency/slowest": _slowest,
    "throughput/slowest": _throughput,
    "compress/dense": lambda rows: f"{float(rows[0]['accuracy_dense']):.2%}",
    "compress/lost": _compressed,
    "results/behind": _behind,
    "tools/passed": lambda rows: f"{sum(not row['result'] for row in rows)} of {len(rows)}",
    "tools/tools": lambda rows: f"{len({row['tool'] for row in rows})}",
    "scale/times-fewer": _scale,
}
"""Functions of a file's rows, by `FILE/NAME`."""
