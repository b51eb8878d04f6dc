"""Rules that find where a signal or a gradient goes wrong.

The limits are wide, so that a healthy network has no problem. By their rules, the gain of second moments is 1e-4 in the
last layer of a policy (orthogonal, gain 0.01), 1e-3 in that of another (uniform within 3e-3, 300 inputs),
1600 * 0.02^2 / 96 = 7e-3 in the residual projections of a GPT-2 of 48 layers, and the width, such as 1e3, in a last
layer whose weights have variance 1 (T5).

Networks recover from a small or large layer by a norm or a residual connection. So the rules over depth ask whether the
signal stays small or large to the end, and the input of the last weight layer, too: its output may be small on purpose.
Without norms and biases, the scale of the input passes to the output, so only the gain between them counts, not
whether pixels are 0..1 or 0..255. Norms, embeddings and biases set a scale of their own, and the rules start anew
behind them (``depth.py``). The gradient of an input of a large scale is small; so it also has to be small after it is
multiplied by that scale.

Layers whose weight is zero are left out, since residual branches and last layers are made so on purpose. They are named
where the output does not depend on the input, no gradient passes them, or they cannot learn (``stops.py``).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from tnlayers.overview.depth import drifts, gradient_steps, signal_steps
from tnlayers.overview.moments import GRADIENT_INPUT, GRADIENT_OUTPUT, INPUT, OUTPUT, Call
from tnlayers.overview.stops import forgotten, stopped, zero_words
from tnlayers.overview.trace import Trace, outside, square, zero_cores

DEPTH = 1e4
"""Factor of the second moment, from the first weight layer's input (or the latest place that set a scale) to the last
layers' outputs, that is too much."""
GRADIENT = 1e8
"""Factor of the gradient's squared norm, from the last weight layer's output to the first layers' inputs."""
GAIN = 1e5
"""Factor of the second moment in one layer. The last layer, and others on its input, may be smaller, down to
one over the square."""
KERNEL = 1e3
"""Factor of the variance of a tensor layer's kernel over its target that is a problem by itself."""
HINT = 5.0
"""The same, to be named as the cause of another problem."""
DRIFT = 2.0, 5, 1e3
"""The same, of each of so many tensor layers or more, without a norm in between, all to the same side, and of the
product of their ratios. Cores drawn one by one are off in this way in every layer. Training changes some kernels more
and some less, or to both sides; where it shrinks all, norms stand in between."""
DEAD = 64
"""Number of entries that are not all zero by chance."""

Found = tuple[int, str]
"""Number of a call, and a sentence about it."""


def find(
    calls: Sequence[Call],
    names: Sequence[str],
    kernels: Mapping[nn.Module, float | None],
    loss: float | None = None,
) -> list[Found]:
    """Return the problems of a run. Each rule names the first call that breaks it.

    Args:
        calls: in the order of the run.
        names: of the calls.
        kernels: of tensor layers, see ``kernel_ratio``.
        loss: its value.
    """
    return list(_Rules(Trace(calls, names, kernels, loss, HINT)).found())


