"""Many runs beside each other, in processes of their own, and the file that their rows go to."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TypeVar

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from atomic import check
from config import ConfigError
from data import DataError
from provenance import read_csv

Run = TypeVar("Run")
Found = TypeVar("Found")
Told = TypeVar("Told", bound="Command")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every script that runs a grid is told."""

    config: Path
    """YAML file with the grid."""
    data_dir: Path = Path("data")
    """Directory with the official files of Fashion-MNIST or CIFAR-10."""
    out: Path
    """CSV file; its rows of other runs stay."""
    workers: int = 1
    """Runs beside each other, in processes of their own."""


def obey(kind: type[Told], run: Callable[[Told, Console], None], arguments: Sequence[str] | None) -> None:
    """Run a grid as the command line says; what cannot be run ends with one sentence."""
    command = tyro.cli(kind, args=arguments)
    try:
        run(command, Console())
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted: what was done is in {command.out}; the same command goes on")


def attend_parent() -> None:
    """In a worker: leave interruptions to the parent, and end when it does, however that comes about."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def read_rows(out: Path, columns: Sequence[str], workers: int) -> list[dict[str, str]]:
    """What a file of rows has so far.

    Raises:
        ConfigError: it cannot take more, or there are no workers.
        WriteError: it cannot be written.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}, but it must be at least 1")
    check(out, "out")
    rows = read_csv(out) if out.exists() else []
    if any([*row][: len(columns)] != [*columns] for row in rows):
        raise ConfigError(f"out is {out}, which has other columns than this script writes: move it away")
    return rows


def measure_all(
    measure: Callable[[Run], Found], runs: Sequence[Run], workers: int, keep: Callable[[Found], None], console: Console
) -> None:
    """Measure runs, in this process or in several, and pass each on as soon as it is done, with a bar."""
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("runs", total=len(runs))
        for found in _measured(measure, runs, workers):
            keep(found)
            progress.advance(task)


def _measured(measure: Callable[[Run], Found], runs: Sequence[Run], workers: int) -> Iterator[Found]:
    if workers == 1:
        yield from map(measure, runs)
        return
    with ProcessPoolExecutor(workers, get_context("forkserver"), attend_parent) as pool:
        try:
            for done in as_completed([pool.submit(measure, run) for run in runs]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.terminate()
            raise
