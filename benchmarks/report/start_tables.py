"""Tables of initialisations: signal scales, and training results."""

import math
import statistics
from typing import Any

from benchmarks.common.chosen import chosen
from benchmarks.common.names import DENSE, DENSE_ARM, REFERENCES
from benchmarks.common.rows import Row, Rows, groups
from benchmarks.report.markdown import ReportError, by, folded, markdown, source

SHOWN = {
    "default": "default", "equal split": "equal split", "scaled branches": "`scale_residual_`",
    "dead branches": "dead branches", "calibrated": "`calibrate_`", "typical": "typical",
    "exact": "normal, exact", "orthogonal white": "orthogonal, white", "white": "normal, white",
    "paper": "the paper's rule", "kaiming": "Kaiming per core", "xavier": "Xavier per core",
    "normal 0.02": "N(0, 0.02)", "tednet": "tednet's own", "tltorch normal": "tensorly-torch's normal_",
}  # fmt: skip
"""Order and names of initialisations in the tables. `tltorch` is not there: its constructor leaves memory as it is."""
KINDS = {"white": "white", "rectified": "rectified", "smooth": "smooth", "smooth_rectified": "smooth and rectified"}


def _titles(rows: Rows) -> dict[str, str]:
    """Return the entries of SHOWN that have rows."""
    return {init: title for init, title in SHOWN.items() if any(row["init"] == init for row in rows)}


def init_scale(rows: Rows) -> str:
    """Return E[y^2] of white inputs over its target, by format and initialisation: percentiles 5 to 95, all ranks."""

    def span(runs: Rows, name: str) -> str:
        low, high = ([float(row[f"{name}_{end}"]) for row in runs if row[f"{name}_{end}"]] for end in (5, 95))
        return f"{min(low):.3g} to {max(high):.3g}" if low else ""

    here = _titles(rows)
    table = []
    for family, runs in by([row for row in rows if row["family"] != "dense"], "family"):
        table.append([family, *(span([row for row in runs if row["init"] == init], "white") for init in here)])
    wide = []
    for init in ("default", "exact", "orthogonal white", "white", "paper"):
        runs = [row for row in rows if row["init"] == init and row["white"]]
        wide.append([here[init], *(span(runs, name) for name in KINDS)])
        ranks = [row["effective_rank"] for row in runs]
        wide[-1].append(f"{statistics.fmean(map(float, ranks)):.1f}")
    header = ["over all formats and ranks", *KINDS.values(), "mean effective rank"]
    ranks = ", ".join(dict.fromkeys(row["rank"] for row in rows if row["rank"]))
    return (
        f"{markdown(['format', *here.values()], table)}\n\n{markdown(header, wide)}\n\n"
        f"Ranks {ranks}; {rows[0]['draws']} draws each. {source(rows)}"
    )


def depth(rows: Rows) -> str:
    """Return the drift through all layers, forward and backward: mean and standard deviation, with zero padding."""
    titles = _titles(rows)
    table, notes = [], []
    for layers, some in by([row for row in rows if row["border"] == "zeros"], "depth"):
        # The signal has passed all layers at the last layer, the gradient at the first.
        ends = {"forward": layers, "backward": "1"}
        found = {(row["network"], row["init"], name): row
                 for name, layer in ends.items() for row in some if row["layer"] == layer}  # fmt: skip
        networks = dict.fromkeys(row["network"] for row in some)
        for network in networks:
            cells = [[found.get((network, init, name)) for name in ends] for init in titles]
            shown = [
                "; ".join(_drift(row, name) for row, name in zip(pair, ends, strict=True) if row) for pair in cells
            ]
            table.append([network, layers, *shown])
    gaps = drift_gaps(rows, "default")
    for layers, name in dict.fromkeys((layers, name) for _, layers, name in gaps):
        gap, network = max((gap, one) for (one, *place), gap in gaps.items() if place == [layers, name])
        notes.append(f"{name} behind {layers} layers {gap:.2f} ({network})")
    header = ["network", "layers", *titles.values()]
    furthest = f"Furthest from dense under the default: {', '.join(notes)}."
    return f"{markdown(header, table)}\n\n{furthest} {rows[0]['draws']} networks each. {source(rows)}"


def drift_gaps(rows: Rows, init: str) -> dict[tuple[str, str, str], float]:
    """Return how far an initialisation drifts from the dense network's, by network, depth and direction.

    A network whose signal is out of range in every draw is infinitely far.
    """
    rows = [row for row in rows if row["border"] == "zeros"]
    gaps: dict[tuple[str, str, str], float] = {}
    for layers, some in by(rows, "depth"):
        for name, layer in (("forward", layers), ("backward", "1")):
            here = {(row["network"], row["init"]): row for row in some if row["layer"] == layer}
            dense = float(here["dense", "default"][name])
            for (network, start), row in here.items():
                if start == init and network != "dense":
                    gaps[network, layers, name] = abs(float(row[name] or "inf") - dense)
    return gaps


