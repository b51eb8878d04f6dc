"""Random draws of cores with the variances of the solver."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tnlayers.init.exact_gain import exact, smooth, typical
from tnlayers.init.variance import Init, Variance
from tnlayers.ops.contraction import to_kernel
from tnlayers.ops.squared_norm import fastest, squared
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork

FINE = 2**17
"""Up to this many entries, kernels are made exact in float64; above, in the dtype of the draws."""
LARGEST = 2**23
"""Up to this many entries (32 MiB), kernels are contracted to make them exact. Above, only the norm is set, computed
from the network of the cores and their copies."""
_TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
"""Standard deviation of the standard normal distribution truncated at -2 and 2."""


@torch.no_grad()
def draw(
    network: TensorNetwork, geometry: Geometry, variance: Variance, init: Init, cores: Sequence[Tensor]
) -> list[Tensor]:
    """Draw the cores of a network.

    Args:
        network: axes of each core.
        geometry: the convolution.
        variance: the solver's result for both.
        init: distribution, and the quantities in which the draw is exact.
        cores: tensors with the shapes and devices of the new cores.

    Returns:
        list[Tensor]: in float32 at least; in float64 if more than the variance is set, the device has float64 and the
        kernel is small.
    """
    sides = flow(network) if init.distribution == "orthogonal" else [None] * len(cores)
    draws = [
        _entries(core, std, init.distribution, side) for core, std, side in zip(cores, variance.std, sides, strict=True)
    ]
    if not (init.exact or init.typical) or draws[0].is_meta or isinstance(draws[0], FakeTensor):
        return draws
    # In float64 if the device has it, because the product of many cores loses precision in float32. Large kernels take
    # long and stay in the precision of the draws.
    coarse = draws[0].device.type == "mps" or network.dense_params > FINE
    draws = draws if coarse else [values.double() for values in draws]
    norm = variance.weight_std * math.sqrt(network.dense_params)
    # Contracting a network may need tensors far larger than its kernel. Then the norm is right only in expectation.
    most = max(LARGEST, network.dense_params)
    wide = to_kernel(network).largest > most
    if init.exact and (wide or network.dense_params > LARGEST):
        if fastest(network, draws[0].device.type, str(draws[0].dtype).removeprefix("torch.")).largest > most:
            return draws
        scale = (norm / float(squared(network, draws).sqrt())) ** (1 / len(draws))
        draws = [values * scale for values in draws]
    elif init.exact:
        draws = exact(network, draws, norm, ((), ()) if init.exact == "white" else smooth(network, geometry))
    return typical(network, draws) if init.typical and not wide else draws


def flow(network: TensorNetwork) -> list[tuple[list[int], list[int], list[int]]]:
    """Return, for each core, its incoming dims, its outgoing dims, and its batch dims.

    The signal flows through the cores from inputs to outputs: first the cores with input axes and no output axes, last
    those with output axes and no input axes, otherwise in the network's order. Input and kernel axes are incoming,
    output axes outgoing. A bond is outgoing in the first core that has it and incoming in the last. In every other core
    that has an axis, it selects a slice: a batch dim.

    Example:
        >>> flow(TensorNetwork.skeleton("i r, o r, h r"))
        [([0], [1], []), ([1], [0], []), ([0], [], [1])]
    """

    def stage(k: int) -> int:
        inputs, outputs = (not set(axes).isdisjoint(network.cores[k]) for axes in (network.inputs, network.outputs))
        return outputs - inputs

    order = sorted(range(len(network.cores)), key=stage)
    found = []
    for k, core in enumerate(network.cores):
        sides: tuple[list[int], list[int], list[int]] = ([], [], [])
        for dim, axis in enumerate(core):
            homes = [other for other in order if axis in network.cores[other]]
            comes, goes = homes[-1], homes[0]
            if axis in network.dense_axes:  # into the first core, or out of the last
                comes, goes = (-1, comes) if axis in network.outputs else (goes, -1)
            sides[0 if k == comes else 1 if k == goes else 2].append(dim)
        found.append(sides)
    return found


def uniform(like: Tensor, bound: float) -> Tensor:
    """Draw entries from [-bound, bound], in the full shape of ``like`` and in float32 at least."""
    # torch.empty, not empty_like: a sharded tensor is drawn as a whole too.
    entries = torch.empty(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return entries.uniform_(-bound, bound)


def _entries(core: Tensor, std: float, distribution: str, sides: Sequence[Sequence[int]] | None) -> Tensor:
    if distribution == "uniform":
        return uniform(core, math.sqrt(3) * std)
    entries = torch.empty(core.shape, dtype=torch.promote_types(core.dtype, torch.float32), device=core.device)
    if distribution == "truncated_normal":
        return nn.init.trunc_normal_(entries, a=-2, b=2).mul_(std / _TRUNCATED_STD)
    entries.normal_(0, std)
    return entries if sides is None else _orthogonal(entries, std, *sides)


def _orthogonal(entries: Tensor, std: float, came: Sequence[int], went: Sequence[int], passed: Sequence[int]) -> Tensor:
    """Return semi-orthogonal matrices (batch, incoming, outgoing) from normal entries, in the shape of ``entries``."""
    order = [*passed, *came, *went]
    moved = entries.permute(order)
    rows, columns = (math.prod(entries.shape[dim] for dim in dims) for dims in (came, went))
    matrices = moved.reshape(-1, rows, columns)
    tall = matrices if rows >= columns else matrices.mT
    # Batched form of torch.nn.init.orthogonal_. On the CPU for mps, which has no QR decomposition.
    q, r = (factor.to(tall.device) for factor in torch.linalg.qr(tall.cpu() if tall.device.type == "mps" else tall))
    q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)  # makes the distribution uniform
    q = (q if rows >= columns else q.mT) * (std * math.sqrt(max(rows, columns)))
    found: Tensor = q.reshape(moved.shape).permute([order.index(dim) for dim in range(len(order))])
    return found
