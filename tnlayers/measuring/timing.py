"""Times of operations on a device."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

_REPEATS = 3, 7
"""Minimum and maximum number of times that an operation is timed."""

_AT_ONCE = 5
"""Number of calls between two waits for an accelerator, which starts an operation before the last one has ended."""

_OTHER = 1 << 22
"""Number of elements that are written before each call. It overwrites the caches, as other layers of a network do."""


class Clock:
    """Times functions on a device.

    Args:
        device: device type.
        budget: seconds that the repeats of one function may take.
    """

    def __init__(self, device: str, budget: float) -> None:
        self.budget, self.calls = budget, 1 if device == "cpu" else _AT_ONCE
        self.other = torch.zeros(_OTHER, device=device)
        self.wait: Callable[[], object] = (lambda: None) if device == "cpu" else getattr(torch, device).synchronize

    def seconds(self, function: Callable[[], object], repeats: tuple[int, int] | None = None) -> float:
        """Return the median time of a call in seconds, without that of the first.

        If the first takes longer than the budget, its time is returned.
        """
        times: list[float] = []
        if (first := self._once(function)) > self.budget:
            return first
        start = time.perf_counter()
        least, most = repeats or _REPEATS
        while len(times) < least or (len(times) < most and time.perf_counter() - start < self.budget):
            times.append(self._once(function))
        return statistics.median(times)

    def passes(self, forward: Callable[[], Tensor], both: Callable[[Tensor], object]) -> tuple[float, float]:
        """Return the seconds of a forward, and of a forward and backward, with the minimum number of repeats.

        To overwrite the caches takes longer than most operations, and more operations fit better than more repeats.
        """
        few = _REPEATS[0], _REPEATS[0]
        with torch.no_grad():
            gradient = torch.ones_like(forward())
            return self.seconds(forward, few), self.seconds(lambda: both(gradient), few)

    def _once(self, function: Callable[[], object]) -> float:
        self.other.add_(1)
        self.wait()
        start = time.perf_counter()
        for _ in range(self.calls):
            function()
        self.wait()
        return (time.perf_counter() - start) / self.calls


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, except separately mapped blocks. No effect with other C libraries.

    By default it returns pages to the system and must fault them in again. The number of page faults depends on the
    heap layout: one step has none, the next 40,000.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        trim_threshold, mmap_threshold = -1, -3
        allocator = ctypes.CDLL(None)
        allocator.mallopt(trim_threshold, 2**31 - 1)
        allocator.mallopt(mmap_threshold, 2**25)  # the largest value that glibc's dynamic threshold reaches
