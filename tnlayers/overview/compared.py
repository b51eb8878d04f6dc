"""What ``compare`` compares: the layer with its input, and the formats with their ranks, both checked."""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from tnlayers import validate
from tnlayers.formats import FORMATS, Format
from tnlayers.formats.base import Shape, checked_shape
from tnlayers.layers.base import DTYPES, TensorLayer
from tnlayers.layers.conv_transpose import TensorConvTranspose
from tnlayers.layers.linear import TensorLinear
from tnlayers.layers.registry import KINDS, layer_class
from tnlayers.layers.table import TensorTable
from tnlayers.planning.choose import parse
from tnlayers.planning.setting import MEMORY, Setting, typical
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import KERNEL_AXES
from tnlayers.spec.rank import DEFAULT_KEEP, BondsError
from tnlayers.tensorize.config import TensorizeConfig
from tnlayers.tensorize.finding import unwrapped
from tnlayers.tensorize.sites import LayerSite

_ENTRY = "format", "options", "rank", "in_shape", "out_shape", "strategy", "memory"


class Line(NamedTuple):
    """A format to compare, as arguments of its layer: rank, the format's options, and others."""

    name: str
    format: type[Format]
    rank: Any
    options: Mapping[str, Any]
    others: Mapping[str, Any] = {}


