"""Checkpoint files: permitted content, and safe reading of untrusted files."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnlayers.backend.shared_memory import sharing
from tnlayers.layers.description import about_layer, exactly, outline
from tnlayers.layers.recurrent_description import outline_recurrent
from tnlayers.tensorize.config import TensorizeConfig

VERSION = 1
KEY = "tnlayers"
_FIELDS = "version", "tnlayers", "config", "layers", "aliases"
_LATER = "views", "recurrent", "outputs", "weights"
"""Fields that a file may lack."""
LONGEST = 2**24  # maximum characters of the JSON text; parsed, it may take some twenty times as many bytes
_SHOWN = 1000  # maximum characters of an error message, which may quote the file
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The dtypes that a file may hold, by safetensors' names."""


class Content(NamedTuple):
    """Content of a file after the checks that need no model."""

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # including aliases
    layers: Mapping[str, Any]
    aliases: Mapping[str, str]
    views: Mapping[str, str]
    config: TensorizeConfig | None
    recurrent: Mapping[str, Any]
    outputs: Mapping[str, Any]
    weights: Mapping[str, Any]


def read(file: Any) -> Content:
    """Read an open file, with the checks that need no model."""
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise ValueError(f"it was written by something else: its metadata have no {KEY!r}")
    about = _parse(text)
    version = about.get("version") if isinstance(about, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError("its metadata are no JSON object with a version, so save_tensorized did not write them")
    if version > VERSION:
        raise ValueError(f"it was written by version {version}; this library reads up to {VERSION}")
    exactly("metadata", about, (*_FIELDS, *(name for name in _LATER if name in about)))
    tensors = {}
    for name in file.keys():  # noqa: SIM118  (file is no mapping)
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {part.get_dtype()}; accepted: {', '.join(_DTYPES)}")
        tensors[name] = tuple(part.get_shape()), _DTYPES[part.get_dtype()]
    layers, aliases, config = about["layers"], about["aliases"], about["config"]
    if not isinstance(layers, dict) or not isinstance(aliases, dict):
        raise ValueError("layers and aliases must be JSON objects")
    stored = tensors.copy()
    for alias, name in aliases.items():
        if alias in stored:
            raise ValueError(f"alias {alias!r} is also the name of a tensor in it")
        if not isinstance(name, str) or name not in stored:
            raise ValueError(f"alias {alias!r} stands for {name!r}, which is no tensor in it")
        tensors[alias] = stored[name]
    views = about.get("views", {})
    if not isinstance(views, dict) or not all(isinstance(name, str) and name in tensors for name in views.values()):
        raise ValueError("views must be a JSON object whose values are names of tensors in it")
    for name, description in layers.items():
        with about_layer(name):
            shapes = outline(description).core_shapes
        cores = (f"{join(name, 'cores')}.{k}" for k in range(len(shapes)))
        found = tuple(tensors[core][0] if core in tensors else None for core in cores)
        if found != shapes:
            raise ValueError(f"layer {name!r} is described with cores of shapes {shapes}; its tensors have {found}")
    recurrent = _recurrent(about.get("recurrent", {}))
    config = None if config is None else TensorizeConfig.from_dict(config)
    outputs, weights = _others(about)
    return Content(tensors, layers, aliases, views, config, recurrent, outputs, weights)


def _others(about: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return what a file says of tied outputs and of single weights."""
    outputs, weights = about.get("outputs", {}), about.get("weights", {})
    if not isinstance(outputs, dict) or not isinstance(weights, dict):
        raise ValueError("outputs and weights must be JSON objects")
    for name, about_output in outputs.items():
        with about_layer(name):
            exactly("outputs", about_output, ("embedding", "strategy", "memory"))
    return outputs, weights


def _recurrent(given: Any) -> Mapping[str, Any]:
    """Return the checked descriptions of the recurrent layers."""
    if not isinstance(given, dict):
        raise ValueError("recurrent must be a JSON object")
    for name, description in given.items():
        with about_layer(name):
            outline_recurrent(description)
    return given


def _parse(text: str) -> Any:
    """Parse JSON as ``save_tensorized`` writes it: finite numbers of limited length, unique keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    def number(digits: str) -> Any:
        value = float(digits)
        if len(digits) > 32 or not math.isfinite(value):
            raise ValueError(f"{digits[:32]} is no number that could be meant")
        return value if set(digits) & set(".eEN") else int(digits)

    if len(text) > LONGEST:
        raise ValueError(f"its description has {len(text):,} characters; at most {LONGEST:,} are accepted")
    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=number, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata are no JSON as this library writes it: {error}") from None


def join(above: str, leaf: str) -> str:
    """Join a qualified name; either part may be empty."""
    return f"{above}.{leaf}" if above and leaf else above or leaf


def check_storable(name: str, value: Any) -> None:
    """Raise if a file cannot hold this state."""
    if not isinstance(value, Tensor):
        raise TypeError(f"state {name!r} is {type(value).__name__}; a file holds tensors only")
    if value.is_meta:
        raise ValueError(f"tensor {name!r} is on the meta device and has no values to save")
    if type(value) is not Tensor or value.layout != torch.strided:
        raise TypeError(f"tensor {name!r} is {type(value).__name__} ({value.layout}); a file holds plain dense tensors")
    if value.dtype not in _DTYPES.values():
        raise TypeError(f"tensor {name!r} has {value.dtype}; accepted: {', '.join(map(str, _DTYPES.values()))}")


def shared_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a mapping from each further name of a tensor to the tensor's first name."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, value in state.items():
        key = value.device, value.data_ptr(), value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()
        if value.numel() and first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases


def views(state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, str]:
    """Return a mapping from each tensor that shares memory with an earlier one, but is no alias, to the latter."""
    names = [name for name in state if name not in aliases]
    pairs = sharing([state[name] for name in names])
    return {names[later]: names[earlier] for earlier, later in reversed(pairs)}  # of several, the first is kept


def with_own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, each contiguous and with its own memory."""
    seen: set[int] = set()
    tensors = {}
    for name, value in state.items():
        plain = value.resolve_conj().resolve_neg()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        tensors[name] = plain.contiguous()
    return tensors


@contextmanager
def about_file(name: str) -> Iterator[None]:
    """Replace every error about a bad file by a ValueError of limited length that names the file."""
    from safetensors import SafetensorError  # noqa: PLC0415  (loaded only when used)

    try:
        yield
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        said = said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."
        raise ValueError(f"{name} cannot be loaded: {said}") from None
