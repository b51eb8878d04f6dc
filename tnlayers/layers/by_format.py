"""The layers of every format: a class for each kind of torch layer that a format can replace.

Arguments, shapes and errors are those of ``TensorConv``, ``TensorConvTranspose``, ``TensorLinear``, ``TensorEmbedding``
and ``TensorEmbeddingBag``. Options are those of the format's class in ``tnlayers.formats``. A class without a docstring
gets one made from both.
"""

from tnlayers.layers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import TensorConvTranspose1d, TensorConvTranspose2d, TensorConvTranspose3d
from tnlayers.layers.embedding import TensorEmbedding
from tnlayers.layers.embedding_bag import TensorEmbeddingBag
from tnlayers.layers.linear import TensorLinear

# fmt: off


class BlockTTConv2d(TensorConv2d, format="blocktt"):
    """A BlockTT (block tensor train) convolution over (N, C, H, W).

    A sum of ``rank`` pairs of block-diagonal maps, with a permutation in each pair. Rank 1 is a Monarch matrix.

    Example:
        >>> print(BlockTTConv2d(16, 32, 3, padding=1, rank=2).network)
        i1 i2 h w o1 r, r i1 o1 o2
    """


class BlockTTConv1d(TensorConv1d, format="blocktt"): ...
class BlockTTConv3d(TensorConv3d, format="blocktt"): ...
class BlockTTConvTranspose1d(TensorConvTranspose1d, format="blocktt"): ...
class BlockTTConvTranspose2d(TensorConvTranspose2d, format="blocktt"): ...
class BlockTTConvTranspose3d(TensorConvTranspose3d, format="blocktt"): ...
class BlockTTLinear(TensorLinear, format="blocktt"): ...
class BlockTTEmbedding(TensorEmbedding, format="blocktt"): ...
class BlockTTEmbeddingBag(TensorEmbeddingBag, format="blocktt"): ...


class BTTConv2d(TensorConv2d, format="btt"):
    """A BTT (block-term Tucker) convolution over (N, C, H, W).

    A sum of ``blocks`` Tucker terms over pairs of channel factors and over the kernel axes; ``rank`` does not count the
    blocks.

    Example:
        >>> print(BTTConv2d(16, 32, 3, padding=1, rank=4, blocks=2).network)
        n r1 r2 r3 rh rw, n i1 o1 r1, n i2 o2 r2, n i3 o3 r3, n h rh, n w rw
    """


class BTTConv1d(TensorConv1d, format="btt"): ...
class BTTConv3d(TensorConv3d, format="btt"): ...
class BTTConvTranspose1d(TensorConvTranspose1d, format="btt"): ...
class BTTConvTranspose2d(TensorConvTranspose2d, format="btt"): ...
class BTTConvTranspose3d(TensorConvTranspose3d, format="btt"): ...
class BTTLinear(TensorLinear, format="btt"): ...
class BTTEmbedding(TensorEmbedding, format="btt"): ...
class BTTEmbeddingBag(TensorEmbeddingBag, format="btt"): ...


class CPConv2d(TensorConv2d, format="cp"):
    """A CP (canonical polyadic) convolution over (N, C, H, W).

    One core for every axis, joined by the single bond ``r``.

    Example:
        >>> print(CPConv2d(16, 32, 3, padding=1, rank=8).network)
        i r, o r, h r, w r
    """


class CPConv1d(TensorConv1d, format="cp"): ...
class CPConv3d(TensorConv3d, format="cp"): ...
class CPConvTranspose1d(TensorConvTranspose1d, format="cp"): ...
class CPConvTranspose2d(TensorConvTranspose2d, format="cp"): ...
class CPConvTranspose3d(TensorConvTranspose3d, format="cp"): ...
class CPLinear(TensorLinear, format="cp"): ...
class CPEmbedding(TensorEmbedding, format="cp"): ...
class CPEmbeddingBag(TensorEmbeddingBag, format="cp"): ...


