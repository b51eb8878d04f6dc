"""Tables of layers that were fitted to trained kernels."""

import math
import statistics

from benchmarks.common.rows import Row, Rows
from benchmarks.report.markdown import ReportError, by, markdown, source


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
    return "\n\n".join([markdown(header, table), *notes, source(rows)])


def fits(rows: Rows) -> str:
    """Our error over the least of the peers', by family and keep ratio."""
    table = []
    for family, runs in by(rows, "family"):
        for keep, some in by(runs, "keep"):
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
    return f"{markdown(header, table)}\n\n{source(rows)}"


def _peers(row: Row) -> tuple[str, str]:
    return row["tensorly"], row["tltorch"]


def _float(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
