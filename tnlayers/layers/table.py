"""Tables of rows: the linear map of one-hot rows, which gathers rows from the cores."""

import math
from collections.abc import Sequence
from inspect import signature
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tnlayers import validate
from tnlayers.backend.input_checks import check_indices, check_tensor
from tnlayers.backend.sharding import whole
from tnlayers.backend.torch_state import own_precision
from tnlayers.execution.attributes import from_constructor, from_geometry, switch
from tnlayers.execution.lookup import LookupExecutor
from tnlayers.fitting.objective import length
from tnlayers.formats.base import checked_shape
from tnlayers.init.variance import Init
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.table_arguments import number, padding, refuse, settled, vocabulary
from tnlayers.ops.row_gradients import divided_by_counts
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.rank import Rank


class TensorTable(TensorLayer):
    """Base of embeddings and bags of embeddings: a table of rows, looked up by index.

    Attributes:
        padded_embeddings: product of ``in_shape``. Rows from ``num_embeddings`` on belong to the cores, but no index
            reaches them.
        padding_row: buffer with the row of ``padding_idx``, zero unless a fit set it; absent without ``padding_idx``.
    """

    channel_names = "num_embeddings", "embedding_dim"
    dense_name = "embedding"
    executor_type = LookupExecutor

    num_embeddings: int = from_constructor("num_embeddings")
    padding_idx: int | None = from_constructor("padding_idx")
    max_norm: float | None = from_constructor("max_norm")
    norm_type: float = from_constructor("norm_type")
    sparse: bool = from_constructor("sparse")
    embedding_dim = from_geometry("embedding_dim", "out_channels")
    padded_embeddings = from_geometry("padded_embeddings", "in_channels")
    scale_grad_by_freq: bool = switch("scale_grad_by_freq")
    padding_row: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None,
        max_norm: float | None,
        norm_type: float,
        scale_grad_by_freq: bool,
        sparse: bool,
        in_shape: Sequence[int] | None,
        init: str | Init,
        options: dict[str, Any],
        **arguments: Any,
    ) -> None:
        rows = validate.integer("num_embeddings", num_embeddings)
        columns = validate.integer("embedding_dim", embedding_dim)
        refuse(max_norm, validate.boolean("sparse", sparse))
        if in_shape is None:
            shape = vocabulary(self._format(options), rows, columns)
        else:
            shape = checked_shape("in_shape", in_shape, "num_embeddings", rows, more=True)
        # The constructor of the base draws the cores, and needs to know which rows are reached.
        self.__dict__.update(
            num_embeddings=rows,
            padding_idx=padding(padding_idx, rows),
            max_norm=None,
            norm_type=number("norm_type", norm_type),
            sparse=False,
        )
        super().__init__(
            Geometry(math.prod(shape), columns, ()),
            bias=False,
            in_shape=shape,
            init=settled(init),
            options=options,
            **arguments,
        )
        self.scale_grad_by_freq = scale_grad_by_freq
        if self.padding_idx is not None:
            self.register_buffer("padding_row", self.cores[0].detach().new_zeros(columns))

    @property
    def dense_params(self) -> int:
        """Number of entries of the table, without padded rows."""
        return int(self.num_embeddings * self.embedding_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Solve for the variances, and draw the cores anew; the row of ``padding_idx`` is zero again.

        With an exact ``Init``, the rows that indices reach have the std, without that of ``padding_idx``.
        """
        self.init = settled(self.init)
        super().reset_parameters()
        if self.padding_idx is not None and "padding_row" in self._buffers:
            self.padding_row.zero_()
        hidden = [*range(self.num_embeddings, self.padded_embeddings)]
        hidden += [] if self.padding_idx is None else [self.padding_idx]
        cores = [whole(core) for core in self.cores]
        if not hidden or not self.init.exact or cores[0].is_meta or isinstance(cores[0], FakeTensor):
            return
        rows = self._executor.anew()(torch.tensor(hidden, device=cores[0].device), cores, None, False).double()
        drawn = self.variance.weight_std**2 * self.network.dense_params
        target = drawn - self.variance.weight_std**2 * rows.numel()
        if target > 0 and (left := drawn - float(rows.square().sum())) > 0:
            scale = (target / left) ** (0.5 / len(cores))
            self._assign([core * scale for core in cores])

    def _kernel(self, cores: Sequence[Tensor] | None = None) -> Tensor:
        """Return the table, of shape (num_embeddings, embedding_dim)."""
        cores = self._whole_cores(cores)
        with own_precision(cores[0]):
            table = self._executor.contraction(cores).reshape(-1, self.embedding_dim)[: self.num_embeddings]
        if self.padding_idx is None:
            return table.clone() if len(cores) == 1 else table.contiguous()
        return self._padded(torch.arange(self.num_embeddings, device=table.device), table)

    def _padded(self, index: Tensor, rows: Tensor) -> Tensor:
        """Return rows with that of ``padding_idx`` in place, which gives no gradient."""
        if self.padding_idx is None:
            return rows
        return torch.where((index == self.padding_idx).unsqueeze(-1), self.padding_row, rows)

    def _run(self, input: Tensor, output_padding: tuple[int, ...] | None = None) -> Tensor:
        """Return the rows of flattened indices, shape (tokens, embedding_dim)."""
        index = input.reshape(-1).long()
        if self.padded_embeddings > self.num_embeddings:  # an index of a padded row is out of range too
            index = torch.where(index < self.num_embeddings, index, self.padded_embeddings)
        cores = self._thinned(self._listed())
        if torch.compiler.is_compiling():
            rows = self._executor(index, cores, None, self.training)
        else:
            try:
                rows = self._executor(index, cores, None, self.training)
            except IndexError:
                found = f"indices from {int(input.min())} to {int(input.max())}"
                accepted = f"num_embeddings is {self.num_embeddings}, so 0 to {self.num_embeddings - 1} are accepted"
                raise IndexError(f"input has {found}; {accepted}") from None
        if self.scale_grad_by_freq and torch.is_grad_enabled() and rows.requires_grad:
            rows = divided_by_counts(rows, index, self.num_embeddings)
        return self._padded(index, rows)

    def _checked(self, input: Any) -> None:
        """Raise if an input holds no indices."""
        self._check_tensor(input)
        check_indices("input", input)

    def _check_tensor(self, value: Any, name: str = "input") -> None:
        if type(value) is not Tensor:
            check_tensor(type(self).__name__, value, name)

    def _batched(self, shape: Sequence[int]) -> tuple[int, ...]:
        return math.prod(shape), 1

    @torch.no_grad()
    def set_weight_(self, weight: Tensor, *, moments: Tensor | None = None) -> float:
        """Fit the cores to a table, by alternating least squares in float64.

        Padded rows are fitted to zeros. The row of ``padding_idx`` is copied as it is.

        Args:
            weight: table of the shape of ``layer.weight``.
            moments: None; a lookup has no sums over inputs.

        Returns:
            float: ``||weight - fit|| / ||weight||``, with the cores in the layer's dtype.

        Raises:
            TypeError, ValueError: as ``TensorLayer.set_weight_``; or ``moments`` is given.
        """
        if moments is not None:
            raise ValueError(f"moments is given, but {type(self).__name__} sums over no inputs; moments must be None")
        if not isinstance(weight, Tensor):
            return super().set_weight_(weight)  # which raises
        shape = self.num_embeddings, self.embedding_dim
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be {shape}")
        table = weight.new_zeros(self.padded_embeddings, self.embedding_dim)
        table[: self.num_embeddings] = weight.detach()
        if self.padding_idx is not None:
            table[self.padding_idx] = 0
        super().set_weight_(table.T)
        if self.padding_idx is not None:
            self.padding_row.copy_(weight[self.padding_idx])
        target = weight.detach().to("cpu", torch.float64)
        return length(self._kernel().to("cpu", torch.float64) - target) / (length(target) or 1.0)

    def _truncate(self, *arguments: Any) -> float:
        """Change the ranks; the error is that of the rows that indices reach."""
        before = self._kernel().detach().to("cpu", torch.float64)
        if super()._truncate(*arguments) == 0:
            return 0.0
        return length(self._kernel().to("cpu", torch.float64) - before) / (length(before) or 1.0)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Module, *, rank: Rank | str | None = None, decompose: bool = True, **kwargs: Any
    ) -> Self:
        """Return a tensor layer for a torch embedding: ``from_dense`` by another name."""
        return cls.from_dense(embedding, rank=rank, decompose=decompose, **kwargs)

    @classmethod
    def _unfitted(
        cls, dense: nn.Module, *, rank: Rank | str | None = None, decompose: bool = True, **kwargs: Any
    ) -> Self:
        layer = super()._unfitted(dense, rank=rank, decompose=decompose, **kwargs)
        if layer.padding_idx is not None and not layer.padding_row.is_meta:
            with torch.no_grad():
                layer.padding_row.copy_(dense.weight[layer.padding_idx])  # type: ignore[index]
        return layer

    @classmethod
    def from_pretrained(cls, embeddings: Tensor, freeze: bool = True, **kwargs: Any) -> Self:
        """Return a layer fitted to a table, as torch's classmethod of this name.

        Args:
            embeddings: table of shape (num_embeddings, embedding_dim).
            freeze: whether the cores have ``requires_grad=False``.
            **kwargs: torch's other arguments, such as padding_idx, and those of ``from_dense``, such as rank.

        Raises:
            TypeError, ValueError: an argument is invalid, as for the class and ``set_weight_``.
        """
        check_tensor(f"{cls.__name__}.from_pretrained", embeddings, "embeddings")
        if embeddings.dim() != 2:
            raise ValueError(
                f"embeddings has shape {tuple(embeddings.shape)}; it must be (num_embeddings, embedding_dim)"
            )
        make: Any = cls.dense_type.from_pretrained
        own = {name: kwargs.pop(name) for name in [*kwargs] if name in signature(make).parameters}
        return cls.from_dense(make(embeddings, freeze=freeze, **own), **kwargs)

    def to_embedding(self) -> Any:
        """Return a plain torch embedding with the same function: ``to_dense`` by another name."""
        return self.to_dense()

    def extra_repr(self) -> str:
        """Return the fields of torch's layer, then the padded vocabulary if it is padded, then the format's."""
        own = self.dense_type.extra_repr(SimpleNamespace(**self._arguments(self)))
        padded = self.padded_embeddings > self.num_embeddings
        return f"{own}{f', padded_to={self.padded_embeddings}' * padded}, {super().extra_repr()}"
