"""The computed weight of a tensor layer: a tensor for reading that raises on writes."""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.backend.torch_state import plain_autograd

_KERNEL = (
    "layer.set_weight_(W) fits the cores to a kernel W, layer.reset_parameters() draws them again, and "
    "layer.to_dense() gives a plain layer"
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
"""The alternative to a write to the weight, by the name of the method or attribute."""

_IN_PLACE = {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor")
}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}
_OF_THE_ACCESS = {"requires_grad_", "requires_grad"} | _HOOKS
"""Names that have no effect on ``layer.weight`` itself, but are valid on a tensor detached from it."""


def refusal(tried: str, advice: str = f"{_KERNEL}; {_COPY}") -> str:
    """Return the error message for a write to a layer's weight.

    Example:
        >>> print(refusal("zero_()", "do otherwise"))
        zero_() cannot change a tensor layer: its weight is computed from layer.cores at each access; do otherwise
    """
    return f"{tried} cannot change a tensor layer: its weight is computed from layer.cores at each access; {advice}"


class _Related(torch._C._TensorMeta):
    """Metaclass with which every tensor is an instance: torch.testing.assert_close compares only related classes."""

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Tensor)


class ComputedWeight(Tensor, metaclass=_Related):
    """Read-only tensor that ``layer.weight`` returns when only autograd, no other mode or transform, is active.

    It is computed at each access, so a write into it would be lost silently. Operations on it return plain tensors,
    except for views of its memory. ``nn.Parameter(layer.weight.detach())`` is an ordinary parameter, copies and files
    hold plain tensors, and arrays are read-only.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.CPLinear(4, 4, rank=2)
        >>> layer.weight.zero_()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        RuntimeError: zero_() cannot change a tensor layer: its weight is computed from layer.cores at each access; ...
    """

    _accessed = False
    """Whether the layer returned this tensor itself, as opposed to a view of it."""
    _is_hf_initialized = False
    """What transformers 5 asks of a tensor before it draws initial values."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a torch function with the plain tensor; raise if the function writes to it."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            # Runtime checks of torch 2.13's compiled code sometimes reject such a class, with an unclear message.
            raise RuntimeError(_COMPILED)
        first = args[0] if args else next(iter(kwargs.values()), None)
        _check(func, first, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            return _aliases(func, first, found) if type(first) is ComputedWeight else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy as a plain tensor."""
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor, also for ``torch.load(weights_only=True)``."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    # nn.Parameter and nn.Buffer keep a subclass's type, and set these attributes on the detached tensor. A user's
    # parameter must be an ordinary one, so the setters change the class, as torch's lazy parameters do.
    def _become(self, name: str, kind: type[Tensor]) -> None:
        self.__class__ = kind  # type: ignore[assignment]
        if kind is Tensor:
            setattr(self, name, True)

    _is_param = property(lambda self: False, lambda self, value: self._become("_is_param", nn.Parameter))
    _is_buffer = property(lambda self: False, lambda self, value: self._become("_is_buffer", Tensor))


def guarded(kernel: Tensor) -> Tensor:
    """Return the kernel as a ComputedWeight if only autograd is active, else the kernel itself."""
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
    """Parameter dictionary of a module with a computed weight. torch's old norms look up the weight here."""

    def __missing__(self, name: str) -> Any:
        raise _NoWeightError(name) if name == "weight" else KeyError(name)

    def __delitem__(self, name: str) -> None:
        self[name]  # raises as above
        super().__delitem__(name)


class _NoWeightError(KeyError):
    def __str__(self) -> str:
        return refusal("code that expects a weight parameter", _PARTS)


class ComputesWeight(nn.Module):
    """A module whose ``weight`` is computed. Setting or registering one raises AttributeError."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_parameters"] = _Parameters()

    def _kernel(self) -> Tensor:
        """Compute the weight as a plain tensor."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense kernel, contracted at each access, in the shape of torch's layer.

        The shape is ``(out_channels, in_channels / groups, *kernel_size)``; for a transposed convolution
        ``(in_channels, out_channels / groups, *kernel_size)``; for a linear layer (out_features, in_features).

        It is read-only: in-place writes and assignments raise.
        """
        weight = guarded(self._kernel())
        if type(weight) is ComputedWeight and "_is_hf_initialized" in vars(self):
            weight._is_hf_initialized = True  # so that transformers 5, which marks loaded layers, draws no new values
        return weight

    @weight.deleter
    def weight(self) -> None:
        raise AttributeError(refusal("del layer.weight", _KERNEL))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(refusal("layer.weight = ...", _KERNEL))
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as ``nn.Module`` does; raise for a weight, also for one in the form that torch's pruning makes."""
        _check_name("register_parameter", name, param)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register as ``nn.Module`` does; raise for a weight."""
        _check_name("register_buffer", name, None)
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add as ``nn.Module`` does; raise for a weight."""
        _check_name("add_module", name, None)
        super().add_module(name, module)


def _check_name(method: str, name: str, value: Any) -> None:
    if name == "weight" or type(value) is ComputedWeight:
        raise AttributeError(refusal(f"{method}({name!r}, ...)", _PARTS))


@lru_cache(maxsize=4096)
def _writes(func: Callable[..., Any]) -> tuple[str, str] | None:
    """Return name and display text of a function that writes to its first argument; None for other functions."""
    name = getattr(func, "__name__", "")
    if name in {"__set__", "__delete__"}:
        attribute = func.__self__.__name__  # type: ignore[attr-defined]  # func is a slot of the attribute's descriptor
        return attribute, f"weight.{attribute} = ..."
    if name == "__setitem__" or name in _IN_PLACE:
        return name, "weight[...] = ..." if name == "__setitem__" else f"{name}()"
    if name in _HOOKS or (name.endswith("_") and not name.endswith("__")):
        return name, f"{name}()"
    return None


def _check(func: Callable[..., Any], first: Any, kwargs: dict[str, Any]) -> None:
    """Raise if a call writes to a computed weight.

    Raises:
        RuntimeError: the type that torch raises for tensors that cannot be written to.
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
    """Return a result with views of the weight as ComputedWeight, and arrays read-only."""
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
