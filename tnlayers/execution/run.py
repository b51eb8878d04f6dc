"""Execution of a plan in torch."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.backend.input_checks import check_cores
from tnlayers.backend.torch_state import again, autocast_dtype, own_precision, plain_autograd
from tnlayers.backend.views import LAST, inverse, unviewed, view
from tnlayers.ops.input_step import reorder
from tnlayers.planning.plan import Plan


def run(plan: Plan, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Execute a plan.

    Args:
        plan: plan for the network and geometry of the cores.
        x: shape ``(batch, in_channels, *spatial)``.
        cores: in network order.
        bias: shape (out_channels,), or None.

    Returns:
        Tensor: shape ``(batch, out_channels, *spatial')``.
    """
    x = pad(plan, x)
    if torch.is_grad_enabled() and plain_autograd() and plan.own_backward:
        others = cores if bias is None else (bias, *cores)
        if x.requires_grad or any(tensor.requires_grad for tensor in others):
            dtype = autocast_dtype(x.device.type) if x.dtype != torch.float64 else None
            return _Run.apply(plan, x.to(dtype or x.dtype), bias, *cores)  # type: ignore[no-any-return, no-untyped-call]
    return apply_steps(plan, x, prepare_weights(plan, cores), bias)


def pad(plan: Plan, x: Tensor) -> Tensor:
    """Pad the input where the convolution cannot do it itself."""
    if not plan.prepad:
        return x
    mode = plan.geometry.padding_mode
    return F.pad(x, plan.prepad, mode="constant" if mode == "zeros" else mode)


def prepare_weights(plan: Plan, cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the weight of each input step, in the cores' dtype even under autocast."""
    check_cores(cores)
    with own_precision(cores[0]):
        return [prepare(cores) for prepare in plan.prepared]


def apply_steps(
    plan: Plan, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, saved: list[Tensor] | None = None
) -> Tensor:
    """Apply the plan's steps to the padded input. Append to ``saved`` the results that the backward needs."""
    final = len(weights) - 1
    for number, (step, weight) in enumerate(zip(plan.steps, weights, strict=True)):
        x = step.apply(x, weight, bias if number == final and plan.tail is None else None)
        if saved is not None and number < final and plan.saved[number]:
            saved.append(x)
    if plan.tail is not None:
        x = reorder(x, *plan.tail, last=plan.setting.layout == LAST)
        if bias is not None:
            x = x + bias.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 2))
    return x


class _Run(torch.autograd.Function):
    """A plan's forward and backward as one autograd operation.

    The backward recomputes what the plan does not save, in chunks of the batch. One operation avoids autograd's cost
    per step, and saves nothing between forward and backward that the plan does not count.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, bias: Tensor | None, *cores: Tensor) -> Tensor:
        """Compute the plan's output."""
        saved: list[Tensor] = []
        with own_precision(x):
            weights, between = _built(plan, cores, x.dtype)
            offset = None if bias is None else bias.to(x.dtype)
            if plan.chunks > 1 and not any(plan.saved):
                y = torch.cat([apply_steps(plan, part, weights, offset) for part in _batch_chunks(plan, x)])
            else:
                y = apply_steps(plan, x, weights, offset, saved)
        ctx.plan, ctx.sizes, ctx.bias = plan, (len(cores), len(saved)), None if bias is None else bias.dtype
        ctx.save_for_backward(x, *cores, *saved, *([] if plan.rebuild_weights else [*weights, *between]))
        return unviewed(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, bias and cores, differentiably if grad mode is on."""
        plan, gradient, (x, *saved) = ctx.plan, gradients[0], ctx.saved_tensors
        _, cores, saved, weights, between = _split(saved, [0, *ctx.sizes, len(plan.steps)])
        needed = ctx.needs_input_grad[1:]
        with own_precision(x):
            for_bias = gradient.sum((0, *range(2, gradient.ndim))).to(ctx.bias) if needed[1] else None
            if torch.is_grad_enabled():

                def forward() -> Tensor:
                    return apply_steps(plan, x, [weight.to(x.dtype) for weight in prepare_weights(plan, cores)], None)

                for_x, *shares = again(forward, (x, *cores), (needed[0], *needed[2:]), gradient)
                return None, for_x, for_bias, *shares
            if plan.rebuild_weights:
                weights, between = _built(plan, cores, x.dtype)
            wanted = [any(needed[2 + k] for k in weight.cores) for weight in plan.weights]
            for_x, for_weights = _backward(plan, x, saved, weights, gradient, needed[0], wanted)
            for_cores: list[Tensor | None] = [None] * len(cores)
            start = 0
            for weight, step, found in zip(plan.weights, plan.steps, for_weights, strict=True):
                stop = start + weight.between
                if found is not None:
                    here = [needed[2 + k] for k in weight.cores]
                    tensors = [*weight.operands(cores), *between[start:stop]]
                    shares = weight.contraction.gradients(
                        tensors, step.restore_weight_gradient(found).to(cores[0].dtype), here
                    )
                    for k, share in zip(weight.cores, shares, strict=True):
                        for_cores[k] = None if share is None else view(share, cores[k].shape)
                start = stop
        return None, for_x, for_bias, *for_cores


def _built(plan: Plan, cores: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weight of each input step in the given dtype, and the intermediate results of the contractions."""
    check_cores(cores)
    weights, between = [], []
    for weight, step in zip(plan.weights, plan.steps, strict=True):
        tensors = weight.contraction.run(weight.operands(cores))
        weights.append(step.prepare_weight(tensors[-1]).to(dtype))
        between += tensors[len(weight.cores) :][: weight.between]
    return weights, between


def _backward(
    plan: Plan,
    x: Tensor,
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradient: Tensor,
    for_x: bool,
    for_weights: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the requested gradients of x and of the weights."""
    totals: list[Tensor | None] = [None] * len(weights)
    into: Tensor | None = None
    start = 0
    for part, g, *held in zip(*(_batch_chunks(plan, tensor) for tensor in (x, gradient, *saved)), strict=True):
        states, found = [part], iter(held)
        for keep, step, weight in zip(plan.saved, plan.steps, weights, strict=False):
            states.append(next(found) if keep else step.apply(states[-1], weight, None))
        if plan.tail is not None:
            sizes, order = plan.tail
            g = reorder(g, tuple(sizes[k] for k in order), inverse(order))  # noqa: PLW2901
        for number in reversed(range(len(weights))):
            needed = for_x or any(for_weights[:number]), for_weights[number]
            if not any(needed):
                break
            g, share = plan.steps[number].gradients(states.pop(), weights[number], g, needed)  # noqa: PLW2901
            total = totals[number]
            totals[number] = share if total is None or share is None else total.add_(share)
        if for_x and plan.chunks > 1:
            if into is None:  # made from g, since under vmap g is a batch of gradients
                into = g.new_empty_strided(x.shape, torch.empty_like(x, device="meta").stride())
            into[start : start + len(part)] = g
            start += len(part)
    return (into if into is not None else g if for_x else None), totals


def _batch_chunks(plan: Plan, tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(plan.chunks) if plan.chunks > 1 and tensor.shape[0] else (tensor,)


def _split(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[Sequence[Tensor]]:
    """Yield slices of the given sizes, then the rest."""
    ends = [*accumulate(sizes)]
    return (tensors[start:stop] for start, stop in zip([0, *ends], [*ends, None], strict=True))
