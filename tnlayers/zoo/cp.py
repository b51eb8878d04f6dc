"""Canonical polyadic (CP) layers."""

from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.linear import TensorLinear


class CPConv1d(TensorConv1d, format="cp"):
    """A canonical polyadic (CP) convolution over (N, C, W). See ``CPConv2d``.

    Example:
        >>> layer = CPConv1d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        i r, o r, w r
    """


class CPConv2d(TensorConv2d, format="cp"):
    """A canonical polyadic (CP) convolution over (N, C, H, W).

    One core for every axis, joined by the single bond ``r``.

    Reference:
        Hitchcock 1927; Lebedev et al., ICLR 2015 (arXiv 1412.6553).

    Example:
        >>> layer = CPConv2d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        i r, o r, h r, w r
    """


class CPConv3d(TensorConv3d, format="cp"):
    """A canonical polyadic (CP) convolution over (N, C, D, H, W). See ``CPConv2d``.

    Example:
        >>> layer = CPConv3d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        i r, o r, d r, h r, w r
    """


class CPConvTranspose1d(TensorConvTranspose1d, format="cp"):
    """A transposed canonical polyadic (CP) convolution; see ``CPConv2d`` and ``TensorConvTranspose``."""


class CPConvTranspose2d(TensorConvTranspose2d, format="cp"):
    """A transposed canonical polyadic (CP) convolution; see ``CPConv2d`` and ``TensorConvTranspose``."""


class CPConvTranspose3d(TensorConvTranspose3d, format="cp"):
    """A transposed canonical polyadic (CP) convolution; see ``CPConv2d`` and ``TensorConvTranspose``."""


class CPLinear(TensorLinear, format="cp"):
    """A canonical polyadic (CP) linear layer. See ``CPConv2d`` and ``TensorLinear``.

    Example:
        >>> layer = CPLinear(16, 32, rank=8)
        >>> print(layer.network)
        i r, o r
    """
