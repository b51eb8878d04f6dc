"""From a dense kernel to cores: alternating least squares over any network.

With all cores but one held fixed, the kernel is linear in that one, so the best value of it solves a least-squares
problem; its normal equations contract from the network itself and never form a matrix of the kernel's size. Sweeping
over the cores lowers the error monotonically, to a local minimum.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tnlayers.contraction import contract, reconstruct
from tnlayers.network import TensorNetwork
from tnlayers.notation import Axes

SWEEPS = 100
TOLERANCE = 1e-5
"""Sweeps end when one lowers the relative error by less than this share of it."""
PULL = 1e-12
"""Weight of a core's present value in its least-squares problem, relative to the mean eigenvalue."""


def decompose(network: TensorNetwork, weight: Tensor, *, seed: int = 0) -> tuple[list[Tensor], float]:
    """Fit the cores of a network to a dense kernel.

    Args:
        network: the form of the fit.
        weight: the kernel, of shape ``network.dense_shape``.
        seed: of the starting point; torch's global generators are left alone.

    Returns:
        tuple[list[Tensor], float]: the cores in float64, all of one norm, and ``||weight - fit|| / ||weight||``.

    Raises:
        ValueError: the kernel has another shape, or holds NaN or infinity.

    Reference:
        Kolda and Bader, "Tensor Decompositions and Applications", SIAM Review 2009, for CP; the same step
        for any network.

    Example:
        >>> network = TensorNetwork.parse("i:6 a:2, a h:3 w:3 b:2, b o:5")
        >>> truth = reconstruct(network, [torch.randn(shape) for shape in network.core_shapes])
        >>> decompose(network, truth)[1] < 1e-4
        True
    """
    if tuple(weight.shape) != network.dense_shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; network '{network}' contracts to {network.dense_shape}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinity; only finite kernels can be fitted")
    target = weight.detach().to(torch.float64)
    norm = float(target.norm())
    if norm == 0:
        return [torch.zeros(shape, dtype=torch.float64, device=weight.device) for shape in network.core_shapes], 0.0
    split = target.reshape(network.shape(network.dense_axes)) / norm
    generator = torch.Generator().manual_seed(seed)
    cores = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device) for shape in network.core_shapes
    ]
    error = math.inf
    for _ in range(SWEEPS):
        for k in range(len(cores)):
            cores[k] = _best(network, cores, k, split)
        cores = balance(cores)
        previous, error = error, float((reconstruct(network, cores).reshape(split.shape) - split).norm())
        if previous - error < TOLERANCE * error or error < torch.finfo(torch.float64).eps:
            break
    return [core * norm ** (1 / len(cores)) for core in cores], error


def balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """Scale the cores to one common norm; the kernel stays as it is."""
    norms = [float(core.norm()) for core in cores]
    if not all(norms):
        return list(cores)
    common = math.exp(sum(map(math.log, norms)) / len(norms))
    return [core * (common / norm) for core, norm in zip(cores, norms, strict=True)]


def _best(network: TensorNetwork, cores: Sequence[Tensor], k: int, target: Tensor) -> Tensor:
    """The value of core ``k`` that minimises the error, the other cores as they are."""
    bonds = tuple(axis for axis in network.cores[k] if axis in network.bonds)
    free = tuple(axis for axis in network.cores[k] if axis not in network.bonds)
    other_cores = [core for j, core in enumerate(cores) if j != k]
    other_axes = [axes for j, axes in enumerate(network.cores) if j != k]
    twin = {bond: f"{bond}'" for bond in network.bonds}

    def primed(axes: Axes) -> Axes:
        return tuple(twin.get(axis, axis) for axis in axes)

    columns = math.prod(network.shape(bonds))
    right = contract([target, *other_cores], [network.dense_axes, *other_axes], bonds + free).reshape(columns, -1)
    if not other_cores:
        return right.reshape(network.shape(bonds + free)).permute(_order(bonds + free, network.cores[k]))
    gram = contract(other_cores * 2, [*other_axes, *map(primed, other_axes)], bonds + primed(bonds))
    gram = gram.reshape(columns, columns)
    # Where a bond is larger than its rank can be, the equations are singular: a pull towards the present value, too
    # weak to be seen elsewhere, chooses among the solutions, and the error still falls with every step.
    pull = PULL * gram.trace() / columns
    present = cores[k].permute(_order(network.cores[k], bonds + free)).reshape(columns, -1)
    identity = torch.eye(columns, dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve(gram + pull * identity, right + pull * present)
    return solution.reshape(network.shape(bonds + free)).permute(_order(bonds + free, network.cores[k]))


def _order(have: Axes, want: Axes) -> list[int]:
    return [have.index(axis) for axis in want]
