"""From a dense kernel to cores: alternating least squares over any network.

With all cores but one held fixed, the kernel is linear in that one, so the best value of it solves a least-squares
problem. Its normal equations contract from the network itself: where they are small they are solved directly, else by
conjugate gradients, which only ever multiply by them. Sweeping over the cores lowers the error step by step, to a local
minimum.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tnlayers.contraction import contract, reconstruct
from tnlayers.network import TensorNetwork
from tnlayers.notation import Axes
from tnlayers.step import permutation

SWEEPS = 100
TOLERANCE = 1e-5
"""Sweeps end when one lowers the relative error by less than this share of it."""
PULL = 1e-12
"""Weight of a core's present value in its least-squares problem, relative to the mean eigenvalue."""
DIRECT = 1024
"""Up to this many unknowns (per dense index of the core) the normal matrix is formed: at most 8 MiB."""
STEPS = 20
"""Conjugate-gradient steps per core and sweep, from the core's present value."""


def decompose(network: TensorNetwork, weight: Tensor, *, seed: int = 0) -> tuple[list[Tensor], float]:
    """Fit the cores of a network to a dense kernel.

    Args:
        network: the form of the fit.
        weight: the kernel, of shape ``network.dense_shape``.
        seed: of the starting point; torch's global generators are left alone.

    Returns:
        tuple[list[Tensor], float]: the cores in float64, all of one norm, and ``||weight - fit|| / ||weight||``.

    Raises:
        TypeError: ``weight`` is no tensor of real floating-point numbers.
        ValueError: it has another shape, no values (meta device), or holds NaN or infinity.

    Reference:
        Kolda and Bader, "Tensor Decompositions and Applications", SIAM Review 2009, for CP; the same step
        for any network.

    Example:
        >>> network = TensorNetwork.parse("i:6 a:2, a h:3 w:3 b:2, b o:5")
        >>> truth = reconstruct(network, [torch.randn(shape) for shape in network.core_shapes])
        >>> decompose(network, truth)[1] < 1e-4
        True
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = str(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight is of type {kind}; it must be a tensor of real floating-point numbers")
    if tuple(weight.shape) != network.dense_shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; network '{network}' contracts to {network.dense_shape}"
        )
    if weight.is_meta:
        raise ValueError("weight is on the meta device; only a kernel with values can be fitted")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinity; only finite kernels can be fitted")
    # Float64 inside; on the CPU where the device has none.
    target = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device).to(torch.float64)
    largest = float(target.abs().max())  # the squares of very small or large entries leave float64's range
    norm = largest * float((target / (largest or 1.0)).norm())
    if norm == 0:
        return [torch.zeros(shape, dtype=torch.float64, device=target.device) for shape in network.core_shapes], 0.0
    split = target.reshape(network.shape(network.dense_axes)) / norm
    generator = torch.Generator().manual_seed(seed)
    cores = [
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(target.device)
        for shape in network.core_shapes
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
    other_cores = [core for j, core in enumerate(cores) if j != k]
    other_axes = [axes for j, axes in enumerate(network.cores) if j != k]
    elsewhere = {axis for axes in other_axes for axis in axes}
    # A dense axis that another core has too parts the problem into one for each of its indices.
    apart = tuple(axis for axis in network.cores[k] if axis not in network.bonds and axis in elsewhere)
    free = tuple(axis for axis in network.cores[k] if axis not in elsewhere)
    twin = {bond: f"{bond}'" for bond in network.bonds}

    def primed(axes: Axes) -> Axes:
        return tuple(twin.get(axis, axis) for axis in axes)

    wanted, columns = apart + bonds + free, math.prod(network.shape(bonds))
    matrices = math.prod(network.shape(apart)), columns, -1

    def back(solution: Tensor) -> Tensor:
        return solution.reshape(network.shape(wanted)).permute(permutation(wanted, network.cores[k]))

    right = contract([target, *other_cores], [network.dense_axes, *other_axes], wanted).reshape(matrices)
    if not other_cores:
        return back(right)
    present = cores[k].permute(permutation(network.cores[k], wanted)).reshape(matrices)
    pairs, pair_axes = other_cores * 2, [*other_axes, *map(primed, other_axes)]
    if columns > DIRECT:

        def normal(value: Tensor) -> Tensor:
            value = value.reshape(network.shape(wanted))
            return contract([*pairs, value], [*pair_axes, wanted], apart + primed(bonds) + free).reshape(matrices)

        return back(_conjugate_gradients(normal, right, present))
    gram = contract(pairs, pair_axes, apart + bonds + primed(bonds)).reshape(-1, columns, columns)
    # Where a bond is larger than its rank can be, the equations are singular: a pull towards the present value, too
    # weak to be seen elsewhere, chooses among the solutions, and the error still falls with every step.
    # Of all problems together, since one alone may be zero: a block of the kernel without entries.
    pull = PULL * gram.diagonal(dim1=1, dim2=2).mean()
    identity = torch.eye(columns, dtype=gram.dtype, device=gram.device)
    return back(torch.linalg.solve(gram + pull * identity, right + pull * present))


def _conjugate_gradients(normal: Callable[[Tensor], Tensor], right: Tensor, start: Tensor) -> Tensor:
    """Improve the solution of ``normal(value) = right`` in a fixed number of steps, each of which lowers the error."""
    value, residual = start, right - normal(start)
    direction, square = residual, residual.square().sum()
    first = square
    for _ in range(STEPS):
        if square <= 1e-24 * first or not square:
            break
        image = normal(direction)
        length = square / (direction * image).sum()
        value, residual = value + length * direction, residual - length * image
        square, before = residual.square().sum(), square
        direction = residual + (square / before) * direction
    return value
