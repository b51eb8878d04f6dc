"""Replacement of a model's layers by those that a file describes."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from tnlayers.checkpoint.file import Content, join
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.description import about_layer, build, check_replaces, describe
from tnlayers.layers.recurrent_description import with_plain_weights
from tnlayers.tensorize.held_outside import held

_PARALLEL = DataParallel, DistributedDataParallel


def swap(model: nn.Module, content: Content) -> tuple[nn.Module, dict[nn.Module, TensorLayer]]:
    """Replace the model's layers by the file's, without values. Also return the mapping from old to new."""
    modules = modules_of(model)
    if any(isinstance(module, DistributedDataParallel) for _, module in modules.values()):
        raise ValueError("the model is distributed; distribute it after loading, when it has its parameters")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta:
            raise ValueError(f"the factory makes {name!r} on the meta device; it must make a model with values")
    if content.recurrent:
        model = _recurrent(model, modules, content)
        modules = modules_of(model)
    found, made = dict(modules.values()), {}
    first: dict[nn.Module, str] = {}
    for name, description in content.layers.items():
        if name not in found:
            raise ValueError(f"the file has the layer {name!r}, but the model has no module of this name")
        twin = first.setdefault(old := found[name], name)
        if description != content.layers[twin]:
            raise ValueError(f"{twin!r} and {name!r} are one module in the model, but differ in the file")
        if twin == name:
            with about_layer(name):
                _compare(old, description)
                if not _is(old, description):
                    made[old] = build(description, device="meta")
    for raw, (name, module) in modules.items():
        if isinstance(module, TensorLayer) and name not in content.layers:
            raise ValueError(f"the model has the tensor layer {name!r}, but the file has no such layer")
        if module in made and raw and modules[raw.rpartition(".")[0]][0] == name:
            raise ValueError(f"layer {name!r} is compiled or wrapped by itself in the model; do that after loading")
    weights = {old: [p for name, p in old.named_parameters() if name != "bias"] for old in made}
    _refuse_held(model, weights, first)
    return _place(model, modules, made), made


def _recurrent(model: nn.Module, modules: Mapping[str, tuple[str, nn.Module]], content: Content) -> nn.Module:
    """Replace the model's plain recurrent layers by those of the file, with weights that are still plain."""
    found, made = dict(modules.values()), {}
    first: dict[nn.Module, str] = {}
    for name, description in content.recurrent.items():
        if name not in found:
            raise ValueError(f"the file has the recurrent layer {name!r}, but the model has no module of this name")
        old: Any = found[name]
        twin = first.setdefault(old, name)
        if description != content.recurrent[twin]:
            raise ValueError(f"{twin!r} and {name!r} are one module in the model, but differ in the file")
        with about_layer(name):
            new = with_plain_weights(description, old)
            _refuse_hooks(old)
            if new is not old:
                made[old] = new
    _refuse_held(model, {old: [] for old in made}, first)  # torch's layer holds its own parameters in a list
    return _place(model, modules, made)


def _refuse_held(model: nn.Module, weights: Mapping[nn.Module, list[Any]], names: Mapping[nn.Module, str]) -> None:
    for old, holder in held(model, weights).items():
        raise ValueError(
            f"layer {names[old]!r}: {holder}, and would keep the old layer; let the factory remove it there, or make "
            "the layers that the file describes"
        )


def _refuse_hooks(old: nn.Module) -> None:
    hooks = [name for name, value in vars(old).items() if "_hooks" in name and value]
    if hooks or is_parametrized(old):
        raise ValueError(f"the model's module has {', '.join(hooks) or 'parametrizations'}; add them after loading")


def _is(old: Any, description: Mapping[str, Any]) -> bool:
    """Return whether a module is the layer of a description."""
    try:
        return isinstance(old, TensorLayer) and json.loads(json.dumps(describe(old))) == description
    except (TypeError, ValueError):  # the layer has no description
        return False


def _place(model: nn.Module, modules: Mapping[str, tuple[str, nn.Module]], made: Mapping[Any, nn.Module]) -> nn.Module:
    for raw, (_, module) in modules.items():
        parent, _, leaf = raw.rpartition(".")
        if module in made and not raw:
            model = made[module]
        elif module in made:
            modules[parent][1]._modules[leaf] = made[module]
    return model


def _compare(old: Any, description: Mapping[str, Any]) -> None:
    """Raise if the layer of a description cannot replace a module."""
    check_replaces(description, old)
    _refuse_hooks(old)


def fill(made: Mapping[nn.Module, TensorLayer]) -> None:
    """Allocate the new layers, and take over training flag, requires_grad and bias from the old ones."""
    old: Any
    for old, new in made.items():
        weights = list(old.cores) if isinstance(old, TensorLayer) else [old.weight]
        new.to_empty(device=weights[0].device).train(old.training)
        new.cores.requires_grad_(any(weight.requires_grad for weight in weights))
        new.bias = getattr(old, "bias", None)


def modules_of(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return every module with its name without wrappers, by each raw name. Wrapped modules follow their wrapper."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        prefix, _, leaf = raw.rpartition(".")
        above, parent = found.get(prefix, ("", None))
        wrapped = leaf == "_orig_mod" or (leaf == "module" and isinstance(parent, _PARALLEL))
        found[raw] = above if wrapped else join(above, leaf), module
    return found
