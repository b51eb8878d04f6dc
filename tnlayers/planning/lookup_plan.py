"""Plan of a lookup: rows of the table are gathered from the cores, or from contractions of some of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tnlayers.backend.torch_state import own_precision
from tnlayers.backend.views import view
from tnlayers.ops.contraction import Contraction
from tnlayers.ops.gather import TOKENS, Gather, in_sequence, join
from tnlayers.planning.setting import Setting
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes
from tnlayers.text_tables import Shown, page


@dataclass(frozen=True)
class Part:
    """Some cores, contracted to one tensor, and its axes.

    Attributes:
        cores: numbers of the cores.
        contraction: their contraction to the axes ``inputs`` and then ``rest``.
        inputs: factors of the vocabulary among its axes; ``gather`` selects by them. Without any, all tokens share it.
        rest: its other axes.
        rows: number of rows to select from.
    """

    cores: tuple[int, ...]
    contraction: Contraction
    inputs: Axes
    rest: Axes
    rows: int
    gather: Gather
    shape: tuple[int, ...]

    def matrix(self, cores: Sequence[Tensor]) -> Tensor:
        """Return the tensor as a matrix: one row for each value of its digits."""
        return view(self.contraction([cores[k] for k in self.cores]), (self.rows, math.prod(self.shape)))

    def select(self, index: Tensor, matrix: Tensor) -> Tensor:
        """Return the operand of the join: slices for each token, or the whole tensor."""
        if not self.inputs:
            return matrix.reshape(self.shape)
        return self.gather(index, matrix).reshape(index.shape[0], *self.shape)

    @property
    def axes(self) -> Axes:
        """Axes of the operand of the join."""
        return (TOKENS, *self.rest) if self.inputs else self.rest


@dataclass(frozen=True)
class LookupPlan:
    """The operations of a lookup.

    Attributes:
        network, geometry, setting: what the plan is for; ``setting.batch`` is the number of tokens.
        parts: what is gathered from, in the order in which the slices are joined.
        seconds: estimated total time.
        peak: estimated peak bytes of a training step.
        join: contraction of the slices to the rows.
    """

    network: TensorNetwork
    geometry: Geometry
    setting: Setting
    parts: tuple[Part, ...]
    seconds: float
    peak: int
    join: Contraction = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {**self.network.sizes, TOKENS: self.setting.batch}
        axes = [part.axes for part in self.parts]
        object.__setattr__(self, "join", in_sequence(axes, (TOKENS, *self.network.outputs), sizes))

    @property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """The cores of each part: equal for plans that do the same."""
        return tuple(part.cores for part in self.parts)

    @property
    def order(self) -> str:
        """Cores of each part; valid as a strategy."""
        return " > ".join("*".join(map(str, cores)) for cores in self.steps)

    @property
    def signature(self) -> str:
        """Text that is equal for plans that gather from the same tensors."""
        return " > ".join(f"{part.cores}: {' '.join(part.inputs + part.rest)}" for part in self.parts)

    @property
    def strategy(self) -> str:
        """'reconstruct' if the only part is the table, else 'factorized'."""
        return "reconstruct" if len(self.parts) == 1 else "factorized"

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward, without contractions of cores if these are cached."""
        cached = self.setting.mode == "cached"
        return self.join.flops + (0 if cached else sum(part.contraction.flops for part in self.parts))

    def matrices(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Return what the parts gather from, in the cores' dtype even under autocast."""
        with own_precision(cores[0]):
            return [part.matrix(cores) for part in self.parts]

    def rows(self, index: Tensor, matrices: Sequence[Tensor], open_sizes: bool) -> Tensor:
        """Return a row of the table for each index.

        Args:
            index: shape (tokens,).
            matrices: result of ``matrices``.
            open_sizes: whether the number of tokens may differ from the setting's.
        """
        with own_precision(matrices[0]):
            operands = [part.select(index, matrix) for part, matrix in zip(self.parts, matrices, strict=True)]
            if open_sizes:
                rows = join(operands, [part.axes for part in self.parts], (TOKENS, *self.network.outputs))
            else:
                rows = self.join(operands)
        return rows.reshape(index.shape[0], self.geometry.out_channels)

    def explain(self, other: "LookupPlan | None" = None, rates: str = "", tuned: str = "") -> Shown:
        """Describe each operation by shapes, FLOPs and bytes; the runner-up; the rate table. See ``Plan.explain``."""
        how = {"train": "training", "infer": "inference", "cached": "inference with cached tables"}[self.setting.mode]
        head = f"{self.strategy} plan of '{self.network}' for {self.setting.batch:,} indices, {how}: "
        head += f"{self.flops:,} FLOPs"
        below = []
        if other is not None:
            ratio = other.seconds / (self.seconds or 1.0)
            below = [f"runner-up: {other.strategy}, {other.order}, {ratio:.2f} times the estimated time"]
        if rates:
            below.append(f"rates: {rates}{f'; order tuned {tuned}' if tuned else ''}")
        rows = [("step", "FLOPs", "bytes"), *self._rows()]
        lines = [f"  {step:<60} {flops:>14} {size:>14}".rstrip() for step, flops, size in rows]
        return Shown("\n".join([head, *lines, *below]), page(rows, head, range(1, 3), below))

    def _rows(self) -> list[tuple[str, str, str]]:
        """Return the cells of ``explain``: step, FLOPs, bytes."""
        item, sizes = self.setting.dtype.itemsize, {**self.network.sizes, TOKENS: self.setting.batch}

        def shown(axes: Axes) -> str:
            return " ".join(f"{'tokens' if axis == TOKENS else axis}:{sizes[axis]}" for axis in axes)

        rows = []
        for part in self.parts:
            steps = () if self.setting.mode == "cached" else part.contraction.steps
            for step in steps:
                words = f"contract {shown(step.axes[0])} with {shown(step.axes[1])}"
                rows.append((words, f"{step.flops:,}", f"{step.entries * item:,}"))
            if part.inputs:
                size = 2 * self.setting.batch * math.prod(part.shape) * item
                rows.append((f"gather {shown(part.rest)} by {shown(part.inputs)}", "0", f"{size:,}"))
        for step in self.join.steps:
            words = f"join {shown(step.axes[0])} with {shown(step.axes[1])}"
            rows.append((words, f"{step.flops:,}", f"{step.entries * item:,}"))
        return rows
