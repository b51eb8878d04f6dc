"""From a trail of the search to a plan that can run: the order of every tensor's axes is settled here."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tnlayers.contraction import Step, execute, natural, order, permutation
from tnlayers.geometry import Geometry
from tnlayers.meeting import Meeting
from tnlayers.network import TensorNetwork
from tnlayers.notation import Axes
from tnlayers.search import Cost, Search, Setting, Trail
from tnlayers.space import EXACT


@dataclass(frozen=True)
class Weight:
    """A tensor that ``x`` meets.

    Attributes:
        cores: which of the network's cores contract to it.
        views: the shape in which each of them is taken.
        steps: how, their operands numbered from 0 in the order of ``cores``.
        order: for a single core, the permutation of its axes; otherwise the last step has them in order.
        cost: what it is estimated to take.
    """

    cores: tuple[int, ...]
    views: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    order: tuple[int, ...]
    cost: Cost

    def build(self, cores: Sequence[Tensor]) -> Tensor:
        """Contract."""
        operands = [cores[k].reshape(view) for k, view in zip(self.cores, self.views, strict=True)]
        return execute(self.steps, operands) if self.steps else operands[0].permute(self.order)


@dataclass(frozen=True)
class Plan:
    """What one forward runs.

    Attributes:
        network, geometry, setting: what it was made for.
        weights: the tensors that ``x`` meets, in order.
        meetings: how, one for each of them.
        costs: what each meeting is estimated to take.
        tail: sizes and permutation of the channel axes that must be reordered at the end, or None.
        seconds: the estimate of all of it.
        peak: estimated bytes of a training step at its peak.
        signature: equal for plans that build the same tensors.
        chunks: 0, or the number of parts of the batch that the backward runs the forward of again, one by one, to
            keep nothing but the input in between.
    """

    network: TensorNetwork
    geometry: Geometry
    setting: Setting
    weights: tuple[Weight, ...]
    meetings: tuple[Meeting, ...]
    costs: tuple[Cost, ...]
    tail: tuple[tuple[int, ...], tuple[int, ...]] | None
    seconds: float
    peak: int
    sizes: tuple[tuple[str, int], ...] = field(repr=False)
    chunks: int = 0
    signature: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shapes = (f"{' '.join(meeting.right)} {meeting.weight_shape}" for meeting in self.meetings)
        object.__setattr__(self, "signature", f"{self.order}: {', '.join(shapes)}")

    @property
    def strategy(self) -> str:
        """'reconstruct' if ``x`` meets the dense kernel, else 'factorized'."""
        return "reconstruct" if len(self.weights) == 1 else "factorized"

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward, without bias; where weights are cached, without theirs."""
        return sum(cost.flops for cost in self.costs) + (0 if self.setting.mode == "cached" else self.weight_flops)

    @property
    def weight_flops(self) -> int:
        """Floating-point operations of the contractions of cores."""
        sizes = dict(self.sizes)
        return sum(step.flops(sizes) for weight in self.weights for step in weight.steps)

    def explain(self, other: "Plan | None" = None) -> str:
        """The steps in words: shapes, FLOPs, bytes, estimated share of the time; and the runner-up."""
        batch, channels = self.setting.batch, self.geometry.in_channels
        how = {"train": "training", "infer": "inference", "cached": "inference with cached weights"}[self.setting.mode]
        shape = (batch, channels, *self.setting.size)
        lines = [f"{self.strategy} plan of '{self.network}' for input {shape}, {how}: {self.flops:,} FLOPs"]
        if self.chunks:
            lines[0] += f", run again in the backward in {self.chunks} parts to save memory"
        lines.append(f"  {'step':<52} {'FLOPs':>14} {'bytes':>12} {'time':>5}")
        total = self.seconds or 1.0
        sizes = dict(self.sizes)
        for weight, meeting, cost in zip(self.weights, self.meetings, self.costs, strict=True):
            for step in weight.steps if self.setting.mode != "cached" else ():
                words = f"contract {_shown(step.axes[0], sizes)} with {_shown(step.axes[1], sizes)}"
                entries = sum(math.prod(sizes[axis] for axis in axes) for axes in step.axes)
                lines.append(f"  {words:<52} {step.flops(sizes):>14,} {entries * self.setting.dtype.itemsize:>12,}")
            if weight.steps and self.setting.mode != "cached":
                lines[-1] += f" {weight.cost.seconds / total:>5.0%}"
            words = f"{meeting.op} x[{_shown(meeting.left, sizes)}] with {_shown(meeting.right, sizes)}"
            if meeting.move:
                words += ", x reordered"
            if self.tail and meeting is self.meetings[-1]:
                words += ", y reordered"
            lines.append(f"  {words:<52} {cost.flops:>14,} {cost.bytes:>12,} {cost.seconds / total:>5.0%}")
        if other is not None:
            ratio = other.seconds / total
            kinds = ", ".join(meeting.kind for meeting in other.meetings)
            lines.append(f"runner-up: {other.strategy}, {other.order} ({kinds}), {ratio:.2f} times the estimated time")
        return "\n".join(lines)

    @property
    def order(self) -> str:
        """What ``x`` meets: '0 > 1*2' is core 0, then what cores 1 and 2 contract to. A layer's strategy may be one."""
        return " > ".join("*".join(str(core) for core in weight.cores) for weight in self.weights)


def _shown(axes: Axes, sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}:{sizes[axis]}" for axis in axes)


