"""What help() and editors show of a layer: its arguments, and the options of its format."""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from torch import nn

from tnlayers.formats import Format


def show_options(layer: type[Any], format_type: type[Format]) -> None:
    """Let help() and editors show the format's options in place of the constructor's ``**options``."""
    parameters = list(_parameters(layer.__init__))
    if parameters and parameters[-1].kind == inspect.Parameter.VAR_KEYWORD:
        for field in fields(format_type):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.insert(-1, inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default))
        del parameters[-1]
    layer.__signature__ = inspect.Signature(parameters)


def add_arguments(layer: type[Any], format_type: type[Format]) -> None:
    """Add to a layer's docstring: the arguments of its kind, the format's options, and an example if it has none."""
    kinds = (base for base in layer.__mro__[1:] if getattr(base, "format_type", None) is None)
    kind: Any = next((base for base in kinds if "Args:" in (vars(base).get("__doc__") or "")), None)
    own = vars(layer).get("__doc__")
    if kind is None or not format_type.__doc__:  # python -OO
        return
    if layer.__init__ is not kind.__init__ or "Args:" in (own or ""):  # a user's class with arguments of its own
        return
    first, options = _sections(format_type)
    _, arguments = _sections(kind)
    arguments, end, rest = arguments.partition("\n\n")
    if own is None:
        what = re.split("[;.]", layer.__mro__[1].__doc__ or "")[0]
        own = f"{what}, in the format {format_type.__name__}.\n\n{first}"
    arguments = re.sub(r"\n *\*\*options: the format's own\.", "", arguments)
    described = f"{arguments}\n{options.partition(end)[0]}".rstrip()
    rest = rest.partition("\n\nExample:")[0].rstrip()  # that of the kind is about another class
    example = "" if "Example:" in own else _example(layer, format_type)
    layer.__doc__ = f"{inspect.cleandoc(own)}\n\nArgs:\n{described}{end}{rest}\n{example}"


def _example(layer: type[Any], format_type: type[Format]) -> str:
    """Return an example of a layer, as a doctest. A format that needs an option has none."""
    if not hasattr(layer, "dense_type") or any(field.default is MISSING for field in fields(format_type)):
        return ""
    if issubclass(layer.dense_type, nn.RNNBase):
        call = f"{layer.__name__}(16, 32, rank=2)(torch.randn(5, 2, 16))[0].shape"
        return f"\nExample:\n    >>> import torch\n    >>> {call}\n    torch.Size([5, 2, 32])\n"
    if "Embedding" in layer.dense_type.__name__:
        call = f"{layer.__name__}(16, 32, rank=2)(torch.tensor([[0, 15, 3]])).shape"
        size = (1, 32) if layer.dense_type.__name__.endswith("Bag") else (1, 3, 32)
        return f"\nExample:\n    >>> import torch\n    >>> {call}\n    torch.Size({[*size]})\n"
    axes = getattr(layer, "ndim", 0)
    length = 6 if "Transpose" in layer.dense_type.__name__ else 2
    given, found = (2, 16, *(4,) * axes), [2, 32, *(length,) * axes]
    call = f"{layer.__name__}(16, 32, {'3, ' if axes else ''}rank=2)(torch.randn{given}).shape"
    return f"\nExample:\n    >>> import torch\n    >>> {call}\n    torch.Size({found})\n"


@cache
def _parameters(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    """Return the parameters of a method but the first."""
    return tuple(inspect.signature(function).parameters.values())[1:]


@cache
def _sections(cls: type[Any]) -> tuple[str, str]:
    """Return the first paragraph of a docstring, and what stands behind "Args:"."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return text.partition("\n\n")[0], text.partition("Args:\n")[2]
