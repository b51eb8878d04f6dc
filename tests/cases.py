"""The table of cases: a new format needs a row here, and the contract test says so if it is missing."""

from typing import Any, NamedTuple

import tnlayers
from tnlayers.conv import TensorConv

FAMILIES = [getattr(tnlayers, f"{kind.__name__}Conv2d") for name, kind in tnlayers.FORMATS.items() if name != "einsum"]
"""A two-dimensional layer of every format that needs no network of the user's."""


class Case(NamedTuple):
    """Arguments of a layer beside the convolution's own."""

    format: str
    ndim: int
    arguments: dict[str, Any]

    @property
    def layer(self) -> type[TensorConv]:
        return getattr(tnlayers, f"{tnlayers.FORMATS[self.format].__name__}Conv{self.ndim}d")

    def __str__(self) -> str:
        shown = "-".join(f"{k}={v}".replace(" ", "") for k, v in self.arguments.items())
        return f"{self.format}{self.ndim}d-{shown}"


# 8 -> 12 channels: factors (2, 2, 2) and (3, 2, 2); below also unequal numbers of factors.
_ANY_DIMENSION: list[tuple[str, dict[str, Any]]] = [
    ("cp", {"rank": 6}),
    ("cp", {"rank": 4, "in_shape": (4, 2)}),
    ("tucker", {"rank": 3}),
    ("tucker", {"rank": (2, 2, 3), "in_shape": (2, 4)}),
    ("tt", {"rank": 3}),
    ("tt", {"rank": 2, "in_shape": (8,), "out_shape": (2, 3, 2)}),
    ("tt", {"rank": 3, "layout": "chain"}),
    ("tr", {"rank": 2}),
    ("tr", {"rank": (1, 2, 3, 2, 1), "in_shape": (4, 2), "out_shape": (2, 6)}),
    ("tr", {"rank": 0.7}),
    ("btt", {"rank": 2, "blocks": 3}),
    ("btt", {"rank": 1, "blocks": 1, "in_shape": (8,), "out_shape": (6, 2)}),
]
_ONE_DIMENSION: list[tuple[str, int, dict[str, Any]]] = [
    ("tucker", 1, {"rank": (3, 4, 2)}),
    ("tucker", 2, {"rank": (3, 4, 2, 3)}),
    ("tucker", 3, {"rank": {"ri": 3, "ro": 4, "rh": 2}}),
    ("einsum", 1, {"rank": 2, "network": "i1 a, a w b, b i2 o1 a c, c o2"}),
    ("einsum", 2, {"rank": 2, "network": "n:2 i1 a, n i2 b, n a b h c, n c w d, d o"}),
    ("einsum", 2, {"rank": (), "network": "o i h w"}),
    ("einsum", 3, {"rank": 3, "network": "i r s, o r t, d r s t, h w r"}),
]

CASES = [Case(name, ndim, arguments) for ndim in (1, 2, 3) for name, arguments in _ANY_DIMENSION]
CASES += [Case(name, ndim, arguments) for name, ndim, arguments in _ONE_DIMENSION]
