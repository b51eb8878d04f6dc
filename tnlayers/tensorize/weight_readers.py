"""Detection of the attributes that a model's own code reads from its layers."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnlayers.backend.observe import observe
from tnlayers.tensorize.held_outside import is_recurrent, own_attributes

_ANSWERED = Tensor.dtype.__get__, Tensor.device.__get__  # type: ignore[attr-defined]
"""Properties of a weight that a sequence of layers, which has none, can provide."""
_KIND = "weight.dtype"


class Read(NamedTuple):
    """Attributes that are read from a layer.

    Attributes:
        names: read attributes that a sequence of layers lacks.
        kind: whether a weight's dtype or device is read, which a stand-in can provide.
    """

    names: Sequence[str] = ()
    kind: bool = False


def reads(model: nn.Module, layers: Sequence[nn.Module], example: Any) -> dict[nn.Module, Read]:
    """Run a model as ``observe`` does, and return the attributes that are read from its layers.

    Reads within a layer's own forward are ignored. So are reads of attributes that a user has added to the layer, since
    these move to the new layer.
    """
    found: dict[nn.Module, dict[str, None]] = {layer: {} for layer in layers}
    kinds = {layer: type(layer) for layer in layers}
    within: list[bool] = []
    try:
        for layer in layers:
            layer.__class__ = _spy(kinds[layer], found[layer], within)
        observe(model, (), [example], lambda *_: None)
    finally:
        for layer, kind in kinds.items():
            layer.__class__ = kind
    return {layer: Read(sorted({*names} - {_KIND}), _KIND in names) for layer, names in found.items()}


def mentions(model: nn.Module, name: str) -> bool:
    """Return whether code of a model's classes (except torch's) or of its attributes reads an attribute of this name.

    Functions with "init" in their names are ignored: they run when the model is made.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    values = [value for module in model.modules() for value in vars(module).values()]
    for kind in kinds:
        if kind.__module__.partition(".")[0] not in ("builtins", "tnlayers", "torch"):
            values += vars(kind).values()
    for value in values:
        function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType) and "init" not in code.co_name and _has(code, name):
            return True
    return False


def _has(code: CodeType, name: str) -> bool:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return name in code.co_names or name in code.co_consts or any(_has(each, name) for each in inner)


@cache
def _general() -> frozenset[str]:
    return frozenset({*dir(nn.Sequential), *vars(nn.Sequential())})


def _spy(kind: type[Any], names: dict[str, None], within: list[bool]) -> type[Any]:
    """Make a subclass of a layer's class that records reads, except the layer's own (``within`` is not empty)."""

    @contextmanager
    def inside() -> Iterator[None]:
        within.append(True)
        try:
            yield
        finally:
            within.pop()

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names[_KIND if func in _ANSWERED else "weight"] = None
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})

    class Spy(kind):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            get = super().__getattribute__
            own = own_attributes(is_recurrent(self))
            if within or name.startswith("_") or name in _general() or name in get("__dict__").keys() - own:
                return get(name)
            with inside():
                if name == "weight":
                    return get(name).as_subclass(Watched)
                if name in own or hasattr(self, name):
                    names[name] = None
                return get(name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with inside():
                return super().forward(*args, **kwargs)

    Spy.__name__ = kind.__name__
    return Spy
