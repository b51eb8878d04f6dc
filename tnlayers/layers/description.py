"""Conversion of a layer to its description (plain data) and back."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from inspect import Parameter, signature
from typing import Any

from torch import nn

from tnlayers import validate
from tnlayers.formats import FORMATS, Format
from tnlayers.init.variance import Init
from tnlayers.layers.base import DTYPES, TensorLayer
from tnlayers.layers.registry import EVERY_KIND, KIND_NAMES, layer_class
from tnlayers.spec.network import TensorNetwork

_KEYS = (
    "format", "options", "kind", "arguments", "dtype", "rank", "in_shape", "out_shape", "init", "strategy", "memory",
)  # fmt: skip

_LATER = {"std": None}
"""Fields of ``Init`` that older descriptions lack, with the values that they stand for."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

# Descriptions are untrusted input. Within these limits, nothing in this library takes much time or memory.
_LONGEST = 2**14  # maximum number of characters of a description

_MOST_CORES = 64

_MOST_PARAMETERS = 2**40

_LARGEST = 2**24  # maximum of each number among torch's arguments


def describe(layer: TensorLayer) -> dict[str, Any]:
    """Return the description of a layer, in JSON's types and without values. ``build`` makes a layer from it.

    Args:
        layer: a layer of a registered format.

    Returns:
        dict[str, Any]: format, options, kind, torch's arguments, dtype, and our arguments from rank to memory.

    Raises:
        TypeError: it is no tensor layer, or its class defines more than its format.
        ValueError: its format is not registered, JSON cannot hold an option, its tensors are not those of such a
            layer, or it exceeds a limit of ``build``.

    Example:
        >>> import tnlayers
        >>> found = describe(tnlayers.CPLinear(8, 12, rank=4))
        >>> found["format"], found["kind"], found["rank"], found["dtype"]
        ('cp', 'Linear', {'r': 4}, 'float32')
    """
    name = type(layer).__name__
    if not isinstance(layer, TensorLayer):
        raise TypeError(f"layer is {name}; it must be a tensor layer of this library")
    form = type(layer.format)
    if FORMATS.get(form.name) is not form:
        raise ValueError(f"{name} has the format {form.__name__}; to be named, register it with tnlayers.register")
    made = layer_class(form, kind := type(layer).dense_type)
    if type(layer) is not made and (own := own_members(type(layer), EVERY_KIND[kind])):
        raise TypeError(
            f"{name} has its own {', '.join(own)}, which no description holds; it would come back as {made.__name__}"
        )
    description = settings(layer) | {
        "kind": kind.__name__,
        "arguments": as_json("arguments", layer._arguments(layer)),
        "dtype": str(layer.cores[0].dtype).removeprefix("torch."),
    }
    again = build(description, device="meta")
    for attribute in ("format", "network", "geometry", "init"):
        here, there = getattr(layer, attribute), getattr(again, attribute)
        if here != there:
            raise ValueError(f"{name} has {attribute} {here!r}; JSON cannot hold it, it would come back as {there!r}")
    if odd := sorted({tensor for tensor, *_ in _tensors(layer) ^ _tensors(again)}):
        raise ValueError(
            f"{name} does not hold {', '.join(odd)} as a layer of its description does; parametrized or pruned cores, "
            "several dtypes, and tensors of its own have no place there"
        )
    return description


def settings(layer: TensorLayer) -> dict[str, Any]:
    """Return the part of a description that layers and the networks of single weights share.

    Example:
        >>> from tnlayers.layers.registry import layer_class
        >>> settings(layer_class("cp", nn.Linear)(8, 8, rank=4))["rank"]
        {'r': 4}
    """
    return {
        "format": layer.format.name,
        "options": {
            field.name: as_json(field.name, getattr(layer.format, field.name)) for field in fields(layer.format)
        },
        "rank": dict(layer.rank),
        "in_shape": list(layer.network.shape(layer.network.inputs)),
        "out_shape": list(layer.network.shape(layer.network.outputs)),
        "init": as_json("init", asdict(layer.init)),
        "strategy": layer.strategy,
        "memory": layer.memory,
    }


def check_length(description: Any) -> None:
    """Raise ValueError for a description that is too long."""
    length = len(json.dumps(description, allow_nan=False))
    if length > _LONGEST:
        raise ValueError(f"description has {length:,} characters; at most {_LONGEST:,} are accepted")


def outline(description: Any) -> TensorNetwork:
    """Return the network of a description after all checks that are possible without making the layer.

    Args:
        description: result of ``describe``, or any untrusted value.

    Returns:
        TensorNetwork: its ``core_shapes`` give the layer's memory.

    Raises:
        TypeError, ValueError: as for ``build``.
    """
    return _checked(description)[2]


def build(description: Any, *, device: Any) -> TensorLayer:
    """Make the layer of a description with newly drawn cores; on the meta device nothing is drawn.

    The description may be untrusted: no text is evaluated, and formats come only from ``FORMATS``.

    Args:
        description: result of ``describe``.
        device: device of the new layer.

    Returns:
        TensorLayer: an instance of ``layer_class(format, kind)``.

    Raises:
        TypeError, ValueError: a key is missing or unknown, or the layer's constructor raises on a value.

    Example:
        >>> import tnlayers
        >>> print(build(describe(tnlayers.CPLinear(8, 12, rank=4)), device="meta").network)
        i r, o r
    """
    layer, values, _ = _checked(description)
    with sentences():
        return layer(**values, device=device)


