"""Networks with smaller or larger bonds: rounded, fitted, or padded."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from tnlayers.fitting.cuts import by_energy, cuts, reach
from tnlayers.fitting.decompose import decompose
from tnlayers.fitting.gauge import levelled
from tnlayers.fitting.matrices import PADDING
from tnlayers.fitting.trees import Choose, Legs, moved, round_tree, tree
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.network import TensorNetwork

LOSSLESS = 1e-12
"""Share of the squared norm that an unfolding loses even if all energy is kept: zeros, up to the cores' rounding."""
ROUNDING = 1e-28
"""The same if an error is given, which may be below the cores' rounding: zeros, up to that of float64."""
FINER = 0.5
"""Factor between the losses for which ranks are tried, if the ranks follow from an error and each must be fitted."""
TRIED = 40
"""Number of these losses."""


@dataclass(frozen=True)
class Resized:
    """Cores of a network with other bond sizes.

    Attributes:
        network: the network.
        cores: the cores in float64.
        error: ``||new kernel - old kernel|| / ||old kernel||``.
        before: the network before.
        legs: for a rounded tree, what the bonds of its cores were multiplied by; empty for any other network.
        scales: what the entries of the cores were multiplied by after that.
    """

    network: TensorNetwork
    cores: list[Tensor]
    error: float
    before: TensorNetwork
    legs: Legs = field(default_factory=dict)
    scales: Sequence[Tensor] = ()

    def moved(self, core: int, value: Tensor, *, squares: bool = False) -> Tensor:
        """Return a gradient of a core, or its squares, as one of the new core. Only if there are ``legs``."""
        found = moved(self.before, self.legs, core, value.to(torch.float64), squares=squares)
        found = padded(found, self.network.core_shapes[core])
        scale = self.scales[core].to(found)
        return found / (scale.square() if squares else scale)


def truncate(
    network: TensorNetwork,
    cores: Sequence[Tensor],
    free: Sequence[str],
    *,
    sizes: dict[str, int] | None = None,
    energy: float | None = None,
    error: float | None = None,
) -> Resized:
    """Return the nearest cores with smaller bonds: of a tree by rounding, else by a fit.

    Args:
        network: network of the cores.
        cores: the cores, in float64 and with a kernel that is not zero.
        free: bonds that may change.
        sizes: the new size of each free bond; or
        energy: share of the squared singular values that each unfolding keeps; or
        error: the largest relative error.

    Example:
        >>> network = TensorNetwork.parse("i:3 r:3, r o:3")
        >>> cores = [torch.eye(3).double(), torch.diag(torch.tensor([4.0, 3.0, 1e-9]).double())]
        >>> found = truncate(network, cores, ["r"], error=0.1)
        >>> found.network, found.error < 1e-9
        (TensorNetwork.parse('i:3 r:2, r:2 o:3'), True)
    """
    found = tree(network)
    if found is not None:
        rule = _rule(network, free, sizes, energy, error)
        rounded = round_tree(network, found, cores, rule)
        # A size that was asked for, or is fixed, may be above the kernel's rank. The rest is filled up.
        wanted = {bond: network.sizes[bond] for bond in network.bonds if bond not in free} | (sizes or {})
        wanted = {bond: max(size, rounded.network.sizes[bond]) for bond, size in wanted.items()}
        grown = rounded.network.resize(wanted)
        filled = grow(rounded.network, grown, rounded.cores, Generator(), PADDING)
        new, scales = levelled(grown, filled)
        return Resized(grown, new, rounded.lost**0.5, network, rounded.legs, scales)
    kernel = reconstruct(network, cores)
    if sizes is None and energy is not None:
        least = by_energy(network, free, kernel, energy)
        sizes = {bond: min(size, network.sizes[bond]) for bond, size in least.items()}
    if sizes is not None:
        return _fitted(network, cores, kernel, sizes)
    return _within(network, cores, kernel, free, error or 0.0)


