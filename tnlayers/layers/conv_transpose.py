"""Transposed convolutions in one, two and three dimensions, as ``torch.nn.ConvTransposeNd``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.input_checks import check_tensor
from tnlayers.init.variance import Init
from tnlayers.layers.conv import TensorConvNd
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.rank import Rank


class TensorConvTranspose(TensorConvNd):
    """A transposed convolution whose kernel is a tensor network.

    As in every layer, the network's input axes are the input channels, and its output axes the output channels.
    ``layer.weight`` has the shape of torch's, ``(in_channels, out_channels / groups, *kernel_size)``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as ``torch.nn.ConvTransposeNd`` takes them.
        output_padding, groups, bias, dilation, padding_mode, device, dtype: the same, in its order.
        rank, in_shape, out_shape, init, strategy, memory: see ``TensorConv``.
        **options: the format's own.

    Shape:
        As ``torch.nn.ConvTransposeNd``: ``(N, in_channels, *spatial)`` or ``(in_channels, *spatial)``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted.

    Example:
        >>> class RingUp(TensorConvTranspose2d, format="tr"): ...
        >>> RingUp(16, 32, 2, stride=2, rank=4)(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 32, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank | None = None,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        init: str | Init = "fan_in",
        strategy: str = "auto",
        memory: str = "auto",
        **options: Any,
    ) -> None:
        """Make the layer and draw its cores. The class describes the arguments."""
        size = validate.integers("kernel_size", kernel_size, self.ndim)
        geometry = Geometry(
            in_channels, out_channels, size, stride, padding, dilation, groups, padding_mode,
            transposed=True, output_padding=output_padding,
        )  # fmt: skip
        super().__init__(
            geometry,
            bias=bias,
            device=device,
            dtype=dtype,
            rank=rank,
            in_shape=in_shape,
            out_shape=out_shape,
            init=init,
            strategy=strategy,
            memory=memory,
            options=options,
        )

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer.

        Args:
            input: shape ``(N, in_channels, *spatial)``, or ``(in_channels, *spatial)`` unbatched.
            output_size: spatial size of the output, with or without batch and channels before it, as for
                ``torch.nn.ConvTransposeNd.forward``: one of the ``stride`` sizes that the input can come from.

        Returns:
            Tensor: shape ``(N, out_channels, *spatial')``, or without N.

        Raises:
            ValueError: the input has other dimensions or channels, or cannot give this output size.
        """
        check_tensor(type(self).__name__, input)
        if output_size is None or input.is_nested:
            return self._run(input)
        size, extra = self._sizes(input, output_size)
        if not torch.compiler.is_compiling():
            return self._run(input, extra)
        # A compiler may leave sizes open, but compiles one plan: for the largest output, which contains this one.
        y = self._run(input, tuple(stride - 1 for stride in self.stride))
        for axis, length in enumerate(size, start=-self.ndim):
            y = y.narrow(axis, 0, length)
        return y

    def _sizes(self, input: Tensor, output_size: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the checked output size, and its excess over the least."""
        self._batched(input.shape)
        if not isinstance(output_size, Sequence) or isinstance(output_size, str):
            raise TypeError(f"output_size is {output_size!r}; it must be a sequence of {self.ndim} integers")
        if len(output_size) not in (self.ndim, input.ndim):
            raise ValueError(
                f"output_size is {tuple(output_size)}; it must have {self.ndim} or {input.ndim} entries for this input"
            )
        wanted = tuple(output_size)[-self.ndim :]
        if not torch.compiler.is_compiling():
            wanted = validate.integers("output_size", wanted, self.ndim)
        least = self.geometry.least_size(tuple(input.shape[-self.ndim :]))
        most = tuple(size + stride - 1 for size, stride in zip(least, self.stride, strict=True))
        if not all(low <= size <= high for low, size, high in zip(least, wanted, most, strict=True)):
            raise ValueError(f"output_size is {wanted}; this input gives sizes from {least} to {most}")
        return wanted, tuple(size - low for size, low in zip(wanted, least, strict=True))


class TensorConvTranspose1d(TensorConvTranspose):
    """A transposed convolution over (N, in_channels, W); see ``TensorConvTranspose``."""

    ndim, dense_type = 1, nn.ConvTranspose1d


class TensorConvTranspose2d(TensorConvTranspose):
    """A transposed convolution over (N, in_channels, H, W); see ``TensorConvTranspose``."""

    ndim, dense_type = 2, nn.ConvTranspose2d


class TensorConvTranspose3d(TensorConvTranspose):
    """A transposed convolution over (N, in_channels, D, H, W); see ``TensorConvTranspose``."""

    ndim, dense_type = 3, nn.ConvTranspose3d
