"""Replacement of a model's old layers by new ones, and its report."""

import warnings
import weakref

from torch import nn

from tnlayers.backend.optimizers import holders
from tnlayers.interop.huggingface import follow
from tnlayers.layers.base import TensorLayer
from tnlayers.tensorize.flops import dense_flops, fewest_flops
from tnlayers.tensorize.held_outside import HOOKS, own_attributes
from tnlayers.tensorize.report import LayerReport, Replaced, TensorizeReport
from tnlayers.tensorize.sites import STATE_HOOKS, LayerSite, Swap


def keep_bias(site: LayerSite) -> None:
    """Give the new layer, if there is one, the old layer's bias parameter."""
    if site.new is None:
        return
    last = site.new[-1] if isinstance(site.new, nn.Sequential) else site.new
    # Before a final shuffle, the bias is a new one with permuted entries; a parametrized bias is computed.
    if "bias" in last._parameters and "bias" in site.module._parameters:
        last.bias = site.module.bias


def put_in_place(swap: Swap) -> TensorizeReport:
    """Put every new layer in its places, unless it is a dry run, and return the report."""
    model, sites, dry_run = swap.model, swap.sites, swap.dry_run
    swapped = [site for site in sites if site.new is not None]
    before = _params(model)
    layers = tuple(map(_row, sites))
    after = before + sum(_params(site.new) - _params(site.module) for site in swapped)
    stays = {id(p) for site in swapped for p in site.new.parameters()}
    gone = [p for site in swapped for p in site.module.parameters() if id(p) not in stays]
    # Before any replacement, since a warning filter may raise.
    for optimizer in () if dry_run or not gone else holders(gone):
        warnings.warn(
            f"{type(optimizer).__name__} was made before the swap and holds parameters that left the model, so it "
            "would not train what came instead; call tnlayers.remap_optimizer_(optimizer, report)",
            stacklevel=3,
        )
    old_order = [*map(id, model.parameters())]
    replaced = [] if dry_run else [each for site in swapped for each in _put(site)]
    if not dry_run:
        follow(model)
    return TensorizeReport(layers, (before, after), dry_run, replaced, (old_order, [*map(id, model.parameters())]))


def _row(site: LayerSite) -> LayerReport:
    new, tensor = site.new, site.new if isinstance(site.new, TensorLayer) else None
    flops = None
    if site.shapes:
        dense = dense_flops(site.geometry, site.shapes)
        flops = dense, dense if tensor is None else fewest_flops(tensor, site.shapes, site.module.weight.device.type)
    return LayerReport(
        name=site.names[0],
        aliases=site.names[1:],
        kind=repr(site.module) if len(repr(site.module)) < 60 else type(site.module).__name__,
        swapped=new is not None,
        reason=site.reason,
        format=None if tensor is None else tensor.format.name,
        rank=None if tensor is None else dict(tensor.rank),
        params=(_params(site.module, False), _params(site.module if new is None else new, False)),
        flops=flops,
        error=site.error,
    )


def _params(module: nn.Module, bias: bool = True) -> int:
    sized = ((name, p) for name, p in module.named_parameters() if not isinstance(p, nn.UninitializedParameter))
    return sum(p.numel() for name, p in sized if bias or not name.endswith("bias"))


def _put(site: LayerSite) -> list[Replaced]:
    """Put a new layer in the old one's places, with its hooks and attributes."""
    old, new = site.module, site.new
    for name in HOOKS - STATE_HOOKS:
        setattr(new, name, getattr(old, name))
    for name in vars(old).keys() - own_attributes():
        setattr(new, name, vars(old)[name])
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    stays = {*map(id, before.values())} & {*map(id, after.values())}
    leaving, coming = ({k: p for k, p in named.items() if id(p) not in stays} for named in (before, after))
    for parent, key in site.places:
        parent._modules[key] = new
    # A bias replaces a bias. All other new parameters replace the first other one that leaves.
    biases = {name: coming.pop(name) for name in [*coming] if "bias" in leaving and name.endswith("bias")}
    replaced = []
    for name, parameter in leaving.items():
        new, coming = (biases, coming) if name == "bias" else (coming, {})
        replaced.append(Replaced(weakref.ref(parameter), name, new))
    return replaced
