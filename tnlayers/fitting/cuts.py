"""Singular values of a kernel's unfoldings, and the bond sizes that they ask for.

Singular values give a lower bound of a fit's loss. A cut of a network's cores into two parts also cuts the kernel's
axes. The rank of the unfolding between them is at most the product of the cut bonds, so singular values beyond it are
lost. The largest such loss over several cuts is the estimate of a fit's loss.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tnlayers import validate
from tnlayers.fitting.metric import check
from tnlayers.fitting.vbmf import vbmf_rank
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

T = TypeVar("T")

RULES = ("vbmf",)
"""Names of rules that choose a rank by a kernel, as ``rank``."""
LARGEST_SIDE = 8192
"""Maximum smaller side of a kernel's unfolding. For a larger one, eigenvalues would take minutes."""


class Cut(NamedTuple):
    """Bonds between two parts of a network, and the share of squared norm lost at each rank of the unfolding."""

    bonds: tuple[str, ...]
    loss: Tensor

    def lost(self, network: TensorNetwork) -> float:
        """Return the share of the squared norm beyond the product of the bonds' sizes."""
        rank = math.prod(network.sizes[bond] for bond in self.bonds)
        return float(self.loss[rank]) if rank < len(self.loss) else 0.0


def cuts(network: TensorNetwork, kernel: Tensor) -> list[Cut]:
    """Return the cuts around every core and after every first few cores, with the kernel's losses.

    Example:
        >>> network = TensorNetwork.parse("i:4 r, r o:3", {"r": 1})
        >>> kernel = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
        >>> [round(loss, 3) for loss in cuts(network, kernel)[0].loss.tolist()]
        [1.0, 0.2, 0.0, 0.0]
    """
    return [Cut(bonds, loss) for bonds, loss in _unfolded(network, kernel, _losses)]


def _unfolded(network: TensorNetwork, kernel: Tensor, measure: Callable[[Tensor], T]) -> list[tuple[Axes, T]]:
    """Return the bonds of every cut, and a measure of the kernel's unfolding there, one matrix per shared index."""
    count = len(network.cores)
    parts = dict.fromkeys([*(frozenset([k]) for k in range(count)), *(frozenset(range(k)) for k in range(1, count))])
    split = kernel.detach().reshape(network.shape(network.dense_axes))
    found: list[tuple[Axes, T]] = []
    known: dict[frozenset[str], T] = {}
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
                f"an unfolding of the kernel has sides of at least {side}, of which an energy, a budget or vbmf needs "
                f"the singular values; at most {LARGEST_SIDE} are taken, so give this layer a rank"
            )
        unfolding = frozenset(rows + blocks)
        if unfolding not in known:
            matrix = split.permute([network.dense_axes.index(axis) for axis in [*blocks, *rows, *columns]])
            known[unfolding] = measure(
                matrix.reshape(-1, *(math.prod(network.shape(axes)) for axes in (rows, columns)))
            )
        found.append((bonds, known[unfolding]))
    return found


def estimate(network: TensorNetwork, found: Sequence[Cut]) -> float:
    """Return a lower bound of any fit's relative squared error, from the cuts."""
    return max((cut.lost(network) for cut in found), default=0.0)


def reach(network: TensorNetwork, free: Sequence[str], found: Sequence[Cut], loss: float) -> TensorNetwork:
    """Raise the smallest bond of each cut until no cut loses more than ``loss``, and return the network.

    Bonds that are not ``free`` keep their size, and a cut with only such bonds is skipped.
    """
    # The loss falls with the rank, so this count is the first sufficient rank.
    return _raised(network, free, [(cut.bonds, int((cut.loss > loss).sum())) for cut in found])


