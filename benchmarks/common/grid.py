"""The command line and the results file of scripts that run a grid."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro
from rich.console import Console

from benchmarks.common.atomic import check
from benchmarks.common.errors import ConfigError, DataError, RunError
from benchmarks.common.rows import RESULTS, read_csv

Told = TypeVar("Told", bound="GridCommand")


@dataclass(frozen=True, kw_only=True)
class GridCommand:
    """Arguments of every script that runs a grid."""

    config: Path
    """YAML file with the grid."""
    data_dir: Path = Path("data")
    """Directory with the official files of Fashion-MNIST or CIFAR-10."""
    out: Path | None = None
    """CSV file. Its rows of other runs are kept. If not given, benchmarks/results/NAME.csv, where NAME is that of the
    config up to its first hyphen."""
    workers: int = 1
    """Number of runs at the same time, each in its own process."""

    @property
    def file(self) -> Path:
        """The CSV file."""
        return self.out or RESULTS / f"{self.config.stem.partition('-')[0]}.csv"


def obey(kind: type[Told], run: Callable[[Told, Console], None], arguments: Sequence[str] | None) -> None:
    """Run a grid as the command line says. An error ends the script with one sentence."""
    command = tyro.cli(kind, args=arguments)
    try:
        run(command, Console())
    except (ConfigError, DataError, RunError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted: what was done is in {command.file}; the same command goes on")


def read_rows(out: Path, columns: Sequence[str], workers: int) -> list[dict[str, str]]:
    """Return the rows that the file already has.

    Raises:
        ConfigError: the file has other columns, or `workers` is below 1.
        WriteError: the file cannot be written.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}, but it must be at least 1")
    check(out, "out")
    rows = read_csv(out) if out.exists() else []
    if any([*row][: len(columns)] != [*columns] for row in rows):
        raise ConfigError(f"out is {out}, which has other columns than this script writes: move it away")
    return rows
