"""How a layer runs: a plan of pairwise steps over the input and the cores, and its execution in torch.

The input ``x`` is an operand like the cores: its axes are the batch, the network's input axes and, for every spatial
axis, the kernel axis that it is convolved with. There is one kind of step: two operands meet, and of their axes those
that nobody else needs are summed. Between two cores that is a small contraction of weights, independent of the batch.
Where ``x`` meets a tensor with kernel axes it is a convolution: axes of ``x`` alone fold into the batch, shared axes
that are needed later become groups, shared axes that are finished are the convolution's input channels, new axes its
output channels, and a kernel axis ``h`` brings its stride, padding and dilation along and leaves the output position
``h'``. Reconstruction lets all cores meet first, to the dense kernel, and ``x`` then meets that in the same step as
any other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers import errors
from tnlayers.contraction import Step, execute, order, own_precision, permutation, place_in, place_out
from tnlayers.geometry import Geometry
from tnlayers.network import TensorNetwork
from tnlayers.notation import Axes

STRATEGIES = ("auto", "reconstruct", "factorized")

# Axes that no user can name, since a name is letters and digits: batch, group, and the dense kernel's channels.
BATCH, GROUP, IN, OUT = "(batch)", "(group)", "(in)", "(out)"

_CONV: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.conv1d, 2: F.conv2d, 3: F.conv3d})
_NOMINAL = 16
"""Spatial size for which factorised steps are ordered."""


@dataclass(frozen=True)
class Convolution:
    """A step with kernel axes as one grouped convolution; all is fixed beforehand but the batch and the positions.

    Attributes:
        x_order, w_order, y_order: permutations of the axes of the input, of the weight and of the result.
        folded, channels: what the axes between batch and positions become, in the batch and as channels.
        w_shape: shape of the weight.
        y_shape: shape of the result between batch and positions, before it is permuted.
        stride, padding, dilation, groups: of the convolution.
    """

    x_order: tuple[int, ...]
    w_order: tuple[int, ...]
    y_order: tuple[int, ...]
    folded: int
    channels: int
    w_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, step: Step, geometry: Geometry, kernel: Axes, sizes: Mapping[str, int]) -> "Convolution":
        """Sort the axes of a step into folded, groups, summed and new ones."""
        x_axes, w_axes, out = step.axes
        inner, places = x_axes[1 : -geometry.ndim], x_axes[-geometry.ndim :]
        folded = tuple(axis for axis in inner if axis not in w_axes)
        groups = tuple(axis for axis in inner if axis in w_axes and axis in out)
        summed = tuple(axis for axis in inner if axis in w_axes and axis not in out)
        new = tuple(axis for axis in w_axes if axis not in inner + step.kernel)

        def size(axes: Axes) -> int:
            return math.prod(sizes[axis] for axis in axes)

        def here(values: Sequence[int], otherwise: int) -> tuple[int, ...]:
            return tuple(v if axis in step.kernel else otherwise for axis, v in zip(kernel, values, strict=True))

        found = (BATCH, *folded, *groups, *new, *out[-geometry.ndim :])
        return cls(
            x_order=permutation(x_axes, (BATCH, *folded, *groups, *summed, *places)),
            w_order=permutation(w_axes, (*groups, *new, *summed, *step.kernel)),
            y_order=permutation(found, out),
            folded=size(folded),
            channels=size(groups + summed),
            w_shape=(
                size(groups + new),
                size(summed),
                *(sizes[axis] if axis in step.kernel else 1 for axis in kernel),
            ),
            y_shape=tuple(sizes[axis] for axis in folded + groups + new),
            stride=here(geometry.each("stride"), 1),
            padding=here([0 if geometry.prepad else before for before, _ in geometry.pads], 0),
            dilation=here(geometry.each("dilation"), 1),
            groups=size(groups),
        )

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve."""
        batch, places = x.shape[0], len(self.stride)
        x = x.permute(self.x_order)
        x = x.reshape(batch * self.folded, self.channels, *x.shape[-places:])
        weight = weight.permute(self.w_order).reshape(self.w_shape)
        y = _CONV[places](x, weight, None, self.stride, self.padding, self.dilation, self.groups)
        return y.reshape(batch, *self.y_shape, *y.shape[2:]).permute(self.y_order)


