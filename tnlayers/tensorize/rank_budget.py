"""Ranks for many layers at once: from a share of parameters or FLOPs, or from an energy.

The losses of a kernel's unfoldings (``tnlayers.fitting.cuts``) estimate the error of a fit that is not made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tnlayers.fitting.cuts import cuts, estimate, reach
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.rank import Rank

LEVELS = tuple(0.95**k for k in range(1, 136))
"""Losses to try ranks for, down to 0.1 % of the squared norm."""
KEEPS = tuple(0.9**k for k in range(66))
"""Keep ratios to try, down to 0.1 %."""


@dataclass(frozen=True)
class Candidate:
    """A layer whose ranks are to be chosen. Networks stand for layers, which take far longer to make.

    Attributes:
        build: returns the network of a rank, and the sizes of its free bonds.
        cost: returns a network's cost in parameters or FLOPs.
        dense_cost: cost of the plain layer.
        kernel: kernel in the order of the network's axes; None for a layer that is not fitted.
    """

    build: Callable[[Rank], tuple[TensorNetwork, dict[str, int]]]
    cost: Callable[[TensorNetwork], float]
    dense_cost: float
    kernel: Tensor | None = None


class _Rung(NamedTuple):
    cost: float
    error: float
    rank: Rank | None  # None: the plain layer


def spread(candidates: Sequence[Candidate], share: float) -> list[Rank | None]:
    """Choose ranks with which the candidates together cost at most a share of the plain layers' cost.

    It starts at the smallest networks. While any step is affordable, it takes the one with the largest decrease of the
    estimated relative squared error per cost. If nothing is fitted, all get one keep ratio.

    Returns:
        list[Rank | None]: for each candidate; None: it stays plain.

    Raises:
        ValueError: the smallest networks cost more.
    """
    limit = share * sum(each.dense_cost for each in candidates)
    if all(each.kernel is None for each in candidates):
        for keep in KEEPS:
            ranks = [_fitting(each, keep) for each in candidates]
            if sum(rung.cost for rung in ranks) <= limit:
                return [rung.rank for rung in ranks]
        least = sum(rung.cost for rung in ranks)
        raise ValueError(_too_small(share, limit, least))
    ladders = [_ladder(each) for each in candidates]
    at = [0] * len(ladders)
    left = limit - sum(ladder[0].cost for ladder in ladders)
    if left < 0:
        raise ValueError(_too_small(share, limit, limit - left))
    steps = [_best_step(ladder, 0, left) for ladder in ladders]
    while any(steps):
        gain, target = max(step for step in steps if step)
        number = steps.index((gain, target))
        cost = ladders[number][target].cost - ladders[number][at[number]].cost
        if cost <= left:
            left -= cost
            at[number] = target
        steps[number] = _best_step(ladders[number], at[number], left)
    return [ladder[k].rank for ladder, k in zip(ladders, at, strict=True)]


def _best_step(ladder: list[_Rung], at: int, left: float) -> tuple[float, int] | None:
    """Return the largest decrease of the error per cost among affordable rungs, and that rung."""
    here, further = ladder[at], range(at + 1, len(ladder))
    costs = {k: ladder[k].cost - here.cost for k in further if ladder[k].cost - here.cost <= left}
    return max(((here.error - ladder[k].error) / cost, k) for k, cost in costs.items()) if costs else None


def _too_small(share: float, limit: float, least: float) -> str:
    return (
        f"budget is {share:g}, {limit:,.0f} for all chosen layers, but their smallest networks need {least:,.0f} "
        f"({share * least / max(limit, 1):.3g})"
    )


def _fitting(candidate: Candidate, keep: float) -> _Rung:
    try:
        network, rank = candidate.build(keep)
    except ValueError:  # too small a ratio for this network
        network, rank = candidate.build(1)
    return _Rung(candidate.cost(network), 0.0, rank)


def _ladder(candidate: Candidate) -> list[_Rung]:
    """Return networks with falling estimated error and rising cost below the plain layer's, which is the last."""
    if candidate.kernel is None:  # only its size is known
        tried = [_fitting(candidate, keep)._replace(error=1 - keep) for keep in reversed(KEEPS)]
    else:
        network, free = candidate.build(1)
        tried = []
        found = cuts(network, candidate.kernel)
        for level in (1.0, *LEVELS):
            network = reach(network, [*free], found, level)
            rank = {bond: network.sizes[bond] for bond in free}
            if not tried or rank != tried[-1].rank:
                tried.append(_Rung(candidate.cost(candidate.build(rank)[0]), estimate(network, found), rank))
    plain = _Rung(candidate.dense_cost, 0.0, None)
    rungs: list[_Rung] = []
    for rung in (*tried, plain):
        if not rungs or rungs[-1].cost < rung.cost <= plain.cost:
            rungs.append(rung)
    return rungs if rungs[0].cost < plain.cost else [plain]
