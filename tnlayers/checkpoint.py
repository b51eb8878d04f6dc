"""Models with tensor layers as safetensors files that anyone may read: no code in them, and nothing taken on trust."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

import tnlayers
from tnlayers.kinds import KINDS, build, describe
from tnlayers.layer import TensorLayer
from tnlayers.stored import (
    KEY,
    LONGEST,
    VERSION,
    Content,
    about_file,
    about_layer,
    check_storable,
    join,
    read,
    replacing,
    shared_names,
    with_own_memory,
)

_PARALLEL = DataParallel, DistributedDataParallel


def save_tensorized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model and the description of its tensor layers to one safetensors file.

    The file is replaced in one step: whatever happens, the old one or the new one is there, whole. Wrappers
    (``torch.compile``, data parallel) leave no trace in it. A tensor that the model has under several names is stored
    once.

    Args:
        model: any model; all its parameters and persistent buffers are stored.
        path: the file, in a directory that exists. A link's target is replaced, not the link.

    Raises:
        TypeError: ``model`` is no module; it has extra state or a kind of tensor that the file cannot hold; or a layer
            is of a class of its own.
        ValueError: a tensor is on the meta device; or a layer has no description, see ``tnlayers.kinds.describe``.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch, tnlayers
        >>> from tnlayers.checkpoint import load_tensorized, save_tensorized
        >>> model = torch.nn.Sequential(tnlayers.TRLinear(16, 32, rank=2), torch.nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tensorized(model, f"{folder}/model.safetensors")
        ...     plain = lambda: torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
        ...     again = load_tensorized(plain, f"{folder}/model.safetensors")
        >>> bool((again(torch.ones(16)) == model(torch.ones(16))).all())
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be an nn.Module")
    modules = _modules(model)
    layers = {}
    for name, module in modules.values():
        if isinstance(module, TensorLayer):
            with about_layer(name):
                layers[name] = describe(module)
    state = {name: value for name, (_, value) in _state(model).items()}
    for name, value in state.items():
        check_storable(name, value)
    aliases = shared_names(state)
    config = getattr(dict(modules.values())[""], "_tensorize_config", None)
    about = {
        "version": VERSION,
        "tnlayers": tnlayers.__version__,
        "config": None if config is None else config.to_dict(),
        "layers": layers,
        "aliases": aliases,
    }
    from safetensors.torch import save_file  # noqa: PLC0415  (loaded where it is in use)

    text = json.dumps(about, allow_nan=False)
    if len(text) > LONGEST:
        raise ValueError(f"the model's description has {len(text):,} characters; a file holds at most {LONGEST:,}")
    tensors = with_own_memory({name: value for name, value in state.items() if name not in aliases})
    with replacing(path) as file:
        save_file(tensors, file, {KEY: text})


def load_tensorized(
    model_factory: Callable[[], nn.Module], path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> Any:
    """The model of a file, made from one with plain layers.

    No code from the file is run, and a file that is damaged, or made to do damage, is answered with a sentence. Layers
    are checked against the model's, and their sizes against the tensors that the file has, before memory is taken.

    Args:
        model_factory: makes the model as it was before its layers were swapped, or with tensor layers already; called
            once. What it returns may be compiled, but not the layers alone, and not yet distributed.
        path: what ``save_tensorized`` wrote.
        device: where the model is to be.

    Returns:
        Any: what the factory made, each layer that the file describes in its place, with the training flag and
            requires_grad of the one replaced; then every parameter and persistent buffer loaded. Tensors that were one
            when saved are one again.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the factory makes no module.
        ValueError: the file was written by something else or by a newer version, is damaged, or does not fit the
            model; the sentence names the layer or tensor, and both sides.

    Example:
        See ``save_tensorized``.
    """
    where = os.fsdecode(path)
    if not os.path.exists(where):
        raise FileNotFoundError(f"{where} does not exist")
    if not os.path.isfile(where):
        raise ValueError(f"{where} is no regular file; pass one that save_tensorized wrote")
    from safetensors import safe_open  # noqa: PLC0415

    with about_file(where):
        opened = safe_open(where, framework="pt")
    with opened as file:
        with about_file(where):
            content = read(file)
        model = model_factory()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model_factory made {type(model).__name__}; it must make an nn.Module")
        with about_file(where):
            model, made = _swap(model, content)
            _match(_state(model), content)
            _fill(made)
            _tie(model, content.aliases)
            names = {raw: content.aliases.get(name, name) for name, (raw, _) in _state(model).items()}
            model.load_state_dict({raw: file.get_tensor(name) for raw, name in names.items()})
    if content.config is not None:
        dict(_modules(model).values())[""]._tensorize_config = content.config  # type: ignore[assignment]
    return model.to(device)


def _swap(model: nn.Module, content: Content) -> tuple[nn.Module, dict[nn.Module, TensorLayer]]:
    """Put the file's layers, without values yet, in the place of the model's; also tell which replaced which."""
    modules = _modules(model)
    if any(isinstance(module, DistributedDataParallel) for _, module in modules.values()):
        raise ValueError("the model is distributed; distribute it after loading, when it has its parameters")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta:
            raise ValueError(f"the factory makes {name!r} on the meta device; it must make a model with values")
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
                made[old] = build(description, device="meta")
    return _place(model, modules, made), made


def _place(
    model: nn.Module, modules: Mapping[str, tuple[str, nn.Module]], made: Mapping[nn.Module, TensorLayer]
) -> nn.Module:
    for raw, (name, module) in modules.items():
        parent, _, leaf = raw.rpartition(".")
        if module not in made:
            if isinstance(module, TensorLayer):
                raise ValueError(f"the model has the tensor layer {name!r}, but the file has no such layer")
        elif not raw:
            model = made[module]
        elif modules[parent][0] == name:
            raise ValueError(f"layer {name!r} is compiled or wrapped by itself in the model; do that after loading")
        else:
            modules[parent][1]._modules[leaf] = made[module]
    return model


def _compare(old: Any, description: Mapping[str, Any]) -> None:
    """Refuse a module that the layer of a description cannot stand in for."""
    ours = isinstance(old, TensorLayer)
    kind = old.dense_type if ours else next((kind for kind in KINDS if isinstance(old, kind)), None)
    there = f"a {type(old).__name__}"
    theirs = _said(description["kind"], description["arguments"], description["dtype"])
    if kind is not None:
        weight = old.cores[0] if ours else old.weight
        own = json.loads(json.dumps(KINDS[kind]._arguments(old)))
        there = _said(kind.__name__, own, str(weight.dtype).removeprefix("torch."))
    if there != theirs:
        raise ValueError(f"the file has {theirs}, but the model has {there}")
    hooks = [name for name, value in vars(old).items() if "_hooks" in name and value]
    if hooks or is_parametrized(old):
        raise ValueError(f"the model's module has {', '.join(hooks) or 'parametrizations'}; add them after loading")


def _said(kind: str, arguments: Mapping[str, Any], dtype: str) -> str:
    return f"{kind}({', '.join(f'{name}={arguments[name]}' for name in sorted(arguments))}, dtype={dtype})"


def _match(state: Mapping[str, tuple[str, Any]], content: Content) -> None:
    """Refuse a model whose state is not that of the file: other names, shapes or dtypes."""
    for name in {**state, **content.tensors}:
        value = state[name][1] if name in state else None
        if name in state and not isinstance(value, Tensor):
            raise ValueError(f"the model's state {name!r} is {type(value).__name__}; a file holds tensors only")
        own = None if value is None else (tuple(value.shape), value.dtype)
        theirs = content.tensors.get(name)
        if own != theirs:
            sides = ["no tensor" if side is None else f"{side[1]} of shape {side[0]}" for side in (theirs, own)]
            raise ValueError(f"{name!r} is {sides[0]} in the file, but {sides[1]} in the model")


def _fill(made: Mapping[nn.Module, TensorLayer]) -> None:
    """Give the layers memory, and what they take over from those that they replace."""
    old: Any
    for old, new in made.items():
        weights = list(old.cores) if isinstance(old, TensorLayer) else [old.weight]
        new.to_empty(device=weights[0].device).train(old.training)
        new.cores.requires_grad_(any(weight.requires_grad for weight in weights))
        if new.bias is not None:
            new.bias.requires_grad_(old.bias.requires_grad)


def _tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Make one tensor of what was one when it was saved."""
    modules, state = _modules(model), _state(model)
    own = shared_names({name: value for name, (_, value) in state.items()})
    for alias, name in own.items():
        if aliases.get(alias, alias) != aliases.get(name, name):
            raise ValueError(f"{alias!r} and {name!r} are one tensor in the model, but two in the file")
    for alias, name in aliases.items():
        if own.get(alias, alias) != own.get(name, name):
            places = [state[each][0].rpartition(".") for each in (alias, name)]
            (owner, to), (source, leaf) = [(modules[prefix][1], leaf) for prefix, _, leaf in places]
            for kind in ("_parameters", "_buffers"):
                held, taken = getattr(owner, kind), getattr(source, kind)
                if to in held and leaf in taken:
                    held[to] = taken[leaf]


def _modules(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Every module by its name, shared ones by each, with its name without wrappers; what is wrapped comes last."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        prefix, _, leaf = raw.rpartition(".")
        above, parent = found.get(prefix, ("", None))
        wrapped = leaf == "_orig_mod" or (leaf == "module" and isinstance(parent, _PARALLEL))
        found[raw] = above if wrapped else join(above, leaf), module
    return found


def _state(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """The state by its names without wrappers; with it, its names as they are."""
    modules, state = _modules(model), {}
    for raw, value in model.state_dict().items():
        prefix, _, leaf = raw.rpartition(".")
        state[join(modules[prefix][0] if prefix in modules else prefix, leaf)] = raw, value
    return state
