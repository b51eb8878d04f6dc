"""Hierarchical Tucker decomposition (HT)."""

from dataclasses import dataclass
from typing import Any

from tnlayers.formats.base import Format, paired, register
from tnlayers.spec.notation import Axes


@register("ht")
@dataclass(frozen=True)
class HT(Format):
    """A binary tree: one leaf for the kernel and one for each pair of an input and an output axis.

    The bond above the k-th leaf is ``rk``. The bond above the node that joins leaves ``a`` to ``b`` is ``raxb``. The
    root has no bond above it.

    Reference:
        Hackbusch and Kuehn 2009; Grasedyck 2010; for layers, Yin et al., "Towards Extremely Compact RNNs for Video
        Recognition with Fully Decomposed Hierarchical Tucker Structure", CVPR 2021.

    Example:
        >>> HT().text(("i1", "i2"), ("o1", "o2"), ("h", "w"), rank=8)
        'h w r1, i1 o1 r2, r1 r2 r1x2, i2 o2 r3, r1x2 r3'
    """

    @property
    def factors(self) -> int:
        """Default number of factors: two pairs of an input and an output axis."""
        return 2

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """Return the cores of the tree in postorder: the two subtrees, then the node that joins them."""
        leaves = [*([" ".join(kernel)] if kernel else []), *paired(inputs, outputs)]

        def bond(part: range) -> str:
            ends = dict.fromkeys((part[0], part[-1])) if len(part) < len(leaves) else ()
            return f"r{'x'.join(map(str, ends))}" if ends else ""

        def tree(part: range) -> list[str]:
            if len(part) == 1:
                return [f"{leaves[part[0] - 1]} {bond(part)}".strip()]
            middle = (len(part) + 1) // 2
            left, right = part[:middle], part[middle:]
            return [*tree(left), *tree(right), f"{bond(left)} {bond(right)} {bond(part)}".strip()]

        return ", ".join(tree(range(1, len(leaves) + 1)))
