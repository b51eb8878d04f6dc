r"""Fits of two cores that share dense axes: every block of the kernel is a matrix of low rank, as in BlockTT.

Let :math:`s` be an index of the shared axes. The block :math:`W_s` is the product of one slice of each core, and the
blocks have nothing else in common. So a truncated singular value decomposition of each block is the best fit.

In a metric M of the inputs, blocks of the same outputs are coupled: an error in one can make up for that of another.
With all blocks fixed but those of one shared input index i, the best unconstrained block is
:math:`F_i + \sum_j E_j M_{ji} M_{ii}^{-1}`, where E is the error and F the fit so far. With :math:`M_{ii} = L L^\top`,
the best one of a rank is the truncated decomposition of it times L, times :math:`L^{-1}`. Each such step lowers the
error. Derived here.
"""

import math

import torch
from torch import Generator, Tensor

from tnlayers.backend.views import permutation
from tnlayers.fitting.matrices import PADDING, truncated
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

SWEEPS, TOLERANCE = 50, 5e-4
"""Maximum number of sweeps over the shared inputs. They end when one lowers the squared error by a lesser share."""


def block_fit(
    network: TensorNetwork, target: Tensor, generator: Generator, metric: Tensor | None = None
) -> list[Tensor] | None:
    """Return the cores of low error if two cores share dense axes and all bonds; None for other networks.

    Without a metric the fit is the best there is. With one, the cores' other axes must be inputs in one core, and none
    in the other. Memory: six times the kernel.

    Args:
        network: network to fit.
        target: the kernel in float64, with one dimension for each of ``network.dense_axes``.
        generator: generator of entries that do not change the kernel, where a rank exceeds a block's.
        metric: metric of the input channels, a row and a column for each.

    Example:
        >>> network = TensorNetwork.parse("i1:2 i2:3 o1:2 r:3, r:3 i1:2 o1:2 o2:3")
        >>> target = torch.arange(36.0, dtype=torch.float64).reshape(2, 3, 2, 3)
        >>> cores = block_fit(network, target, torch.Generator())
        >>> torch.allclose(torch.einsum("ijkr,rikl->klij", *cores), target)
        True
    """
    sides = _sides(network, metric is not None)
    if sides is None:
        return None
    (first, own), (second, others), shared_inputs, shared = sides
    layout = shared_inputs, shared, others, own
    sizes = [math.prod(network.shape(axes)) for axes in layout]
    blocks = target.permute(permutation(network.dense_axes, sum(layout, ()))).reshape(sizes)
    rank = math.prod(network.shape(network.bonds))
    if metric is None:
        left, right = truncated(blocks, rank)
    else:
        inputs = network.inputs
        shape = network.shape(inputs)
        order = permutation(inputs, shared_inputs + own)
        count = len(inputs)
        moved = metric.reshape(*shape, *shape).permute(*order, *(count + k for k in order))
        left, right = _weighted(blocks, moved.reshape(sizes[0], sizes[3], sizes[0], sizes[3]), rank)
    found = {}
    for core, axes, values in ((first, own, right.mT), (second, others, left)):
        whole = values.new_zeros(*values.shape[:3], rank)
        whole[..., : values.shape[3]] = values
        if core == first and values.shape[3] < rank:  # the other core is zero there, so both learn
            missing = whole[..., values.shape[3] :]
            noise = torch.randn(missing.shape, generator=generator, dtype=values.dtype, device="cpu").to(values)
            missing.copy_(noise * PADDING * values.square().mean().sqrt())
        have = shared_inputs + shared + axes + network.bonds
        whole = whole.reshape(network.shape(have))
        found[core] = whole.permute(permutation(have, network.cores[core])).contiguous()
    return [found[0], found[1]]


def _sides(network: TensorNetwork, weighted: bool) -> tuple[tuple[int, Axes], tuple[int, Axes], Axes, Axes] | None:
    """Return the core of the inputs and the other, each with its own axes; the shared inputs; the other shared axes."""
    if len(network.cores) != 2 or not all(set(network.bonds) <= set(core) for core in network.cores):
        return None
    dense = [tuple(axis for axis in core if axis not in network.bonds) for core in network.cores]
    common = tuple(axis for axis in dense[0] if axis in dense[1])
    own = [tuple(axis for axis in axes if axis not in common) for axes in dense]
    inputs = set(network.inputs)
    first = int(not inputs.isdisjoint(own[1]))
    if not common or (weighted and not (inputs.issuperset(own[first]) and inputs.isdisjoint(own[1 - first]))):
        return None
    shared = tuple(axis for axis in common if axis in inputs), tuple(axis for axis in common if axis not in inputs)
    return (first, own[first]), (1 - first, own[1 - first]), *shared


def _weighted(blocks: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of blocks (inputs, shared, rows, columns) of low error in a metric of (inputs, columns)."""
    count, shared, rows, width = blocks.shape
    factors = torch.linalg.cholesky(metric.diagonal(dim1=0, dim2=2).permute(2, 0, 1))

    def best(wanted: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        left, right = truncated(wanted @ factor, rank)
        return left, torch.linalg.solve_triangular(factor.mT, right.mT, upper=True).mT

    left, right = best(blocks, factors[:, None])
    # One row for each output: its products with the metric are products of matrices.
    error = (blocks - left @ right).permute(1, 2, 0, 3).contiguous()
    matrix = metric.reshape(count * width, count * width)
    flat = error.view(shared * rows, count * width)
    square = float((flat * (flat @ matrix)).sum())
    for _ in range(SWEEPS):
        before = square
        for k in range(count):
            pull = (flat @ matrix[:, k * width : (k + 1) * width]).view(shared, rows, width)
            old = left[k] @ right[k]
            change = torch.cholesky_solve(pull.mT, factors[k]).mT
            left[k], right[k] = best(old + change, factors[k])
            new = left[k] @ right[k] - old
            error[:, :, k] -= new
            square -= float(((2 * change - new) @ factors[k] * (new @ factors[k])).sum())
        if before - square <= TOLERANCE * square:
            break
    return left, right
