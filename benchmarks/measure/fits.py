"""Measure errors of fitted kernels, ours and the peers': python benchmarks/measure/fits.py --weights FILE.

Kernels come from trained CIFAR-10 ResNets and from a normal distribution. Peers are tensorly's HOOI, CP-ALS, TT-SVD and
TR-SVD, and tensorly-torch's `FactorizedConv.from_conv`, at equal ranks, called as their users do. A row is a kernel, a
family and a keep ratio.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import nn

from benchmarks.common.atomic import WriteError, check
from benchmarks.common.errors import ConfigError
from benchmarks.common.families import ALL_FAMILIES
from benchmarks.common.names import network_name
from benchmarks.common.peer_fits import PEERS, quietly
from benchmarks.common.provenance import write_csv
from benchmarks.common.rows import RESULTS
from benchmarks.common.trained_networks import read_network

RANDOM = ((64, 64, 3), (32, 16, 3))  # out, in, kernel
SEEDS = (0, 1)  # of peers with a random start; the better result counts


@dataclass(frozen=True)
class Command:
    """Fit kernels with this library and its peers."""

    weights: tuple[Path, ...] = ()
    """Files with trained networks' weights."""
    every: int = 4
    """Use every n-th convolution of a network, without the stem."""
    families: tuple[str, ...] = ("tucker", "cp", "tt-chain", "tr")
    keeps: tuple[float, ...] = (0.1, 0.25, 0.5)
    threads: int | None = None
    out: Path = RESULTS / "fits.csv"


def convolutions(command: Command) -> Iterator[tuple[str, nn.Conv2d]]:
    """Yield named convolutions that hold the kernels."""
    for path in command.weights:
        named = [(name, module) for name, module in read_network(path).named_modules() if isinstance(module, nn.Conv2d)]
        yield from ((f"{network_name(path)}.{name}", conv) for name, conv in named[1 :: command.every])
    for out, inner, size in RANDOM:
        conv = nn.Conv2d(inner, out, size, bias=False)
        nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
        yield f"random {out}x{inner}x{size}x{size}", conv


def best(peer: str, family: str, conv: nn.Conv2d, ranks: list[int]) -> Any:
    """Return a peer's smallest relative error, or its error message. It is empty if the peer has no such family."""
    weight, found = conv.weight.detach(), []
    try:
        with quietly():
            for seed in SEEDS:
                kernels = PEERS[peer](family, conv, ranks, seed)
                found += [float((kernel - weight).norm() / weight.norm()) for kernel in kernels]
    except Exception as error:
        return " ".join(str(error).split())
    return round(min(found), 6) if found else ""


def measure(name: str, conv: nn.Conv2d, family: str, keep: float) -> dict[str, Any]:
    """Return a row."""
    layer_type, options = ALL_FAMILIES[family]
    start = time.perf_counter()
    layer = layer_type.from_conv(conv, rank=keep, **options)
    seconds = round(time.perf_counter() - start, 2)
    error = float((layer.weight.detach() - conv.weight.detach()).norm() / conv.weight.detach().norm())
    ranks = [*layer.rank.values()]
    row = {"kernel": name, "family": family, "keep": keep, "ranks": " ".join(map(str, ranks))}
    return (
        row | {"error": round(error, 6), "seconds": seconds} | {peer: best(peer, family, conv, ranks) for peer in PEERS}
    )


def main() -> None:
    try:
        command = tyro.cli(Command)
        check(command.out, "out")
        if command.threads is not None:
            torch.set_num_threads(command.threads)
        every = [
            (name, conv, family, keep)
            for name, conv in convolutions(command)
            for family in command.families
            for keep in command.keeps
        ]
    except (ConfigError, WriteError) as error:
        sys.exit(f"error: {error}")
    rows = [measure(*each) for each in track(every, "fits", console=Console(stderr=True))]
    write_csv(command.out, rows)


if __name__ == "__main__":
    main()
