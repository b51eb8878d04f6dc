"""A layer's plan cache, filled on the first input of each kind, and the weight cache of a frozen layer."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.torch_state import autocast_dtype, constant_to_compilers, sizes, traced
from tnlayers.backend.views import FIRST, LAST
from tnlayers.execution.run import apply_steps, pad, prepare_weights, run
from tnlayers.ops.contraction import to_kernel
from tnlayers.ops.input_step import MATMUL
from tnlayers.planning.choose import candidates, parse, plan, tuned_choice
from tnlayers.planning.plan import Plan
from tnlayers.planning.setting import MEMORY, STRATEGIES, Setting, typical
from tnlayers.planning.tuned import Choice
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork

_KEPT = 256
"""Maximum number of cached plans per layer. Beyond it, the least recently used plan is dropped."""


class _Kept(NamedTuple):
    """Cached weights, with the cores that they were built from and the cores' versions and addresses."""

    cores: list[Tensor]
    versions: list[tuple[int, int]]
    weights: list[Tensor]

    @property
    def size(self) -> int:
        """Bytes of the weights that do not share storage with the cores."""
        own = {core.untyped_storage().data_ptr() for core in self.cores}
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in self.weights}
        return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


class LayerExecutor:
    """The plans of one layer.

    Args:
        network: the layer's network.
        geometry: its geometry.
        strategy, memory: see ``tnlayers.planning.choose.candidates``.

    Attributes:
        dim, channels: number of dimensions and channels of a batched input.
        names: names of the cores, in order.
        frozen: whether inference caches the contracted weights, see ``tnlayers.freeze_``.
        rank_dropout: probability that training drops an entry of a bond, see ``tnlayers.rank_dropout_``.
        contraction: order that contracts the cores to the dense kernel outside of plans.

    Raises:
        TypeError, ValueError: strategy or memory is invalid, see ``tnlayers.planning.choose.parse``.
    """

    def __init__(self, network: TensorNetwork, geometry: Geometry, strategy: str, memory: str) -> None:
        parse(strategy, network, geometry)
        self.network, self.geometry = network, geometry
        self.strategy, self.memory = strategy, validate.choice("memory", memory, MEMORY)
        self.dim, self.channels = geometry.ndim + 2, geometry.in_channels
        self.names = tuple(map(str, range(len(network.cores))))
        self.frozen, self.rank_dropout = False, 0.0
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._weights: OrderedDict[Any, _Kept] = OrderedDict()
        self.contraction = to_kernel(network)

    def __reduce__(self) -> Any:
        made = self.network, self.geometry, self.strategy, self.memory
        return type(self), made, {"rank_dropout": self.rank_dropout}

    @property
    def keeps(self) -> bool:
        """Whether inference caches weights: the layer is frozen and its memory is not 'low'."""
        return self.frozen and self.memory != "low"

    def anew(self, **changes: Any) -> Self:
        """Return an executor with another network, geometry, strategy or memory; ``frozen`` and dropout stay."""
        settings = {name: getattr(self, name) for name in ("network", "geometry", "strategy", "memory")} | changes
        executor = type(self)(**settings)
        executor.frozen, executor.rank_dropout = self.frozen, self.rank_dropout
        return executor

    def candidates(self, setting: Setting) -> Iterator[Plan]:
        """Return the plans for a setting, in the order of ``tnlayers.planning.choose.candidates``."""
        return candidates(self.network, self.geometry, setting, self.strategy, self.memory)

    def plan(
        self, setting: Setting, output_padding: tuple[int, ...] | None = None, strategy: str | None = None
    ) -> Plan:
        """Return the plan for a setting. Output padding and strategy default to the layer's."""
        geometry = self.geometry
        if output_padding is not None:
            geometry = replace(geometry, output_padding=output_padding)
        return plan(self.network, geometry, setting, strategy or self.strategy, self.memory)

    def tuned(self, setting: Setting) -> Choice | None:
        """Return what ``tnlayers.autotune`` kept for a setting; None too if the strategy is not 'auto'."""
        auto = self.strategy == STRATEGIES[0]
        return tuned_choice(self.network, self.geometry, setting, self.memory) if auto else None

    @property
    def latest(self) -> Plan | None:
        """The plan of the latest eager call."""
        return next(reversed(self._plans.values()), None)

    def forget(self) -> None:
        """Drop the cached weights."""
        self._weights.clear()

    def thaw(self) -> None:
        """Unfreeze the layer and drop its cached weights."""
        self.frozen = False
        self.forget()

    def __call__(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        bias: Tensor | None,
        training: bool,
        output_padding: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Run the layer on an input of shape ``(batch, in_channels, *spatial)``."""
        grad = torch.is_grad_enabled() and (x.requires_grad or any(core.requires_grad for core in cores))
        if grad and self.frozen:
            self.thaw()  # an optimizer step may follow; fused optimizers do not raise the cores' version
        mode, kind, dtype = "train" if grad else "infer", x.device.type, x.dtype
        if torch.compiler.is_compiling():
            name = self.prepare(mode, kind, str(dtype), static_sizes(x), output_padding)
            return run(getattr(self, name), x, cores, bias)
        shape: tuple[int, ...] = x.shape
        tracing = traced()
        if tracing or type(x) is not Tensor:
            shape = tuple(map(int, sizes(x)))  # symbols to numbers, for plans and their cache
        if tracing and torch._C._get_tracing_state() is not None:
            mode = "infer"  # torch.jit.trace checks without gradients, and expects the same operations
        elif tuple([core.shape for core in cores]) != self.network.core_shapes:  # a list is faster than a generator
            self.network.check_shapes(core.shape for core in cores)
        cast = None if dtype is torch.float64 else autocast_dtype(kind)
        dtype = cast or dtype
        layout = LAST if self.dim == 2 or _is_channels_last(x) else FIRST
        if layout == LAST and dtype == torch.float64 and kind == "cpu" and self.dim > 2:
            x, layout = x.contiguous(), FIRST  # torch's own convolution fails in some of these backward passes
        if self.frozen and self.keeps and not grad and not training and not tracing:
            mode = "cached"  # a trace would hold the weights forever
        key = (shape, mode, layout, dtype, kind, output_padding)
        found = self._plans.pop(key, None)  # reinserted below as the latest; threads may share an executor
        if found is None:
            batch, _, *size = shape
            setting = Setting(max(1, batch), tuple(size), layout, mode, kind, dtype)
            found = self._new(setting, output_padding)
        self._plans[key] = found
        if mode != "cached":
            return run(found, x, cores, bias)
        weights = self._kept(found, cores, cast)
        if found.direct is not None:
            return found.direct.apply(x, weights[0], bias)
        return apply_steps(found, pad(found, x), weights, bias)

    def _new(self, setting: Setting, output_padding: tuple[int, ...] | None = None) -> Any:
        """Return the plan for a setting, and make room for it among the cached plans."""
        found = self.plan(setting, output_padding)
        if len(self._plans) >= _KEPT:
            self._plans.popitem(last=False)
        return found

    def caches(self, cores: Sequence[Tensor], training: bool) -> bool:
        """Return whether this call uses cached weights. Thaw the layer if the call records gradients of the cores."""
        grad = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
        if grad and self.frozen:
            self.thaw()  # as in __call__
        return self.keeps and not grad and not training and not traced()

    def repeated(
        self, plan: Plan, cores: Sequence[Tensor], training: bool
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Return the plan as a function of input and bias, with weights contracted once, here, for many calls."""
        cast = None if cores[0].dtype == torch.float64 else autocast_dtype(cores[0].device.type)
        cached = self.caches(cores, training)
        weights = self._kept(plan, cores, cast) if cached else prepare_weights(plan, cores)
        return lambda x, bias: apply_steps(plan, x, weights, bias)

    def _kept(self, found: Any, cores: Sequence[Tensor], cast: torch.dtype | None) -> list[Tensor]:
        """Return the weights of a plan in autocast's dtype, from the cache unless a change of a core is detected."""

        def make(lasting: bool) -> list[Tensor]:
            weights = self._prepared(found, cores, lasting)
            return [weight.to(cast or weight.dtype) for weight in weights] if lasting else weights

        return self.cached((found.signature, cast), cores, make)

    def cached(self, key: Any, cores: Sequence[Tensor], make: Callable[[bool], list[Tensor]]) -> list[Tensor]:
        """Return the weights of the cores, from the cache unless a change of a core is detected.

        ``make`` makes them; its argument is whether they are cached, and not for this call only.
        """
        try:
            versions = [(core._version, core.data_ptr()) for core in cores]
        except RuntimeError:  # inference tensors have no version counter
            return make(False)
        kept = self._weights.get(key)
        if kept is not None and kept.versions == versions and all(map(is_, kept.cores, cores)):
            return kept.weights
        if not all(type(core) is nn.Parameter for core in cores):
            return make(False)  # temporary tensors of this call, as in torch.func
        with torch.inference_mode(False), torch.no_grad():
            weights = make(True)
        self._keep(key, _Kept(list(cores), versions, weights))
        return weights

    def _prepared(self, found: Any, cores: Sequence[Tensor], lasting: bool = False) -> list[Tensor]:
        """Return the weights of a plan; if ``lasting``, laid out as its steps read them fastest."""
        weights = prepare_weights(found, cores)
        if not lasting:
            return weights
        steps = zip(weights, found.steps, strict=True)
        return [weight.contiguous() if step.op == MATMUL else weight for weight, step in steps]

    def _keep(self, key: Any, new: "_Kept") -> None:
        """Cache weights. Older ones are dropped until all together fit in the memory of one dense kernel."""
        self._weights.pop(key, None)
        room = self.network.dense_params * new.cores[0].element_size() - new.size
        if room < 0:
            return
        while sum(kept.size for kept in [*self._weights.values()]) > room:
            self._weights.popitem(last=False)
        self._weights[key] = new

    @constant_to_compilers
    def prepare(
        self,
        mode: str,
        device: str,
        dtype: str,
        sizes: tuple[int | None, ...],
        output_padding: tuple[int, ...] | None = None,
    ) -> str:
        """Store the plan for a compiler in an attribute, and return the attribute's name.

        ``sizes`` are the batch and the spatial sizes, None where the compiler leaves one open. The plan takes open ones
        from the latest eager call, or typical ones. In training with open spatial sizes, 'auto' reconstructs the kernel
        (see ``static_sizes``), except in an export, where every plan can be trained.
        """
        # Called here, in code that a compiler runs: torch 2.11 would otherwise treat the result as a constant.
        exporting = torch.compiler.is_exporting()
        whole = mode == "train" and self.strategy == STRATEGIES[0] and None in sizes[1:] and not exporting
        padding = "" if output_padding is None else "_padding_" + "_".join(map(str, output_padding))
        open_or_not = "_".join("open" if size is None else str(size) for size in sizes)
        name = f"_compiled_{mode}_{device}_{dtype.removeprefix('torch.')}{padding}_{open_or_not}" + "_whole" * whole
        latest = self.latest
        usual, places = (latest.setting.batch, latest.setting.size) if latest else typical(self.geometry)
        batch, *size = (other if one is None else one for one, other in zip(sizes, (usual, *places), strict=True))
        setting = Setting(
            max(1, batch), tuple(size), mode=mode, device=device, dtype=getattr(torch, dtype.removeprefix("torch."))
        )
        setattr(self, name, self.plan(setting, output_padding, "reconstruct" if whole else None))
        return name


def static_sizes(x: Tensor) -> tuple[int | None, ...]:
    """Return the batch and the spatial sizes of an input to a compiler, None where it treats one as symbolic.

    With a symbolic spatial size, inductor (torch 2.13) cannot train a matrix product before a convolution.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value  # noqa: PLC0415  (compilers have imported it)

    batch, *places = (int(size) if has_static_value(size) else None for size in x.shape)
    return batch, *places[1:]


def _is_channels_last(x: Tensor) -> bool:
    if x.is_contiguous() or torch._C._are_functorch_transforms_active():
        return False
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
