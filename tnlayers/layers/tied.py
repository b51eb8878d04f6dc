"""A linear layer over the cores of an embedding: the tied output of a language model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.input_checks import check_dtypes, check_tensor
from tnlayers.backend.sharding import place
from tnlayers.backend.torch_state import constant_to_compilers
from tnlayers.execution.executor import LayerExecutor
from tnlayers.execution.module import ExecutableModule
from tnlayers.init.draw import uniform
from tnlayers.layers.table import TensorTable
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork


class TiedLinear(ExecutableModule):
    """The linear map ``F.linear(x, embedding.weight, bias)`` over the cores of an embedding.

    It holds the embedding itself as a module. So the tie survives copies, moves, state_dicts and ``save_tensorized``,
    and gradients of both uses add up in the same cores. Plans contract the input with the cores as in any linear layer.

    Args:
        embedding: a tensor embedding, usually the input embedding of the model.
        bias: whether to add a bias, of shape (num_embeddings,).
        strategy, memory: see ``TensorConv``.

    Attributes:
        embedding: the embedding.

    Shape:
        As ``torch.nn.Linear``: ``(*, embedding_dim)`` -> ``(*, num_embeddings)``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted.

    Example:
        >>> import tnlayers
        >>> embedding = tnlayers.TTEmbedding(100, 16, rank=4)
        >>> head = tnlayers.TiedLinear(embedding)
        >>> head(embedding(torch.tensor([3, 99]))).shape
        torch.Size([2, 100])
    """

    dense_name: ClassVar[str] = "linear"
    dense_type: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self, embedding: nn.Module, bias: bool = False, *, strategy: str = "auto", memory: str = "auto"
    ) -> None:
        """Make the layer. The class describes the arguments."""
        super().__init__()
        if not isinstance(embedding, TensorTable):
            raise TypeError(f"embedding is {type(embedding).__name__}; it must be a tensor embedding")
        self.embedding: Any = embedding
        geometry = Geometry(embedding.embedding_dim, embedding.padded_embeddings, ())
        self._network = embedding.network
        self._executor = LayerExecutor(_exchanged(self._network), geometry, strategy, memory)
        if validate.boolean("bias", bias):
            core = embedding.cores[0]
            self.bias = nn.Parameter(torch.empty(self.out_features, device=core.device, dtype=core.dtype))
            self.reset_parameters()
        else:
            self.register_parameter("bias", None)

    @property
    def _executor(self) -> LayerExecutor:
        """The plans, for the embedding's present network: its ranks may have changed."""
        if getattr(self.embedding, "network", self._network) is not self._network:
            self._follow()
        found: LayerExecutor = self.__dict__["_plans"]
        return found

    @_executor.setter
    def _executor(self, executor: LayerExecutor) -> None:
        self.__dict__["_plans"] = executor

    @constant_to_compilers
    def _follow(self) -> None:
        """Make plans anew for the embedding's network."""
        self._network = self.embedding.network
        self._executor = self.__dict__["_plans"].anew(network=_exchanged(self._network))

    @property
    def rank(self) -> Mapping[str, int]:  # type: ignore[override]
        """The embedding's ranks."""
        found: Mapping[str, int] = self.embedding.rank
        return found

    @property
    def rank_dropout(self) -> float:
        """That of the embedding; each of the two draws the entries that it drops."""
        return float(getattr(self.embedding, "rank_dropout", 0.0))

    @rank_dropout.setter
    def rank_dropout(self, p: float) -> None:
        self.embedding.rank_dropout = p

    @property
    def in_features(self) -> int:
        """Size of the embedding's rows."""
        return int(self.embedding.embedding_dim)

    @property
    def out_features(self) -> int:
        """Number of the embedding's rows."""
        return int(self.embedding.num_embeddings)

    @property
    def cores(self) -> nn.ParameterList:  # type: ignore[override]
        """The embedding's cores."""
        found: nn.ParameterList = self.embedding.cores
        return found

    @property
    def weight(self) -> Tensor:
        """The embedding's table, of shape (out_features, in_features)."""
        found: Tensor = self.embedding.weight
        return found

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` with the same function and a weight of its own, on the same device."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta").train(self.training)
        weight = self.embedding.weight.detach().clone()
        linear.weight = nn.Parameter(weight, any(each.requires_grad for each in self.embedding.parameters()))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the bias anew, as ``nn.Linear`` does. The cores are the embedding's and stay."""
        if self.bias is not None and not self.bias.is_meta:
            self.bias.copy_(place(uniform(self.bias, 1 / math.sqrt(self.in_features)), self.bias))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: shape ``(*, embedding_dim)``.

        Returns:
            Tensor: shape ``(*, num_embeddings)``.

        Raises:
            TypeError, RuntimeError: the input is no tensor, or has another dtype.
            ValueError: its last axis has another size.
        """
        return self._run(input)

    def _run(self, input: Tensor, output_padding: tuple[int, ...] | None = None) -> Tensor:
        if type(input) is not Tensor:
            check_tensor(type(self).__name__, input)
        check_dtypes(input, self.cores[0].dtype, self.bias)
        if input.is_nested:
            return F.linear(input, self.weight, self.bias)
        x = input.reshape(self._batched(input.shape))
        y = self._executor(x, self._thinned(self._listed()), None, self.training)[:, : self.out_features]
        if self.embedding.padding_idx is not None:
            row: Tensor = self.embedding.padding_row
            here = torch.arange(self.out_features, device=y.device) == int(self.embedding.padding_idx)
            y = torch.where(here, F.linear(x, row.unsqueeze(0)), y)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*input.shape[:-1], self.out_features)

    def _batched(self, shape: Sequence[int]) -> tuple[int, ...]:
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"input has shape {tuple(shape)}; TiedLinear takes (*, {self.in_features}), embedding_dim")
        return math.prod(shape[:-1]), self.in_features

    def extra_repr(self) -> str:
        """Return ``nn.Linear``'s fields."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _exchanged(network: TensorNetwork) -> TensorNetwork:
    """Return the network of the same cores with input and output axes exchanged.

    Example:
        >>> print(_exchanged(TensorNetwork.skeleton("i1 o1 r1, r1 i2 o2")))
        o1 i1 r1, r1 o2 i2
    """

    def name(axis: str) -> str:
        return {"i": "o", "o": "i"}[axis[0]] + axis[1:] if axis in network.inputs + network.outputs else axis

    sizes = {name(axis): size for axis, size in network.sizes.items()}
    return TensorNetwork(tuple(tuple(map(name, core)) for core in network.cores), sizes)
