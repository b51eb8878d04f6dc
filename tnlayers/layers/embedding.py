"""Embeddings as ``torch.nn.Embedding``."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers.init.variance import Init
from tnlayers.layers.table import TensorTable
from tnlayers.spec.rank import Rank


class TensorEmbedding(TensorTable):
    """An embedding whose table is a tensor network.

    A vocabulary whose size has no factors of similar size is padded: the cores then hold ``padded_embeddings`` rows, of
    which the last ones are never reached.

    Args:
        num_embeddings, embedding_dim, scale_grad_by_freq, device, dtype: as ``torch.nn.Embedding`` takes them; dtype is
            float64, float32, bfloat16 or float16.
        padding_idx: index of a row that is zero and gets no gradient.
        max_norm: must be None. Torch renormalises single rows in place, but rows share the cores.
        norm_type: p of max_norm, so without effect.
        sparse: must be False. A row's gradient reaches slices of the cores that other rows share.
        rank, strategy, memory: see ``TensorConv``; the table stands for the kernel, padded rows included.
        in_shape: factors of the vocabulary, most significant first. Their product may exceed num_embeddings. None: the
            format's own split, padded if the factors would be uneven.
        out_shape: factors of embedding_dim; None: the format's own split.
        init: 'unit', the standard deviation 1 of ``torch.nn.Embedding``, or a ``tnlayers.Init`` with another std.
            'fan_in' is the same as 'unit': a row is the product of the table with a one-hot vector, so its fan-in is 1.
            Other modes and nonlinearities are refused, since a lookup sums over no inputs.
        **options: the format's own.

    Shape:
        As ``torch.nn.Embedding``: ``(*)`` -> ``(*, embedding_dim)``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted.

    Example:
        >>> class RingEmbedding(TensorEmbedding, format="tr"): ...
        >>> RingEmbedding(16, 32, rank=2)(torch.tensor([[0, 15, 3]])).shape
        torch.Size([1, 3, 32])
    """

    dense_type = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank | None = None,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        init: str | Init = "unit",
        strategy: str = "auto",
        memory: str = "auto",
        **options: Any,
    ) -> None:
        """Make the layer and draw its cores. The class describes the arguments."""
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            device=device,
            dtype=dtype,
            rank=rank,
            in_shape=in_shape,
            out_shape=out_shape,
            init=init,
            strategy=strategy,
            memory=memory,
            options=options,
        )

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        names = "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"
        return {name: getattr(layer, name) for name in (*names, "sparse")}

    def forward(self, input: Tensor) -> Tensor:
        """Return a row of the table for each index.

        Args:
            input: indices of any shape, in int64 or int32.

        Returns:
            Tensor: shape ``(*input.shape, embedding_dim)``.

        Raises:
            TypeError, RuntimeError: the input is no tensor, or has another dtype.
            IndexError: an index is out of range (on a CPU, as in torch).
        """
        self._checked(input)
        if input.is_nested:
            table = self._kernel(self._thinned(self._listed()))
            return F.embedding(input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return self._run(input).reshape(*input.shape, self.embedding_dim)
