"""Documentation of a layer for help() and editors: its arguments, and its format's options."""

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

from tnlayers.formats import Format


def show_options(layer: type[Any], format_type: type[Format]) -> None:
    """Show help() and editors the format's options in place of the constructor's ``**options``."""
    parameters = list(inspect.signature(layer.__init__).parameters.values())[1:]
    if parameters and parameters[-1].kind == inspect.Parameter.VAR_KEYWORD:
        for field in fields(format_type):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.insert(-1, inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default))
        del parameters[-1]
    layer.__signature__ = inspect.Signature(parameters)


def add_arguments(layer: type[Any], format_type: type[Format]) -> None:
    """Add the arguments to a layer's docstring: those of its kind, and the format's options."""
    kind = next((base for base in layer.__mro__[1:] if "Args:" in (vars(base).get("__doc__") or "")), None)
    if kind is None or not format_type.__doc__:  # python -OO
        return
    own = vars(layer).get("__doc__")
    if own is None:
        what = re.split("[;.]", inspect.cleandoc(layer.__mro__[1].__doc__ or ""))[0]
        own = f"{what}, in the format {format_type.__name__}.\n\n{_first(format_type)}"
    _, heading, rest = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")
    arguments, end, rest = rest.partition("\n\n")
    options = inspect.cleandoc(format_type.__doc__).partition("Args:\n")[2].partition("\n\n")[0]
    arguments = re.sub(r"\n *\*\*options: the format's own\.|, \*\*options", "", arguments)
    layer.__doc__ = f"{inspect.cleandoc(own)}\n\n{heading}{arguments}\n{options}".rstrip() + end + rest + "\n"


def _first(format_type: type[Format]) -> str:
    """Return the first paragraph of a format's docstring."""
    return inspect.cleandoc(format_type.__doc__ or "").partition("\n\n")[0]
