"""Weights that no layer covers: parameters of two or more axes, each of which can become a network."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tnlayers.backend.input_checks import check_module
from tnlayers.layers.any_weight import Layout, NetworkWeight, PlainWeight, TensorWeight, weight_class
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.networks import network_of, without_dropout
from tnlayers.spec.geometry import Geometry
from tnlayers.tensorize.finding import plain_name
from tnlayers.tensorize.report import Replaced, replaced
from tnlayers.tensorize.sites import LayerSite
from tnlayers.tensorize.swappable import DEFAULT_GROUPS, GROUPS

_LEFT: Any = TensorLayer, *GROUPS["embedding"], *GROUPS["recurrent"], nn.LayerNorm, nn.RMSNorm
"""Types whose parameters stay: tables and recurrent layers need layers of their own, and norms only scale."""
AXES: dict[type[nn.Module], dict[str, str]] = {nn.Bilinear: {"weight": "o i1 i2"}}
"""Axes of torch's parameters that ``default_axes`` would take for others."""


def default_axes(module: nn.Module, name: str, ndim: int) -> str:
    """Return the axes of a parameter: rows are outputs, columns inputs, and axes before them a map each.

    Example:
        >>> default_axes(nn.Module(), "weight", 2), default_axes(nn.Module(), "experts", 3)
        ('o i', 'g o i')
    """
    for kind, known in AXES.items():
        if isinstance(module, kind) and name in known:
            return known[name]
    return " ".join([*(f"g{k}" if ndim > 3 else "g" for k in range(1, ndim - 1)), "o i"])


@dataclass
class WeightSite(LayerSite):
    """A parameter of a module, which becomes a network or plain again. ``module`` is the one that holds it."""

    parameter: str = ""
    axes: str | None = None

    whole = False

    @property
    def value(self) -> Tensor:
        """The parameter, or what is computed in its place."""
        with without_dropout(self.module, self.parameter):
            found: Tensor = getattr(self.module, self.parameter)
        return found

    @property
    def layout(self) -> Layout | None:
        """How the parameter becomes a kernel; None: it is the kernel of a convolution."""
        if self.axes is None and self._convolution() is not None:
            return None
        axes = default_axes(self.module, self.parameter, self.value.ndim) if self.axes is None else self.axes
        return Layout(tuple(self.value.shape), axes)

    def _convolution(self) -> Geometry | None:
        """Return the geometry of a subclass of torch's layers that reads its own weight."""
        known = tuple(kind for group in DEFAULT_GROUPS for kind in GROUPS[group])
        if self.parameter != "weight" or not isinstance(self.module, known):
            return None
        geometry = LayerSite(self.module, (), []).geometry
        return geometry if geometry.weight_shape == tuple(self.value.shape) else None

    @property
    def geometry(self) -> Geometry:
        """The linear map or convolution that the parameter is the kernel of."""
        own = self._convolution() if self.layout is None else None
        return self.layout.geometry if own is None else own  # type: ignore[union-attr]

    @property
    def plain(self) -> Any:
        """The kernel."""
        twin = PlainWeight(self.geometry, device="meta")
        value = self.value.detach()
        kernel = value if self.layout is None else self.layout.to_kernel(value)
        twin.weight = nn.Parameter(kernel, self.value.requires_grad)
        return twin.train(self.module.training)

    def _class(self, format: str) -> type[TensorLayer]:
        return weight_class(format)

    @property
    def leaving(self) -> list[Tensor]:
        """The parameter, or the cores."""
        if (found := self.module._parameters.get(self.parameter)) is not None:
            return [found]
        return [*self.module.parametrizations[self.parameter].parameters()]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameter, or the cores."""
        return self.leaving

    @property
    def text(self) -> str:
        """The module's type, the parameter's name and its shape."""
        kind = parametrize.type_before_parametrizations(self.module).__name__
        return f"{kind}.{self.parameter} {' x '.join(map(str, self.value.shape))}"

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters before and after."""
        return self.leaving, self.leaving if self.new is None else [*self.new.parameters()]

    def put(self) -> list[Replaced]:
        """Make the parameter a network, or the network a plain parameter."""
        before = dict(self.module.named_parameters())
        if isinstance(self.new, TensorWeight):
            network = NetworkWeight(self.new, self.layout)
            # Unsafe only skips a contraction to check the shape.
            parametrize.register_parametrization(self.module, self.parameter, network, unsafe=True)
        else:
            kind = type(self.module)  # copies share it, and torch would take the weight from all of them
            own = {key: each for key, each in vars(kind).items() if key not in ("__dict__", "__weakref__")}
            self.module.__class__ = type(kind.__name__, kind.__bases__, own)
            with (
                torch.enable_grad(),
                without_dropout(self.module, self.parameter),
            ):  # without gradients, torch would make it a buffer
                parametrize.remove_parametrizations(self.module, self.parameter)
            value = self.module._buffers.pop(self.parameter, None)  # torch makes one of frozen cores
            if value is not None:
                self.module.register_parameter(self.parameter, nn.Parameter(value, requires_grad=False))
        return replaced(before, dict(self.module.named_parameters()))


def weights(model: nn.Module, covered: Iterable[nn.Module]) -> list[WeightSite]:
    """Find parameters with two or more axes longer than one, outside of modules that have layers of their own.

    Args:
        model: any module.
        covered: modules to leave out, with all inside of them.
    """
    left = {inner for module in covered for inner in module.modules()}
    left |= {inner for module in model.modules() for inner in _parametrizations(module)}

    def names(module: nn.Module) -> Iterator[str]:
        if module not in left and not isinstance(module, _LEFT):
            yield from (name for name, each in module._parameters.items() if each is not None and is_matrix(each))

    return _found(model, names)


def networks(model: nn.Module) -> list[WeightSite]:
    """Find the weights of modules that are networks."""
    check_module("model", model)

    def names(module: nn.Module) -> Iterator[str]:
        if parametrize.is_parametrized(module):
            every: Any = module.parametrizations
            yield from (name for name in every if network_of(module, name))

    return _found(model, names)


def _found(model: nn.Module, names: Callable[[nn.Module], Iterator[str]]) -> list[WeightSite]:
    found: dict[tuple[nn.Module, str], WeightSite] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name in names(module):
            site = found.setdefault((module, name), WeightSite(module, (), [], parameter=name))
            site.names += (".".join(filter(None, (plain_name(path, model), name))),)
    return list(found.values())


def _parametrizations(module: nn.Module) -> Iterator[nn.Module]:
    if parametrize.is_parametrized(module):
        yield from module.parametrizations.modules()  # type: ignore[union-attr]


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter has two axes longer than one."""
    return not isinstance(parameter, nn.UninitializedParameter) and sum(size > 1 for size in parameter.shape) > 1
