"""Tables of layers fitted to trained kernels."""

from pandas import to_numeric

from benchmarks.common.rows import Rows
from benchmarks.report.markdown import ReportError, markdown, mean_and_worst, numbers, source
from benchmarks.report.published import published


def compress(rows: Rows) -> str:
    """Return sizes, errors, test accuracies and latencies of all compressed networks, and the refusals."""
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
    header = ["network", "format", "keep", "layers swapped", "parameters", "of dense"]
    header += ["error", *(f"{peer} error" for peer in peers)]
    header += ["accuracy before", *(f"{peer} before" for peer in peers), "images of the fine-tune", "after"]
    header += [
        "points lost",
        *(f"{way} / dense, {size}" for way in ("time", "unfolded") for size in ("1 image", "batch 32")),
    ]
    return "\n\n".join([markdown(header, table), *notes, source(rows)])


LONG = 10  # epochs from which on a fine-tune is compared with published ones


def tuned(rows: Rows) -> str:
    """Return accuracies of the networks that were fine-tuned for long, and published ones."""
    rows = [row for row in rows if row["split"] == "test" and int(row["epochs"]) >= LONG and row["accuracy_after"]]
    if not rows:
        raise ReportError(f"compress.csv holds no fine-tune of {LONG} epochs on test images")
    table = []
    for row in rows:
        smaller = int(row["dense_parameters"]) / int(row["parameters"])
        table.append([row["weights"], row["format"], f"{smaller:.1f}x", f"{int(row['parameters']):,}"])
        table[-1] += [f"{float(row[f'accuracy_{when}']):.2%}" for when in ("dense", "before", "after")]
        hints = f"{float(row['hint']):g}, {'fading' if row['hint_schedule'] == 'linear' else 'constant'}"
        table[-1] += [f"{float(row['drop']):+.2f}", row["epochs"], row["lr"], hints]
    header = ["network", "format", "smaller", "parameters", "dense", "before the fine-tune", "after", "points lost"]
    others = published([*dict.fromkeys(row["weights"] for row in rows)])
    return "\n\n".join([markdown([*header, "epochs", "learning rate", "hints"], table), source(rows), others])


def fits(rows: Rows) -> str:
    """Return our error over the smallest of the peers', by family and keep ratio."""
    frame = numbers(rows, "error", "seconds")
    told = frame[["tensorly", "tltorch"]]  # a number, the text of a refusal, or empty
    errors = told.apply(to_numeric, errors="coerce")
    frame["ratio"] = frame["error"] / errors.min(axis=1)
    frame["refusals"] = (errors.isna() & (told != "")).sum(axis=1)
    table = [
        [
            family,
            keep,
            f"{some['error'].mean():.3f}",
            mean_and_worst(some["ratio"].dropna(), 3, 4),
            f"{some['ratio'].count()} of {len(some)}",
            f"{some['refusals'].sum()}",
            f"{some['seconds'].median():.1f}",
        ]
        for family, runs in frame.groupby("family", sort=False)
        for keep, some in runs.groupby("keep", sort=False)
    ]
    header = ["family", "keep", "mean error", "error / best peer's", "kernels with a peer", "refusals", "seconds"]
    return f"{markdown(header, table)}\n\n{source(rows)}"


def encoder(rows: Rows) -> str:
    """Return cosines of embeddings to the original ones, and how often a text is found, by format and keep ratio."""
    table = []
    for row in rows:
        lost, least = 1 - float(row["cosine"]), row["svd_cosine"]
        table.append(
            [
                row["format"],
                row["keep"],
                row["ranks"],
                {"True": "inputs", "False": "weights"}.get(row["calibrated"], ""),
                f"{int(row['parameters']):,}",
                f"{int(row['parameters']) / int(row['dense_parameters']):.1%}",
                f"{float(row['cosine']):.3f}",
                "" if not least else f"{lost:.3f}",
                "" if not least else f"{lost / (1 - float(least)):.2f}",
                f"{float(row['found']):.1%}",
            ]
        )
    header = ["format", "keep", "of each", "fitted to", "parameters of the linear layers", "of dense"]
    header += ["cosine", "cosine lost", "lost / SVD's", "texts found"]
    return f"{markdown(header, table)}\n\n{source(rows)}"
