"""tensorly-torch's layers: initialisation by the variance solver, and exact conversion to our layers and back.

A factor there is a core here. ``layout_of`` gives the axes of every factor, in tensorly-torch's order and with our
formats' names. tensorly-torch is optional.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.backend.input_checks import check_module
from tnlayers.backend.shared_memory import sharing
from tnlayers.backend.views import rearranged
from tnlayers.init.draw import draw, uniform
from tnlayers.init.variance import Init, Variance, solve
from tnlayers.interop.tltorch_factors import CONV, LINEAR, SPATIAL, Factored, imported, layout_of, read_factors
from tnlayers.layers import by_format
from tnlayers.layers.base import TensorLayer, copy_state
from tnlayers.spec.notation import Axes


@torch.no_grad()
def initialize_(module: nn.Module, init: str | Init = "fan_in") -> nn.Module:
    """Redraw every tensor-network layer in a module in place, by the variance solver.

    These layers are tensorly-torch's ``FactorizedConv`` and ``FactorizedLinear``, with the networks of their factors,
    and all layers of tnlayers, whose ``init`` is set to the argument. Biases are drawn as in torch's layers. The extra
    weights of tensorly-torch's CP are set to ones, its own convention, and take no share of the variance. Parameters
    stay the same objects, and other modules are unchanged. If it raises, nothing has changed.

    Args:
        module: such a layer, or a module that holds some.
        init: the name of a mode, 'fan_in', 'fan_out' or 'fan_avg', or a ``tnlayers.Init``.

    Returns:
        nn.Module: the module itself.

    Raises:
        TypeError: ``module`` is no module, or cores are complex or computed from other tensors (parametrized).
        ValueError: there is no such layer, or one is on the meta device or has ``n_layers`` in one tensor; or factors
            are of unknown kind, do not fit together, are changed by a hook or are shared.

    Example:
        >>> import tltorch  # pip install 'tnlayers[tltorch]'
        >>> layer = initialize_(tltorch.FactorizedConv(16, 32, 3, order=2, rank=0.2, factorization="tt"))
        >>> print(f"{layer.weight.to_tensor().square().mean().item() * 16 * 9:.4f}")
        2.0000
    """
    init = Init.of(init)
    check_module("module", module)
    tltorch: Any = sys.modules.get("tltorch")  # imported already if a module holds its layers
    theirs = (tltorch.FactorizedConv, tltorch.FactorizedLinear) if tltorch else ()
    changes: list[tuple[Any, Factored, Variance]] = []
    cores: list[tuple[str, Tensor]] = []
    for path, layer in module.named_modules():
        name = f"{type(layer).__name__} {path!r}" if path else type(layer).__name__
        try:
            if isinstance(layer, TensorLayer):
                found, holder = Factored(layer.network, layer.geometry, "", [*layer.cores], []), layer.cores
            elif isinstance(layer, theirs):
                found, holder = read_factors(layer), layer.weight
            else:
                continue
            _check_settable([*found.factors, *found.weights], holder)
            variance = solve(found.network, replace(found.geometry, input_size=init.input_size), init)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        changes.append((layer, found, variance))
        cores += [(name, core) for core in (*found.factors, *found.weights)]
    if not changes:
        raise ValueError("module has nothing to initialise: no layer of tnlayers, FactorizedConv or FactorizedLinear")
    for first, other in sharing([core for _, core in cores]):
        raise ValueError(f"{cores[other][0]}: it shares a core with {cores[first][0]}; each needs its own values")
    for change in changes:
        _redraw(*change, init)
    return module


@torch.enable_grad()  # so that requires_grad of views of factors is right
def from_tltorch(layer: nn.Module) -> TensorLayer:
    """Convert a layer of tensorly-torch to one of tnlayers. The factors are copied, not fitted.

    CP, Tucker and TT become the classes of these names, TT with ``layout="chain"``. BlockTT becomes ``TTLinear``, and a
    dense tensor an Einsum layer of one core. CP's weights are multiplied into the core of the first output axis.

    Args:
        layer: a ``FactorizedConv`` or a ``FactorizedLinear``.

    Returns:
        TensorLayer: a layer with the same function, on the same device and in the same dtype.

    Raises:
        ImportError: tensorly-torch is missing.
        TypeError: ``layer`` is complex, or not exactly a ``FactorizedConv`` or ``FactorizedLinear`` (no subclass).
        ValueError: it has no counterpart, or its factors' shapes do not fit together.

    Example:
        >>> import tltorch  # pip install 'tnlayers[tltorch]'
        >>> print(from_tltorch(initialize_(tltorch.FactorizedConv(16, 32, 3, order=2, rank=8))))
        CPConv2d(16, 32, kernel_size=(3, 3), stride=(1, 1), bias=False, format=cp, rank=8, keep_ratio=0.0938)
    """
    tltorch = imported()
    if type(layer) not in (tltorch.FactorizedConv, tltorch.FactorizedLinear):
        raise TypeError(f"layer is {type(layer).__name__}; it must be tensorly-torch's FactorizedConv or -Linear")
    network, geometry, family, factors, weights = read_factors(layer)
    layout = "chain" if geometry.ndim else "matrix"
    own: dict[str, Any] = {"TT": {"layout": layout}, "Einsum": {"network": str(network)}}.get(family, {})
    own |= {name: getattr(geometry, name) for name in ("kernel_size", *SPATIAL) if geometry.ndim}
    own |= {"in_shape": network.shape(network.inputs), "out_shape": network.shape(network.outputs)}
    own |= {"rank": {bond: network.sizes[bond] for bond in network.bonds}, "dtype": factors[0].dtype, "device": "meta"}
    make = getattr(by_format, family + (f"Conv{geometry.ndim}d" if geometry.ndim else "Linear"))
    twin: TensorLayer = make(geometry.in_channels, geometry.out_channels, bias=layer.bias is not None, **own)
    twin.to_empty(device=factors[0].device)
    held = {frozenset(axes): (factor, axes) for axes, factor in zip(network.cores, factors, strict=True)}
    for core, axes in zip(twin.cores, twin.network.cores, strict=True):
        factor = _arranged(held, axes)
        for vector in weights if axes == (network.outputs[0], "r") else ():
            factor = factor * vector
        core.data.copy_(factor.detach())
        core.requires_grad_(factor.requires_grad)
    copy_state(layer, twin)
    return twin


@torch.enable_grad()
def to_tltorch(layer: TensorLayer) -> Any:
    """Convert a layer of tnlayers to one of tensorly-torch. The cores are copied.

    Convolutions in CP, Tucker and TT (``layout="chain"``) become a ``FactorizedConv``. They must have unsplit channels,
    no groups, and equal zero padding on both sides. Linear layers in CP, Tucker and TT (``layout="matrix"``, as many
    input as output factors) become a ``FactorizedLinear``. Tensors that only tensorly-torch has get neutral values and
    are not trained: ones for CP's weights, identities for the factors of kernel axes that our Tucker keeps whole.

    Args:
        layer: a layer of tnlayers.

    Returns:
        nn.Module: a ``FactorizedConv`` or ``FactorizedLinear`` with the same function.

    Raises:
        ImportError: tensorly-torch is missing.
        TypeError: ``layer`` is no layer of tnlayers.
        ValueError: it is none of these layers.

    Example:
        >>> layer = by_format.TuckerConv2d(16, 32, 3, padding=1, rank=(4, 8))
        >>> x = torch.randn(1, 16, 8, 8)
        >>> bool(torch.allclose(to_tltorch(layer)(x), layer(x), atol=1e-5))  # pip install 'tnlayers[tltorch]'
        True
    """
    tltorch = imported()
    if not isinstance(layer, TensorLayer):
        raise TypeError(f"layer is {type(layer).__name__}; it must be a layer of tnlayers")
    network, geometry, first = layer.network, layer.geometry, layer.cores[0]
    for refused, given, accepted in (
        (geometry.transposed, "layer is a transposed convolution", "has none"),
        (geometry.groups > 1, f"groups is {geometry.groups}", "has none"),
        (geometry.padding_mode != "zeros", f"padding_mode is {geometry.padding_mode!r}", "pads with zeros"),
        (geometry.prepad, f"padding is {geometry.padding!r}, here {geometry.pads}", "pads both sides alike"),
    ):
        if refused:
            raise ValueError(f"{given}; tensorly-torch {accepted}")
    family, factors = _matched(layer)
    shapes = network.shape(network.outputs), network.shape(network.inputs)
    kind = getattr(tltorch, (CONV if geometry.ndim else LINEAR)[family])
    weight = _factorized(kind, family, factors, () if geometry.ndim else shapes)
    own = {"bias": layer.bias is not None, "factorization": weight, "device": first.device, "dtype": first.dtype}
    # Its 'factorized' supports neither dense tensors nor Tucker with more factors on one side.
    if family == "Einsum" or (family == "Tucker" and len(shapes[0]) != len(shapes[1])):
        own["implementation"] = "reconstructed"
    own |= {name: getattr(geometry, name) for name in ("kernel_size", "stride", "dilation") if geometry.ndim}
    own |= {"padding": tuple(before for before, _ in geometry.pads)} if geometry.ndim else {}
    ends = (geometry.in_channels, geometry.out_channels) if geometry.ndim else shapes[::-1]
    twin = (tltorch.FactorizedConv if geometry.ndim else tltorch.FactorizedLinear)(*ends, **own)
    copy_state(layer, twin)
    return twin


def _check_settable(cores: Sequence[Tensor], holder: nn.Module) -> None:
    """Raise if cores have no values or are computed from other tensors."""
    if any(core.is_meta for core in cores):
        raise ValueError("it is on the meta device and has no cores to set; call to_empty first")
    own = {id(t if t._base is None else t._base) for t in (*holder.parameters(), *holder.buffers())}
    if any(id(core if core._base is None else core._base) not in own for core in cores):
        raise TypeError("its cores are computed from other tensors; remove parametrizations and pruning first")


def _redraw(layer: Any, found: Factored, variance: Variance, init: Init) -> None:
    if isinstance(layer, TensorLayer):
        layer.init = init
        layer.reset_parameters()
        return
    drawn = draw(found.network, found.geometry, variance, init, found.factors)
    for factor, values in zip(found.factors, drawn, strict=True):
        factor.copy_(values)
    for vector in found.weights:
        vector.fill_(1)
    if layer.bias is not None:
        layer.bias.copy_(uniform(layer.bias, found.geometry.bias_bound))


def _matched(layer: TensorLayer) -> tuple[str, list[nn.Parameter]]:
    """Return the family of a layer of tnlayers, and its cores arranged as tensorly-torch's factors."""
    network, kernel = layer.network, layer.network.kernel
    names = (("o",), ("i",)) if kernel else (network.outputs, network.inputs)
    held = {frozenset(axes): (core, axes) for core, axes in zip(layer.cores, network.cores, strict=True)}
    for family in CONV if kernel else ("CP", "Tucker", "TT"):
        # For a kernel axis that our Tucker keeps whole, tensorly-torch has a factor: an identity, not trained.
        whole = {f"r{a}": a for a in kernel if family == "Tucker" and f"r{a}" not in network.bonds}
        eyes = {frozenset((a, b)): (torch.eye(network.sizes[a]).to(layer.cores[0]), (a, b)) for b, a in whole.items()}
        first, *rest = layout_of(family, *names, kernel)
        layout = tuple(whole.get(axis, axis) for axis in first), *rest
        if len(layout) == len(network.cores) + len(eyes) and set(map(frozenset, layout)) == held.keys() | eyes.keys():
            parts = [_arranged(held | eyes, axes).clone(memory_format=torch.contiguous_format) for axes in layout]
            return family, [nn.Parameter(part.detach(), part.requires_grad) for part in parts]
    accepted = "TT in chain layout, channels whole" if kernel else "TT in matrix layout, features in pairs"
    raise ValueError(f"network is '{network}' ({layer.format.name}); tensorly-torch has CP, Tucker and {accepted}")


def _arranged(held: Mapping[frozenset[str], tuple[Tensor, Axes]], wanted: Axes) -> Tensor:
    return rearranged(held[frozenset(wanted)][0], f"{' '.join(held[frozenset(wanted)][1])} -> {' '.join(wanted)}")


def _factorized(make: Any, family: str, factors: list[nn.Parameter], tensorized: tuple[Any, ...]) -> Any:
    """Return tensorly-torch's tensor of factors with the axes of ``layout_of``."""
    own = {"tensorized_shape": tensorized} if tensorized else {}
    if family == "TT":
        factors[0].data = factors[0].data.unsqueeze(0)
        factors[-1].data = factors[-1].data.unsqueeze(-1)
        own |= {"rank": (*(factor.shape[0] for factor in factors), 1)} if tensorized else {}
    ones = nn.Parameter(torch.ones_like(factors[0][0]), requires_grad=False)
    parts = {"CP": (ones, factors), "Tucker": (factors[0], factors[1:]), "TT": (factors,), "Einsum": factors}
    return make(*parts[family], **own)
