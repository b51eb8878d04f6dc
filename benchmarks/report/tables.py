"""Rewrite the tables in README.md from benchmarks/results: python benchmarks/report.py [--check].

What stands between `<!-- table: NAME -->` and `<!-- /table -->` is made from benchmarks/results/NAME.csv by the
function registered here under that name, so no number in the README is typed by hand. `--show results FILE` prints
such a table of another file, and changes nothing.
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from atomic import write
from convergence import DENSE, DENSE_ARM, REFERENCES, chosen
from provenance import REPOSITORY, read_csv

Row = dict[str, str]
Rows = list[Row]
SECTION = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


class ReportError(Exception):
    """A table that cannot be made; the message is one sentence."""


def digits(rows: Rows) -> str:
    """Test accuracy, parameters and keep ratio of each arm, over seeds."""
    if splits := {row["split"] for row in rows} - {"test"}:
        raise ReportError(f"digits.csv holds accuracies on {', '.join(splits)} images, but the table is of test images")
    table = []
    for arm, runs in _group(rows, "arm"):
        table.append(
            [
                arm,
                _mean_and_error([100 * float(run["accuracy"]) for run in runs], " %"),
                f"{int(runs[0]['parameters']):,}",
                f"{int(runs[0]['parameters']) / int(runs[0]['dense_parameters']):.1%}",
                f"{float(runs[0]['keep_ratio']):.3f}",
                str(len(runs)),
            ]
        )
    header = ["convolutions", "test accuracy", "parameters", "of dense", "keep ratio", "seeds"]
    return f"{_markdown(header, table)}\n\n{_source(rows)}"


def _over(rows: Rows, *others: str, ours: str = "auto", **only: str) -> list[tuple[float, Row]]:
    """Our time over the fastest of some columns, with its row, where there is one and the row is as ``only`` says."""
    found = []
    for row in rows:
        rivals = [float(row[other]) for other in others if row.get(other)]
        if rivals and row[ours] and all(row[key] == value for key, value in only.items()):
            found.append((float(row[ours]) / min(rivals), row))
    return found


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
    table = [[family, *(cell(make(runs)) for make in columns.values())] for family, runs in _group(rows, "family")]
    noise = [float(run["dense_again"]) / float(run["dense"]) for run in rows]
    spread = f"{min(noise):.2f} to {max(noise):.2f}, nine in ten {_between(noise)}"
    return (
        f"{_markdown(['family', *map(str.strip, columns)], table)}\n\n"
        f"{len(rows)} rows. The same dense layer against itself: {spread}. {_source(rows)}"
    )


OWN = ("auto_again", "oracle", "reconstruct", "factorized")


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
    return _markdown(["ratio", "geometric mean", "limit of a row", "rows within", "worst row"], table)


def compiled(rows: Rows) -> str:
    """Milliseconds with and without torch.compile."""
    names = ("dense", "auto", "tednet", "tltorch")
    columns = [column for name in names for column in (name, f"compiled_{name}")]
    table = [
        [row["family"], row["mode"], *(f"{float(row[key]):.1f}" if row[key] else "" for key in columns)] for row in rows
    ]
    header = ["family", "mode"]
    header += [title for name in ("dense", "ours", "tednet", "tensorly-torch") for title in (name, "compiled")]
    return f"{_markdown(header, table)}\n\n{_source(rows)}"


def tools(rows: Rows) -> str:
    """Of how many formats the layers of each kind work with each tool, and what the others are told."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    table, told = [], {}
    for name, runs in _group(rows, "tool"):
        cells = []
        for kind in kinds:
            results = [run["result"] for run in runs if run["kind"] == kind]
            cells.append(f"{results.count('')} of {len(results)}")
        table.append([name, *cells])
        for error, bad in _group([run for run in runs if run["result"]], "result"):
            told.setdefault((name, error.split(":")[0]), []).extend(run["layer"] for run in bad)
    notes = [f"Not: {name}: {', '.join(layers)} ({error})." for (name, error), layers in told.items()]
    return "\n\n".join([_markdown(["tool", *kinds], table), *notes, _source(rows)])


