"""Tables of trained networks, and of the cost of training."""

from itertools import takewhile

from benchmarks.common.names import DENSE
from benchmarks.common.rows import Rows, groups
from benchmarks.report.markdown import ReportError, by, markdown, mean_and_error, source
from benchmarks.report.published import published


def digits(rows: Rows) -> str:
    """Return test accuracy over seeds, parameters and keep ratio of each arm."""
    if splits := {row["split"] for row in rows} - {"test"}:
        raise ReportError(f"digits.csv holds accuracies on {', '.join(splits)} images, but the table is of test images")
    table = []
    for arm, runs in by(rows, "arm"):
        table.append(
            [
                arm,
                mean_and_error([100 * float(run["accuracy"]) for run in runs], " %"),
                f"{int(runs[0]['parameters']):,}",
                f"{int(runs[0]['parameters']) / int(runs[0]['dense_parameters']):.1%}",
                f"{float(runs[0]['keep_ratio']):.3f}",
                str(len(runs)),
            ]
        )
    header = ["convolutions", "test accuracy", "parameters", "of dense", "keep ratio", "seeds"]
    return f"{markdown(header, table)}\n\n{source(rows)}"


def rank_schedule(rows: Rows) -> str:
    """Return test accuracy of ranks that fall during training and of fixed ranks, at equal final parameters."""
    if splits := {row["split"] for row in rows} - {"test"}:
        raise ReportError(f"rank_schedule.csv holds accuracies on {', '.join(splits)} images, but the table is of test")
    table = []
    for (dataset, model, arm), runs in groups(rows, "dataset", "model", "arm"):
        counts = sorted({int(run["parameters"]) for run in runs})
        table.append([dataset, model, arm, mean_and_error([100 * float(run["accuracy"]) for run in runs], " %")])
        table[-1] += [" to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))]
        table[-1] += [
            mean_and_error([float(run["train_loss"]) for run in runs], "", 3),
            runs[0]["epochs"],
            str(len(runs)),
        ]
    header = ["images", "network", "convolutions", "test accuracy", "parameters at the end", "training loss"]
    return f"{markdown([*header, 'epochs', 'seeds'], table)}\n\n{source(rows)}"


def recipe(rows: Rows) -> str:
    """Return the accuracy on held-out training images of the recipes that were tried."""
    if "test" in {row["split"] for row in rows}:
        raise ReportError("recipe.csv holds accuracies on test images, but the table is of held-out training images")
    table = []
    for row in sorted(rows, key=lambda row: row["conv"]):
        decay = f"{row['weight_decay']} on {'kernels' if row['conv'] == DENSE else row['decay']}"
        rate = f"{row['lr']}, matched" if row["rates"] == "matched" else row["lr"]
        table.append(
            [row["conv"], row["rank"], rate, decay, row["label_smoothing"], f"{100 * float(row['accuracy']):.2f} %"]
        )
        table[-1] += [f"{int(row['parameters']):,}"]
    header = ["convolutions", "rank", "learning rate", "weight decay", "label smoothing", "accuracy on held-out images"]
    settings = f"{rows[0]['model']}, {rows[0]['epochs']} epochs, batch {rows[0]['batch_size']}, 1 seed."
    return f"{markdown([*header, 'parameters'], table)}\n\n{settings} {source(rows)}"


ARM = ("arm", "ratio", "dataset", "model", "conv", "rank", "seed")  # columns of results.csv that are not the recipe


def check_recipe(rows: Rows) -> None:
    """Check that results are of test images and of one recipe, so that they may stand side by side.

    Raises:
        ReportError: they are not.
    """
    settings = [name for name in takewhile(lambda name: name != "parameters", rows[0]) if name not in ARM]
    for name in settings:
        values = [*dict.fromkeys(row[name] for row in rows)]
        if len(values) > 1:
            raise ReportError(f"results.csv holds rows of several recipes ({name} is {', '.join(values)})")
    if rows[0]["split"] != "test":
        raise ReportError(f"results.csv holds accuracies on {rows[0]['split']} images, but the table is of test images")


def results(rows: Rows) -> str:
    """Return test accuracy and parameters of every family by compression, and published accuracies."""
    check_recipe(rows)
    ratios = sorted({float(row["ratio"]) for row in rows})
    table: list[list[str]] = []
    for (dataset, model), group in groups(rows, "dataset", "model"):
        for conv, runs in by(group, "conv"):
            cells = [_trained([run for run in runs if float(run["ratio"]) == ratio]) for ratio in ratios]
            table.append([dataset, model, conv, *cells])
    recipes = [
        f"{row['dataset']}: {row['epochs']} epochs of {row['images'] or 'all'} images, batch {row['batch_size']}"
        for row in rows
    ]
    columns = ["whole" if ratio == 1 else f"{ratio:g}x smaller" for ratio in ratios]
    header = ["images", "network", "convolutions", *columns]
    recipe = "; ".join(dict.fromkeys(recipes))
    others = published([*dict.fromkeys(row["model"] for row in rows if row["dataset"] == "cifar10")])
    return "\n\n".join(filter(None, [markdown(header, table), f"{recipe}. {source(rows)}", others]))


def _trained(runs: Rows) -> str:
    """Return the mean accuracy over seeds, the parameters and the number of seeds, or why there is no accuracy."""
    if not runs:
        return ""
    if any(run["note"] for run in runs):
        return "cannot be built" if "cannot be" in runs[0]["note"] else "lost"
    accuracy = mean_and_error([100 * float(run["accuracy"]) for run in runs], " %")
    seeds = f"; {len(runs)} seeds" if len(runs) > 1 else ""
    return f"{accuracy} ({int(runs[0]['parameters']):,}{seeds})"


def throughput(rows: Rows) -> str:
    """Return images per second of training over the dense network's."""
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
    return f"{markdown(header, table)}\n\n{note} {source(rows)}"


def loop_rate(rows: Rows) -> str:
    """Return images per second of the training program over those of a bare loop."""
    loops = [name for name in dict.fromkeys(row["loop"] for row in rows) if name != "bare"]
    table = []
    for (network, conv), runs in groups(rows, "network", "conv"):
        found = {run["loop"]: run for run in runs}
        table.append([network, conv, f"{float(found['bare']['images_per_second']):.0f}"])
        table[-1] += [f"{float(found[loop]['over_bare']):.2f}" for loop in loops]
    titles = {"plain": "without average of weights and decay of kernels", "whole": "by the whole recipe"}
    header = ["network", "convolutions", "images per second of a bare loop", *(titles[loop] for loop in loops)]
    settings = f"Batch {rows[0]['batch']}, {rows[0]['precision']}; medians over {rows[0]['rounds']} rounds."
    return f"{markdown(header, table)}\n\n{settings} {source(rows)}"


def scale(rows: Rows) -> str:
    """Return the bytes that a process sends and holds, by number of processes and way."""
    table = []
    for row in rows:
        sent, state, flops = (float(row[name]) for name in ("sent", "state", "flops_per_image"))
        table.append([row["conv"], f"{int(row['parameters']):,}", row["processes"], row["way"], row["collectives"]])
        table[-1] += [f"{sent / 1e6:,.1f}", f"{state / 1e6:,.1f}", f"{flops / 1e9:.1f}"]
    header = ["convolutions", "parameters", "processes", "way", "collectives", "MB sent", "MB of state"]
    return f"{markdown([*header, 'GFLOP per image'], table)}\n\n{rows[0]['network']}. {source(rows)}"
