"""What a model's own code reads of its layers, beside calling them, seen while it runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.held import own_attributes
from tnlayers.observe import observe

_ANSWERED = Tensor.dtype.__get__, Tensor.device.__get__  # type: ignore[attr-defined]
"""What a sequence of layers can tell of a weight that it does not have."""


def reads(model: nn.Module, layers: Sequence[nn.Module], example: Any) -> dict[nn.Module, list[str]]:
    """Run a model as ``observe`` does, and name what is read of layers that a sequence lacks.

    Of a weight, its dtype and its device are no matter. What is read within a layer's own forward is no matter either,
    and so is what somebody has put on the layer, which moves to the one that comes instead.
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
    return {layer: sorted(names) for layer, names in found.items() if names}


@cache
def _general() -> frozenset[str]:
    return frozenset({*dir(nn.Sequential), *vars(nn.Sequential())})


def _spy(kind: type[Any], names: dict[str, None], within: list[bool]) -> type[Any]:
    """The class of a layer that notes what is read of it, unless ``within`` holds something: then the layer reads."""

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
            if func not in _ANSWERED:
                names["weight"] = None
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})

    class Spy(kind):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            get = super().__getattribute__
            own = own_attributes()
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
