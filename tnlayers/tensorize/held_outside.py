"""Search for references that would keep a layer, or its weights, after its replacement in the model's modules.

A swap replaces a layer in the ``_modules`` of its parents. Any other reference would silently keep the old one: lists
and dictionaries of any depth, sets, partial functions, bound methods, closures, hooks, objects, classes. The search
follows the references that Python's garbage collector reports, so it need not know every kind of container.
"""

import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from gc import get_referents, is_tracked
from sys import stdlib_module_names
from types import CodeType, FrameType, FunctionType, ModuleType, TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tnlayers.backend.shared_memory import sharing
from tnlayers.layers.recurrent import RECURRENT
from tnlayers.tensorize.swappable import BASES, NETWORKS, own_modules, tensor_class

HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)
"""Attributes of a module that hold hooks."""
_CLOSED = ModuleType, CodeType, FrameType, TracebackType, Optimizer
"""Types that are not searched: they reach everything, and optimizers have ``remap_optimizer_``."""
_SEQUENCES: tuple[Any, ...] = list, tuple, deque
_OTHERS = stdlib_module_names | {"numpy", "tnlayers", "torch"}
"""Packages whose classes hold no layers of a model."""

_Link = tuple[Any, str]
"""A path to an object, as a linked list: the path before, and the last part."""


@cache
def own_attributes(recurrent: bool = False) -> frozenset[str]:
    """Return the attributes of new layers, ours and torch's, recurrent or not. A user has added all others."""
    kinds = [kind for kind in BASES if (kind in RECURRENT) == recurrent]
    sizes = [(1, 1, *([1] if BASES[kind].dense_name == "conv" else [])) for kind in kinds]
    layers = [kind(*given, device="meta") for kind, given in zip(kinds, sizes, strict=True)]
    layers.append(tensor_class("cp", kinds[-1] if recurrent else nn.Linear)(1, 1, rank=1, device="meta"))
    return frozenset(name for layer in layers for name in vars(layer))


def is_recurrent(layer: nn.Module) -> bool:
    """Return whether a layer is recurrent, ours or torch's."""
    return issubclass(type(layer), (*RECURRENT, *RECURRENT.values()))  # reads no attribute, unlike isinstance


def ties(
    model: nn.Module, leaving: Mapping[nn.Module, Sequence[Tensor]], leads: Mapping[nn.Module, nn.Module]
) -> dict[nn.Module, str]:
    """Return by layer the name of a remaining parameter or buffer that shares memory with a leaving tensor.

    Args:
        model: the model with the layers.
        leaving: layers, and their parameters that leave the model.
        leads: by layer, the one that it stays tied to.
    """
    inside = {part: layer for layer in leaving for part in own_modules(layer)}
    gone = {layer: {*map(id, tensors)} for layer, tensors in leaving.items()}
    names: list[str] = []
    tensors: list[Tensor] = []
    layers: list[nn.Module | None] = []
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                layer = inside.get(module)
                names.append(f"{path}.{name}" if path else name)
                tensors.append(tensor)
                layers.append(layer if layer is not None and id(tensor) in gone[layer] else None)
    found: dict[nn.Module, str] = {}
    for pair in sharing(tensors):
        for here, there in (pair, pair[::-1]):
            layer = layers[here]
            other = layers[there]
            if layer is not None and (other is None or leads.get(other, other) is not leads.get(layer, layer)):
                found.setdefault(layer, names[there])
    return found


def held(model: nn.Module, leaving: Mapping[nn.Module, Sequence[Tensor]], stay: bool = False) -> dict[nn.Module, str]:
    """Describe what holds a layer, or memory of its leaving tensors, outside of the modules; see ``ties``.

    Args:
        model: the model with the layers.
        leaving: layers, and their tensors that leave the model.
        stay: whether the layers stay, and only the tensors leave.

    Returns:
        dict[nn.Module, str]: such as "Net.stages[0][1] holds it too, outside of the modules", for held layers only.
    """
    inside = {} if stay else {part: layer for layer in leaving for part in own_modules(layer)}
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child in inside and child not in leaving and inside.get(parent) is not inside[child]:
                found.setdefault(inside[child], f"{type(parent).__name__}.{key} holds a part of it too")
    loose: list[tuple[Tensor, _Link]] = []
    for value, path in _reached(model, stay):
        if isinstance(value, Tensor):
            loose.append((value, path))
        elif value in inside:
            what = "it" if value in leaving else "a part of it"
            found.setdefault(inside[value], f"{_place(path)} holds {what} too, outside of the modules")
    gone = [(layer, tensor) for layer, tensors in leaving.items() for tensor in tensors]
    tensors = [*(tensor for _, tensor in gone), *(tensor for tensor, _ in loose)]
    for here, there in sharing(tensors) if loose else ():
        if here < len(gone) <= there:
            (layer, tensor), (other, path) = gone[here], loose[there - len(gone)]
            own = *layer.named_parameters(), *layer.named_buffers()
            name = next(name for name, value in own if value is tensor)
            what = f"its {name}" if other is tensor else f"memory of its {name}"
            found.setdefault(layer, f"{_place(path)} holds {what} too, outside of the modules")
    return found