class _Rules:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.calls, self.names, self.layers = trace.calls, trace.names, trace.layers
        self.zero, self.off = trace.zero, trace.off

    def found(self) -> Iterator[Found]:
        """Yield the problems, forward before backward."""
        lost = [*self._not_finite()]
        no_loss = [] if lost else [*self._loss()]
        yield from no_loss
        yield from lost
        yield from self._kernel()
        if lost:
            return
        zero = [*self._zero()]
        yield from zero
        yield from self._gain()
        yield from self._dead()
        depth = [*self._depth()]
        fresh = [k for k, call in enumerate(self.calls) if _normalises_nothing(call.module)]
        if depth and fresh:
            yield self._fresh(fresh)
        else:
            yield from depth or self._drift()
        yield from self._half(OUTPUT)
        if no_loss or self.trace.loss is None:
            return
        lost = [*self._not_finite_gradient()]
        yield from lost
        if not lost:
            gradient = [*self._gradient([k for k, _ in zero])]
            if not fresh:
                yield from gradient
            elif gradient and not depth:
                yield self._fresh(fresh)
            yield from self._half(GRADIENT_OUTPUT)

    def _fresh(self, calls: list[int]) -> Found:
        """Name new batch norms in eval mode as the cause of a signal or gradient that vanishes or explodes."""
        first, count = calls[0], len(calls)
        words = f"it and {count - 1} more batch norms" if count > 1 else "this batch norm"
        return first, (
            f"{self.names[first]}: {words} ran in eval mode before any batch in training mode, so that they normalise "
            "nothing, and the signal or its gradient vanishes or explodes; run a new model in training mode"
        )

    def _loss(self) -> Iterator[Found]:
        value = self.trace.loss
        if value is not None and not abs(value) < float("inf"):
            words = "NaN" if value != value else "infinite"  # noqa: PLR0124
            last = len(self.calls) - 1
            yield last, f"the loss is {words}, and all outputs up to that of {self.names[last]} are finite"

    def _zero(self) -> Iterator[Found]:
        """Yield the first layer that cannot learn since cores are zero, and the one that the output ends at."""
        dead = [k for k, call in enumerate(self.calls) if zero_cores(call.module) > 1]
        for k in dead[:1]:
            others = len({self.calls[j].module for j in dead}) - 1
            more = f" (other layers like this: {others})" if others else ""
            yield k, self._sentence(k, f"{zero_words(self.trace, k)}{more}; reset_parameters() draws them again")
        found = forgotten(self.trace)
        if found is not None and found[0] not in dead:
            yield found[0], self._sentence(*found)

    def _not_finite(self) -> Iterator[Found]:
        for k, call in enumerate(self.calls):
            after, before = call.moments[OUTPUT], call.moments.get(INPUT)
            if after.not_finite:
                sides = (before, "input") if before is not None and before.not_finite else (after, "output")
                words = f"{self._count(*sides)} are NaN or infinite"
                if sides[1] == "input":
                    words += ", before the layer has run"
                elif not all(bool(weight.isfinite().all()) for weight in call.module.parameters()):
                    words += ", and so are some of its parameters"
                elif call.dtype == torch.float16:
                    words += "; float16 ends at 65,504"
                yield k, self._sentence(k, words)
                return

    def _not_finite_gradient(self) -> Iterator[Found]:
        for k, call in reversed([*enumerate(self.calls)]):
            for side, words in ((GRADIENT_OUTPUT, "gradient of its output"), (GRADIENT_INPUT, "gradient of its input")):
                here = call.moments.get(side)
                if here is not None and here.not_finite:
                    yield k, self._sentence(k, f"{self._count(here, words)} are NaN or infinite", hint=False)
                    return

    def _kernel(self) -> Iterator[Found]:
        off = {module: ratio for module, ratio in self.off.items() if outside(ratio, KERNEL)}
        for k, call in enumerate(self.calls):
            if call.module in off:
                more = f" (other layers like this: {len(off) - 1})" if len(off) > 1 else ""
                yield k, f"{self.names[k]}: {_kernel_words(off[call.module])}{more}"
                return

    def _gain(self) -> Iterator[Found]:
        for k in self.layers:
            moments = self.calls[k].moments
            gain = self.calls[k].unbiased / moments[INPUT].square
            named = outside(self.off.get(self.calls[k].module, 1.0), KERNEL)  # by the rule for kernels
            # The last layers, or heads on one input, may be small.
            head = moments[INPUT] == self.calls[self.layers[-1]].moments[INPUT]
            limit = GAIN**2 if head and gain < 1 else GAIN
            if gain and outside(gain, limit) and not named:
                words = f"the second moment of its output without its bias is {gain:.2g} times that of its input"
                yield k, self._sentence(k, f"{words}; initialisations in use stay between {1 / limit:g} and {GAIN:g}")
                return

    def _dead(self) -> Iterator[Found]:
        for k, call in enumerate(self.calls):
            after, before = call.moments[OUTPUT], square(call, INPUT)
            if not after.largest and after.entries >= DEAD and before and call.module not in self.zero:
                yield k, self._sentence(k, f"all {after.entries:,} entries of its output are zero, but not its input")
                return

    def _depth(self) -> Iterator[Found]:
        steps = [*signal_steps(self.trace)]
        # Without biases: that of the last layer hides that its input is lost.
        ratios = [(step.call, step.leaving) for step in steps]
        if not steps or (ratios[-1][1] < 1 and not outside(steps[-1].entering, DEPTH)):
            return
        words = (
            "from here to the last weight layer, the second moment of each output without its bias is {side} "
            f"{{limit:g}} times that of {steps[-1].reference.replace('{', '{{').replace('}', '}}')} "
            "(at the end {last:.2g} times); the signal {what}"
        )
        yield from self._run(ratios, DEPTH, words)

    def _drift(self) -> Iterator[Found]:
        """Yield tensor layers that are not far off each, but all together, if no other rule has named their kernels."""
        if any(outside(ratio, KERNEL) for ratio in self.off.values()):
            return
        for k, ratios in drifts(self.trace, *DRIFT):
            product = 1.0
            for ratio in ratios:
                product *= ratio
            words = (
                f"from here on, the variances of {len(ratios)} tensor layers' kernels are {min(ratios):.2g} to "
                f"{max(ratios):.2g} times what their initialisations ask for, {product:.1g} times together, and no "
                "norm is in between; unless they were fitted or trained, reset_parameters() draws them again"
            )
            yield k, self._sentence(k, words, hint=False)
            return

    def _gradient(self, named: Sequence[int]) -> Iterator[Found]:
        """Yield where the gradient vanishes, explodes or stops. ``named``: layers that are zero."""
        end, stop = stopped(self.trace)
        ratios, scaled = gradient_steps(self.trace, end)
        words = (
            "from here back to the first weight layer{end}, the squared norm of each input's gradient is {{side}} "
            "{{limit:g}} times that of the last weight layer's output (at the first layer {{last:.2g}} times); "
            "the gradient {{what}}"
        ).format(end=" that it reaches" if end >= 0 else "")
        found: list[Found] = []
        if ratios and outside(scaled, GRADIENT) and (scaled < 1) == (ratios[-1][1] < 1):
            found = [*self._run(ratios, GRADIENT, words)]
        yield from found
        # Behind a zero layer that ends the signal, activations may stop the gradient, too.
        lost = OUTPUT in self.calls[-1].constant and stop is not None and any(k <= stop[0] for k in named)
        if stop is not None and not found and stop[0] not in named and not lost:
            yield stop[0], self._sentence(*stop, hint=False)

    def _run(self, ratios: Sequence[tuple[int, float]], limit: float, words: str) -> Iterator[Found]:
        """Yield the start of a run of ratios outside of the limits that lasts to the end."""
        last = ratios[-1][1]
        if not outside(last, limit):
            return
        small = last < 1
        start = ratios[-1][0]
        for k, ratio in reversed(ratios):
            if not outside(ratio, limit) or (ratio < 1) != small:
                break
            start = k
        side, what = ("below", "vanishes") if small else ("above", "explodes")
        words = words.format(side=side, limit=1 / limit if small else limit, last=last, what=what)
        yield start, self._sentence(start, words)

    def _half(self, side: str) -> Iterator[Found]:
        """Yield the first float16 tensor that is near an end of its range."""
        what = "output" if side == OUTPUT else "output's gradient"
        info = torch.finfo(torch.float16)
        for k, call in enumerate(self.calls):
            here = call.moments.get(side)
            if here is None or call.dtype != torch.float16 or not here.largest:
                continue
            if here.largest > info.max / 2:
                words = f"the largest entry of its {what} is {here.largest:,.0f}; float16 ends at {info.max:,.0f}"
            elif here.square < info.tiny**2:
                words = (
                    f"the root mean square of its {what} is {here.square**0.5:.2g}, below float16's smallest normal "
                    f"number, {info.tiny:.2g}; smaller ones lose digits, and below 6e-08 they are zero"
                )
                words += "; multiply the loss, as torch.amp.GradScaler does" if side == GRADIENT_OUTPUT else ""
            else:
                continue
            yield k, self._sentence(k, words, hint=side == OUTPUT)
            return

    def _count(self, here: object, what: str) -> str:
        lost, entries = getattr(here, "not_finite", 0), getattr(here, "entries", 0)
        return f"{lost:,} of the {entries:,} entries of {'the' if what.startswith('gradient') else 'its'} {what}"

    def _sentence(self, k: int, words: str, hint: bool = True) -> str:
        """Return a sentence with the first kernel up to here that is off and may be the cause."""
        hint = hint and not any(outside(ratio, KERNEL) for ratio in self.off.values())  # else it is said already
        for call, name in [*zip(self.calls, self.names, strict=True)][: k + 1] if hint else ():
            if call.module in self.off:
                where = "Its" if call is self.calls[k] else f"In {name}, the"
                words += f". {where} {_kernel_words(self.off[call.module]).removeprefix('its ')}"
                break
        return f"{self.names[k]}: {words}"


def _normalises_nothing(module: nn.Module) -> bool:
    """Return whether a batch norm in eval mode has statistics that no batch has changed."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.training:
        return False
    mean, var = module.running_mean, module.running_var
    return mean is not None and var is not None and not bool(mean.any()) and bool((var == 1).all())


def _kernel_words(ratio: float) -> str:
    return (
        f"its kernel's variance is {ratio:.2g} times what its initialisation asks for; unless it was fitted or "
        "trained, reset_parameters() draws it again"
    )
