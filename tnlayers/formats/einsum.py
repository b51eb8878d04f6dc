"""Any network that a user writes as text."""

from dataclasses import dataclass
from typing import Any

from tnlayers.formats.base import Format, Shape, factorize, register
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes


@register("einsum")
@dataclass(frozen=True)
class Einsum(Format):
    """The network as it is written; the channels are split into as many factors as it has input and output axes.

    Args:
        network: text as ``tnlayers.spec.network`` describes it.

    Example:
        >>> Einsum("i1 a, i2 b, a b h w c, c o").split(64, 32, 1)
        ((8, 8), (32,))
    """

    network: str

    def __post_init__(self) -> None:
        TensorNetwork.skeleton(self.network)

    def split(self, in_channels: int, out_channels: int, groups: int) -> tuple[Shape, Shape]:
        """Exactly as many factors as the network names."""
        network = TensorNetwork.skeleton(self.network)
        return (
            factorize(in_channels, len(network.inputs), exact=True),
            factorize(out_channels, len(network.outputs), groups, exact=True),
        )

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """The user's own words."""
        return self.network
