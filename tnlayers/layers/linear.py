"""Linear layers as ``torch.nn.Linear``: the same base, without kernel axes."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.input_checks import check_dtypes
from tnlayers.execution.attributes import from_geometry
from tnlayers.init.variance import Init
from tnlayers.layers.base import TensorLayer
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.rank import Rank


class TensorLinear(TensorLayer):
    """A linear layer whose weight is a tensor network.

    Args:
        in_features, out_features, bias, device, dtype: as ``torch.nn.Linear`` takes them; dtype is float64, float32,
            bfloat16 or float16.
        rank, init, strategy, memory: see ``TensorConv``.
        in_shape, out_shape: factors of in_features and of out_features, most significant first; None: the format's own
            split.
        **options: the format's own.

    Shape:
        As ``torch.nn.Linear``: ``(*, in_features)`` -> ``(*, out_features)``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted.

    Example:
        >>> class RingLinear(TensorLinear, format="tr"): ...
        >>> RingLinear(16, 32, rank=2)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 32])
    """

    channel_names = "in_features", "out_features"
    dense_name, dense_type = "linear", nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank | None = None,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        init: str | Init = "fan_in",
        strategy: str = "auto",
        memory: str = "auto",
        **options: Any,
    ) -> None:
        """Make the layer and draw its cores. The class describes the arguments."""
        sizes = validate.integer("in_features", in_features), validate.integer("out_features", out_features)
        super().__init__(
            Geometry(*sizes, ()),
            bias=bias,
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

    in_features = from_geometry("in_features", "in_channels")
    out_features = from_geometry("out_features", "out_channels")

    @classmethod
    def from_linear(cls, linear: nn.Module, *, rank: Rank | None = None, decompose: bool = True, **kwargs: Any) -> Self:
        """Return a tensor layer for an ``nn.Linear``: ``from_dense`` by another name."""
        return cls.from_dense(linear, rank=rank, decompose=decompose, **kwargs)

    def to_linear(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` with the same function: ``to_dense`` by another name."""
        dense: nn.Linear = self.to_dense()
        return dense

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        names = "in_features", "out_features"
        return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}

    def _batched(self, shape: Sequence[int]) -> tuple[int, ...]:
        if not shape or shape[-1] != self.in_features:
            given = f"input has shape {tuple(shape)}"
            raise ValueError(f"{given}; {type(self).__name__} takes (*, {self.in_features}), its in_features")
        return math.prod(shape[:-1]), self.in_features

    def _nested(self, input: Tensor) -> Tensor:
        """Apply the dense kernel to a nested tensor, as ``nn.Linear``."""
        check_dtypes(input, self.cores[0].dtype, self.bias)
        return F.linear(input, self._kernel(self._thinned(self._listed())), self.bias)

    def _unbatched(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        return y.reshape(*shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        """Return ``nn.Linear``'s fields, then the format's."""
        own = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{own}, {super().extra_repr()}"
