"""Construction of an executable plan from a path of the search. It fixes the order of every tensor's axes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from tnlayers.backend.moves import moved, needed, permute, reshape
from tnlayers.backend.views import LAST, view
from tnlayers.ops.contraction import Contraction
from tnlayers.ops.input_step import CONV, MATMUL, InputStep
from tnlayers.planning.core_contractions import Contractions
from tnlayers.planning.memory import MemoryEstimate
from tnlayers.planning.options import Pricing
from tnlayers.planning.path import Cost, Path, PathSteps
from tnlayers.planning.search_space import CoreMask
from tnlayers.planning.setting import Setting
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes, bits
from tnlayers.text_tables import Shown, page


@dataclass(frozen=True)
class StepWeight:
    """Weight of an input step.

    Attributes:
        cores: numbers of the cores that contract to it.
        views: shape in which each of them is viewed.
        contraction: contraction with its operands in the order of ``cores``.
        cost: estimated cost of the contraction.
    """

    cores: tuple[int, ...]
    views: tuple[tuple[int, ...], ...]
    contraction: Contraction
    cost: Cost

    @property
    def between(self) -> int:
        """Number of intermediate results of the contraction."""
        return max(0, len(self.cores) - 2)

    def operands(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Return the cores in the shapes ``views``."""
        return [view(cores[k], shape) for k, shape in zip(self.cores, self.views, strict=True)]


