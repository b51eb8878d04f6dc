"""Second moments of what goes in and out of the modules of a model, by hooks during one run."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from tnlayers.layers.base import TensorLayer
from tnlayers.layers.registry import KINDS
from tnlayers.ops.squared_norm import squared

INPUT, OUTPUT, GRADIENT_OUTPUT, GRADIENT_INPUT = SIDES = "input", "output", "gradient_output", "gradient_input"


class Moment(NamedTuple):
    """Statistics of a tensor.

    Attributes:
        square: mean of the squares of the finite entries; NaN if there is none.
        entries: number of entries.
        not_finite: number of entries that are NaN or infinite.
        largest: largest magnitude of a finite entry.
    """

    square: float
    entries: int
    not_finite: int
    largest: float


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        module: the module.
        number: 1 for the module's first call.
        leaf: whether no other module was called inside.
        dtype: of the output.
        moments: by the names in ``SIDES``.
        unbiased: second moment of the output of a convolution or linear layer without its bias.
        constant: names of the sides that are equal for all entries of the first axis, up to rounding.
        norm: second moment of the output of a norm that calls other modules, if this call is the latest one in it.
        again: whether activation checkpointing has repeated this call.
    """

    module: nn.Module
    number: int = 0
    leaf: bool = True
    dtype: torch.dtype | None = None
    moments: dict[str, Moment] = field(default_factory=dict)
    unbiased: float = math.nan
    constant: set[str] = field(default_factory=set)
    norm: float | None = None
    again: bool = False


@torch.no_grad()
def moment(tensor: Tensor) -> Moment:
    """Measure a tensor, without overflow in its own dtype.

    Example:
        >>> moment(torch.tensor([300.0, -400.0, float("nan")], dtype=torch.float16))
        Moment(square=125000.0, entries=3, not_finite=1, largest=400.0)
    """
    values = tensor.detach()
    values = values.abs() if values.is_complex() else values.float() if values.element_size() == 1 else values
    entries, lost = values.numel(), 0
    largest = float(values.abs().amax()) if entries else 0.0
    if not math.isfinite(largest):
        values = values[values.isfinite()]
        lost = entries - values.numel()
        largest = float(values.abs().amax()) if values.numel() else 0.0
    if not values.numel():
        return Moment(math.nan, entries, lost, largest)
    fine = torch.float32 if values.device.type == "mps" else torch.float64
    norm = float(torch.linalg.vector_norm(values, dtype=fine))
    return Moment(norm * norm / values.numel(), entries, lost, largest)


def kernel_ratio(layer: nn.Module) -> float | None:
    """Return the variance of a tensor layer's kernel over the solver's target, None for other modules.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.TRConv2d(8, 8, 3, rank=2)
        >>> round(kernel_ratio(layer), 4)
        1.0
    """
    if not isinstance(layer, TensorLayer):
        return None
    with torch.no_grad():
        cores = [core.detach() for core in layer._listed()]
        fine = torch.float32 if cores[0].device.type == "mps" else torch.float64
        found = float(squared(layer.network, [core.to(fine) for core in cores]))
    return found / layer.network.dense_params / layer.variance.weight_std**2