class EinsumConv2d(TensorConv2d, format="einsum"):
    """A user-written convolution over (N, C, H, W).

    ``network`` is the text of any network, in the notation of ``tnlayers.spec.network``. A size after a name, ``n:4``,
    fixes that bond.

    Example:
        >>> print(EinsumConv2d(16, 32, 3, padding=1, network="i1 a, i2 b, a b h w c, c o", rank=6).network)
        i1 a, i2 b, a b h w c, c o
    """


class EinsumConv1d(TensorConv1d, format="einsum"):
    """A user-written convolution over (N, C, W).

    See ``EinsumConv2d`` for the notation.

    Example:
        >>> import torch
        >>> EinsumConv1d(16, 32, 3, network="i a, a w b, b o", rank=4)(torch.randn(2, 16, 4)).shape
        torch.Size([2, 32, 2])
    """


class EinsumConv3d(TensorConv3d, format="einsum"):
    """A user-written convolution over (N, C, D, H, W).

    See ``EinsumConv2d`` for the notation.

    Example:
        >>> import torch
        >>> EinsumConv3d(16, 32, 3, network="i a, a d h w b, b o", rank=4)(torch.randn(2, 16, 4, 4, 4)).shape
        torch.Size([2, 32, 2, 2, 2])
    """


class EinsumConvTranspose1d(TensorConvTranspose1d, format="einsum"):
    """A user-written transposed convolution over (N, C, W).

    See ``EinsumConv2d`` for the notation.

    Example:
        >>> import torch
        >>> EinsumConvTranspose1d(16, 32, 3, network="i a, a w b, b o", rank=4)(torch.randn(2, 16, 4)).shape
        torch.Size([2, 32, 6])
    """


class EinsumConvTranspose2d(TensorConvTranspose2d, format="einsum"):
    """A user-written transposed convolution over (N, C, H, W).

    See ``EinsumConv2d`` for the notation.

    Example:
        >>> import torch
        >>> EinsumConvTranspose2d(16, 32, 3, network="i a, a h w b, b o", rank=4)(torch.randn(2, 16, 4, 4)).shape
        torch.Size([2, 32, 6, 6])
    """


class EinsumConvTranspose3d(TensorConvTranspose3d, format="einsum"):
    """A user-written transposed convolution over (N, C, D, H, W).

    See ``EinsumConv2d`` for the notation.

    Example:
        >>> import torch
        >>> EinsumConvTranspose3d(16, 32, 3, network="i a, a d h w b, b o", rank=4)(torch.randn(2, 16, 4, 4, 4)).shape
        torch.Size([2, 32, 6, 6, 6])
    """


class EinsumLinear(TensorLinear, format="einsum"):
    """A user-written linear layer.

    See ``EinsumConv2d`` for the notation.

    Example:
        >>> import torch
        >>> EinsumLinear(16, 32, network="i1 a, i2 a b, b o", rank=4)(torch.randn(2, 16)).shape
        torch.Size([2, 32])
    """


class EinsumEmbedding(TensorEmbedding, format="einsum"):
    """A user-written embedding.

    See ``EinsumConv2d`` for the notation. Input axes are the factors of the vocabulary.

    Example:
        >>> import torch
        >>> EinsumEmbedding(16, 32, network="i1 a, i2 a b, b o", rank=4)(torch.tensor([[0, 15, 3]])).shape
        torch.Size([1, 3, 32])
    """


class EinsumEmbeddingBag(TensorEmbeddingBag, format="einsum"):
    """A user-written bag of embeddings.

    See ``EinsumConv2d`` for the notation. Input axes are the factors of the vocabulary.

    Example:
        >>> import torch
        >>> EinsumEmbeddingBag(16, 32, network="i1 a, i2 a b, b o", rank=4)(torch.tensor([[0, 15, 3]])).shape
        torch.Size([1, 32])
    """


