"""Rank of a noisy matrix by empirical variational Bayesian matrix factorisation (EVBMF), in closed form.

The model is a matrix of low rank plus white Gaussian noise of unknown variance. The evidence has a closed form in the
singular values. Its minimum over the noise variance is found on a grid that is refined. A singular value counts if it
is above a threshold that follows from the noise variance and the shape.
"""

import math

import torch
from torch import Tensor

POINTS, ROUNDS = 200, 4
"""Points of a grid of noise variances, and how often the grid is refined around its best point."""


def vbmf_rank(values: Tensor, rows: int, columns: int, rounding: float = 0.0) -> int:
    r"""Return the number of singular values that are not noise.

    With :math:`L \le M` the sides, :math:`\alpha = L / M` and the noise variance :math:`\sigma^2`, it counts the
    singular values :math:`\gamma > \sigma \sqrt{M \bar x}`, where :math:`\bar x = (1 + \tau)(1 + \alpha / \tau)` and
    :math:`\tau` solves :math:`\Phi(\tau) + \Phi(\tau / \alpha) = 0` with :math:`\Phi(z) = \log(z + 1) / z - 1/2`.

    Args:
        values: all singular values of the matrix, largest first. Those that are exactly zero say nothing of the noise:
            a product of narrow factors has them.
        rows: number of rows.
        columns: number of columns.
        rounding: standard deviation of the entries' rounding errors, over the root mean square of the entries. The
            noise is not taken to be smaller: the rounding of a matrix of exactly low rank is not white, and would count
            as rank.

    Reference:
        Nakajima, Sugiyama, Babacan and Tomioka, "Global Analytic Solution of Fully-observed Variational Bayesian
        Matrix Factorization", JMLR 14, 2013: Theorems 2 and 3, Corollary 1.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> left, right = (torch.randn(60, 3, generator=generator) for _ in range(2))
        >>> noise = torch.randn(60, 60, generator=generator)
        >>> vbmf_rank(torch.linalg.svdvals(left @ right.mT + 0.3 * noise), 60, 60)
        3
    """
    small, large = sorted((rows, columns))
    squares = values.to("cpu", torch.float64).square()[:small]
    total = float(squares.sum())
    if small == 1 or total == 0:
        return int(total > 0)
    squares = squares / total * (small * large)  # now the variance of all entries is one
    squares = squares.clamp_min(large * rounding**2).where(squares > 0, 0)
    ratio = small / large
    threshold = _threshold(ratio)
    # The smallest possible noise variance: see Theorem 3.
    most = min(math.ceil(small / (1 + ratio)) - 1, len(squares) - 1)
    least = max(float(squares[most]) / (large * threshold), float(squares[most:].mean()) / large)
    low, high = max(least, rounding**2, 1e-30), 1.0
    if low >= high:
        return 0
    for _ in range(ROUNDS):
        grid = torch.logspace(math.log10(low), math.log10(high), POINTS, dtype=torch.float64)
        best = int(_evidence(squares / large, grid, ratio, threshold).argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, POINTS - 1)])
    return int((squares > large * threshold * float(grid[best])).sum())


def _threshold(ratio: float) -> float:
    """Return the squared singular value, over the noise variance and the longer side, from which on it counts."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    low, high = 1e-9, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if phi(middle) + phi(middle / ratio) > 0 else (low, middle)
    return (1 + low) * (1 + ratio / low)


def _evidence(squares: Tensor, variances: Tensor, ratio: float, threshold: float) -> Tensor:
    """Return the negative logarithm of the evidence for each noise variance, up to a factor and a constant."""
    x = (squares[None, :] / variances[:, None]).clamp_min(1e-300)
    centre = x - (1 + ratio)
    root = (centre.square() - 4 * ratio).clamp_min(0).sqrt()
    tau = (centre + root).clamp_min(1e-300) / 2
    gain = (tau + 1).log() + ratio * (tau / ratio + 1).log() - tau
    return (x - x.log() + torch.where(x > threshold, gain, 0.0)).sum(1)
