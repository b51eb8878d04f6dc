"""Tucker layers."""

from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.linear import TensorLinear


class TuckerConv1d(TensorConv1d, format="tucker"):
    """A Tucker convolution over (N, C, W). See ``TuckerConv2d``.

    Example:
        >>> layer = TuckerConv1d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        i ri, ri ro w, ro o
    """


class TuckerConv2d(TensorConv2d, format="tucker"):
    """A Tucker convolution over (N, C, H, W).

    Factor matrices on the channel axes around a core tensor that keeps the kernel axes whole (Tucker-2); one rank for
    every axis, or a mapping with ``rh`` or ``rw``, compresses those too.

    Reference:
        Tucker 1966; Kim et al., ICLR 2016 (arXiv 1511.06530).

    Example:
        >>> layer = TuckerConv2d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        i ri, ri ro h w, ro o
    """


class TuckerConv3d(TensorConv3d, format="tucker"):
    """A Tucker convolution over (N, C, D, H, W). See ``TuckerConv2d``.

    Example:
        >>> layer = TuckerConv3d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        i ri, ri ro d h w, ro o
    """


class TuckerConvTranspose1d(TensorConvTranspose1d, format="tucker"):
    """A transposed Tucker convolution; see ``TuckerConv2d`` and ``TensorConvTranspose``."""


class TuckerConvTranspose2d(TensorConvTranspose2d, format="tucker"):
    """A transposed Tucker convolution; see ``TuckerConv2d`` and ``TensorConvTranspose``."""


class TuckerConvTranspose3d(TensorConvTranspose3d, format="tucker"):
    """A transposed Tucker convolution; see ``TuckerConv2d`` and ``TensorConvTranspose``."""


class TuckerLinear(TensorLinear, format="tucker"):
    """A Tucker linear layer. See ``TuckerConv2d`` and ``TensorLinear``.

    Example:
        >>> layer = TuckerLinear(16, 32, rank=8)
        >>> print(layer.network)
        i ri, ri ro, ro o
    """
