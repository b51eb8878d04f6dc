"""Geometry of a layer: all arguments of ``torch.nn.ConvNd``, checked once, without weights. Uses no tensors."""

import math
from dataclasses import dataclass
from typing import Any

from tnlayers import validate

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Geometry:
    """Arguments of ``torch.nn.ConvNd``, checked and normalised. Without spatial axes, a linear map.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: kernel size along each spatial axis. Its length is the number of spatial axes.
        stride, dilation: one integer, or one per spatial axis.
        padding: one integer >= 0, one per spatial axis, 'same' or 'valid'.
        groups: number of channel groups. Divides in_channels and out_channels.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        input_size: spatial size of the input. If given, taps at the border are counted exactly.
        transposed: the adjoint of the convolution from out_channels to in_channels, as ``torch.nn.ConvTransposeNd``.
        output_padding: positions added at the end of each output axis of a transposed convolution. Less than stride
            or dilation.

    Raises:
        TypeError, ValueError: an argument is not as above. The message names it.

    Example:
        >>> g = Geometry(64, 128, (3, 3), stride=2, padding=1)
        >>> g.fan_in, g.fan_out
        (576.0, 288.0)
        >>> g = Geometry(64, 128, (3, 3), stride=2, padding=1, input_size=(8, 8))
        >>> round(g.fan_in, 1), round(g.fan_out, 1), g.output_size((8, 8))
        (484.0, 242.0, (4, 4))
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    padding_mode: str = "zeros"
    input_size: tuple[int, ...] | None = None
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            name: validate.integer(name, getattr(self, name)) for name in ("in_channels", "out_channels", "groups")
        }
        for name in ("in_channels", "out_channels"):
            if checked[name] % checked["groups"]:
                raise ValueError(f"groups is {checked['groups']}; it must divide {name}, which is {checked[name]}")
        if not isinstance(self.kernel_size, tuple | list):
            raise TypeError(f"kernel_size is {self.kernel_size!r}; it must be a tuple, one integer per spatial axis")
        ndim = len(self.kernel_size)
        for name in ("kernel_size", "stride", "dilation"):
            checked[name] = validate.integers(name, getattr(self, name), ndim, repeat=True)
        modes = PADDING_MODES[:1] if self.transposed else PADDING_MODES
        checked["padding_mode"] = validate.choice("padding_mode", self.padding_mode, modes)
        if isinstance(self.padding, str):
            checked["padding"] = validate.choice("padding", self.padding, ("same", "valid"))
            if self.padding == "same" and set(checked["stride"]) != {1}:
                raise ValueError(f"stride is {checked['stride']}; padding='same' is defined for stride 1 only")
        else:
            checked["padding"] = validate.integers("padding", self.padding, ndim, minimum=0, repeat=True)
        extra = validate.integers("output_padding", self.output_padding, ndim, minimum=0, repeat=True)
        checked["output_padding"] = extra
        self._check_transposed(checked)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.input_size is not None:
            if not ndim and self.input_size:
                raise ValueError(
                    f"input_size is {self.input_size}; a linear layer's input has no spatial size, use None"
                )
            object.__setattr__(self, "input_size", validate.integers("input_size", self.input_size, ndim))
            self.output_size(self.input_size)

    def _check_transposed(self, checked: dict[str, Any]) -> None:
        """Check the arguments that differ between convolution and transposed convolution."""
        extra = checked["output_padding"]
        if not self.transposed:
            if any(extra):
                raise ValueError(f"output_padding is {self.output_padding!r}; only a transposed convolution has one")
            return
        if "padding" not in checked or isinstance(checked["padding"], str):
            raise ValueError(f"padding is {self.padding!r}; a transposed convolution takes integers only")
        for more, stride, dilation in zip(extra, checked["stride"], checked["dilation"], strict=True):
            if more >= max(stride, dilation):
                raise ValueError(
                    f"output_padding is {self.output_padding!r}; along each axis it must be less than stride "
                    f"{checked['stride']} or dilation {checked['dilation']}"
                )

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of torch's weight: ``(out, in / groups, *kernel)``; transposed: ``(in, out / groups, *kernel)``."""
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        return (first, second // self.groups, *self.kernel_size)

    @property
    def bias_bound(self) -> float:
        """Bound of torch's bias: it is drawn from [-bound, bound]."""
        return 1 / math.sqrt(math.prod(self.weight_shape[1:]))

    @property
    def spans(self) -> tuple[int, ...]:
        """Number of input positions that the dilated kernel spans along each axis."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.each("dilation"), self.kernel_size, strict=True))

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """Padding (before, after) along each axis. 'same' adds an odd position after, as torch does."""
        if self.padding == "same":
            return tuple(((span - 1) // 2, span - 1 - (span - 1) // 2) for span in self.spans)
        return tuple((p, p) for p in self.each("padding"))

    @property
    def prepad(self) -> tuple[int, ...]:
        """Argument of ``F.pad``, last axis first, for padding that torch's convolution cannot do; empty if none."""
        symmetric = self.padding_mode == "zeros" and all(before == after for before, after in self.pads)
        if symmetric or not any(map(sum, self.pads)):
            return ()
        return tuple(amount for pair in reversed(self.pads) for amount in pair)

    def each(self, name: str) -> tuple[int, ...]:
        """Return stride, dilation or a padding as one integer per axis; 0 for the paddings 'same' and 'valid'."""
        value = getattr(self, name)
        return (0,) * self.ndim if isinstance(value, str) else value

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the output for an input's spatial size.

        Raises:
            ValueError: the padded input is smaller than the dilated kernel, or the padding of a transposed
                convolution leaves no output.
        """
        if self.transposed:
            least, extra = self.least_size(input_size), self.each("output_padding")
            found = tuple(size + more for size, more in zip(least, extra, strict=True))
            if min(found) < 1:
                raise ValueError(
                    f"input size {tuple(input_size)} with padding {self.padding!r} gives the output size {found}; it "
                    "must be at least 1 along each axis"
                )
            return found
        out = []
        for size, span, pad, stride in zip(input_size, self.spans, self.pads, self.each("stride"), strict=True):
            if size + sum(pad) < span:
                raise ValueError(
                    f"input size {tuple(input_size)} with padding {self.padding!r} is smaller than the kernel, which "
                    f"spans {self.spans} positions (kernel_size {self.kernel_size}, dilation {self.dilation})"
                )
            out.append((size + sum(pad) - span) // stride + 1)
        return tuple(out)

    def least_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output size of a transposed convolution without output_padding."""
        each = zip(input_size, self.spans, self.each("stride"), self.each("padding"), strict=True)
        return tuple((size - 1) * stride - 2 * pad + span for size, span, stride, pad in each)

    @property
    def taps(self) -> tuple[float, float]:
        """(T_fwd, T_bwd): mean number of real taps per output position, of (output, tap) pairs per input position.

        A transposed convolution has the same pairs as its adjoint convolution.
        """
        forward = backward = 1.0
        sizes = self.input_size or (None,) * self.ndim
        outs = self.output_size(self.input_size) if self.input_size else (0,) * self.ndim
        each = zip(sizes, outs, self.kernel_size, self.each("stride"), self.each("dilation"), self.pads, strict=True)
        for size, out, kernel, stride, dilation, (before, _) in each:
            if size is None:
                strided = kernel / stride
                forward, backward = (
                    forward * (strided if self.transposed else kernel),
                    backward * (kernel if self.transposed else strided),
                )
                continue
            coarse, fine = (size, out) if self.transposed else (out, size)
            if self.padding_mode == "zeros":
                # Of a tap, the positions that read before the end of the input, but for those that read before it.
                last = before - dilation * (kernel - 1)
                pairs = _clipped(kernel, dilation, last + fine - 1, stride, coarse)
                pairs -= _clipped(kernel, dilation, last - 1, stride, coarse)
            else:
                pairs = out * kernel
            forward, backward = forward * pairs / out, backward * pairs / size
        return forward, backward

    @property
    def fan_in(self) -> float:
        """Mean number of input entries summed by an output entry: C_in / groups * T_fwd."""
        return self.in_channels / self.groups * self.taps[0]

    @property
    def fan_out(self) -> float:
        """Mean number of output entries that an input entry reaches: C_out / groups * T_bwd."""
        return self.out_channels / self.groups * self.taps[1]


def _clipped(count: int, slope: int, start: int, step: int, most: int) -> int:
    """Return how many of the multiples 0, step, ..., (most - 1) * step are at most start + slope * k, summed over k.

    Args:
        count: the number of values of k, from 0.
        slope: by how much the bound grows with k; positive.
        start: the bound where k is 0.
        step: the difference of two multiples.
        most: the number of multiples.
    """
    some = min(count, max(0, -(start // slope)))  # the first k with a bound of 0 or more
    every = min(count, max(0, -((start - step * (most - 1)) // slope)))  # the first k whose bound lets all through
    return (count - every) * most + (every - some) + _floor_sum(every - some, slope, start + slope * some, step)


def _floor_sum(count: int, slope: int, start: int, divisor: int) -> int:
    """Return the sum of (start + slope * k) // divisor over k < count, in the time of Euclid's algorithm."""
    total = 0
    while count > 0:
        total += (count - 1) * count // 2 * (slope // divisor) + count * (start // divisor)
        slope, start = slope % divisor, start % divisor
        count, start = divmod(slope * count + start, divisor)
        slope, divisor = divisor, slope
    return total
