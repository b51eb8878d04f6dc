"""Loading of a dense model's state into a model with tensor layers: each is fitted to the kernel of its name."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.nn.utils.parametrize import is_parametrized

from tnlayers import validate
from tnlayers.backend.input_checks import check_module
from tnlayers.backend.progress import Progress
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.networks import weight_layer
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.tied import TiedLinear
from tnlayers.tensorize.accounts import entries, other_rows
from tnlayers.tensorize.report import LayerReport, TensorizeReport
from tnlayers.tensorize.side_by_side import side_by_side
from tnlayers.tensorize.sites import LayerSite
from tnlayers.tensorize.swappable import came_from_conv1d
from tnlayers.tensorize.weight_sites import WeightSite, networks

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

    Weights that ``parametrize_`` made networks of are fitted too. Of names that are one weight in the model, such as a
    tied embedding and output, the state may lack all but one. Layers in the place of transformers' ``Conv1D`` take its
    transposed weights.

    Args:
        model: any module that holds tensor layers or such weights, or is a tensor layer.
        state_dict: the dense model's ``state_dict()``: the same names, but ``conv1.weight`` where this model has
            ``conv1.cores.0``, ``conv1.cores.1`` and so on.
        progress: as in ``tensorize_``.
        workers: as in ``tensorize_``.

    Returns:
        TensorizeReport: every tensor layer, with the relative error of its fit.

    Raises:
        TypeError: an argument is of another type, or cores are parametrized.
        ValueError: the model has no tensor layer, or one on the meta device; names are missing or unexpected; names of
            one weight have several values; a shape is another; or a kernel cannot be fitted (NaN or infinity).

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
    kernels = _kernels(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is of type {type(state_dict).__name__}; it must be the mapping that state_dict() returns"
        )
    own = model.state_dict(keep_vars=True)
    ours = {name for kernel in kernels for name in kernel.state}
    wanted = {name: value for name, value in own.items() if name not in ours}
    tied = [kernel.names for kernel in kernels] + _one_tensor(wanted)
    state = _completed(state_dict, tied)
    shapes = {name: kernel.shape for kernel in kernels for name in kernel.names}
    _check(wanted, shapes, state, ours)
    _check_ties(tied, state)
    before = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in own.items()}
    errors: dict[str, float] = {}

    def work(kernel: _Kernel) -> None:
        with torch.no_grad():
            try:
                errors[kernel.name] = kernel.fit(state[kernel.names[0]])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{kernel.name or type(kernel.layer).__name__}: {error}") from None

    workers = workers if all(kernel.layer.cores[0].device.type == "cpu" for kernel in kernels) else 1
    try:
        with Progress("fitting", len(kernels), progress) as shown:
            side_by_side(
                work, kernels, workers, lambda kernel: kernel.layer.network.dense_params,
                lambda kernel: shown.step(kernel.name), shown.show,
            )  # fmt: skip
        model.load_state_dict({**model.state_dict(), **{name: state[name] for name in wanted}})
    except BaseException:
        model.load_state_dict(before)
        raise
    count = sum(parameter.numel() for parameter in model.parameters())
    networks = [kernel.layer.network for kernel in kernels]
    added = sum(network.dense_params - network.num_params for network in networks)
    rows = tuple(kernel.row(errors[kernel.name]) for kernel in kernels)
    others = other_rows(model, [kernel.site for kernel in kernels])
    return TensorizeReport(rows, (count + added, count), others=others)


@dataclass
class _Kernel:
    """A network of the model, and the dense model's weight that it is fitted to.

    Attributes:
        site: the tensor layer or the weight, with all its names in the model.
        layer: the tensor layer, or one over the cores of the weight.
        names: names of the weight in the dense model.
        twins: other layers over the same cores.
        state: names in the model's own state that the dense model's has not.
    """

    site: LayerSite
    layer: TensorLayer
    names: list[str] = field(default_factory=list)
    twins: list[TensorLayer] = field(default_factory=list)
    state: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.site.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense model's weight. That of transformers' ``Conv1D`` is transposed."""
        if isinstance(self.site, WeightSite):
            return tuple(self.site.value.shape)
        shape = tuple(_dense(self.layer).weight.shape)
        return shape[::-1] if came_from_conv1d(self.layer) else shape

    def fit(self, weight: Tensor) -> float:
        """Fit the cores to the dense model's weight, and return the relative error."""
        layout = self.site.layout if isinstance(self.site, WeightSite) else None
        weight = weight.T if came_from_conv1d(self.layer) else weight
        error = self.layer.set_weight_(weight if layout is None else layout.to_kernel(weight))
        for twin in self.twins:
            for name, buffer in self.layer.named_buffers():
                twin.get_buffer(name).copy_(buffer)
        return error

    def row(self, error: float) -> LayerReport:
        layer, network, weight = self.layer, self.layer.network, isinstance(self.site, WeightSite)
        return LayerReport(
            name=self.name, aliases=self.site.names[1:], kind=self.site.text if weight else repr(_dense(layer)),
            swapped=True, reason="fitted", format=layer.format.name, rank=dict(layer.rank),
            params=(network.dense_params, network.num_params), error=error,
            held=network.dense_params if weight else entries(_dense(layer).parameters()),
        )  # fmt: skip


