"""The weight of a layer that has none of its own: a tensor to read, which answers writes with a sentence."""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.backend.torch_state import plain_autograd

_KERNEL = (
    "layer.set_weight_(W) fits the cores to a kernel W, layer.reset_parameters() draws them again, and layer.to_conv() "
    "or layer.to_linear() gives a plain layer"
)
_PARTS = f"{_KERNEL}; pruning and parametrizations can be put on layer.cores"
_COPY = "layer.weight.clone() is a tensor of your own"
_COMPILED = (
    "layer.weight was computed outside of a compiled function that is called with it; compute it inside of it, or call "
    "it with layer.weight.clone()"
)
_ADVICE = {
    "requires_grad_": "layer.cores.requires_grad_(False) freezes the cores",
    "requires_grad": "layer.cores.requires_grad_(False) freezes the cores",
    "grad": "the gradients are those of layer.cores",
    "register_hook": f"register it on one of layer.cores; or, to use the weight yourself, {_COPY}",
    "register_post_accumulate_grad_hook": "register it on the parameters in layer.cores",
}
"""What to do instead of writing to the weight's kernel, by the name of the method or attribute."""

_IN_PLACE = {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor")
}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}
_OF_THE_ACCESS = {"requires_grad_", "requires_grad"} | _HOOKS
"""What has no effect on ``layer.weight`` itself, but is right for a tensor that was detached from it."""


def refusal(tried: str, advice: str = f"{_KERNEL}; {_COPY}") -> str:
    """The sentence about a write to a layer's weight.

    Example:
        >>> print(refusal("zero_()", "do otherwise"))
        zero_() cannot change a tensor layer: its weight is computed from layer.cores at each access; do otherwise
    """
    return f"{tried} cannot change a tensor layer: its weight is computed from layer.cores at each access; {advice}"


class _Related(torch._C._TensorMeta):
    """Every tensor passes for a computed weight: torch.testing.assert_close compares related classes only."""

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Tensor)


class ComputedWeight(Tensor, metaclass=_Related):
    """What ``layer.weight`` gives where nothing but autograd looks on: a tensor that cannot be written to.

    It is computed at each access, so whatever was written into it would be lost without a word. Operations on it give
    plain tensors, those that are views of its memory excepted. ``nn.Parameter(layer.weight.detach())`` is a parameter
    like any other, copies and files hold plain tensors, and arrays are read-only.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.CPLinear(4, 4, rank=2)
        >>> layer.weight.zero_()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        RuntimeError: zero_() cannot change a tensor layer: its weight is computed from layer.cores at each access; ...
    """

    _accessed = False
    """Whether it is what the layer gave, and not a view of that."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch's with the plain tensor, unless it is one that writes to it."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            # Runtime checks of torch 2.13's compiled code refuse such a class, some of the time and in their own words.
            raise RuntimeError(_COMPILED)
        first = args[0] if args else next(iter(kwargs.values()), None)
        _check(func, first, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            return _aliases(func, first, found) if type(first) is ComputedWeight else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy as a plain tensor."""
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A plain tensor comes back, also from ``torch.load(weights_only=True)``."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    # nn.Parameter and nn.Buffer keep the type of a subclass, and set these attributes on what they have detached.
    # What somebody makes a parameter of is theirs, so it becomes a plain one; torch's lazy parameters change so too.
    def _become(self, name: str, kind: type[Tensor]) -> None:
        self.__class__ = kind  # type: ignore[assignment]
        if kind is Tensor:
            setattr(self, name, True)

    _is_param = property(lambda self: False, lambda self, value: self._become("_is_param", nn.Parameter))
    _is_buffer = property(lambda self: False, lambda self, value: self._become("_is_buffer", Tensor))


