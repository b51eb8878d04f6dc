"""Time several steps in interleaved rounds."""

import random
import statistics
import time
from collections.abc import Callable, Sequence

ROUNDS = (5, 40)  # default minimum and maximum
QUIET = 0.02  # stop within the limits once dense and auto agree with their twins to this share
LIMITS = (7, 100)  # minimum and maximum of latency.py and construct.py

Step = Callable[[], object]


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
    """Return the times of all steps, run interleaved until the twins (if any) agree or the time is up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, start = list(steps), time.perf_counter()

    def quiet() -> bool:
        pairs = [(times[name], times[f"{name}_again"]) for name in twins]
        return bool(pairs) and all(abs(statistics.median(a) / statistics.median(b) - 1) < QUIET for a, b in pairs)

    least, most = limits
    for number in range(most):
        if number >= least and (time.perf_counter() - start > seconds or (number >= 2 * least and quiet())):
            break
        random.shuffle(order)  # the previous step determines what is in the caches
        for name in order:
            times[name].append(once(steps[name]))
    return times
