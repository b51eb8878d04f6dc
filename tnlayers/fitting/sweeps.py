"""Sweeps over all cores, from several starts, of which the best goes on."""

import math
from collections.abc import Sequence

from torch import Tensor

from tnlayers.fitting.objective import Objective, balance

TOLERANCE, WINDOW = 1e-5, 10
"""Sweeps end when they lower the error by less than this share of it each, on an average of ``WINDOW``."""
MOMENTUM, GROWTH, LOSS = 0.5, 1.05, 0.5
"""How far beyond the last sweep the next one begins, what a success makes of that, and what a failure."""

PROBE = 5
"""Sweeps from every start, before the better half goes on with twice as many, and so on to the last one."""


def race(objective: Objective, begin: Sequence[Sequence[Tensor]], count: int) -> list[Tensor]:
    """A few sweeps from every start, more of them from the better half, and so on; ``count`` at most from the last."""
    runs, sweeps = [_Run(objective, balance(cores)) for cores in begin], PROBE
    while len(runs) > 1:
        for run in runs:
            run.sweep(sweeps)
        runs, sweeps = sorted(runs, key=lambda run: run.error)[: (len(runs) + 1) // 2], 2 * sweeps
    runs[0].sweep(count)
    return runs[0].cores


class _Run:
    """Sweeps from one start: the best cores so far, their error, and where the next sweep begins."""

    def __init__(self, objective: Objective, cores: list[Tensor]) -> None:
        self.objective, self.cores, self.ahead = objective, cores, cores
        self.error, self.momentum = objective.error(cores), MOMENTUM

    def sweep(self, count: int) -> None:
        """So many sweeps, or until they no longer lower the error."""
        before = math.inf
        for number in range(1, count + 1):
            found = self.objective.sweep(self.ahead)
            error = self.objective.error(found)
            if error < self.error:
                self.momentum = min(1.0, self.momentum * GROWTH)
                self.ahead = [new + self.momentum * (new - old) for new, old in zip(found, self.cores, strict=True)]
                self.cores, self.error = found, error
            else:
                self.momentum *= LOSS
                self.ahead = self.cores
            self.objective.report(number, self.error)
            if number % WINDOW == 0:
                if before - self.error <= WINDOW * TOLERANCE * self.error:
                    break
                before = self.error
