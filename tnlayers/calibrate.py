"""Scales for a whole model: from what its layers make of a batch, and for the branches of residual networks."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tnlayers.config import matches
from tnlayers.kinds import KINDS
from tnlayers.layer import TensorLayer
from tnlayers.observe import evaluating, run


@torch.no_grad()
def calibrate_(model: nn.Module, batch: Any, *, target: float = 1.0) -> dict[str, float]:
    """Rescale every convolution and linear layer, so that its outputs on a batch have one second moment.

    The model runs once, in eval mode. Each layer, of tnlayers or torch, is rescaled when it is first called, and hands
    on what it makes with its new weight: so the ones behind it see what they will get. Biases stay. A layer that the
    batch does not reach stays as it is; so do all others where anything is refused.

    This is the yardstick for rules without data, and better than these at depth. It keeps the signal, not the gradient.

    Args:
        model: any module.
        batch: a tensor, a tuple of arguments, or a mapping of named ones, as the model takes it.
        target: the mean of the squared outputs, over everything.

    Returns:
        dict[str, float]: by what each layer's weight was multiplied, in the order of the first calls.

    Raises:
        TypeError: ``model`` is no module, or a weight is computed from other tensors (parametrized).
        ValueError: ``target`` is not a positive number; there is no layer, or none that is reached; a layer is on the
            meta device, shares its weight with another, puts out only zeros, NaN or infinity, or has a bias whose
            square alone is above the target.

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
    weights = [weight for layer in layers for weight in _weights(layer)]
    before = [weight.detach().clone() for weight in weights]
    found: dict[str, float] = {}

    def rescale(layer: Any, _: Any, output: Tensor) -> Tensor | None:
        name = layers[layer]
        if name in found:
            return None
        found[name] = factor = _factor(name, layer, output, target)
        _multiply(layer, factor)
        bias = _bias(layer, output)
        rescaled: Tensor = (output - bias) * factor + bias
        return rescaled

    handles = [layer.register_forward_hook(rescale, prepend=True) for layer in layers]
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
    r"""Scale the last layers of residual branches, for networks without normalisation.

    Where every branch adds a signal as strong as the one it is added to, the second moment doubles with each. Branches
    scaled by :math:`1/\sqrt{L}`, of L in all, multiply it by at most :math:`(1 + 1/L)^L < e`; branches of zero leave
    it, and every block starts as its shortcut.

    Args:
        model: any module.
        last: names of the last convolution or linear layer of every branch: globs, or ``re:`` and an expression.
        factor: what weight and bias are multiplied with; ``1 / sqrt(L)``, of L layers that match, where not given. By
            0, of a tensor layer the last core alone becomes zero, so that the first step moves it.

    Returns:
        list[str]: the layers' names.

    Raises:
        TypeError: as for ``calibrate_``.
        ValueError: a pattern matches no layer, ``factor`` is not a finite number from 0, or a layer is on the meta
            device or shares its weight with another.

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
    if factor is not None and not (
        isinstance(factor, int | float) and not isinstance(factor, bool) and 0 <= factor < math.inf
    ):
        raise ValueError(f"factor is {factor!r}; it must be a number of at least 0, or None")
    patterns, layers = (last,) if isinstance(last, str) else tuple(last), _layers(model)
    for pattern in patterns:
        if not any(matches(pattern, [name]) for name in layers.values()):
            raise ValueError(f"last is {pattern!r}, which matches none of the layers {', '.join(layers.values())}")
    chosen = {layer: name for layer, name in layers.items() if any(matches(each, [name]) for each in patterns)}
    for layer in chosen:
        _multiply(layer, 1 / math.sqrt(len(chosen)) if factor is None else factor)
        if layer.bias is not None:
            layer.bias.mul_(1 / math.sqrt(len(chosen)) if factor is None else factor)
    return list(chosen.values())


def _layers(model: Any) -> dict[Any, str]:
    """Convolutions and linear layers by name, each once, with weights of their own."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be an nn.Module")
    found: dict[Any, str] = {}
    owners: dict[int, str] = {}
    module: nn.Module
    for name, module in model.named_modules():
        if not isinstance(module, TensorLayer) and not isinstance(module, tuple(KINDS)):
            continue
        if any(map(is_parametrized, (module, *module.children()))):
            raise TypeError(f"{name}: its weight is parametrized; remove the parametrizations first")
        for weight in _weights(module):
            if weight.is_meta:
                raise ValueError(f"{name} is on the meta device and has no values; call to_empty and initialise first")
            if id(weight) in owners:
                raise ValueError(
                    f"{name} shares its weight with {owners[id(weight)]}, and cannot have a scale of its own"
                )
            owners[id(weight)] = name
        found[module] = name
    return found


def _weights(layer: Any) -> list[nn.Parameter]:
    return [*layer.cores] if isinstance(layer, TensorLayer) else [layer.weight]


def _multiply(layer: Any, factor: float) -> None:
    weights = _weights(layer)
    if factor == 0:
        weights[-1].zero_()
        return
    for weight in weights:
        weight.mul_(factor ** (1 / len(weights)))


def _bias(layer: Any, output: Tensor) -> Any:
    """The bias as it was added to an output, or zero."""
    if layer.bias is None:
        return 0.0
    spatial = layer.geometry.ndim if isinstance(layer, TensorLayer) else layer.weight.ndim - 2
    return layer.bias.detach().view(-1, *[1] * spatial)


def _factor(name: str, layer: Any, output: Tensor, target: float) -> float:
    """By what to multiply the weight: the positive root of ``mean (factor y + bias)^2 = target``."""
    bias = _bias(layer, output)
    wide = torch.promote_types(output.dtype, torch.float32)
    y, offset = (output - bias).to(wide), torch.as_tensor(bias, dtype=wide, device=output.device).expand_as(output)
    square, cross, alone = (float(value.mean()) for value in (y * y, y * offset, offset * offset))
    if not math.isfinite(square) or square == 0:
        raise ValueError(f"{name}: the mean of its squared outputs on the batch is {square}, and no scale changes that")
    if alone >= target:
        raise ValueError(f"{name}: the square of its bias is {alone:.3g}, not below the target {target:g}")
    return (math.sqrt(cross**2 + square * (target - alone)) - cross) / square