@dataclass(frozen=True)
class Plan:
    """The operations of one forward and its backward.

    Attributes:
        network, geometry, setting: what the plan is for.
        weights: the weight of each step, in order.
        steps: the operation of each step, which contracts the input with the weight to the next input.
        costs: the estimated cost of each step.
        tail: sizes and permutation for a reorder of the channel axes at the end, or None.
        seconds: estimated total time.
        peak: estimated peak bytes of a training step.
        own_backward: whether the plan has its own backward. For one image or one operation, autograd's is as good and
            costs less.
        prepad: as in the geometry.
        prepared: functions that return the weight of each step from the cores.
        direct: the only step, if it is one convolution and nothing comes before or after it.
        signature: equal for plans that build the same weights.
        saved: whether the result of each step but the last is saved for the backward, or computed again there.
        chunks: number of parts of the batch that the backward computes one after the other.
        rebuild_weights: whether the backward builds the weights again.
    """

    network: TensorNetwork
    geometry: Geometry
    setting: Setting
    weights: tuple[StepWeight, ...]
    steps: tuple[InputStep, ...]
    costs: tuple[Cost, ...]
    tail: tuple[tuple[int, ...], tuple[int, ...]] | None
    seconds: float
    peak: int
    sizes: tuple[tuple[str, int], ...] = field(repr=False)
    saved: tuple[bool, ...]
    chunks: int = 1
    rebuild_weights: bool = False
    own_backward: bool = field(init=False, repr=False)
    prepad: tuple[int, ...] = field(init=False, repr=False)
    direct: InputStep | None = field(init=False, repr=False)
    prepared: tuple[Callable[[Sequence[Tensor]], Tensor], ...] = field(init=False, repr=False, compare=False)
    signature: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prepad", self.geometry.prepad)
        alone = len(self.steps) == 1 and self.steps[0].plain and not self.prepad and self.tail is None
        object.__setattr__(self, "direct", self.steps[0] if alone else None)
        # Autograd forms the gradient of a product's weight once for each image.
        images = self.setting.batch * max((step.folded for step in self.steps if step.op == MATMUL), default=1)
        simple = images == 1 or (alone and self.chunks == 1 and not self.steps[0].unsafe)
        object.__setattr__(self, "own_backward", self.rebuild_weights or not simple)
        pairs = zip(self.weights, self.steps, strict=True)
        object.__setattr__(self, "prepared", tuple(_preparation(self.network, *pair) for pair in pairs))
        shapes = (f"{' '.join(step.right)} {step.weight_shape}" for step in self.steps)
        object.__setattr__(self, "signature", f"{self.order}: {', '.join(shapes)}")

    @property
    def strategy(self) -> str:
        """'reconstruct' if the only weight is the dense kernel, else 'factorized'."""
        return "reconstruct" if len(self.weights) == 1 else "factorized"

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward, without bias, and without contractions if weights are cached."""
        return sum(cost.flops for cost in self.costs) + (0 if self.setting.mode == "cached" else self.weight_flops)

    @property
    def weight_flops(self) -> int:
        """Floating-point operations of the contractions of cores."""
        return sum(weight.contraction.flops for weight in self.weights)

    def explain(self, other: "Plan | None" = None, rates: str = "", tuned: str = "") -> Shown:
        """Describe each step by shapes, FLOPs, bytes and estimated share of the time; the runner-up; the rate table.

        With ``tuned``, the date when the order was timed, the last line says so.
        """
        batch, channels = self.setting.batch, self.geometry.in_channels
        how = {"train": "training", "infer": "inference", "cached": "inference with cached weights"}[self.setting.mode]
        shape = (batch, channels, *self.setting.size)
        head = f"{self.strategy} plan of '{self.network}' for input {shape}, {how}: {self.flops:,} FLOPs"
        if self.chunks > 1:
            head += f", backward in {self.chunks} parts of the batch to save memory"
        below = []
        if other is not None:
            ratio = other.seconds / (self.seconds or 1.0)
            kinds = ", ".join(step.kind for step in other.steps)
            below = [f"runner-up: {other.strategy}, {other.order} ({kinds}), {ratio:.2f} times the estimated time"]
            if ratio < 1 and not tuned:
                below[0] += ", too near to be trusted"
        if rates:
            below.append(f"rates: {rates}{f'; order tuned {tuned}' if tuned else ''}")
        rows = [("step", "FLOPs", "bytes", "time"), *self._rows()]
        lines = [f"  {step:<52} {flops:>14} {size:>12} {time:>5}".rstrip() for step, flops, size, time in rows]
        return Shown("\n".join([head, *lines, *below]), page(rows, head, range(1, 4), below))

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """Return the cells of ``explain``: step, FLOPs, bytes and share of the time."""
        total, sizes = self.seconds or 1.0, dict(self.sizes)
        rows = []
        for number, (weight, step, cost) in enumerate(zip(self.weights, self.steps, self.costs, strict=True)):
            products = weight.contraction.steps if self.setting.mode != "cached" else ()
            for each in products:
                words = f"contract {_shown(each.axes[0], sizes)} with {_shown(each.axes[1], sizes)}"
                time = f"{weight.cost.seconds / total:.0%}" if each is products[-1] else ""
                rows.append((words, f"{each.flops:,}", f"{each.entries * self.setting.dtype.itemsize:,}", time))
            words = f"{step.op} x[{_shown(step.left, sizes)}] with {_shown(step.right, sizes)}"
            if step.move:
                words += ", x reordered"
            if self.tail and step is self.steps[-1]:
                words += ", y reordered"
            if self.setting.mode == "train" and not all(self.saved[number : number + 1]):
                words += ", made again"
            rows.append((words, f"{cost.flops:,}", f"{cost.bytes:,}", f"{cost.seconds / total:.0%}"))
        return rows

    @property
    def order(self) -> str:
        """Cores of each input step; valid as a strategy. '0 > 1*2': core 0, then the contraction of cores 1 and 2."""
        return " > ".join("*".join(str(core) for core in weight.cores) for weight in self.weights)


def _preparation(network: TensorNetwork, weight: StepWeight, step: InputStep) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the function from the cores to the weight of a step. One core alone is only viewed or copied."""
    contraction = weight.contraction
    if contraction.steps:
        return lambda cores: step.prepare_weight(contraction(weight.operands(cores)))
    (core,), (shape,) = weight.cores, weight.views
    moves = reshape(shape), permute(contraction.order), reshape(step.weight_shape), *step.weight_moves
    chain = needed(network.core_shapes[core], moves)
    return lambda cores: moved(cores[core], chain)


def _shown(axes: Axes, sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}:{sizes[axis]}" for axis in axes)


class Recompute(NamedTuple):
    """Recomputation of a plan to save memory.

    Attributes:
        seconds: time of the recomputation.
        saved, chunks, rebuild_weights: as of ``Plan``; ``saved`` is None if all results are.
    """

    seconds: float = 0.0
    saved: tuple[bool, ...] | None = None
    chunks: int = 1
    rebuild_weights: bool = False


def build_plan(pricing: Pricing, path: Path, recompute: Recompute = Recompute()) -> Plan:  # noqa: B008  (it is immutable)
    """Return the plan of a path."""
    space = pricing.space
    weights, steps, tail = _lay_out(pricing.contractions, path.path)
    costs = tuple(option.cost for option in path.options)
    saved = (True,) * (len(costs) - 1) if recompute.saved is None else recompute.saved
    sizes = tuple(zip(space.names, space.sizes, strict=True))
    return Plan(
        space.network, space.geometry, pricing.setting, weights, steps, costs, tail, path.seconds + recompute.seconds,
        MemoryEstimate.of(pricing, path).peak(saved, recompute.chunks), sizes, saved, recompute.chunks,
        recompute.rebuild_weights,
    )  # fmt: skip


