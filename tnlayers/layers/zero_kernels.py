"""Cores of zero or nearly zero kernels that can still learn.

If a zero kernel is spread over all cores, each core is zero. The gradient of a core is a product with all others, so
every gradient is zero forever. A small kernel nearly has the same problem: with n cores and a kernel of size s, a
gradient step changes the kernel by a share of s ** (2 - 2 / n). So only the last core is made small, and the others
keep the size for an ordinary kernel. The first step then changes the last core, and later steps all cores.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from tnlayers.fitting.gauge import SMALL
from tnlayers.init.draw import draw
from tnlayers.init.variance import Init, Variance
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork

_drawing = threading.Lock()
"""Held while the global generator has another seed: layers may be fitted side by side."""


@torch.no_grad()
def shrink(cores: Sequence[Tensor], factor: float) -> None:
    """Multiply a kernel in place: by a small factor through its last core, by another through all cores.

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
    """Return cores with the fitted cores' kernel, such that training changes all of them.

    Args:
        network: network of the cores.
        geometry: geometry of the layer.
        variance: the solver's result, which gives the size of a drawn kernel.
        init: how cores are drawn.
        cores: cores fitted to a kernel, with equal norms.
        norm: norm of that kernel.

    Returns:
        list[Tensor]: the same cores unless the kernel is nearly zero. For a zero kernel, cores drawn by the solver with
        a fixed seed, the last one zero. So a fit depends only on its kernel, and torch's global generators keep their
        state.
    """
    size = norm / (variance.weight_std * math.sqrt(network.dense_params))
    if size >= SMALL:
        return list(cores)
    if size > 0:
        cores = [core * size ** (-1 / len(cores)) for core in cores]
    else:
        with _drawing, torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)
            like = [torch.empty(core.shape, dtype=core.dtype) for core in cores]
            cores = draw(network, geometry, variance, init, like)
    shrink(cores, size)
    return list(cores)