class HTConv2d(TensorConv2d, format="ht"):
    """An HT (hierarchical Tucker) convolution over (N, C, H, W).

    A binary tree: a leaf for the kernel axes and one for each pair of channel factors, joined two by two.

    Example:
        >>> print(HTConv2d(16, 32, 3, padding=1, rank=8).network)
        h w r1, i1 o1 r2, r1 r2 r1x2, i2 o2 r3, r1x2 r3
    """


class HTConv1d(TensorConv1d, format="ht"): ...
class HTConv3d(TensorConv3d, format="ht"): ...
class HTConvTranspose1d(TensorConvTranspose1d, format="ht"): ...
class HTConvTranspose2d(TensorConvTranspose2d, format="ht"): ...
class HTConvTranspose3d(TensorConvTranspose3d, format="ht"): ...
class HTLinear(TensorLinear, format="ht"): ...
class HTEmbedding(TensorEmbedding, format="ht"): ...
class HTEmbeddingBag(TensorEmbeddingBag, format="ht"): ...


class TRConv2d(TensorConv2d, format="tr"):
    """A TR (tensor ring) convolution over (N, C, H, W).

    A closed chain: a core for each input factor, one with the kernel axes, one for each output factor.

    Example:
        >>> print(TRConv2d(16, 32, 3, padding=1, rank=8).network)
        r0 i r1, r1 h w r2, r2 o r0
    """


class TRConv1d(TensorConv1d, format="tr"): ...
class TRConv3d(TensorConv3d, format="tr"): ...
class TRConvTranspose1d(TensorConvTranspose1d, format="tr"): ...
class TRConvTranspose2d(TensorConvTranspose2d, format="tr"): ...
class TRConvTranspose3d(TensorConvTranspose3d, format="tr"): ...
class TRLinear(TensorLinear, format="tr"): ...
class TREmbedding(TensorEmbedding, format="tr"): ...
class TREmbeddingBag(TensorEmbeddingBag, format="tr"): ...


class TTConv2d(TensorConv2d, format="tt"):
    """A TT (tensor train) convolution over (N, C, H, W).

    ``layout="matrix"`` (default): one core with the kernel axes, then one for each pair of channel factors.
    ``layout="chain"``: input channels, each kernel axis, output channels.

    Example:
        >>> print(TTConv2d(16, 32, 3, padding=1, rank=8).network)
        h w r1, r1 i1 o1 r2, r2 i2 o2
    """


class TTConv1d(TensorConv1d, format="tt"): ...
class TTConv3d(TensorConv3d, format="tt"): ...
class TTConvTranspose1d(TensorConvTranspose1d, format="tt"): ...
class TTConvTranspose2d(TensorConvTranspose2d, format="tt"): ...
class TTConvTranspose3d(TensorConvTranspose3d, format="tt"): ...
class TTLinear(TensorLinear, format="tt"): ...
class TTEmbedding(TensorEmbedding, format="tt"): ...
class TTEmbeddingBag(TensorEmbeddingBag, format="tt"): ...


class TuckerConv2d(TensorConv2d, format="tucker"):
    """A Tucker convolution over (N, C, H, W).

    Factor matrices on the channel axes, around a core tensor with the full kernel axes (Tucker-2). One rank for every
    axis, or a mapping with ``rh`` or ``rw``, compresses those too.

    Example:
        >>> print(TuckerConv2d(16, 32, 3, padding=1, rank=8).network)
        i ri, ri ro h w, ro o
    """


class TuckerConv1d(TensorConv1d, format="tucker"): ...
class TuckerConv3d(TensorConv3d, format="tucker"): ...
class TuckerConvTranspose1d(TensorConvTranspose1d, format="tucker"): ...
class TuckerConvTranspose2d(TensorConvTranspose2d, format="tucker"): ...
class TuckerConvTranspose3d(TensorConvTranspose3d, format="tucker"): ...
class TuckerLinear(TensorLinear, format="tucker"): ...
class TuckerEmbedding(TensorEmbedding, format="tucker"): ...
class TuckerEmbeddingBag(TensorEmbeddingBag, format="tucker"): ...
