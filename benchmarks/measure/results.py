"""Train compressed ResNets of equal sizes with one recipe.

    python benchmarks/measure/results.py --config configs/results-cifar10.yaml --data-dir DIR --workers 2

A row is a network, the format of its convolutions, a compression and a seed, trained and evaluated as by train.py.
Compression is the parameters of the dense network over those of the whole network. A run that cannot be built, or
diverges, has a row with a note.

Runs that have a row with the same settings are skipped, so the same command continues a stopped grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import chosen, pool
from benchmarks.common.errors import BuildError, ConfigError, DivergenceError
from benchmarks.common.families import CONVOLUTIONS, MODELS
from benchmarks.common.grid import GridCommand, obey, read_rows
from benchmarks.common.names import DENSE
from benchmarks.common.provenance import provenance, write_csv
from benchmarks.common.sizes import keep_of
from benchmarks.training.config import Config
from benchmarks.training.data.in_memory import DATASETS, cached_load
from benchmarks.training.run import Run

Row = dict[str, Any]
IDENTITY = ("ratio", *Config().experiment)
MEASURED = (
    "parameters", "dense_parameters", "keep_ratio", "train_loss", "train_accuracy", "loss", "accuracy", "precision",
    "seconds", "note",
)  # fmt: skip
COLUMNS = ("arm", *IDENTITY, *MEASURED)


@dataclass(frozen=True, kw_only=True)
class Grid(Config):
    """The product of networks, families, compressions and seeds that is run, and their common recipe."""

    dataset: Literal[tuple(DATASETS)] = "cifar10"
    networks: tuple[Literal[tuple(MODELS)], ...] = ()
    families: tuple[Literal[tuple(CONVOLUTIONS)], ...] = ()
    ratios: tuple[float, ...] = ()
    """Parameters of the dense network over those of the compressed one."""
    seeds: tuple[int, ...] = (0,)
    threads: int | None = 1

    def __post_init__(self) -> None:
        """Check that all runs are valid."""
        for name, holds, rule in (
            ("networks", self.networks, "one at least is needed"),
            ("families", self.families, "one at least is needed"),
            ("ratios", self.ratios or {*self.families} <= {DENSE}, "one at least is needed"),
            ("ratios", all(ratio > 1 for ratio in self.ratios), "they must be above 1"),
            ("ratios", len({*self.ratios}) == len(self.ratios), "none may be there twice"),
            ("seeds", len({*self.seeds}) == len(self.seeds) > 0, "one at least is needed, and none twice"),
        ):
            if not holds:
                raise ConfigError(f"{name} is {[*getattr(self, name)]}, but {rule}")
        for name in ("model", "conv", "rank", "init", "name", "seed", "split"):
            if getattr(self, name) != getattr(Config, name):
                raise ConfigError(f"{name} is {getattr(self, name)}, but the grid sets it")
        super().__post_init__()

    def arms(self) -> Iterator[tuple[float, Config]]:
        """Yield compressions and configurations. `sized` sets the rank of those with a compression later."""
        same = {field.name: getattr(self, field.name) for field in fields(Config)}
        for seed, model in product(self.seeds, self.networks):
            for family in self.families:
                for ratio in [1.0] if family == DENSE else self.ratios:
                    yield ratio, Config(**same | {"model": model, "conv": family, "seed": seed})


def sized(ratio: float, config: Config, channels: int, num_classes: int) -> Config:
    """Return the configuration with this compression: one keep ratio for all convolutions but the stem."""
    if config.conv == DENSE:
        return config
    with torch.device("meta"):
        dense = replace(config, conv=DENSE).network(channels, num_classes)
    return replace(config, rank=keep_of(dense, ratio), name=f"{config.conv}-{ratio:g}x")


def measure(arm: tuple[float, Config]) -> Row:
    """Return the row of a run."""
    ratio, config = arm
    row = dict.fromkeys(COLUMNS, "") | {"arm": config.arm, "ratio": ratio} | config.experiment
    try:
        data = cached_load(config.dataset, config.data_dir, config.download)
        config = sized(ratio, config, data.channels, data.num_classes)
        row |= {"arm": config.arm}
        found = Run(config, data).finish().row
    except (BuildError, DivergenceError) as error:
        return row | {"note": " ".join(str(error).split())}
    return row | {name: found[name] for name in MEASURED if name in found} | {"rank": found["rank"]}


def identity(row: Row) -> tuple[str, ...]:
    """Return the values that identify a run. The rank is left out: it follows from the compression."""
    return chosen.identity(row, [name for name in IDENTITY if name != "rank"])


@dataclass(frozen=True, kw_only=True)
class Command(GridCommand):
    """Train compressed ResNets of equal sizes with one recipe."""


def run(command: Command, console: Console) -> None:
    """Measure the runs that are not yet in the file.

    Raises:
        ConfigError, DataError: the grid cannot be run, or the file cannot be written.
    """
    grid = Grid.from_yaml(command.config)
    rows: list[Row] = [*read_rows(command.file, COLUMNS, command.workers)]
    runs = Path("runs") / "results"
    same = {"data_dir": command.data_dir, "out": runs, "overwrite": not grid.resume}
    arms = [(ratio, replace(arm, **same)) for ratio, arm in grid.arms()]
    cached_load(grid.dataset, command.data_dir, grid.download)
    there = {identity(row) for row in rows}
    wanted = [identity({"ratio": ratio, **arm.experiment}) for ratio, arm in arms]
    torch.set_num_threads(grid.threads or torch.get_num_threads())
    todo = [arm for arm, name in zip(arms, wanted, strict=True) if name not in there]

    def keep(row: Row) -> None:
        rows.append({name: "" if row[name] is None else str(row[name]) for name in COLUMNS} | provenance(grid.device))
        write_csv(command.file, rows, grid.device)

    pool.measure_all(measure, todo, command.workers, keep, console)
    console.print(table([row for row in rows if identity(row) in {*wanted}]))


def table(rows: Sequence[Row]) -> Table:
    """Return a table with one line per run."""
    names = ("model", "arm", "seed", "parameters", "train_loss", "accuracy", "seconds", "note")
    table = Table(*names)
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    obey(Command, run, arguments)


if __name__ == "__main__":
    main()
