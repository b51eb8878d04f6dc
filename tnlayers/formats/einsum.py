"""A network given as text by the user."""

from dataclasses import dataclass
from typing import Any

from tnlayers.formats.base import Format, Shape, factorize, register
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes


@register("einsum")
@dataclass(frozen=True)
class Einsum(Format):
    """A network given as text. Channels are split into as many factors as it has input and output axes.

    Args:
        network: text in the notation of ``tnlayers.spec.network``.

    Example:
        >>> Einsum("i1 a, i2 b, a b h w c, c o").split(64, 32, 1)
        ((8, 8), (32,))
    """

    network: str

    def __post_init__(self) -> None:
        TensorNetwork.skeleton(self.network)

    def split(self, in_channels: int, out_channels: int, groups: int) -> tuple[Shape, Shape]:
        """Split channels into as many factors as the network has input and output axes."""
        network = TensorNetwork.skeleton(self.network)
        return (
            factorize(in_channels, len(network.inputs), exact=True),
            factorize(out_channels, len(network.outputs), groups, exact=True),
        )

    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """Return the user's text."""
        return self.network
