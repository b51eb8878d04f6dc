"""Block tensor train (BlockTT). At rank 1 it is a Monarch matrix."""

from dataclasses import dataclass
from typing import Any

from tnlayers.formats.base import Format, Shape, factorize, register
from tnlayers.spec.notation import Axes


@register("blocktt")
@dataclass(frozen=True)
class BlockTT(Format):
    r"""A sum over ``r`` of products of two block-diagonal matrices with a permutation between them.

    .. math:: W_{(o_1 o_2)(i_1 i_2)\,h\,w} = \sum_r A_{i_1 i_2\,h\,w\,o_1 r} B_{r\,i_1 o_1 o_2}

    ``i1`` indexes the blocks of the first matrix, ``o1`` those of the second. Both are dense axes of both cores.
    tensorly-torch's BlockTT is a different format: it is TT in matrix layout here.

    Reference:
        Dao et al., "Monarch", ICML 2022; Qiu et al., "Compute Better Spent", ICML 2024.

    Example:
        >>> BlockTT().text(("i1", "i2"), ("o1", "o2"), ("h", "w"), rank=2)
        'i1 i2 h w o1 r, r i1 o1 o2'
    """

    def split(self, in_channels: int, out_channels: int, groups: int) -> tuple[Shape, Shape]:
        """Split input and output channels into two factors each, near the square root."""
        return factorize(in_channels, 2, exact=True), factorize(out_channels, 2, groups, exact=True)

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """Return the two cores."""
        for name, axes in (("in_shape", inputs), ("out_shape", outputs)):
            if len(axes) != 2:
                raise ValueError(
                    f"{name} has {len(axes)} factors ({', '.join(axes)}); BlockTT takes 2, such as (8, 8) of 64"
                )
        (i1, i2), (o1, o2) = inputs, outputs
        return f"{' '.join([i1, i2, *kernel])} {o1} r, r {i1} {o1} {o2}"
