"""Canonical polyadic decomposition (CP)."""

from dataclasses import dataclass
from typing import Any

from tnlayers.formats.base import Format, register
from tnlayers.spec.notation import Axes


@register("cp")
@dataclass(frozen=True)
class CP(Format):
    r"""One core per axis, all joined by a single bond ``r``, a hyperedge.

    .. math:: W_{o\,i\,h\,w} = \sum_r A_{ir} B_{or} C_{hr} D_{wr}

    Reference:
        Hitchcock 1927; for convolutions, Lebedev et al., ICLR 2015 (arXiv 1412.6553).

    Example:
        >>> CP().text(("i",), ("o",), ("h", "w"), rank=8)
        'i r, o r, h r, w r'
    """

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """Return a core ``axis r`` for every axis."""
        return ", ".join(f"{axis} r" for axis in inputs + outputs + kernel)
