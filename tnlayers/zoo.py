"""The public layers: a format and a number of dimensions each. Arguments and errors are ``TensorConv``'s."""

from tnlayers.conv import TensorConv1d, TensorConv2d, TensorConv3d


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


class TTConv1d(TensorConv1d, format="tt"):
    """A tensor-train (TT) convolution over (N, C, W). See ``TTConv2d``.

    Example:
        >>> layer = TTConv1d(16, 32, 3, padding=1, rank=8)
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


class TRConv1d(TensorConv1d, format="tr"):
    """A tensor-ring (TR) convolution over (N, C, W). See ``TRConv2d``.

    Example:
        >>> layer = TRConv1d(16, 32, 3, padding=1, rank=8)
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


class EinsumConv1d(TensorConv1d, format="einsum"):
    """A user-written tensor-network convolution over (N, C, W). See ``EinsumConv2d``.

    Example:
        >>> layer = EinsumConv1d(16, 32, 3, padding=1, network="i a, a w b, b o", rank=8)
        >>> print(layer.network)
        i a, a w b, b o
    """


class EinsumConv2d(TensorConv2d, format="einsum"):
    """A user-written tensor-network convolution over (N, C, H, W).

    ``network`` is the text of any network, as ``tnlayers.network`` reads it; a size behind a name, ``n:4``, fixes
    that bond.

    Example:
        >>> layer = EinsumConv2d(16, 32, 3, padding=1, network="i1 a, i2 b, a b h w c, c o", rank=8)
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
