"""From a trail of the search to a plan that can run: the order of every tensor's axes is settled here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from tnlayers.backend.views import LAST, view
from tnlayers.ops.contraction import Contraction
from tnlayers.ops.input_step import CONV, Meeting
from tnlayers.planning.memory import Footprint
from tnlayers.planning.options import Contractions, Pricing
from tnlayers.planning.path import Cost, Path, Trail
from tnlayers.planning.setting import Setting
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes, bits


@dataclass(frozen=True)
class Weight:
    """A tensor that ``x`` meets.

    Attributes:
        cores: which of the network's cores contract to it.
        views: the shape in which each of them is taken.
        contraction: how, its operands in the order of ``cores``.
        cost: what it is estimated to take.
    """

    cores: tuple[int, ...]
    views: tuple[tuple[int, ...], ...]
    contraction: Contraction
    cost: Cost

    @property
    def between(self) -> int:
        """How many tensors come between the cores and the last step."""
        return max(0, len(self.cores) - 2)

    def operands(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The cores as they are taken."""
        return [view(cores[k], shape) for k, shape in zip(self.cores, self.views, strict=True)]


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
        own_backward: whether the backward is not left to autograd, whose own is as good for one image or one operation,
            and costs less.
        prepad: the geometry's.
        direct: the only meeting, if it is one convolution and all there is to do.
        signature: equal for plans that build the same tensors.
        kept: for what each meeting but the last makes of x, whether it is kept for the backward or made again there.
        parts: of the batch, in which the backward goes through the meetings.
        rebuild: whether the weights are not kept either.
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
    kept: tuple[bool, ...]
    parts: int = 1
    rebuild: bool = False
    own_backward: bool = field(init=False, repr=False)
    prepad: tuple[int, ...] = field(init=False, repr=False)
    direct: Meeting | None = field(init=False, repr=False)
    signature: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prepad", self.geometry.prepad)
        alone = len(self.meetings) == 1 and self.meetings[0].plain and not self.prepad and self.tail is None
        object.__setattr__(self, "direct", self.meetings[0] if alone else None)
        many = self.setting.batch * max(meeting.folded for meeting in self.meetings)
        simple = many == 1 or (alone and self.parts == 1 and not self.meetings[0].unsafe)
        object.__setattr__(self, "own_backward", self.rebuild or not simple)
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
        return sum(weight.contraction.flops for weight in self.weights)

    def explain(self, other: "Plan | None" = None) -> str:
        """The steps in words: shapes, FLOPs, bytes, estimated share of the time; and the runner-up."""
        batch, channels = self.setting.batch, self.geometry.in_channels
        how = {"train": "training", "infer": "inference", "cached": "inference with cached weights"}[self.setting.mode]
        shape = (batch, channels, *self.setting.size)
        lines = [f"{self.strategy} plan of '{self.network}' for input {shape}, {how}: {self.flops:,} FLOPs"]
        if self.parts > 1:
            lines[0] += f", backward in {self.parts} parts of the batch to save memory"
        lines.append(f"  {'step':<52} {'FLOPs':>14} {'bytes':>12} {'time':>5}")
        total = self.seconds or 1.0
        sizes = dict(self.sizes)
        for number, (weight, meeting, cost) in enumerate(zip(self.weights, self.meetings, self.costs, strict=True)):
            steps = weight.contraction.steps if self.setting.mode != "cached" else ()
            for step in steps:
                words = f"contract {_shown(step.axes[0], sizes)} with {_shown(step.axes[1], sizes)}"
                lines.append(f"  {words:<52} {step.flops:>14,} {step.entries * self.setting.dtype.itemsize:>12,}")
            if steps:
                lines[-1] += f" {weight.cost.seconds / total:>5.0%}"
            words = f"{meeting.op} x[{_shown(meeting.left, sizes)}] with {_shown(meeting.right, sizes)}"
            if meeting.move:
                words += ", x reordered"
            if self.tail and meeting is self.meetings[-1]:
                words += ", y reordered"
            if self.setting.mode == "train" and not all(self.kept[number : number + 1]):
                words += ", made again"
            lines.append(f"  {words:<52} {cost.flops:>14,} {cost.bytes:>12,} {cost.seconds / total:>5.0%}")
        if other is not None:
            ratio = other.seconds / total
            kinds = ", ".join(meeting.kind for meeting in other.meetings)
            lines.append(f"runner-up: {other.strategy}, {other.order} ({kinds}), {ratio:.2f} times the estimated time")
            if ratio < 1:
                lines[-1] += ", too near to be trusted"
        return "\n".join(lines)

    @property
    def order(self) -> str:
        """What ``x`` meets: '0 > 1*2' is core 0, then what cores 1 and 2 contract to. A layer's strategy may be one."""
        return " > ".join("*".join(str(core) for core in weight.cores) for weight in self.weights)


def _shown(axes: Axes, sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}:{sizes[axis]}" for axis in axes)


