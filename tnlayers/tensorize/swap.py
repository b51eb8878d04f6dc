"""Replacement of a model's plain layers by tensor layers, in place, and back."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tnlayers import validate
from tnlayers.backend.name_patterns import matches
from tnlayers.backend.observe import observe
from tnlayers.interop.plain_torch import unfold
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.registry import KINDS, layer_class
from tnlayers.tensorize.config import TensorizeConfig, check_patterns
from tnlayers.tensorize.new_layers import choose_ranks, make_layers
from tnlayers.tensorize.replace import keep_bias, put_in_place
from tnlayers.tensorize.report import TensorizeReport
from tnlayers.tensorize.sites import (
    STATE_HOOKS,
    LayerSite,
    Swap,
    find,
    left_alone,
    note_holders,
    note_moments,
    note_shape,
    unwrapped,
    watch,
)
from tnlayers.tensorize.weight_readers import Read, mentions, reads

_READERS = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention
"""Modules of torch that read their layers' weights."""
_ALONE = "which cannot be replaced in place; write `layer = {}`"


def tensorize_(
    model: nn.Module,
    config: TensorizeConfig | str | Mapping[str, Any] | None = None,
    *,
    example_input: Any = None,
    calibration: Iterable[Any] | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
    workers: int | None = None,
) -> TensorizeReport:
    """Replace convolutions, transposed convolutions and linear layers of a model by tensor layers, in place.

    A new layer keeps the bias (the same parameter), device, dtype, ``requires_grad``, training flag, hooks and
    attributes. A module at several places stays one module. A layer stays plain if anything else than modules also
    holds it (lists, hooks, closures and so on), or if its weight shares memory with another parameter. All new layers
    are made before the first is put in place, so an error leaves the model unchanged. Without calibration, layers are
    fitted side by side; the result does not depend on ``workers``. Every new layer is logged to ``tnlayers``.

    Args:
        model: any module that is not itself such a layer. Compile it or wrap it for data parallelism afterwards, or
            pass a compiled model, which is compiled anew.
        config: which layers to replace, and by what; default: ``TensorizeConfig()``. The name of a format, such as
            "tr", means ``TensorizeConfig("tr")``; a mapping is passed to ``TensorizeConfig.from_dict``.
        example_input: a tensor, a tuple of arguments or a mapping of named ones. The model runs on it once, in eval
            mode without gradients, and the report gives FLOPs. A budget of FLOPs needs it. This run gives lazy layers
            their shapes, so they are swapped as others.
        calibration: a list of such inputs. Layers are fitted in the order of their calls: each, on its inputs from the
            fitted layers before it, to its original outputs. The error is measured by second moments of input patches;
            for patches of more than 2,304 entries and in transposed layers, of channels alone. In eval mode, the model
            runs on the list once, then twice, up to the layer, for every fitted layer; layers with one input share
            this. It takes memory for an input, a layer's inputs in that run, 2**25 entries of patches (at least one
            image's), each of these twice, and some float64 matrices with a row and a column per patch entry; with
            an energy or a budget, one with a row and a column per channel for every layer.
        dry_run: only report. Nothing is fitted, so there are no errors of fits.
        progress: show a bar on stderr. None: if stderr is a terminal and fits take longer than two seconds.
        workers: maximum number of layers fitted side by side on a CPU, each in one of torch's threads, whose number is
            restored afterwards, and with the memory of a fit. None: ``torch.get_num_threads()``.

    Returns:
        TensorizeReport: every such layer, replaced or not, and why.

    Raises:
        TypeError, ValueError: config is invalid; calibration is no list, empty or unused; a pattern covers no layer;
            the model has no layer to swap or is one itself; every chosen layer refuses its rank; a budget cannot be
            met; weights to fit are on the meta device; or the model is wrapped for distributed data parallelism. If
            only some layers cannot become tensor layers, they stay plain, and the report says why.
        Exception: what the model raises on an input.

    Warns:
        UserWarning: an optimizer holds parameters that left the model; ``remap_optimizer_`` exchanges them.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        >>> config = TensorizeConfig("tucker", rank=0.5, exclude=["3"])
        >>> report = tensorize_(model, config, example_input=torch.randn(2, 16, 3, 3))
        >>> report.swapped, type(model[0]).__name__, report["3"].reason
        (('0',), 'TuckerConv2d', "excluded by '3'")
    """
    config = _config(config)
    validate.boolean("dry_run", dry_run)
    validate.boolean("progress", bool(progress) if progress is None else progress)
    workers = torch.get_num_threads() if workers is None else validate.integer("workers", workers)
    if example_input is None and config.budget and "flops" in config.budget:
        raise ValueError(f"budget is {config.budget}, but example_input is None; FLOPs depend on the input's size")
    swap = Swap(model, config, [] if calibration is None else _batches(calibration), dry_run, progress, workers)
    _find_sites(swap, example_input)
    with torch.inference_mode(False), torch.no_grad():
        choose_ranks(swap)
        make_layers(swap)
    for site in swap.chosen:
        keep_bias(site)
    report = put_in_place(swap)
    if not dry_run:
        unwrapped(model)._tensorize_config = config  # type: ignore[assignment]
    return report