class Case(NamedTuple):
    """The layer and its input."""

    geometry: Geometry
    shape: tuple[int, ...]
    device: str
    dtype: torch.dtype
    training: bool

    def make(self, line: Line) -> TensorLayer:
        """Make the layer of a format, without values."""
        geometry = self.geometry
        own: dict[str, Any] = {"in_features": geometry.in_channels, "out_features": geometry.out_channels}
        kind: type[nn.Module] = nn.Linear
        if geometry.ndim:
            own = {each.name: getattr(geometry, each.name) for each in fields(Geometry)}
            del own["input_size"]
            if not own.pop("transposed"):
                del own["output_padding"]
            kinds = (kind for kind, base in KINDS.items() if getattr(base, "ndim", 0) == geometry.ndim)
            kind = next(kind for kind in kinds if issubclass(KINDS[kind], TensorConvTranspose) == geometry.transposed)
        cls = layer_class(line.format, kind)
        own |= {"bias": False, "device": "meta", "dtype": self.dtype, "rank": line.rank}
        return cls(**own, **line.options, **line.others).train(self.training)

    @property
    def channel_names(self) -> tuple[str, str]:
        """Names of what ``in_shape`` and ``out_shape`` factorise."""
        if not self.geometry.ndim:
            return TensorLinear.channel_names
        inputs, outputs = TensorLayer.channel_names
        return inputs if self.geometry.groups == 1 else f"{inputs} / groups", outputs

    def check(self, line: Line) -> None:
        """Raise if an argument of a line is wrong for every layer of this size in this format.

        Nothing is raised where the format cannot hold the layer, such as at a keep ratio that is too small.

        Raises:
            TypeError, ValueError: a shape, the strategy or ``memory`` is invalid.
            BondsError: the rank sizes other bonds than the network has.
        """
        given, geometry = line.others, self.geometry
        form = line.format(**line.options)
        validate.choice("memory", given.get("memory", MEMORY[0]), MEMORY)
        split = form.split(geometry.in_channels // geometry.groups, geometry.out_channels, geometry.groups)
        ins, outs = (
            own if (shape := given.get(name)) is None else checked_shape(name, shape, what, math.prod(own))
            for name, own, what in zip(("in_shape", "out_shape"), split, self.channel_names, strict=True)
        )
        if (ins, outs) != split and self._built(form, *split, None):
            form.build(ins, outs, geometry.kernel_size, None)
        free = isinstance(line.rank, Real) and not hasattr(line.rank, "__index__")  # a keep ratio names no bonds
        network = None if free or line.rank is None else self._built(form, ins, outs, line.rank)
        if "strategy" in given:
            network = network or self._built(form, ins, outs, None) or TensorNetwork.skeleton("o i")
            parse(given["strategy"], network, replace(geometry, groups=1))  # with groups the layer may refuse it

    def _built(self, form: Format, ins: Shape, outs: Shape, rank: Any) -> TensorNetwork | None:
        """Return the network of a format, or None if it cannot hold the layer."""
        try:
            return form.build(ins, outs, self.geometry.kernel_size, rank)[0]
        except BondsError:
            raise
        except ValueError:
            return None

    def setting(self, mode: str) -> Setting:
        """Return the setting of a contiguous input."""
        *batch, _ = outer = self.shape[: len(self.shape) - self.geometry.ndim]
        size = self.shape[len(outer) :]
        return Setting(math.prod(batch), size, mode=mode, device=self.device, dtype=self.dtype)


def case_of(layer: Any, input_shape: Any) -> Case:
    """Check the layer and the input's shape."""
    if isinstance(layer, Geometry):
        if layer.ndim > len(KERNEL_AXES) or (not layer.ndim and layer.groups > 1):
            raise ValueError(
                f"layer is {layer}; layers have at most {len(KERNEL_AXES)} spatial axes, and a linear one no groups"
            )
        shape = _shape(layer, input_shape)
        return Case(layer, shape, torch.get_default_device().type, torch.get_default_dtype(), True)
    accepted: tuple[type[Any], ...] = (TensorLayer, *KINDS)
    inner: Any = unwrapped(layer) if isinstance(layer, nn.Module) else layer
    if not isinstance(inner, accepted) or isinstance(inner, TensorTable):
        raise TypeError(
            f"layer is of type {type(layer).__name__}; it must be a convolution, transposed convolution or linear "
            "layer of torch or tnlayers, or a tnlayers.Geometry"
        )
    some = next(inner.parameters())
    if is_lazy(some):
        raise ValueError(f"layer is a {type(inner).__name__}, which has no shape before its first forward")
    if some.dtype not in DTYPES:
        raise TypeError(f"layer has dtype {some.dtype}; accepted: {', '.join(map(str, DTYPES))}")
    geometry = LayerSite(inner, (), []).geometry
    return Case(geometry, _shape(geometry, input_shape), some.device.type, some.dtype, inner.training)


def _shape(geometry: Geometry, given: Any) -> tuple[int, ...]:
    """Check the shape of an input; of None, return the typical one."""
    ndim, channels = geometry.ndim, geometry.in_channels
    if given is None:
        batch, size = typical(geometry)
        given = batch, channels, *(geometry.input_size or size)
    inner = ", ".join((str(channels), *KERNEL_AXES[len(KERNEL_AXES) - ndim :]))
    accepted = f"(N, {inner}), or ({inner}) unbatched" if ndim else f"(*, {channels})"
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"input_shape is {given!r}; it must be a sequence of integers, {accepted}")
    shape = tuple(validate.integer(f"input_shape[{k}]", size) for k, size in enumerate(given))
    if (ndim and len(shape) not in (ndim + 1, ndim + 2)) or not shape or shape[-ndim - 1] != channels:
        raise ValueError(f"input_shape is {shape}; this layer takes {accepted}")
    try:
        geometry.output_size(shape[len(shape) - ndim :])
    except ValueError as error:
        raise ValueError(f"input_shape is {shape}; {error}") from None
    return shape


def weight_of(layer: Any) -> Tensor:
    """Return the weight to fit."""
    if isinstance(layer, Geometry):
        raise ValueError("decompose is True, but layer is a Geometry and has no weight to fit; pass decompose=False")
    layer = unwrapped(layer)
    if any(is_parametrized(module) for module in layer.modules()):
        layer = copy.deepcopy(layer).eval()  # in training mode, reading the weight may change a parametrization
    weight: Tensor = layer.weight.detach()
    if weight.is_meta:
        raise ValueError("decompose is True, but layer is on the meta device and has no values; pass decompose=False")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            "decompose is True, but the weight of layer holds NaN or infinity; only finite ones are fitted"
        )
    return weight


