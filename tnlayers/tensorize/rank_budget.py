"""Ranks for many layers at once: from a share of parameters or FLOPs, or from an energy.

Singular values give a lower bound of a fit's loss. A cut of a network's cores into two parts also cuts the kernel's
axes. The rank of the unfolding between them is at most the product of the cut bonds, so singular values beyond it are
lost. The largest such loss over several cuts is the estimate for the spread of budgets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tnlayers.layers.base import TensorLayer
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.rank import Rank

LARGEST_SIDE = 8192
"""Maximum smaller side of a kernel's unfolding. For a larger one, eigenvalues would take minutes."""
LEVELS = tuple(0.95**k for k in range(1, 136))
"""Losses to try ranks for, down to 0.1 % of the squared norm."""
KEEPS = tuple(0.9**k for k in range(66))
"""Keep ratios to try, down to 0.1 %."""


class Cut(NamedTuple):
    """Bonds between two parts of a network, and the share of squared norm lost at each rank of the unfolding."""

    bonds: tuple[str, ...]
    loss: Tensor

    def lost(self, network: TensorNetwork) -> float:
        """Return the share of the squared norm beyond the product of the bonds' sizes."""
        rank = math.prod(network.sizes[bond] for bond in self.bonds)
        return float(self.loss[rank]) if rank < len(self.loss) else 0.0


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


def cuts(network: TensorNetwork, kernel: Tensor) -> list[Cut]:
    """Return the cuts around every core and after every first few cores, with the kernel's losses.

    Example:
        >>> network = TensorNetwork.parse("i:4 r, r o:3", {"r": 1})
        >>> kernel = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
        >>> [round(loss, 3) for loss in cuts(network, kernel)[0].loss.tolist()]
        [1.0, 0.2, 0.0, 0.0]
    """
    count = len(network.cores)
    parts = dict.fromkeys([*(frozenset([k]) for k in range(count)), *(frozenset(range(k)) for k in range(1, count))])
    split = kernel.detach().reshape(network.shape(network.dense_axes))
    found: list[Cut] = []
    losses: dict[frozenset[str], Tensor] = {}
    for part in parts:
        here = {axis for k in part for axis in network.cores[k]}
        there = {axis for k in range(count) if k not in part for axis in network.cores[k]}
        both = here & there
        left, right = ([axis for axis in network.dense_axes if axis in side - both] for side in (here, there))
        blocks = [axis for axis in network.dense_axes if axis in both]
        bonds = tuple(bond for bond in network.bonds if bond in both)
        rows, columns = sorted((left, right), key=lambda axes: math.prod(network.shape(axes)))
        if not bonds or not rows or not columns:
            continue
        if (side := math.prod(network.shape(rows))) > LARGEST_SIDE:
            raise ValueError(
                f"an unfolding of the kernel has sides of at least {side}, of which an energy or budget needs "
                f"the singular values; at most {LARGEST_SIDE} are taken, so give this layer a rank"
            )
        unfolding = frozenset(rows + blocks)
        if unfolding not in losses:
            matrix = split.permute([network.dense_axes.index(axis) for axis in [*blocks, *rows, *columns]])
            losses[unfolding] = _losses(
                matrix.reshape(-1, *(math.prod(network.shape(axes)) for axes in (rows, columns)))
            )
        found.append(Cut(bonds, losses[unfolding]))
    return found


def estimate(network: TensorNetwork, found: Sequence[Cut]) -> float:
    """Return a lower bound of any fit's relative squared error, from the cuts."""
    return max((cut.lost(network) for cut in found), default=0.0)


def reach(network: TensorNetwork, free: Sequence[str], found: Sequence[Cut], loss: float) -> TensorNetwork:
    """Raise the smallest bond of each cut until no cut loses more than ``loss``, and return the network.

    Bonds that are not ``free`` keep their size, and a cut with only such bonds is skipped.
    """
    sizes = {bond: network.sizes[bond] for bond in free}
    for cut in sorted(found, key=lambda cut: -len(cut.bonds)):
        raised = [bond for bond in cut.bonds if bond in sizes]
        # The loss falls with the rank, so this count is the first sufficient rank.
        needed = int((cut.loss > loss).sum())
        fixed = math.prod(network.sizes[bond] for bond in cut.bonds if bond not in sizes)
        while raised and fixed * math.prod(sizes[bond] for bond in raised) < needed:
            sizes[min(raised, key=sizes.__getitem__)] += 1
    # A network checks its axes and sizes, so none is made if nothing changed.
    return network if all(network.sizes[bond] == size for bond, size in sizes.items()) else network.resize(sizes)


def by_energy(layer: TensorLayer, kernel: Tensor, energy: float) -> dict[str, int]:
    """Return the smallest bond sizes with which every cut keeps the share ``energy`` of the squared norm."""
    network = layer.network.resize(dict.fromkeys(layer.rank, 1))
    reached = reach(network, [*layer.rank], cuts(network, kernel), max(1 - energy, 1e-12))
    return {bond: reached.sizes[bond] for bond in layer.rank}


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


def _losses(matrices: Tensor) -> Tensor:
    """Return for each rank the share of the squared norm beyond it, summed over the blocks."""
    fine = torch.float32 if matrices.device.type == "mps" else torch.float64
    matrices = matrices.to(fine)
    matrices = matrices / (matrices.abs().max().clamp_min(torch.finfo(fine).tiny))
    squares = torch.linalg.eigvalsh(matrices @ matrices.mT).clamp_min(0).sum(0)
    beyond = torch.cat([squares.cumsum(0).flip(0), squares.new_zeros(1)])
    return (beyond / beyond[0].clamp_min(torch.finfo(fine).tiny)).cpu()
