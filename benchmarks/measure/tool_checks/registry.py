"""The registry of tools, and the layers that they are tried on."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tnlayers
from tnlayers import TensorLayer

KINDS = ("Conv2d", "ConvTranspose2d", "Linear")
NETWORKS = {"Linear": "n:2 i1 a, n i2 a b, n b o"} | dict.fromkeys(KINDS[:2], "n:2 i1 a, n i2 b, n a b h w c, c o")


Layers = dict[str, TensorLayer]
Report = dict[str, str]
TOOLS: dict[str, Callable[[Layers], Report]] = {}
"""Tools by name. A tool takes layers by name, and returns the error of each, or an empty string."""


def layers(formats: Any = None, kinds: Any = KINDS, only: str | None = None, **arguments: Any) -> Layers:
    """Return a layer of every format and kind, or only the one named `only`."""
    made: Layers = {}
    for name in formats or tnlayers.FORMATS:
        for kind in kinds:
            own: dict[str, Any] = {} if kind == "Linear" else {"kernel_size": 3, "padding": 1, "stride": 2}
            own |= {"network": NETWORKS[kind]} if name == "einsum" else {}
            layer = getattr(tnlayers, f"{tnlayers.FORMATS[name].__name__}{kind}")
            if only in (None, layer.__name__):
                made[layer.__name__] = layer(8, 12, rank=2, **own, **arguments)
    return made


def tool(name: str) -> Callable[[Callable[[TensorLayer], None]], Callable[[Layers], Report]]:
    """Register the decorated check of one layer as a tool."""

    def enter(check: Callable[[TensorLayer], None]) -> Callable[[Layers], Report]:
        def each(made: Layers) -> Report:
            return {key: attempt(partial(check, layer)) for key, layer in made.items()}

        TOOLS[name] = each
        return each

    return enter


def attempt(check: Callable[[], None]) -> str:
    """Return the error that a check raises, in one line. It is empty if the check passes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of the tools about themselves
            check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return ""


def same(found: Tensor, expected: Tensor) -> None:
    """Assert equality by norm, up to the rounding of a few thousand sums."""
    assert found.shape == expected.shape
    error = relative(found, expected)
    assert error < 256 * torch.finfo(expected.dtype).eps, f"differs by {error:.2g}"


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of `expected`."""
    return float((found - expected).detach().double().norm() / expected.detach().double().norm())
