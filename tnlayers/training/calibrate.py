"""Scaling of a whole model: calibration of its layers on a batch, and scaling of residual branches."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tnlayers.backend.input_checks import check_not_distributed
from tnlayers.backend.name_patterns import check_pattern, matches
from tnlayers.backend.observe import evaluating, run
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.registry import KINDS
from tnlayers.layers.zero_kernels import shrink

NEAR = 0.05
"""Relative tolerance of a rescaled layer's second moment; it covers rounding in half precision only."""


@torch.no_grad()
def calibrate_(model: nn.Module, batch: Any, *, target: float = 1.0) -> dict[str, float]:
    """Rescale every convolution and linear layer in place to a common second moment of its outputs on a batch.

    The model runs once, uncompiled and in eval mode. At its first call, each layer (of tnlayers or torch) is rescaled
    and called again, so the next layers get rescaled inputs. Biases stay; weights with requires_grad False are rescaled
    too. Layers that the batch does not reach stay unchanged, as do weights outside of such layers: embeddings,
    attention's joint projections, tensorly-torch's. If it raises, nothing has changed.

    It is a reference for rules without data, and better in deep networks. It preserves the signal, not the gradient.

    Args:
        model: any module.
        batch: a tensor, a tuple of arguments, or a mapping of named ones, as the model takes it.
        target: the mean of the squared outputs over all entries.

    Returns:
        dict[str, float]: the factor of each layer's weight, in the order of the first calls.

    Raises:
        TypeError: ``model`` is no module, or wrapped for distributed training; a weight is computed from other tensors
            (parametrized, pruned, weight_norm).
        ValueError: ``target`` is not a positive number; no layer exists or is reached; a layer is on the meta device,
            shares its weight with another module, has only zero outputs or any that is not finite, has a bias whose
            square alone reaches the target, or its output does not scale with its weight.

    Reference:
        Mishkin and Matas, "All you need is a good init", ICLR 2016, for layer-sequential unit variance.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), tnlayers.TRConv2d(16, 16, 3, rank=2))
        >>> x = torch.randn(8, 3, 12, 12)
        >>> list(calibrate_(model, x)), round(model(x).square().mean().item(), 4)
        (['0', '2'], 1.0)
    """
    if not (isinstance(target, int | float) and not isinstance(target, bool) and 0 < target < math.inf):
        raise ValueError(f"target is {target!r}; it must be a positive number")
    layers = _layers(model)
    if not layers:
        raise ValueError("model has nothing to calibrate: no convolution or linear layer")
    _check(model, layers)
    weights = [weight for layer in layers for weight in _weights(layer)]
    before = [weight.detach().clone() for weight in weights]
    found: dict[str, float] = {}

    def rescale(layer: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Tensor | None:
        name = layers[layer]
        if name in found:
            return None
        if not isinstance(output, Tensor):
            raise ValueError(f"{name} puts out {type(output).__name__}; only layers that put out a tensor have a scale")
        found[name] = _factor(name, layer, output, target)
        _multiply(layer, found[name])
        torch.clear_autocast_cache()
        again: Tensor = layer.forward(*arguments, **named)
        moment = float(again.to(torch.promote_types(again.dtype, torch.float32)).square().mean())
        if not abs(moment / target - 1) < NEAR:
            raise ValueError(
                f"{name} does not follow its weight: rescaled, the mean of its squared outputs is {moment:.3g}, not "
                f"{target:g}"
            )
        return again

    handles = [layer.register_forward_hook(rescale, prepend=True, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            run(model, batch)
        if not found:
            raise ValueError("batch reaches no layer of the model")
    except BaseException:
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
        raise
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def scale_residual_(model: nn.Module, last: str | Iterable[str], factor: float | None = None) -> list[str]:
    r"""Scale the last layers of residual branches in place, for networks without normalisation.

    If every branch has gain g, each block multiplies the second moment by 1 + g. With L branches scaled by
    :math:`1/\sqrt{L}`, all blocks together multiply it by :math:`(1 + g/L)^L < e^g`. With branches of zero it stays the
    same, and every block starts as its shortcut.

    Args:
        model: any module.
        last: names of the last convolution or linear layer of every branch: globs, or ``re:`` and an expression. As in
            ``TensorizeConfig``, a module's name covers all layers inside it.
        factor: factor of weight and bias; default ``1 / sqrt(L)`` for L matching layers. A factor of 0, or below a
            hundredth, is applied to only the last core of a tensor layer, so that the layer can learn.

    Returns:
        list[str]: the layers' names.

    Raises:
        TypeError: as for ``calibrate_``, for the matching layers; or ``last`` is no string or strings.
        ValueError: a pattern matches no layer, ``factor`` is not a finite number >= 0, or a matching layer is on the
            meta device or shares its weight with another module.

    Reference:
        Zhang, Dauphin, Ma, "Fixup Initialization", ICLR 2019, and De and Smith, "Batch Normalization Biases Residual
        Blocks Towards the Identity Function", NeurIPS 2020, for both scales.

    Example:
        >>> import tnlayers
        >>> from tnlayers.models import resnet20
        >>> model = resnet20(lambda *a, **k: tnlayers.CPConv2d(*a, rank=8, **k), norm=nn.Identity)
        >>> len(scale_residual_(model, "layer*.conv2"))
        9
    """
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if factor is not None and not (number and 0 <= factor < math.inf):
        raise ValueError(f"factor is {factor!r}; it must be a number of at least 0, or None")
    patterns = [last] if isinstance(last, str) else [*last] if isinstance(last, Iterable) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"last is {last!r}; it must be a pattern or a sequence of patterns")
    layers = _layers(model)
    chosen: dict[Any, str] = {}
    for pattern in patterns:
        check_pattern("last", pattern)
        here = {layer: name for layer, name in layers.items() if matches(pattern, [name])}
        if not here:
            raise ValueError(f"last is {pattern!r}, which matches none of the layers {', '.join(layers.values())}")
        chosen |= here
    _check(model, chosen)
    scale = 1 / math.sqrt(len(chosen)) if factor is None else factor
    for layer in chosen:
        shrink(_weights(layer), scale)
        if layer.bias is not None:
            layer.bias.mul_(scale)
    return list(chosen.values())


def _layers(model: Any) -> dict[Any, str]:
    """Return every convolution and linear layer once, with its name."""
    check_not_distributed(model)
    kinds: Any = (TensorLayer, *KINDS)
    return {
        module: name or type(module).__name__ for name, module in model.named_modules() if isinstance(module, kinds)
    }


def _check(model: nn.Module, layers: dict[Any, str]) -> None:
    """Raise if a layer's weight is shared, computed from other tensors or without values."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for place, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append((place, module))
    for layer, name in layers.items():
        held = layer.cores if isinstance(layer, TensorLayer) else layer
        own = set(map(id, held._parameters.values()))
        if is_parametrized(held) or not own.issuperset(map(id, _weights(layer))):
            raise TypeError(
                f"{name}: its weight is computed from other tensors; remove parametrizations and pruning first"
            )
        for weight in _weights(layer):
            if isinstance(weight, nn.UninitializedParameter):
                raise ValueError(f"{name} is lazy and has no weight yet; run the model once first")
            if weight.is_meta:
                raise ValueError(f"{name} is on the meta device and has no values; call to_empty and initialise first")
            if len(holders[id(weight)]) > 1:
                other = next(place for place, module in holders[id(weight)] if module is not held)
                raise ValueError(f"{name} shares its weight with {other}; each layer must have its own")


def _weights(layer: Any) -> list[nn.Parameter]:
    return [*layer.cores] if isinstance(layer, TensorLayer) else [layer.weight]


def _multiply(layer: Any, factor: float) -> None:
    weights = _weights(layer)
    for weight in weights:
        weight.mul_(factor ** (1 / len(weights)))


def _factor(name: str, layer: Any, output: Tensor, target: float) -> float:
    """Return the weight's factor: the positive root of ``mean (factor y + bias)^2 = target``."""
    spatial = layer.geometry.ndim if isinstance(layer, TensorLayer) else layer.weight.ndim - 2
    bias = output.new_zeros(()) if layer.bias is None else layer.bias.detach().view(-1, *[1] * spatial)
    wide = torch.promote_types(output.dtype, torch.float32)
    offset = bias.to(wide).expand_as(output)
    y = output.to(wide) - offset
    square, cross, alone = (float(value.mean()) for value in (y * y, y * offset, offset * offset))
    if not math.isfinite(square) or square == 0:
        raise ValueError(f"{name}: the mean of its squared outputs on the batch is {square}, and no scale changes that")
    if alone >= target:
        raise ValueError(f"{name}: the square of its bias is {alone:.3g}, not below the target {target:g}")
    return (math.sqrt(cross**2 + square * (target - alone)) - cross) / square