def _raised(network: TensorNetwork, free: Sequence[str], needs: Sequence[tuple[Axes, int]]) -> TensorNetwork:
    """Raise the smallest bond of each cut until the product of its bonds is what it needs."""
    sizes = {bond: network.sizes[bond] for bond in free}
    for bonds, needed in sorted(needs, key=lambda need: -len(need[0])):
        raised = [bond for bond in bonds if bond in sizes]
        fixed = math.prod(network.sizes[bond] for bond in bonds if bond not in sizes)
        while raised and fixed * math.prod(sizes[bond] for bond in raised) < needed:
            sizes[min(raised, key=sizes.__getitem__)] += 1
    # A network checks its axes and sizes, so none is made if nothing changed.
    return network if network.shape(sizes) == (*sizes.values(),) else network.resize(sizes)


def by_energy(network: TensorNetwork, free: Sequence[str], kernel: Tensor, energy: float) -> dict[str, int]:
    """Return the smallest sizes of free bonds with which every cut keeps the share ``energy`` of the squared norm."""
    smallest = network.resize(dict.fromkeys(free, 1))
    reached = reach(smallest, free, cuts(network, kernel), max(1 - energy, 1e-12))
    return {bond: reached.sizes[bond] for bond in free}


def by_rule(
    network: TensorNetwork, free: Sequence[str], kernel: Tensor, rule: Any, *, own: bool = False
) -> dict[str, int]:
    """Return the sizes of free bonds by a rule that is named: ``"vbmf"``.

    The product of a cut's bonds is the rank that variational Bayes finds in the unfolding of the kernel there, or the
    largest one of its matrices. It is at least one. If the kernel is the network's ``own``, its bonds bound the rank,
    and what is zero beyond does not show that there is no noise.

    Raises:
        ValueError: the rule is unknown, or the kernel has no values (meta device), NaN or infinity.

    Example:
        >>> network = TensorNetwork.parse("i:4 r:1, r o:3")
        >>> by_rule(network, ["r"], torch.ones(3, 4), "vbmf")
        {'r': 1}
    """
    validate.choice("rank", rule, RULES)
    check("weight", kernel, tuple(kernel.shape), "")
    smallest = network.resize(dict.fromkeys(free, 1))
    needs = []
    for bonds, (roots, (rows, columns), rounding) in _unfolded(network, kernel, _roots):
        most = math.prod(network.sizes[bond] for bond in bonds) if own else roots.shape[1]
        held = torch.cat([roots[:, :most], torch.zeros_like(roots[:, most:])], 1)
        needs.append((bonds, max(vbmf_rank(each, rows, columns, rounding) for each in held)))
    reached = _raised(smallest, free, needs)
    return {bond: reached.sizes[bond] for bond in free}


def _roots(matrices: Tensor) -> tuple[Tensor, torch.Size, float]:
    """Return the singular values of matrices, largest first, with the matrices' shape and their relative rounding."""
    squares = _squares(matrices).flip(1)
    # Roots of eigenvalues have half of the digits, so float64 is no finer than float32 here.
    error = squares[:, :1] * matrices.shape[1] * torch.finfo(squares.dtype).eps
    rounding = max(torch.finfo(matrices.dtype).eps, torch.finfo(torch.float32).eps)
    return squares.maximum(error).sqrt(), matrices.shape[1:], rounding


def _losses(matrices: Tensor) -> Tensor:
    """Return for each rank the share of the squared norm beyond it, summed over the blocks."""
    squares = _squares(matrices).sum(0)
    beyond = torch.cat([squares.cumsum(0).flip(0), squares.new_zeros(1)])
    return (beyond / beyond[0].clamp_min(torch.finfo(squares.dtype).tiny)).cpu()


def _squares(matrices: Tensor) -> Tensor:
    """Return the squared singular values of matrices with no more rows than columns, smallest first, up to a factor."""
    fine = torch.float32 if matrices.device.type == "mps" else torch.float64
    matrices = matrices.to(fine)
    matrices = matrices / (matrices.abs().max().clamp_min(torch.finfo(fine).tiny))
    squares: Tensor = torch.linalg.eigvalsh(matrices @ matrices.mT).clamp_min(0)
    return squares
