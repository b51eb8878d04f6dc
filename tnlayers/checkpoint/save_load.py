"""Saving and loading of models with tensor layers: safetensors files without code, read as untrusted input."""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers._version import __version__
from tnlayers.backend.input_checks import check_module
from tnlayers.backend.whole_files import replacing
from tnlayers.checkpoint.file import (
    KEY,
    LONGEST,
    VERSION,
    Content,
    about_file,
    check_storable,
    join,
    read,
    shared_names,
    views,
    with_own_memory,
)
from tnlayers.checkpoint.others import more, within
from tnlayers.checkpoint.restore import fill, modules_of, swap
from tnlayers.interop.huggingface import follow
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.description import about_layer, describe
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.recurrent_description import describe_recurrent
from tnlayers.tensorize.held_outside import held


def save_tensorized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model and the description of its tensor layers to one safetensors file.

    The file is replaced atomically: at any time, either the old or the new one is complete. Wrappers
    (``torch.compile``, data parallel) are not stored. A tensor with several names is stored once. Tensors that share
    memory otherwise, such as a weight and its transpose, are stored separately, with a note that they are views.

    Args:
        model: any model; all its parameters and persistent buffers are stored.
        path: the file, in an existing directory. A link's target is replaced, not the link.

    Raises:
        TypeError: ``model`` is no module; it has extra state or a kind of tensor that the file cannot hold; or a
            layer's class defines more than its format.
        ValueError: a tensor is on the meta device; or a layer has no description, see
            ``tnlayers.layers.description.describe``.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch, tnlayers
        >>> from tnlayers import load_tensorized, save_tensorized
        >>> model = torch.nn.Sequential(tnlayers.TRLinear(16, 32, rank=2), torch.nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tensorized(model, f"{folder}/model.safetensors")
        ...     plain = lambda: torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
        ...     again = load_tensorized(plain, f"{folder}/model.safetensors")
        >>> bool((again(torch.ones(16)) == model(torch.ones(16))).all())
        True
    """
    check_module("model", model)
    modules = modules_of(model)
    layers, recurrent = {}, {}
    for name, module in modules.values():
        if isinstance(module, TensorRecurrent):
            with about_layer(name):
                recurrent[name] = describe_recurrent(module)
        if isinstance(module, TensorLayer) and not within(name, module, modules):
            with about_layer(name):
                layers[name] = describe(module)
    outputs, weights = more(modules)
    state = {name: value for name, (_, value) in _state(model).items()}
    for name, value in state.items():
        check_storable(name, value)
    aliases = shared_names(state)
    config = vars(dict(modules.values())[""]).get("_tensorize_config")
    about = {
        "version": VERSION,
        "tnlayers": __version__,
        "config": None if config is None else config.to_dict(),
        "layers": layers,
        "aliases": aliases,
    }
    about |= {"recurrent": recurrent} if recurrent else {}
    about |= {"outputs": outputs} if outputs else {}
    about |= {"weights": weights} if weights else {}
    about |= {"views": found} if (found := views(state, aliases)) else {}
    from safetensors.torch import save_file  # noqa: PLC0415  (loaded only when used)

    text = json.dumps(about, allow_nan=False)
    if len(text) > LONGEST:
        raise ValueError(f"the model's description has {len(text):,} characters; a file holds at most {LONGEST:,}")
    tensors = with_own_memory({name: value for name, value in state.items() if name not in aliases})
    with replacing(path) as file:
        save_file(tensors, file, {KEY: text})


def load_tensorized(
    model_factory: Callable[[], nn.Module], path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> Any:
    """Load the model of a file into a model made by a factory, usually with plain layers.

    No code from the file is run, and a damaged or malicious file raises ValueError. Before memory is allocated, layers
    are checked against the model's, and their sizes against the file's tensors.

    Args:
        model_factory: called once; makes the model as it was before its layers were swapped, or with tensor layers
            already. The model may be compiled, but not its layers alone, and must not be distributed yet. Tensor layers
            that match the file's description stay the same objects.
        path: a file written by ``save_tensorized``.
        device: device of the loaded model.

    Returns:
        Any: the factory's model with the layers that the file describes, each with the bias, the training flag and
            requires_grad of the one replaced, and with every parameter and persistent buffer loaded. Tensors that were
            the same when saved are the same again.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the factory makes no module.
        ValueError: the file was written by something else or by a newer version, is damaged, or does not fit the
            model (the message names the layer or tensor, and both sides); or an object outside of the model's modules
            holds a layer to be replaced.

    Warns:
        UserWarning: tensors shared memory when they were saved, and do not in the model.

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
            model, made = swap(model, content)
            _match(_state(model), content)
            fill(made)
            _tie(model, content.aliases)
            names = {raw: content.aliases.get(name, name) for name, (raw, _) in _state(model).items()}
            model.load_state_dict({raw: file.get_tensor(name) for raw, name in names.items()})
            _check_views(model, content, file.get_tensor)
    if content.config is not None:
        dict(modules_of(model).values())[""]._tensorize_config = content.config  # type: ignore[assignment]
    follow(model)
    return model.to(device)


def _match(state: Mapping[str, tuple[str, Any]], content: Content) -> None:
    """Raise if names, shapes or dtypes of the model's state differ from the file's."""
    for name in {**state, **content.tensors}:
        value = state[name][1] if name in state else None
        if name in state and not isinstance(value, Tensor):
            raise ValueError(f"the model's state {name!r} is {type(value).__name__}; a file holds tensors only")
        own = None if value is None else (tuple(value.shape), value.dtype)
        theirs = content.tensors.get(name)
        if own != theirs:
            sides = ["no tensor" if side is None else f"{side[1]} of shape {side[0]}" for side in (theirs, own)]
            raise ValueError(f"{name!r} is {sides[0]} in the file, but {sides[1]} in the model")


def _tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Tie the tensors that were the same when they were saved."""
    modules, state = modules_of(model), _state(model)
    own = shared_names({name: value for name, (_, value) in state.items()})
    for alias, name in own.items():
        if aliases.get(alias, alias) != aliases.get(name, name):
            raise ValueError(f"{alias!r} and {name!r} are one tensor in the model, but two in the file")
    gone: dict[nn.Module, list[Tensor]] = {}
    tied: list[tuple[Any, str, Tensor]] = []
    for alias, name in aliases.items():
        if own.get(alias, alias) != own.get(name, name):
            places = [state[each][0].rpartition(".") for each in (alias, name)]
            (owner, to), (source, leaf) = [(modules[prefix][1], leaf) for prefix, _, leaf in places]
            for kind in ("_parameters", "_buffers"):
                there, taken = getattr(owner, kind), getattr(source, kind)
                if to in there and leaf in taken:
                    tied.append((there, to, taken[leaf]))
                    gone.setdefault(owner, []).append(there[to])
    for owner, holder in held(model, gone, stay=True).items():
        raise ValueError(
            f"a {type(owner).__name__} shares tensors in the file, but {holder}, and would keep the old one"
        )
    for there, to, value in tied:
        there[to] = value


def _check_views(model: nn.Module, content: Content, stored: Callable[[str], Tensor]) -> None:
    """Compare memory sharing in the loaded model with the saved one: raise on wrong values, warn of lost views."""
    state = {name: value for name, (_, value) in _state(model).items()}
    here = views(state, content.aliases)
    for pair in here.items():
        for name in pair:
            value, theirs = state[name], stored(content.aliases.get(name, name)).to(state[name].device)
            if not torch.equal(_bits(value), _bits(theirs)):
                raise ValueError(f"{pair[0]!r} and {pair[1]!r} share memory in the model, but differ in the file")
    for name, other in content.views.items():
        if name not in here:
            warnings.warn(
                f"{name!r} and {other!r} were views of one memory when they were saved, and are not in the model; each "
                "has its values, but they are no longer tied",
                stacklevel=3,
            )


def _bits(tensor: Tensor) -> Tensor:
    """Return the tensor's bytes, so that equal NaNs compare equal."""
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _state(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """Return the state by names without wrappers; each entry is the raw name and the value."""
    modules, state = modules_of(model), {}
    for raw, value in model.state_dict().items():
        prefix, _, leaf = raw.rpartition(".")
        state[join(modules[prefix][0] if prefix in modules else prefix, leaf)] = raw, value
    return state
