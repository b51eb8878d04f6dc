"""Running a plan in torch."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.assemble import Plan
from tnlayers.contraction import autocast_dtype, own_precision, plain_autograd
from tnlayers.meeting import reorder
from tnlayers.product import LAST


def run(plan: Plan, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Execute a plan.

    Args:
        plan: made for the network and geometry of the cores.
        x: shape (batch, in_channels, *spatial).
        cores: in network order.
        bias: shape (out_channels,), or None.

    Returns:
        Tensor: shape (batch, out_channels, *spatial').
    """
    if plan.chunks and torch.is_grad_enabled() and plain_autograd():
        return Rerun.apply(plan, x, bias, *cores)  # type: ignore[no-any-return, no-untyped-call]
    return meet(plan, x, build(plan, cores), bias)


def build(plan: Plan, cores: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that ``x`` meets; in the cores' dtype, also under autocast."""
    with own_precision(cores[0]):
        return [
            weight.build(cores).reshape(meeting.weight_shape).contiguous()
            for weight, meeting in zip(plan.weights, plan.meetings, strict=True)
        ]


def meet(plan: Plan, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Let ``x`` meet the tensors that ``build`` made."""
    geometry = plan.geometry
    if geometry.prepad:
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x = F.pad(x, geometry.prepad, mode=mode)
    final = len(weights) - 1
    for number, (meeting, weight) in enumerate(zip(plan.meetings, weights, strict=True)):
        x = meeting.apply(x, weight, bias if number == final and plan.tail is None else None)
    if plan.tail is not None:
        x = reorder(x, *plan.tail, last=plan.setting.layout == LAST)
        if bias is not None:
            x = x + bias.to(x.dtype).reshape(-1, *(1,) * geometry.ndim)
    return x


class Rerun(torch.autograd.Function):
    """A forward that keeps nothing but its input, and a backward that runs it again in parts of the batch."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, bias: Tensor | None, *cores: Tensor) -> Tensor:
        """The plan's output."""
        ctx.plan, ctx.has_bias = plan, bias is not None
        ctx.save_for_backward(x, *([bias] if bias is not None else []), *cores)
        ctx.autocast = autocast_dtype(x.device.type)
        weights = build(plan, cores)
        return torch.cat([meet(plan, part, weights, bias) for part in _parts(plan, x)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias and cores; differentiable again where autograd asks for that."""
        x, *rest = ctx.saved_tensors
        bias, cores = (rest[0], rest[1:]) if ctx.has_bias else (None, rest)
        wanted = ctx.needs_input_grad[1:]
        arguments = (x, bias, *cores)
        twice = torch.is_grad_enabled()
        with torch.enable_grad(), _autocast(x, ctx.autocast):
            if twice:
                y = meet(ctx.plan, x, build(ctx.plan, cores), bias)
                asked = [t for t, want in zip(arguments, wanted, strict=True) if want and t is not None]
                found = iter(torch.autograd.grad(y, asked, gradients, create_graph=True, allow_unused=True))
                return (None, *(next(found) if want else None for want in wanted))
            leaves = [core.detach().requires_grad_() for core in cores]
            weights = build(ctx.plan, leaves)
            held = [weight.detach().requires_grad_() for weight in weights]
            offset = None if bias is None else bias.detach().requires_grad_()
            totals = [torch.zeros_like(t) for t in ([*held] if offset is None else [*held, offset])]
            into = torch.empty_like(x) if wanted[0] else None
            parts = zip(_parts(ctx.plan, x), _parts(ctx.plan, gradients[0]), strict=True)
            start = 0
            for piece, gradient in parts:
                part = piece.detach().requires_grad_(wanted[0])
                y = meet(ctx.plan, part, held, offset)
                asked = [*held, *([] if offset is None else [offset]), *([part] if wanted[0] else [])]
                found_here = torch.autograd.grad(y, asked, gradient)
                for total, one in zip(totals, found_here, strict=False):
                    total.add_(one)
                if into is not None:
                    into[start : start + len(part)] = found_here[-1]
                start += len(part)
        needed = [leaf for leaf, want in zip(leaves, wanted[2:], strict=True) if want]
        pairs = [(w, t) for w, t in zip(weights, totals, strict=False) if w.requires_grad]
        found = iter(torch.autograd.grad([w for w, _ in pairs], needed, [t for _, t in pairs]) if needed else ())
        return (
            None, into, totals[-1] if offset is not None and wanted[1] else None,
            *(next(found) if want else None for want in wanted[2:]),
        )  # fmt: skip


def _parts(plan: Plan, tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(plan.chunks) if tensor.shape[0] else (tensor,)


def _autocast(x: Tensor, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype=dtype)
