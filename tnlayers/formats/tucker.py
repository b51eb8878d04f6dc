"""Tucker decomposition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tnlayers.formats.base import Format, register
from tnlayers.spec.notation import Axes


@register("tucker")
@dataclass(frozen=True)
class Tucker(Format):
    r"""A core tensor with a factor matrix on every channel axis, and on the kernel axes that ``rank`` compresses.

    The bond of axis ``x`` is ``rx``. One integer, a keep ratio, or one rank per channel axis does not compress kernel
    axes (Tucker-2). One rank per axis, kernel axes last, or a mapping with ``rh`` or ``rw``, compresses those too.

    .. math:: W_{o\,i\,h\,w} = \sum_{r_i, r_o} A_{i r_i} G_{r_i r_o h w} B_{r_o o}

    Reference:
        Tucker 1966; for convolutions, Kim et al., ICLR 2016 (arXiv 1511.06530).

    Example:
        >>> Tucker().text(("i",), ("o",), ("h", "w"), rank=8)
        'i ri, ri ro h w, ro o'
        >>> Tucker().text(("i",), ("o",), ("h", "w"), rank=(8, 8, 3, 2))
        'i ri, ri ro rh rw, ro o, h rh, w rw'
    """

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """Return input factors, core tensor, output factors, then a factor for every compressed kernel axis."""
        if isinstance(rank, Mapping):
            compressed = [axis for axis in kernel if f"r{axis}" in rank]
        elif isinstance(rank, Sequence) and len(rank) == len(inputs + outputs + kernel):
            compressed = list(kernel)
        else:
            compressed = []
        core = " ".join(f"r{axis}" if axis in compressed else axis for axis in kernel)
        bonds = " ".join(f"r{axis}" for axis in inputs + outputs)
        factors = [f"{axis} r{axis}" for axis in inputs], [f"r{axis} {axis}" for axis in outputs]
        return ", ".join([*factors[0], f"{bonds} {core}", *factors[1], *(f"{axis} r{axis}" for axis in compressed)])
