"""Lookup of the layer class for a format and a kind of torch layer."""

from collections.abc import Mapping
from types import new_class
from typing import Any

from torch import nn

from tnlayers import validate
from tnlayers.formats import FORMATS, Format
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.embedding import TensorEmbedding
from tnlayers.layers.embedding_bag import TensorEmbeddingBag
from tnlayers.layers.has_format import LAYERS
from tnlayers.layers.linear import TensorLinear
from tnlayers.layers.table import TensorTable

_CONV = TensorConv1d, TensorConv2d, TensorConv3d
_TRANSPOSE = TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d

KINDS: dict[type[nn.Module], type[TensorLayer]] = {
    base.dense_type: base for base in (*_CONV, *_TRANSPOSE, TensorLinear)
}
"""Base class of the layers that replace a convolution or linear layer of torch, by the torch layer's type."""

TABLES: dict[type[nn.Module], type[TensorTable]] = {
    base.dense_type: base for base in (TensorEmbedding, TensorEmbeddingBag)
}
"""The same for torch's tables of rows, whose inputs are indices."""

EVERY_KIND: dict[type[nn.Module], type[TensorLayer]] = {**KINDS, **TABLES}

KIND_NAMES = {kind.__name__: kind for kind in EVERY_KIND}


def layer_class(format: str | type[Format], kind: type[nn.Module]) -> type[TensorLayer]:
    """Return the layer class of a format that replaces a kind of torch layer.

    It is the first one defined, in this library or by the user, or is made here. Repeated calls return the same class.

    Args:
        format: a registered format's name, or a format class.
        kind: one of the types in ``EVERY_KIND``.

    Returns:
        type[TensorLayer]: a subclass of ``EVERY_KIND[kind]``.

    Raises:
        TypeError, ValueError: there is no such format or no such kind.

    Example:
        >>> layer_class("tr", nn.Conv2d)
        <class 'tnlayers.layers.by_format.TRConv2d'>
    """
    found: type[TensorLayer] = find_or_make(format, kind, EVERY_KIND, __name__)
    return found


def find_or_make(
    format: str | type[Format], kind: type[nn.Module], bases: Mapping[type[nn.Module], type[Any]], module: str
) -> type[Any]:
    """Return the class of a format and a kind, as ``layer_class``; a new one belongs to ``module``."""
    if not isinstance(format, type):
        format = FORMATS[validate.choice("format", format, FORMATS)]
    if not issubclass(format, Format):
        raise TypeError(f"format is {format!r}; it must be a registered name or a subclass of tnlayers.Format")
    if kind not in bases:
        raise TypeError(f"kind is {kind!r}; accepted: {', '.join(f'nn.{each.__name__}' for each in bases)}")
    found = LAYERS.get((format, kind))
    if found is None:
        # The module's __getattr__ finds it again when it is unpickled.
        name, body = f"{format.__name__}{kind.__name__}", {"__module__": module}
        found = new_class(name, (bases[kind],), {"format": format}, lambda namespace: namespace.update(body))
    return found


def by_name(name: str, bases: Mapping[type[nn.Module], type[Any]], module: str) -> type[Any]:
    """Return the class of a name such as 'TRLinear', for a module's ``__getattr__``."""
    for format in FORMATS.values():
        for kind in bases:
            if name == f"{format.__name__}{kind.__name__}":
                return find_or_make(format, kind, bases, module)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def __getattr__(name: str) -> Any:
    return by_name(name, EVERY_KIND, __name__)
