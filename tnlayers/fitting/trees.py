"""Rounding of trees to smaller bonds: orthogonal cores, then a singular value decomposition at each bond.

A network is a tree if its bonds join the cores without a cycle, each bond two of them. A dense axis that every core has
(as in BlockTT) is an index of separate trees, which get equal bonds. So is a hyperedge of size one that every core has.
The dense kernel is not formed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tnlayers.backend.views import inverse, permutation
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

Legs = Mapping[tuple[int, str], Tensor]
"""For each core and bond, the matrix of shape ``(common, old size, new size)`` that the rounding multiplies it by."""

Choose = Callable[[str, Tensor, float], int]
"""Rank of a bond, from its squared singular values, largest first, and the squared norm of the kernel."""


class Tree(NamedTuple):
    """Axes that all cores have, and the two cores of each bond."""

    common: Axes
    links: Mapping[str, tuple[int, int]]


class Rounded(NamedTuple):
    """Cores with smaller bonds, the share of the squared norm that they lost, and what they were multiplied by."""

    network: TensorNetwork
    cores: list[Tensor]
    lost: float
    legs: Legs


def tree(network: TensorNetwork) -> Tree | None:
    """Return the bonds of a network that is a tree of several cores; None for any other network.

    Example:
        >>> tree(TensorNetwork.parse("i:4 a:2, a h:3 b:2, b o:4"))
        Tree(common=(), links={'a': (0, 1), 'b': (1, 2)})
        >>> tree(TensorNetwork.parse("i1:4 i2:4 o1:4 r:2, r i1 o1 o2:4"))
        Tree(common=('i1', 'o1'), links={'r': (0, 1)})
        >>> tree(TensorNetwork.parse("a:2 i:4 b:2, b h:3 c:2, c o:4 a"))  # a ring
    """
    count = len(network.cores)
    homes = {axis: tuple(k for k, core in enumerate(network.cores) if axis in core) for axis in network.axes}
    dense = network.dense_axes
    common = tuple(
        axis
        for axis, found in homes.items()
        if len(found) == count and (axis in dense or (network.sizes[axis] == 1 and count > 2))
    )
    links = {bond: homes[bond] for bond in network.bonds if bond not in common}
    shared = any(len(homes[axis]) > 1 for axis in dense if axis not in common)
    if count < 2 or shared or len(links) != count - 1 or any(len(pair) != 2 for pair in links.values()):
        return None
    reached = {0}
    for _ in range(count):
        reached |= {core for pair in links.values() if reached.intersection(pair) for core in pair}
    pairs = {bond: (pair[0], pair[1]) for bond, pair in links.items()}
    return Tree(common, pairs) if len(reached) == count else None


def round_tree(network: TensorNetwork, found: Tree, cores: Sequence[Tensor], choose: Choose) -> Rounded:
    r"""Round the cores of a tree, bond after bond, from a core with one bond.

    Each rank is cut from the singular values of the kernel as rounded before. In a train this is TT-SVD. The squared
    error is the sum of what the bonds lose. It is at most the number of bonds times the least possible one for these
    ranks.

    Args:
        network: network of the cores.
        found: its tree.
        cores: the cores, in float64.
        choose: chooses the rank of each bond. A rank above what the neighbouring axes allow becomes this maximum.

    Reference:
        Oseledets, SIAM J. Sci. Comput. 2011 (Algorithm 2); Grasedyck, SIAM J. Matrix Anal. Appl. 2010, for trees.

    Example:
        >>> network = TensorNetwork.parse("i:2 r:2, r o:2")
        >>> cores = [torch.eye(2).double(), torch.diag(torch.tensor([3.0, 4.0]).double())]
        >>> rounded = round_tree(network, tree(network), cores, lambda bond, squares, total: 1)
        >>> rounded.network, round(rounded.lost, 6)
        (TensorNetwork.parse('i:2 r:1, r:1 o:2'), 0.36)
    """
    work = _Rounding(network, found, list(cores), choose)
    degrees = [sum(k in pair for pair in found.links.values()) for k in range(len(cores))]
    root = degrees.index(1)
    work.orthogonalise(root, None)
    work.total = float(work.values[root].square().sum())
    work.cut(root, None)
    sizes = {bond: work.values[pair[0]].shape[network.cores[pair[0]].index(bond)] for bond, pair in found.links.items()}
    return Rounded(network.resize(sizes), work.values, work.lost / (work.total or 1.0), work.legs)


class _Rounding:
    """The cores so far. All but one, the centre, are orthogonal: their bonds towards the centre have unit vectors."""

    def __init__(self, network: TensorNetwork, found: Tree, values: list[Tensor], choose: Choose) -> None:
        self.network, self.links, self.values, self.choose = network, found.links, values, choose
        self.common = found.common
        self.total = self.lost = 0.0
        count = torch.Size(network.shape(self.common)).numel()
        self.legs = {
            (k, bond): torch.eye(network.sizes[bond], dtype=values[k].dtype, device=values[k].device).expand(
                count, -1, -1
            )
            for bond, pair in self.links.items()
            for k in pair
        }

    def beyond(self, core: int, above: str | None) -> list[tuple[str, int]]:
        """Return the bonds of a core but one, with the cores on their other sides."""
        pairs = [(bond, pair) for bond, pair in self.links.items() if core in pair and bond != above]
        return [(bond, pair[pair[0] == core]) for bond, pair in pairs]

    def orthogonalise(self, core: int, above: str | None) -> None:
        """Make all cores orthogonal that are further from the root than this one, then this one unless it is it."""
        for bond, other in self.beyond(core, above):
            self.orthogonalise(other, bond)
            self.shift(other, bond, core)

    def cut(self, core: int, above: str | None) -> None:
        """Cut the bonds below the centre, each with those further below, and return the centre to this core."""
        for bond, other in self.beyond(core, above):
            left, values, right = torch.linalg.svd(self.matrix(core, bond), full_matrices=False)
            squares = values.square().sum(0)
            rank = min(max(1, self.choose(bond, squares, self.total)), len(squares))
            self.lost += float(squares[rank:].sum())
            right, values = right.mT[..., :rank], values[:, None, :rank]
            self.put(core, bond, left[..., :rank])
            self.legs[core, bond] = self.legs[core, bond] @ (right * _inverted(values))
            self.multiply(other, bond, right * values)
            self.cut(other, bond)
            self.shift(other, bond, core)

    def shift(self, core: int, bond: str, to: int) -> None:
        """Make a core orthogonal, and multiply its neighbour by the rest."""
        basis, triangle = torch.linalg.qr(self.matrix(core, bond))
        self.put(core, bond, basis)
        self.legs[core, bond] = self.legs[core, bond] @ torch.linalg.pinv(triangle)
        self.multiply(to, bond, triangle.mT)

    def multiply(self, core: int, bond: str, matrix: Tensor) -> None:
        """Multiply a bond of a core by a matrix."""
        self.put(core, bond, self.matrix(core, bond) @ matrix)
        self.legs[core, bond] = self.legs[core, bond] @ matrix

    def matrix(self, core: int, bond: str) -> Tensor:
        """Return a core as matrices with the bond as columns."""
        return unfolded(self.values[core], self.network.cores[core], self.common, bond)

    def put(self, core: int, bond: str, matrix: Tensor) -> None:
        """Set a core from matrices with the bond as columns, of any number."""
        self.values[core] = folded(matrix, self.values[core].shape, self.network.cores[core], self.common, bond)


def _inverted(values: Tensor) -> Tensor:
    """Return the inverse of singular values, and zero for those that are zero up to rounding."""
    least = torch.finfo(values.dtype).eps * values.shape[-1] * values.amax(-1, keepdim=True)
    return torch.where(values > least, 1 / values, 0.0)


def unfolded(value: Tensor, axes: Axes, common: Axes, bond: str) -> Tensor:
    """Return matrices of shape ``(common, other axes, bond)``.

    Example:
        >>> unfolded(torch.empty(2, 3, 4), ("a", "r", "b"), (), "r").shape
        torch.Size([1, 8, 3])
    """
    moved = value.permute(permutation(axes, _order(axes, common, bond)))
    matrices: Tensor = moved.reshape(moved.shape[: len(common)].numel(), -1, moved.shape[-1])
    return matrices


def folded(matrices: Tensor, shape: Sequence[int], axes: Axes, common: Axes, bond: str) -> Tensor:
    """Return the tensor of which ``unfolded`` gives these matrices. Its bond has as many indices as they have columns.

    Example:
        >>> folded(torch.empty(1, 8, 5), (2, 3, 4), ("a", "r", "b"), (), "r").shape
        torch.Size([2, 5, 4])
    """
    order = permutation(axes, _order(axes, common, bond))
    value: Tensor = matrices.reshape([shape[k] for k in order[:-1]] + [matrices.shape[-1]]).permute(inverse(order))
    return value


def _order(axes: Axes, common: Axes, bond: str) -> Axes:
    return common + tuple(axis for axis in axes if axis != bond and axis not in common) + (bond,)


def moved(network: TensorNetwork, legs: Legs, core: int, value: Tensor, *, squares: bool = False) -> Tensor:
    """Return what a gradient of a core becomes in the rounded network; with ``squares``, its squared entries.

    A core is multiplied by a matrix on each bond, and its neighbour by the matrix whose transpose is the inverse. So
    its gradient is multiplied by the neighbour's matrix. Squares of uncorrelated entries are multiplied by squares.

    Args:
        network: the network before.
        legs: matrices of the rounding.
        core: number of the core.
        value: a tensor of the core's shape.
        squares: whether the value holds squares.

    Example:
        >>> network = TensorNetwork.parse("i:3 r:2, r o:3")
        >>> legs = {(0, "r"): torch.tensor([[[2.0], [0.0]]]), (1, "r"): torch.tensor([[[0.5], [0.0]]])}
        >>> moved(network, legs, 0, torch.ones(3, 2)).flatten()
        tensor([0.5000, 0.5000, 0.5000])
    """
    found, axes = tree(network), network.cores[core]
    assert found is not None
    for bond, pair in found.links.items():
        if core in pair:
            matrix = legs[pair[pair[0] == core], bond].to(value)
            matrix = matrix.square() if squares else matrix
            value = folded(unfolded(value, axes, found.common, bond) @ matrix, value.shape, axes, found.common, bond)
    return value