class Recorder:
    """Calls of all modules of a model while ``recording`` is open, in order.

    A tensor's gradient is that of all its uses. It is measured by a hook on the tensor: torch's hooks on a module's
    gradients fail if its output is changed in place later.

    Args:
        model: any module.
        gradients: whether there will be a backward.

    Attributes:
        calls: those that called no other module and gave a floating-point tensor.
        empty: whether a call gave a floating-point tensor without entries.
    """

    def __init__(self, model: nn.Module, gradients: bool) -> None:
        self.calls: list[Call] = []
        self.empty = False
        self._gradients = gradients
        self._open: list[Call] = []
        self._counts: dict[nn.Module, int] = {}
        self._backward = False
        layers: Any = (*KINDS, TensorLayer)
        # Modules inside a layer, such as a parametrization, belong to it.
        inside = {
            inner
            for layer in model.modules()
            if isinstance(layer, layers)
            for inner in layer.modules()
            if inner is not layer
        }
        self._modules = [module for module in model.modules() if module not in inside]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hook all modules, and remove the hooks on exit."""
        handles: list[Any] = []
        try:
            for module in self._modules:
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, loss: Tensor, leaves: Sequence[Tensor]) -> None:
        """Run the backward to ``leaves``. Activation checkpointing calls modules again in it.

        No tensor gets a ``.grad``, also none that only the loss holds.
        """
        self._open.clear()
        self._backward = True
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        others, reentrant = _graph(loss)
        if not reentrant:
            torch.autograd.grad(loss, needed, allow_unused=True)
            return
        before = [(leaf, leaf.grad) for leaf in others]  # torch's reentrant checkpoints refuse autograd.grad
        try:
            for leaf in others:
                leaf.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for leaf, gradient in before:
                leaf.grad = gradient

    def _enter(self, module: nn.Module, arguments: Any, named: Any) -> None:
        x = _first((arguments, named))
        seen = {} if x is None else {INPUT: moment(x)}
        constant = {INPUT} if x is not None and _constant(x, seen[INPUT].largest) else set()
        if self._backward:
            call = self._repeated(module, seen)
        else:
            call = Call(module, moments=seen, constant=constant)
            for outer in self._open:
                outer.leaf = False
        self._open.append(call)
        if x is not None:  # before the module can change it in place
            self._hook(x, call, GRADIENT_INPUT)

    def _leave(self, module: nn.Module, arguments: Any, named: Any, output: Any) -> Any:
        """Measure an output. Return a replacement for it, or None."""
        while self._open:
            call = self._open.pop()  # those above raised
            if call.module is module:
                break
        else:
            return None
        y = _first(output)
        if y is None or not call.leaf:
            if y is not None and self.calls and not self._backward and "norm" in type(module).__name__.lower():
                self.calls[-1].norm = moment(y).square
            self.empty |= any(
                isinstance(leaf, Tensor) and _floats(leaf) and not leaf.numel() for leaf in tree_leaves(output)
            )
            return None
        if not self._backward:
            self._counts[module] = call.number = self._counts.get(module, 0) + 1
            call.dtype, call.moments[OUTPUT] = y.dtype, moment(y)
            call.unbiased = _unbiased(module, y, call.moments[OUTPUT].square)
            call.constant |= {OUTPUT} if _constant(y, call.moments[OUTPUT].largest) else set()
            self.calls.append(call)
        new = y
        if self._gradients and y.requires_grad and y._is_view() and not _shares(y, (arguments, named)):
            # A view, as of nn.Linear in three dimensions, loses its hooks when it is changed in place.
            new = y.clone()
        self._hook(new, call, GRADIENT_OUTPUT)
        return None if new is y else tree_map_only(Tensor, lambda tensor: new if tensor is y else tensor, output)

    def _repeated(self, module: nn.Module, seen: dict[str, Moment]) -> Call:
        """Return the call that is computed again: the latest one of the module with the same input."""
        calls = [call for call in self.calls if call.module is module and not call.again]
        same = [call for call in calls if call.moments.get(INPUT) == seen.get(INPUT)]
        call = (same or calls or [Call(module)])[-1]
        call.again = True
        return call

    def _hook(self, tensor: Tensor, call: Call, side: str) -> None:
        """Measure the gradient of a tensor's present values, which may be overwritten later."""

        def see(gradient: Tensor | None) -> None:
            if gradient is not None and self._backward and call.leaf and side not in call.moments and _plain(gradient):
                call.moments[side] = moment(gradient)

        if self._gradients and tensor.requires_grad and torch.is_grad_enabled():
            tensor.register_hook(see)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _unbiased(module: nn.Module, y: Tensor, square: float) -> float:
    """Return the second moment of an output without the layer's bias. ``square``: with it."""
    if not isinstance(module, (*KINDS, TensorLayer)):
        return square
    bias, taps = module.bias, len(getattr(module, "kernel_size", ()))  # of a pooling layer, it may be one number
    if not isinstance(bias, Tensor) or y.dim() <= taps or y.shape[-1 - taps] != len(bias):
        return square
    fine = torch.promote_types(y.dtype, torch.float32)
    return moment(y.detach().to(fine) - bias.detach().to(fine).reshape(-1, *[1] * taps)).square


@torch.no_grad()
def _constant(tensor: Tensor, largest: float) -> bool:
    """Return whether all entries of the first axis are equal up to rounding; with one entry, whether all are zero."""
    if tensor.dim() < 2 or len(tensor) < 2 or not largest:
        return not largest
    values = tensor.detach()
    values = values.float() if values.element_size() == 1 else values
    return bool((values - values[:1]).abs().amax() <= 8 * torch.finfo(tensor.dtype).eps * largest)


def _graph(loss: Tensor) -> tuple[list[Any], bool]:
    """Return the leaves that a loss depends on, and whether it passes through a reentrant checkpoint."""
    leaves, reentrant, seen, todo = [], False, set(), [loss.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reentrant |= "Checkpoint" in node.name()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return leaves, reentrant


def _first(tree: Any) -> Tensor | None:
    """Return the first floating-point tensor of a tree."""
    for leaf in tree_leaves(tree):
        tensor = leaf.data if isinstance(leaf, PackedSequence) else leaf
        if isinstance(tensor, Tensor) and _floats(tensor) and _plain(tensor):
            return tensor
    return None


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _shares(tensor: Tensor, tree: Any) -> bool:
    """Return whether a tensor lies in the memory of one of a tree."""
    there = [
        leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and _plain(leaf)
    ]
    return tensor.untyped_storage().data_ptr() in there


def _plain(tensor: Tensor) -> bool:
    """Return whether a tensor's entries can be measured: it is not sparse, nested, empty or batched by vmap."""
    batched = torch._C._are_functorch_transforms_active()
    return tensor.layout == torch.strided and not tensor.is_nested and not batched and tensor.numel() > 0