def planning(rows: Rows) -> str:
    """Milliseconds of a first plan, and of one for a new size, by number of cores, over families and modes."""
    table = []
    for cores, runs in sorted(_group(rows, "cores"), key=lambda pair: int(pair[0])):
        cells = []
        for middle, most in (("first", "most"), ("new_size", "most_new_size")):
            found = statistics.median(float(run[middle]) for run in runs)
            cells.append(f"{found:.2f} ({max(float(run[most]) for run in runs):.2f})")
        table.append([cores, ", ".join(dict.fromkeys(run["family"] for run in runs)), *cells])
    return f"{_markdown(['cores', 'families', 'first', 'new size'], table)}\n\n{_source(rows)}"


def penalty(rows: Rows) -> str:
    """Time of the penalty over that of the kernel's own, by family and keep ratio, over the numbers of channels."""
    keeps = list(dict.fromkeys(row["keep"] for row in rows))
    table = []
    for family, runs in _group(rows, "family"):
        cells = []
        for keep in keeps:
            ratios = [float(run["ratio"]) for run in runs if run["keep"] == keep]
            cells.append(f"{statistics.geometric_mean(ratios):.2f} ({max(ratios):.2f})" if ratios else "")
        table.append([family, *cells])
    noise = [float(run["kernel_again"]) / float(run["kernel"]) for run in rows]
    return (
        f"{_markdown(['family', *(f'keep {keep}' for keep in keeps)], table)}\n\n"
        f"{len(rows)} rows. The kernel against itself: {min(noise):.2f} to {max(noise):.2f}. {_source(rows)}"
    )


def compress(rows: Rows) -> str:
    """Size, errors, accuracies on test images and latencies of every compressed network, and what was refused."""
    rows = [row for row in rows if row["split"] == "test"]
    if not rows:
        raise ReportError("compress.csv holds no accuracies on test images")

    def cell(value: str, form: str = ".3f") -> str:
        try:
            return format(float(value), form) if value else ""
        except ValueError:
            return "refuses"

    table, notes = [], []
    for row in rows:
        named = [row["weights"], row["format"], row["keep"]]
        count = int(row["swapped"]) + int(row["refused"])
        parameters = row["parameters"] and f"{int(row['parameters']):,}"
        share = row["parameters"] and f"{int(row['parameters']) / int(row['dense_parameters']):.1%}"
        errors = [cell(row[column]) for column in ("error", "tensorly_error", "tltorch_error")]
        befores = [cell(row[f"{who}_before"], ".2%") for who in ("accuracy", "tensorly", "tltorch")]
        seen = row["accuracy_after"] and f"{int(row['epochs']) * int(row['images']):,}"
        times = [cell(row[column], ".2f") for column in ("latency_1", "latency_32", "unfolded_1", "unfolded_32")]
        layers = f"{row['swapped']} of {count}" if count else ""
        table.append([*named, layers, parameters, share, *errors, *befores, seen])
        table[-1] += [cell(row["accuracy_after"], ".2%"), cell(row["drop"], "+.2f"), *times]
        if row["note"] and not row["drop"]:
            notes.append(f"{' '.join(named)}: {row['note']}.")
    peers = ["tensorly's", "tensorly-torch's"]
    header = ["network", "format", "keep", "layers swapped", "parameters", "of dense", "error", *peers]
    header += ["accuracy before", *peers, "images of the fine-tune", "after", "points lost"]
    header += ["time / dense, 1 image", "batch 32", "unfolded, 1 image", "batch 32"]
    return "\n\n".join([_markdown(header, table), *notes, _source(rows)])


def fits(rows: Rows) -> str:
    """Our error over the least of the peers', by family and keep ratio."""
    table = []
    for family, runs in _group(rows, "family"):
        for keep, some in _group(runs, "keep"):
            ratios = [
                float(row["error"]) / min(floats)
                for row in some
                if (floats := [*filter(None, map(_float, _peers(row)))])
            ]
            refused = sum(_float(value) is None and bool(value) for row in some for value in _peers(row))
            over = f"{math.exp(statistics.fmean(map(math.log, ratios))):.3f} ({max(ratios):.4f})" if ratios else ""
            error = statistics.fmean(float(row["error"]) for row in some)
            seconds = statistics.median(float(row["seconds"]) for row in some)
            counts = f"{len(ratios)} of {len(some)}"
            table.append([family, keep, f"{error:.3f}", over, counts])
            table[-1] += [str(refused), f"{seconds:.1f}"]
    header = ["family", "keep", "mean error", "error / best peer's", "kernels with a peer", "refusals", "seconds"]
    return f"{_markdown(header, table)}\n\n{_source(rows)}"


