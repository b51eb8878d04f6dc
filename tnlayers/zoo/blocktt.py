"""Block-tensor-train (BlockTT) layers."""

from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.linear import TensorLinear


class BlockTTConv1d(TensorConv1d, format="blocktt"):
    """A block-tensor-train (BlockTT) convolution over (N, C, W). See ``BlockTTConv2d``.

    Example:
        >>> layer = BlockTTConv1d(16, 32, 3, padding=1, rank=2)
        >>> print(layer.network)
        i1 i2 w o1 r, r i1 o1 o2
    """


class BlockTTConv2d(TensorConv2d, format="blocktt"):
    """A block-tensor-train (BlockTT) convolution over (N, C, H, W).

    Two block-diagonal maps with a permutation between them, summed over ``rank`` pairs; rank 1 is a Monarch matrix.

    Reference:
        Dao et al., ICML 2022; Qiu et al., "Compute Better Spent", ICML 2024.

    Example:
        >>> layer = BlockTTConv2d(16, 32, 3, padding=1, rank=2)
        >>> print(layer.network)
        i1 i2 h w o1 r, r i1 o1 o2
    """


class BlockTTConv3d(TensorConv3d, format="blocktt"):
    """A block-tensor-train (BlockTT) convolution over (N, C, D, H, W). See ``BlockTTConv2d``.

    Example:
        >>> layer = BlockTTConv3d(16, 32, 3, padding=1, rank=2)
        >>> print(layer.network)
        i1 i2 d h w o1 r, r i1 o1 o2
    """


class BlockTTConvTranspose1d(TensorConvTranspose1d, format="blocktt"):
    """A transposed block-tensor-train (BlockTT) convolution; see ``BlockTTConv2d`` and ``TensorConvTranspose``."""


class BlockTTConvTranspose2d(TensorConvTranspose2d, format="blocktt"):
    """A transposed block-tensor-train (BlockTT) convolution; see ``BlockTTConv2d`` and ``TensorConvTranspose``."""


class BlockTTConvTranspose3d(TensorConvTranspose3d, format="blocktt"):
    """A transposed block-tensor-train (BlockTT) convolution; see ``BlockTTConv2d`` and ``TensorConvTranspose``."""


class BlockTTLinear(TensorLinear, format="blocktt"):
    """A block-tensor-train (BlockTT) linear layer. See ``BlockTTConv2d`` and ``TensorLinear``.

    Example:
        >>> layer = BlockTTLinear(16, 32, rank=2)
        >>> print(layer.network)
        i1 i2 o1 r, r i1 o1 o2
    """
