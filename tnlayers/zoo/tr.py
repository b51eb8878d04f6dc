"""Tensor-ring (TR) layers."""

from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.linear import TensorLinear


class TRConv1d(TensorConv1d, format="tr"):
    """A tensor-ring (TR) convolution over (N, C, W). See ``TRConv2d``.

    Example:
        >>> layer = TRConv1d(16, 32, 3, padding=1, rank=4)
        >>> print(layer.network)
        r0 i r1, r1 w r2, r2 o r0
    """


class TRConv2d(TensorConv2d, format="tr"):
    """A tensor-ring (TR) convolution over (N, C, H, W).

    A closed chain: a core for each input factor, one with the kernel axes, one for each output factor.

    Reference:
        Zhao et al. 2016 (arXiv 1606.05535); Wang et al., CVPR 2018 (arXiv 1802.09052).

    Example:
        >>> layer = TRConv2d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        r0 i r1, r1 h w r2, r2 o r0
    """


class TRConv3d(TensorConv3d, format="tr"):
    """A tensor-ring (TR) convolution over (N, C, D, H, W). See ``TRConv2d``.

    Example:
        >>> layer = TRConv3d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        r0 i r1, r1 d h w r2, r2 o r0
    """


class TRConvTranspose1d(TensorConvTranspose1d, format="tr"):
    """A transposed tensor-ring (TR) convolution; see ``TRConv2d`` and ``TensorConvTranspose``."""


class TRConvTranspose2d(TensorConvTranspose2d, format="tr"):
    """A transposed tensor-ring (TR) convolution; see ``TRConv2d`` and ``TensorConvTranspose``."""


class TRConvTranspose3d(TensorConvTranspose3d, format="tr"):
    """A transposed tensor-ring (TR) convolution; see ``TRConv2d`` and ``TensorConvTranspose``."""


class TRLinear(TensorLinear, format="tr"):
    """A tensor-ring (TR) linear layer. See ``TRConv2d`` and ``TensorLinear``.

    Example:
        >>> layer = TRLinear(16, 32, rank=3)
        >>> print(layer.network)
        r0 i r1, r1 o r0
    """
