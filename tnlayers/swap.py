"""Model-wide swapping: plain layers to tensor layers, in place, and back to plain layers."""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from tnlayers import errors, zoo
from tnlayers.config import TensorizeConfig, check_patterns, matches
from tnlayers.kinds import KINDS
from tnlayers.layer import TensorLayer
from tnlayers.observe import dense_flops, fewest_flops
from tnlayers.prepare import choose_ranks, make, note_moments, note_shape, watch
from tnlayers.report import LayerReport, Replaced, TensorizeReport, holders
from tnlayers.spots import STATE_HOOKS, Spot, find, left_alone, unwrapped
from tnlayers.unfold import unfold

_READERS = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention
"""Modules of torch's that ask their layers for their weights."""
_HOOKS = [name for name in vars(nn.Module()) if "hook" in name and name not in STATE_HOOKS]


def tensorize_(
    model: nn.Module,
    config: TensorizeConfig | None = None,
    *,
    example_input: Any = None,
    calibration: Iterable[Any] | None = None,
    dry_run: bool = False,
) -> TensorizeReport:
    """Replace convolutions, transposed convolutions and linear layers of a model by tensor layers, in place.

    What is replaced keeps its bias (the same parameter), device, dtype, ``requires_grad``, training flag, hooks and
    attributes. A module at several places stays one module. All new layers are made before the first is put in its
    place, so that whatever raises leaves the model as it was. Progress is logged to ``tnlayers``.

    Args:
        model: any module that is not itself such a layer. Compile it or wrap it for data parallelism afterwards, or
            pass a compiled model, which is compiled anew.
        config: which layers, and what they become; default: ``TensorizeConfig()``.
        example_input: a tensor, a tuple of arguments or a mapping of named ones; the model then runs on it once, in
            eval mode without gradients, and FLOPs are reported. A budget of FLOPs needs it.
        calibration: a list of such inputs. In the order in which layers are called, each is then fitted so that its
            outputs, behind the fitted layers before it, come near to the original ones. How near, is judged by the
            second moments of patches of its inputs; of patches with more than 2,304 entries and in transposed layers by
            those of channels alone. The model runs on all of the list once, then twice for every layer that is fitted,
            in eval mode without gradients. Takes memory for one input, all that a layer gets on it, 2**25 entries of
            patches (but one image's at least), each of these twice, and some float64 matrices with a row and a column
            per entry of a patch; with an energy or a budget, one per channel for every layer.
        dry_run: only report. Nothing is fitted, so there are no errors to report.

    Returns:
        TensorizeReport: every such layer, replaced or not, and why.

    Raises:
        TypeError, ValueError: calibration is no list, empty or of no use, a pattern covers no layer, the model has no
            layer to swap, every chosen layer refuses its rank, a budget cannot be met, weights to be fitted are on the
            meta device, or the model is wrapped for distributed data parallelism; what the model raises on an input. A
            layer alone that cannot become a tensor layer is left alone, and the report says why.

    Warns:
        UserWarning: an optimizer holds parameters that left the model; ``remap_optimizer_`` exchanges them.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        >>> config = TensorizeConfig("tucker", rank=0.5, exclude=["3"])
        >>> report = tensorize_(model, config, example_input=torch.randn(2, 16, 3, 3))
        >>> report.swapped, type(model[0]).__name__, report["3"].reason
        (('0',), 'TuckerConv2d', "excluded by '3'")
    """
    config = TensorizeConfig() if config is None else config
    if not isinstance(config, TensorizeConfig):
        raise TypeError(f"config is {config!r}; it must be a tnlayers.TensorizeConfig")
    errors.boolean("dry_run", dry_run)
    spots = find(model, (*KINDS, TensorLayer), "convolution or linear layer")
    check_patterns(config, [spot.names for spot in spots])
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for spot in spots:
        spot.reason = left_alone(spot, config, owners)
    chosen = [spot for spot in spots if not spot.reason]
    if not chosen:
        left = "; ".join(f"{spot.names[0]}: {spot.reason}" for spot in spots[:3])
        raise ValueError(f"model has no layer to swap ({left}{', ...' if len(spots) > 3 else ''})")
    if example_input is not None:
        watch(model, spots, [example_input], note_shape)
    elif config.budget and "flops" in config.budget:
        raise ValueError(f"budget is {config.budget}, but example_input is None; FLOPs depend on the input's size")
    batches = [] if calibration is None else _batches(calibration)
    if batches:
        if not any(spot.settings["decompose"] for spot in chosen):
            raise ValueError(
                "calibration is given, but decompose is False for every chosen layer, and only fits use it; leave it "
                "out, or say decompose=True"
            )
        chosen = watch(model, chosen, batches, note_moments)
    with torch.inference_mode(False), torch.no_grad():
        choose_ranks(chosen, config)
        make(model, chosen, dry_run, batches)
    report = _finish(model, spots, dry_run)
    if not dry_run:
        unwrapped(model)._tensorize_config = config  # type: ignore[assignment]
    return report


