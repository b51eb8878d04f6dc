"""Tensor-train (TT) layers."""

from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.linear import TensorLinear


class TTConv1d(TensorConv1d, format="tt"):
    """A tensor-train (TT) convolution over (N, C, W). See ``TTConv2d``.

    Example:
        >>> layer = TTConv1d(16, 32, 3, padding=1, rank=4)
        >>> print(layer.network)
        w r1, r1 i1 o1 r2, r2 i2 o2
    """


class TTConv2d(TensorConv2d, format="tt"):
    """A tensor-train (TT) convolution over (N, C, H, W).

    ``layout="matrix"`` (default): one core with the kernel axes, then one for each pair of channel factors.
    ``layout="chain"``: input channels, each kernel axis, output channels.

    Reference:
        Oseledets 2011; Garipov et al. 2016 (arXiv 1611.03214).

    Example:
        >>> layer = TTConv2d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        h w r1, r1 i1 o1 r2, r2 i2 o2
    """


class TTConv3d(TensorConv3d, format="tt"):
    """A tensor-train (TT) convolution over (N, C, D, H, W). See ``TTConv2d``.

    Example:
        >>> layer = TTConv3d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        d h w r1, r1 i1 o1 r2, r2 i2 o2
    """


class TTConvTranspose1d(TensorConvTranspose1d, format="tt"):
    """A transposed tensor-train (TT) convolution; see ``TTConv2d`` and ``TensorConvTranspose``."""


class TTConvTranspose2d(TensorConvTranspose2d, format="tt"):
    """A transposed tensor-train (TT) convolution; see ``TTConv2d`` and ``TensorConvTranspose``."""


class TTConvTranspose3d(TensorConvTranspose3d, format="tt"):
    """A transposed tensor-train (TT) convolution; see ``TTConv2d`` and ``TensorConvTranspose``."""


class TTLinear(TensorLinear, format="tt"):
    """A tensor-train (TT) linear layer. See ``TTConv2d`` and ``TensorLinear``.

    Example:
        >>> layer = TTLinear(16, 32, rank=8)
        >>> print(layer.network)
        i1 o1 r1, r1 i2 o2
    """
