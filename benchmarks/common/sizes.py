"""Sizes of networks."""

from torch import nn

import tnlayers
from benchmarks.common.errors import BuildError


def convolutions(model: nn.Module) -> list[nn.Module]:
    """Return the dense and tensor convolutions of a network, by depth."""
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, tnlayers.TensorLayer))]


def size(model: nn.Module) -> dict[str, float]:
    """Return the parameters, those with dense convolutions, and the keep ratio of all convolutions together."""
    parameters = numel(model)
    cores = sum(numel(conv) for conv in convolutions(model))
    kernels = sum(  # no convolution has a bias
        conv.network.dense_params if isinstance(conv, tnlayers.TensorLayer) else conv.weight.numel()
        for conv in convolutions(model)
    )
    return {
        "parameters": parameters,
        "dense_parameters": parameters - cores + kernels,
        "keep_ratio": round(cores / kernels, 4),
    }


def keep_of(dense: nn.Module, ratio: float) -> float:
    """Return the keep ratio of all convolutions but the stem that makes a whole network this many times smaller.

    Raises:
        BuildError: the other layers alone have too many parameters.
    """
    convs, total = sum(conv.weight.numel() for conv in convolutions(dense)[1:]), numel(dense)
    keep = (total / ratio - (total - convs)) / convs
    if not 0 < keep <= 1:
        raise BuildError(
            f"a network of {total} parameters cannot be compressed {ratio:g} times by its convolutions alone"
        )
    return round(keep, 5)


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
