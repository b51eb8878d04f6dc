"""What a swap can replace: types of modules, and how each is seen as a plain torch layer.

A type of torch is swappable if ``BASES`` has a layer for it. ``_FOREIGN`` has types of other packages.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from tnlayers.layers.base import TensorLayer
from tnlayers.layers.description import own_members
from tnlayers.layers.networks import network_of
from tnlayers.layers.recurrent import RECURRENT, recurrent_class
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.registry import EVERY_KIND, layer_class
from tnlayers.layers.tied import TiedLinear

GROUPS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    "linear": (nn.Linear,),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "recurrent": (nn.LSTM, nn.GRU, nn.RNN),
}
"""torch's layers by the names in ``TensorizeConfig.kinds``. Those in ``BASES`` can be swapped."""
DEFAULT_GROUPS = "conv", "linear"
"""Layers that multiply their inputs by a kernel. The others are swapped on request only."""
NETWORKS: Any = TensorLayer, TensorRecurrent, TiedLinear
"""Types of layers whose weights are networks."""
BASES: Mapping[type[nn.Module], type[Any]] = {**EVERY_KIND, **RECURRENT}
"""Base class of the tensor layers that replace a torch layer. A new kind of layer is an entry here."""
_ADAPTER = "peft.tuners.tuners_utils", "BaseTunerLayer"


class Swappable(NamedTuple):
    """A type of modules that can be swapped.

    Attributes:
        cls: the type; of a subclass, only on request.
        kind: the torch layer with the same function.
        plain: returns a layer of that kind with a module's arguments and parameters.
    """

    cls: type[nn.Module]
    kind: type[nn.Module]
    plain: Callable[[Any], Any]

    @property
    def group(self) -> str:
        """Name in ``GROUPS``."""
        return next(name for name, kinds in GROUPS.items() if self.kind in kinds)


def swappable() -> tuple[Swappable, ...]:
    """Return every type that can be swapped now: torch's, and those of packages that are imported.

    Example:
        >>> [each.cls.__name__ for each in swappable() if each.group == "linear"][:1]
        ['Linear']
    """
    foreign = (getattr(sys.modules.get(module), name, None) for module, name in _FOREIGN)
    found = [Swappable(kind, kind, _twin(kind)) for kind in BASES]
    return (*found, *(Swappable(t, *each) for t, each in zip(foreign, _FOREIGN.values(), strict=True) if t is not None))


def groups() -> list[str]:
    """Return the names in ``GROUPS`` for which there are tensor layers."""
    return [name for name, kinds in GROUPS.items() if any(kind in BASES for kind in kinds)]


def tensor_class(format: str, kind: type[nn.Module]) -> type[Any]:
    """Return the class of a format that replaces a torch layer; see ``layer_class`` and ``recurrent_class``."""
    return recurrent_class(format, kind) if kind in RECURRENT else layer_class(format, kind)


def own_modules(layer: nn.Module) -> list[nn.Module]:
    """Return a layer with all modules inside it, but for the embedding of a tied output, which is a layer too."""
    return [layer] if isinstance(layer, TiedLinear) else [*layer.modules()]


def how_to_swap(module: nn.Module) -> Swappable:
    """Return the entry of a module's type.

    Raises:
        StopIteration: there is none.
    """
    own = getattr(module, "dense_type", None)  # of tensor layers
    return next(each for each in swappable() if own is each.cls or isinstance(module, each.cls))


def subclass_of(module: nn.Module) -> str:
    """Return the sentence that a module is of a subclass of a type that can be swapped, or an empty string.

    Example:
        >>> class Mine(nn.Linear): ...
        >>> subclass_of(Mine(2, 2)), subclass_of(nn.Linear(2, 2))
        ('Mine is a subclass of Linear (subclasses=True swaps it)', '')
    """
    own, exact = parametrize.type_before_parametrizations(module), how_to_swap(module).cls
    return "" if own is exact else f"{own.__name__} is a subclass of {exact.__name__} (subclasses=True swaps it)"


def lost(module: nn.Module) -> list[str]:
    """Return the names that a module's class adds to the type that is swapped: a tensor layer has none of them.

    Example:
        >>> class Mine(nn.Linear):
        ...     def forward(self, x): return 2 * super().forward(x)
        >>> lost(Mine(2, 2)), lost(nn.Linear(2, 2))
        (['forward'], [])
    """
    own, exact = parametrize.type_before_parametrizations(module), how_to_swap(module).cls
    names = own_members(own, exact) if issubclass(own, exact) else ()
    return [*dict.fromkeys(name for name in names if name == "__call__" or not name.startswith("__"))]


