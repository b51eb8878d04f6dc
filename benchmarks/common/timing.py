"""Time steps interleaved, round after round."""

import contextlib
import ctypes
import random
import statistics
import time
from collections.abc import Callable, Sequence

ROUNDS = (5, 40)  # at least and at most, where no other limits are given
QUIET = 0.02  # rounds go on, within the limits, until dense and auto agree with their twins to this share
LIMITS = (7, 100)  # the same, of latency.py and construct.py

Step = Callable[[], object]


def keep_freed_memory() -> None:
    """Let glibc, where it is, keep what is freed, but for what is mapped on its own.

    Else it gives pages back, and takes the time to get them again, by how things happen to lie: one step has none,
    the next 40,000 of them.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        trim_threshold, mmap_threshold = -1, -3
        allocator = ctypes.CDLL(None)
        allocator.mallopt(trim_threshold, 2**31 - 1)
        allocator.mallopt(mmap_threshold, 2**25)  # up to which glibc's own moves


def once(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def rounds(
    steps: dict[str, Step],
    seconds: float,
    limits: tuple[int, int] = ROUNDS,
    twins: Sequence[str] = ("dense", "auto"),
) -> dict[str, list[float]]:
    """Times of all steps, interleaved, until the twins agree, if there are any, or the time is up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, start = list(steps), time.perf_counter()

    def quiet() -> bool:
        pairs = [(times[name], times[f"{name}_again"]) for name in twins]
        return bool(pairs) and all(abs(statistics.median(a) / statistics.median(b) - 1) < QUIET for a, b in pairs)

    least, most = limits
    for number in range(most):
        if number >= least and (time.perf_counter() - start > seconds or (number >= 2 * least and quiet())):
            break
        random.shuffle(order)  # what ran before decides what is in the caches
        for name in order:
            times[name].append(once(steps[name]))
    return times
