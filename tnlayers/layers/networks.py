"""The networks of a model: its tensor layers, and the networks that single weights of other modules are made of."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from tnlayers.backend.input_checks import check_module
from tnlayers.layers.any_weight import NetworkWeight, TensorWeight
from tnlayers.layers.base import TensorLayer


def network_of(module: nn.Module, name: str) -> NetworkWeight | None:
    """Return the network that a parameter of a module was made of, if it is one."""
    if not parametrize.is_parametrized(module, name):
        return None
    steps: Any = module.parametrizations[name]  # type: ignore[index]
    own = [each for key, each in steps.named_children() if key != "parametrizations"]  # those of the cores
    return own[0] if len(own) == 1 and isinstance(own[0], NetworkWeight) else None


@contextmanager
def without_dropout(module: nn.Module, name: str) -> Iterator[None]:
    """Let a parameter of a module be read without dropout of ranks, if it is a network."""
    network = network_of(module, name)
    training = network is not None and network.training
    if network is not None:
        network.training = False
    try:
        yield
    finally:
        if network is not None:
            network.training = training


def network_layers(model: nn.Module) -> dict[str, TensorLayer]:
    """Return every tensor layer by its name, and for every weight that is a network, a layer over its cores.

    Such a layer has no forward, but its cores are the model's parameters. If its ranks change, those of the weight do.

    Raises:
        TypeError: ``model`` is no module, or the cores of a weight are parametrized themselves.

    Example:
        >>> import tnlayers
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> _ = tnlayers.parametrize_(attention, "in_proj_weight", "cp", rank=4)
        >>> model = nn.Sequential(attention, tnlayers.CPLinear(4, 4, rank=2))
        >>> {name: layer.rank for name, layer in network_layers(model).items()}
        {'0.in_proj_weight': {'r': 4}, '1': {'r': 2}}
    """
    found: dict[str, TensorLayer] = {}
    for path, module in check_module("model", model).named_modules():
        if isinstance(module, TensorLayer):
            found[path] = module
        elif parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            own = {f"{path}.{name}" if path else name: lists[name] for name in lists if network_of(module, name)}
            found |= {name: weight_layer(name, steps) for name, steps in own.items()}
    return found


def weight_layer(name: str, steps: Any) -> TensorLayer:
    """Return a layer over the cores in a list of parametrizations, which is the network of the weight of this name.

    Raises:
        TypeError: the cores are parametrized themselves.
    """
    if parametrize.is_parametrized(steps):
        raise TypeError(f"cores of {name} are parametrized; remove the parametrizations first")
    network: NetworkWeight = steps[0]

    def changed(layer: TensorWeight) -> None:
        for k, core in enumerate(layer.cores):
            setattr(steps, f"original{k}", core)
        vars(network)["layer"] = layer.over(core.detach().to("meta") for core in layer.cores)

    names = (f"original{k}" for k in range(len(network.layer.cores)))
    return network.layer.over((getattr(steps, name) for name in names), changed)
