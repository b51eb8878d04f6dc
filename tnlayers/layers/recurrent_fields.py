"""Attributes of recurrent layers that are arguments of torch's layer."""

import warnings
from dataclasses import replace
from typing import Any

from tnlayers.execution.attributes import fixed
from tnlayers.layers import core_memory
from tnlayers.spec.recurrence import Recurrence


def settable_field(name: str) -> Any:
    """Return a property for an argument of torch's that no weight depends on."""

    def write(layer: Any, value: Any) -> None:
        recurrence = replace(layer.recurrence, **{name: value})
        if name == "dropout" and recurrence != layer.recurrence:
            warn_of_dropout(recurrence)
        layer.__dict__["recurrence"] = recurrence

    return property(lambda layer: getattr(layer.recurrence, name), write, doc=f"torch's {name}; it can be set.")


def warn_of_dropout(recurrence: Recurrence) -> None:
    """Warn of a dropout that has no effect."""
    if recurrence.dropout and recurrence.num_layers == 1:
        warnings.warn(
            f"dropout is {recurrence.dropout}, but num_layers is 1; it acts between layers, so it has no effect",
            stacklevel=core_memory.outside(),
        )


def fixed_field(name: str) -> Any:
    """Return a property for an argument of torch's that the weights' shapes depend on."""
    return fixed(name, lambda layer: getattr(layer.recurrence, name))