def guarded(kernel: Tensor) -> Tensor:
    """A kernel that refuses writes, where nothing but autograd looks on; elsewhere the kernel as it is."""
    if (
        type(kernel) is not Tensor
        or not plain_autograd()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return kernel
    weight = kernel.as_subclass(ComputedWeight)
    weight._accessed = True
    return weight


class _Parameters(dict[str, Any]):
    """The parameters of a module whose weight is computed: torch's old norms look for it here."""

    def __missing__(self, name: str) -> Any:
        raise _NoWeightError(name) if name == "weight" else KeyError(name)

    def __delitem__(self, name: str) -> None:
        self[name]  # so that it is told of as above
        super().__delitem__(name)


class _NoWeightError(KeyError):
    def __str__(self) -> str:
        return refusal("what takes it for a parameter", _PARTS)


class ComputesWeight(nn.Module):
    """A module whose ``weight`` is computed; whoever sets or registers one gets a sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_parameters"] = _Parameters()

    def _kernel(self) -> Tensor:
        """The weight as a plain tensor."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense kernel, contracted at each access, of the shape that torch's layer holds.

        That is (out_channels, in_channels / groups, *kernel_size); for a transposed convolution (in_channels,
        out_channels / groups, *kernel_size); for a linear layer (out_features, in_features).

        It is to be read: what is written into it in place is answered by a sentence, and so is an assignment.
        """
        return guarded(self._kernel())

    @weight.deleter
    def weight(self) -> None:
        raise AttributeError(refusal("del layer.weight", _KERNEL))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(refusal("layer.weight = ...", _KERNEL))
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module.register_parameter``; a weight is refused, and what torch's pruning makes of one."""
        _check_name("register_parameter", name, param)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As ``nn.Module.register_buffer``; a weight is refused."""
        _check_name("register_buffer", name, None)
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As ``nn.Module.add_module``; a weight is refused."""
        _check_name("add_module", name, None)
        super().add_module(name, module)


def _check_name(method: str, name: str, value: Any) -> None:
    if name == "weight" or type(value) is ComputedWeight:
        raise AttributeError(refusal(f"{method}({name!r}, ...)", _PARTS))


@lru_cache(maxsize=4096)
def _writes(func: Callable[..., Any]) -> tuple[str, str] | None:
    """The name of a function that writes to its first argument, and how to call it in a sentence; None of others."""
    name = getattr(func, "__name__", "")
    if name in {"__set__", "__delete__"}:
        attribute = func.__self__.__name__  # type: ignore[attr-defined]  # of a slot of the attribute's descriptor
        return attribute, f"weight.{attribute} = ..."
    if name == "__setitem__" or name in _IN_PLACE:
        return name, "weight[...] = ..." if name == "__setitem__" else f"{name}()"
    if name in _HOOKS or (name.endswith("_") and not name.endswith("__")):
        return name, f"{name}()"
    return None


def _check(func: Callable[..., Any], first: Any, kwargs: dict[str, Any]) -> None:
    """Raise a sentence where a computed weight is to be written to.

    Raises:
        RuntimeError: torch's own type for a tensor that cannot be written to.
    """
    written = _writes(func)
    if written is None:
        written, first = (
            (func.__name__, f"{func.__name__}()"),
            kwargs.get("out", first if kwargs.get("inplace") else ()),
        )
    name, shown = written
    for tensor in first if isinstance(first, list | tuple) else (first,):
        if type(tensor) is ComputedWeight and (tensor._accessed or name not in _OF_THE_ACCESS):
            raise RuntimeError(refusal(shown, _ADVICE[name]) if name in _ADVICE else refusal(shown))


def _aliases(func: Callable[..., Any], weight: Tensor, found: Any) -> Any:
    """A result, which is a computed weight where it is a view of one, and read-only where it is an array."""
    if type(found) is Tensor:
        shares = (
            func is not Tensor.as_subclass
            and not torch._C._are_functorch_transforms_active()
            and torch._C._is_alias_of(weight, found)  # type: ignore[attr-defined]
        )
        return found.as_subclass(ComputedWeight) if shares else found
    if isinstance(found, list | tuple) and type(found) in {list, tuple}:
        return type(found)(_aliases(func, weight, each) for each in found)
    if func in _ARRAYS:
        found.setflags(write=False)
    return found


_ARRAYS: set[Any] = {Tensor.numpy, Tensor.__array__}
