"""Bags of embeddings as ``torch.nn.EmbeddingBag``: sums, means or maxima of looked-up rows."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.input_checks import check_indices
from tnlayers.execution.attributes import from_constructor, switch
from tnlayers.init.variance import Init
from tnlayers.layers.table import TensorTable
from tnlayers.spec.rank import Rank

MODES = ("sum", "mean", "max")


def _check_counts(layer: Any, by_freq: bool) -> None:
    """Raise if a layer's mode does not allow gradients divided by the counts of their indices."""
    if by_freq and layer.mode == "max":
        raise ValueError("scale_grad_by_freq is True, but mode is 'max', for which torch has no such gradient")


class TensorEmbeddingBag(TensorTable):
    """An embedding whose table is a tensor network, and whose rows are added up, averaged, or their maxima taken.

    Args:
        num_embeddings, embedding_dim, scale_grad_by_freq, mode, include_last_offset, device, dtype: as
            ``torch.nn.EmbeddingBag`` takes them; dtype is float64, float32, bfloat16 or float16.
        max_norm, norm_type, sparse: see ``TensorEmbedding``.
        padding_idx: index of tokens that a bag leaves out.
        rank, in_shape, out_shape, init, strategy, memory: see ``TensorEmbedding``.
        **options: the format's own.

    Shape:
        As ``torch.nn.EmbeddingBag``: ``(bags, length)``, or ``(tokens,)`` with offsets -> ``(bags, embedding_dim)``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted.

    Example:
        >>> class RingBag(TensorEmbeddingBag, format="tr"): ...
        >>> RingBag(16, 32, rank=2)(torch.tensor([0, 15, 3]), torch.tensor([0, 2])).shape
        torch.Size([2, 32])
    """

    dense_type = nn.EmbeddingBag
    mode: str = from_constructor("mode")
    scale_grad_by_freq: bool = switch("scale_grad_by_freq", _check_counts)
    include_last_offset: bool = switch("include_last_offset")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
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
        self.__dict__["mode"] = validate.choice("mode", mode, MODES)
        _check_counts(self, validate.boolean("scale_grad_by_freq", scale_grad_by_freq))
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
        self.include_last_offset = include_last_offset

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        names = "num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"
        return {name: getattr(layer, name) for name in (*names, "include_last_offset", "padding_idx")}

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return a sum, mean or maximum of rows for each bag; zeros for an empty bag.

        Args:
            input: indices in int64 or int32, of shape (bags, length), or (tokens,) with ``offsets``.
            offsets: first token of each bag, if ``input`` has one axis.
            per_sample_weights: factors of the rows, in the shape of ``input``; only for mode 'sum'.

        Returns:
            Tensor: shape (bags, embedding_dim).

        Raises:
            TypeError, RuntimeError: the input is no tensor, or has another dtype.
            ValueError: input, offsets and per_sample_weights do not fit each other.
            IndexError: an index is out of range (on a CPU, as in torch).
        """
        self._checked(input)
        if input.is_nested:
            return self._nested(input)
        if input.dim() == 2 and offsets is not None:
            raise ValueError(f"offsets is given, but input has shape {tuple(input.shape)}; its rows are the bags")
        if input.dim() not in (1, 2) or (input.dim() == 1 and offsets is None):
            raise ValueError(f"input has shape {tuple(input.shape)}; it must have two axes, or one with offsets")
        if offsets is not None:
            self._check_tensor(offsets, "offsets")
            check_indices("offsets", offsets)
        if per_sample_weights is not None:
            self._check_tensor(per_sample_weights, "per_sample_weights")
            if per_sample_weights.shape != input.shape:
                shape = tuple(per_sample_weights.shape)
                raise ValueError(f"per_sample_weights has shape {shape}, but input has {tuple(input.shape)}")
        rows = self._run(input)
        if offsets is not None and tuple(offsets.shape) == (int(self.include_last_offset),):
            return rows[:0]  # torch 2.13 crashes without bags if there is a padding_idx
        places = torch.arange(rows.shape[0], device=input.device)
        last: int | None = None
        if self.padding_idx is not None:  # the tokens that are left out point to one more row
            last = rows.shape[0]
            places = torch.where(input.reshape(-1) == self.padding_idx, last, places)
            rows = torch.cat([rows, self.padding_row.unsqueeze(0)])
        return F.embedding_bag(
            places.reshape(input.shape),
            rows,
            None if offsets is None else offsets.long(),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=last,
        )