def _peers(row: Row) -> tuple[str, str]:
    return row["tensorly"], row["tltorch"]


def _float(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


SHOWN = {
    "default": "default", "equal split": "equal split", "scaled branches": "`scale_residual_`",
    "dead branches": "dead branches", "calibrated": "`calibrate_`", "typical": "typical",
    "exact": "normal, exact", "orthogonal white": "orthogonal, white", "white": "normal, white",
    "paper": "the paper's rule", "kaiming": "Kaiming per core", "xavier": "Xavier per core",
    "normal 0.02": "N(0, 0.02)", "tednet": "tednet's own", "tltorch normal": "tensorly-torch's normal_",
}  # fmt: skip
"""Initialisations in the order and with the names of the tables, but the constructor that leaves memory as it was."""


def _titles(rows: Rows) -> dict[str, str]:
    """Those of SHOWN that there are rows of."""
    return {init: title for init, title in SHOWN.items() if any(row["init"] == init for row in rows)}


def depth(rows: Rows) -> str:
    """Drift through all layers, forward; backward: mean and standard deviation over networks, with zero padding."""
    titles = _titles(rows)
    table, notes = [], []
    for layers, some in _group([row for row in rows if row["border"] == "zeros"], "depth"):
        # The signal has passed all layers behind the last, the gradient in front of the first.
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
        for name in ends:
            dense = float(found["dense", "default", name][name])
            gap, network = max(
                (abs(float(found[network, "default", name][name]) - dense), network)
                for network in networks
                if network != "dense"
            )
            notes.append(f"{name} behind {layers} layers {gap:.2f} ({network})")
    header = ["network", "layers", *titles.values()]
    furthest = f"Furthest from dense under the default: {', '.join(notes)}."
    return f"{_markdown(header, table)}\n\n{furthest} {rows[0]['draws']} networks each. {_source(rows)}"


def convergence(rows: Rows) -> str:
    """Test accuracies at the rates that are best on held-out images: the least and the most of families, and of each.

    And the steps to the reference loss, with batch normalisation seed by seed; and the settings.
    """
    places: dict[tuple[str, ...], dict[str, str]] = {}
    for choice in chosen(rows):
        cell = "none"
        if choice["accuracy"] is not None:
            steps = "never" if choice["steps_to"] is None else f"{choice['steps_to']:.0f} steps"
            lost = f", {choice['diverged']:.0%} diverged" if choice["diverged"] else ""
            cell = f"{100 * choice['accuracy']:.1f} ± {100 * (choice['error'] or 0):.1f} %, {steps}{lost}"
        # He's rule, of dense networks, is what the default is held against.
        arm = "default" if choice["family"] in REFERENCES and choice["arm"] == DENSE_ARM else choice["arm"]
        places.setdefault((choice["dataset"], choice["network"], choice["family"]), {})[arm] = cell
    titles = SHOWN | {"tltorch": "tensorly-torch's own"}
    titles = {arm: title for arm, title in titles.items() if any(arm in cells for cells in places.values())}
    table = [[*place, *(cells.get(arm, "") for arm in titles)] for place, cells in places.items()]
    full = _markdown(["images", "network", "family", *titles.values()], table)
    folded = f"<details><summary>Each family: accuracy, steps, runs that diverged</summary>\n\n{full}\n\n</details>"
    return "\n\n".join(filter(None, (_reached(rows, titles), _steps(rows), folded, _settings(rows), _source(rows))))


def _reached(rows: Rows, titles: dict[str, str]) -> str:
    """Accuracy by initialisation: the family with the least, and the one with the most; and of dense networks.

    Of a network whose grid is not complete there is no row.
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
    return _markdown(["images", "network", "dense", "dense, otherwise", *titles.values()], table) if table else ""


def _settings(rows: Rows) -> str:
    """What all runs of a network have in common, whatever their format and initialisation."""
    table = []
    for place, runs in groups([row for row in rows if row["steps"]], "dataset", "network"):
        names = ("epochs", "images", "shrink", "augment", "evaluated", "reference_loss")
        cells = [", ".join(dict.fromkeys(row[name] or "all" for row in runs)) for name in names]
        table.append([*place, *cells, str(max(int(row["steps"]) for row in runs))])
    header = ["images", "network", "epochs", "of images", "shrunk by", "shifted and mirrored", "evaluated on"]
    return _markdown([*header, "reference loss", "steps"], table) if table else ""


def _complete(rows: Rows, *keys: str) -> bool:
    """Whether there are two groups at least, all of the same rates and seeds, where they can be built at all."""
    runs = [{(run["lr"], run["seed"]) for run in some} for _, some in groups([r for r in rows if r["lr"]], *keys)]
    return len(runs) > 1 and all(one == runs[0] for one in runs)


def _steps(rows: Rows) -> str:
    """With batch normalisation: the default's steps to the reference loss, against the rival that needs the fewest.

    At the rate that is best on held-out images, and at each initialisation's fastest. A run that does not get there
    counts as one that does a step after its last. Of a family whose grid is not complete there is no row.
    """
    normalised = [
        row for row in rows if row["network"] == "resnet" and row["family"] not in REFERENCES and row["steps"]
    ]
    table, chosen_apart, fastest_apart = [], {}, {}
    for (dataset, family), runs in groups(normalised, "dataset", "family"):
        last = max(int(run["steps"]) for run in runs)
        rates = {choice["arm"]: choice["lr"] for choice in chosen(runs)}
        picked, fastest = {}, {}
        for arm, some in _group(sorted(runs, key=lambda run: int(run["seed"])), "arm"):
            steps = {lr: [float(run["steps_to"] or last + 1) for run in same] for lr, same in _group(some, "lr")}
            picked[arm], fastest[arm] = steps[rates[arm]], min(steps.values(), key=statistics.fmean)
        if "default" in picked and _complete(runs, "arm"):
            cells, chosen_apart[f"{dataset} {family}"] = _against_rivals(picked)
            more, fastest_apart[f"{dataset} {family}"] = _against_rivals(fastest)
            table.append([dataset, family, *cells, *more])
    if not table:
        return ""
    one = ["steps of the default", "fewest of any other", "difference (by seed)"]
    header = ["images", "family", *one, *(f"{title}, at its fastest rate" for title in one)]
    return (
        f"{_markdown(header, table)}\n\nNo other start needs fewer steps than the default, by the means, in "
        f"{_standing(chosen_apart)}; each at its fastest rate, in {_standing(fastest_apart)}."
    )


def _against_rivals(arms: dict[str, list[float]]) -> tuple[list[str], list[float]]:
    """Mean steps of the default, of the rival with the fewest, and the difference, for each seed too.

    Runs of one seed see the same batches.
    """
    rival = min(arms.keys() - {"default"}, key=lambda arm: (statistics.fmean(arms[arm]), arm))
    apart = [one - other for one, other in zip(arms["default"], arms[rival], strict=True)]
    ours, theirs, difference = (statistics.fmean(steps) for steps in (arms["default"], arms[rival], apart))
    by_seed = ", ".join(f"{each:+.0f}" for each in apart)
    return [f"{ours:.1f}", f"{theirs:.1f} ({SHOWN[rival]})", f"{difference:+.1f} ({by_seed})"], apart


def _standing(apart: dict[str, list[float]]) -> str:
    """In how many rows the default has the fewest steps, and in which it is behind in every seed."""
    fewest = sum(sum(differences) <= 0 for differences in apart.values())
    behind = ", ".join(name for name, differences in apart.items() if min(differences) > 0)
    return f"{fewest} of {len(apart)} rows, and the default is behind in every seed in {behind or 'none'}"


PUBLISHED = {
    ("resnet20", 2.5): "90.8 at 2.3x (PSTRN)",
    ("resnet20", 5.0): "88.5 at 6.1x (PSTRN)",
    ("resnet32", 2.5): "91.44 at 2.5x (PSTRN); from a trained net 93.05 at 3x (ADMM-TT), 93.29 at 3x (ADMM-Tucker)",
    ("resnet32", 5.0): "90.6 at 5x (Tensor Ring Nets; PSTRN at 5.2x)",
    ("resnet32", 13.0): "90.24 at 10.5x, 87.65 at 19x (T-Basis); 80.8 at 15x (Tensor Ring Nets)",
    ("resnet32", 1.0): "92.5 (Tensor Ring Nets)",
}
"""Test accuracies on CIFAR-10 that others came to, hundreds of epochs long, near such compressions, in per cent."""


def results(rows: Rows) -> str:
    """Test accuracy of every family by compression, with its parameters, and what others published."""
    for row in rows:
        if row["split"] != "test":
            raise ReportError(f"results.csv holds accuracies on {row['split']} images, but the table is of test images")
    chosen_rows = [row for row in rows if row["ratio"]]
    ratios = sorted({float(row["ratio"]) for row in chosen_rows} - {1.0})
    table: list[list[str]] = []
    for (dataset, model), group in groups(chosen_rows, "dataset", "model"):
        for conv, runs in _group(group, "conv"):
            cells = [_trained([run for run in runs if float(run["ratio"]) == ratio]) for ratio in ratios]
            if conv == "dense":
                cells = [_trained(runs), *[""] * (len(ratios) - 1)]
            table.append([dataset, model, conv, *cells])
        if dataset == "cifar10":
            found = [PUBLISHED.get((model, ratio), "") for ratio in ratios]
            table.append([dataset, model, "*published, long training*", *found])
    recipes = [
        f"{row['dataset']}: {row['epochs']} epochs of {row['images'] or 'all'} images, batch {row['batch_size']}"
        for row in rows
    ]
    header = ["images", "network", "convolutions", *(f"{ratio:g}x smaller" for ratio in ratios)]
    seeds = len({row["seed"] for row in rows})
    recipe = "; ".join(dict.fromkeys(recipes))
    return f"{_markdown(header, table)}\n\n{recipe}; {seeds} seed{'s' * (seeds > 1)}. {_source(rows)}"


def presets(rows: Rows) -> str:
    """Tednet's networks drawn by our solver and as tednet draws them, side by side."""
    table = []
    for (model, conv, rank), runs in groups([row for row in rows if not row["ratio"]], "model", "conv", "rank"):
        ours, theirs = ([run for run in runs if run["init"] == init] for init in ("", "tednet"))
        losses = [
            "lost"
            if any(run["note"] for run in arm)
            else _mean_and_error([float(run["train_loss"]) for run in arm], "", 3)
            for arm in (ours, theirs)
        ]
        table.append([model, f"{conv}, rank {rank}", f"{int(runs[0]['parameters']):,}", _trained(ours, False)])
        table[-1] += [_trained(theirs, False), *losses]
    header = ["network", "format", "parameters", "ours", "tednet's", "training loss, ours", "tednet's"]
    return f"{_markdown(header, table)}\n\n{_source([row for row in rows if not row['ratio']])}"


def _trained(runs: Rows, size: bool = True) -> str:
    """Mean accuracy over seeds, and the parameters; or why there is none."""
    if not runs:
        return ""
    if any(run["note"] for run in runs):
        return "cannot be built" if "cannot be" in runs[0]["note"] else "lost"
    accuracy = _mean_and_error([100 * float(run["accuracy"]) for run in runs], " %")
    return f"{accuracy} ({int(runs[0]['parameters']):,})" if size else accuracy


def throughput(rows: Rows) -> str:
    """Images per second of training, over the dense network's."""
    compressed = [row for row in rows if row["rank"]]
    columns = [name for name, _ in groups(compressed, "precision", "rank")]
    table = []
    for (network, conv), runs in groups(compressed, "network", "conv"):
        cells = {
            (run["precision"], run["rank"]): "none"
            if run["note"]
            else f"{float(run['over_dense']):.2f} ({float(run['autotuned_over_dense']):.2f})"
            for run in runs
        }
        table.append([network, conv, *(cells[column] for column in columns)])
    plain = [row for row in rows if not row["rank"]]
    dense = [f"{float(r['images_per_second']):.0f} ({r['precision']})" for r in plain if r["conv"] == "dense"]
    twins = [f"{float(row['over_dense']):.3f}" for row in plain]
    header = ["network", "convolutions", *(f"{precision}, keep {rank}" for precision, rank in columns)]
    note = (
        f"Dense: {', '.join(dense)} images per second, batch {rows[0]['batch']}; its two copies over their mean: "
        f"{', '.join(twins)}."
    )
    return f"{_markdown(header, table)}\n\n{note} {_source(rows)}"


def scale(rows: Rows) -> str:
    """What a process sends and holds, by number of processes and way."""
    table = []
    for row in rows:
        sent, state, flops = (float(row[name]) for name in ("sent", "state", "flops_per_image"))
        table.append([row["conv"], f"{int(row['parameters']):,}", row["processes"], row["way"], row["collectives"]])
        table[-1] += [f"{sent / 1e6:,.1f}", f"{state / 1e6:,.1f}", f"{flops / 1e9:.1f}"]
    header = ["convolutions", "parameters", "processes", "way", "collectives", "MB sent", "MB of state"]
    return f"{_markdown([*header, 'GFLOP per image'], table)}\n\n{rows[0]['network']}. {_source(rows)}"


def _drift(row: Row, name: str) -> str:
    if row[f"{name}_lost"] == row["draws"]:
        return "out of range"
    lost = f", {row[f'{name}_lost']} lost" if row[f"{name}_lost"] != "0" else ""
    spread = row[f"{name}_sd"] and f" ± {float(row[f'{name}_sd']):.1f}"
    return f"{float(row[name]):.1f}{spread}{lost}"


def init_scale(rows: Rows) -> str:
    """E[y^2] of white inputs over its target, by format and initialisation, over ranks; 5th to 95th percentiles."""

    def span(runs: Rows, name: str) -> str:
        low, high = ([float(row[f"{name}_{end}"]) for row in runs if row[f"{name}_{end}"]] for end in (5, 95))
        return f"{min(low):.3g} to {max(high):.3g}" if low else ""

    here = _titles(rows)
    table = []
    for family, runs in _group([row for row in rows if row["family"] != "dense"], "family"):
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
        f"{_markdown(['format', *here.values()], table)}\n\n{_markdown(header, wide)}\n\n"
        f"Ranks {ranks}; {rows[0]['draws']} draws each. {_source(rows)}"
    )


