"""Base of every layer: it holds the cores, and calls format, solver and executor once each."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tnlayers import validate
from tnlayers.backend.input_checks import check_cores
from tnlayers.backend.sharding import place, whole
from tnlayers.backend.torch_state import own_precision
from tnlayers.backend.views import exchange
from tnlayers.execution.attributes import from_constructor
from tnlayers.fitting.cuts import by_rule
from tnlayers.fitting.decompose import decompose
from tnlayers.fitting.metric import check
from tnlayers.fitting.objective import length
from tnlayers.formats import Format
from tnlayers.formats.base import checked_shape
from tnlayers.init.draw import draw, uniform
from tnlayers.init.like import resolved
from tnlayers.init.variance import Init
from tnlayers.layers import core_memory
from tnlayers.layers.changing_ranks import ChangesRanks
from tnlayers.layers.computed_weight import ComputesWeight
from tnlayers.layers.has_format import HasFormat
from tnlayers.layers.zero_kernels import learnable
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.rank import Rank

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TensorLayer(HasFormat, ComputesWeight, ChangesRanks):
    """A linear map whose weight is a tensor network.

    A subclass with ``format=`` in its class statement is a layer of that format; the format's options become keyword
    arguments of its constructor. ``TensorConv``, ``TensorConvTranspose`` and ``TensorLinear`` have examples.

    Attributes:
        cores: the parameters, in network order.
        bias: shape (out_channels,), or None.
        format: the format, with its options.
        network: axes of each core, and their sizes.
        rank: size of every bond that is not fixed; as the argument ``rank``, it gives the same network.
        geometry: checked arguments of the convolution or linear map.
        init: the initialisation.
        variance: result of the solver: standard deviation of each core, fans, standard deviation of the weight.
    """

    channel_names: ClassVar[tuple[str, str]] = ("in_channels", "out_channels")
    """Names of the arguments for channels."""
    bias: nn.Parameter | None
    format: Format = from_constructor("format")
    rank: Mapping[str, int] = from_constructor("rank")

    def __init__(
        self,
        geometry: Geometry,
        *,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        rank: Rank | None,
        in_shape: Sequence[int] | None,
        out_shape: Sequence[int] | None,
        init: str | Init,
        strategy: str,
        memory: str,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.__dict__["format"] = self._format(options)
        self.init = Init.of(init)
        outputs, groups = geometry.out_channels, geometry.groups
        inputs = geometry.in_channels // groups
        split = self.format.split(inputs, outputs, groups)
        inputs_name, outputs_name = self.channel_names
        inputs_name += "" if groups == 1 else " / groups"
        network, self.__dict__["rank"] = self.format.build(
            split[0] if in_shape is None else checked_shape("in_shape", in_shape, inputs_name, inputs),
            split[1] if out_shape is None else checked_shape("out_shape", out_shape, outputs_name, outputs),
            geometry.kernel_size,
            rank,
        )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype is {dtype}; accepted: {', '.join(map(str, DTYPES))}")
        core_memory.check(type(self).__name__, network, rank, torch.empty(0, device=device, dtype=dtype))
        self._executor = self.executor_type(network, geometry, strategy, memory)
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in self.network.core_shapes
        )
        if validate.boolean("bias", bias):
            self.bias = nn.Parameter(torch.empty(geometry.out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Solve for the variances, and draw the cores and the bias anew."""
        self.init = Init.of(self.init)
        self.variance = variance = self._variance_of(self.network)
        if all(core.is_meta for core in self.cores):
            return  # there is nothing to draw
        self._assign(draw(self.network, self.geometry, variance, self.init, list(self.cores)))
        if self.bias is not None:
            self.bias.copy_(place(uniform(self.bias, self.geometry.bias_bound), self.bias))

    def _whole_cores(self, cores: Sequence[Tensor] | None) -> list[Tensor]:
        """Return the layer's cores, or those that a forward uses, whole and checked."""
        found = [whole(core) for core in (self.cores if cores is None else cores)]
        check_cores(found)
        if torch._C._get_tracing_state() is None and not torch.compiler.is_compiling():
            self.network.check_shapes(core.shape for core in found)
        return found

    def _kernel(self, cores: Sequence[Tensor] | None = None) -> Tensor:
        """Return the dense kernel of the layer's cores, or of those that a forward uses."""
        cores = self._whole_cores(cores)
        if len(cores) == 1:
            kernel = reconstruct(self.network, cores).clone()  # never a view of a parameter
        else:
            with own_precision(cores[0]):
                kernel = self._executor.contraction(cores).reshape(self.network.dense_shape)
        return self._ordered(kernel).contiguous() if self.geometry.transposed else kernel

    def _ordered(self, kernel: Tensor) -> Tensor:
        """Convert between the network's order of axes and the weight's, which differ if transposed."""
        return exchange(kernel, self.geometry.groups) if self.geometry.transposed else kernel

    @property
    def keep_ratio(self) -> float:
        """Ratio of the cores' parameters to the dense kernel's, both without bias."""
        return self.network.num_params / self.dense_params

    @torch.no_grad()
    def set_weight_(self, weight: Tensor, *, moments: Tensor | None = None) -> float:
        """Fit the cores to a dense kernel, by alternating least squares in float64.

        All cores get the same norm. If the kernel is zero, or its norm below a hundredth of a drawn kernel's, only the
        last core is small, so that the layer can learn: see ``tnlayers.layers.zero_kernels``.

        Args:
            weight: kernel of the shape of ``layer.weight``.
            moments: ``E[x x^T]`` of the input channels (of one group), to minimise the error of the outputs instead.

        Returns:
            float: ``||weight - fit|| / ||weight||``, with the cores in the layer's dtype.

        Raises:
            TypeError: ``weight`` is no tensor of real floating-point numbers, or the cores are parametrized.
            ValueError: it has another shape, no values (meta device), NaN or infinity, or needs cores that the layer's
                dtype cannot hold; or ``moments`` is invalid, see ``decompose``. The cores are then unchanged.
        """
        if self.cores[0].is_meta:
            raise ValueError("the layer is on the meta device and has no cores to set; call to_empty first")
        check("weight", weight, self.geometry.weight_shape, f"; it must be {self.geometry.weight_shape}")
        weight = self._ordered(weight)
        cores: Sequence[Tensor] = decompose(weight, self.network, moments=moments).cores
        target = weight.detach().to("cpu", torch.float64)
        norm = length(target)
        cores = learnable(self.network, self.geometry, self.variance, self.init, cores, norm)
        cores = [fitted.to(core.device, core.dtype) for core, fitted in zip(self.cores, cores, strict=True)]
        found = reconstruct(self.network, cores).to("cpu", torch.float64)
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"weight has norm {norm:.3g}; {cores[0].dtype} cannot hold its fit or the cores' product")
        self._assign(cores)
        return length(found - target) / (norm or 1.0)

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        """Return the arguments of a layer, ours or torch's, without device and dtype."""
        raise NotImplementedError

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        *,
        rank: Rank | str | None = None,
        decompose: bool = True,
        moments: Tensor | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return a tensor layer for a torch layer, with its arguments, device, dtype, bias and training flag.

        Args:
            dense: a layer of ``dense_type``; subclasses are refused, since they may do more.
            rank: as for the class; or ``"vbmf"``, the ranks that variational Bayes finds in the weight's unfoldings.
            decompose: fit the cores to the layer's weight, or else draw them.
            moments: of the inputs, as in ``set_weight_``; only with ``decompose``.
            **kwargs: the class' other keyword arguments. init may be 'like': a kernel as large as the layer's weight.

        Raises:
            TypeError: ``dense`` has another type.
            ValueError: ``decompose`` or 'like' for a weight without values (meta device), or ``moments`` alone.
        """
        if moments is not None and not validate.boolean("decompose", decompose):
            raise ValueError("moments is given, but decompose is False and nothing is fitted; moments must be None")
        layer = cls._unfitted(dense, rank=rank, decompose=decompose, **kwargs)
        if decompose:
            layer.set_weight_(dense.weight, moments=moments)  # type: ignore[arg-type]
        return layer

    @classmethod
    def _unfitted(
        cls, dense: nn.Module, *, rank: Rank | str | None = None, decompose: bool = True, **kwargs: Any
    ) -> Self:
        """Return ``from_dense``'s layer before the fit: without values in its cores, or drawn."""
        name, accepted = cls.dense_name, cls.dense_type
        if type(dense) is not accepted:
            given = f"{name} is {type(dense).__name__}"
            raise TypeError(f"{given}; {cls.__name__}.from_{name} takes an nn.{accepted.__name__}")
        weight: Any = dense.weight
        if validate.boolean("decompose", decompose) and weight.is_meta:
            raise ValueError(
                f"decompose is True, but {name} is on the meta device and has no values; pass decompose=False"
            )
        kwargs = resolved(kwargs, dense, name)
        if isinstance(rank, str):
            draft = cls(**cls._arguments(dense), device="meta", rank=1, **kwargs)
            rank = by_rule(draft.network, [*draft.rank], draft._ordered(weight), rank)
        device = "meta" if decompose else weight.device  # the cores of a fit need not be drawn first
        layer = cls(**cls._arguments(dense), device=device, dtype=weight.dtype, rank=rank, **kwargs)
        if decompose:
            core_memory.check(cls.__name__, layer.network, rank, weight)
            layer.to_empty(device=weight.device)
        layer.cores.requires_grad_(weight.requires_grad)
        copy_state(dense, layer)
        return layer

    def to_dense(self) -> Any:
        """Return a plain torch layer with the same function, on the same device."""
        weight = self._kernel().detach()
        # Built without storage, so that torch's own initialisation draws no random numbers.
        dense = self.dense_type(**self._arguments(self), device="meta").to_empty(device=weight.device).to(weight.dtype)
        dense.weight.data.copy_(weight)
        dense.weight.requires_grad_(any(core.requires_grad for core in self.cores))
        copy_state(self, dense)
        return dense

    def _assign(self, values: Sequence[Tensor]) -> None:
        if is_parametrized(self.cores):
            raise TypeError("cores are parametrized, so their values cannot be set; remove the parametrizations first")
        for core, value in zip(self.cores, values, strict=True):
            core.copy_(place(value, core))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # one line, as torch's layers

    def extra_repr(self) -> str:
        """Return format with options, rank (one number if all bonds are equal), keep ratio, and dropout if it is on."""
        sizes = tuple(self.rank.values())
        rank: object = sizes[0] if len(set(sizes)) == 1 else sizes
        options = "".join(f", {field.name}={getattr(self.format, field.name)!r}" for field in fields(self.format))
        dropout = f", rank_dropout={self.rank_dropout}" if self.rank_dropout else ""
        return f"format={self.format.name}{options}, rank={rank}, keep_ratio={self.keep_ratio:.3g}{dropout}"


@torch.no_grad()
def copy_state(source: Any, target: Any) -> None:
    """Copy bias and training flag, which do not depend on the form of the kernel."""
    if getattr(source, "bias", None) is not None:
        target.bias.copy_(place(whole(source.bias), target.bias))
        target.bias.requires_grad_(source.bias.requires_grad)
    target.train(source.training)