def _batches(calibration: Any) -> list[Any]:
    if isinstance(calibration, torch.Tensor | str | Mapping) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration is of type {type(calibration).__name__}; it must be a list of inputs, as example_input each, "
            "such as [batch]"
        )
    if not (batches := list(calibration)):
        raise ValueError("calibration is empty; it must hold an input at least (a used generator holds none)")
    return batches


def densify_(model: nn.Module, *, include: Sequence[str] = ("*",)) -> TensorizeReport:
    """Replace every tensor layer by the plain torch layer with the same function, in place.

    Args:
        model: a module that holds tensor layers.
        include: patterns of the layers to replace, see ``TensorizeConfig``.

    Returns:
        TensorizeReport: as of ``tensorize_``.

    Raises:
        ValueError: the model holds no tensor layer, or is one itself (take ``to_dense`` of that); a pattern covers no
            layer.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.TRConv2d(16, 32, 3))
        >>> _ = densify_(model)
        >>> print(model[0])
        Conv2d(16, 32, kernel_size=(3, 3), stride=(1, 1))
    """
    return _back(model, include, lambda layer: layer.to_dense(), "plain again")


def unfold_(model: nn.Module, *, include: Sequence[str] = ("*",)) -> TensorizeReport:
    """Replace every tensor layer by plain torch layers in sequence, in place: what is exported needs nothing of ours.

    See ``tnlayers.unfold``, which finds the sequence with the fewest multiply-adds; where that is the dense kernel, one
    plain layer. A sequence has no ``weight`` or ``stride``: where a model's own code asks a layer for them, take
    ``densify_`` for that one (in torch's own transformer layers, they are made plain). A layer with a channel shuffle
    takes batched inputs only, and a transposed one no ``output_size``.

    Args:
        model: a module that holds tensor layers.
        include: patterns of the layers to replace, see ``TensorizeConfig``.

    Returns:
        TensorizeReport: as of ``tensorize_``.

    Raises:
        ValueError: the model holds no tensor layer, or is one itself (take ``unfold`` of that); a pattern covers no
            layer.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.TuckerConv2d(16, 32, 3, rank=4))
        >>> _ = unfold_(model)
        >>> print(model[0][1])
        Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), bias=False)
    """
    return _back(model, include, unfold, "unfolded")


def _back(
    model: nn.Module, include: Sequence[str], convert: Callable[[Any], nn.Module], reason: str
) -> TensorizeReport:
    spots = find(model, (TensorLayer,), "tensor layer")
    config = TensorizeConfig(include=include)
    check_patterns(config, [spot.names for spot in spots])
    chosen = [spot for spot in spots if any(matches(pattern, spot.names) for pattern in config.include)]
    for spot in spots:
        spot.reason = reason if spot in chosen else "not in include"
    for spot in chosen:
        if any(getattr(spot.module, name) for name in STATE_HOOKS):
            raise ValueError(f"{spot.names[0]} has hooks on its state_dict, which would be lost; remove them first")
    with torch.no_grad():
        for spot in chosen:
            spot.new = convert(spot.module)
            if not isinstance(spot.new, spot.module.dense_type) and any(
                isinstance(p, _READERS) for p, _ in spot.places
            ):
                spot.new, spot.reason = spot.module.to_dense(), "plain again: its parent reads its weight"
    report = _finish(model, spots)
    if len(chosen) == len(spots):
        for module in model.modules():
            vars(module).pop("_tensorize_config", None)
    return report


