"""User-written tensor-network layers."""

from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.linear import TensorLinear


class EinsumConv1d(TensorConv1d, format="einsum"):
    """A user-written tensor-network convolution over (N, C, W). See ``EinsumConv2d``.

    Example:
        >>> layer = EinsumConv1d(16, 32, 3, padding=1, network="i a, a w b, b o", rank=8)
        >>> print(layer.network)
        i a, a w b, b o
    """


class EinsumConv2d(TensorConv2d, format="einsum"):
    """A user-written tensor-network convolution over (N, C, H, W).

    ``network`` is the text of any network, as ``tnlayers.spec.network`` reads it; a size behind a name, ``n:4``, fixes
    that bond.

    Example:
        >>> layer = EinsumConv2d(16, 32, 3, padding=1, network="i1 a, i2 b, a b h w c, c o", rank=6)
        >>> print(layer.network)
        i1 a, i2 b, a b h w c, c o
    """


class EinsumConv3d(TensorConv3d, format="einsum"):
    """A user-written tensor-network convolution over (N, C, D, H, W). See ``EinsumConv2d``.

    Example:
        >>> layer = EinsumConv3d(16, 32, 3, padding=1, network="i r, o r, d r, h r, w r", rank=8)
        >>> print(layer.network)
        i r, o r, d r, h r, w r
    """


class EinsumConvTranspose1d(TensorConvTranspose1d, format="einsum"):
    """A transposed user-written tensor-network convolution; see ``EinsumConv2d`` and ``TensorConvTranspose``."""


class EinsumConvTranspose2d(TensorConvTranspose2d, format="einsum"):
    """A transposed user-written tensor-network convolution; see ``EinsumConv2d`` and ``TensorConvTranspose``."""


class EinsumConvTranspose3d(TensorConvTranspose3d, format="einsum"):
    """A transposed user-written tensor-network convolution; see ``EinsumConv2d`` and ``TensorConvTranspose``."""


class EinsumLinear(TensorLinear, format="einsum"):
    """A user-written tensor-network linear layer. See ``EinsumConv2d`` and ``TensorLinear``.

    Example:
        >>> layer = EinsumLinear(16, 32, network="i1 a, i2 a b, b o", rank=6)
        >>> print(layer.network)
        i1 a, i2 a b, b o
    """
