"""Attributes of a built layer: settable ones, and ones fixed by the cores' shapes."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from tnlayers import validate
from tnlayers.spec.geometry import Geometry

_FIXED = "in_channels", "out_channels", "kernel_size", "groups", "transposed"
"""Fields of a geometry that the shapes of the cores depend on."""


def settable(name: str) -> Any:
    """Return a property for a geometry field that no core depends on. Its setter validates and drops cached plans.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.CPConv2d(4, 4, 3, stride=2, rank=2)
        >>> layer.stride = 1
        >>> layer.stride, layer.to_conv().stride
        ((1, 1), (1, 1))
    """

    def write(layer: Any, value: Any) -> None:
        layer.geometry = replace(layer.geometry, **{name: value})

    doc = f"``nn.ConvNd``'s {name}; setting it drops the cached plans."
    return property(lambda layer: getattr(layer.geometry, name), write, doc=doc)


def fixed(name: str, read: Callable[[Any], Any]) -> Any:
    """Return a property that the cores' shapes depend on. Its setter raises AttributeError on a new value.

    Example:
        >>> import tnlayers
        >>> tnlayers.CPLinear(4, 4, rank=2).in_features = 8
        Traceback (most recent call last):
            ...
        AttributeError: in_features is 4, and the cores are made for it; for 8, make a new CPLinear
    """

    def write(layer: Any, value: Any) -> None:
        check_same(type(layer).__name__, name, read(layer), value)

    return property(read, write, doc=f"The {name} that the cores are made for; it cannot be changed.")


def from_geometry(name: str, field: str = "") -> Any:
    """Return a fixed property that reads a geometry field; ``field`` defaults to ``name``."""
    return fixed(name, lambda layer: getattr(layer.geometry, field or name))


def from_constructor(name: str) -> Any:
    """Return a fixed property that reads the layer's ``__dict__``, where the constructor puts it."""
    return fixed(name, lambda layer: vars(layer)[name])


def switch(name: str, check: Callable[[Any, bool], None] = lambda layer, value: None) -> Any:
    """Return a property that is True or False, and that no core depends on. Its setter raises on other values.

    ``check`` gets the layer and the new value, and raises if the layer's other arguments do not allow it.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.CPEmbedding(4, 4, rank=2)
        >>> layer.scale_grad_by_freq = 1
        Traceback (most recent call last):
            ...
        TypeError: scale_grad_by_freq is 1; it must be True or False
    """

    def write(layer: Any, value: Any) -> None:
        check(layer, validate.boolean(name, value))
        vars(layer)[name] = value

    return property(lambda layer: vars(layer)[name], write, doc=f"torch's {name}; it can be set.")


def check_same(layer: str, name: str, have: Any, given: Any) -> None:
    """Raise if the given value differs from the present one. An integer stands for a tuple of its repetitions.

    Raises:
        AttributeError: the values differ. The message names both.
    """
    same = given
    if isinstance(have, tuple):
        same = tuple(given) if isinstance(given, Iterable) else (given,) * len(have)
    if same != have:
        raise AttributeError(f"{name} is {have!r}, and the cores are made for it; for {given!r}, make a new {layer}")


def check_geometry(layer: Any, geometry: Any) -> None:
    """Raise unless the layer's cores fit the geometry.

    Raises:
        TypeError: it is no Geometry.
        AttributeError: a field that the cores' shapes depend on differs.
    """
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry is {geometry!r}; it must be a tnlayers.Geometry")
    for name in _FIXED:
        check_same(type(layer).__name__, name, getattr(layer.geometry, name), getattr(geometry, name))