_Move = tuple[tuple[int, ...], tuple[int, ...]]


@lru_cache(maxsize=4096)
def _lay_out(
    contractions: Contractions, options: PathSteps
) -> tuple[tuple[StepWeight, ...], tuple[InputStep, ...], _Move | None]:
    """Return weights, steps and tail. The order of axes is fixed for the last step first, then backwards."""
    space, geometry = contractions.space, contractions.space.geometry
    sizes = dict(zip(space.names, space.sizes, strict=True))
    last = options[-1]
    after = _singles(last.after) if last.tail else space.outputs
    tail = _move(space.axes, after, space.outputs, sizes) if last.tail else None
    absorbed, states = 0, []
    for option in options:
        states.append(absorbed)
        absorbed |= option.cores
    weights: list[StepWeight] = []
    steps: list[InputStep] = []
    for number in reversed(range(len(options))):
        option, roles = options[number], space.roles(states[number], options[number].cores)
        position = {axis: k for k, axis in enumerate(after)}
        chunks = [sorted(_singles((part,)), key=lambda axis: position.get(axis, axis)) for part in option.before]
        before = tuple(axis for part in chunks for axis in part)
        held = space.inputs if number == 0 else before
        if option.moved and number:
            held = _singles(options[number - 1].after)
        folded, groups, summed, new = space.channels(states[number], option.cores)
        if option.cores == space.all:
            outer, summed_axes = space.outputs, tuple(axis for axis in space.inputs if axis not in space.outputs)
        else:
            outer = (*(axis for axis in before if axis & roles.groups), *(axis for axis in after if axis & roles.new))
            summed_axes = tuple(axis for axis in before if axis & roles.summed)
        taps = tuple(axis for axis in space.kernel if axis & roles.kernel)
        turned = option.op == CONV and option.source == LAST
        wanted = (*outer, *(taps + summed_axes if turned else summed_axes + taps))

        def here(values: Sequence[int], otherwise: int, kernel: int = roles.kernel) -> tuple[int, ...]:
            return tuple(v if axis & kernel else otherwise for axis, v in zip(space.kernel, values, strict=True))

        pads = [0 if geometry.prepad else left for left, _ in geometry.pads]
        right = tuple(name for axis in wanted for name in space.axes(axis))
        steps.append(
            InputStep(
                op=option.op,
                kind=option.kind,
                source=option.source,
                target=option.target,
                move=_move(space.axes, held, before, sizes) if option.moved else None,
                folded=folded,
                groups=groups,
                summed=summed,
                new=new,
                taps=here(geometry.kernel_size, 1),
                stride=here(geometry.each("stride"), 1),
                padding=here(pads, 0),
                output_padding=here(geometry.each("output_padding"), 0),
                dilation=here(geometry.each("dilation"), 1),
                transposed=geometry.transposed and option.op == CONV and bool(roles.kernel),
                left=tuple(name for axis in before for name in space.axes(axis)),
                right=right,
                out=tuple(name for axis in after for name in space.axes(axis)),
            )
        )
        weights.append(_weight(contractions, option.cores, right, sizes))
        after = held
    return tuple(reversed(weights)), tuple(reversed(steps)), tail


def _singles(chunks: Sequence[int]) -> tuple[int, ...]:
    """Return the axes of an order one by one, those of each set in the order of bits."""
    return tuple(1 << k for part in chunks for k in bits(part))


def _move(names: Callable[[int], Axes], have: tuple[int, ...], want: tuple[int, ...], sizes: dict[str, int]) -> _Move:
    """Return the sizes of the axes ``have``, and their permutation to ``want``."""
    return tuple(sizes[name] for axis in have for name in names(axis)), tuple(have.index(axis) for axis in want)


def _weight(contractions: Contractions, tensor: CoreMask, axes: Axes, sizes: dict[str, int]) -> StepWeight:
    """Return the weight that some cores contract to, with axes in the given order."""
    cores = tuple(bits(tensor))
    operands = [contractions.space.cores[k] for k in cores]
    views = tuple(tuple(sizes[axis] for axis in core) for core in operands)
    contraction = Contraction.of(operands, contractions.pairs(tensor, cores), axes, sizes)
    return StepWeight(cores, views, contraction, contractions.of(tensor)[1])
