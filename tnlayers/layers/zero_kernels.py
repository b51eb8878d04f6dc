"""Kernels of zeros, or nearly: held by cores that learn.

Spread over all cores, a kernel of zeros makes each of them zero. The gradient of a core is a product with all others,
so that none ever gets one. The same holds nearly for a kernel that is small: of n cores and a kernel of size s, a step
of gradient descent moves the kernel by a share of s ** (2 - 2 / n). So the last core alone is small, and the others are
what a kernel of ordinary size has: the first step then moves the last core, and those after it all of them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tnlayers.fitting.gauge import SMALL
from tnlayers.init.draw import draw
from tnlayers.init.variance import Init, Variance
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork


@torch.no_grad()
def shrink(cores: Sequence[Tensor], factor: float) -> None:
    """Multiply a kernel in place, by a small factor on its last core or an ordinary one on all.

    Example:
        >>> cores = [torch.ones(1), torch.ones(1)]
        >>> shrink(cores, 0.25), cores
        (None, [tensor([0.5000]), tensor([0.5000])])
        >>> shrink(cores, 0.0), cores
        (None, [tensor([0.5000]), tensor([0.])])
    """
    spread = cores if factor >= SMALL else cores[-1:]
    for core in spread:
        core.mul_(factor ** (1 / len(spread))) if factor else core.zero_()


def learnable(
    network: TensorNetwork, geometry: Geometry, variance: Variance, init: Init, cores: Sequence[Tensor], norm: float
) -> list[Tensor]:
    """Cores of the same kernel as those fitted, of which training moves all.

    Args:
        network: of the cores.
        geometry: of the layer.
        variance: the solver's answer, which says how large a kernel is drawn.
        init: how cores are drawn.
        cores: fitted to a kernel, all of one norm.
        norm: of that kernel.

    Returns:
        list[Tensor]: the cores as they are, unless the kernel is nearly zero. For a kernel of zeros, drawn by the
        solver from a generator of their own, always the same, and the last one zero: a fit depends on its kernel alone,
        and torch's global generators are left alone.
    """
    size = norm / (variance.weight_std * math.sqrt(network.dense_params))
    if size >= SMALL:
        return list(cores)
    if size > 0:
        cores = [core * size ** (-1 / len(cores)) for core in cores]
    else:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)
            like = [torch.empty(core.shape, dtype=core.dtype) for core in cores]
            cores = draw(network, geometry, variance, init, like)
    shrink(cores, size)
    return list(cores)
