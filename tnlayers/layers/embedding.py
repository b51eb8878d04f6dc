"""Embeddings as ``torch.nn.Embedding``: the linear map of one-hot rows, which gathers rows from the cores."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.input_checks import check_cores, check_indices, check_tensor
from tnlayers.backend.sharding import whole
from tnlayers.backend.torch_state import own_precision
from tnlayers.execution.attributes import from_constructor, from_geometry
from tnlayers.execution.lookup import LookupExecutor
from tnlayers.fitting.objective import length
from tnlayers.formats.base import Format, checked_shape, factorize_up
from tnlayers.init.variance import Init
from tnlayers.layers.base import TensorLayer
from tnlayers.ops.row_gradients import divided_by_counts
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.rank import Rank

UNEVEN = 1.25
"""A vocabulary is padded if its own factors add up to more than this multiple of those of the padded one."""
_MANY = 2**20
"""A number of many factors: a format splits it into as many as it ever makes."""


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
    scale_grad_by_freq: bool

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
        _refuse(max_norm, validate.boolean("sparse", sparse))
        if in_shape is None:
            shape = _split(self._format(options), rows, columns)
        else:
            shape = checked_shape("in_shape", in_shape, "num_embeddings", rows, more=True)
        # The constructor of the base draws the cores, and needs to know which rows are reached.
        self.__dict__.update(
            num_embeddings=rows,
            padding_idx=_padding("padding_idx", padding_idx, rows),
            max_norm=None,
            norm_type=norm_type,
            sparse=False,
        )
        super().__init__(
            Geometry(math.prod(shape), columns, ()),
            bias=False,
            in_shape=shape,
            init=_settled(init),
            options=options,
            **arguments,
        )
        self.scale_grad_by_freq = validate.boolean("scale_grad_by_freq", scale_grad_by_freq)
        if self.padding_idx is not None:
            self.register_buffer("padding_row", self.cores[0].detach().new_zeros(columns))

    @property
    def keep_ratio(self) -> float:
        """Ratio of the cores' parameters to the table's, without padded rows."""
        return self.network.num_params / (self.num_embeddings * self.embedding_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Solve for the variances, and draw the cores anew; the row of ``padding_idx`` is zero again.

        With an exact ``Init``, the rows that indices reach have the std, without that of ``padding_idx``.
        """
        self.init = _settled(self.init)
        super().reset_parameters()
        if self.padding_idx is not None and "padding_row" in self._buffers:
            self.padding_row.zero_()
        hidden = [*range(self.num_embeddings, self.padded_embeddings)]
        hidden += [] if self.padding_idx is None else [self.padding_idx]
        if not hidden or not self.init.exact or self.cores[0].is_meta:
            return
        cores = [whole(core) for core in self.cores]
        rows = self._executor(torch.tensor(hidden, device=cores[0].device), cores, None, False).double()
        drawn = self.variance.weight_std**2 * self.network.dense_params
        target = drawn - self.variance.weight_std**2 * rows.numel()
        if target > 0 and (left := drawn - float(rows.square().sum())) > 0:
            scale = (target / left) ** (0.5 / len(cores))
            self._assign([core * scale for core in cores])

    def _kernel(self) -> Tensor:
        """Return the table, of shape (num_embeddings, embedding_dim)."""
        cores = [whole(core) for core in self.cores]
        check_cores(cores)
        if torch._C._get_tracing_state() is None and not torch.compiler.is_compiling():
            self.network.check_shapes(core.shape for core in cores)
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
        cores = self._listed()
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
        if type(input) is not Tensor:
            check_tensor(type(self).__name__, input)
        check_indices("input", input)

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

    @classmethod
    def from_embedding(
        cls, embedding: nn.Module, *, rank: Rank | None = None, decompose: bool = True, **kwargs: Any
    ) -> Self:
        """Return a tensor layer for a torch embedding: ``from_dense`` by another name."""
        return cls.from_dense(embedding, rank=rank, decompose=decompose, **kwargs)

    @classmethod
    def _unfitted(cls, dense: nn.Module, *, rank: Rank | None = None, decompose: bool = True, **kwargs: Any) -> Self:
        layer = super()._unfitted(dense, rank=rank, decompose=decompose, **kwargs)
        if layer.padding_idx is not None and not layer.padding_row.is_meta:
            with torch.no_grad():
                layer.padding_row.copy_(dense.weight[layer.padding_idx])  # type: ignore[index]
        return layer

    def to_embedding(self) -> Any:
        """Return a plain torch embedding with the same function: ``to_dense`` by another name."""
        return self.to_dense()

    def extra_repr(self) -> str:
        """Return the fields of torch's layer, then the padded vocabulary if it is padded, then the format's."""
        dense = self.dense_type(**self._arguments(self), device="meta")
        padded = self.padded_embeddings > self.num_embeddings
        return f"{dense.extra_repr()}{f', padded_to={self.padded_embeddings}' * padded}, {super().extra_repr()}"


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
            Modes have no meaning here, since a lookup sums over no inputs.
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
            return F.embedding(input, self._kernel(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return self._run(input).reshape(*input.shape, self.embedding_dim)


def _refuse(max_norm: float | None, sparse: bool) -> None:
    """Raise for the arguments of torch's embeddings that a table of shared cores cannot honour."""
    if max_norm is not None:
        raise ValueError(
            f"max_norm is {max_norm!r}; it must be None: torch renormalises the rows that it looks up in place, but "
            "rows of a tensor network share the cores"
        )
    if sparse:
        raise ValueError(
            "sparse is True; it must be False: the gradient of a row reaches slices of the cores that other rows share, "
            "and the cores are small"
        )


def _padding(name: str, value: Any, rows: int) -> int | None:
    """Return padding_idx counted from 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; it must be an integer or None")
    if not -rows <= (index := value.__index__()) < rows:
        raise ValueError(f"{name} is {index}; it must be from {-rows} to {rows - 1}, since num_embeddings is {rows}")
    return index % rows


def _settled(init: str | Init) -> Init:
    """Return the initialisation of a table: a std, exact in the norm.

    Fans and gains describe sums over inputs. A lookup sums over none, and its input is no smooth signal.
    """
    init = Init.of(init)
    if init.std is None:
        default = Init()
        for name in ("mode", "nonlinearity", "param"):
            if (value := getattr(init, name)) != getattr(default, name):
                raise ValueError(f"init has the {name} {value!r}, but a lookup sums over no inputs; give its std")
        init = replace(init, std=1.0)
    if init.typical:
        raise ValueError("init has typical=True, but a lookup has no smooth inputs; it must be False")
    return replace(init, exact="white") if init.exact else init


def _split(format: Format, rows: int, columns: int) -> tuple[int, ...]:
    """Return the format's own factors of a vocabulary, or even ones of a padded vocabulary if these are uneven."""
    own = format.split(rows, columns, 1)[0]
    even = factorize_up(rows, len(format.split(_MANY, columns, 1)[0]))
    return even if sum(own) > UNEVEN * sum(even) else own
