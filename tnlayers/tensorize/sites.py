"""Layers of a model: their places and names, and whether they can be swapped or why not."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from tnlayers.backend.input_checks import check_module
from tnlayers.backend.name_patterns import matches
from tnlayers.backend.observe import InputNumbers, observe
from tnlayers.backend.views import exchange
from tnlayers.fitting.input_moments import channels, products
from tnlayers.init.like import resolved
from tnlayers.layers.base import DTYPES, TensorLayer
from tnlayers.layers.registry import KINDS, layer_class
from tnlayers.spec.geometry import Geometry
from tnlayers.tensorize.config import TensorizeConfig
from tnlayers.tensorize.held_outside import HOOKS, held, ties

_TAKEN = ("cores", "format", "geometry", "init", "network", "rank", "variance", "_executor")
STATE_HOOKS = frozenset(name for name in HOOKS if "state_dict" in name)


@dataclass
class LayerSite:
    """A layer of the model, its places, and the decisions of a swap about it."""

    module: Any
    names: tuple[str, ...]
    places: list[tuple[nn.Module, str]]
    held: str = ""
    tied: str = ""
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    new: Any = None
    error: float | None = None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    inputs: list[tuple[int, int]] = field(default_factory=list)  # numbers of the run and of the input, for each call
    moments: Tensor | None = None

    @property
    def kind(self) -> type[nn.Module]:
        """The torch layer class of the module."""
        return next(kind for kind in KINDS if isinstance(self.module, kind))

    @property
    def geometry(self) -> Geometry:
        """The module's checked arguments."""
        if isinstance(self.module, TensorLayer):
            return self.module.geometry
        own = KINDS[self.kind]._arguments(self.module)
        del own["bias"]
        if self.kind is nn.Linear:
            return Geometry(own["in_features"], own["out_features"], ())
        return Geometry(**own, transposed=self.module.transposed)

    @property
    def kernel(self) -> Tensor:
        """The kernel in the order of the network's axes: ``(out, in, *taps)``."""
        weight: Tensor = self.module.weight.detach()
        return exchange(weight, self.geometry.groups) if self.geometry.transposed else weight

    @property
    def plain(self) -> nn.Module:
        """A layer of torch's own class with the same parameters; the module may be of a subclass."""
        twin: Any = self.kind(**KINDS[self.kind]._arguments(self.module), device="meta")
        twin.weight, twin.bias = self.module.weight, self.module.bias
        return twin.train(self.module.training)  # type: ignore[no-any-return]

    def make(self, rank: Any) -> TensorLayer:
        """Make the tensor layer of a rank, without values."""
        cls, arguments = self.layer
        own = KINDS[self.kind]._arguments(self.module)
        layer = cls(**own, **arguments | {"rank": rank}, device="meta", dtype=self.module.weight.dtype)
        return layer.train(self.module.training)

    @property
    def layer(self) -> tuple[type[TensorLayer], dict[str, Any]]:
        """Class of the tensor layer, and its keyword arguments beside torch's."""
        own = {name: value for name, value in self.settings.items() if name not in ("format", "options", "decompose")}
        return layer_class(self.settings["format"], self.kind), own | self.settings["options"]


@dataclass
class Swap:
    """State of a swap. First sites are found, then ranks are chosen, layers made, and put in place.

    Attributes:
        model: model whose layers are swapped.
        config: configuration of the swap.
        batches: calibration inputs.
        dry_run: whether the model stays unchanged.
        progress: whether a bar is shown; None: on a terminal, for long work.
        workers: maximum number of fits side by side.
        sites: every layer of a kind that can be swapped, in the order of the model.
        chosen: sites to swap, unless their rank or layer is refused; in the order of their calls, if known.
    """

    model: nn.Module
    config: TensorizeConfig
    batches: list[Any] = field(default_factory=list)
    dry_run: bool = False
    progress: bool | None = None
    workers: int = 1
    sites: list[LayerSite] = field(default_factory=list)
    chosen: list[LayerSite] = field(default_factory=list)


def find(
    model: nn.Module, types: tuple[type[nn.Module], ...], what: str, alone: Callable[[Any], str]
) -> list[LayerSite]:
    """Find the model's layers of some types, each once, with all their names and places.

    ``alone`` returns advice for a model that is itself such a layer.
    """
    found = layers(model, types, what)
    root = model._modules.get("_orig_mod", model)  # if it is compiled
    if isinstance(root, types):
        raise ValueError(f"model is itself a {type(root).__name__}, {alone(root)}")
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) or type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"model is wrapped in {type(module).__name__}, which holds on to the parameters it was made with; "
                "swap the layers first, then wrap"
            )
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None and child in found:
                found[child].places.append((parent, key))
    return list(found.values())


def layers(model: nn.Module, types: tuple[type[nn.Module], ...], what: str) -> dict[nn.Module, LayerSite]:
    """Find the model's layers of some types, each once, with all their names; the model may be one itself."""
    check_module("model", model)
    found: dict[nn.Module, LayerSite] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, types):
            site = found.setdefault(module, LayerSite(module, (), []))
            site.names += (_plain_name(path, model),)
    if not found:
        raise ValueError(f"model has no {what} ({type(model).__name__})")
    # Modules inside a layer, such as a parametrization, belong to it.
    inside = {inner for module in found for inner in module.modules() if inner is not module}
    return {module: site for module, site in found.items() if module not in inside}


