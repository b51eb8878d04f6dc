"""Fresh values for cores, by the solver's answer."""

import math
from collections.abc import Sequence

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


def _entries(core: Tensor, std: float, distribution: str) -> Tensor:
    entries = torch.empty_like(core, dtype=torch.promote_types(core.dtype, torch.float32))
    if distribution == "uniform":
        return entries.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)
    if distribution == "truncated_normal":
        return nn.init.trunc_normal_(entries, a=-2, b=2).mul_(std / _TRUNCATED_STD)
    return entries.normal_(0, std)
