"""Best fits of kernels that are matrices: all axes longer than one are in two cores, as those of a 1x1 convolution."""

import math

import torch
from torch import Generator, Tensor

from tnlayers.backend.views import permutation
from tnlayers.ops.contraction import contract
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

LARGEST = 2**24
"""Maximum product of the two cores' bonds (128 MiB), and maximum side of a Gram matrix squared."""
PADDING = 1e-3
"""Scale of the random entries where a rank exceeds the kernel's, relative to the core's other entries."""


def matrix_fit(network: TensorNetwork, target: Tensor, generator: Generator) -> list[Tensor] | None:
    """Return the cores of least error if the kernel is a matrix between two cores, by one eigenvalue problem.

    The other cores pass indices on: they are one where all their bonds have the same index. The network is then a
    product of two matrices. If its rank reaches the smaller of their bonds' sizes, no network of these sizes has a
    higher one, and a truncated singular value decomposition is the best fit. None in all other cases.

    Args:
        network: network to fit.
        target: the kernel in float64, with one dimension for each of ``network.dense_axes``.
        generator: generator of entries that do not change the kernel, where a rank exceeds the kernel's.

    Reference:
        Eckart and Young, Psychometrika 1936.

    Example:
        >>> ring = TensorNetwork.parse("a:2 i:6 b:3, b h:1 w:1 c:3, c o:5 a")
        >>> cores = matrix_fit(ring, torch.ones(5, 6, 1, 1, dtype=torch.float64), torch.Generator())
        >>> [tuple(core.shape) for core in cores]
        [(2, 6, 3), (3, 1, 1, 3), (3, 5, 2)]
    """
    dense = [tuple(axis for axis in core if axis not in network.bonds) for core in network.cores]
    long = [k for k, axes in enumerate(dense) if math.prod(network.shape(axes)) > 1]
    if len(long) != 2 or sum(map(len, dense)) != len(network.dense_axes):
        return None
    sides = [tuple(axis for axis in network.cores[k] if axis in network.bonds) for k in long]
    sizes, lengths = ([math.prod(network.shape(axes)) for axes in each] for each in (sides, [dense[k] for k in long]))
    if not all(sides) or math.prod(sizes) > LARGEST or min(lengths) ** 2 > LARGEST:
        return None
    found = {k: _passing(network, k, dense[k]).to(target) for k in range(len(dense)) if k not in long}
    pairs = _joined(network, found, sides, sizes)
    if len(pairs) != min(sizes) or any(len(side.unique()) != len(pairs) for side in pairs.T):
        return None
    short = tuple(axis for k in found for axis in dense[k])
    matrix = target.permute(permutation(network.dense_axes, (*dense[long[0]], *dense[long[1]], *short)))
    left, right = truncated(matrix.reshape(lengths), len(pairs))
    for side, (k, part, index) in enumerate(zip(long, (left.mT, right), pairs.T, strict=True)):
        whole = torch.randn(sizes[side], lengths[side], generator=generator, dtype=target.dtype, device="cpu").to(part)
        whole *= PADDING * part.square().mean().sqrt()
        # Of indices beyond the kernel's rank, one side is zero and the other is not: so both learn.
        whole[index[len(part) :]] *= 1 - side
        whole[index[: len(part)]] = part
        have = sides[side] + dense[k]
        whole = whole.reshape(network.shape(have))
        found[k] = whole.permute(permutation(have, network.cores[k])).contiguous()
    return [found[k] for k in range(len(found))]


def _passing(network: TensorNetwork, k: int, dense: Axes) -> Tensor:
    """Return a core without long dense axes: one where all bonds have the same index."""
    core = network.cores[k]
    least = min((network.sizes[axis] for axis in core if axis not in dense), default=1)
    value = torch.zeros(network.core_shapes[k], dtype=torch.float64, device="cpu")
    every = torch.arange(least, device="cpu")
    value[tuple(torch.zeros_like(every) if axis in dense else every for axis in core)] = 1
    return value


def _joined(network: TensorNetwork, found: dict[int, Tensor], sides: list[Axes], sizes: list[int]) -> Tensor:
    """Return the pairs of indices, of the bonds of the two cores, that the other cores join."""
    # Bonds of the second core get names of their own, which identities join to the first's.
    twins = {axis: f"{axis}'" for axis in sides[1]}
    operands = [value.cpu() for value in found.values()]
    axes = [network.cores[k] for k in found]
    for axis, twin in twins.items():
        operands.append(torch.eye(network.sizes[axis], dtype=torch.float64, device="cpu"))
        axes.append((axis, twin))
    bonds = [tuple(axis for axis in names if axis in network.bonds or axis in twins.values()) for names in axes]
    values = [
        value.reshape([n for n, axis in zip(value.shape, names, strict=True) if axis in kept])
        for value, names, kept in zip(operands, axes, bonds, strict=True)
    ]
    return contract(values, bonds, sides[0] + tuple(twins.values())).reshape(sizes).nonzero()


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (..., rows, rank) and (..., rank, columns) of the best fits to matrices, equal in norm.

    Each pair of singular vectors is scaled by the root of its singular value.

    Example:
        >>> left, right = truncated(torch.diag(torch.tensor([4.0, 1.0])), 1)
        >>> left @ right
        tensor([[4., 0.],
                [0., 0.]])
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if tall else matrix
    vectors = torch.linalg.eigh(wide @ wide.mT)[1].flip(-1)[..., :rank]
    others = vectors.mT @ wide
    scale = others.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny).sqrt()
    sides = vectors * scale.mT, others / scale
    return (sides[1].mT, sides[0].mT) if tall else sides
