"""Attributes of a built layer: those that can be set, which plans anew, and those that the cores' shapes fix."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from tnlayers.spec.geometry import Geometry

_FIXED = "in_channels", "out_channels", "kernel_size", "groups", "transposed"
"""Fields of a geometry that the shapes of the cores depend on."""


def settable(name: str) -> Any:
    """An attribute of the geometry that no core depends on: what is set is checked, and the layer plans anew.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.CPConv2d(4, 4, 3, stride=2, rank=2)
        >>> layer.stride = 1
        >>> layer.stride, layer.to_conv().stride
        ((1, 1), (1, 1))
    """

    def write(layer: Any, value: Any) -> None:
        layer.geometry = replace(layer.geometry, **{name: value})

    doc = f"``nn.ConvNd``'s {name}; setting it plans anew."
    return property(lambda layer: getattr(layer.geometry, name), write, doc=doc)


def fixed(name: str, read: Callable[[Any], Any]) -> Any:
    """An attribute that the shapes of the cores depend on: to set another value than it has raises a sentence.

    Example:
        >>> import tnlayers
        >>> tnlayers.CPLinear(4, 4, rank=2).in_features = 8
        Traceback (most recent call last):
            ...
        AttributeError: in_features is 4, and the cores are made for it; for 8, make a new CPLinear
    """

    def write(layer: Any, value: Any) -> None:
        check_same(type(layer).__name__, name, read(layer), value)

    return property(read, write, doc=f"The {name} that the cores are made for; it cannot be set to another value.")


def from_geometry(name: str, field: str = "") -> Any:
    """A fixed attribute that is a field of the geometry, under another name if one is given."""
    return fixed(name, lambda layer: getattr(layer.geometry, field or name))


def from_constructor(name: str) -> Any:
    """A fixed attribute that the constructor puts in the layer's ``__dict__``."""
    return fixed(name, lambda layer: vars(layer)[name])


def check_same(layer: str, name: str, have: Any, given: Any) -> None:
    """Refuse another value than there is; one integer stands for a tuple of its repetitions.

    Raises:
        AttributeError: both values, and that a new layer is needed.
    """
    same = given
    if isinstance(have, tuple):
        same = tuple(given) if isinstance(given, Iterable) else (given,) * len(have)
    if same != have:
        raise AttributeError(f"{name} is {have!r}, and the cores are made for it; for {given!r}, make a new {layer}")


def check_geometry(layer: Any, geometry: Any) -> None:
    """Refuse a geometry that the cores of a layer are not made for.

    Raises:
        TypeError: it is none.
        AttributeError: a field that the shapes of the cores depend on has another value.
    """
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry is {geometry!r}; it must be a tnlayers.Geometry")
    for name in _FIXED:
        check_same(type(layer).__name__, name, getattr(layer.geometry, name), getattr(geometry, name))