def _kernels(model: nn.Module) -> list[_Kernel]:
    """Return every network of the model, each once, with all its names."""
    modules = check_module("model", model).named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, TensorLayer)}
    found: dict[Any, _Kernel] = {}
    for name, layer in layers.items():
        shown = name or type(layer).__name__
        if is_parametrized(layer.cores):
            raise TypeError(f"cores of {shown} are parametrized; remove the parametrizations first")
        if layer.cores[0].is_meta:
            raise ValueError(f"{shown} is on the meta device and has no cores to set; call to_empty first")
        # Tied embeddings are several layers over the same cores.
        key = *map(id, layer.cores), type(layer), repr(layer._arguments(layer))
        kernel = found.setdefault(key, _Kernel(LayerSite(layer, (), []), layer))
        kernel.site.names += (name,)
        kernel.names.append(_weight(model, name))
        kernel.twins += [layer] if layer is not kernel.layer and layer not in kernel.twins else []
        kernel.state |= {
            f"{_prefix(name)}{key}" for key in layer.state_dict().keys() - _dense(layer).state_dict().keys()
        }
    for site in networks(model):
        layer = weight_layer(site.names[0], site.module.parametrizations[site.parameter])
        kernel = found[site.module, site.parameter] = _Kernel(site, layer, [*site.names])
        for name in site.names:
            path = f"{name.removesuffix(site.parameter)}parametrizations.{site.parameter}."
            kernel.state |= {f"{path}{key}" for key in site.module.parametrizations[site.parameter].state_dict()}
    if not found:
        raise ValueError("model has no tensor layer; for a dense model use model.load_state_dict")
    return [*found.values()]


def _weight(model: nn.Module, name: str) -> str:
    """Return the name that a tensor layer's kernel has in the dense model, also if another layer holds this one."""
    owner, _, own = name.rpartition(".")
    holder = model.get_submodule(owner) if own else None
    if isinstance(holder, TensorRecurrent):
        return f"{_prefix(owner)}weight_{own}"
    return f"{_prefix(owner if isinstance(holder, TiedLinear) else name)}weight"


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _one_tensor(state: Mapping[str, Any]) -> list[list[str]]:
    """Return the names of each parameter or buffer that has several."""
    names: dict[int, list[str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            names.setdefault(id(value), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _completed(given: Mapping[str, Any], tied: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Return a state in which names of one tensor stand for each other."""
    state = dict(given)
    for names in tied:
        held = [name for name in names if name in given]
        state |= {name: given[held[0]] for name in names if held and name not in given}
    return state


def _check_ties(tied: Iterable[Sequence[str]], state: Mapping[str, Any]) -> None:
    """Raise if names of one tensor have several values."""
    for first, *others in tied:
        for name in others:
            if state[name] is not state[first] and not torch.equal(state[name], state[first]):
                raise ValueError(f"state_dict has other values in {name} than in {first}, but they are one in model")


def _check(
    wanted: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any], own: Collection[str]
) -> None:
    """Raise unless a state has the wanted names, with the shapes of the model's tensors and of the kernels.

    Args:
        wanted: the part of the model's state that the dense model has too.
        shapes: shapes of the kernels.
        given: the state.
        own: names in the model's state that the dense model's has not.
    """
    names = [*wanted, *shapes]
    missing, unexpected = (
        [name for name in names if name not in given],
        [name for name in given if name not in {*names}],
    )
    if missing or unexpected:
        parts = [f"{what} {_listed(names)}" for what, names in (("lacks", missing), ("also has", unexpected)) if names]
        ours = any(name in own or ".cores." in f".{name}" for name in unexpected)
        hint = "; it has cores, so it is a state of tensor layers: use model.load_state_dict" if ours else ""
        raise ValueError(f"state_dict {' and '.join(parts)}; it must have the names of the dense model's state{hint}")
    for name, value in wanted.items():
        if isinstance(value, nn.UninitializedParameter | UninitializedBuffer):
            raise ValueError(f"model has no shape yet for {name} (lazy); run it once first")
    # Others are extra state, which the module itself checks.
    sizes = {name: tuple(value.shape) for name, value in wanted.items() if isinstance(value, Tensor)}
    for name, shape in (sizes | dict(shapes)).items():
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
