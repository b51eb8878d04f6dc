"""Input step: one operation that contracts the layer's input ``x`` with a weight.

Axes of ``x`` alone are folded into the batch. Shared axes that a later step needs become groups. Other shared axes are
summed, as a convolution's input channels. Axes of the weight alone are its output channels. A kernel axis has its
stride, padding and dilation. Without a kernel axis of more than one tap, the step is a matrix product over the
channels. A matrix product may also change the memory layout between channels first, (N, C, H, W), and channels last,
(N, H, W, C).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.backend.moves import CONTIGUOUS, Move, moved, permute
from tnlayers.backend.views import FIRST, LAST, exchange, inverse, view
from tnlayers.ops.channel_matmul import channels_first, product, weight_gradient

CONV, MATMUL = "conv", "matmul"

_CONV: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.conv1d, 2: F.conv2d, 3: F.conv3d})
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
)


@dataclass(frozen=True)
class InputStep:
    """One operation that contracts the layer's input with a weight. All is fixed except batch and spatial size.

    Attributes:
        op: 'conv' or 'matmul'.
        kind: row of the rate table.
        source, target: memory layout of the channels before and after, 'first' or 'last'.
        move: sizes and permutation of the channel axes for a reorder before the step, which copies; or None.
        folded, groups, summed, new: number of channels of each role.
        taps: kernel size along each spatial axis, 1 for axes that are not convolved.
        stride, padding, output_padding, dilation: one integer per spatial axis.
        transposed: whether it is a transposed convolution.
        left, right, out: axes of ``x``, of the weight and of the result, for display.
        plain: whether the step is exactly one torch function.
        unsafe: whether torch's own backward in channels last may write past the end of the weight's gradient.
        weight_shape: shape of the weight in memory order. For a convolution with channels-last input, its summed
            channels are last.
        weight_moves: from a weight of that shape to the shape and layout of the operation.
        apply: the operation, from ``x``, the prepared weight and the bias or None: it maps
            (batch, folded * groups * summed, *spatial) to (batch, folded * groups * new, *spatial').
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
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    left: tuple[str, ...]
    right: tuple[str, ...]
    out: tuple[str, ...]

    plain: bool = field(init=False, repr=False)
    unsafe: bool = field(init=False, repr=False)
    weight_shape: tuple[int, ...] = field(init=False, repr=False)
    weight_moves: tuple[Move, ...] = field(init=False, repr=False, compare=False)
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape: tuple[int, ...] = (self.groups, self.new, self.summed) if self.groups > 1 else (self.new, self.summed)
        if self.op == CONV:
            inner = (self.summed, *self.taps) if self.source == FIRST else (*self.taps, self.summed)
            shape = (self.groups * self.new, *inner)
        object.__setattr__(self, "weight_shape", shape)
        moves: list[Move] = []
        if self.op == CONV:
            channels = [] if self.source == FIRST else [permute((0, len(shape) - 1, *range(1, len(shape) - 1)))]
            moves = [CONTIGUOUS, *channels, *([(exchange, self.groups), CONTIGUOUS] if self.transposed else [])]
        object.__setattr__(self, "weight_moves", tuple(moves))
        whole = self.folded == 1 and not self.move
        object.__setattr__(self, "plain", whole and (self.op == CONV or (not self.taps and self.groups == 1)))
        # In channels last with few channels, oneDNN writes past the end of this weight's gradient (torch 2.13).
        object.__setattr__(self, "unsafe", self.op == CONV and max(self.taps) == 1 < max(self.stride))
        object.__setattr__(self, "apply", self._operation())

    def prepare_weight(self, weight: Tensor) -> Tensor:
        """Return a weight with the axes ``right`` in the shape and layout of the operation."""
        return moved(view(weight, self.weight_shape), self.weight_moves)

    def restore_weight_gradient(self, gradient: Tensor) -> Tensor:
        """Convert the gradient of ``prepare_weight``'s result to the gradient of its argument."""
        if self.transposed:
            gradient = exchange(gradient, self.groups)
        return gradient.movedim(1, -1) if self.op == CONV and self.source == LAST else gradient

    def _operation(self) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """Return the function ``apply``: a flat one for the operations that small inputs need most."""
        if self.plain and not self.taps:
            return F.linear
        if self.plain and not self.unsafe and not self.transposed:
            convolve = _CONV[len(self.taps)]
            arguments = self.stride, self.padding, self.dilation, self.groups
            return lambda x, weight, bias: convolve(x, weight, bias, *arguments)
        if self.plain:
            return self._convolve
        if (
            self.op == MATMUL
            and self.source == self.target == FIRST
            and self.groups == self.folded == 1
            and not self.move
        ):
            return channels_first
        return self._general

    def _general(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.move:
            x = reorder(x, *self.move)
        fused = None if bias is None or self.folded > 1 or (self.op == MATMUL and self.groups > 1) else bias
        if self.op == CONV:
            y = self._unfolded(self._convolve(self._folded(x), weight, fused), x)
        elif self.source == self.target == LAST and self.groups > 1:
            y = torch.bmm(self._rows(x, self.summed), weight.mT).transpose(0, 1)
            y = y.reshape(x.shape[0], *x.shape[2:], self.folded * self.groups * self.new).movedim(-1, 1)
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
        """Return the gradients of ``x``, in its layout, and of the weight; None where not wanted."""
        if self.move:
            x = reorder(x, *self.move)
        for_x = for_weight = None
        if self.op == CONV:
            sides: tuple[Tensor, ...] = (self._folded(gradient), self._folded(x), weight)
            if wanted[1] and self.unsafe:
                sides = tuple(map(_packed, sides))
            for_x, for_weight, _ = torch.ops.aten.convolution_backward(
                *sides, None, self.stride, self.padding, self.dilation,
                self.transposed, self.output_padding, self.groups, (*wanted, False),
            )  # fmt: skip
            for_x = None if for_x is None else self._unfolded(for_x, x)
        elif self.source == self.target == LAST:
            for_x, for_weight = self._last_gradients(x, weight, gradient, wanted)
        elif self.groups > 1:
            g = self._grouped(gradient)
            if wanted[0]:
                for_x = torch.matmul(weight.mT, g).reshape(x.shape)
            if wanted[1]:
                for_weight = weight_gradient(g, self._grouped(x))
        else:
            g = self._images(gradient, gradient.stride(1) == 1)  # its layout may differ from target
            if wanted[0]:
                for_x = self._spread(product(g, weight.mT, None, self.source), x, self.source)
            if wanted[1]:
                for_weight = weight_gradient(g, self._images(x, self.source == LAST))
        if self.move and for_x is not None:
            sizes, order = self.move
            for_x = reorder(for_x, tuple(sizes[k] for k in order), inverse(order))
        return for_x, for_weight

    def _last_gradients(
        self, x: Tensor, weight: Tensor, gradient: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of a matrix product from channels last to channels last."""
        for_x = for_weight = None
        if self.groups > 1:
            rows = self._rows(gradient, self.new)
            for_x = torch.bmm(rows, weight).transpose(0, 1) if wanted[0] else None
            for_weight = torch.bmm(rows.mT, self._rows(x, self.summed)) if wanted[1] else None
        else:
            rows = gradient.movedim(1, -1).reshape(-1, self.new)
            for_x = torch.mm(rows, weight) if wanted[0] else None
            if wanted[1]:
                for_weight = weight_gradient(rows.mT[None], x.movedim(1, -1).reshape(-1, self.summed).mT[None])
        if for_x is not None:
            for_x = for_x.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
        return for_x, for_weight

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # torch.jit.trace checks without gradients, and expects the same operations.
        tracing = self.unsafe and torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not (tracing or (self.unsafe and torch.is_grad_enabled())):
            return self._convolution(x, weight, bias)
        y = self._convolution(_packed(x), _packed(weight), bias)  # for torch's own backward
        return _channels_last(y) if self.source == LAST else y

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.transposed:
            return _TRANSPOSED[len(self.taps)](
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        return _CONV[len(self.taps)](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _rows(self, x: Tensor, channels: int) -> Tensor:
        """Reshape to (groups, batch * positions * folded, channels)."""
        return x.movedim(1, -1).reshape(-1, self.groups, channels).transpose(0, 1)

    def _folded(self, x: Tensor) -> Tensor:
        """Reshape to (batch * folded, channels, *spatial)."""
        return x if self.folded == 1 else x.reshape(x.shape[0] * self.folded, x.shape[1] // self.folded, *x.shape[2:])

    def _unfolded(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.folded == 1 else y.reshape(x.shape[0], y.shape[1] * self.folded, *y.shape[2:])

    def _grouped(self, x: Tensor) -> Tensor:
        """Reshape to (batch * folded, groups, channels, positions)."""
        channels = x.shape[1] // (self.folded * self.groups)
        return x.reshape(x.shape[0] * self.folded, self.groups, channels, math.prod(x.shape[2:]))

    def _images(self, x: Tensor, last: bool) -> Tensor:
        """Reshape to (batch * folded, channels, positions), in either memory layout."""
        batch, channels, *places = x.shape
        if self.folded == 1 and last:
            return x.movedim(1, -1).reshape(batch, math.prod(places), channels).mT
        return x.reshape(batch * self.folded, channels // self.folded, math.prod(places))

    def _spread(self, y: Tensor, x: Tensor, layout: str) -> Tensor:
        """Reshape the result of ``_images`` to (batch, folded * channels, *spatial)."""
        batch, places = x.shape[0], x.shape[2:]
        if layout == LAST:
            return y.mT.reshape(batch, *places, y.shape[1]).movedim(-1, 1)
        return y.reshape(batch, self.folded * y.shape[1], *places)


def reorder(x: Tensor, sizes: tuple[int, ...], order: tuple[int, ...], last: bool = False) -> Tensor:
    """Permute the channels of ``(batch, channels, *spatial)``, split into ``sizes``.

    ``last``: to channels-last memory.
    """
    batch, places = x.shape[0], x.shape[2:]
    spatial = range(1 + len(sizes), 1 + len(sizes) + len(places))
    x = x.reshape(batch, *sizes, *places).permute(0, *(1 + k for k in order), *spatial)
    x = x.reshape(batch, math.prod(sizes), *places)
    return _channels_last(x) if last else x.contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _packed(tensor: Tensor) -> Tensor:
    """Return the tensor with contiguous strides also for axes of size 1, which ``contiguous()`` does not change."""
    return tensor.flatten().view(tensor.shape)
