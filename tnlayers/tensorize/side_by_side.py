"""Independent work in several threads, with one of torch's threads each."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
REFRESH = 0.5
"""Seconds between two calls of ``waiting``."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operations in one thread each, and restore their number of threads at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(
    work: Callable[[T], None],
    items: Sequence[T],
    workers: int,
    size: Callable[[T], float],
    done: Callable[[T], None],
    waiting: Callable[[], None],
) -> None:
    """Do work on every item, in up to ``workers`` threads.

    Many small operations in several threads each wait for each other. So each item has one of torch's threads, and
    results do not depend on ``workers``.

    Args:
        work: what to do with an item.
        items: the items.
        workers: maximum number of threads.
        size: cost of an item; the largest go first.
        done: called in this thread for an item whose work is done.
        waiting: called in this thread now and then.

    Raises:
        Exception: that of the first item, in the order of ``items``, whose work raised. No further work is begun.

    Example:
        >>> found = []
        >>> side_by_side(found.append, [1, 2, 3], 2, float, lambda _: None, lambda: None)
        >>> sorted(found)
        [1, 2, 3]
    """
    with one_thread():
        if workers == 1 or len(items) < 2:
            for item in items:
                work(item)
                done(item)
            return
        with ThreadPoolExecutor(min(workers, len(items)), "tnlayers") as pool:
            futures = {pool.submit(work, item): item for item in sorted(items, key=size, reverse=True)}
            try:
                _collect(futures, done, waiting)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                failed = {id(futures[f]): f for f in futures if not f.cancelled() and f.exception() is not None}
                for item in items:
                    if id(item) in failed:
                        failed[id(item)].result()
                raise


def _collect(futures: dict[Future[None], T], done: Callable[[T], None], waiting: Callable[[], None]) -> None:
    left = set(futures)
    while left:
        ready, left = wait(left, REFRESH, FIRST_COMPLETED)
        for future in ready:
            future.result()
            done(futures[future])
        waiting()
