"""Follow the signal and the gradient through 50 and 100 plain layers: python benchmarks/measure/depth.py.

A network is a stack of 3x3 convolutions with 64 channels on 16x16 positions, each followed by a ReLU, without
normalisation and bias. A row is a format, an initialisation, a border, a depth and a layer. It holds the mean and the
standard deviation, over networks, of two natural logarithms. `forward` is that of E[h^2] after the layer over that of
the white input. `backward` is that of E[g^2] of the gradient before the layer over that of the white gradient at the
output. The border `zeros` is zero padding of 1. `circular` is circular padding: it has no border effect, and without
any padding no position would remain after 50 layers.

`calibrated` is `tnlayers.calibrate_` on the same batch, after the default. Networks with values outside float32's range
are counted in `lost`, and excluded from the means.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import tnlayers
from benchmarks.common.initialisations import CHANNELS, KERNELS, UnavailableError, kernel, make
from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS
from tnlayers.models import dense_conv

SIZE, IMAGES = 16, 4
DRAWS, EVERY = 24, 10  # number of networks, and of layers between two rows
DEPTHS = (50, 100)
BORDERS = {"zeros": "constant", "circular": "circular"}  # values: modes of F.pad
NETWORKS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "dense": ("dense", None, {}),
    "CP r32": ("cp", 32, {}),
    "Tucker 16,16": ("tucker", 16, {}),
    "TT r8": ("tt", 8, {}),
    "TR r6": ("tr", 6, {}),
    "TR r10": ("tr", 10, {}),
    "BTT n4 r4": ("btt", 4, {"blocks": 4}),
}
"""Formats at the ranks of the design, and a dense network with He's initialisation."""
OUT = RESULTS / "depth.csv"


def convolution(network: str, arm: str) -> Any:
    family, rank, options = NETWORKS[network]
    if family == "dense":
        return dense_conv(CHANNELS, CHANNELS, 3, padding=1, bias=False)
    return make(arm, family, CHANNELS, CHANNELS, rank, **options)


def calibrated(weights: list[Tensor], border: str, x: Tensor) -> list[Tensor]:
    """Return kernels rescaled by ``tnlayers.calibrate_``. Dense convolutions hold them, to set the border's padding."""
    convolutions = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode=border, bias=False) for _ in weights]
    for plain, weight in zip(convolutions, weights, strict=True):
        plain.weight.copy_(weight)
    model = nn.Sequential(*(part for each in convolutions for part in (each, nn.ReLU())))
    tnlayers.calibrate_(model, x, target=2 * float(x.square().mean()))
    return [each.weight.detach() for each in convolutions]


@torch.no_grad()
def follow(network: str, arm: str, seed: int) -> dict[tuple[int, str], tuple[list[float], list[float]]]:
    """Return, by depth and border, the forward logarithms after every layer and the backward ones before it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    x = torch.randn(IMAGES, CHANNELS, SIZE, SIZE)
    rule = "default" if arm == "calibrated" else arm
    weights = [kernel(convolution(network, rule)) for _ in range(max(DEPTHS))]
    drawn, found = torch.get_rng_state(), {}
    for border, mode in BORDERS.items():
        here = calibrated(weights, border, x) if arm == "calibrated" else weights
        torch.set_rng_state(drawn)  # the same gradient for both borders
        for depth in DEPTHS:
            found[depth, border] = passes(here[:depth], x, mode)
    return found


def passes(weights: list[Tensor], x: Tensor, mode: str) -> tuple[list[float], list[float]]:
    """Run both passes through a stack of convolutions, each followed by a ReLU, and return their logarithms."""

    def convolve(h: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.pad(h, (1, 1, 1, 1), mode=mode), weight)

    def log(value: Tensor, start: Tensor) -> float:
        share = float(value.double().square().mean() / start.double().square().mean())
        return math.log(share) if math.isfinite(share) and share > 0 else math.nan

    h, masks, forward, backward = x, [], [], []
    for weight in weights:
        h = convolve(h, weight)
        masks.append(h > 0)
        h = F.relu(h)
        forward.append(log(h, x))
    gradient = top = torch.randn_like(h)
    for weight, mask in zip(reversed(weights), reversed(masks), strict=True):
        # The transposed convolution equals a convolution with the flipped and transposed kernel.
        gradient = convolve(gradient * mask, weight.flip(2, 3).transpose(0, 1))
        backward.append(log(gradient, top))
    return forward, backward[::-1]


def summary(values: Sequence[float], name: str) -> dict[str, Any]:
    found = [value for value in values if not math.isnan(value)]
    spread = statistics.stdev(found) if len(found) > 1 else math.nan
    return {
        name: round(statistics.fmean(found), 4) if found else "",
        f"{name}_sd": "" if math.isnan(spread) else round(spread, 4),
        f"{name}_lost": len(values) - len(found),
    }


def rows(network: str, arm: str, draws: int) -> list[dict[str, Any]]:
    """Return one row per depth, border and shown layer, or a single row with a note if a peer has no such layer."""
    known = {"network": network, "init": arm, "draws": draws}
    try:
        runs = [follow(network, arm, seed) for seed in range(draws)]
    except UnavailableError as error:
        none = {"border": "", "depth": "", "layer": ""}
        return [known | none | summary([], "forward") | summary([], "backward") | {"note": str(error)}]
    found = []
    for depth, border in product(DEPTHS, BORDERS):
        for layer in (1, *range(EVERY, depth + 1, EVERY)):
            here = {"border": border, "depth": depth, "layer": layer}
            for number, name in enumerate(("forward", "backward")):
                here |= summary([run[depth, border][number][layer - 1] for run in runs], name)
            found.append(known | here | {"note": ""})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--inits", nargs="+", choices=(*KERNELS, "calibrated"), default=[*KERNELS, "calibrated"])
    parser.add_argument("--draws", type=int, default=DRAWS, help="networks per row")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    every = [
        (network, arm)
        for network, arm in product(arguments.networks, arguments.inits)
        if network != "dense" or arm in ("default", "calibrated")
    ]
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = [pool.submit(rows, *cell, arguments.draws) for cell in every]
        found = [row for job in track(jobs, description="depth") for row in job.result()]
    torch.set_num_threads(1)
    write_csv(arguments.out, found)


if __name__ == "__main__":
    main()
