"""Run measurements in parallel processes."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

Run = TypeVar("Run")
Found = TypeVar("Found")


def attend_parent() -> None:
    """Ignore SIGINT in a worker, and exit when the parent exits for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def measure_all(
    measure: Callable[[Run], Found], runs: Sequence[Run], workers: int, keep: Callable[[Found], None], console: Console
) -> None:
    """Measure runs in one or several processes, with a progress bar. Call `keep` with each result when it is ready."""
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