def assemble(search: Search, trail: Trail) -> Plan:
    """A trail as a plan. From the last step back to the first, the order of every tensor's axes is settled."""
    where, geometry, setting = search.space, search.space.geometry, search.setting
    sizes = dict(zip(where.names, where.sizes, strict=True))
    last = trail.options[-1]
    after = _singles(last.after) if last.tail else where.outputs
    tail = _move(where.axes, after, where.outputs, sizes) if last.tail else None
    absorbed, states = 0, []
    for option in trail.options:
        states.append(absorbed)
        absorbed |= option.cores
    weights: list[Weight] = []
    meetings: list[Meeting] = []
    for number in reversed(range(len(trail.options))):
        option, roles = trail.options[number], where.roles(states[number], trail.options[number].cores)
        position = {axis: k for k, axis in enumerate(after)}
        parts = [sorted(_singles((part,)), key=lambda axis: position.get(axis, axis)) for part in option.before]
        before = tuple(axis for part in parts for axis in part)
        held = where.inputs if number == 0 else before
        if option.moved and number:
            held = _singles(trail.options[number - 1].after)
        folded, groups, summed, new = where.channels(states[number], option.cores)
        if option.cores == where.all:
            wanted = (*where.outputs, *(axis for axis in where.inputs if axis not in where.outputs), *where.kernel)
        else:
            wanted = (
                *(axis for axis in before if axis & roles.groups),
                *(axis for axis in after if axis & roles.new),
                *(axis for axis in before if axis & roles.summed),
                *(axis for axis in where.kernel if axis & roles.kernel),
            )

        def here(values: Sequence[int], otherwise: int, kernel: int = roles.kernel) -> tuple[int, ...]:
            return tuple(v if axis & kernel else otherwise for axis, v in zip(where.kernel, values, strict=True))

        pads = [0 if geometry.prepad else left for left, _ in geometry.pads]
        right = tuple(name for axis in wanted for name in where.axes(axis))
        meetings.append(
            Meeting(
                op=option.op,
                source=option.source,
                target=option.target,
                move=_move(where.axes, held, before, sizes) if option.moved else None,
                folded=folded,
                groups=groups,
                summed=summed,
                new=new,
                taps=here(geometry.kernel_size, 1),
                stride=here(geometry.each("stride"), 1),
                padding=here(pads, 0),
                dilation=here(geometry.each("dilation"), 1),
                left=tuple(name for axis in before for name in where.axes(axis)),
                right=right,
                out=tuple(name for axis in after for name in where.axes(axis)),
            )
        )
        weights.append(_weight(search, option.cores, right, sizes))
        after = held
    weights.reverse()
    meetings.reverse()
    costs = tuple(option.cost for option in trail.options)
    return Plan(
        where.network, geometry, setting, tuple(weights), tuple(meetings), costs, tail, trail.seconds,
        peak(search, trail), tuple(sizes.items()),
    )  # fmt: skip


def peak(search: Search, trail: Trail) -> int:
    """Bytes that a training step takes at its peak, by estimate, if it runs nothing twice.

    The cores, their gradients and what they contract to; the input, the output and the output's gradient, which others
    hold; what the steps keep for the backward; and, where the backward is at some step, the gradients that it reads and
    writes there.
    """
    where, geometry, batch = search.space, search.space.geometry, search.setting.batch
    absorbed, between = 0, sum(search.between(option.cores) for option in trail.options)
    built = sum(where.volume(where.weight_axes(option.cores)) for option in trail.options) if between else 0
    tensors = [batch * geometry.in_channels * search.length(0)]
    for option in trail.options:
        absorbed |= option.cores
        tensors.append(batch * where.volume(where.x_axes(absorbed)) * search.length(absorbed))
    tensors[-1] = batch * geometry.out_channels * search.length(absorbed)
    x, *_, y = tensors
    steps = range(1, len(tensors))
    highest = max(sum(tensors[1:k]) + tensors[k - 1] + (tensors[k] if k < len(tensors) - 1 else 0) for k in steps)
    return search.setting.dtype.itemsize * (2 * where.network.num_params + built + between + x + 2 * y + highest)


def _singles(parts: Sequence[int]) -> tuple[int, ...]:
    """The axes of an order one by one, those of each set by their bits."""
    return tuple(1 << k for part in parts for k in range(part.bit_length()) if part >> k & 1)


def _move(
    names: Callable[[int], Axes], have: tuple[int, ...], want: tuple[int, ...], sizes: dict[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the axes there are, and the permutation to those wanted."""
    return tuple(sizes[name] for axis in have for name in names(axis)), tuple(have.index(axis) for axis in want)


def _weight(search: Search, tensor: int, axes: Axes, sizes: dict[str, int]) -> Weight:
    """How some cores contract to a tensor with the given axes."""
    where = search.space
    cost = search.contraction(tensor)[1]
    if tensor == where.all and len(where.cores) > EXACT:
        greedy = order(where.cores, axes, tuple(sizes.items()))
        views = tuple(tuple(sizes[axis] for axis in core) for core in where.cores)
        return Weight(tuple(range(len(where.cores))), views, greedy, (), cost)
    cores = tuple(k for k in range(len(where.cores)) if tensor >> k & 1)
    steps: list[Step] = []

    def contract(part: int, out: Axes | None) -> tuple[int, Axes]:
        halves, _ = search.contraction(part)
        if halves is None:
            number = part.bit_length() - 1
            return cores.index(number), where.cores[number]
        (left, left_axes), (right, right_axes) = (contract(half, None) for half in halves)
        out = out or natural(left_axes, right_axes, where.axes(where.weight_axes(part)))
        steps.append(Step(left, right, (left_axes, right_axes, out)))
        return len(cores) + len(steps) - 1, out

    _, have = contract(tensor, axes)
    return Weight(
        cores,
        tuple(tuple(sizes[axis] for axis in where.cores[k]) for k in cores),
        tuple(steps),
        () if steps else permutation(have, axes),
        cost,
    )
