"""Weight decay of kernels: the squared Frobenius norm of what the cores contract to."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tnlayers.backend.input_checks import check_module
from tnlayers.layers.base import TensorLayer
from tnlayers.ops.squared_norm import squared
from tnlayers.spec.network import TensorNetwork


def frobenius_penalty(module: nn.Module) -> Tensor:
    """Sum of ``squared_norm`` over the tensor layers in a module; layers of the same cores count once.

    ``loss + 0.5 * weight_decay * frobenius_penalty(model)`` decays the kernels as SGD's ``weight_decay`` does those of
    dense layers. The optimizer's own must be 0 for the cores, as in the groups of ``param_groups``.

    Args:
        module: any module; without tensor layers, the sum is 0.

    Returns:
        Tensor: a number, on the first layer's device, in float32 or float64.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.CPConv2d(8, 8, 3, rank=4), nn.ReLU(), tnlayers.TRConv2d(8, 8, 3, rank=2))
        >>> expected = model[0].weight.square().sum() + model[2].weight.square().sum()
        >>> torch.allclose(frobenius_penalty(model), expected)
        True
    """
    kernels: list[tuple[TensorNetwork, list[Tensor]]] = []
    for layer in check_module("module", module).modules():
        if isinstance(layer, TensorLayer):
            network, cores = layer.network, layer._listed()
            # The first core first: of many layers, most comparisons end there.
            if not any(cores[0] is held[0] and _same(cores, held) and network == other for other, held in kernels):
                kernels.append((network, cores))
    if not kernels:
        first = next(module.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)
    total = squared(*kernels[0])
    for network, cores in kernels[1:]:
        total = total + squared(network, cores).to(total.device)
    return total


def squared_norm(layer: TensorLayer) -> Tensor:
    """The squared Frobenius norm of a layer's kernel, differentiable in the cores, also repeatedly.

    The cores contract with their copies, or first to the dense kernel, whichever takes less time by estimate (for 64
    channels and less it is mostly the kernel). The order is found once for a network.

    Args:
        layer: any tensor layer.

    Returns:
        Tensor: a number, in the cores' dtype, also under autocast; for float16 and bfloat16 computed and returned in
        float32, since the square would leave the range of the one and the precision of the other.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.TuckerConv2d(16, 16, 3, rank=4, dtype=torch.float64)
        >>> torch.allclose(squared_norm(layer), layer.weight.square().sum(), rtol=1e-12)
        True
    """
    return squared(layer.network, layer._listed())


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
