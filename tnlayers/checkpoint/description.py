"""A layer as plain data: its description, and back."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from inspect import Parameter, signature
from typing import Any

from torch import nn

from tnlayers import validate
from tnlayers.formats import FORMATS
from tnlayers.init.variance import Init
from tnlayers.layers.base import DTYPES, TensorLayer
from tnlayers.layers.registry import KIND_NAMES, KINDS, layer_class
from tnlayers.spec.network import TensorNetwork

_KEYS = (
    "format", "options", "kind", "arguments", "dtype", "rank", "in_shape", "out_shape", "init", "strategy", "memory",
)  # fmt: skip

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

# A description may come from anyone's file. Nothing in this library takes long, or much memory, within these.
_LONGEST = 2**14  # characters of a description

_MOST_CORES = 64

_MOST_PARAMETERS = 2**40

_LARGEST = 2**24  # of each number among torch's arguments


def describe(layer: TensorLayer) -> dict[str, Any]:
    """A layer without its values, in JSON's types: what ``build`` makes it from.

    Args:
        layer: of a registered format.

    Returns:
        dict[str, Any]: format, options, kind, torch's arguments, dtype, and this library's, rank to memory.

    Raises:
        TypeError: it is no tensor layer, or its class does more than a layer of its format.
        ValueError: its format is not registered, JSON cannot hold an option, it has other tensors than such a layer,
            or is larger than ``build`` makes any.

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
    if type(layer) is not made and (own := _own(type(layer), KINDS[kind])):
        raise TypeError(
            f"{name} has its own {', '.join(own)}, which no description holds; it would come back as {made.__name__}"
        )
    description = {
        "format": form.name,
        "options": {field.name: _plain(field.name, getattr(layer.format, field.name)) for field in fields(form)},
        "kind": kind.__name__,
        "arguments": _plain("arguments", layer._arguments(layer)),
        "dtype": str(layer.cores[0].dtype).removeprefix("torch."),
        "rank": dict(layer.rank),
        "in_shape": list(layer.network.shape(layer.network.inputs)),
        "out_shape": list(layer.network.shape(layer.network.outputs)),
        "init": _plain("init", asdict(layer.init)),
        "strategy": layer.strategy,
        "memory": layer.memory,
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


def outline(description: Any) -> TensorNetwork:
    """The network of a description, all of which is checked as far as that goes without making the layer.

    Args:
        description: as ``describe`` gives it, or anything else, from anyone.

    Returns:
        TensorNetwork: its ``core_shapes`` tell how much memory the layer would take.

    Raises:
        TypeError, ValueError: as for ``build``.
    """
    return _checked(description)[2]


def build(description: Any, *, device: Any) -> TensorLayer:
    """The layer of a description, drawn afresh; nothing is drawn on the meta device.

    No text is evaluated, and formats come from ``FORMATS`` alone, so a description may come from anyone.

    Args:
        description: as ``describe`` gives it.
        device: where the layer is to be.

    Returns:
        TensorLayer: of the class ``layer_class(format, kind)``.

    Raises:
        TypeError, ValueError: the description has a key too many or too few, or a value that the layer refuses.

    Example:
        >>> import tnlayers
        >>> print(build(describe(tnlayers.CPLinear(8, 12, rank=4)), device="meta").network)
        i r, o r
    """
    layer, values, _ = _checked(description)
    with _sentences():
        return layer(**values, device=device)


def _checked(description: Any) -> tuple[type[TensorLayer], dict[str, Any], TensorNetwork]:
    """The class of a description, its constructor's arguments but for the device, and its network."""
    with _sentences():
        length = len(json.dumps(description, allow_nan=False))
        if length > _LONGEST:
            raise ValueError(f"description has {length:,} characters; at most {_LONGEST:,} are accepted")
        given = exactly("description", description, _KEYS)
        form = FORMATS[validate.choice("format", given.pop("format"), FORMATS)]
        kind = KIND_NAMES[validate.choice("kind", given.pop("kind"), KIND_NAMES)]
        options = exactly("options", given.pop("options"), [field.name for field in fields(form)])
        options = {name: _tuples(value) for name, value in options.items()}
        arguments = exactly("arguments", given.pop("arguments"), _arguments(KINDS[kind]))
        for name, value in arguments.items():
            if max(_numbers(value), default=0) > _LARGEST:
                raise ValueError(f"{name} is {value}; at most {_LARGEST:,} is accepted")
        given["dtype"] = _DTYPES[validate.choice("dtype", given["dtype"], _DTYPES)]
        given["init"] = Init(**exactly("init", given["init"], [field.name for field in fields(Init)]))
        if not isinstance(given["rank"], dict):
            raise TypeError(f"rank is {given['rank']!r}; it must map every bond to its size")
        kernel = _sizes("kernel_size", arguments.get("kernel_size", []))
        shapes = [_sizes(name, given[name]) for name in ("in_shape", "out_shape")]
        network, _ = form(**options).build(shapes[0], shapes[1], kernel, given["rank"])
        cores, parameters = len(network.cores), network.num_params
        if cores > _MOST_CORES or parameters > _MOST_PARAMETERS:
            most = f"at most {_MOST_CORES} cores and {_MOST_PARAMETERS:,} parameters are accepted"
            raise ValueError(f"network '{network}' has {cores} cores with {parameters:,} parameters; {most}")
    return layer_class(form, kind), arguments | given | options, network


@contextmanager
def _sentences() -> Iterator[None]:
    """A format, or torch, may answer values that it has no sentence for with any error at all."""
    try:
        yield
    except (TypeError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"description cannot be built: {type(error).__name__}: {error}") from None


def _arguments(base: type[TensorLayer]) -> list[str]:
    """The names of torch's own arguments: those that may be given by position."""
    found = signature(base).parameters.values()
    names = [each.name for each in found if each.kind == Parameter.POSITIONAL_OR_KEYWORD]
    return [name for name in names if name not in ("device", "dtype")]


def exactly(name: str, value: Any, keys: Iterable[str]) -> dict[str, Any]:
    """A copy of a mapping that has these keys and no others; anything else is answered with a sentence."""
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
    """The integers that a value is, or is a list of."""
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]


def _tuples(value: Any) -> Any:
    """An option's value: a field of a frozen dataclass has tuples where JSON has lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _plain(name: str, value: Any) -> Any:
    """A value in JSON's types."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(f"{name}[{key!r}]", each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{k}]", each) for k, each in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{name} is {value!r}, which JSON cannot hold: it has finite numbers, text, lists and mappings")


def _own(cls: type[TensorLayer], base: type[TensorLayer]) -> list[str]:
    """What a class, or one between it and its base, defines beyond its format."""
    between = cls.__mro__[: cls.__mro__.index(base)]
    names = [(name, value) for each in between for name, value in vars(each).items() if name != "format_type"]
    return [name for name, value in names if callable(value) or not name.startswith("__")]


def _tensors(layer: nn.Module) -> set[tuple[str, Any, Any]]:
    found = layer.state_dict().items()
    return {(name, getattr(value, "shape", None), getattr(value, "dtype", None)) for name, value in found}
