"""Starts of a fit: cores from singular value decompositions, if the graph of the network allows, and random cores.

The graph of the network decides, not the name of its format. Stars, paths and rings are decomposed by tensorly, with
the dense axes of each core merged to one mode. Any other tree is decomposed leaf by leaf, a sum of terms term by term.
A start need not be exact, because alternating least squares continue from it: of several, from the best after some
sweeps.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from tnlayers.backend.views import rearranged
from tnlayers.fitting.matrices import PADDING
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

RANDOM = 3
"""Number of random starts of networks with cycles or hyperedges, whose fits end in local minima."""
SIDE = 1536
"""Maximum side of a Gram matrix (18 MiB). Above, singular vectors come from a random projection."""
HOOI, LARGE = 4, 2**20  # iterations of tensorly's partial_tucker; kernel entries above which its SVDs take minutes
LARGE_SUM = 2**15
"""Kernel entries from which on sums of networks have one random start."""

Links = Mapping[frozenset[int], str]
"""The bond between each pair of joined cores."""


def starts(network: TensorNetwork, target: Tensor, generator: Generator) -> list[list[Tensor]]:
    """Return starts for the fit of a network to a kernel: one for a tree, several with cycles or hyperedges.

    Args:
        network: network to fit.
        target: the kernel in float64, with one dimension for each of ``network.dense_axes``.
        generator: generator of random starts, and of the entries where a rank exceeds the kernel's.

    Reference:
        De Lathauwer et al. 2000 for Tucker, Oseledets 2011 for trains, Zhao et al. 2016 for rings, Grasedyck 2010.

    Example:
        >>> train = TensorNetwork.parse("i:4 a:4, a h:3 b:5, b o:5")
        >>> [[tuple(core.shape) for core in cores] for cores in starts(train, torch.ones(5, 4, 3), torch.Generator())]
        [[(4, 4), (4, 3, 5), (5, 5)]]
    """
    start, count = _Start(network, target, generator), len(network.cores)
    links = _links(network)
    order = _walk(links)
    degrees = Counter(core for pair in links for core in pair)
    if links and len(order) == count == len(links) + 1:
        centre, joined = degrees.most_common(1)[0]
        if joined == count - 1 > 1 and target.numel() <= LARGE:
            return [start.star([centre, *sorted(set(order) - {centre})], links)]
        return [start.train(order, links) if joined <= 2 else start.tree()]
    found = []
    if links and len(order) == count == len(links) and set(degrees.values()) == {2}:
        found = [start.ring(order[k:] + order[:k], links) for k in range(count)]
    elif _sums(network):
        found = [start.terms()]
    # Random starts of large sums of networks end above the other.
    few = found and is_large_sum(network, target)
    return [*found, *(start.random() for _ in range(1 if few else RANDOM))]


def is_large_sum(network: TensorNetwork, target: Tensor) -> bool:
    """Return whether the network is a sum of networks of several bonds, and the kernel is large."""
    return target.numel() >= LARGE_SUM and len(network.bonds) > 1 and _sums(network)


def _leading(matrix: Tensor, count: int, generator: Generator) -> Tensor:
    """Return the leading left singular vectors as columns, from the smaller Gram matrix or a random projection."""
    rows, columns = matrix.shape
    if min(rows, columns) > SIDE:
        shape = columns, min(count + 8, rows, columns)
        sketch = torch.randn(shape, generator=generator, dtype=matrix.dtype, device="cpu").to(matrix.device)
        basis: Tensor = torch.linalg.qr(matrix @ sketch)[0]
        for _ in range(4):  # power iterations
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis)[0])[0]
        inner: Tensor = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)[0]
        return basis @ inner[:, :count]
    if rows <= columns:
        vectors: Tensor = torch.linalg.eigh(matrix @ matrix.mT)[1]
        return vectors.flip(1)[:, :count]
    basis, triangle = torch.linalg.qr(matrix)
    return basis @ _leading(triangle, count, generator)


def _links(network: TensorNetwork) -> Links:
    """Return the bonds if the network is a simple graph with each dense axis in one core; else an empty mapping."""
    homes = {axis: frozenset(k for k, core in enumerate(network.cores) if axis in core) for axis in network.axes}
    links = {homes[bond]: bond for bond in network.bonds}
    simple = len(links) == len(network.bonds) and all(len(pair) == 2 for pair in links)
    return links if simple and all(len(homes[axis]) == 1 for axis in network.dense_axes) else {}


def _sums(network: TensorNetwork) -> bool:
    """Return whether a bond of all cores indexes the terms of a sum, and no dense axis is in two cores."""
    count = sum(axis in core for core in network.cores for axis in network.dense_axes)
    alone = count == len(network.dense_axes) and min(map(len, network.cores)) > 1 < len(network.cores)
    return alone and bool(set.intersection(*map(set, network.cores)))


def _walk(links: Links) -> list[int]:
    """Return the connected cores, depth first from a core of lowest degree: in order for a path or a ring."""
    degrees = Counter(core for pair in links for core in sorted(pair))
    order: list[int] = []
    ahead = [min(degrees, key=lambda core: (degrees[core], core))] if degrees else []
    while ahead:
        core = ahead.pop()
        if core not in order:
            order.append(core)
            ahead.extend(other for pair in links if core in pair for other in pair if other not in order)
    return order


@dataclass(frozen=True)
class _Start:
    """Starts of one network and kernel."""

    network: TensorNetwork
    target: Tensor
    generator: Generator

    def random(self) -> list[Tensor]:
        """Draw standard normal entries."""
        return [self._noise(shape) for shape in self.network.core_shapes]

    def star(self, order: Sequence[int], links: Links) -> list[Tensor]:
        """Apply higher-order orthogonal iteration (HOOI). The first core is the centre."""
        centre, *leaves = order
        bonds = [links[frozenset((centre, leaf))] for leaf in leaves]
        merged = self._merged(order)
        ranks = list(self.network.shape(bonds))
        for _ in ranks:  # limit each rank to the product of the others; repeated, because this lowers ranks
            for j, size in enumerate(merged.shape[1:]):
                others = math.prod(ranks[:j] + ranks[j + 1 :]) * merged.shape[0]
                ranks[j] = min(ranks[j], size, others)
        options = {"modes": list(range(1, len(order))), "n_iter_max": HOOI}
        (core, factors), _ = self._tensorly("partial_tucker", merged, ranks, **options)
        values = [factor.reshape(*self._sizes(leaf), -1) for leaf, factor in zip(leaves, factors, strict=True)]
        axes = [(*self._dense(leaf), bond) for leaf, bond in zip(leaves, bonds, strict=True)]
        core = core.reshape(*self._sizes(centre), *core.shape[1:])
        return self._cores(order, [core, *values], [self._dense(centre) + tuple(bonds), *axes])

    def train(self, order: Sequence[int], links: Links) -> list[Tensor]:
        """Apply TT-SVD along a path."""
        bonds = [(), *((links[frozenset(pair)],) for pair in pairwise(order)), ()]
        ranks = [math.prod(self.network.shape(bond)) for bond in bonds]
        return self._chain(order, bonds, self._tensorly("tensor_train", self._merged(order), ranks).factors)

    def ring(self, order: Sequence[int], links: Links) -> list[Tensor]:
        """Apply TR-SVD around a ring, from the first core of the order."""
        bonds = [(links[frozenset(pair)],) for pair in pairwise([order[-1], *order, order[0]])]
        merged, ranks = self._merged(order), [self.network.sizes[bond] for (bond,) in bonds]
        limit = min(merged.shape[0], math.prod(merged.shape[1:]))
        while ranks[0] * ranks[1] > limit:
            ranks[ranks[1] > ranks[0]] -= 1
        ranks[-1] = ranks[0]
        return self._chain(order, bonds, self._tensorly("tensor_ring", merged, ranks).factors)

    def tree(self) -> list[Tensor]:
        """Decompose leaf by leaf: singular vectors for its core, its bond in place of its axes in the kernel."""
        left, axes = self.target, self.network.dense_axes
        waiting = dict(enumerate(self.network.cores))
        found: dict[int, tuple[Tensor, Axes]] = {}
        while len(waiting) > 1:
            leaf = next(k for k, core in waiting.items() if len(set(core) - set(axes)) == 1)
            own = tuple(axis for axis in waiting.pop(leaf) if axis in axes)
            (bond,) = set(self.network.cores[leaf]) - set(own)
            rest = tuple(axis for axis in axes if axis not in own)
            left = rearranged(left, f"{' '.join(axes)} -> {' '.join(own + rest)}")
            sizes = left.shape[: len(own)], left.shape[len(own) :]
            matrix = left.flatten(0, len(own) - 1).flatten(1)
            vectors = _leading(matrix, self.network.sizes[bond], self.generator)
            found[leaf] = vectors.reshape(*sizes[0], -1), (*own, bond)
            left, axes = (vectors.mT @ matrix).reshape(-1, *sizes[1]), (bond, *rest)
        found[next(iter(waiting))] = left, axes
        return self._cores(list(found), *zip(*found.values(), strict=True))

    def terms(self) -> list[Tensor]:
        """Decompose a sum over a bond of all cores: singular vectors of every mode, or each term from the residual."""
        (bond, *_) = sorted(set(self.network.bonds).intersection(*self.network.cores))
        if len(self.network.bonds) == 1:
            order, rank = range(len(self.network.cores)), self.network.sizes[bond]
            unfolded = [self._merged([core, *({*order} - {core})]).flatten(1) for core in order]
            values = [_leading(m, rank, self.generator).reshape(*self._sizes(k), -1) for k, m in enumerate(unfolded)]
            return self._cores(order, values, [(*self._dense(core), bond) for core in order])
        cores = tuple(tuple(axis for axis in core if axis != bond) for core in self.network.cores)
        term = TensorNetwork(cores, {axis: size for axis, size in self.network.sizes.items() if axis != bond})
        left, found = self.target, []
        for _ in range(self.network.sizes[bond]):
            found.append(starts(term, left, self.generator)[0])
            left = left - reconstruct(term, found[-1]).reshape(left.shape)
        values = [torch.stack(parts) for parts in zip(*found, strict=True)]
        return self._cores(range(len(values)), values, [(bond, *core) for core in cores])

    def _tensorly(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a tensorly decomposition in torch, with our SVD and without a change of the user's tensorly backend."""

        def svd(matrix: Tensor, n_eigenvecs: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
            vectors = _leading(matrix, n_eigenvecs, self.generator)
            rows = vectors.mT @ matrix
            lengths = rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
            return vectors, lengths, rows / lengths[:, None]

        backend = import_module("tensorly").backend_context("pytorch", local_threadsafe=True)
        with backend, torch.device(self.target.device):
            return getattr(import_module("tensorly.decomposition"), name)(*args, svd=svd, **kwargs)

    def _dense(self, core: int) -> Axes:
        return tuple(axis for axis in self.network.cores[core] if axis not in self.network.bonds)

    def _sizes(self, core: int) -> tuple[int, ...]:
        return self.network.shape(self._dense(core))

    def _merged(self, order: Sequence[int]) -> Tensor:
        """Return the kernel with one dimension for each core."""
        modes = " ".join(f"({' '.join(self._dense(core))})" for core in order)
        return rearranged(self.target, f"{' '.join(self.network.dense_axes)} -> {modes}")

    def _chain(self, order: Sequence[int], bonds: Sequence[Axes], factors: Sequence[Tensor]) -> list[Tensor]:
        """Return cores from factors (before, dense axes, after). The ends of a path have one bond only."""
        values, axes = [], []
        for core, factor, (before, after) in zip(order, factors, pairwise(bonds), strict=True):
            sides = factor.shape[: len(before)], factor.shape[2:][: len(after)]
            values.append(factor.reshape(*sides[0], *self._sizes(core), *sides[1]))
            axes.append(before + self._dense(core) + after)
        return self._cores(order, values, axes)

    def _cores(self, order: Sequence[int], values: Sequence[Tensor], axes: Sequence[Axes]) -> list[Tensor]:
        """Return the values in the network's order and shapes, filled up with small random entries."""
        found = {}
        for core, value, have in zip(order, values, axes, strict=True):
            part = rearranged(value, f"{' '.join(have)} -> {' '.join(self.network.cores[core])}")
            whole = self._noise(self.network.core_shapes[core]) * (PADDING * part.square().mean().sqrt())
            whole[tuple(map(slice, part.shape))] = part
            found[core] = whole
        return [found[core] for core in range(len(found))]

    def _noise(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=self.target.dtype, device="cpu").to(
            self.target
        )
