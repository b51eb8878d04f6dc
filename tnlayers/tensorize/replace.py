"""Replacement of a model's old layers by new ones, and its report."""

import warnings

from torch import nn

from tnlayers.backend.optimizers import holders
from tnlayers.interop.huggingface import follow
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.tied import TiedLinear
from tnlayers.tensorize.accounts import entries, held_once, other_rows
from tnlayers.tensorize.flops import dense_flops, fewest_flops
from tnlayers.tensorize.report import LayerReport, TensorizeReport
from tnlayers.tensorize.sites import LayerSite, Swap
from tnlayers.tensorize.swappable import NETWORKS


def keep_bias(site: LayerSite) -> None:
    """Give the new layer, if there is one, the old layer's bias parameters."""
    if site.new is None or not site.whole:
        return
    last = site.new[-1] if isinstance(site.new, nn.Sequential) else site.new
    # Before a final shuffle, the bias is a new one with permuted entries; a parametrized bias is computed.
    for name in [*last._parameters]:
        if name.startswith("bias") and name in site.module._parameters:
            setattr(last, name, site.module._parameters[name])


def put_in_place(swap: Swap) -> TensorizeReport:
    """Put every new layer in its places, unless it is a dry run, and return the report."""
    model, sites, dry_run = swap.model, swap.sites, swap.dry_run
    swapped = [site for site in sites if site.new is not None]
    before = entries(model.parameters())
    held = held_once(site.parameters for site in sites)
    # Of layers that share a weight, the first one's row has its entries.
    counts = (held_once(weights) for weights in zip(*(site.weights() for site in sites), strict=True))
    rows = zip(sites, held, zip(*counts, strict=True), strict=True)
    layers = tuple(_row(*each) for each in rows)
    others = other_rows(model, sites, swap.config.parametrize)
    stays = {id(p) for site in swapped for p in site.new.parameters()}
    gone = [p for site in swapped for p in site.parameters if id(p) not in stays]
    after = before - entries(gone) + entries(p for site in swapped for p in site.coming)
    # Before any replacement, since a warning filter may raise.
    for optimizer in () if dry_run or not gone else holders(gone):
        warnings.warn(
            f"{type(optimizer).__name__} was made before the swap and holds parameters that left the model, so it "
            "would not train what came instead; call tnlayers.remap_optimizer_(optimizer, report)",
            stacklevel=3,
        )
    old_order = [*map(id, model.parameters())]
    replaced = [] if dry_run else [each for site in swapped for each in site.put()]
    order = old_order, [*map(id, model.parameters())]
    if not dry_run:
        after = entries(model.parameters())
        follow(model)
    return TensorizeReport(layers, (before, after), dry_run, others, replaced, order)


def _row(site: LayerSite, held: int, params: tuple[int, int]) -> LayerReport:
    new, tensor = site.new, site.new if isinstance(site.new, NETWORKS) else None
    flops = None
    if site.shapes:
        device = next(site.module.parameters()).device.type
        before, after = (
            fewest_flops(layer, site.shapes, device)
            if isinstance(layer, (TensorLayer, TiedLinear))
            else dense_flops(site.geometry, site.shapes)
            for layer in (site.module, site.module if new is None else new)
        )
        flops = before, after
    return LayerReport(
        name=site.names[0],
        aliases=site.names[1:],
        kind=site.text,
        swapped=new is not None,
        reason=site.reason,
        format=None if tensor is None else (site.lead or site).new.format.name,
        rank=None if tensor is None else site.ranks(),
        params=params,
        held=held,
        flops=flops,
        error=site.error,
    )
