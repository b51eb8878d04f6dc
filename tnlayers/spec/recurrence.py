"""Arguments of a recurrent layer: those of ``torch.nn.LSTM``, ``GRU`` and ``RNN``, checked once. Uses no tensors."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from tnlayers import validate

KINDS = ("ih", "hh", "hr")
"""Kinds of weights: input to hidden, hidden to hidden, and the projection of an LSTM."""
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
NONLINEARITIES = ("tanh", "relu")


class Weight(NamedTuple):
    """One weight of a recurrent layer.

    Attributes:
        kind: one of ``KINDS``.
        layer: number of the layer in the stack.
        reverse: whether it belongs to the backward direction.
        inputs, outputs: its numbers of columns and rows. The rows are gate after gate.
        gates: number of gates in its rows.
    """

    kind: str
    layer: int
    reverse: bool
    inputs: int
    outputs: int
    gates: int

    @property
    def name(self) -> str:
        """Name without torch's "weight_".

        Example:
            >>> Weight("ih", 0, True, 8, 16, 4).name
            'ih_l0_reverse'
        """
        return f"{self.kind}_l{self.layer}{'_reverse' if self.reverse else ''}"


def names_weight(name: str) -> bool:
    """Return whether a name is one of ``KINDS``, or that of a weight.

    Example:
        >>> [name for name in ("ih", "hh_l1_reverse", "r1", "ih_l") if names_weight(name)]
        ['ih', 'hh_l1_reverse']
    """
    return re.fullmatch(rf"({'|'.join(KINDS)})(_l\d+(_reverse)?)?", name) is not None


@dataclass(frozen=True)
class Recurrence:
    """Arguments of a recurrent layer, checked.

    Args:
        cell: 'LSTM', 'GRU' or 'RNN'.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as ``torch.nn.LSTM`` takes them.
        proj_size: size of an LSTM's projected state; 0: no projection.
        nonlinearity: of an RNN, 'tanh' or 'relu'.

    Raises:
        TypeError, ValueError: an argument is not as above. The message names it.

    Example:
        >>> found = Recurrence("GRU", 8, 6, num_layers=2)
        >>> [(weight.name, weight.outputs, weight.inputs) for weight in found.weights()]
        [('ih_l0', 18, 8), ('hh_l0', 18, 6), ('ih_l1', 18, 6), ('hh_l1', 18, 6)]
    """

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0
    nonlinearity: str = "tanh"

    def __post_init__(self) -> None:
        validate.choice("cell", self.cell, _GATES)
        for name in ("input_size", "hidden_size", "num_layers"):
            object.__setattr__(self, name, validate.integer(name, getattr(self, name)))
        for name in ("bias", "batch_first", "bidirectional"):
            object.__setattr__(self, name, validate.boolean(name, getattr(self, name)))
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, Real) or not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is {self.dropout!r}; it must be a number in [0, 1], the share set to zero")
        object.__setattr__(self, "dropout", float(self.dropout))
        object.__setattr__(self, "proj_size", validate.integer("proj_size", self.proj_size, minimum=0))
        if self.proj_size >= self.hidden_size:
            raise ValueError(
                f"proj_size is {self.proj_size}; it must be below hidden_size, which is {self.hidden_size}"
            )
        if self.proj_size and self.cell != "LSTM":
            raise ValueError(f"proj_size is {self.proj_size}; only an LSTM has a projection")
        validate.choice("nonlinearity", self.nonlinearity, NONLINEARITIES)

    @property
    def gates(self) -> int:
        """Number of gates."""
        return _GATES[self.cell]

    @property
    def directions(self) -> int:
        """1, or 2 if bidirectional."""
        return 2 if self.bidirectional else 1

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Size of each state: of h, and of c in an LSTM. The first is the size of the output in one direction."""
        first = self.proj_size or self.hidden_size
        return (first, self.hidden_size) if self.cell == "LSTM" else (first,)

    def direction(self, layer: int, reverse: bool) -> Iterator[Weight]:
        """Yield the weights of one layer of the stack in one direction."""
        rows, state = self.gates * self.hidden_size, self.state_sizes[0]
        inputs = state * self.directions if layer else self.input_size
        yield Weight("ih", layer, reverse, inputs, rows, self.gates)
        yield Weight("hh", layer, reverse, state, rows, self.gates)
        if self.proj_size:
            yield Weight("hr", layer, reverse, self.hidden_size, self.proj_size, 1)

    def stack(self) -> Iterator[tuple[int, bool]]:
        """Yield layer and direction in torch's order."""
        for layer in range(self.num_layers):
            yield from ((layer, reverse) for reverse in (False, True)[: self.directions])

    def weights(self) -> Iterator[Weight]:
        """Yield all weights, in torch's order."""
        for layer, reverse in self.stack():
            yield from self.direction(layer, reverse)

    def biases(self) -> Iterator[str]:
        """Yield torch's names of the biases, of ``gates * hidden_size`` entries each."""
        if self.bias:
            yield from (f"bias_{weight.name}" for weight in self.weights() if weight.kind != "hr")
