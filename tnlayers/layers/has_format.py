"""Classes of one format: what TensorLayer and TensorRecurrent share."""

from collections.abc import MutableMapping
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from torch import nn

from tnlayers import validate
from tnlayers.formats import FORMATS, Format
from tnlayers.layers.documentation import add_arguments, show_options

LAYERS: MutableMapping[tuple[type[Format], type[Any]], type[Any]] = WeakValueDictionary()
"""The first layer class defined for a format and a torch layer."""


class HasFormat(nn.Module):
    """A module class; a subclass with ``format=`` in its class statement is one of that format."""

    format_type: ClassVar[type[Format] | None] = None
    network_arguments: ClassVar[str] = "rank, in_shape, out_shape, init, strategy, memory"
    """Names of the keyword arguments that every format has, for error messages."""
    dense_name: ClassVar[str]
    """Name of a torch layer as an argument: 'conv' or 'linear'."""
    dense_type: ClassVar[type[Any]]
    """The torch layer with the same arguments."""

    def __init_subclass__(cls, *, format: str | type[Format] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if format is not None:
            known = FORMATS[validate.choice("format", format, FORMATS)] if isinstance(format, str) else format
            if not (isinstance(known, type) and issubclass(known, Format)):
                raise TypeError(f"format is {format!r}; it must be a registered name or a subclass of tnlayers.Format")
            cls.format_type = known
        if cls.format_type is not None:
            show_options(cls, cls.format_type)
            if hasattr(cls, "dense_type"):
                LAYERS.setdefault((cls.format_type, cls.dense_type), cls)
            if format is not None:
                add_arguments(cls, cls.format_type)

    @classmethod
    def _format(cls, options: dict[str, Any]) -> Format:
        if cls.format_type is None:
            raise TypeError(
                f"{cls.__name__} has no format; use a subclass, or write one with format= in its class statement"
            )
        return cls.format_type.of(options, cls.__name__, f"torch's and {cls.network_arguments}")
