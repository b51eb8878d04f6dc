"""Layers of a model: their places and names, and whether they can be swapped or why not."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tnlayers.backend.observe import InputNumbers, observe
from tnlayers.backend.views import exchange
from tnlayers.fitting.input_moments import channels, products
from tnlayers.init.like import resolved
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.table import TensorTable
from tnlayers.spec.geometry import Geometry
from tnlayers.tensorize.config import TensorizeConfig
from tnlayers.tensorize.held_outside import HOOKS, is_recurrent, own_attributes
from tnlayers.tensorize.report import Replaced, replaced
from tnlayers.tensorize.swappable import BASES, DEFAULT_GROUPS, Fold, Swappable, how_to_swap, lost, tensor_class

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
    fold: Fold | None = None
    adapter: str = ""
    lead: "LayerSite | None" = None
    """The site of the embedding whose weight this one has too; that site has itself."""

    @property
    def follows(self) -> bool:
        """Whether another site decides about the weight."""
        return self.lead is not None and self.lead is not self

    whole: ClassVar[bool] = True
    """Whether the module itself is replaced."""

    @property
    def called(self) -> bool:
        """Whether the module multiplies its inputs by this weight, so that they count in a fit and in FLOPs."""
        return self.whole and self.how.group in DEFAULT_GROUPS

    @property
    def manner(self) -> str:
        """What a swap does beside the exchange, for the report."""
        names = lost(self.module) if self.whole else ()
        without = f", without {type(self.module).__name__}'s own {', '.join(names)}" if names else ""
        return (", its parametrization folded in" if self.fold else "") + without

    @property
    def how(self) -> Swappable:
        """The entry of the module's type among those that can be swapped."""
        return how_to_swap(self.module)

    @property
    def kind(self) -> type[nn.Module]:
        """The torch layer class of the module."""
        return self.how.kind

    @property
    def geometry(self) -> Geometry:
        """The module's checked arguments."""
        if isinstance(self.module, TensorLayer):
            return self.module.geometry
        if self.how.group not in DEFAULT_GROUPS:
            return self.make(1).geometry
        plain = self.how.plain(self.module)
        own = BASES[self.kind]._arguments(plain)
        del own["bias"]
        if self.kind is nn.Linear:
            return Geometry(own["in_features"], own["out_features"], ())
        return Geometry(**own, transposed=plain.transposed)

    @property
    def weight(self) -> nn.Parameter:
        """The weight, as the plain layer has it."""
        found: nn.Parameter = self.plain.weight
        return found

    @property
    def kernel(self) -> Tensor:
        """The kernel in the order of the network's axes: ``(out, in, *taps)``."""
        weight = self.weight.detach()
        if self.whole and issubclass(BASES[self.kind], TensorTable):  # rows are inputs, and padded rows are zero
            return nn.functional.pad(weight, (0, 0, 0, self.geometry.in_channels - len(weight))).T
        return exchange(weight, self.geometry.groups) if self.geometry.transposed else weight

    @property
    def plain(self) -> Any:
        """A layer of torch's own class with the same function and parameters; the module may be of another."""
        twin = self.how.plain(self.module)
        if self.fold:
            twin.weight = self._folded
        return twin.train(self.module.training)

    @cached_property
    def _folded(self) -> Any:
        return None if self.fold is None else self.fold.value(self.module)

    def resolve(self) -> None:
        """Replace an ``init`` of 'like' in the settings by that of the weight, or of the lead's.

        Raises:
            ValueError: the weight has no size.
        """
        self.settings = resolved(self.settings, (self.lead or self).plain, "this layer")

    def make(self, rank: Any) -> TensorLayer:
        """Make the tensor layer of a rank, without values."""
        cls, arguments = self.layer
        own = cls._arguments(self.plain)
        layer = cls(**own, **arguments | {"rank": rank}, device="meta", dtype=self.weight.dtype)
        return layer.train(self.module.training)  # type: ignore[no-any-return]

    measured: ClassVar[bool] = True
    """Whether an energy or a budget can choose its rank."""

    def ranks(self) -> dict[str, int]:
        """Return the sizes of the new layer's bonds."""
        return dict((self.lead or self).new.rank)

    def parts(self, draft: Any) -> Sequence[TensorLayer]:
        """Return the layers that hold the weights of a draft: the draft itself."""
        return [draft]

    def drawn(self) -> Any:
        """Make the new layer with drawn cores."""
        cls, arguments = self.layer
        return cls.from_dense(self.plain, decompose=False, **arguments)

    def fitted(self, plain: Any, moments: Tensor | None) -> Any:
        """Make the new layer with cores fitted to a plain layer."""
        cls, arguments = self.layer
        return cls.from_dense(plain, moments=moments, **arguments)

    def unfitted(self) -> Any:
        """Make the new layer without values in its cores. This may warn."""
        cls, arguments = self.layer
        return cls._unfitted(self.plain, **arguments)

    def fit(self) -> None:
        """Fit the cores of the new layer."""
        self.new.set_weight_(self.weight.detach())

    def distance(self) -> float:
        """Return the relative error of the new layer's weight."""
        fine = torch.float32 if self.weight.device.type == "mps" else torch.float64
        old, new = self.weight.detach().to(fine), self.new.weight.detach().to(fine)
        return float((new - old).norm() / old.norm().clamp_min(torch.finfo(fine).tiny))

    @property
    def layer(self) -> tuple[type[Any], dict[str, Any]]:
        """Class of the tensor layer, and its keyword arguments beside torch's."""
        own = {name: value for name, value in self.settings.items() if name not in ("format", "options", "decompose")}
        return self._class(self.settings["format"]), own | self.settings["options"]

    def _class(self, format: str) -> type[Any]:
        return tensor_class(format, self.kind)

    @property
    def leaving(self) -> list[Tensor]:
        """Parameters that a swap takes out of the model: those of the weight."""
        if self.fold:
            own = dict(self.module.named_parameters())
            return [own[name] for name in self.fold.parameters]
        return [weight] if (weight := self.module._parameters.get("weight")) is not None else []

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that the report counts here."""
        return [*self.module.parameters()]

    @property
    def coming(self) -> list[Tensor]:
        """Parameters that a swap brings into the model."""
        own = {*map(id, self.parameters)}
        return [each for each in self.new.parameters() if id(each) not in own]

    @property
    def text(self) -> str:
        """Text of the module for the report."""
        return repr(self.module) if len(repr(self.module)) < 60 else type(self.module).__name__

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters of the weight before and after; none, if they are counted with another site."""
        if self.follows:
            return [], []
        return without_biases(self.module), without_biases(self.module if self.new is None else self.new)

    def put(self) -> list[Replaced]:
        """Put the new layer in the old one's places, with its hooks and attributes."""
        old, new = self.module, self.new
        for name in HOOKS - STATE_HOOKS:
            hooks = getattr(old, name)
            setattr(new, name, self.fold.without(hooks) if self.fold else hooks)
        for name in vars(old).keys() - own_attributes(is_recurrent(old)) - {"weight"}:
            setattr(new, name, vars(old)[name])
        for parent, key in self.places:
            parent._modules[key] = new
        return [] if self.follows else replaced(dict(old.named_parameters()), dict(new.named_parameters()))


def without_biases(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters without biases."""
    return [p for name, p in module.named_parameters() if "bias" not in name.rpartition(".")[2]]


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


def watch(
    model: nn.Module, sites: list[LayerSite], examples: Iterable[Any], note: Callable[[LayerSite, Tensor], None]
) -> list[LayerSite]:
    """Run the model, and call ``note`` with every input of every layer.

    Returns:
        list[LayerSite]: in the order of their first calls; those without a call last. Their ``inputs`` are noted.
    """
    watched = {site.module: site for site in sites if site.called}
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
