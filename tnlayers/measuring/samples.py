"""Operations of random sizes, of every kind that the planner prices, with what it counts of each."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tnlayers.backend.rates import (
    BASES,
    CONTRACT,
    FORMS,
    KINDS,
    MOVE,
    ONE,
    ROWS,
    THREE,
    TRANSPOSED,
    WEIGHTS,
    Rate,
    Rates,
)
from tnlayers.backend.views import FIRST, LAST
from tnlayers.formats import BTT, CP, TR, TT, Tucker
from tnlayers.ops.contraction import Contraction
from tnlayers.ops.input_step import reorder
from tnlayers.planning.choose import plan
from tnlayers.planning.options import is_single
from tnlayers.planning.path import Path
from tnlayers.planning.plan import build_plan
from tnlayers.planning.search import Search
from tnlayers.planning.search_space import space_of
from tnlayers.planning.setting import Setting
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork

CHANNELS = (1, 3, 5, 8, 16, 27, 36, 64, 68, 100, 128, 256, 512)
WIDTHS = (64, 128, 256, 512)
"""Channels of the layers whose cores are contracted."""

FEATURES, ROWS_OF = (64, 128, 256, 512, 1024, 2048, 4096), (1, 1, 8, 32, 128, 512, 4096)
"""Features and rows of linear layers."""

RANKS = (4, 8, 16, 27)
"""Other features of the steps of linear layers, and of their groups."""

SIZES = (7, 14, 16, 32, 56)
LENGTHS, EDGES = (16, 64, 400, 1600, 8000), (4, 8, 12, 16, 24)
"""Positions of 1d layers, and along each axis of 3d layers."""

BATCHES = (1, 1, 8, 32, 512)
"""Numbers of images. 512 stands for channels that are folded into the batch."""

ENTRIES = 1 << 23
"""Maximum number of elements of the larger of input and output."""

VALUES = 1 << 24
"""Number of values that inputs and weights are made of; the largest weight has as many."""

KERNELS: Mapping[str, tuple[tuple[int, ...], ...]] = MappingProxyType({
    "": ((3, 3), (3, 3), (3, 1), (1, 3)),
    ONE: ((3,), (4,), (5,), (7,), (10,)),
    THREE: ((3, 3, 3), (3, 3, 3), (3, 1, 1), (1, 1, 3)),
    TRANSPOSED: ((4, 4), (4, 4), (2, 2), (3, 3), (4, 1), (1, 4)),
})  # fmt: skip
"""Kernels by form. Steps of factorised layers have a part of the kernel's axes too."""

GROUPS = (5, 8, 16, 64, 256, 512)
PER = ((4, 4), (8, 8), (7, 12), (16, 16), (9, 1), (1, 9), (2, 2), (16, 2))
"""Channels of a group, in and out."""

FAMILIES = (
    "conv", "point", "rows", "1d conv", "single conv", "contractions", "3d conv", "group conv", "transposed conv",
    "moves", "transposed single conv", "3d point", "group rows", "conv", "3d conv", "group point", "3d group conv",
    "transposed conv", "rows", "transposed group conv", "single point", "1d group conv", "3d single conv", "point",
    "depth conv", "3d depth conv", "3d conv", "transposed conv", "transposed depth conv", "moves", "1d depth conv",
    "3d single point", "conv", "1d conv", "1d single conv", "conv", "3d point",
)  # fmt: skip
"""What is drawn, in turn, so that a short run has operations of every kind too."""


@dataclass(frozen=True)
class Sample:
    """An operation.

    Attributes:
        kind: row of the rate table.
        flops, bytes: what the planner counts, FLOPs with padding.
        forward: runs the forward.
        both: runs forward and backward, given the output's gradient.
    """

    kind: str
    flops: float
    bytes: float
    forward: Callable[[], Tensor]
    both: Callable[[Tensor], object]