def _find_sites(swap: Swap, example: Any) -> None:
    """Find the layers, their input shapes and other holders, and choose the layers to swap."""
    model, config, batches = swap.model, swap.config, swap.batches
    sites = _found(model, config)
    check_patterns(config, [site.names for site in sites])
    # First of all, since this run initialises lazy layers, and may create layers.
    if example is not None:
        shapes = {site.module: site.shapes for site in watch(model, sites, [example], note_shape)}
        sites = _found(model, config)
        for site in sites:
            site.shapes = shapes.get(site.module, [])
    elif any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        observe(model, (), batches[:1], lambda *_: None)
    weights = {site.module: site.module._parameters.get("weight") for site in sites}
    note_holders(model, {layer: [] if weight is None else [weight] for layer, weight in weights.items()}, sites)
    for site in sites:
        site.reason = left_alone(site, config)
    swap.sites, swap.chosen = sites, [site for site in sites if not site.reason]
    if not swap.chosen:
        left = "; ".join(f"{site.names[0]}: {site.reason}" for site in sites[:3])
        raise ValueError(f"model has no layer to swap ({left}{', ...' if len(sites) > 3 else ''})")
    if batches:
        if not any(site.settings["decompose"] for site in swap.chosen):
            raise ValueError(
                "calibration is given, but decompose is False for every chosen layer, and only fits use it; leave it "
                "out, or say decompose=True"
            )
        swap.chosen = watch(model, swap.chosen, batches, note_moments)


def _config(given: Any) -> TensorizeConfig:
    if given is None or isinstance(given, str):
        return TensorizeConfig() if given is None else TensorizeConfig(given)
    if isinstance(given, Mapping):
        return TensorizeConfig.from_dict(given)
    if not isinstance(given, TensorizeConfig):
        raise TypeError(f"config is {given!r}; it must be a tnlayers.TensorizeConfig, a format's name or a mapping")
    return given


