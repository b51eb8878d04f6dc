"""Rules that find where a signal or a gradient goes wrong.

The limits are wide, so that a healthy network has no problem. By their rules, the gain of second moments is 1e-4 in the
last layer of a policy (orthogonal, gain 0.01), 1600 * 0.02^2 / 96 = 7e-3 in the residual projections of a GPT-2 of 48
layers, and the width, such as 1e3, in a last layer whose weights have variance 1 (T5).
Networks recover from a small or large layer by a norm or a residual connection. So the rules over depth ask whether the
signal stays small or large to the end. Layers whose weight is zero are left out: they are made so on purpose.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from tnlayers.layers.base import TensorLayer
from tnlayers.layers.registry import KINDS
from tnlayers.overview.moments import GRADIENT_INPUT, GRADIENT_OUTPUT, INPUT, OUTPUT, Call

DEPTH = 1e4
"""Factor of the second moment, from the first weight layer's input to the last layers' outputs, that is too much."""
GRADIENT = 1e8
"""Factor of the gradient's squared norm, from the last weight layer's output to the first layers' inputs."""
GAIN = 1e5
"""Factor of the second moment in one layer."""
KERNEL = 1e3
"""Factor of the variance of a tensor layer's kernel over its target that is a problem by itself."""
HINT = 5.0
"""The same, to be named as the cause of another problem."""
DEAD = 64
"""Number of entries that are not all zero by chance."""

Found = tuple[int, str]
"""Number of a call, and a sentence about it."""


def weighted(module: nn.Module) -> bool:
    """Return whether a module is a convolution, linear or tensor layer."""
    return isinstance(module, (*KINDS, TensorLayer))


def find(calls: Sequence[Call], names: Sequence[str], kernels: Mapping[nn.Module, float | None]) -> list[Found]:
    """Return the problems of a run. Each rule names the first call that breaks it.

    Args:
        calls: in the order of the run.
        names: of the calls.
        kernels: of tensor layers, see ``kernel_ratio``.
    """
    return list(_Rules(calls, names, kernels).found())


class _Rules:
    def __init__(self, calls: Sequence[Call], names: Sequence[str], kernels: Mapping[nn.Module, float | None]) -> None:
        self.calls, self.names, self.kernels = calls, names, kernels
        zero = {module for module in {call.module for call in calls} if _is_zero(module)}
        self.zero = zero | {module for module, ratio in kernels.items() if ratio == 0}
        self.off = {
            module: ratio
            for module, ratio in kernels.items()
            if ratio is not None and _outside(ratio, HINT) and module not in self.zero
        }
        layers = [k for k, call in enumerate(calls) if weighted(call.module) and call.module not in self.zero]
        self.layers = [k for k in layers if _square(calls[k], INPUT) and _square(calls[k], OUTPUT) is not None]

    def found(self) -> Iterator[Found]:
        """Yield the problems, forward before backward."""
        lost = [*self._not_finite()]
        yield from lost
        yield from self._kernel()
        if lost:
            return
        yield from self._gain()
        yield from self._dead()
        yield from self._depth()
        yield from self._half(OUTPUT)
        lost = [*self._not_finite_gradient()]
        yield from lost
        if not lost:
            yield from self._gradient()
            yield from self._half(GRADIENT_OUTPUT)

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
        off = {module: ratio for module, ratio in self.off.items() if _outside(ratio, KERNEL)}
        for k, call in enumerate(self.calls):
            if call.module in off:
                more = f" (other layers like this: {len(off) - 1})" if len(off) > 1 else ""
                yield k, f"{self.names[k]}: {_kernel_words(off[call.module])}{more}"
                return

    def _gain(self) -> Iterator[Found]:
        for k in self.layers:
            moments = self.calls[k].moments
            gain = self.calls[k].unbiased / moments[INPUT].square
            named = _outside(self.off.get(self.calls[k].module, 1.0), KERNEL)  # by the rule for kernels
            if gain and _outside(gain, GAIN) and not named:
                words = f"the second moment of its output without its bias is {gain:.2g} times that of its input"
                yield k, self._sentence(k, f"{words}; initialisations in use stay between {1 / GAIN:g} and {GAIN:g}")
                return

    def _dead(self) -> Iterator[Found]:
        for k, call in enumerate(self.calls):
            after, before = call.moments[OUTPUT], _square(call, INPUT)
            if not after.largest and after.entries >= DEAD and before and call.module not in self.zero:
                yield k, self._sentence(k, f"all {after.entries:,} entries of its output are zero, but not its input")
                return

    def _depth(self) -> Iterator[Found]:
        if not self.layers:
            return
        # Without biases: that of the last layer hides that its input is lost.
        start = self.calls[self.layers[0]].moments[INPUT].square
        ratios = [(k, self.calls[k].unbiased / start) for k in self.layers]
        words = (
            "from here to the last weight layer, the second moment of each output without its bias is {side} "
            "{limit:g} times that of the first weight layer's input (at the end {last:.2g} times); the signal {what}"
        )
        yield from self._run(ratios, DEPTH, words)

    def _gradient(self) -> Iterator[Found]:
        layers = [k for k in self.layers if GRADIENT_INPUT in self.calls[k].moments]
        if not layers or not _square(self.calls[layers[-1]], GRADIENT_OUTPUT):
            return
        after = self.calls[layers[-1]].moments[GRADIENT_OUTPUT]
        start = after.square * after.entries
        ratios = []
        for k in reversed(layers):
            here = self.calls[k].moments[GRADIENT_INPUT]
            ratios.append((k, here.square * here.entries / start))
        words = (
            "from here back to the first weight layer, the squared norm of each input's gradient is {side} {limit:g} "
            "times that of the last weight layer's output (at the first layer {last:.2g} times); the gradient {what}"
        )
        yield from self._run(ratios, GRADIENT, words)

    def _run(self, ratios: Sequence[tuple[int, float]], limit: float, words: str) -> Iterator[Found]:
        """Yield the start of a run of ratios outside of the limits that lasts to the end."""
        last = ratios[-1][1]
        if not _outside(last, limit):
            return
        small = last < 1
        start = ratios[-1][0]
        for k, ratio in reversed(ratios):
            if not _outside(ratio, limit) or (ratio < 1) != small:
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
        hint = hint and not any(_outside(ratio, KERNEL) for ratio in self.off.values())  # else it is said already
        for call, name in [*zip(self.calls, self.names, strict=True)][: k + 1] if hint else ():
            if call.module in self.off:
                where = "Its" if call is self.calls[k] else f"In {name}, the"
                words += f". {where} {_kernel_words(self.off[call.module]).removeprefix('its ')}"
                break
        return f"{self.names[k]}: {words}"


def _kernel_words(ratio: float) -> str:
    return (
        f"its kernel's variance is {ratio:.2g} times what its initialisation asks for; unless it was fitted or "
        "trained, reset_parameters() draws it again"
    )


def _outside(ratio: float, limit: float) -> bool:
    return not 1 / limit <= ratio <= limit


def _square(call: Call, side: str) -> float | None:
    """Return a second moment if all entries are finite."""
    here = call.moments.get(side)
    return None if here is None or here.not_finite else here.square


def _is_zero(module: nn.Module) -> bool:
    """Return whether a module's weight is zero."""
    weight = module._parameters.get("weight")
    return weight is not None and not bool(weight.any())
