"""Time the training program against a bare loop over the same network: python benchmarks/measure/loop_rate.py.

The bare loop has one batch in memory, and only the forward pass, the backward pass and SGD. The program draws batches,
shifts and mirrors images, counts losses and hits, and does what its recipe says: `plain` is the recipe without its
average of weights and with decay on cores, `whole` is the recipe itself. All loops run interleaved, 20 steps at a time.
A row has medians over rounds. Images are random.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.atomic import WriteError, check
from benchmarks.common.errors import ConfigError
from benchmarks.common.names import DENSE
from benchmarks.common.provenance import write_csv
from benchmarks.common.rows import RESULTS
from benchmarks.common.timing import rounds
from benchmarks.training.config import Config
from benchmarks.training.data.in_memory import ImageData
from benchmarks.training.loop import Loop, set_format

STEPS, IMAGES, CLASSES = 20, 12800, 10
MANY = 10**6  # epochs: the rate of learning stays near zero
Row = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """Time the training program against a bare loop over the same network."""

    config: Path = Path("configs/recipe/tr-0.2-kernels.yaml")
    """The preset of train.py whose recipe and network are timed, also with dense convolutions."""
    threads: int = 1
    seconds: float = 120.0
    """Seconds of timing; at least 5 rounds."""
    out: Path = RESULTS / "loop_rate.csv"
    """CSV file."""


def bare(config: Config, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that runs STEPS steps on one batch."""
    model = config.network(images.shape[1], CLASSES)
    if config.channels_last:
        set_format(model, torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, config.momentum, weight_decay=1e-4, nesterov=True)

    def train() -> None:
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.amp):
                logits = model(images)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    return train


def measure(preset: Config, seconds: float) -> list[Row]:
    """Return the rows: one per loop and kind of convolution."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    data = ImageData(images, labels, images, labels, shift=4, flip=True)
    batch, steps = preset.batch_size, {}
    same = {"device": "cpu", "epochs": MANY, "images": STEPS * batch}
    rows: dict[str, Row] = {}
    for conv, rank in dict.fromkeys([(DENSE, None), (preset.conv, preset.rank)]):
        whole = replace(preset, conv=conv, rank=rank, **same)
        plain = replace(whole, ema=None, decay="cores")
        loops = {"bare": bare(whole, images[:batch] / 128 - 1, labels[:batch])}
        for name, config in (("plain", plain), ("whole", whole)):
            loops[name] = Loop(config, data, config.network(3, CLASSES)).epoch
        for name, loop in loops.items():
            steps[f"{conv} {name}"] = loop
            rows[f"{conv} {name}"] = {
                "network": preset.model, "conv": conv, "rank": whole.rank or "", "loop": name, "batch": batch,
                "precision": "bf16" if whole.amp else "float32",
            }  # fmt: skip
    for loop in steps.values():
        loop()
    times = rounds(steps, seconds, twins=())
    for name, row in rows.items():
        base = times[f"{row['conv']} bare"]
        row |= {"images_per_second": round(STEPS * batch / statistics.median(times[name]), 1)}
        row |= {"over_bare": round(statistics.median(b / t for b, t in zip(base, times[name], strict=True)), 4)}
        row |= {"rounds": len(base)}
    return [*rows.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    command = tyro.cli(Command, args=arguments)
    try:
        check(command.out, "out")
        if command.threads < 1:
            raise ConfigError(f"threads is {command.threads}, but it must be at least 1")
        torch.set_num_threads(command.threads)
        rows = measure(Config.from_yaml(command.config), command.seconds)
    except (ConfigError, WriteError) as error:
        sys.exit(f"error: {error}")
    write_csv(command.out, rows, "cpu")
    table = Table("convolutions", "loop", "images per second", "over bare")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("conv", "loop", "images_per_second", "over_bare")))
    Console().print(table)


if __name__ == "__main__":
    main()
