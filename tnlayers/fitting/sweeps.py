"""Sweeps over all cores from several starts, and selection of the best start."""

from collections.abc import Sequence

from torch import Tensor

from tnlayers.fitting.objective import Objective, balance

TOLERANCE, WINDOW = 2e-5, 20
"""Sweeps end when the relative decrease of the merit per sweep, averaged over ``WINDOW``, is below ``TOLERANCE``."""
MOMENTUM, GROWTH, LOSS = 0.5, 1.05, 0.5
"""Initial extrapolation between sweeps, its factor after a success, and its factor after a failure."""

STUCK = 0.03
"""Extrapolation below which the kernel is multiplied in float64: several sweeps on end lowered no merit."""

EXACT = 1e-13
"""Errors below this are rounding."""

FINISH = 3
"""Sweeps with the kernel in float64 after those in float32."""

PROBE, KEPT, BEHIND = 5, 3, 1.03
"""Sweeps from every start. Then one in ``KEPT``, rounded up, continues with twice as many, until one start is left. A
start whose merit is above ``BEHIND`` times the least one does not continue."""


def race(objective: Objective, begin: Sequence[Sequence[Tensor]], count: int) -> list[Tensor]:
    """Run sweeps from every start, then more from the best, and so on; at most ``count`` from the last."""
    runs, sweeps = [_Run(objective, balance(cores)) for cores in begin], PROBE
    while len(runs) > 1:
        for run in runs:
            run.sweep(sweeps)
        best, *others = sorted(runs, key=lambda run: run.merit)[: -(-len(runs) // KEPT)]
        runs, sweeps = [best, *(run for run in others if run.merit <= BEHIND * best.merit)], 2 * sweeps
    runs[0].sweep(count)
    if objective.rough:
        objective.finish()
        runs[0].exact()
        runs[0].sweep(FINISH)
    return runs[0].cores


class _Run:
    """Sweeps from one start: the best cores so far, their error and merit, and the start of the next sweep."""

    def __init__(self, objective: Objective, cores: list[Tensor]) -> None:
        self.objective, self.cores, self.ahead = objective, cores, cores
        self.momentum = MOMENTUM
        self.exact()

    def exact(self) -> None:
        """Measure the error, and extrapolate no more from what float32 gave."""
        self.error, self.ahead = self.objective.error(self.cores), self.cores
        self.merit = self.objective.merit(self.error, self.cores)

    def sweep(self, count: int) -> None:
        """Run ``count`` sweeps, or fewer if they no longer lower the merit."""
        before = self.merit
        for number in range(1, count + 1):
            found, error = self.objective.sweep(self.ahead, self.error)
            merit = self.objective.merit(error, found)
            if merit < self.merit:
                self.momentum = min(1.0, self.momentum * GROWTH)
                self.ahead = [new + self.momentum * (new - old) for new, old in zip(found, self.cores, strict=True)]
                self.cores, self.error, self.merit = found, error, merit
            else:
                self.momentum *= LOSS
                self.ahead = self.cores
                if self.momentum < STUCK:  # float32 may be too coarse for nearly singular equations
                    self.objective.finish()
            self.objective.report(number, self.error)
            if self.error < EXACT:
                break
            if number % WINDOW == 0:
                if before - self.merit <= WINDOW * TOLERANCE * self.merit:
                    break
                before = self.merit
