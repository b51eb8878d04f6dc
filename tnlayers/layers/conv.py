"""Convolutions in one, two and three dimensions, with arguments of and conversion from and to ``torch.nn.ConvNd``."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import nn

from tnlayers import validate
from tnlayers.execution.attributes import from_geometry, settable
from tnlayers.init.variance import Init
from tnlayers.layers.base import TensorLayer
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.rank import Rank


class TensorConvNd(TensorLayer):
    """Base of convolutions and transposed convolutions, with ``torch.nn.ConvNd``'s attributes."""

    dense_name = "conv"
    ndim: ClassVar[int]

    # The layer computes with its geometry; these are torch's names for the fields.
    in_channels = from_geometry("in_channels")
    out_channels = from_geometry("out_channels")
    kernel_size = from_geometry("kernel_size")
    stride = settable("stride")
    padding = settable("padding")
    dilation = settable("dilation")
    groups = from_geometry("groups")
    padding_mode = settable("padding_mode")
    transposed = from_geometry("transposed")
    output_padding = settable("output_padding")

    @classmethod
    def from_conv(cls, conv: nn.Module, *, rank: Rank | None = None, decompose: bool = True, **kwargs: Any) -> Self:
        """Return a tensor layer for an ``nn.ConvNd``: ``from_dense`` by another name."""
        return cls.from_dense(conv, rank=rank, decompose=decompose, **kwargs)

    def to_conv(self) -> Any:
        """Return a plain ``nn.ConvNd`` with the same function: ``to_dense`` by another name."""
        return self.to_dense()

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        names = [field.name for field in fields(Geometry) if field.name not in ("input_size", "transposed")]
        if not layer.transposed:
            names.remove("output_padding")
        return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}

    def extra_repr(self) -> str:
        """Return ``nn.ConvNd``'s fields, without defaults as there, then the format's."""
        shown = [f"{self.in_channels}, {self.out_channels}"]
        none = (0,) * self.ndim
        unshown = {"padding": none, "dilation": (1,) * self.ndim, "output_padding": none, "groups": 1, "bias": True}
        unshown["padding_mode"] = "zeros"
        values = {name: getattr(self, name) for name in ("kernel_size", "stride", *unshown)}
        values["bias"] = self.bias is not None
        shown += [f"{name}={value}" for name, value in values.items() if value != unshown.get(name)]
        return ", ".join([*shown, super().extra_repr()])


class TensorConv(TensorConvNd):
    """A convolution whose kernel is a tensor network.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            ``torch.nn.ConvNd`` takes them; dtype is float64, float32, bfloat16 or float16.
        rank: an integer for every bond; a sequence in the order of ``layer.rank``; a mapping from bond to size; or a
            float in (0, 1], the keep ratio: the largest network with at most this share of the dense kernel's
            parameters. None: a keep ratio of 0.25, or the format's smallest network where that is larger.
        in_shape, out_shape: factors of in_channels / groups and of out_channels, most significant first; None: the
            format's own split.
        init: the name of a mode, 'fan_in', 'fan_out' or 'fan_avg', or a ``tnlayers.Init``.
        strategy: 'auto' takes the plan of least estimated time, in doubt the dense kernel; 'reconstruct' builds the
            dense kernel; 'factorized' contracts the input with the cores one by one; an order such as '0 > 1*2' gives
            the cores of each step.
        memory: 'auto' keeps the estimated peak of a training step below 1.5 * (the dense layer's kernel, input and
            output, and their gradients), if any plan does; 'low' saves only the input between forward and backward, and
            runs the forward again.
        **options: the format's own.

    Shape:
        As ``torch.nn.ConvNd``: ``(N, in_channels, *spatial)`` or ``(in_channels, *spatial)``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted. Or the
            cores are larger than the free memory; nothing is allocated then.

    Warns:
        LargerThanDense: the cores have more parameters than the dense kernel. Not on the meta device.

    Example:
        >>> class RingConv2d(TensorConv2d, format="tr"): ...
        >>> layer = RingConv2d(16, 32, 3, padding=1, rank=4)
        >>> layer(torch.randn(1, 16, 8, 8)).shape, f"{layer.keep_ratio:.3f}"
        (torch.Size([1, 32, 8, 8]), '0.198')
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
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
        super().__init__(
            Geometry(in_channels, out_channels, size, stride, padding, dilation, groups, padding_mode),
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


class TensorConv1d(TensorConv):
    """A convolution over (N, in_channels, W); see ``TensorConv``."""

    ndim, dense_type = 1, nn.Conv1d


class TensorConv2d(TensorConv):
    """A convolution over (N, in_channels, H, W); see ``TensorConv``."""

    ndim, dense_type = 2, nn.Conv2d


class TensorConv3d(TensorConv):
    """A convolution over (N, in_channels, D, H, W); see ``TensorConv``."""

    ndim, dense_type = 3, nn.Conv3d
