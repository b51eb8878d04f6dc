"""The one kind of step in which the input takes part: it meets a tensor of weights.

Of the axes of the two, those of ``x`` alone are folded into the batch; shared axes that are needed later become groups;
shared axes that are finished are summed, as a convolution's input channels; new axes are its output channels. A kernel
axis brings its stride, padding and dilation along. Without a kernel axis of more than one tap, the step is a matrix
product over the channels, which may also take the channels from one place in memory to another: first, as in (N, C, H,
W), or last, as in (N, H, W, C).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.product import LAST, product

CONV, MATMUL = "conv", "matmul"

_CONV: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.conv1d, 2: F.conv2d, 3: F.conv3d})


@dataclass(frozen=True)
class Meeting:
    """``x`` meets a tensor of weights; all is fixed beforehand but the batch and the positions.

    Attributes:
        op: 'conv' or 'matmul'.
        source, target: where the channels lie before and after.
        move: sizes and permutation of the channel axes that must be reordered before, with a copy; or None.
        folded, groups, summed, new: how many channels of each role.
        taps: kernel size along each spatial axis, 1 where nothing is convolved.
        stride, padding, dilation: along each spatial axis.
        left, right, out: the axes of ``x``, of the weight and of the result, for people to read.
        weight_shape: the weight's shape as the operation takes it.
    """

    op: str
    source: str
    target: str
    move: tuple[tuple[int, ...], tuple[int, ...]] | None
    folded: int
    groups: int
    summed: int
    new: int
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    left: tuple[str, ...]
    right: tuple[str, ...]
    out: tuple[str, ...]

    weight_shape: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape: tuple[int, ...] = (self.groups, self.new, self.summed) if self.groups > 1 else (self.new, self.summed)
        if self.op == CONV:
            shape = (self.groups * self.new, self.summed, *self.taps)
        object.__setattr__(self, "weight_shape", shape)

    @property
    def kind(self) -> str:
        """The row of the table of rates."""
        if self.op == MATMUL:
            return f"matmul {self.source} {self.target}"
        if self.groups > 1:
            return f"{'depth' if self.summed == self.new == 1 else 'group'} {self.source}"
        return f"{'conv' if math.prod(self.taps) > 1 else 'point'} {self.source}"

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shape (batch, folded * groups * summed, *positions) -> (batch, folded * groups * new, *positions')."""
        if self.move:
            x = reorder(x, *self.move)
        fused = None if bias is None or self.folded > 1 or (self.op == MATMUL and self.groups > 1) else bias
        y = self._conv(x, weight, fused) if self.op == CONV else self._matmul(x, weight, fused)
        return y if bias is None or fused is not None else y + bias.to(y.dtype).reshape(-1, *(1,) * (y.ndim - 2))

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = _CONV[len(self.taps)]
        if self.folded == 1:
            return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        batch = x.shape[0]
        x = x.reshape(batch * self.folded, self.groups * self.summed, *x.shape[2:])
        y = convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return y.reshape(batch, self.folded * self.groups * self.new, *y.shape[2:])

    def _matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, places = x.shape[0], x.shape[2:]
        many, length = batch * self.folded, math.prod(places)
        if self.source == LAST:
            x = x.movedim(1, -1)
        if self.source == self.target == LAST:
            y = F.linear(x.reshape(batch, *places, self.folded, self.summed), weight, bias)
            return y.flatten(-2).movedim(-1, 1)
        if self.groups > 1:
            y = torch.matmul(weight, x.reshape(many, self.groups, self.summed, length))
            return y.reshape(batch, self.folded * self.groups * self.new, *places)
        x = x.reshape(many, length, self.summed).mT if self.source == LAST else x.reshape(many, self.summed, length)
        y = product(x, weight, bias, self.target)
        if self.target == LAST:
            return y.mT.reshape(batch, *places, self.new).movedim(-1, 1)
        return y.reshape(batch, self.folded * self.new, *places)


def reorder(x: Tensor, sizes: tuple[int, ...], order: tuple[int, ...], last: bool = False) -> Tensor:
    """Permute the axes of ``sizes`` that make up the channels of (N, channels, *spatial); with them first, or last."""
    batch, places = x.shape[0], x.shape[2:]
    spatial = range(1 + len(sizes), 1 + len(sizes) + len(places))
    x = x.reshape(batch, *sizes, *places).permute(0, *(1 + k for k in order), *spatial)
    x = x.reshape(batch, math.prod(sizes), *places)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()