@dataclass(frozen=True)
class Plan:
    """What one forward runs; made once for a network and a geometry.

    Attributes:
        strategy: 'reconstruct', whose only operands are ``x`` and the dense kernel, or 'factorized': ``x`` and the
        cores. network: what the plan was made for.
        geometry: likewise.
        operands: axes of ``x`` and of the other operands.
        shapes: their shapes; of ``x``, the channels' only.
        steps: in order.
        convolutions: for each step, how it convolves, or None.
        weight_steps: the steps that build the dense kernel before; their operands are the cores, numbered from 0.
    """

    strategy: str
    network: TensorNetwork
    geometry: Geometry
    operands: tuple[Axes, ...]
    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    weight_steps: tuple[Step, ...] = ()
    convolutions: tuple[Convolution | None, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = self._static_sizes()
        object.__setattr__(
            self,
            "convolutions",
            tuple(
                Convolution.of(step, self.geometry, self.network.kernel, sizes) if step.kernel else None
                for step in self.steps
            ),
        )

    def _static_sizes(self) -> dict[str, int]:
        """The size of every axis but the batch and the positions."""
        known = dict(self.network.sizes)
        for axes, shape in zip(self.operands[1:], self.shapes[1:], strict=True):
            known.update(zip(axes, shape, strict=True))
        return known

    def flops(self, input_shape: Sequence[int]) -> int:
        """Floating-point operations of one forward on an input of shape (batch, channels, *spatial), without bias."""
        sizes = self.sizes(input_shape)
        return sum(step.flops(sizes) for step in (*self.weight_steps, *self.steps))

    def explain(self, input_shape: Sequence[int]) -> str:
        """The steps in words, with their FLOPs, for an input of shape (batch, channels, *spatial)."""
        sizes = self.sizes(input_shape)
        total = self.flops(input_shape)
        lines = [f"{self.strategy} plan of '{self.network}' for input {tuple(input_shape)}: {total:,} FLOPs"]
        for step in (*self.weight_steps, *self.steps):
            kind = "convolve" if step.kernel else "contract"
            left, right, out = (" ".join(f"{axis}:{sizes[axis]}" for axis in axes) for axes in step.axes)
            lines.append(f"  {kind}  {left}  with  {right}  ->  {out}   {step.flops(sizes) / max(total, 1):.1%}")
        return "\n".join(lines)

    def sizes(self, input_shape: Sequence[int]) -> dict[str, int]:
        """The size of every axis for an input of shape (batch, channels, *spatial)."""
        known = self._static_sizes()
        batch, _, *places = input_shape
        pads = self.geometry.pads if self.geometry.prepad else ((0, 0),) * len(places)
        for axis, size, pad, out in zip(
            self.network.kernel, places, pads, self.geometry.output_size(tuple(places)), strict=True
        ):
            known |= {place_in(axis): size + sum(pad), place_out(axis): out}
        return known | {BATCH: batch}


@lru_cache(maxsize=4096)
def plan(network: TensorNetwork, geometry: Geometry, strategy: str = "auto") -> Plan:
    """Plan the forward of a layer.

    Args:
        network: the kernel's network.
        geometry: the convolution.
        strategy: 'reconstruct' builds the dense kernel first; 'factorized' lets ``x`` meet the cores one by one, at
            each step the one that forms the fewest products; 'auto' is 'reconstruct' until plans are chosen by cost.

    Raises:
        ValueError: the strategy is unknown, or 'factorized' and the groups do not divide the most significant output
        factor.

    Example:
        >>> cp = TensorNetwork.parse("i:8 r:4, o:8 r, h:3 r, w:3 r")
        >>> [s.axes[1] for s in plan(cp, Geometry(8, 8, (3, 3)), "factorized").steps]
        [('i', 'r'), ('h', 'r'), ('w', 'r'), ('o', 'r')]
    """
    strategy = errors.choice("strategy", strategy, STRATEGIES)
    groups = geometry.groups
    group = (GROUP,) if groups > 1 else ()
    before, after = tuple(map(place_in, network.kernel)), tuple(map(place_out, network.kernel))
    if strategy != "factorized":
        out_channels, *inner = network.dense_shape
        axes = ((BATCH, *group, IN, *before), (*group, OUT, IN, *network.kernel))
        blocks = (groups,) * len(group)
        shapes: tuple[tuple[int, ...], ...] = (*blocks, inner[0]), (*blocks, out_channels // groups, *inner)
        step = Step(0, 1, (*axes, (BATCH, *group, OUT, *after)), network.kernel)
        weight_steps = order(network.cores, network.dense_axes, tuple(network.sizes.items()))
        return Plan("reconstruct", network, geometry, axes, shapes, (step,), weight_steps)
    top = network.outputs[0]
    if network.sizes[top] % groups:
        raise ValueError(
            f"strategy is 'factorized', but groups ({groups}) does not divide the first factor of out_shape "
            f"{network.shape(network.outputs)}; choose another out_shape, or strategy='reconstruct'"
        )
    sizes = {**network.sizes, GROUP: groups, top: network.sizes[top] // groups}
    cores = tuple(
        tuple(a for axis in core for a in ((*group, top) if axis == top else (axis,))) for core in network.cores
    )
    operands = ((BATCH, *group, *network.inputs, *before), *cores)
    out = (BATCH, *group, *network.outputs, *after)
    channels = tuple(sizes[axis] for axis in (*group, *network.inputs))
    shapes = (channels, *(tuple(sizes[axis] for axis in core) for core in cores))
    unordered = Plan("factorized", network, geometry, operands, shapes, ())
    nominal = unordered.sizes((1, geometry.in_channels, *(max(_NOMINAL, span) for span in geometry.spans)))
    return replace(unordered, steps=_sequence(operands, out, network.kernel, nominal))


def _sequence(operands: tuple[Axes, ...], out: Axes, kernel: Axes, sizes: Mapping[str, int]) -> tuple[Step, ...]:
    """Let ``x`` meet the other operands one by one, the cheapest first."""
    ndim, steps = len(kernel), list[Step]()
    x, x_axes, rest = 0, operands[0], dict(enumerate(operands[1:], start=1))
    while rest:
        candidates = []
        for k, axes in rest.items():
            needed = {axis for other, names in rest.items() if other != k for axis in names}.union(out)
            convolved = tuple(axis for axis in kernel if axis in axes)
            inner, places = x_axes[:-ndim], x_axes[-ndim:]
            channels = tuple(axis for axis in dict.fromkeys(inner + axes) if axis in needed)
            places = tuple(place_out(a) if a in convolved else place for a, place in zip(kernel, places, strict=True))
            step = Step(x, k, (x_axes, axes, channels + places), convolved)
            candidates.append((step.volume(sizes), k, step))
        _, k, step = min(candidates, key=lambda candidate: candidate[:2])
        del rest[k]
        steps.append(step if rest else replace(step, axes=(*step.axes[:2], out)))
        x, x_axes = len(operands) + len(steps) - 1, step.axes[2]
    return tuple(steps)


def run(plan: Plan, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Execute a plan.

    Args:
        plan: made for the network and geometry of the cores.
        x: shape (batch, in_channels, *spatial).
        cores: in network order.

    Returns:
        Tensor: shape (batch, out_channels, *spatial'), without bias.
    """
    geometry = plan.geometry
    if geometry.prepad:
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x = F.pad(x, geometry.prepad, mode=mode)
    weights = cores
    if plan.strategy == "reconstruct":
        with own_precision(cores[0]):
            kernel = execute(plan.weight_steps, cores)
        if len(cores) == 1:  # nothing was contracted, so nothing was put in order
            kernel = kernel.permute(permutation(plan.network.cores[0], plan.network.dense_axes))
        weights = [kernel]
    tensors = [x.reshape(x.shape[0], *plan.shapes[0], *x.shape[2:])]
    tensors += [weight.reshape(shape) for weight, shape in zip(weights, plan.shapes[1:], strict=True)]
    for step, convolve in zip(plan.steps, plan.convolutions, strict=True):
        left, right = tensors[step.left], tensors[step.right]
        tensors.append(torch.einsum(step.equation, left, right) if convolve is None else convolve(left, right))
    y = tensors[-1]
    return y.reshape(y.shape[0], geometry.out_channels, *y.shape[-geometry.ndim :])