def construct(rows: Rows) -> str:
    """Milliseconds of a layer's construction, and in brackets by the paper's rule, by format and channels."""
    sizes = list(dict.fromkeys(row["channels"] for row in rows))
    dense = [statistics.median(float(row["dense"]) for row in rows if row["channels"] == size) for size in sizes]
    table = [["nn.Conv2d", *(f"{median:.1f}" for median in dense)]]
    for family, runs in _group(rows, "family"):
        cells = {run["channels"]: f"{float(run['default']):.1f} ({float(run['paper']):.1f})" for run in runs}
        table.append([family, *(cells.get(size, "") for size in sizes)])
    worst = max(rows, key=lambda row: float(row["over_limit"]))
    return (
        f"{_markdown(['format', *(f'{size} channels' for size in sizes)], table)}\n\n"
        f"The nearest to its limit is {worst['family']} of {worst['channels']} channels, with "
        f"{float(worst['over_limit']):.1%} of it. {_source(rows)}"
    )


KINDS = {"white": "white", "rectified": "rectified", "smooth": "smooth", "smooth_rectified": "smooth and rectified"}


def _row(row: Row) -> str:
    shape = f"{row['in_channels']}-{row['out_channels']}, {row['size']}x{row['size']}"
    return f"{row['family']} rank {row['rank']}, {shape}, batch {row['batch']}, {row['mode']}"


