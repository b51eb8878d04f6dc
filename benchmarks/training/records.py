"""What a run leaves in files, and what it must not lose there."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common.atomic import WriteError, check, remove_unfinished
from benchmarks.common.errors import ConfigError
from benchmarks.common.provenance import write_csv
from benchmarks.common.rows import read_csv
from benchmarks.common.sizes import size
from benchmarks.training.config import Config


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        config: what was run.
        model: the trained network.
        history: one row per epoch, as in metrics.csv.
    """

    config: Config
    model: nn.Module
    history: Sequence[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        """Accuracy after the last epoch."""
        return self.history[-1]["accuracy"]

    @property
    def row(self) -> dict[str, Any]:
        """The run as a row of a results file."""
        last = self.history[-1]
        return {
            "arm": self.config.arm,
            **self.config.experiment,
            **size(self.model),
            **{key: value for key, value in last.items() if key not in ("epoch", "lr")},
            "seconds": round(sum(row["seconds"] for row in self.history), 1),
        }


def tensorboard() -> Any:
    """The writer for TensorBoard.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ConfigError("tensorboard is True, but it is not installed: pip install tensorboard") from error


def checkpoint(config: Config) -> Path:
    """The file that --resume goes on from."""
    return config.directory / "checkpoint.pt"


def check_new(config: Config) -> None:
    """Refuse to begin anew where a run could go on.

    Raises:
        ConfigError: there is a checkpoint, and neither resume nor overwrite.
    """
    if os.path.exists(checkpoint(config)) and not config.resume and not config.overwrite:
        raise ConfigError(
            f"{checkpoint(config)} is there from an earlier run: go on from it with --resume, keep it with another "
            "--name or --out, or remove it with --overwrite"
        )


def prepare(config: Config) -> None:
    """See to it that a run's directory can take its files, and keeps nothing that the run would mistake for its own.

    Raises:
        ConfigError: there is a checkpoint that would be lost.
        WriteError: it cannot.
    """
    check_new(config)
    for path in (checkpoint(config), config.directory / "metrics.csv"):
        check(path, "a file of the run")
    remove_unfinished(config.directory)


def check_kept(path: Path, runs: Sequence[Config]) -> None:
    """Refuse to replace the rows of other runs.

    Raises:
        ConfigError: the file has rows, and neither overwrite is asked for, nor resume by the runs that they are of.
    """
    if not path.is_file() or not path.stat().st_size or all(run.overwrite for run in runs):
        return
    mine = {(run.arm, str(run.seed)) for run in runs if run.resume}
    try:
        rows = {(row.get("arm"), row.get("seed")) for row in read_csv(path)}
    except (UnicodeDecodeError, csv.Error):  # no table
        rows = {(None, None)}
    if not rows <= mine:
        raise ConfigError(
            f"results is {path}, which has rows of other runs: choose another file, or replace them with --overwrite"
        )


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write a row per run.

    Raises:
        WriteError: the file cannot be written.
    """
    try:
        write_csv(path, [result.row for result in results])
    except WriteError as error:
        raise WriteError(
            f"{error}; the same command with --resume trains nothing again that is in a checkpoint"
        ) from error
