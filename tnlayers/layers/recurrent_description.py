"""Conversion of a recurrent layer to its description, without those of its weights' layers, and back."""

from dataclasses import fields
from typing import Any

from tnlayers import validate
from tnlayers.formats import FORMATS
from tnlayers.layers.description import as_json, check_length, exactly, own_members, sentences, tuples
from tnlayers.layers.recurrent import RECURRENT, recurrent_class
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.spec.recurrence import KINDS


def describe_recurrent(layer: TensorRecurrent) -> dict[str, Any]:
    """Return the description of a recurrent layer beside those of its weights' layers.

    Args:
        layer: a recurrent layer of a registered format.

    Returns:
        dict[str, Any]: format, options, kind and torch's arguments.

    Raises:
        TypeError, ValueError: as ``describe``.

    Example:
        >>> import tnlayers
        >>> found = describe_recurrent(tnlayers.CPGRU(8, 12, rank=4))
        >>> found["format"], found["kind"], found["arguments"]["hidden_size"]
        ('cp', 'GRU', 12)
    """
    name, form, kind = type(layer).__name__, type(layer.format), type(layer).dense_type
    if FORMATS.get(form.name) is not form:
        raise ValueError(f"{name} has the format {form.__name__}; to be named, register it with tnlayers.register")
    made = recurrent_class(form, kind)
    if type(layer) is not made and (own := own_members(type(layer), RECURRENT[kind])):
        raise TypeError(
            f"{name} has its own {', '.join(own)}, which no description holds; it would come back as {made.__name__}"
        )
    return {
        "format": form.name,
        "options": {field.name: as_json(field.name, getattr(layer.format, field.name)) for field in fields(form)},
        "kind": kind.__name__,
        "arguments": as_json("arguments", layer._arguments(layer)),
    }


def outline_recurrent(description: Any) -> tuple[type[TensorRecurrent], dict[str, Any], dict[str, Any]]:
    """Return class, options and torch's arguments of a description of ``describe_recurrent``, which may be untrusted.

    Raises:
        TypeError, ValueError: as for ``build``. The values of torch's arguments are not checked.
    """
    with sentences():
        check_length(description)
        given = exactly("description", description, ("format", "options", "kind", "arguments"))
        form = FORMATS[validate.choice("format", given["format"], FORMATS)]
        kinds = {kind.__name__: kind for kind in RECURRENT}
        kind = kinds[validate.choice("kind", given["kind"], kinds)]
        options = exactly("options", given["options"], [field.name for field in fields(form)])
        arguments = exactly("arguments", given["arguments"], RECURRENT[kind].own)
        return recurrent_class(form, kind), {name: tuples(value) for name, value in options.items()}, arguments


def with_plain_weights(description: Any, old: Any) -> TensorRecurrent:
    """Return the recurrent layer of a description for a module in its place, with the module's own weights, all plain.

    Args:
        description: result of ``describe_recurrent``, or any untrusted value.
        old: torch's layer; or a layer of the description's class, which is returned.

    Raises:
        TypeError, ValueError: as for ``outline_recurrent``, or ``old`` is another layer.
    """
    cls, options, arguments = outline_recurrent(description)
    if not isinstance(old, cls.dense_type | cls) or cls._arguments(old) != arguments:
        theirs = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ValueError(f"the file has {cls.__name__}({theirs}), but the model has {old}")
    if isinstance(old, cls):
        return old
    return cls.from_dense(old, plain=KINDS, decompose=not old.weight_ih_l0.is_meta, **options)