class Thrift(NamedTuple):
    """What a plan does to save memory: the seconds that it takes, what it keeps (all, if None), and as for ``Plan``."""

    seconds: float = 0.0
    kept: tuple[bool, ...] | None = None
    parts: int = 1
    rebuild: bool = False


def assemble(pricing: Pricing, trail: Trail, thrift: Thrift = Thrift()) -> Plan:  # noqa: B008  (it is immutable)
    """A trail as a plan."""
    where = pricing.space
    weights, meetings, tail = _lay_out(pricing.contractions, trail.path)
    costs = tuple(option.cost for option in trail.options)
    kept = (True,) * (len(costs) - 1) if thrift.kept is None else thrift.kept
    sizes = tuple(zip(where.names, where.sizes, strict=True))
    return Plan(
        where.network, where.geometry, pricing.setting, weights, meetings, costs, tail, trail.seconds + thrift.seconds,
        Footprint.of(pricing, trail).peak(kept, thrift.parts), sizes, kept, thrift.parts, thrift.rebuild,
    )  # fmt: skip


_Move = tuple[tuple[int, ...], tuple[int, ...]]


@lru_cache(maxsize=4096)
def _lay_out(contractions: Contractions, options: Path) -> tuple[tuple[Weight, ...], tuple[Meeting, ...], _Move | None]:
    """Weights, meetings and tail. From the last step back to the first, the order of every tensor's axes is settled."""
    where, geometry = contractions.space, contractions.space.geometry
    sizes = dict(zip(where.names, where.sizes, strict=True))
    last = options[-1]
    after = _singles(last.after) if last.tail else where.outputs
    tail = _move(where.axes, after, where.outputs, sizes) if last.tail else None
    absorbed, states = 0, []
    for option in options:
        states.append(absorbed)
        absorbed |= option.cores
    weights: list[Weight] = []
    meetings: list[Meeting] = []
    for number in reversed(range(len(options))):
        option, roles = options[number], where.roles(states[number], options[number].cores)
        position = {axis: k for k, axis in enumerate(after)}
        parts = [sorted(_singles((part,)), key=lambda axis: position.get(axis, axis)) for part in option.before]
        before = tuple(axis for part in parts for axis in part)
        held = where.inputs if number == 0 else before
        if option.moved and number:
            held = _singles(options[number - 1].after)
        folded, groups, summed, new = where.channels(states[number], option.cores)
        if option.cores == where.all:
            outer, summed_axes = where.outputs, tuple(axis for axis in where.inputs if axis not in where.outputs)
        else:
            outer = (*(axis for axis in before if axis & roles.groups), *(axis for axis in after if axis & roles.new))
            summed_axes = tuple(axis for axis in before if axis & roles.summed)
        taps = tuple(axis for axis in where.kernel if axis & roles.kernel)
        turned = option.op == CONV and option.source == LAST
        wanted = (*outer, *(taps + summed_axes if turned else summed_axes + taps))

        def here(values: Sequence[int], otherwise: int, kernel: int = roles.kernel) -> tuple[int, ...]:
            return tuple(v if axis & kernel else otherwise for axis, v in zip(where.kernel, values, strict=True))

        pads = [0 if geometry.prepad else left for left, _ in geometry.pads]
        right = tuple(name for axis in wanted for name in where.axes(axis))
        meetings.append(
            Meeting(
                op=option.op,
                kind=option.kind,
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
                output_padding=here(geometry.each("output_padding"), 0),
                dilation=here(geometry.each("dilation"), 1),
                transposed=geometry.transposed and option.op == CONV and bool(roles.kernel),
                left=tuple(name for axis in before for name in where.axes(axis)),
                right=right,
                out=tuple(name for axis in after for name in where.axes(axis)),
            )
        )
        weights.append(_weight(contractions, option.cores, right, sizes))
        after = held
    return tuple(reversed(weights)), tuple(reversed(meetings)), tail


def _singles(parts: Sequence[int]) -> tuple[int, ...]:
    """The axes of an order one by one, those of each set by their bits."""
    return tuple(1 << k for part in parts for k in bits(part))


def _move(names: Callable[[int], Axes], have: tuple[int, ...], want: tuple[int, ...], sizes: dict[str, int]) -> _Move:
    """Sizes of the axes there are, and the permutation to those wanted."""
    return tuple(sizes[name] for axis in have for name in names(axis)), tuple(have.index(axis) for axis in want)


def _weight(contractions: Contractions, tensor: int, axes: Axes, sizes: dict[str, int]) -> Weight:
    """How some cores contract to a tensor with the given axes."""
    where = contractions.space
    cores = tuple(bits(tensor))
    operands = [where.cores[k] for k in cores]
    views = tuple(tuple(sizes[axis] for axis in core) for core in operands)
    contraction = Contraction.of(operands, contractions.pairs(tensor, cores), axes, sizes)
    return Weight(cores, views, contraction, contractions.of(tensor)[1])
