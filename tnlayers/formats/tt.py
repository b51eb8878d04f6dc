"""Tensor train (TT), also called matrix product state, and in matrix layout matrix product operator."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tnlayers import validate
from tnlayers.formats.base import Format, paired, register
from tnlayers.spec.notation import Axes


@register("tt")
@dataclass(frozen=True)
class TT(Format):
    """A chain of cores, joined to their neighbours by bonds ``r1``, ``r2``, ...

    Args:
        layout: 'matrix': the first core has all kernel axes, and each further core a pair of the k-th input and the
            k-th output axis. 'chain': every axis has its own core, in the order input, kernel, output; channels are
            not split by default.

    Reference:
        Oseledets 2011; for convolutions, Garipov et al. 2016 (arXiv 1611.03214).

    Example:
        >>> TT().text(("i1", "i2"), ("o1", "o2"), ("h", "w"), rank=8)
        'h w r1, r1 i1 o1 r2, r2 i2 o2'
        >>> TT(layout="chain").text(("i",), ("o",), ("h", "w"), rank=8)
        'i r1, r1 h r2, r2 w r3, r3 o'
    """

    layout: Literal["matrix", "chain"] = "matrix"

    def __post_init__(self) -> None:
        validate.choice("layout", self.layout, ("matrix", "chain"))

    @property
    def factors(self) -> int:
        """Default number of factors: two pairs of axes in matrix layout, 1 (not split) in chain layout."""
        return 2 if self.layout == "matrix" else 1

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """Return the cores, each with its dense axes and the bonds to its neighbours."""
        if self.layout == "chain":
            train = [*inputs, *kernel, *outputs]
        else:
            train = [*([" ".join(kernel)] if kernel else []), *paired(inputs, outputs)]
        bonds = ["", *(f"r{k}" for k in range(1, len(train))), ""]
        return ", ".join(f"{a} {core} {b}".strip() for (a, b), core in zip(pairwise(bonds), train, strict=True))
