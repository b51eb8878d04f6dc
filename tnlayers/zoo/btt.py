"""Block-term Tucker (BTT) layers."""

from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.linear import TensorLinear


class BTTConv1d(TensorConv1d, format="btt"):
    """A block-term Tucker (BTT) convolution over (N, C, W). See ``BTTConv2d``.

    Example:
        >>> layer = BTTConv1d(16, 32, 3, padding=1, rank=4, blocks=2)
        >>> print(layer.network)
        n r1 r2 r3 rw, n i1 o1 r1, n i2 o2 r2, n i3 o3 r3, n w rw
    """


class BTTConv2d(TensorConv2d, format="btt"):
    """A block-term Tucker (BTT) convolution over (N, C, H, W).

    A sum of ``blocks`` Tucker terms over pairs of channel factors and over the kernel axes; ``rank`` does not count the
    blocks.

    Reference:
        De Lathauwer 2008; Ye et al. 2020 (arXiv 2010.04963).

    Example:
        >>> layer = BTTConv2d(16, 32, 3, padding=1, rank=4, blocks=2)
        >>> print(layer.network)
        n r1 r2 r3 rh rw, n i1 o1 r1, n i2 o2 r2, n i3 o3 r3, n h rh, n w rw
    """


class BTTConv3d(TensorConv3d, format="btt"):
    """A block-term Tucker (BTT) convolution over (N, C, D, H, W). See ``BTTConv2d``.

    Example:
        >>> layer = BTTConv3d(16, 32, 3, padding=1, rank=4, blocks=2)
        >>> print(layer.network)
        n r1 r2 r3 rd rh rw, n i1 o1 r1, n i2 o2 r2, n i3 o3 r3, n d rd, n h rh, n w rw
    """


class BTTConvTranspose1d(TensorConvTranspose1d, format="btt"):
    """A transposed block-term Tucker (BTT) convolution; see ``BTTConv2d`` and ``TensorConvTranspose``."""


class BTTConvTranspose2d(TensorConvTranspose2d, format="btt"):
    """A transposed block-term Tucker (BTT) convolution; see ``BTTConv2d`` and ``TensorConvTranspose``."""


class BTTConvTranspose3d(TensorConvTranspose3d, format="btt"):
    """A transposed block-term Tucker (BTT) convolution; see ``BTTConv2d`` and ``TensorConvTranspose``."""


class BTTLinear(TensorLinear, format="btt"):
    """A block-term Tucker (BTT) linear layer. See ``BTTConv2d`` and ``TensorLinear``.

    Example:
        >>> layer = BTTLinear(16, 32, rank=4, blocks=2)
        >>> print(layer.network)
        n r1 r2 r3, n i1 o1 r1, n i2 o2 r2, n i3 o3 r3
    """
