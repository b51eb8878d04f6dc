"""Optimizers and wrappers that hold parameters which leave a model: found, checked, and given new parameters."""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from tnlayers.backend.sharding import place, whole

T = TypeVar("T")

GRADIENTS = {"momentum_buffer", "exp_avg", "grad_avg"}
"""Names of optimizers' buffers that are sums of gradients."""
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
"""Names of buffers that are sums of squared gradients."""
STEPS = {"momentum_buffer"}
"""Names of buffers that are sums of steps instead of gradients if the optimizer divides by SQUARES first."""


def check_exchange(optimizer: Any, parameters: Sequence[Tensor]) -> None:
    """Raise unless the optimizer holds one of these parameters, and can hold others instead.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it holds none of them, or is LBFGS.

    Example:
        >>> import torch
        >>> check_exchange(torch.optim.SGD([torch.ones(1)]), [torch.ones(1)])
        Traceback (most recent call last):
            ...
        ValueError: optimizer SGD holds none of the parameters that are replaced
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is {optimizer!r}; it must be a torch.optim.Optimizer")
    refuse_lbfgs(optimizer)
    if not _holds(optimizer, set(map(id, parameters))):
        raise ValueError(f"optimizer {type(optimizer).__name__} holds none of the parameters that are replaced")


def refuse_lbfgs(optimizer: Optimizer) -> None:
    """Raise ValueError for LBFGS."""
    if isinstance(optimizer, LBFGS):
        raise ValueError("optimizer is LBFGS, whose state is of all parameters together; make a new one")


def exchange_parameter(
    optimizer: Optimizer, old: Tensor, new: nn.Parameter, move: Callable[[Tensor, bool], Tensor] | None
) -> None:
    """Put a parameter in the place of another, with the state that can be carried over.

    Args:
        optimizer: it may or may not hold the old parameter.
        old: the old parameter.
        new: the new one.
        move: returns a buffer of the new shape for one of the old. The second argument says whether it holds squares.
            None: the new parameter starts without state.

    Example:
        >>> import torch
        >>> old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([old], momentum=0.9)
        >>> old.sum().backward(), optimizer.step()
        (None, None)
        >>> exchange_parameter(optimizer, old, new, lambda value, squares: value[:1])
        >>> optimizer.state[new]
        {'momentum_buffer': tensor([1.])}
    """
    for group in optimizer.param_groups:
        group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state and move is not None and (moved := _moved(state, old, new, move)):
        optimizer.state[new] = moved


def _moved(
    state: Mapping[str, Any], old: Tensor, new: nn.Parameter, move: Callable[[Tensor, bool], Tensor]
) -> dict[str, Any]:
    """Return the state of the new parameter; empty if it has a buffer of unknown meaning."""
    moved: dict[str, Any] = {}
    known = (GRADIENTS | SQUARES) - (STEPS if SQUARES.intersection(state) else set())
    for name, value in state.items():
        buffer = isinstance(value, Tensor) and value.dim() > 0
        if buffer and (value.shape != old.shape or name not in known):
            return {}
        moved[name] = place(move(whole(value), name in SQUARES).to(value), new) if buffer else value
    return moved


def holders(parameters: Sequence[Tensor]) -> list[Optimizer]:
    """Return the optimizers that hold one of these parameters."""
    wanted = set(map(id, parameters))
    return _alive(_kinds(Optimizer), lambda optimizer: _holds(optimizer, wanted))


def wrappers(parameters: Sequence[Tensor]) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel modules that hold one of these parameters."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return []  # so there is none
    wanted = set(map(id, parameters))
    kinds = _kinds(DistributedDataParallel)
    return _alive(kinds, lambda wrapper: any(id(each) in wanted for each in wrapper.parameters()))


def _alive(kinds: set[type[T]], wanted: Callable[[T], bool]) -> list[T]:
    """Return the objects of some types that are in use, of those that are wanted."""

    def found() -> list[T]:
        alive: Any = (each for each in gc.get_objects() if type(each) in kinds)  # millions: faster than issubclass
        return [each for each in alive if wanted(each)]

    if not found():
        return []
    gc.collect()  # drops unused objects in reference cycles
    return found()


def _holds(optimizer: Optimizer, wanted: set[int]) -> bool:
    return any(id(parameter) in wanted for group in optimizer.param_groups for parameter in group["params"])


def _kinds(kind: type[T]) -> set[type[T]]:
    return {kind}.union(*(_kinds(each) for each in kind.__subclasses__()))
