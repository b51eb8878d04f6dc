"""Hierarchical Tucker (HT) layers."""

from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.linear import TensorLinear


class HTConv1d(TensorConv1d, format="ht"):
    """A hierarchical Tucker (HT) convolution over (N, C, W). See ``HTConv2d``.

    Example:
        >>> layer = HTConv1d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        w r1, i1 o1 r2, r1 r2 r1x2, i2 o2 r3, r1x2 r3
    """


class HTConv2d(TensorConv2d, format="ht"):
    """A hierarchical Tucker (HT) convolution over (N, C, H, W).

    A binary tree: a leaf for the kernel axes and one for each pair of channel factors, joined two by two.

    Reference:
        Hackbusch and Kuehn 2009; Grasedyck 2010; Yin et al., CVPR 2021.

    Example:
        >>> layer = HTConv2d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        h w r1, i1 o1 r2, r1 r2 r1x2, i2 o2 r3, r1x2 r3
    """


class HTConv3d(TensorConv3d, format="ht"):
    """A hierarchical Tucker (HT) convolution over (N, C, D, H, W). See ``HTConv2d``.

    Example:
        >>> layer = HTConv3d(16, 32, 3, padding=1, rank=8)
        >>> print(layer.network)
        d h w r1, i1 o1 r2, r1 r2 r1x2, i2 o2 r3, r1x2 r3
    """


class HTConvTranspose1d(TensorConvTranspose1d, format="ht"):
    """A transposed hierarchical Tucker (HT) convolution; see ``HTConv2d`` and ``TensorConvTranspose``."""


class HTConvTranspose2d(TensorConvTranspose2d, format="ht"):
    """A transposed hierarchical Tucker (HT) convolution; see ``HTConv2d`` and ``TensorConvTranspose``."""


class HTConvTranspose3d(TensorConvTranspose3d, format="ht"):
    """A transposed hierarchical Tucker (HT) convolution; see ``HTConv2d`` and ``TensorConvTranspose``."""


class HTLinear(TensorLinear, format="ht"):
    """A hierarchical Tucker (HT) linear layer. See ``HTConv2d`` and ``TensorLinear``.

    Example:
        >>> layer = HTLinear(16, 32, rank=8)
        >>> print(layer.network)
        i1 o1 r1, i2 o2 r2, r1 r2
    """
