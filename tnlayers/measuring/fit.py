"""Fit of seconds per call, per FLOP and per byte to measured operations."""

import itertools
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 30
_SURE = 0.05
"""Errors below this share count alike."""

_SCALE = 1e-6, 1e-12, 1e-12


def non_negative(features: Tensor, wanted: Tensor) -> Tensor:
    """Return the least-squares solution without negative entries, for a few columns.

    The solution is the plain one on the columns where it is positive. All sets of columns are tried, the largest first.

    Example:
        >>> non_negative(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([2.0, 1.0]))
        tensor([1.5000, 0.0000])
    """
    columns = features.shape[1]
    used = [k for k in range(columns) if features[:, k].any()]
    best, least = features.new_zeros(columns), float(wanted.square().sum())
    for number in range(len(used), 0, -1):
        for chosen in itertools.combinations(used, number):
            part = features[:, list(chosen)]
            solution = torch.linalg.lstsq(part, wanted[:, None]).solution[:, 0]
            if (solution < 0).any() or not solution.isfinite().all():
                continue
            error = float((part @ solution - wanted).square().sum())
            if error < least:
                least, best = error, torch.zeros_like(best)
                best[list(chosen)] = solution
                if number == len(used):  # nothing on fewer columns is better
                    return best
    return best


def fit(rows: Sequence[tuple[float, float, float]]) -> tuple[tuple[float, ...], float]:
    """Fit rates per call, FLOP and byte to rows of FLOPs, bytes and seconds. Also return the median relative error.

    The sum of relative errors is least, not of their squares: other load on the machine makes outliers. The rates are
    raised by the median error, so that kinds that are hard to predict count as slower.
    """
    flops, size, seconds = torch.tensor(rows, dtype=torch.float64).T
    scale = torch.tensor(_SCALE, dtype=torch.float64)
    features = torch.stack([torch.ones_like(flops), flops, size], 1) * scale / seconds[:, None]
    weight = torch.ones_like(seconds)
    for _ in range(_ROUNDS):
        rates = non_negative(features * weight[:, None], weight)
        errors = (features @ rates - 1).abs()
        weight = errors.clamp(min=_SURE).rsqrt()
    error = statistics.median(errors.tolist())
    return tuple((rates * scale * (1 + error)).tolist()), error