def _finish(model: nn.Module, spots: list[Spot], dry_run: bool = False) -> TensorizeReport:
    """Put every new layer in its places, unless it is a dry run, and report."""
    swapped = [spot for spot in spots if spot.new is not None]
    before = _params(model)
    layers = tuple(map(_row, spots))
    after = before + sum(_params(spot.new) - _params(spot.module) for spot in swapped)
    gone = [p for spot in swapped for p in spot.module.parameters() if p is not spot.module.bias]
    # Before anything is put anywhere, since a warning may be an error.
    for optimizer in () if dry_run or not gone else holders(gone):
        warnings.warn(
            f"{type(optimizer).__name__} was made before the swap and holds parameters that left the model, so it "
            "would not train what came instead; call tnlayers.remap_optimizer_(optimizer, report)",
            stacklevel=3,
        )
    old_order = [*map(id, model.parameters())]
    replaced = [] if dry_run else [each for spot in swapped for each in _put(spot)]
    return TensorizeReport(layers, (before, after), dry_run, replaced, (old_order, [*map(id, model.parameters())]))


def _row(spot: Spot) -> LayerReport:
    new, tensor = spot.new, spot.new if isinstance(spot.new, TensorLayer) else None
    flops = None
    if spot.shapes:
        dense = dense_flops(spot.geometry, spot.shapes)
        flops = dense, dense if tensor is None else fewest_flops(tensor, spot.shapes, spot.module.weight.device.type)
    return LayerReport(
        name=spot.names[0],
        aliases=spot.names[1:],
        kind=repr(spot.module) if len(repr(spot.module)) < 60 else type(spot.module).__name__,
        swapped=new is not None,
        reason=spot.reason,
        format=None if tensor is None else tensor.format.name,
        rank=None if tensor is None else dict(tensor.rank),
        params=(_params(spot.module, False), _params(spot.module if new is None else new, False)),
        flops=flops,
        error=spot.error,
    )


def _params(module: nn.Module, bias: bool = True) -> int:
    sized = ((name, p) for name, p in module.named_parameters() if not isinstance(p, nn.UninitializedParameter))
    return sum(p.numel() for name, p in sized if bias or not name.endswith("bias"))


def _put(spot: Spot) -> list[Replaced]:
    """Put a new layer in its places, with all that is no matter of the kernel: bias, hooks, attributes."""
    old, new = spot.module, spot.new
    last = new[-1] if isinstance(new, nn.Sequential) else new
    if "bias" in last._parameters:  # before a shuffle at the end, the bias is another one, its entries permuted
        last.bias = old.bias
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    for name in vars(old).keys() - _own():
        setattr(new, name, vars(old)[name])
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    stays = {*map(id, before.values())} & {*map(id, after.values())}
    leaving, coming = ({k: p for k, p in named.items() if id(p) not in stays} for named in (before, after))
    for parent, key in spot.places:
        parent._modules[key] = new
    # All that comes takes the place of the first that leaves.
    return [
        Replaced(weakref.ref(parameter), name, {} if number else coming)
        for number, (name, parameter) in enumerate(leaving.items())
    ]


@cache
def _own() -> set[str]:
    """Attributes of layers, ours and torch's; whatever else is found there, somebody has put there."""
    layers = (kind(1, 1, *([] if kind is nn.Linear else [1]), device="meta") for kind in KINDS)
    return {name for layer in (*layers, zoo.CPLinear(1, 1, rank=1, device="meta")) for name in vars(layer)}
