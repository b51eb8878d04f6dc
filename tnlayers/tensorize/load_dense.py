"""Loading of a dense model's state into a model with tensor layers: each is fitted to the kernel of its name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.nn.utils.parametrize import is_parametrized

from tnlayers import validate
from tnlayers.backend.input_checks import check_module
from tnlayers.backend.progress import Progress
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.tied import TiedLinear
from tnlayers.tensorize.accounts import entries, other_rows
from tnlayers.tensorize.report import LayerReport, TensorizeReport
from tnlayers.tensorize.side_by_side import side_by_side
from tnlayers.tensorize.sites import LayerSite

_SHOWN = 3
"""Maximum number of names in an error message."""


def load_dense_(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    progress: bool | None = None,
    workers: int | None = None,
) -> TensorizeReport:
    """Load the state of the dense model into a model with tensor layers, in place.

    The dense model is this one with a torch layer in the place of every tensor layer, as ``densify_`` makes it. The
    cores of every tensor layer are fitted to the kernel of its name, as in ``layer.set_weight_``; everything else is
    copied, as in ``load_state_dict``. The layers keep their ranks. All names and shapes are checked first, and if it
    raises, nothing has changed. Layers are fitted side by side; the result does not depend on ``workers``.

    Args:
        model: any module that holds tensor layers, or is one.
        state_dict: the dense model's ``state_dict()``: the same names, but ``conv1.weight`` where this model has
            ``conv1.cores.0``, ``conv1.cores.1`` and so on.
        progress: as in ``tensorize_``.
        workers: as in ``tensorize_``.

    Returns:
        TensorizeReport: every tensor layer, with the relative error of its fit.

    Raises:
        TypeError: an argument is of another type, or cores are parametrized.
        ValueError: the model has no tensor layer, or one on the meta device; names are missing or unexpected; a shape
            is another; or a kernel cannot be fitted (NaN or infinity).

    Example:
        >>> import tnlayers
        >>> dense = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))
        >>> model = nn.Sequential(tnlayers.TuckerConv2d(16, 32, 3, rank=(8, 16)), nn.BatchNorm2d(32))
        >>> report = load_dense_(model, dense.state_dict())
        >>> report["0"].reason, 0 < report["0"].error < 1
        ('fitted', True)
    """
    validate.boolean("progress", bool(progress) if progress is None else progress)
    workers = torch.get_num_threads() if workers is None else validate.integer("workers", workers)
    layers = _layers(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is of type {type(state_dict).__name__}; it must be the mapping that state_dict() returns"
        )
    own = model.state_dict()
    cores = {f"{_prefix(name)}cores.{k}" for name, layer in layers.items() for k in range(len(layer.cores))}
    kernel = {name: _kernel(model, name) for name in layers}
    kernels = {kernel[name]: layer for name, layer in layers.items()}
    wanted = {name: value for name, value in own.items() if name not in cores}
    _check(wanted | kernels, state_dict)
    names: dict[TensorLayer, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(layer, []).append(name)
        first, here = kernel[names[layer][0]], kernel[name]
        if name != names[layer][0] and not torch.equal(state_dict[first], state_dict[here]):
            raise ValueError(f"state_dict has other values in {here} than in {first}, but they are one layer in model")
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in own.items()}
    errors: dict[TensorLayer, float] = {}

    def work(layer: TensorLayer) -> None:
        with torch.no_grad():
            try:
                errors[layer] = layer.set_weight_(state_dict[kernel[names[layer][0]]])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{names[layer][0] or type(layer).__name__}: {error}") from None

    workers = workers if all(layer.cores[0].device.type == "cpu" for layer in names) else 1
    try:
        with Progress("fitting", len(names), progress) as shown:
            side_by_side(
                work, [*names], workers, lambda layer: layer.network.dense_params,
                lambda layer: shown.step(names[layer][0]), shown.show,
            )  # fmt: skip
        model.load_state_dict({**model.state_dict(), **{name: state_dict[name] for name in wanted}})
    except BaseException:
        model.load_state_dict(before)
        raise
    count = sum(parameter.numel() for parameter in model.parameters())
    added = sum(layer.network.dense_params - layer.network.num_params for layer in names)
    rows = tuple(_row(layer, names[layer], errors[layer]) for layer in names)
    others = other_rows(model, [LayerSite(layer, tuple(found), []) for layer, found in names.items()])
    return TensorizeReport(rows, (count + added, count), others=others)


def _layers(model: nn.Module) -> dict[str, TensorLayer]:
    """Return every tensor layer by each of its names."""
    modules = check_module("model", model).named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, TensorLayer)}
    if not layers:
        raise ValueError("model has no tensor layer; for a dense model use model.load_state_dict")
    for name, layer in layers.items():
        shown = name or type(layer).__name__
        if is_parametrized(layer.cores):
            raise TypeError(f"cores of {shown} are parametrized; remove the parametrizations first")
        if layer.cores[0].is_meta:
            raise ValueError(f"{shown} is on the meta device and has no cores to set; call to_empty first")
    return layers


def _kernel(model: nn.Module, name: str) -> str:
    """Return the name that a tensor layer's kernel has in the dense model, also if another layer holds this one."""
    owner, _, own = name.rpartition(".")
    holder = model.get_submodule(owner) if own else None
    if isinstance(holder, TensorRecurrent):
        return f"{_prefix(owner)}weight_{own}"
    return f"{_prefix(owner if isinstance(holder, TiedLinear) else name)}weight"


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _check(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise unless a state has the wanted names, with the shapes of tensors and of tensor layers' kernels."""
    missing, unexpected = (
        [name for name in one if name not in other] for one, other in ((wanted, given), (given, wanted))
    )
    if missing or unexpected:
        parts = [f"{what} {_listed(names)}" for what, names in (("lacks", missing), ("also has", unexpected)) if names]
        ours = any(".cores." in f".{name}" for name in unexpected)
        hint = "; it has cores, so it is a state of tensor layers: use model.load_state_dict" if ours else ""
        raise ValueError(f"state_dict {' and '.join(parts)}; it must have the names of the dense model's state{hint}")
    for name, value in wanted.items():
        if isinstance(value, nn.UninitializedParameter | UninitializedBuffer):
            raise ValueError(f"model has no shape yet for {name} (lazy); run it once first")
        if not isinstance(value, Tensor | TensorLayer):
            continue  # extra state, which the module itself checks
        shape = tuple(value.shape if isinstance(value, Tensor) else _dense(value).weight.shape)
        found = given[name]
        if not isinstance(found, Tensor):
            raise TypeError(f"state_dict has a {type(found).__name__} in {name}; it must be a tensor of shape {shape}")
        if found.shape != shape:
            raise ValueError(f"state_dict has the shape {tuple(found.shape)} in {name}; it must be {shape}")


def _dense(layer: TensorLayer) -> Any:
    return layer.dense_type(**layer._arguments(layer), device="meta")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join([*names[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _row(layer: TensorLayer, names: Sequence[str], error: float) -> LayerReport:
    dense, network = _dense(layer), layer.network
    return LayerReport(
        name=names[0], aliases=tuple(names[1:]), kind=repr(dense), swapped=True, reason="fitted",
        format=layer.format.name, rank=dict(layer.rank), params=(network.dense_params, network.num_params),
        error=error, held=entries(dense.parameters()),
    )  # fmt: skip
