"""Files of a run, and checks that they are not lost."""

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
        config: the configuration of the run.
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
    """Return the module torch.utils.tensorboard.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        return import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ConfigError("tensorboard is True, but it is not installed: pip install tensorboard") from error


def checkpoint(config: Config) -> Path:
    """Return the file that --resume continues from."""
    return config.directory / "checkpoint.pt"


def check_new(config: Config) -> None:
    """Check that a run does not start over where it could continue.

    Raises:
        ConfigError: there is a checkpoint, and neither resume nor overwrite is set.
    """
    if os.path.exists(checkpoint(config)) and not config.resume and not config.overwrite:
        raise ConfigError(
            f"{checkpoint(config)} is there from an earlier run: go on from it with --resume, keep it with another "
            "--name or --out, or remove it with --overwrite"
        )


def prepare(config: Config) -> None:
    """Check that a run can write its files, and remove unfinished files from its directory.

    Raises:
        ConfigError: a checkpoint would be lost.
        WriteError: a file cannot be written.
    """
    check_new(config)
    for path in (checkpoint(config), config.directory / "metrics.csv"):
        check(path, "a file of the run")
    remove_unfinished(config.directory)


def check_kept(path: Path, runs: Sequence[Config]) -> None:
    """Check that no rows of other runs would be replaced.

    Raises:
        ConfigError: the file has rows of runs that are not resumed, and overwrite is not set.
    """
    if not path.is_file() or not path.stat().st_size or all(run.overwrite for run in runs):
        return
    mine = {(run.arm, str(run.seed)) for run in runs if run.resume}
    try:
        rows = {(row.get("arm"), row.get("seed")) for row in read_csv(path)}
    except (UnicodeDecodeError, csv.Error):  # not a table
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
