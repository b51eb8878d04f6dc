"""Where the output stops depending on the input, and where the gradient stops."""

from tnlayers.overview.moments import GRADIENT_INPUT, GRADIENT_OUTPUT, INPUT, OUTPUT, Call
from tnlayers.overview.trace import Trace, square, weighted, zero_cores

Found = tuple[int, str]
"""Number of a call, and words about it."""


def forgotten(trace: Trace) -> Found | None:
    """Find a zero layer behind which everything is the same for all samples, up to the last output.

    A zero layer is none if a residual connection passes it, or if it is the last one, which learns from its own input.
    """
    start = len(trace.calls)
    while start and OUTPUT in trace.calls[start - 1].constant:
        start -= 1
    for k in range(start, len(trace.calls)):
        call = trace.calls[k]
        if call.module in trace.zero and INPUT not in call.constant and not _is_head(trace, k):
            return k, f"{zero_words(trace, k)}; the output of the model does not depend on its input"
    return None


def stopped(trace: Trace) -> tuple[int, Found | None]:
    """Find where the gradient stops on its way back to the first layer that learns.

    Returns:
        Number of the last call that no gradient reaches, and the problem. -1 and None if it reaches the first one; None
        if a zero last layer is the cause, which learns by itself.
    """
    learners = [k for k, call in enumerate(trace.calls) if _learns(call)] or [*range(len(trace.calls))]
    end = -1
    for k in learners:
        if _reached(trace.calls[k]):
            break
        end = k
    if end < 0:
        return -1, None
    front = sum(k < end for k in learners)
    front_words = f"; it and the {front} layers in front of it do not learn" if front else "; it does not learn"
    for k in range(end + 1, len(trace.calls)):
        call = trace.calls[k]
        if square(call, GRADIENT_OUTPUT) != 0 and GRADIENT_OUTPUT in call.moments:
            if square(call, GRADIENT_INPUT) != 0:
                break
            if _is_head(trace, k):
                return end, None
            words = "the gradient of its input is zero, and that of its output is not"
            if call.module in trace.zero:
                words = f"{zero_words(trace, k)}, and so is the gradient of its input"
            return end, (k, words + f"; the layers in front of it do not learn: {sum(j < k for j in learners)}")
    if GRADIENT_OUTPUT not in trace.calls[end].moments and GRADIENT_INPUT not in trace.calls[end].moments:
        words = (
            "no gradient reaches its output; unless it is to stay as it is, look behind it for detach(), no_grad() or "
            "an operation without a gradient"
        )
        return end, (end, words + front_words)
    if not any(map(_reached, trace.calls)):
        last = max(k for k, call in enumerate(trace.calls) if GRADIENT_OUTPUT in call.moments)
        return end, (last, "the gradient of its output is zero; the loss does not change with it, so nothing learns")
    return end, (end, "the gradient of its output is zero" + front_words)


def zero_words(trace: Trace, k: int) -> str:
    """Say that a layer is zero."""
    cores = zero_cores(trace.calls[k].module)
    if cores < 2:
        return "its kernel is zero" if cores else "its weight is zero"
    return f"its kernel is zero, and {cores} of its cores are, so none of its cores ever gets a gradient"


def _is_head(trace: Trace, k: int) -> bool:
    """Return whether a zero layer learns, and no other layer is behind it but such ones."""
    return all(
        call.module in trace.zero and zero_cores(call.module) < 2 and INPUT not in call.constant
        for call in trace.calls[k:]
        if weighted(call.module)
    ) and weighted(trace.calls[k].module)


def _learns(call: Call) -> bool:
    return any(weight.is_floating_point() for weight in call.module.parameters())


def _reached(call: Call) -> bool:
    return any(side in call.moments and square(call, side) != 0 for side in (GRADIENT_OUTPUT, GRADIENT_INPUT))