class Sampler:
    """Draws operations on a device in a dtype.

    Args:
        device: device type.
        dtype: dtype of inputs. Cores have it too, but float32 where it is a half precision, as under autocast.
        rates: a table with the device's lanes, which says what takes too long to be measured.
        longest: maximum seconds of a forward, by that table and by what ``learn`` was told.
    """

    def __init__(self, device: str, dtype: torch.dtype, rates: Rates, longest: float) -> None:
        self.device, self.dtype, self.rates, self.longest = device, dtype, rates, longest
        self.held = dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32
        self.draw = random.Random(0)
        self._pace: dict[str, float] = {}
        # Values come from one buffer: to draw them anew would take longer than the operations.
        values = torch.randn(VALUES, generator=torch.Generator().manual_seed(0)) / 8
        self._values = {each: values.to(device, each) for each in {dtype, self.held}}
        counting = {kind: Rate(0.0, 1.0, 0.0) for kind in (*KINDS, *BASES)}
        self.counting = Rates.counting(counting, rates.lanes)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of a shape. Its memory is shared with others."""
        return self._values[dtype or self.dtype][: math.prod(shape)].view(*shape)

    def learn(self, sample: Sample, seconds: float) -> None:
        """Draw fewer operations as long as this one, which took so many seconds: tables of other dtypes may stand in.

        The least seconds per FLOP decide. Of short operations, they say nothing.
        """
        if seconds > self.longest / 4 and sample.flops:
            pace = seconds / sample.flops
            self._pace[sample.kind] = min(pace, self._pace.get(sample.kind, pace))

    def samples(self, family: str) -> Iterator[Sample]:
        """Yield the samples of one draw of a family."""
        if family == "contractions":
            return self._contractions()
        return self._moves() if family == "moves" else self._input_steps(family)

    def _layer(self, family: str) -> tuple[Geometry, int, tuple[int, ...]]:
        """Return a layer's geometry, and batch and size of an input."""
        words = family.split()
        if ROWS in words:
            return self._linear("group" in words)
        draw, form = self.draw, words[0] if words[0] in KERNELS else ""
        ndim, sizes = {ONE: (1, LENGTHS), THREE: (3, EDGES)}.get(form, (2, SIZES))
        while True:
            kernel = (1,) * ndim if words[-1] == "point" else draw.choice(KERNELS[form])
            groups, per = self._channels(words)
            size, batch = draw.choice(sizes), 1 if "single" in words else draw.choice(BATCHES)
            stride: int | tuple[int, ...] = draw.randint(1, 5) if form == ONE else 1
            if form == TRANSPOSED:
                stride = tuple(min(2, taps) for taps in kernel)
            padding = tuple(taps // 2 for taps in kernel)
            geometry = Geometry(
                groups * per[0], groups * per[1], kernel, stride, padding, groups=groups, transposed=form == TRANSPOSED
            )
            image = per[0] * size**ndim
            most = batch * groups * max(image, per[1] * math.prod(geometry.output_size((size,) * ndim)))
            if (
                groups * max(per) <= 1024
                and most <= ENTRIES
                and ("single" not in words or is_single(per[0], (size,) * ndim))
            ):
                return geometry, batch, (size,) * ndim

    def _channels(self, words: Sequence[str]) -> tuple[int, tuple[int, int]]:
        """Return the number of groups, and of channels of a group in and out."""
        if "depth" in words:
            return self.draw.choice(GROUPS), (1, 1)
        if "group" in words:
            return self.draw.choice(GROUPS), self.draw.choice(PER)
        return 1, (self.draw.choice(CHANNELS), self.draw.choice(CHANNELS))

    def _linear(self, grouped: bool) -> tuple[Geometry, int, tuple[int, ...]]:
        """Return the geometry of a linear layer or of a step of one, the number of rows, and no positions."""
        draw = self.draw
        narrow, wide = FEATURES[:2] + RANKS, FEATURES + RANKS
        while True:
            groups, per = 1, [draw.choice(FEATURES), draw.choice(wide)]
            if grouped:
                groups, per = draw.choice(GROUPS), [draw.choice(narrow), draw.choice(narrow)]
            draw.shuffle(per)
            rows = draw.choice(ROWS_OF)
            if rows * groups * max(per) <= ENTRIES and groups * math.prod(per) <= VALUES:
                return Geometry(groups * per[0], groups * per[1], (), groups=groups), rows, ()

    def _input_steps(self, family: str) -> Iterator[Sample]:
        """Yield a convolution or matrix product in all the planner's implementations that are of the family's form."""
        geometry, batch, size = self._layer(family)
        inputs, outputs = geometry.in_channels, geometry.out_channels
        taps = dict(zip("hwd", geometry.kernel_size, strict=False))
        skeleton = {"o": outputs, "i": inputs // geometry.groups} | taps
        space = space_of(TensorNetwork.parse(" ".join(("i", "o", *taps)), skeleton), geometry)
        own = not {*family.split()}.isdisjoint(FORMS)
        for source, target in itertools.product((FIRST, LAST) if len(size) > 1 else (FIRST,), repeat=2):
            x = self.tensor((batch, inputs, *size))
            if source == LAST:
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            setting = Setting(batch, size, target, "train", self.device, self.dtype)
            pricing = Search(space, setting, self.counting).pricing
            for option in pricing.options(0, space.all, setting.layout if not size else source, space.inputs):
                flops, read = option.cost.seconds, option.cost.bytes
                infer = self.rates.infer
                rate = infer.get(option.kind) or infer[BASES[option.kind]]
                if option.moved or option.tail or own != (option.kind in BASES):
                    continue
                if max(rate.seconds(flops, read), flops * self._pace.get(option.kind, 0.0)) > self.longest:
                    continue
                step = build_plan(pricing, Path((option,), 0.0)).steps[0]
                weight = step.prepare_weight(self.tensor(step.weight_shape))
                forward, backward = partial(step.apply, x, weight, None), partial(step.gradients, x, weight)
                yield Sample(option.kind, flops, read, forward, partial(_both, forward, backward))

    def _contractions(self) -> Iterator[Sample]:
        """Yield the steps of the contraction of a random layer's cores, and a contraction of two tiny ones."""
        form = self.draw.choice((CP(), TT(), TR(), BTT(), Tucker()))
        channels, keep = self.draw.choice(WIDTHS), self.draw.choice((0.05, 0.1, 0.25))
        network, _ = form.build(*form.split(channels, channels, 1), (3, 3), keep)
        geometry = Geometry(channels, channels, (3, 3))
        contraction = plan(network, geometry, Setting(1, (8, 8)), "reconstruct").weights[0].contraction
        tensors = contraction.run([self.tensor(shape, self.held) for shape in network.core_shapes])
        for step in contraction.steps:
            left, right, out = step.axes
            sizes = dict(zip(left, step.left.source, strict=True)) | dict(zip(right, step.right.source, strict=True))
            alone = Contraction.of((left, right), ((0, 1),), out, sizes)
            operands = [tensors[side.operand].reshape(side.source).clone() for side in (step.left, step.right)]
            forward = partial(_last_of, alone, operands)
            backward = partial(alone.gradients, operands)
            yield Sample(
                WEIGHTS, step.flops, step.entries * self.dtype.itemsize, forward, partial(_both, forward, backward)
            )
        tiny = Contraction.of((("a", "b"), ("b", "c")), ((0, 1),), ("a", "c"), {"a": 2, "b": 2, "c": 2})
        leaves = [self.tensor((2, 2), self.held).clone().requires_grad_() for _ in range(2)]
        yield Sample(CONTRACT, 0.0, 0.0, partial(_last_of, tiny, leaves), partial(_through_autograd, tiny, leaves))

    def _moves(self) -> Iterator[Sample]:
        """Yield a reordering of channels."""
        sizes = tuple(self.draw.choices((2, 4, 8, 16), k=3))
        order = tuple(self.draw.sample(range(3), 3))
        size, batch = self.draw.choice(SIZES), self.draw.choice(BATCHES)
        shape = batch, math.prod(sizes), size, size
        if order == (0, 1, 2) or math.prod(shape) > ENTRIES:
            return
        volume = 2.0 * math.prod(shape) * self.dtype.itemsize
        forward = partial(reorder, self.tensor(shape), sizes, order)
        yield Sample(MOVE, 0.0, volume, forward, lambda gradient: (forward(), reorder(gradient, sizes, order)))


def _both(forward: Callable[[], Tensor], backward: Callable[..., Any], gradient: Tensor) -> object:
    return forward(), backward(gradient, (True, True))


def _last_of(contraction: Contraction, operands: Sequence[Tensor]) -> Tensor:
    return contraction.run(operands)[-1]


def _through_autograd(contraction: Contraction, leaves: Sequence[Tensor], gradient: Tensor) -> object:
    """Run both passes of a contraction through autograd."""
    with torch.enable_grad():
        return torch.autograd.grad(contraction(leaves), leaves, gradient)
