"""Many runs beside each other, in processes of their own."""

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
    """In a worker: leave interruptions to the parent, and end when it does, however that comes about."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


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
