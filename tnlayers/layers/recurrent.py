"""Recurrent layers as ``torch.nn.LSTM``, ``GRU`` and ``RNN``, of tensor networks; and their lookup by format."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from tnlayers.formats import Format
from tnlayers.init.variance import Init
from tnlayers.layers.recurrent_arguments import LIKE_TORCH
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.recurrent_fields import fixed_field, settable_field
from tnlayers.layers.registry import by_name, find_or_make
from tnlayers.spec.rank import Rank
from tnlayers.spec.recurrence import Recurrence

RecurrentRank = Rank | Mapping[str, Rank] | None
RecurrentInit = str | Init | Mapping[str, str | Init]


class TensorLSTM(TensorRecurrent):
    """A long short-term memory whose weights are tensor networks.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            ``torch.nn.LSTM`` takes them; dtype is float64, float32, bfloat16 or float16.
        rank: of every weight, as in ``TensorConv``; or a mapping from 'ih', 'hh' and 'hr', or from weights such as
            'ih_l0', to a rank each; weights that it leaves out have the rank that None gives.
        in_shape, hidden_shape: factors of input_size and of hidden_size, most significant first; None: the format's own
            split. The gates multiply the first factor of hidden_size.
        plain: kinds of weights that stay plain matrices, of 'ih' (from the input), 'hh' (from the state) and 'hr' (the
            projection).
        init: 'torch': each gate of each weight has the standard deviation of torch's, 1 / sqrt(3 hidden_size); or as in
            ``TensorConv``, for each weight; or a mapping as for rank. In ``from_lstm`` and its like also 'like': each
            weight has the root mean square of the one that it replaces. Biases and plain weights are drawn as torch's.
        strategy: 'reconstruct' runs torch's fused kernel on contracted weights; 'factorized' takes the time steps one
            by one, each through the cores; 'auto' takes the faster by estimate, in doubt the fused kernel.
        memory: 'low' saves only input and states between forward and backward, and runs the forward again.
        **options: the format's own.

    Shape:
        As ``torch.nn.LSTM``, packed sequences included.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted.

    Example:
        >>> class RingLSTM(TensorLSTM, format="tr"): ...
        >>> output, (h, c) = RingLSTM(16, 32, num_layers=2, rank=2)(torch.randn(5, 2, 16))
        >>> output.shape, c.shape
        (torch.Size([5, 2, 32]), torch.Size([2, 2, 32]))
    """

    cell, dense_name, dense_type = "LSTM", "lstm", nn.LSTM
    own = (
        "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size",
    )  # fmt: skip
    proj_size = fixed_field("proj_size")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        rank: RecurrentRank = None,
        in_shape: Sequence[int] | None = None,
        hidden_shape: Sequence[int] | None = None,
        plain: Collection[str] = (),
        init: RecurrentInit = LIKE_TORCH,
        strategy: str = "auto",
        memory: str = "auto",
        **options: Any,
    ) -> None:
        """Make the layer and draw its cores. The class describes the arguments."""
        own = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        self._build(
            Recurrence(self.cell, *own), device, dtype, rank, in_shape, hidden_shape, plain, init, options,
            strategy=strategy, memory=memory,
        )  # fmt: skip

    @classmethod
    def from_lstm(cls, lstm: nn.Module, *, rank: RecurrentRank = None, decompose: bool = True, **kwargs: Any) -> Self:
        """Return a tensor layer for an ``nn.LSTM``: ``from_dense`` by another name."""
        return cls.from_dense(lstm, rank=rank, decompose=decompose, **kwargs)

    def to_lstm(self) -> nn.LSTM:
        """Return a plain ``nn.LSTM`` with the same function: ``to_dense`` by another name."""
        dense: nn.LSTM = self.to_dense()
        return dense


class TensorGRU(TensorRecurrent):
    """A gated recurrent unit whose weights are tensor networks.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as
            ``torch.nn.GRU`` takes them; dtype is float64, float32, bfloat16 or float16.
        rank, in_shape, hidden_shape, plain, init, strategy, memory: see ``TensorLSTM``.
        **options: the format's own.

    Shape:
        As ``torch.nn.GRU``, packed sequences included.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted.

    Example:
        >>> class RingGRU(TensorGRU, format="tr"): ...
        >>> output, h = RingGRU(16, 32, bidirectional=True, rank=2)(torch.randn(5, 2, 16))
        >>> output.shape, h.shape
        (torch.Size([5, 2, 64]), torch.Size([2, 2, 32]))
    """

    cell, dense_name, dense_type = "GRU", "gru", nn.GRU
    own = "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        rank: RecurrentRank = None,
        in_shape: Sequence[int] | None = None,
        hidden_shape: Sequence[int] | None = None,
        plain: Collection[str] = (),
        init: RecurrentInit = LIKE_TORCH,
        strategy: str = "auto",
        memory: str = "auto",
        **options: Any,
    ) -> None:
        """Make the layer and draw its cores. The class describes the arguments."""
        own = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        self._build(
            Recurrence(self.cell, *own), device, dtype, rank, in_shape, hidden_shape, plain, init, options,
            strategy=strategy, memory=memory,
        )  # fmt: skip

    @classmethod
    def from_gru(cls, gru: nn.Module, *, rank: RecurrentRank = None, decompose: bool = True, **kwargs: Any) -> Self:
        """Return a tensor layer for an ``nn.GRU``: ``from_dense`` by another name."""
        return cls.from_dense(gru, rank=rank, decompose=decompose, **kwargs)

    def to_gru(self) -> nn.GRU:
        """Return a plain ``nn.GRU`` with the same function: ``to_dense`` by another name."""
        dense: nn.GRU = self.to_dense()
        return dense


class TensorRNN(TensorRecurrent):
    """An Elman network, with one gate, whose weights are tensor networks.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype: as
            ``torch.nn.RNN`` takes them; dtype is float64, float32, bfloat16 or float16.
        rank, in_shape, hidden_shape, plain, init, strategy, memory: see ``TensorLSTM``.
        **options: the format's own.

    Shape:
        As ``torch.nn.RNN``, packed sequences included.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted.

    Example:
        >>> class RingRNN(TensorRNN, format="tr"): ...
        >>> output, h = RingRNN(16, 32, nonlinearity="relu", rank=2)(torch.randn(5, 2, 16))
        >>> output.shape, h.shape
        (torch.Size([5, 2, 32]), torch.Size([1, 2, 32]))
    """

    cell, dense_name, dense_type = "RNN", "rnn", nn.RNN
    own = (
        "input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first", "dropout", "bidirectional",
    )  # fmt: skip
    nonlinearity = settable_field("nonlinearity")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        rank: RecurrentRank = None,
        in_shape: Sequence[int] | None = None,
        hidden_shape: Sequence[int] | None = None,
        plain: Collection[str] = (),
        init: RecurrentInit = LIKE_TORCH,
        strategy: str = "auto",
        memory: str = "auto",
        **options: Any,
    ) -> None:
        """Make the layer and draw its cores. The class describes the arguments."""
        own = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        self._build(
            Recurrence(self.cell, *own, nonlinearity=nonlinearity), device, dtype, rank, in_shape, hidden_shape, plain,
            init, options, strategy=strategy, memory=memory,
        )  # fmt: skip

    @classmethod
    def from_rnn(cls, rnn: nn.Module, *, rank: RecurrentRank = None, decompose: bool = True, **kwargs: Any) -> Self:
        """Return a tensor layer for an ``nn.RNN``: ``from_dense`` by another name."""
        return cls.from_dense(rnn, rank=rank, decompose=decompose, **kwargs)

    def to_rnn(self) -> nn.RNN:
        """Return a plain ``nn.RNN`` with the same function: ``to_dense`` by another name."""
        dense: nn.RNN = self.to_dense()
        return dense


RECURRENT: dict[type[nn.Module], type[TensorRecurrent]] = {
    base.dense_type: base for base in (TensorLSTM, TensorGRU, TensorRNN)
}
"""Base class of the layers that replace a recurrent layer of torch, by the torch layer's type."""


def recurrent_class(format: str | type[Format], kind: type[nn.Module]) -> type[TensorRecurrent]:
    """Return the class of a format that replaces a kind of recurrent layer; see ``layer_class``.

    Args:
        format: a registered format's name, or a format class.
        kind: one of the types in ``RECURRENT``.

    Returns:
        type[TensorRecurrent]: a subclass of ``RECURRENT[kind]``.

    Raises:
        TypeError, ValueError: there is no such format or no such kind.

    Example:
        >>> import tnlayers
        >>> recurrent_class("tr", nn.LSTM) is tnlayers.TRLSTM
        True
    """
    found: type[TensorRecurrent] = find_or_make(format, kind, RECURRENT, __name__)
    return found


def __getattr__(name: str) -> Any:
    return by_name(name, RECURRENT, __name__)
