"""Tensor train (TT), also known as matrix product state and, in matrix layout, matrix product operator."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tnlayers import validate
from tnlayers.formats.base import Format, paired, register
from tnlayers.spec.notation import Axes


@register("tt")
@dataclass(frozen=True)
class TT(Format):
    """A train of cores, each joined to the next by a bond ``r1``, ``r2``, ...

    Args:
        layout: 'matrix' puts all kernel axes into the first core and pairs the k-th input with the k-th output axis;
            'chain' gives every axis its own core, in the order input, kernel, output, and keeps channels whole by
            default.

    Reference:
        Oseledets 2011; for convolutions, Garipov et al. 2016 (arXiv 1611.03214).

    Example:
        >>> TT().text(("i1", "i2"), ("o1", "o2"), ("h", "w"), rank=8)
        'h w r1, r1 i1 o1 r2, r2 i2 o2'
        >>> TT(layout="chain").text(("i",), ("o",), ("h", "w"), rank=8)
        'i r1, r1 h r2, r2 w r3, r3 o'
    """

    layout: str = "matrix"

    def __post_init__(self) -> None:
        validate.choice("layout", self.layout, ("matrix", "chain"))

    @property
    def factors(self) -> int:
        """Two pairs of an input and an output axis in matrix layout; channels whole in chain layout."""
        return 2 if self.layout == "matrix" else 1

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """The dense axes of each core, with the bonds between neighbours."""
        if self.layout == "chain":
            train = [*inputs, *kernel, *outputs]
        else:
            train = [*([" ".join(kernel)] if kernel else []), *paired(inputs, outputs)]
        bonds = ["", *(f"r{k}" for k in range(1, len(train))), ""]
        return ", ".join(f"{a} {core} {b}".strip() for (a, b), core in zip(pairwise(bonds), train, strict=True))
