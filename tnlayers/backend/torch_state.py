"""What torch may be doing around a forward: recording for a backward, tracing, casting."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_TRACERS = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


def traced() -> bool:
    """Whether what runs is recorded: sizes may be tensors or symbols then, and whatever is no input a constant."""
    if torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(torch._C._get_dispatch_mode(key) for key in _TRACERS)


def sizes(x: Tensor) -> torch.Size:
    """The shape of a tensor in numbers also where ``torch.jit.trace`` makes tensors of them."""
    state = torch._C._get_tracing_state()
    if state is None:
        return x.shape
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return x.shape
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def plain_autograd() -> bool:
    """Whether nothing but autograd looks on: no compiler, which does this itself, no torch.func, no forward mode.

    ``torch.jit.trace`` records no operation of ours, whatever it does.
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
    """Gradients by autograd, of which there may be further ones; None where they are not wanted."""
    with torch.enable_grad():
        y = function()
    asked = [argument for argument, want in zip(arguments, wanted, strict=True) if want and argument is not None]
    found = iter(torch.autograd.grad(y, asked, gradient, create_graph=True, allow_unused=True))
    return (next(found) if want else None for want in wanted)


def own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast where the tensor is: products of weights round once, in the convolution, as a dense kernel does."""
    kind = tensor.device.type
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


_AUTOCAST = ("cpu", "cuda")
"""Kinds of device that have it in any case, which is quicker to know than to ask."""


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes in on a kind of device; None where it is off."""
    if (kind in _AUTOCAST or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def constant_to_compilers(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``torch.compile`` run a function while it traces, and take the result as a constant.

    ``torch.compiler.assume_constant_result`` sets the same mark. But calling it imports the compiler for everyone.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