def grow(
    before: TensorNetwork,
    after: TensorNetwork,
    cores: Sequence[Tensor],
    generator: Generator | None = None,
    scale: float = 1.0,
) -> list[Tensor]:
    """Return cores with larger bonds and the same kernel, of which every new index of a bond can learn.

    The new entries of the last core that has a bond are zero, and those of the other cores are random. So the first
    gradient of the zeros is not zero. The random entries have the root mean square of their core's entries.

    Args:
        before: network of the cores.
        after: the same network with larger bonds.
        cores: the cores.
        generator: generator of the random entries on the CPU; None: torch's own.
        scale: factor of the random entries.

    Example:
        >>> small, large = (TensorNetwork.parse("i:2 r, r o:2", {"r": size}) for size in (1, 2))
        >>> left, right = grow(small, large, [torch.ones(2, 1), torch.ones(1, 2)])
        >>> right, bool(left[:, 1].any())
        (tensor([[1., 1.],
                [0., 0.]]), True)
    """
    found = []
    for k, (core, axes) in enumerate(zip(cores, after.cores, strict=True)):
        size = scale * float(core.to(torch.float64).square().mean().sqrt())
        noise = torch.randn(after.core_shapes[k], generator=generator, dtype=core.dtype, device="cpu")
        whole = (noise * (size or scale)).to(core.device)
        for dim, bond in enumerate(axes):
            last = max(j for j, other in enumerate(after.cores) if bond in other)
            if last == k and bond in after.bonds:
                whole.narrow(dim, before.sizes[bond], after.sizes[bond] - before.sizes[bond]).zero_()
        whole[tuple(map(slice, core.shape))] = core
        found.append(whole)
    return found


def padded(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor with zeros behind its entries, up to a shape.

    Example:
        >>> padded(torch.ones(2), (3,))
        tensor([1., 1., 0.])
    """
    whole = value.new_zeros(tuple(shape))
    whole[tuple(map(slice, value.shape))] = value
    return whole


def _rule(
    network: TensorNetwork,
    free: Sequence[str],
    sizes: dict[str, int] | None,
    energy: float | None,
    error: float | None,
) -> Choose:
    """Return the rule that chooses the rank of each bond of a tree."""
    if sizes is not None:
        wanted = {**network.sizes, **sizes}
        return lambda bond, squares, total: wanted[bond]
    left, bonds = (error or 0.0) ** 2, len(free)

    def choose(bond: str, squares: Tensor, total: float) -> int:
        """Spend what is left of the squared error in equal shares, or one share per unfolding."""
        nonlocal left, bonds
        if bond not in free:
            return network.sizes[bond]
        share = max(1 - energy, LOSSLESS) if energy is not None else max(left / bonds, ROUNDING)
        beyond = squares.flip(0).cumsum(0).flip(0) / total
        rank = int((beyond > share).sum())
        left, bonds = left - (float(beyond[rank]) if rank < len(beyond) else 0.0), bonds - 1
        return rank

    return choose


def _fitted(network: TensorNetwork, cores: Sequence[Tensor], kernel: Tensor, sizes: dict[str, int]) -> Resized:
    """Fit a network with other bonds, from the best of usual starts and the old cores' largest slices."""
    smaller = network.resize(sizes)
    found = decompose(kernel, smaller, start=_largest(network, smaller, cores))
    return Resized(smaller, list(found.cores), found.error, network)


def _largest(network: TensorNetwork, smaller: TensorNetwork, cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the slices of the cores whose norms, multiplied over the cores of a bond, are largest."""
    found = list(cores)
    for bond in network.bonds:
        homes = [(k, core.index(bond)) for k, core in enumerate(network.cores) if bond in core]
        norms = torch.stack(
            [
                found[k].transpose(0, dim).flatten(1).norm(dim=1) if found[k].ndim > 1 else found[k].abs()
                for k, dim in homes
            ]
        ).prod(0)
        kept = norms.argsort(descending=True)[: smaller.sizes[bond]].sort().values
        for k, dim in homes:
            found[k] = found[k].index_select(dim, kept)
    return found


def _within(
    network: TensorNetwork, cores: Sequence[Tensor], kernel: Tensor, free: Sequence[str], error: float
) -> Resized:
    """Return the smallest of some networks whose fit has at most this error; the old cores if none has.

    The networks are those of falling losses of the kernel's unfoldings, which bound the error from below.
    """
    found, rungs = cuts(network, kernel), [network.resize(dict.fromkeys(free, 1))]
    for power in range(TRIED):
        reached = reach(rungs[-1], free, found, max(error**2 * FINER**power, LOSSLESS))
        rungs.append(network.resize({bond: min(reached.sizes[bond], network.sizes[bond]) for bond in free}))
    rungs = [rung for rung in dict.fromkeys(rungs[1:]) if rung != network]
    best = Resized(network, list(cores), 0.0, network)
    low, high = 0, len(rungs)
    while low < high:
        middle = (low + high) // 2
        fit = _fitted(network, cores, kernel, {bond: rungs[middle].sizes[bond] for bond in free})
        if fit.error <= error:
            best, high = fit, middle
        else:
            low = middle + 1
    return best
