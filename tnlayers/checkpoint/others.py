"""What a file says, beside layers, of outputs tied to embeddings and of networks of single weights."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from tnlayers.checkpoint.file import join
from tnlayers.layers.any_weight import NetworkWeight
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.description import about_layer, exactly
from tnlayers.layers.tied import TiedLinear
from tnlayers.layers.weight_description import build_weight, describe_weight

_Modules = Mapping[str, tuple[str, nn.Module]]
"""Every module with its name without wrappers, by each raw name."""


def within(name: str, module: nn.Module, modules: _Modules) -> bool:
    """Return whether a name of an embedding is that in an output tied to it, and the embedding has another name."""
    named = dict(modules.values())
    above = [found for found, each in modules.values() if each is module and found != name]
    inside = isinstance(named.get(name.rpartition(".")[0]), TiedLinear)
    return inside and any(not isinstance(named.get(each.rpartition(".")[0]), TiedLinear) for each in above)


def more(modules: _Modules) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe the tied outputs and the networks of single weights, by name."""
    found: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for name, module in modules.values():
        with about_layer(name):
            if isinstance(module, TiedLinear) and isinstance(module.embedding, TensorLayer):
                names = [each for each, other in modules.values() if other is module.embedding]
                own = min(names, key=lambda each: within(each, module.embedding, modules))
                settings = {"strategy": module.strategy, "memory": module.memory}
                found[0][name] = {"embedding": own, **settings}
            for key, steps in _networks(module):
                found[1][join(name, key)] = describe_weight(steps[0])
    return found


def _networks(module: Any) -> list[tuple[str, Any]]:
    if not parametrize.is_parametrized(module):
        return []
    return [(key, steps) for key, steps in module.parametrizations.items() if isinstance(steps[0], NetworkWeight)]


def networks(modules: _Modules, descriptions: Mapping[str, Any]) -> None:
    """Make the parameters that a file has as networks such networks, with memory but without values."""
    found = dict(modules.values())
    for name, description in descriptions.items():
        above, _, key = name.rpartition(".")
        module: Any = found.get(above)
        with about_layer(name):
            own = dict(_networks(module)) if module is not None else {}
            if key in own:
                if describe_weight(own[key][0]) != description:
                    raise ValueError("it is another network in the model than in the file")
                continue
            old = None if module is None else module._parameters.get(key)
            if old is None:
                raise ValueError("it is a network in the file, but the model has no such parameter")
            network = build_weight(description, old)
            parametrize.register_parametrization(module, key, network, unsafe=True)
            module.parametrizations[key].to_empty(device=old.device)


def outputs(modules: _Modules, descriptions: Mapping[str, Any]) -> dict[nn.Module, nn.Module]:
    """Return by plain linear layer the layer over the cores of an embedding, which has its bias."""
    found, made = dict(modules.values()), dict[nn.Module, nn.Module]()
    for name, about in descriptions.items():
        old: Any = found.get(name)
        with about_layer(name):
            given = exactly("outputs", about, ("embedding", "strategy", "memory"))
            embedding: Any = found.get(given.pop("embedding"))
            if isinstance(old, TiedLinear) and old.embedding is embedding:
                continue
            if type(old) is not nn.Linear or embedding is None:
                raise ValueError(f"the file has a linear layer tied to an embedding, but the model has {old}")
            new = TiedLinear(embedding, **given)
            if (new.in_features, new.out_features) != (old.in_features, old.out_features):
                raise ValueError(f"the file has {new}, but the model has {old}")
            new.bias, new.training = old.bias, old.training
            made[old] = new
    return made
