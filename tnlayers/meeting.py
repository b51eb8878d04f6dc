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

from tnlayers.product import FIRST, LAST, product, weight_gradient
from tnlayers.step import inverse, view

CONV, MATMUL = "conv", "matmul"

_CONV: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.conv1d, 2: F.conv2d, 3: F.conv3d})


@dataclass(frozen=True)
class Meeting:
    """``x`` meets a tensor of weights; all is fixed beforehand but the batch and the positions.

    Attributes:
        op: 'conv' or 'matmul'.
        kind: the row of the table of rates.
        source, target: where the channels lie before and after.
        move: sizes and permutation of the channel axes that must be reordered before, with a copy; or None.
        folded, groups, summed, new: how many channels of each role.
        taps: kernel size along each spatial axis, 1 where nothing is convolved.
        stride, padding, dilation: along each spatial axis.
        left, right, out: the axes of ``x``, of the weight and of the result, for people to read.
        plain: whether it is a convolution and nothing else.
        weight_shape: the weight's shape as its axes lie in memory; before channels last, a convolution's has them last.
    """

    op: str
    kind: str
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

    plain: bool = field(init=False, repr=False)
    weight_shape: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape: tuple[int, ...] = (self.groups, self.new, self.summed) if self.groups > 1 else (self.new, self.summed)
        if self.op == CONV:
            inner = (self.summed, *self.taps) if self.source == FIRST else (*self.taps, self.summed)
            shape = (self.groups * self.new, *inner)
        object.__setattr__(self, "weight_shape", shape)
        object.__setattr__(self, "plain", self.op == CONV and self.folded == 1 and not self.move)

    def take(self, weight: Tensor) -> Tensor:
        """A weight with the axes ``right``, as the operation takes it."""
        weight = view(weight, self.weight_shape)
        if self.op == MATMUL:
            return weight
        return weight.contiguous() if self.source == FIRST else weight.contiguous().movedim(-1, 1)

    def give(self, gradient: Tensor) -> Tensor:
        """The gradient of what ``take`` returned as that of what it took."""
        return gradient.movedim(1, -1) if self.op == CONV and self.source == LAST else gradient

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shape (batch, folded * groups * summed, *positions) -> (batch, folded * groups * new, *positions')."""
        if self.plain:
            return _CONV[len(self.taps)](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if self.move:
            x = reorder(x, *self.move)
        fused = None if bias is None or self.folded > 1 or (self.op == MATMUL and self.groups > 1) else bias
        if self.op == CONV:
            convolve = _CONV[len(self.taps)]
            y = convolve(self._folded(x), weight, fused, self.stride, self.padding, self.dilation, self.groups)
            y = self._unfolded(y, x)
        elif self.source == self.target == LAST:
            batch, _, *places = x.shape
            y = F.linear(x.movedim(1, -1).reshape(batch, *places, self.folded, self.summed), weight, fused)
            y = y.flatten(-2).movedim(-1, 1)
        elif self.groups > 1:
            y = torch.matmul(weight, self._grouped(x))
            y = y.reshape(x.shape[0], self.folded * self.groups * self.new, *x.shape[2:])
        else:
            y = self._spread(product(self._images(x, self.source == LAST), weight, fused, self.target), x, self.target)
        return y if bias is None or fused is not None else y + bias.to(y.dtype).reshape(-1, *(1,) * (y.ndim - 2))

    def gradients(
        self, x: Tensor, weight: Tensor, gradient: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of ``x``, in its layout, and of the weight, where wanted."""
        if self.move:
            x = reorder(x, *self.move)
        for_x = for_weight = None
        if self.op == CONV:
            zeros = [0] * len(self.taps)
            for_x, for_weight, _ = torch.ops.aten.convolution_backward(
                self._folded(gradient), self._folded(x), weight, None, self.stride, self.padding, self.dilation,
                False, zeros, self.groups, (*wanted, False),
            )  # fmt: skip
            for_x = None if for_x is None else self._unfolded(for_x, x)
        elif self.source == self.target == LAST:
            g = gradient.movedim(1, -1).reshape(-1, self.new)
            if wanted[0]:
                for_x = torch.mm(g, weight).reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
            if wanted[1]:
                for_weight = torch.mm(g.mT, x.movedim(1, -1).reshape(-1, self.summed))
        elif self.groups > 1:
            g = self._grouped(gradient)
            if wanted[0]:
                for_x = torch.matmul(weight.mT, g).reshape(x.shape)
            if wanted[1]:
                for_weight = weight_gradient(g, self._grouped(x))
        else:
            g = self._images(gradient, gradient.stride(1) == 1)  # whatever comes back
            if wanted[0]:
                for_x = self._spread(product(g, weight.mT, None, self.source), x, self.source)
            if wanted[1]:
                for_weight = weight_gradient(g, self._images(x, self.source == LAST))
        if self.move and for_x is not None:
            sizes, order = self.move
            for_x = reorder(for_x, tuple(sizes[k] for k in order), inverse(order))
        return for_x, for_weight

    def _folded(self, x: Tensor) -> Tensor:
        """Shape (batch * folded, channels, *positions)."""
        return x if self.folded == 1 else x.reshape(x.shape[0] * self.folded, x.shape[1] // self.folded, *x.shape[2:])

    def _unfolded(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.folded == 1 else y.reshape(x.shape[0], y.shape[1] * self.folded, *y.shape[2:])

    def _grouped(self, x: Tensor) -> Tensor:
        """Shape (batch * folded, groups, channels, positions)."""
        channels = x.shape[1] // (self.folded * self.groups)
        return x.reshape(x.shape[0] * self.folded, self.groups, channels, math.prod(x.shape[2:]))

    def _images(self, x: Tensor, last: bool) -> Tensor:
        """Shape (batch * folded, channels, positions), with the strides of either layout."""
        batch, channels, *places = x.shape
        if self.folded == 1 and last:
            return x.movedim(1, -1).reshape(batch, math.prod(places), channels).mT
        return x.reshape(batch * self.folded, channels // self.folded, math.prod(places))

    def _spread(self, y: Tensor, x: Tensor, layout: str) -> Tensor:
        """From the shape of ``_images`` to (batch, folded * channels, *positions)."""
        batch, places = x.shape[0], x.shape[2:]
        if layout == LAST:
            return y.mT.reshape(batch, *places, y.shape[1]).movedim(-1, 1)
        return y.reshape(batch, self.folded * y.shape[1], *places)


def reorder(x: Tensor, sizes: tuple[int, ...], order: tuple[int, ...], last: bool = False) -> Tensor:
    """Permute the axes of ``sizes`` that make up the channels of (N, channels, *spatial); with them first, or last."""
    batch, places = x.shape[0], x.shape[2:]
    spatial = range(1 + len(sizes), 1 + len(sizes) + len(places))
    x = x.reshape(batch, *sizes, *places).permute(0, *(1 + k for k in order), *spatial)
    x = x.reshape(batch, math.prod(sizes), *places)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()