def _drift(row: Row, name: str) -> str:
    if row[f"{name}_lost"] == row["draws"]:
        return "out of range"
    lost = f", {row[f'{name}_lost']} lost" if row[f"{name}_lost"] != "0" else ""
    spread = row[f"{name}_sd"] and f" ± {float(row[f'{name}_sd']):.1f}"
    return f"{float(row[name]):.1f}{spread}{lost}"


def convergence(rows: Rows) -> str:
    """Return test accuracies at the rates that are best on held-out images: the range over families, and each family.

    Also return the steps to the reference loss (by seed with batch normalisation), and the settings.
    """
    places: dict[tuple[str, ...], dict[str, str]] = {}
    for choice in chosen(rows):
        cell = "none"
        if choice["accuracy"] is not None:
            steps = "never" if choice["steps_to"] is None else f"{choice['steps_to']:.0f} steps"
            lost = f", {choice['diverged']:.0%} diverged" if choice["diverged"] else ""
            cell = f"{100 * choice['accuracy']:.1f} ± {100 * (choice['error'] or 0):.1f} %, {steps}{lost}"
        # The default is compared with dense networks under He's rule, so these share its column.
        arm = "default" if choice["family"] in REFERENCES and choice["arm"] == DENSE_ARM else choice["arm"]
        places.setdefault((choice["dataset"], choice["network"], choice["family"]), {})[arm] = cell
    titles = SHOWN | {"tltorch": "tensorly-torch's own"}
    titles = {arm: title for arm, title in titles.items() if any(arm in cells for cells in places.values())}
    families = [[*place, *(cells.get(arm, "") for arm in titles)] for place, cells in places.items()]
    full = markdown(["images", "network", "family", *titles.values()], families)
    each = folded("Each family: accuracy, steps, runs that diverged", full)
    settings = folded("Settings of each network", table) if (table := _settings(rows)) else ""
    return "\n\n".join(filter(None, (_reached(rows, titles), _steps(rows), each, settings, source(rows))))


def start(rows: Rows) -> str:
    """Return how far the default's accuracies are behind the best other start's, and the tables of `convergence`."""
    table, behind = [], []
    for (dataset, network), some in groups(rows, "dataset", "network"):
        choices = [choice for choice in chosen(some) if choice["family"] not in REFERENCES]
        error = _error_of_differences(choices)
        for family in dict.fromkeys(choice["family"] for choice in choices):
            reached = {choice["arm"]: choice["accuracy"] or 0.0 for choice in choices if choice["family"] == family}
            default = reached.pop("default")
            rival = max(reached, key=lambda arm: (reached[arm], arm))
            gap = reached[rival] - default
            table.append([dataset, network, family, f"{default:.2%}", f"{reached[rival]:.2%} ({SHOWN[rival]})"])
            table[-1] += [f"{-100 * gap:+.2f}", f"{100 * error:.2f}"]
            if gap > 2 * error:
                behind.append(f"{family} in `{network}`")
    header = ["images", "network", "family", "default", "best other start", "points ahead", "standard error"]
    told = f"The default is behind by more than two standard errors in {', '.join(behind) or 'no row'}."
    note = "The standard error of a difference is pooled over all formats and starts of a network."
    return f"{markdown(header, table)}\n\n{told} {note}\n\n{convergence(rows)}"


def _error_of_differences(choices: list[dict[str, Any]]) -> float:
    """Return the standard error of a difference of two accuracies, from the spread of all starts without lost runs."""
    errors = [choice["error"] for choice in choices if choice["error"] is not None and not choice["lost"]]
    if not errors:
        raise ReportError("no start has two runs that did not diverge, so no difference has a standard error")
    return math.sqrt(2 * statistics.fmean(error**2 for error in errors))


def _reached(rows: Rows, titles: dict[str, str]) -> str:
    """Return the range of accuracy over families, by initialisation, and the accuracy of dense networks.

    A network with an incomplete grid has no row.
    """
    formats = [row for row in rows if row["family"] not in REFERENCES]
    titles = {arm: title for arm, title in titles.items() if any(row["arm"] == arm for row in formats)}
    table = []
    for place, some in groups(rows, "dataset", "network"):
        reached = {(choice["family"], choice["arm"]): choice["accuracy"] for choice in chosen(some)}
        families = {family for family, _ in reached} - {*REFERENCES}
        if reached.get((DENSE, DENSE_ARM)) is None or not _complete(some, "family", "arm"):
            continue
        dense = {SHOWN[arm] if family == DENSE else family: f"{accuracy:.1%}"
                 for (family, arm), accuracy in reached.items() if family in REFERENCES}  # fmt: skip
        table.append([*place, dense.pop(SHOWN[DENSE_ARM]), ", ".join(" ".join(pair) for pair in dense.items())])
        for arm in titles:
            tried = [reached[family, arm] for family in families if (family, arm) in reached]
            found = [accuracy for accuracy in tried if accuracy is not None]
            part = f", {len(found)} of {len(families)} families" if len(found) < len(families) else ""
            none = "none" if tried else ""
            table[-1].append(f"{min(found):.1%} to {max(found):.1%}{part}" if found else none)
    return markdown(["images", "network", "dense", "dense, otherwise", *titles.values()], table) if table else ""