def _between(values: Sequence[float]) -> str:
    cuts = statistics.quantiles(values, n=20)
    return f"{cuts[0]:.2f} to {cuts[-1]:.2f}"


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
"""Where a table is not made from the file of its name."""


def rewrite(text: str, results: Path) -> str:
    """The text with every table made anew.

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


def _group(rows: Rows, key: str) -> Iterable[tuple[str, Rows]]:
    """Rows by the value of a column, in order of appearance."""
    return [(value, found) for (value,), found in groups(rows, key)]


def groups(rows: Rows, *keys: str) -> Iterable[tuple[tuple[str, ...], Rows]]:
    """Rows by the values of columns, in order of appearance."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups.items()


def _mean_and_error(values: Sequence[float], unit: str, digits: int = 2) -> str:
    """Mean and its standard error; of one value, no error is known."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}{unit}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}{unit}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _source(rows: Rows) -> str:
    """Every machine, version and commit that the rows name, once each."""
    columns = {"machine": "{}", "torch": "torch {}", "tnlayers": "tnlayers {}", "commit": "commit {}", "date": "{}"}
    return "; ".join(form.format(", ".join(dict.fromkeys(row[key] for row in rows))) for key, form in columns.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if README.md is stale")
    show = "print a table of a CSV file, and change nothing"
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
        print("README.md is stale: run python benchmarks/report.py")
        return 1
    if after != before:
        write(readme, after.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
