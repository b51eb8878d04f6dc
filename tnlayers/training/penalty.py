"""Weight decay of kernels: the squared Frobenius norm of the contracted cores."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tnlayers.backend.input_checks import check_module
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.networks import network_layers
from tnlayers.ops.squared_norm import squared


def frobenius_penalty(module: nn.Module) -> Tensor:
    """Return the sum of ``squared_norm`` over a module's tensor layers. Layers with the same cores count once.

    Weights that ``parametrize_`` made networks of count as layers.

    ``loss + 0.5 * weight_decay * frobenius_penalty(model)`` decays the kernels as SGD's ``weight_decay`` does in dense
    layers. The optimizer's ``weight_decay`` must be 0 for the cores, as in the groups of ``param_groups``.

    Args:
        module: any module; without tensor layers, the sum is 0.

    Returns:
        Tensor: a scalar on the first layer's device, in float32 or float64.

    Raises:
        TypeError: ``module`` is no module.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.CPConv2d(8, 8, 3, rank=4), nn.ReLU(), tnlayers.TRConv2d(8, 8, 3, rank=2))
        >>> expected = model[0].weight.square().sum() + model[2].weight.square().sum()
        >>> torch.allclose(frobenius_penalty(model), expected)
        True
    """
    found = network_layers(check_module("module", module)).values()
    kernels = [(layer.network, cores) for layer, cores in distinct(found)]
    if not kernels:
        first = next(module.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)
    total = squared(*kernels[0])
    for network, cores in kernels[1:]:
        total = total + squared(network, cores).to(total.device)
    return total


def squared_norm(layer: TensorLayer) -> Tensor:
    """Return the squared Frobenius norm of a layer's kernel, differentiable any number of times in the cores.

    The cores are contracted with their copies, or first to the dense kernel, by the smaller time estimate (up to 64
    channels this is mostly the kernel). The order is found once per network.

    Args:
        layer: any tensor layer.

    Returns:
        Tensor: a scalar in the cores' dtype, even under autocast. For float16 and bfloat16 it is computed and returned
        in float32: the square exceeds the range of float16 and the precision of bfloat16.

    Raises:
        TypeError: ``layer`` is no tensor layer.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.TuckerConv2d(16, 16, 3, rank=4, dtype=torch.float64)
        >>> torch.allclose(squared_norm(layer), layer.weight.square().sum(), rtol=1e-12)
        True
    """
    if not isinstance(layer, TensorLayer):
        raise TypeError(f"layer is of type {type(layer).__name__}; it must be a layer of tnlayers")
    return squared(layer.network, layer._listed())


def distinct(layers: Iterable[TensorLayer]) -> list[tuple[TensorLayer, list[Tensor]]]:
    """Return the layers with their cores. Of layers with the same network and cores, return the first."""
    found: list[tuple[TensorLayer, list[Tensor]]] = []
    for layer in layers:
        network, cores = layer.network, layer._listed()
        # The first cores are compared first, since that decides most cases cheaply.
        if not any(cores[0] is held[0] and _same(cores, held) and network == other.network for other, held in found):
            found.append((layer, cores))
    return found


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