def _settings(rows: Rows) -> str:
    """Return the settings that all runs of a network share."""
    table = []
    for place, runs in groups([row for row in rows if row["steps"]], "dataset", "network"):
        names = ("epochs", "images", "shrink", "augment", "evaluated", "reference_loss")
        cells = [", ".join(dict.fromkeys(row[name] or "all" for row in runs)) for name in names]
        table.append([*place, *cells, str(max(int(row["steps"]) for row in runs))])
    header = ["images", "network", "epochs", "of images", "shrunk by", "shifted and mirrored", "evaluated on"]
    return markdown([*header, "reference loss", "steps"], table) if table else ""


def _complete(rows: Rows, *keys: str) -> bool:
    """Check that at least two groups can be built, and all of these have the same rates and seeds."""
    runs = [{(run["lr"], run["seed"]) for run in some} for _, some in groups([r for r in rows if r["lr"]], *keys)]
    return len(runs) > 1 and all(one == runs[0] for one in runs)


def steps_by_arm(rows: Rows) -> dict[tuple[str, str], tuple[dict[str, list[float]], dict[str, list[float]]]]:
    """Return steps to the reference loss with batch normalisation, by data set and family, then by initialisation.

    The first dictionary has the steps at the rate that is best on held-out images, the second those at each
    initialisation's fastest rate, both by seed. A run that does not reach the loss counts as reaching it one step after
    its last. A family with an incomplete grid is left out.
    """
    normalised = [
        row for row in rows if row["network"] == "resnet" and row["family"] not in REFERENCES and row["steps"]
    ]
    found = {}
    for (dataset, family), runs in groups(normalised, "dataset", "family"):
        last = max(int(run["steps"]) for run in runs)
        rates = {choice["arm"]: choice["lr"] for choice in chosen(runs)}
        picked, fastest = {}, {}
        for arm, some in by(sorted(runs, key=lambda run: int(run["seed"])), "arm"):
            steps = {lr: [float(run["steps_to"] or last + 1) for run in same] for lr, same in by(some, "lr")}
            picked[arm], fastest[arm] = steps[rates[arm]], min(steps.values(), key=statistics.fmean)
        if "default" in picked and _complete(runs, "arm"):
            found[dataset, family] = picked, fastest
    return found


def _steps(rows: Rows) -> str:
    """Return steps to the reference loss with batch normalisation: the default's against the fastest rival's."""
    table, chosen_apart, fastest_apart = [], {}, {}
    for (dataset, family), (picked, fastest) in steps_by_arm(rows).items():
        cells, chosen_apart[f"{dataset} {family}"] = _against_rivals(picked)
        more, fastest_apart[f"{dataset} {family}"] = _against_rivals(fastest)
        table.append([dataset, family, *cells, *more])
    if not table:
        return ""
    one = ["steps of the default", "fewest of any other", "difference (by seed)"]
    header = ["images", "family", *one, *(f"{title}, at its fastest rate" for title in one)]
    return (
        f"{markdown(header, table)}\n\nNo other start needs fewer steps than the default, by the means, in "
        f"{_standing(chosen_apart)}; each at its fastest rate, in {_standing(fastest_apart)}."
    )


def _against_rivals(arms: dict[str, list[float]]) -> tuple[list[str], list[float]]:
    """Return mean steps of the default and of the fastest rival, and their difference, also by seed.

    Runs with the same seed see the same batches.
    """
    rival = min(arms.keys() - {"default"}, key=lambda arm: (statistics.fmean(arms[arm]), arm))
    apart = [one - other for one, other in zip(arms["default"], arms[rival], strict=True)]
    ours, theirs, difference = (statistics.fmean(steps) for steps in (arms["default"], arms[rival], apart))
    by_seed = ", ".join(f"{each:+.0f}" for each in apart)
    return [f"{ours:.1f}", f"{theirs:.1f} ({SHOWN[rival]})", f"{difference:+.1f} ({by_seed})"], apart


def _standing(apart: dict[str, list[float]]) -> str:
    """Return the number of rows where the default has the fewest steps, and the rows where every seed is slower."""
    fewest = sum(sum(differences) <= 0 for differences in apart.values())
    behind = ", ".join(name for name, differences in apart.items() if min(differences) > 0)
    return f"{fewest} of {len(apart)} rows, and the default is behind in every seed in {behind or 'none'}"
