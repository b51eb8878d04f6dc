"""Conversion of the network of a single weight to its description, and back."""

from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from tnlayers import validate
from tnlayers.formats import FORMATS
from tnlayers.init.variance import Init
from tnlayers.layers.any_weight import Layout, NetworkWeight, weight_class
from tnlayers.layers.description import (
    as_json,
    check_length,
    exactly,
    network_within_limits,
    sentences,
    settings,
    tuples,
)
from tnlayers.spec.geometry import Geometry

_KEYS = "format", "options", "geometry", "layout", "rank", "in_shape", "out_shape", "init", "strategy", "memory"


def describe_weight(network: NetworkWeight) -> dict[str, Any]:
    """Return the description of the network of a weight, in JSON's types and without values.

    Raises:
        ValueError: its format is not registered, or JSON cannot hold an option.

    Example:
        >>> import tnlayers
        >>> attention = torch.nn.MultiheadAttention(8, 2)
        >>> _ = tnlayers.parametrize_(attention, "in_proj_weight", format="cp", rank=4)
        >>> describe_weight(attention.parametrizations.in_proj_weight[0])["layout"]
        {'shape': [24, 8], 'axes': 'o i'}
    """
    layer, layout = network.layer, network.layout
    form = type(layer.format)
    if FORMATS.get(form.name) is not form:
        raise ValueError(f"the format {form.__name__} is not registered; register it with tnlayers.register")
    return settings(layer) | {
        "geometry": as_json("geometry", asdict(layer.geometry)),
        "layout": None if layout is None else {"shape": list(layout.shape), "axes": layout.axes},
    }


def build_weight(description: Any, like: nn.Parameter) -> NetworkWeight:
    """Make the network of a description, which may be untrusted, for a parameter, on the meta device.

    Raises:
        TypeError, ValueError: a key is missing or unknown, a value is refused, or the parameter has another shape.
    """
    with sentences():
        check_length(description)
        given = exactly("description", description, _KEYS)
        form = FORMATS[validate.choice("format", given.pop("format"), FORMATS)]
        options = exactly("options", given.pop("options"), [field.name for field in fields(form)])
        options = {name: tuples(value) for name, value in options.items()}
        own = exactly("geometry", given.pop("geometry"), [field.name for field in fields(Geometry)])
        geometry = Geometry(**{name: tuples(value) for name, value in own.items()})
        held = given.pop("layout")
        layout = None if held is None else Layout(**tuples_of(exactly("layout", held, ("shape", "axes"))))
        shape = geometry.weight_shape if layout is None else layout.shape
        if tuple(shape) != tuple(like.shape) or (layout is not None and layout.geometry != geometry):
            raise ValueError(f"the file has a weight of shape {tuple(shape)}, but the model has {tuple(like.shape)}")
        network_within_limits(form(**options), given, [*geometry.kernel_size])
        given["init"] = Init(**tuples_of(exactly("init", given["init"], [field.name for field in fields(Init)])))
        with torch.device("cpu"):
            layer = weight_class(form.name)(geometry, device="meta", dtype=like.dtype, **given, **options)
    layer.cores.requires_grad_(like.requires_grad)
    return NetworkWeight(layer, layout)


def tuples_of(given: dict[str, Any]) -> dict[str, Any]:
    """Replace the lists among the values by tuples."""
    return {name: tuples(value) for name, value in given.items()}
