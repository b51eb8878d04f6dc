"""Whether a layer or weight of a model can be swapped, or why not."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tnlayers.backend.name_patterns import matches
from tnlayers.layers.base import DTYPES
from tnlayers.layers.networks import network_of
from tnlayers.tensorize.config import TensorizeConfig
from tnlayers.tensorize.sites import STATE_HOOKS, LayerSite
from tnlayers.tensorize.swappable import BASES, NETWORKS, Fold, fold_of, subclass_of
from tnlayers.tensorize.weight_sites import WeightSite

_TAKEN = ("cores", "format", "geometry", "init", "network", "rank", "variance", "_executor")
_FOLDS = "parametrized='fold' swaps it"


def left_alone(site: LayerSite, config: TensorizeConfig) -> str:
    """Return why a layer is not swapped, or an empty string. Set its settings."""
    return next(_reasons(site, config), "")


def _reasons(site: LayerSite, config: TensorizeConfig) -> Iterator[str]:
    module, settings = site.module, config.of(site.names)
    site.settings = settings or {}
    if isinstance(module, NETWORKS):
        yield "a tensor layer already"
    if isinstance(site, WeightSite) and network_of(module, site.parameter):
        yield "a tensor network already"
    if site.adapter:
        yield f"part of PEFT's {site.adapter}, which is left alone (merge or unload the adapters to swap it)"
    yield from (f"excluded by {pattern!r}" for pattern in config.exclude if matches(pattern, site.names))
    if not any(matches(pattern, site.names) for pattern in config.include):
        yield "not in include"
    if settings is None:
        yield "left alone by an override"
    if isinstance(site, WeightSite):
        yield from (f"refused: {refusal}" for refusal in _weight_site_refusals(site))
    else:
        if (group := site.how.group) not in config.kinds:
            yield f"not in kinds (kinds={(*config.kinds, group)} swaps it)"
        yield from (f"refused: {refusal}" for refusal in _refusals(site, config))
    yield from (f"refused: {refusal}" for refusal in _without_size(site))
    yield from _policy(site, config)


def _refusals(site: LayerSite, config: TensorizeConfig) -> Iterator[str]:
    """Yield reasons against a swap, such as losses. Later ones are not evaluated after the first."""
    module = site.module
    advice = f"; {_FOLDS}" if not site.fold and fold_of(module) else ""
    if is_parametrized(module) and not site.fold:
        yield f"parametrized ({', '.join(module.parametrizations)}{advice})"
    if any(isinstance(each, nn.UninitializedParameter) for each in module._parameters.values()):
        yield "it has no shape before the first forward (lazy)"
    if (own := subclass_of(module)) and not config.subclasses:
        yield own
    known = site.how.plain(module)._parameters.keys()
    if not site.fold and any(module._parameters.get(name) is None for name in known if name.startswith("weight")):
        yield f"its weight is computed (pruning, weight_norm or spectral_norm{advice})"
        return
    owned = site.fold.owned if site.fold else frozenset()
    if more := [*(module._parameters.keys() - known - owned), *module._buffers, *(module._modules.keys() - owned)]:
        yield f"it also holds {', '.join(more)}"
    if "forward" in vars(module):
        yield "its forward was replaced"
    if getattr(module, "_compiled_call_impl", None) is not None or any(key == "_orig_mod" for _, key in site.places):
        yield "it is compiled by itself; compile the model instead"
    names = vars(module).keys() - vars(site.plain).keys() - ({"weight"} if site.fold else set())
    if taken := [name for name in names if hasattr(BASES[site.kind], name) or name in _TAKEN]:
        yield f"its attributes {', '.join(taken)} are a tensor layer's own"
    if any(_others(getattr(module, name), site.fold) for name in STATE_HOOKS):
        yield "it has hooks on its state_dict"
    for parameter in site.leaving:
        yield from _weight_refusals(parameter)
    yield from _ties(site)


def _others(hooks: Any, fold: Fold | None) -> Any:
    return fold.without(hooks) if fold else hooks


def weight_refusal(site: WeightSite) -> str:
    """Return the reason against a network in place of a parameter, or an empty string."""
    return next(_weight_site_refusals(site), "")


def _weight_site_refusals(site: WeightSite) -> Iterator[str]:
    weight = site.module._parameters.get(site.parameter)
    if is_parametrized(site.module, site.parameter):
        yield "parametrized already"
    if isinstance(weight, nn.UninitializedParameter):
        yield "it has no shape before the first forward (lazy)"
    yield from _weight_refusals(weight)
    if more := [name for name, each in site.module._parameters.items() if each is weight and name != site.parameter]:
        yield f"it is the module's {', '.join(more)} too"
    yield from _ties(site)


def _ties(site: LayerSite) -> Iterator[str]:
    if site.held:
        yield site.held
    if site.tied:
        yield f"another module has the same weight: {site.tied}"


def _without_size(site: LayerSite) -> Iterator[str]:
    """Replace an ``init`` of 'like' by that of the weight, or yield why the weight has none."""
    try:
        site.resolve()
    except ValueError as error:
        yield str(error)


def _weight_refusals(weight: Any) -> Iterator[str]:
    if hasattr(weight, "device_mesh"):
        yield "its weight is sharded"
    if weight.dtype not in DTYPES:
        yield f"its weight is of {weight.dtype}"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        yield "its weight has hooks"


def _policy(site: LayerSite, config: TensorizeConfig) -> Iterator[str]:
    """Yield why a layer should not be swapped."""
    plain = site.plain
    if getattr(plain, "groups", 1) > 1 and plain.groups == plain.in_channels and not config.depthwise:
        yield "depthwise (depthwise=True swaps it)"
    if site.weight.numel() < config.min_params:
        yield f"{site.weight.numel():,} parameters, below min_params"
