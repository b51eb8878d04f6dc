"""Block-term Tucker decomposition (BTT)."""

from dataclasses import dataclass
from typing import Any

from tnlayers import validate
from tnlayers.formats.base import Format, paired, register
from tnlayers.spec.notation import Axes


@register("btt")
@dataclass(frozen=True)
class BTT(Format):
    """A sum of ``blocks`` Tucker decompositions as one network. Every core has the bond ``n``, the index of the term.

    Args:
        blocks: number of Tucker terms. The bond ``n`` is fixed, so the rank does not include it.

    The bond of the k-th pair of an input and an output axis is ``rk``. The bond of a kernel axis ``x`` is ``rx``.

    Reference:
        De Lathauwer 2008; for convolutions, Ye et al. 2020, "Block-term tensor neural networks" (arXiv 2010.04963).

    Example:
        >>> BTT(blocks=2).text(("i1", "i2"), ("o1", "o2"), ("h", "w"), rank=4)
        'n:2 r1 r2 rh rw, n i1 o1 r1, n i2 o2 r2, n h rh, n w rw'
    """

    blocks: int = 4

    def __post_init__(self) -> None:
        validate.integer("blocks", self.blocks)

    @property
    def factors(self) -> int:
        """Default number of factors: three pairs of an input and an output axis."""
        return 3

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """Return the core tensor, then a factor for each pair of channel axes and for each kernel axis."""
        pairs = paired(inputs, outputs)
        factors = {f"r{k}": pair for k, pair in enumerate(pairs, start=1)} | {f"r{axis}": axis for axis in kernel}
        return ", ".join(
            [f"n:{self.blocks} {' '.join(factors)}", *(f"n {axes} {bond}" for bond, axes in factors.items())]
        )
