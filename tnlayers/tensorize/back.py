"""Replacement of a model's tensor layers by plain torch layers, in place."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tnlayers.backend.name_patterns import matches
from tnlayers.interop.plain_torch import unfold
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.table import TensorTable
from tnlayers.tensorize.config import TensorizeConfig
from tnlayers.tensorize.covering import check_patterns
from tnlayers.tensorize.finding import ALONE, find, in_order, left, note_holders
from tnlayers.tensorize.replace import keep_bias, put_in_place
from tnlayers.tensorize.report import TensorizeReport
from tnlayers.tensorize.sites import STATE_HOOKS, LayerSite, Swap
from tnlayers.tensorize.swappable import NETWORKS, replaced_type
from tnlayers.tensorize.tied_sites import join_again, keep_together, tie_again
from tnlayers.tensorize.weight_readers import Read, mentions, reads
from tnlayers.tensorize.weight_sites import networks

_READERS = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention
"""Modules of torch that read their layers' weights."""


def densify_(model: nn.Module, *, include: Sequence[str] = ("*",)) -> TensorizeReport:
    """Replace every tensor layer by the plain torch layer with the same function, in place.

    Layers in the place of transformers' ``Conv1D`` become ``Conv1D`` again.

    Args:
        model: a module that holds tensor layers.
        include: patterns of the layers to replace, see ``TensorizeConfig``. An embedding and the layers tied to it are
            replaced together, or stay together.

    Returns:
        TensorizeReport: as from ``tensorize_``.

    Raises:
        ValueError: the model holds no tensor layer, or is one itself (use ``to_conv`` or ``to_linear``); a pattern
            covers no layer; ``include`` covers layers only whose weight another one shares that it leaves out; or
            anything else than modules holds a layer or its cores, and would keep them.

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
        include: patterns of the layers to replace, see ``TensorizeConfig``. An embedding and the layers tied to it are
            replaced together, or stay together.
        example_input: as for ``tensorize_``. The model runs on it once, in eval mode without gradients.

    Returns:
        TensorizeReport: as from ``tensorize_``.

    Raises:
        ValueError: the model holds no tensor layer, or is one itself (use ``unfold``); a pattern covers no layer;
            ``include`` covers layers only whose weight another one shares that it leaves out; anything else than
            modules holds a layer or its cores, and would keep them; or the model reads attributes that no plain layer
            has, such as ``cores``.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.TuckerConv2d(16, 32, 3, rank=4))
        >>> _ = unfold_(model)
        >>> print(model[0][1])
        Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), bias=False)
    """
    return _back(model, include, _unfolded, "unfolded", "tnlayers.unfold(layer)", example_input)


def _unfolded(layer: Any) -> nn.Module:
    single = isinstance(layer, TensorTable) or not isinstance(layer, TensorLayer)
    plain: nn.Module = layer.to_dense() if single else unfold(layer)
    return plain


def _back(
    model: nn.Module,
    include: Sequence[str],
    convert: Callable[[Any], nn.Module],
    reason: str,
    alone: str,
    example: Any = None,
) -> TensorizeReport:
    own = networks(model)
    layers = find(
        model,
        NETWORKS,
        "" if own else "tensor layer",
        lambda layer: ALONE.format(alone.format(layer.dense_name)),
    )
    sites = in_order(model, [*layers, *own])
    config = TensorizeConfig(include=include)
    chosen = _chosen(sites, config, reason)
    for site in chosen:
        if site.whole and any(getattr(site.module, name) for name in STATE_HOOKS):
            raise ValueError(f"{site.names[0]} has hooks on its state_dict, which would be lost; remove them first")
    read = {} if example is None else reads(model, [site.module for site in chosen if site.whole], example)
    with torch.no_grad():
        for site in chosen:
            site.new = convert(site.module) if site.whole else site.plain
        sequences = [site for site in chosen if site.whole and not isinstance(site.new, site.module.dense_type)]
        unseen = Read(kind=bool(sequences) and example is None and mentions(model, "weight"))
        for site in sequences:
            _make_readable(site, read.get(site.module, unseen))
        for site in chosen:
            keep_bias(site)
    tie_again(chosen)
    for site in chosen:
        site.new = replaced_type(site.module, site.new) if site.whole else site.new
    # Before the first replacement, find all that leaves the model, and what would keep it.
    stays = {id(p) for site in chosen for p in site.new.parameters()}
    note_holders(model, chosen, lambda site: [p for p in site.parameters if id(p) not in stays])
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


def _chosen(sites: list[LayerSite], config: TensorizeConfig, reason: str) -> list[LayerSite]:
    """Return the sites to replace, and note why, or why not."""
    check_patterns(config, [site.names for site in sites])
    for site in sites:
        site.reason = "" if any(matches(pattern, site.names) for pattern in config.include) else "not in include"
    join_again(sites)
    keep_together(sites)
    chosen = [site for site in sites if not site.reason]
    if not chosen and sites:
        raise ValueError(f"include covers no layer that can be replaced ({left(sites)})")
    for site in chosen:
        site.reason = reason if site.whole else "plain again"  # a weight has no layers to unfold to
    return chosen


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