def _twin(kind: Any) -> Callable[[Any], Any]:
    def plain(module: Any) -> Any:
        given = BASES[kind]._arguments(module)
        # torch's recurrent layers would warn, at each call, of a dropout without effect.
        twin = kind(**given | {name: 0.0 for name in ("dropout",) if name in given}, device="meta")
        twin.__dict__.update({name: given[name] for name in ("dropout",) if name in given})
        for name in [*twin._parameters]:
            if name in module._parameters:
                setattr(twin, name, module._parameters[name])
        return twin

    return plain


def _from_conv1d(module: Any) -> Any:
    """Return the linear layer of a transformers ``Conv1D``, which keeps the transposed weight."""
    inputs, outputs = module.weight.shape
    twin = nn.Linear(inputs, outputs, device="meta")
    twin.weight = nn.Parameter(module.weight.detach().T, requires_grad=module.weight.requires_grad)
    twin.bias = module.bias
    return twin


def came_from_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is in the place of a transformers ``Conv1D``, whose attributes it then has."""
    return "nf" in vars(layer)


def replaced_type(layer: nn.Module, plain: Any) -> Any:
    """Return the plain linear layer of a tensor layer as a transformers ``Conv1D``, if it is in the place of one."""
    kind: Any = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if kind is None or type(plain) is not nn.Linear or not came_from_conv1d(layer):
        return plain
    with torch.device("meta"):  # it would draw its weight
        twin = kind(plain.out_features, plain.in_features)
    twin.weight = nn.Parameter(plain.weight.detach().T.contiguous(), requires_grad=plain.weight.requires_grad)
    twin.bias = plain.bias
    return twin.train(plain.training)


_FOREIGN: Mapping[tuple[str, str], tuple[type[nn.Module], Callable[[Any], Any]]] = {
    ("transformers.pytorch_utils", "Conv1D"): (nn.Linear, _from_conv1d),
}
"""Types of other packages, by module and name: the torch layer with the same function, and the conversion. They are
looked up in ``sys.modules``, so that nothing is imported."""


class Fold(NamedTuple):
    """A weight that is computed from other parameters, and can be replaced by its value.

    Attributes:
        parameters: names of those parameters.
        owned: names in the module's ``_parameters`` and ``_modules`` that belong to the computation.
        hooks: hooks of the module that belong to it.
        compute: returns the weight.
    """

    parameters: tuple[str, ...]
    owned: frozenset[str]
    hooks: tuple[Any, ...]
    compute: Callable[[], Tensor]

    @torch.no_grad()
    def value(self, module: nn.Module) -> nn.Parameter:
        """Return the weight as a parameter."""
        own = dict(module.named_parameters())
        inner: Any = getattr(module, "parametrizations", module)
        training = inner.training
        inner.train(False)  # in training mode, reading the weight may change a parametrization
        weight = self.compute().detach()
        inner.train(training)
        return nn.Parameter(weight, any(own[name].requires_grad for name in self.parameters))

    def without(self, hooks: Any) -> Any:
        """Return a module's hooks, in a dictionary, without those of the computation; the same one if it has none."""
        if not hooks:
            return hooks
        left = [(key, hook) for key, hook in hooks.items() if not any(hook is each for each in self.hooks)]
        return hooks if len(left) == len(hooks) else type(hooks)(left)


def fold_of(module: nn.Module) -> Fold | None:
    """Return how a module's weight is computed, if by parametrizations of torch or by the older ``weight_norm``.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        >>> fold_of(layer).parameters
        ('parametrizations.weight.original0', 'parametrizations.weight.original1')
        >>> fold_of(nn.Linear(4, 4)) is None
        True
    """
    given: Any = module
    if parametrize.is_parametrized(module):
        names = [f"parametrizations.{name}" for name, _ in given.parametrizations.named_parameters()]
        own = [each for each in given._load_state_dict_pre_hooks.values() if _is_torch(each)]
        alone = [*given.parametrizations] == ["weight"] and not network_of(module, "weight")
        return Fold((*names,), frozenset({"parametrizations"}), (*own,), lambda: given.weight) if alone else None
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            names = ["weight_g", "weight_v"]
            return Fold((*names,), frozenset(names), (hook,), partial(hook.compute_weight, module))
    return None


def _is_torch(hook: Any) -> bool:
    return getattr(getattr(hook, "hook", hook), "__module__", "") == "torch.nn.utils.parametrizations"


def adapters(model: nn.Module) -> dict[nn.Module, str]:
    """Return every module inside a layer of PEFT, such as LoRA's, with that layer's type."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if any((kind.__module__, kind.__name__) == _ADAPTER for kind in type(module).__mro__):
            for inner in module.modules():
                found.setdefault(inner, type(module).__name__)
    return found