def note_holders(model: nn.Module, leaving: Mapping[nn.Module, Sequence[Tensor]], sites: Sequence[LayerSite]) -> None:
    """Note what else holds a layer, or parameters that leave the model with it."""
    holders, tied = held(model, leaving), ties(model, leaving)
    for site in sites:
        site.held, site.tied = holders.get(site.module, ""), tied.get(site.module, "")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of ``torch.compile`` and data parallelism."""
    check_module("model", model)
    inner: Any = model._modules.get("_orig_mod", model)
    return unwrapped(inner.module) if isinstance(inner, nn.DataParallel | DistributedDataParallel) else inner


def _plain_name(path: str, model: nn.Module) -> str:
    """Return a name without the prefixes of ``torch.compile`` and ``DataParallel``."""
    parts = [part for part in path.split(".") if part != "_orig_mod"]
    if isinstance(model._modules.get("_orig_mod", model), nn.DataParallel) and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def left_alone(site: LayerSite, config: TensorizeConfig) -> str:
    """Return why a layer is not swapped, or an empty string. Set its settings."""
    module = site.module
    if isinstance(module, TensorLayer):
        return "a tensor layer already"
    for pattern in config.exclude:
        if matches(pattern, site.names):
            return f"excluded by {pattern!r}"
    if not any(matches(pattern, site.names) for pattern in config.include):
        return "not in include"
    settings = config.of(site.names)
    if settings is None:
        return "left alone by an override"
    site.settings = settings
    refusal = next(_refusals(site, config), None) or _without_size(site)
    return f"refused: {refusal}" if refusal else _policy(module, config)


def _refusals(site: LayerSite, config: TensorizeConfig) -> Iterator[str]:
    """Yield reasons against a swap, such as losses. Later ones are not evaluated after the first."""
    module, kind = site.module, site.kind
    if is_parametrized(module):
        yield f"parametrized ({', '.join(module.parametrizations)})"
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.UninitializedParameter):
        yield "it has no shape before the first forward (lazy)"
    if type(module) is not kind and not config.subclasses:
        yield f"{type(module).__name__} is a subclass of {kind.__name__} (subclasses=True swaps it)"
    if weight is None:
        yield "its weight is computed (pruning, weight_norm or spectral_norm)"
        return
    if more := [*(module._parameters.keys() - {"weight", "bias"}), *module._buffers, *module._modules]:
        yield f"it also holds {', '.join(more)}"
    if "forward" in vars(module):
        yield "its forward was replaced"
    if getattr(module, "_compiled_call_impl", None) is not None or any(key == "_orig_mod" for _, key in site.places):
        yield "it is compiled by itself; compile the model instead"
    own = vars(site.plain).keys()
    if taken := [name for name in vars(module).keys() - own if hasattr(TensorLayer, name) or name in _TAKEN]:
        yield f"its attributes {', '.join(taken)} are a tensor layer's own"
    if any(getattr(module, name) for name in STATE_HOOKS):
        yield "it has hooks on its state_dict"
    yield from _weight_refusals(weight)
    if site.held:
        yield site.held
    if site.tied:
        yield f"another module has the same weight: {site.tied}"


def _without_size(site: LayerSite) -> str:
    """Replace an ``init`` of 'like' by that of the weight; return why the weight has none, or an empty string."""
    try:
        site.settings = resolved(site.settings, site.module.weight, "this layer")
    except ValueError as error:
        return str(error)
    return ""


def _weight_refusals(weight: Any) -> Iterator[str]:
    if hasattr(weight, "device_mesh"):
        yield "its weight is sharded"
    if weight.dtype not in DTYPES:
        yield f"its weight is of {weight.dtype}"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        yield "its weight has hooks"


def _policy(module: Any, config: TensorizeConfig) -> str:
    """Return why a layer should not be swapped, or an empty string."""
    if getattr(module, "groups", 1) > 1 and module.groups == module.in_channels and not config.depthwise:
        return "depthwise (depthwise=True swaps it)"
    if module.weight.numel() < config.min_params:
        return f"{module.weight.numel():,} parameters, below min_params"
    return ""


def watch(
    model: nn.Module, sites: list[LayerSite], examples: Iterable[Any], note: Callable[[LayerSite, Tensor], None]
) -> list[LayerSite]:
    """Run the model, and call ``note`` with every input of every layer.

    Returns:
        list[LayerSite]: in the order of their first calls; those without a call last. Their ``inputs`` are noted.
    """
    watched = {site.module: site for site in sites}
    order: dict[nn.Module, int] = {}
    run, number = -1, InputNumbers()

    def see(layer: nn.Module, x: Tensor) -> None:
        order.setdefault(layer, len(order))
        watched[layer].inputs.append((run, number(x)))
        note(watched[layer], x)

    for run, example in enumerate(examples):  # noqa: B007  (see notes it)
        observe(model, watched, [example], see)
    sites = sorted(sites, key=lambda site: order.get(site.module, len(order)))
    for site in sites:  # the error names the first layer called
        if site.moments is not None:
            check_finite(site, site.moments)
    return sites


def note_shape(site: LayerSite, x: Tensor) -> None:
    """Note the shape of an input."""
    site.shapes.append(tuple(x.shape))


def note_moments(site: LayerSite, x: Tensor) -> None:
    """Add to the second moments over channels, if the rank is to be chosen by them."""
    if site.settings["rank"] is None and site.settings["decompose"]:
        rows = channels(x, site.geometry)
        new = products(rows, rows).sum(0)
        site.moments = new if site.moments is None else site.moments + new


def check_finite(site: LayerSite, *moments: Tensor) -> None:
    """Raise if second moments are not finite."""
    if not all(bool(torch.isfinite(each).all()) for each in moments):
        raise ValueError(
            f"{site.names[0]}: its inputs on the calibration batches hold NaN or infinity, or their squares do; "
            "fits need finite ones"
        )
