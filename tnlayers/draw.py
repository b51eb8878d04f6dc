"""Fresh values for cores, by the solver's answer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.contraction import reconstruct
from tnlayers.network import TensorNetwork
from tnlayers.variance import Init, Variance

_TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
"""Standard deviation of a standard normal distribution cut at -2 and 2."""


@torch.no_grad()
def draw(network: TensorNetwork, variance: Variance, init: Init, cores: Sequence[Tensor]) -> list[Tensor]:
    """Draw the cores of a network.

    Args:
        network: which core has which axes.
        variance: the solver's answer for it.
        init: distribution, and whether the kernel's norm is to be exact.
        cores: tensors whose shapes and devices the new ones take.

    Returns:
        list[Tensor]: in float32 at least; in float64, where the device has it, if the norm is exact.
    """
    draws = [_entries(core, std, init.distribution) for core, std in zip(cores, variance.std, strict=True)]
    if not init.exact:
        return draws
    # The norm in float64, where the device has it: the product of many cores would round in less.
    fine = torch.float32 if draws[0].device.type == "mps" else torch.float64
    draws = [values.to(fine) for values in draws]
    target = variance.weight_std * math.sqrt(network.dense_params)
    scale = (target / reconstruct(network, draws).norm()) ** (1 / len(draws))
    return [values * scale for values in draws]


def place(value: Tensor, target: Any) -> Tensor:
    """A value as its target holds it: sharded as that is, all shards from the first process' value."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415  (only where it is in use anyway)

    return distribute_tensor(value.to(target.dtype), mesh, target.placements)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from its shards if it has any."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def uniform(like: Tensor, bound: float) -> Tensor:
    """Entries drawn from [-bound, bound], of a tensor's whole shape, in float32 at least."""
    # Not like the tensor itself: what is held in shards is drawn as a whole too.
    entries = torch.empty(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return entries.uniform_(-bound, bound)


def _entries(core: Tensor, std: float, distribution: str) -> Tensor:
    if distribution == "uniform":
        return uniform(core, math.sqrt(3) * std)
    entries = torch.empty(core.shape, dtype=torch.promote_types(core.dtype, torch.float32), device=core.device)
    if distribution == "truncated_normal":
        return nn.init.trunc_normal_(entries, a=-2, b=2).mul_(std / _TRUNCATED_STD)
    return entries.normal_(0, std)
