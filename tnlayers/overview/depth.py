"""How a signal and its gradient change over depth, and where the signal gets a scale that its input does not set.

A normalisation resets the scale of a signal, and so does a bias that outweighs it. Behind such a place, the earlier
scale says nothing, so the reference starts anew. The places are found by what they do, since users write norms of their
own, and models call ``F.layer_norm`` between modules. Values of order one are healthy whatever the input was, so a
reference may start anew at one of them without harm: it loses a factor of ORDER at most. In a network with biases, the
scale of the input is no fixed measure either: large values that get smaller do not vanish before they are below one,
and small ones that grow do not explode before they are above.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from tnlayers.layers.base import TensorLayer
from tnlayers.overview.moments import GRADIENT_INPUT, GRADIENT_OUTPUT, INPUT, OUTPUT, Call
from tnlayers.overview.trace import Trace, outside, square, weighted

ORDER = 10.0
"""Factor from 1 within which a second moment is of order one."""
WIDE = 1e4
"""The same, for places that set a scale by their own weights: norms with small weights, biases."""
JUMP = 4.0
"""Factor of the second moment from a weight layer's output to the next one's input that activations and dropout keep
to. A larger one may be a norm."""


class Step(NamedTuple):
    """A weight layer's place in the signal.

    Attributes:
        call: its number.
        entering: second moment of its input over the reference.
        leaving: second moment of its output without the bias over the reference.
        reference: the tensor that the reference is of.
        segment: number of scales that norms have set up to here.
    """

    call: int
    entering: float
    leaving: float
    reference: str
    segment: int


def signal_steps(trace: Trace) -> Iterator[Step]:
    """Yield the weight layers with their moments over those of the latest place that has set the scale."""
    reference, of, segment, biased = 0.0, "", 0, False
    layers, before = set(trace.layers), None
    for k, call in enumerate(trace.calls):
        given, found = square(call, INPUT), square(call, OUTPUT)
        if k in layers and given is not None and found is not None:
            jumped = _jumps(before, given) and not outside(given, ORDER)
            if not reference:
                reference, of = given, "the first weight layer's input"
            elif jumped or (biased and _nearer_to_one(given, reference)):
                reference, of = given, f"the input of {trace.names[k]}"
                segment += jumped
            yield Step(k, given / reference, call.unbiased / reference, of, segment)
            biased |= _has_bias(call)
            before = found
            if found > JUMP * call.unbiased and not outside(found, WIDE):
                reference, of = found, f"the output of {trace.names[k]}, which its bias makes,"
        elif reference and found and not weighted(call.module) and _sets_scale(call, given, found):
            reference, of, segment = found, f"the output of {trace.names[k]}", segment + 1
        if reference and call.norm and _is_scale(before, call.norm):
            reference, of, segment = call.norm, f"the output of the norm of {trace.names[k]}", segment + 1


def gradient_steps(trace: Trace, behind: int = -1) -> tuple[list[tuple[int, float]], float]:
    """Return the gradients of the weight layers' inputs, from last to first.

    Args:
        trace: the run.
        behind: number of the last call that no gradient reaches.

    Returns:
        Numbers of calls, with squared norms over that of the last weight layer's output; and the last of them,
        multiplied by the ratio of the second moments of the two signals, nearer to 1. This one does not depend on the
        scale of the input: behind a norm, the gradient shrinks as the input grows, and the step of the weights does
        not. At the first layer, the signal is its input or, if a bias outweighs that, its output.
    """
    layers = [k for k in trace.layers if k > behind and GRADIENT_INPUT in trace.calls[k].moments]
    while layers and not square(trace.calls[layers[-1]], GRADIENT_OUTPUT):
        layers.pop()
    if not layers:
        return [], 1.0
    end = trace.calls[layers[-1]].moments
    start = end[GRADIENT_OUTPUT].square * end[GRADIENT_OUTPUT].entries
    ratios = []
    for k in reversed(layers):
        here = trace.calls[k].moments[GRADIENT_INPUT]
        ratios.append((k, here.square * here.entries / start))
    last = ratios[-1][1]
    signals = [square(trace.calls[layers[0]], side) or 0.0 for side in (INPUT, OUTPUT)]
    return ratios, last * (max(signals) if last < 1 else min(signals)) / (end[OUTPUT].square or 1.0)


def drifts(trace: Trace, factor: float, number: int, limit: float) -> Iterator[tuple[int, list[float]]]:
    """Yield tensor layers without a norm in between whose kernels are all off to the same side.

    Args:
        trace: the run.
        factor: each kernel's variance is off by more.
        number: least number of layers.
        limit: the product of their ratios is off by more.

    Yields:
        Number of the first layer's call, and the ratios of the kernels.
    """
    segments: dict[int, dict[TensorLayer, int]] = {}
    for step in signal_steps(trace):
        module = trace.calls[step.call].module
        if isinstance(module, TensorLayer):
            segments.setdefault(step.segment, {}).setdefault(module, step.call)
    for found in segments.values():
        ratios = [trace.kernels.get(module) or 1.0 for module in found]
        same = all(ratio < 1 / factor for ratio in ratios) or all(ratio > factor for ratio in ratios)
        product = 1.0
        for ratio in ratios:
            product *= ratio
        if len(ratios) >= number and same and outside(product, limit):
            yield min(found.values()), ratios


def _sets_scale(call: Call, given: float | None, found: float) -> bool:
    """Return whether a module that is no weight layer sets the scale of its output: embeddings and norms do.

    What others do shows at the next weight layer's input: a gate's output, say, is no signal that layers pass on.
    """
    if given is None:
        return any(True for _ in call.module.parameters())  # its input holds indices
    return "norm" in type(call.module).__name__.lower() and _is_scale(given, found)


def _is_scale(before: float | None, found: float) -> bool:
    """Return whether a norm's output may be a scale of its own: untrained batch norms in eval mode pass theirs on."""
    return not outside(found, ORDER) or (_jumps(before, found) and not outside(found, WIDE))


def _nearer_to_one(value: float, reference: float) -> bool:
    return not outside(value, ORDER) or reference > value > 1 or reference < value < 1


def _jumps(before: float | None, after: float) -> bool:
    return bool(before) and before is not None and outside(after / before, JUMP)


def _has_bias(call: Call) -> bool:
    bias = getattr(call.module, "bias", None)
    return isinstance(bias, torch.Tensor) and bool(bias.any())