def _checked(description: Any) -> tuple[type[TensorLayer], dict[str, Any], TensorNetwork]:
    """Return a description's class, constructor arguments except the device, and network."""
    with sentences():
        check_length(description)
        given = exactly("description", description, _KEYS)
        form = FORMATS[validate.choice("format", given.pop("format"), FORMATS)]
        kind = KIND_NAMES[validate.choice("kind", given.pop("kind"), KIND_NAMES)]
        options = exactly("options", given.pop("options"), [field.name for field in fields(form)])
        options = {name: tuples(value) for name, value in options.items()}
        arguments = exactly("arguments", given.pop("arguments"), _arguments(EVERY_KIND[kind]))
        for name, value in arguments.items():
            if max(_numbers(value), default=0) > _LARGEST:
                raise ValueError(f"{name} is {value}; at most {_LARGEST:,} is accepted")
        given["dtype"] = _DTYPES[validate.choice("dtype", given["dtype"], _DTYPES)]
        init = _LATER | given["init"] if isinstance(given["init"], dict) else given["init"]
        given["init"] = Init(**exactly("init", init, [field.name for field in fields(Init)]))
        network = network_within_limits(form(**options), given, arguments.get("kernel_size", []))
    return layer_class(form, kind), arguments | given | options, network


def network_within_limits(form: Format, given: Mapping[str, Any], kernel_size: Any) -> TensorNetwork:
    """Return the network of a description's rank, in_shape and out_shape, which may be untrusted.

    Raises:
        TypeError, ValueError: a value is refused, or the network has too many cores or parameters.
    """
    if not isinstance(given["rank"], dict):
        raise TypeError(f"rank is {given['rank']!r}; it must map every bond to its size")
    kernel = _sizes("kernel_size", kernel_size)
    shapes = [_sizes(name, given[name]) for name in ("in_shape", "out_shape")]
    network, _ = form.build(shapes[0], shapes[1], kernel, given["rank"])
    cores, parameters = len(network.cores), network.num_params
    if cores > _MOST_CORES or parameters > _MOST_PARAMETERS:
        most = f"at most {_MOST_CORES} cores and {_MOST_PARAMETERS:,} parameters are accepted"
        raise ValueError(f"network '{network}' has {cores} cores with {parameters:,} parameters; {most}")
    return network


@contextmanager
def sentences() -> Iterator[None]:
    """Replace errors other than TypeError and ValueError, which formats or torch may raise, by a ValueError."""
    try:
        yield
    except (TypeError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"description cannot be built: {type(error).__name__}: {error}") from None


def check_replaces(description: Mapping[str, Any], old: Any, *, dtype: bool = True) -> None:
    """Raise ValueError if the layer of a description cannot replace a module.

    Args:
        description: result of ``describe``, as JSON holds it.
        old: the module, plain or a tensor layer.
        dtype: whether the dtypes must be equal too.
    """
    ours = isinstance(old, TensorLayer)
    kind = old.dense_type if ours else next((kind for kind in EVERY_KIND if isinstance(old, kind)), None)
    there = f"a {type(old).__name__}"
    theirs = _said(description["kind"], description["arguments"], description["dtype"] if dtype else None)
    if kind is not None:
        weight = (old.cores[0] if ours else old.weight) if dtype else None
        own = json.loads(json.dumps(EVERY_KIND[kind]._arguments(old)))
        there = _said(kind.__name__, own, None if weight is None else str(weight.dtype).removeprefix("torch."))
    if there != theirs:
        raise ValueError(f"the file has {theirs}, but the model has {there}")


def _said(kind: str, arguments: Mapping[str, Any], dtype: str | None) -> str:
    given = dict(sorted(arguments.items())) | ({} if dtype is None else {"dtype": dtype})
    return f"{kind}({', '.join(f'{name}={value}' for name, value in given.items())})"


def _arguments(base: type[TensorLayer]) -> list[str]:
    """Return the names of torch's own arguments: the positional ones."""
    found = signature(base).parameters.values()
    names = [each.name for each in found if each.kind == Parameter.POSITIONAL_OR_KEYWORD]
    return [name for name in names if name not in ("device", "dtype")]


def exactly(name: str, value: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a mapping after a check that it has exactly these keys."""
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {value!r}; it must be a mapping")
    accepted = list(keys)
    for key in value:
        if key not in accepted:
            raise ValueError(f"{name} has the key {key!r}; accepted: {', '.join(map(repr, accepted)) or 'none'}")
    for key in accepted:
        if key not in value:
            raise ValueError(f"{name} has no {key!r}; it must have {', '.join(map(repr, accepted))}")
    return dict(value)


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is {value!r}; it must be a list of integers")
    return validate.integers(name, value, len(value))


def _numbers(value: Any) -> list[int]:
    """Return the integers in a value or list."""
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]


def tuples(value: Any) -> Any:
    """Replace JSON's lists by tuples, as in the fields of frozen dataclasses."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def as_json(name: str, value: Any) -> Any:
    """Convert a value to JSON's types."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: as_json(f"{name}[{key!r}]", each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(f"{name}[{k}]", each) for k, each in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{name} is {value!r}, which JSON cannot hold: it has finite numbers, text, lists and mappings")


def own_members(cls: type[nn.Module], base: type[nn.Module]) -> list[str]:
    """Return the names that a class, or one between it and its base, defines beyond its format."""
    between = cls.__mro__[: cls.__mro__.index(base)]
    names = [(name, value) for each in between for name, value in vars(each).items() if name != "format_type"]
    return [name for name, value in names if callable(value) or not name.startswith("__")]


def _tensors(layer: nn.Module) -> set[tuple[str, Any, Any]]:
    found = layer.state_dict().items()
    return {(name, getattr(value, "shape", None), getattr(value, "dtype", None)) for name, value in found}


@contextmanager
def about_layer(name: str) -> Iterator[None]:
    """Add the layer's name to every error about its description."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None