def _found(model: nn.Module, config: TensorizeConfig) -> list[LayerSite]:
    def alone(layer: Any) -> str:
        if isinstance(layer, TensorLayer):
            return "a tensor layer already"
        cls = layer_class(config.format, next(kind for kind in KINDS if isinstance(layer, kind)))
        name = f"{'tnlayers.' if cls.__module__.startswith('tnlayers.') else ''}{cls.__name__}"
        given = ({} if config.rank is None else {"rank": config.rank}) | dict(config.options)
        given |= {} if config.decompose else {"decompose": False}
        arguments = ", ".join(["layer", *(f"{key}={value!r}" for key, value in given.items())])
        return _ALONE.format(f"{name}.from_{cls.dense_name}({arguments})")

    return find(model, (*KINDS, TensorLayer), "convolution or linear layer", alone)


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
        TensorizeReport: as from ``tensorize_``.

    Raises:
        ValueError: the model holds no tensor layer, or is one itself (use ``to_conv`` or ``to_linear``); a pattern
            covers no layer; or anything else than modules holds a layer or its cores, and would keep them.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.TRConv2d(16, 32, 3))
        >>> _ = densify_(model)
        >>> print(model[0])
        Conv2d(16, 32, kernel_size=(3, 3), stride=(1, 1))
    """
    return _back(model, include, lambda layer: layer.to_dense(), "plain again", "layer.to_{}()")


def unfold_(model: nn.Module, *, include: Sequence[str] = ("*",), example_input: Any = None) -> TensorizeReport:
    """Replace every tensor layer by a sequence of plain torch layers, in place, for exports that do not need tnlayers.

    ``tnlayers.unfold`` finds the sequence with the fewest multiply-adds; if that is the dense kernel, one plain layer.
    A sequence has only one attribute of a layer: a ``weight`` with its dtype, device and shape, and this only if the
    code of the model's own classes mentions weights. It is an expanded buffer, which cannot be written. So averages of
    buffers and DistributedDataParallel, which write buffers, raise. If the model's own code reads more, such as the
    values of weights or strides, pass an ``example_input``: layers with such reads become single plain layers, which
    have all attributes. (In torch's own transformer layers, they always do.) A sequence with a channel shuffle takes
    only batched inputs, and a transposed one no ``output_size``.

    Args:
        model: a module that holds tensor layers.
        include: patterns of the layers to replace, see ``TensorizeConfig``.
        example_input: as for ``tensorize_``. The model runs on it once, in eval mode without gradients.

    Returns:
        TensorizeReport: as from ``tensorize_``.

    Raises:
        ValueError: the model holds no tensor layer, or is one itself (use ``unfold``); a pattern covers no layer;
            anything else than modules holds a layer or its cores, and would keep them; or the model reads attributes
            that no plain layer has, such as ``cores``.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.TuckerConv2d(16, 32, 3, rank=4))
        >>> _ = unfold_(model)
        >>> print(model[0][1])
        Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), bias=False)
    """
    return _back(model, include, unfold, "unfolded", "tnlayers.unfold(layer)", example_input)


def _back(
    model: nn.Module,
    include: Sequence[str],
    convert: Callable[[Any], nn.Module],
    reason: str,
    alone: str,
    example: Any = None,
) -> TensorizeReport:
    sites = find(model, (TensorLayer,), "tensor layer", lambda layer: _ALONE.format(alone.format(layer.dense_name)))
    config = TensorizeConfig(include=include)
    check_patterns(config, [site.names for site in sites])
    chosen = [site for site in sites if any(matches(pattern, site.names) for pattern in config.include)]
    for site in sites:
        site.reason = reason if site in chosen else "not in include"
    for site in chosen:
        if any(getattr(site.module, name) for name in STATE_HOOKS):
            raise ValueError(f"{site.names[0]} has hooks on its state_dict, which would be lost; remove them first")
    read = {} if example is None else reads(model, [site.module for site in chosen], example)
    with torch.no_grad():
        for site in chosen:
            site.new = convert(site.module)
        sequences = [site for site in chosen if not isinstance(site.new, site.module.dense_type)]
        unseen = Read(kind=bool(sequences) and example is None and mentions(model, "weight"))
        for site in sequences:
            _make_readable(site, read.get(site.module, unseen))
        for site in chosen:
            keep_bias(site)
    # Before the first replacement, find all that leaves the model, and what would keep it.
    stays = {id(p) for site in chosen for p in site.new.parameters()}
    leaving = {site.module: [p for p in site.module.parameters() if id(p) not in stays] for site in chosen}
    note_holders(model, leaving, chosen)
    for site in chosen:
        if site.held:
            raise ValueError(
                f"{site.names[0]} cannot be replaced: {site.held}, and would keep the old layer; remove it there, or "
                "leave the layer out by include"
            )
        site.reason += f", no longer tied to {site.tied}" if site.tied else ""
    report = put_in_place(Swap(model, config, sites=sites))
    if len(chosen) == len(sites):
        for module in model.modules():
            vars(module).pop("_tensorize_config", None)
    return report


def _make_readable(site: LayerSite, read: Read) -> None:
    """Make a single plain layer if attributes are read, or register a weight for its dtype, device and shape."""
    names = read.names
    if missing := [name for name in names if not hasattr(dense := site.module.to_dense(), name)]:
        raise ValueError(
            f"{site.names[0]}: the model reads its {', '.join(missing)}, which no {type(dense).__name__} has; leave "
            "the layer out by include"
        )
    if any(isinstance(parent, _READERS) for parent, _ in site.places):
        site.new, site.reason = site.module.to_dense(), "plain again: its parent reads its weight"
    elif names:
        site.new, site.reason = site.module.to_dense(), f"plain again: the model reads its {', '.join(names)}"
    elif read.kind:
        # Not in state_dicts. It has the weight's shape without its memory; its NaN shows in what is computed with it.
        like = next(site.new.parameters())
        stand_in = like.detach().new_full([1], math.nan).expand(site.geometry.weight_shape)
        site.new.register_buffer("weight", stand_in, persistent=False)
