"""Hierarchical Tucker decomposition (HT)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tnlayers.formats.base import Format, paired, register
from tnlayers.notation import Axes


@register("ht")
@dataclass(frozen=True)
class HT(Format):
    """A binary tree: a leaf for each pair of an input and an output axis and one for the kernel, joined two by two.

    The k-th leaf hangs on the bond ``rk``; what joins leaves ``a`` to ``b`` hands on the bond ``rab``; the root has no
    bond above it.

    Reference:
        Hackbusch and Kuehn 2009; Grasedyck 2010; for layers, Yin et al., "Towards Extremely Compact RNNs for Video
        Recognition with Fully Decomposed Hierarchical Tucker Structure", CVPR 2021.

    Example:
        >>> HT().text(("i1", "i2"), ("o1", "o2"), ("h", "w"), rank=8)
        'h w r1, i1 o1 r2, r1 r2 r12, i2 o2 r3, r12 r3'
    """

    @property
    def factors(self) -> int:
        """Two pairs of an input and an output axis."""
        return 2

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """The cores of the tree, each subtree before what joins it."""
        leaves = [*([" ".join(kernel)] if kernel else []), *paired(inputs, outputs)]

        def tree(numbers: Sequence[int]) -> list[str]:
            above = f" r{'x'.join(map(str, numbers))}".replace("x", "") if len(numbers) < len(leaves) else ""
            if len(numbers) == 1:
                return [leaves[numbers[0] - 1] + above]
            middle = (len(numbers) + 1) // 2
            halves = numbers[:middle], numbers[middle:]
            bonds = (f"r{''.join(map(str, half))}" for half in halves)
            return [*tree(halves[0]), *tree(halves[1]), " ".join(bonds) + above]

        return ", ".join(tree(range(1, len(leaves) + 1)))
