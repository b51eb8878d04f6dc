"""Search for the layers of a model, their names and places, and what else holds them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tnlayers.backend.input_checks import check_module
from tnlayers.backend.wrappers import refuse_wrapped
from tnlayers.layers.tied import TiedLinear
from tnlayers.tensorize.held_outside import held, is_recurrent, ties
from tnlayers.tensorize.recurrent_sites import RecurrentSite
from tnlayers.tensorize.sites import LayerSite
from tnlayers.tensorize.swappable import own_modules

ALONE = "which cannot be replaced in place; write `layer = {}`"


def find(
    model: nn.Module,
    types: tuple[type[nn.Module], ...],
    what: str,
    alone: Callable[[Any], str],
    wanted: Callable[[nn.Module], bool] = lambda _: True,
) -> list[LayerSite]:
    """Find the model's layers of some types, each once, with all their names and places.

    ``alone`` returns advice for a model that is itself such a layer. Without ``what``, there may be no layer.
    """
    found = {module: site for module, site in layers(model, types, what).items() if wanted(module)}
    root = model._modules.get("_orig_mod", model)  # if it is compiled
    if root in found:
        raise ValueError(f"model is itself a {type(root).__name__}, {alone(root)}")
    refuse_wrapped(model, "swap the layers first, then wrap")
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None and child in found:
                found[child].places.append((parent, key))
    return list(found.values())


def layers(model: nn.Module, types: tuple[type[nn.Module], ...], what: str) -> dict[nn.Module, LayerSite]:
    """Find the model's layers of some types, each once, with all their names; the model may be one itself."""
    check_module("model", model)
    found: dict[nn.Module, LayerSite] = {}
    paths = [*model.named_modules(remove_duplicate=False)]
    outputs = {path for path, module in paths if isinstance(module, TiedLinear)}
    # An embedding is named by its own place rather than by that in an output tied to it.
    paths.sort(key=lambda each: each[0].rpartition(".")[0] in outputs)
    for path, module in paths:
        if isinstance(module, types) and not (module in found and path.rpartition(".")[0] in outputs):
            kind = RecurrentSite if is_recurrent(module) else LayerSite
            site = found.setdefault(module, kind(module, (), []))
            site.names += (plain_name(path, model),)
    if not found and what:
        raise ValueError(f"model has no {what} ({type(model).__name__})")
    # Modules inside a layer, such as a parametrization, belong to it.
    inside = {inner for module in found for inner in own_modules(module) if inner is not module}
    return {module: site for module, site in found.items() if module not in inside}


def in_order(model: nn.Module, sites: Iterable[LayerSite]) -> list[LayerSite]:
    """Sort sites in the order of the model's modules."""
    order = {module: k for k, module in enumerate(model.modules())}
    return sorted(sites, key=lambda site: order[site.module])


def note_holders(
    model: nn.Module, sites: Sequence[LayerSite], leaving: Callable[[LayerSite], Sequence[Tensor]]
) -> None:
    """Note what else holds a layer, or parameters that leave the model with it."""
    for whole in (True, False):
        chosen = [site for site in sites if site.whole == whole]
        gone: dict[nn.Module, list[Tensor]] = {}
        leads = {site.module: site.lead.module for site in chosen if site.lead}
        for site in chosen:
            gone.setdefault(site.module, []).extend(leaving(site))
        holders, tied = (held(model, gone, not whole), ties(model, gone, leads)) if chosen else ({}, {})
        for site in chosen:
            site.held, site.tied = holders.get(site.module, ""), tied.get(site.module, "")


def left(sites: Sequence[LayerSite]) -> str:
    """Return why the first sites stay, for an error."""
    some = "; ".join(f"{site.names[0]}: {site.reason}" for site in sites[:3])
    return f"{some}{', ...' if len(sites) > 3 else ''}"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of ``torch.compile`` and data parallelism."""
    check_module("model", model)
    inner: Any = model._modules.get("_orig_mod", model)
    return unwrapped(inner.module) if isinstance(inner, nn.DataParallel | DistributedDataParallel) else inner


def plain_name(path: str, model: nn.Module) -> str:
    """Return a name without the prefixes of ``torch.compile`` and ``DataParallel``."""
    parts = [part for part in path.split(".") if part != "_orig_mod"]
    if isinstance(model._modules.get("_orig_mod", model), nn.DataParallel) and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)
