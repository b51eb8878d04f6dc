"""Tensor ring (TR)."""

from dataclasses import dataclass
from typing import Any

from tnlayers.formats.base import Format, register
from tnlayers.spec.notation import Axes


@register("tr")
@dataclass(frozen=True)
class TR(Format):
    r"""A ring: input cores, one core with all kernel axes, output cores, and a bond ``r0`` from the last to the first.

    .. math:: W_{o\,i\,h\,w} = \mathrm{tr}\big(A_{i_1} \cdots A_{i_m} K_{hw} B_{o_1} \cdots B_{o_q}\big)

    Reference:
        Zhao et al. 2016 (arXiv 1606.05535); for convolutions, Wang et al., CVPR 2018 (arXiv 1802.09052).

    Example:
        >>> TR().text(("i1", "i2"), ("o",), ("h", "w"), rank=8)
        'r0 i1 r1, r1 i2 r2, r2 h w r3, r3 o r0'
    """

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """Return the cores, each with its dense axes between two bonds."""
        ring = [*inputs, *([" ".join(kernel)] if kernel else []), *outputs]
        return ", ".join(f"r{k} {core} r{(k + 1) % len(ring)}" for k, core in enumerate(ring))