def lines_of(formats: Any, rank: Any, case: Case) -> list[Line]:
    """Check formats and ranks."""
    if formats is None:
        entries = [entry for name in FORMATS for entry in _variants(name)]
    elif isinstance(formats, str | Mapping) or not isinstance(formats, Sequence) or not formats:
        raise TypeError(f"formats is {formats!r}; it must be a sequence of formats, such as ['tr', 'tucker'], or None")
    else:
        entries = [_entry(f"formats[{k}]", entry) for k, entry in enumerate(formats)]
    by_format: Mapping[str, Any] = {}
    if isinstance(rank, Mapping) and any(key in FORMATS for key in rank):
        by_format, rank, names = rank, DEFAULT_KEEP, {entry["format"] for entry in entries}
        for key in by_format:
            if key not in names:
                raise ValueError(f"rank has the key {key!r}; the compared formats are {', '.join(sorted(names))}")
    found, fits = [], dict[str, list[BondsError | None]]()
    for k, entry in enumerate(entries):
        name, options = entry["format"], entry["options"]
        own = entry.get("rank", by_format.get(name, rank))
        TensorizeConfig(name, rank=own)  # it raises for what is no rank at all
        others = {key: value for key, value in entry.items() if key not in ("format", "options", "rank")}
        shown = " ".join((name, *(f"{key}={value}" for key, value in (options | others).items())))
        line = Line(shown, FORMATS[name], own, options, others)
        argument = f"formats[{k}]" if "rank" in entry else f"rank[{name!r}]" if name in by_format else "rank"
        misfits = fits.setdefault(argument, [])
        try:
            case.check(line)
            misfits.append(None)
        except BondsError as error:
            misfits.append(error)
        except (TypeError, ValueError) as error:
            raise type(error)(f"formats[{k}]: {error}") from None
        found.append(line)
    for argument, misfits in fits.items():
        if all(misfits):  # a mapping or sequence may be for some of the formats that it is given for
            if len(misfits) > 1:
                raise ValueError(
                    f"{argument} fits none of the {len(misfits)} formats it is for; one says: {misfits[0]}"
                )
            raise ValueError(f"{misfits[0]}" if argument == "rank" else f"{argument}: {misfits[0]}")
    return found


def _variants(name: str) -> list[dict[str, Any]]:
    """Return a format with its defaults, and with each further value of an option of few values."""
    own = fields(FORMATS[name])
    if any(each.default is MISSING and each.default_factory is MISSING for each in own):
        return []
    found: list[dict[str, Any]] = [{"format": name, "options": {}}]
    with suppress(NameError):  # an annotation may name what only type checkers import
        types = get_type_hints(FORMATS[name])
        for each in own:
            kind = types[each.name]
            values = get_args(kind) if get_origin(kind) is Literal else (False, True) if kind is bool else ()
            found += [{"format": name, "options": {each.name: value}} for value in values if value != each.default]
    return found


def _entry(name: str, entry: Any) -> dict[str, Any]:
    """Return an entry of ``formats`` in the words of a configuration."""
    given = {"format": entry} if isinstance(entry, str) else entry
    if not isinstance(given, Mapping) or "format" not in given:
        raise TypeError(f"{name} is {entry!r}; it must be a format's name, or a mapping with 'format'")
    format = FORMATS[validate.choice(f"{name}: format", given["format"], FORMATS)]
    own = [each.name for each in fields(format)]
    inside: Any = given.get("options", {})
    if not isinstance(inside, Mapping):
        raise TypeError(f"{name}: options is {inside!r}; it must be a mapping with text as keys")
    for key in own:
        if key in given and key in inside:
            raise ValueError(f"{name} has {key!r} twice: {given[key]!r}, and {inside[key]!r} in options; give one")
    options = dict(inside) | {key: given[key] for key in own if key in given}
    for key in (*given, *options):
        if key not in own and (key not in _ENTRY or key in options):
            raise ValueError(f"{name} has the key {key!r}; accepted: {', '.join((*_ENTRY, *own))}")
    for each in fields(format):
        if each.default is MISSING and each.name not in options:
            raise ValueError(f"{name} lacks {each.name!r}, which the format {format.name!r} needs")
    return {key: value for key, value in given.items() if key not in own} | {"options": options}
