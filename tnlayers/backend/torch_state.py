"""State of torch around a forward: autograd, tracing, autocast."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_TRACERS = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


def traced() -> bool:
    """Return whether torch traces: sizes may be tensors or symbols then, and all but inputs become constants."""
    if torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(torch._C._get_dispatch_mode(key) for key in _TRACERS)


def sizes(x: Tensor) -> torch.Size:
    """Return a tensor's shape in numbers, even where ``torch.jit.trace`` makes them tensors."""
    state = torch._C._get_tracing_state()
    if state is None:
        return x.shape
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return x.shape
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def plain_autograd() -> bool:
    """Return whether only autograd is active: no compiler, which does this itself, no torch.func, no forward mode.

    False under ``torch.jit.trace``, which does not record our autograd operation.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def again(
    function: Callable[[], Tensor], arguments: Sequence[Tensor | None], wanted: Sequence[bool], gradient: Tensor
) -> Iterator[Tensor | None]:
    """Return gradients by autograd, differentiable again; None where not wanted."""
    with torch.enable_grad():
        y = function()
    asked = [argument for argument, want in zip(arguments, wanted, strict=True) if want and argument is not None]
    found = iter(torch.autograd.grad(y, asked, gradient, create_graph=True, allow_unused=True))
    return (next(found) if want else None for want in wanted)


def own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the tensor's device: products of weights round once, in the convolution, as a dense one."""
    kind = tensor.device.type
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


_AUTOCAST = ("cpu", "cuda")
"""Device types that always have autocast; this is faster than a query."""


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype of autocast on a device type; None if it is off."""
    if (kind in _AUTOCAST or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def constant_to_compilers(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``torch.compile`` run a function while it traces, and take the result as a constant.

    ``torch.compiler.assume_constant_result`` sets the same mark. But calling it imports the compiler for everyone.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
