"""Time training steps of compressed ResNets against the dense one: python benchmarks/measure/throughput.py.

A step is forward, backward and SGD on one batch of 32x32 images in memory. All networks of a precision run interleaved:
each once per round, in random order. A row has the median over rounds, and that of the ratio to the dense network,
which runs twice per round. `bf16` is autocast with channels last in memory. The allocator keeps freed memory: see
`common/timing.py`. The networks are rebuilt a few times, because their place in memory changes times by one or two per
cent. Each compressed network runs twice: with the planner's estimates, and after `tnlayers.autotune`.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tnlayers
from benchmarks.common.atomic import WriteError, check
from benchmarks.common.errors import ConfigError
from benchmarks.common.families import CONVOLUTIONS, MODELS
from benchmarks.common.names import DENSE
from benchmarks.common.provenance import write_csv
from benchmarks.common.rows import RESULTS
from benchmarks.common.sizes import numel
from benchmarks.common.timing import rounds
from benchmarks.training.config import Config
from tnlayers.measuring.timing import keep_freed_memory

PRECISIONS = ("float32", "bf16")
DENSE_AGAIN = f"{DENSE} again"
Row = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """Time training steps of compressed ResNets against the dense one."""

    network: Literal[tuple(MODELS)] = "resnet32"
    convs: tuple[Literal[tuple(CONVOLUTIONS)], ...] = ("cp", "tucker", "tt", "tr", "btt")
    keeps: tuple[float, ...] = (0.4, 0.2, 0.1)
    """Keep ratios of the convolutions, without the stem."""
    precisions: tuple[Literal[PRECISIONS], ...] = PRECISIONS
    batch: int = 128
    threads: int | None = None
    """CPU threads; all if not given."""
    repeats: int = 3
    """Number of times that all networks are rebuilt."""
    seconds: float = 60.0
    """Seconds of timing per precision and repeat; at least 5 rounds."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    out: Path = RESULTS / "throughput.csv"
    """CSV file."""


def step(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Callable[[], None]:
    """Return a function that runs one training step."""
    if precision == "bf16":
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def train() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return train


def measure(command: Command, precision: str) -> list[Row]:
    """Return the rows of a precision."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(command.batch, 3, 32, 32, generator=generator).to(command.device)
    labels = torch.randint(10, (command.batch,), generator=generator).to(command.device)
    rows: dict[str, Row] = {}
    refused: list[Row] = []
    configs: dict[str, Config] = {}
    for conv in (DENSE, DENSE_AGAIN, *command.convs):
        for keep in command.keeps if conv in CONVOLUTIONS and conv != DENSE else (None,):
            row = {"network": command.network, "conv": conv, "rank": keep or "", "precision": precision}
            row |= {"batch": command.batch, "parameters": "", "images_per_second": "", "over_dense": ""}
            row |= {"autotuned_over_dense": "", "note": ""}
            try:
                config = Config(model=command.network, conv=DENSE if keep is None else conv, rank=keep)
                rows[f"{conv} {keep}"] = row | {"parameters": numel(config.network(3, 10))}
            except ConfigError as error:
                refused.append(row | {"note": str(error)})
                continue
            configs[f"{conv} {keep}"] = config
    times: dict[str, list[float]] = defaultdict(list)
    orders: dict[str, Mapping[str, str]] = {}
    for _ in range(command.repeats):
        models = {name: config.network(3, 10).to(command.device) for name, config in configs.items()}
        for name, row in rows.items():
            if not row["rank"]:
                continue
            tuned = models[f"{name} tuned"] = deepcopy(models[name])
            if name not in orders:
                with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    orders[name] = tnlayers.autotune(tuned, images)
            for layer, order in orders[name].items():
                tuned.get_submodule(layer).strategy = order
        steps = {name: step(model, images, labels, precision) for name, model in models.items()}
        for warm_up in (*steps.values(), *steps.values()):
            warm_up()
        for name, found in rounds(steps, command.seconds, twins=()).items():
            times[name] += found
    dense = [*map(statistics.fmean, zip(*(times[f"{name} None"] for name in (DENSE, DENSE_AGAIN)), strict=True))]

    def over_dense(name: str) -> float:
        return round(statistics.median(d / t for d, t in zip(dense, times[name], strict=True)), 4)

    for name, row in rows.items():
        row |= {"images_per_second": round(command.batch / statistics.median(times[name]), 1)}
        row |= {"over_dense": over_dense(name)}
        if row["rank"]:
            row |= {"autotuned_over_dense": over_dense(f"{name} tuned")}
    return [*rows.values(), *refused]


def main(arguments: Sequence[str] | None = None) -> None:
    command = tyro.cli(Command, args=arguments)
    try:
        check(command.out, "out")
    except WriteError as error:
        sys.exit(f"error: {error}")
    for name in ("repeats", "batch"):
        if getattr(command, name) < 1:
            sys.exit(f"error: {name} is {getattr(command, name)}, but it must be at least 1")
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    keep_freed_memory()
    rows = [row for precision in command.precisions for row in measure(command, precision)]
    write_csv(command.out, rows, command.device)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