def _reached(model: nn.Module, stay: bool) -> Iterator[tuple[Any, _Link]]:
    """Yield once each module and tensor reachable other than by the modules' registered children and parameters."""
    # torch.compile's function of a model copies its attributes, so it refers to these registered places.
    own = ("_modules", "_parameters", "_buffers")
    tree = {id(place) for module in model.modules() for place in (module, *(vars(module)[name] for name in own))}
    waiting: deque[tuple[Any, _Link]] = deque()
    for module in model.modules():
        path = None, type(module).__name__
        waiting.append((type(module), path))
        # A layer's hooks and added attributes move to the new layer; its other attributes are dropped.
        skipped = {*own}
        # torch's recurrent layers that stay would go on with the weights in their lists.
        if isinstance(module, (*NETWORKS, *BASES)) and not (stay and is_recurrent(module)):
            skipped |= own_attributes(is_recurrent(module)) - HOOKS
        waiting += [(value, (path, f".{name}")) for name, value in vars(module).items() if name not in skipped]
    # By id, since not all can be hashed or compared. The values keep the objects alive, so that ids stay unique.
    seen: dict[int, Any] = {}
    while waiting:
        value, path = waiting.popleft()
        if id(value) in seen or not is_tracked(value):  # numbers, texts, and tuples of them refer to nothing
            continue
        seen[id(value)] = value
        kind = type(value)
        if issubclass(kind, Tensor | nn.Module):
            yield value, path
        if not issubclass(kind, (Tensor, *_CLOSED)) and id(value) not in tree:
            waiting += [(inner, (path, name) if name else path) for name, inner in _children(value)]


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield an object's references, named ones first, without running the object's own code."""
    kind = type(value)
    if issubclass(kind, type):
        if str(value.__module__).partition(".")[0] not in _OTHERS:
            yield from ((f".{name}", inner) for name, inner in vars(value).items())
            yield from (("", base) for base in value.__bases__)
        return
    if issubclass(kind, FunctionType):  # all but its globals
        yield from (("", each) for each in (value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)))
        return
    if issubclass(kind, weakref.ref):
        yield "()", weakref.ref.__call__(value)
    if kind in weakref.ProxyTypes:
        with suppress(ReferenceError):
            yield "", value.__repr__.__self__
    if issubclass(kind, dict):
        yield from ((f"[{_brief(key)}]", inner) for key, inner in [*dict.items(value)] if is_tracked(inner))
    for base in _SEQUENCES:
        if issubclass(kind, base):
            yield from ((f"[{k}]", inner) for k, inner in enumerate([*base.__iter__(value)]) if is_tracked(inner))
    attributes = _attributes(value)
    yield from ((f".{name}", inner) for name, inner in [*attributes.items()])
    yield from (("", inner) for inner in get_referents(value) if inner is not attributes)


def _attributes(value: Any) -> dict[Any, Any]:
    try:
        found = object.__getattribute__(value, "__dict__")
    except Exception:  # it has none, or its own code raised
        return {}
    return found if type(found) is dict else {}


def _brief(key: Any) -> str:
    return repr(key)[:40] if type(key) in (str, int) else "..."


def _place(path: _Link | None) -> str:
    """Return the text of a path, from a module's class on. Long paths lose their middle."""
    parts: list[str] = []
    while path is not None:
        path, part = path
        parts.append(part)
    parts.reverse()
    return "".join(parts if len(parts) <= 9 else [*parts[:5], " ... ", *parts[-3:]])
