"""Measure initial kernels by format, rank and initialisation: python benchmarks/measure/init_scale.py.

A row is a 3x3 convolution of 64 channels. For each of many draws, the kernel is contracted, and E[y^2] over its target
is computed from it, without sampling. Inputs are white (`white`), rectified white (`rectified`), white over channels
and constant over taps (`smooth`), or the latter rectified (`smooth_rectified`). `backward` is the same ratio for the
gradient of the input, given a white gradient of the output. `singular` is the largest singular value over that of a
dense He kernel. `effective_rank` is the exponential of the entropy of the squared singular values of the kernel as a
matrix of shape (outputs, inputs * taps). A row holds means, and 5th and 95th percentiles, over draws. tensorly-torch's
constructor leaves memory uninitialised: its rows show arbitrary memory contents.
"""

import argparse
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.common.families import FAMILIES, LayerCase
from benchmarks.common.initialisations import CHANNELS, KERNELS, UnavailableError, kernel, make
from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS
from tnlayers.models import dense_conv

RANKS = (4, 8, 16)
LARGEST = 16  # times the dense layer's parameters; larger layers are not drawn
DRAWS = 60
TAPS, SHAPE = 9, (CHANNELS, CHANNELS, 0, 1)
OUT = RESULTS / "init_scale.csv"


def measures(weight: Tensor) -> dict[str, float]:
    """Return all measures of one kernel."""
    weight = weight.double()
    white = float(weight.square().sum()) / (2 * CHANNELS)
    smooth = float(weight.sum((2, 3)).square().sum()) / (2 * CHANNELS)
    mean = float(weight.sum((1, 2, 3)).square().sum()) / (2 * CHANNELS)
    # A rectified channel with E[x^2] = 1 has the mean 1 / sqrt(pi), at all taps.
    found = {
        "white": white,
        "rectified": (1 - 1 / math.pi) * white + mean / math.pi,
        "smooth": smooth,
        "smooth_rectified": (1 - 1 / math.pi) * smooth + mean / math.pi,
        "backward": white,  # equal to `white`, as input and output channels are equal and the stride is 1
    }
    if not math.isfinite(white) or white == 0:
        return dict.fromkeys([*found, "singular", "effective_rank"], math.nan)
    values = torch.linalg.svdvals(weight.flatten(1))
    shares = values.square() / values.square().sum()
    entropy = float(-(shares * shares.clamp_min(1e-300).log()).sum())
    edge = math.sqrt(2 / (CHANNELS * TAPS)) * (math.sqrt(CHANNELS) + math.sqrt(CHANNELS * TAPS))
    return found | {"singular": float(values[0]) / edge, "effective_rank": math.exp(entropy)}


def row(family: str, rank: int, arm: str, draws: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    known = {"family": family, "rank": rank, "init": arm, "draws": draws}
    note, found = "", []
    if family != "dense" and (times := LayerCase(family, SHAPE, rank, 0, "").layer(device="meta").keep_ratio) > LARGEST:
        note, draws = f"it would have {times:.0f} times the parameters of the dense layer", 0
    for _ in range(draws):
        try:
            layer = (
                dense_conv(CHANNELS, CHANNELS, 3) if family == "dense" else make(arm, family, CHANNELS, CHANNELS, rank)
            )
        except UnavailableError as error:
            note = str(error)
            break
        found.append(measures(kernel(layer)))
    for name in ("white", "rectified", "smooth", "smooth_rectified", "backward", "singular", "effective_rank"):
        values = [each[name] for each in found if math.isfinite(each[name])]
        cuts = statistics.quantiles(values, n=20) if len(values) > 1 else [math.nan]
        for column, value in (
            (name, statistics.fmean(values) if values else math.nan), (f"{name}_5", cuts[0]), (f"{name}_95", cuts[-1]),
        ):  # fmt: skip
            known[column] = "" if math.isnan(value) else f"{value:.5g}"
    lost = sum(not math.isfinite(each["white"]) for each in found)
    return known | {"lost": lost, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--inits", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    cells = [("dense", "", "he"), *product(arguments.families, arguments.ranks, arguments.inits)]
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = [pool.submit(row, *cell, arguments.draws) for cell in cells]
        found = [job.result() for job in track(jobs, description="init_scale")]
    torch.set_num_threads(1)
    write_csv(arguments.out, found)


if __name__ == "__main__":
    main()
