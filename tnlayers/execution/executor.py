"""A layer's plans: made on the first input of a kind and kept; with the weights of a layer that is frozen."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.torch_state import autocast_dtype, sizes, traced
from tnlayers.backend.views import FIRST, LAST
from tnlayers.execution.run import apply_steps, pad, prepare_weights, run
from tnlayers.ops.contraction import order
from tnlayers.ops.input_step import MATMUL
from tnlayers.planning.choose import candidates, parse, plan
from tnlayers.planning.plan import Plan
from tnlayers.planning.setting import MEMORY, STRATEGIES, Setting
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork

_KEPT = 256
"""Maximum number of cached plans per layer. Beyond it, the one that was not used for the longest time goes."""

_NOMINAL = 32, 32
"""Batch and positions along each axis that a compiler, which may leave them open, plans for before any eager call."""


class _Kept(NamedTuple):
    """Weights, and the cores that they were built from with their versions and addresses."""

    cores: list[Tensor]
    versions: list[tuple[int, int]]
    weights: list[Tensor]

    @property
    def size(self) -> int:
        """Bytes, beside those of the cores."""
        own = {core.untyped_storage().data_ptr() for core in self.cores}
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in self.weights}
        return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


class LayerExecutor:
    """Plans of one layer.

    Args:
        network: the layer's network.
        geometry: its geometry.
        strategy, memory: see ``tnlayers.planning.choose.candidates``.

    Attributes:
        dim, channels: how many a batched input has.
        names: of the cores, in order.
        frozen: whether inference keeps the weights that the cores contract to, see ``tnlayers.freeze_``.
        contraction: how the cores contract to the dense kernel, where no plan says so.

    Raises:
        TypeError, ValueError: strategy or memory is not as there, see ``tnlayers.planning.choose.parse``.
    """

    def __init__(self, network: TensorNetwork, geometry: Geometry, strategy: str, memory: str) -> None:
        parse(strategy, network, geometry)
        self.network, self.geometry = network, geometry
        self.strategy, self.memory = strategy, validate.choice("memory", memory, MEMORY)
        self.dim, self.channels = geometry.ndim + 2, geometry.in_channels
        self.names = tuple(map(str, range(len(network.cores))))
        self.frozen = False
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._weights: OrderedDict[Any, _Kept] = OrderedDict()
        self.contraction = order(network.cores, network.dense_axes, tuple(network.sizes.items()))
        self._latest: tuple[int, tuple[int, ...]] | None = None

    def __reduce__(self) -> Any:
        return LayerExecutor, (self.network, self.geometry, self.strategy, self.memory)

    @property
    def keeps(self) -> bool:
        """Whether inference keeps weights: of a frozen layer that may take memory for them."""
        return self.frozen and self.memory != "low"

    def anew(self, **changes: Any) -> "LayerExecutor":
        """A planner with another geometry, strategy or memory; of a layer that is frozen, if this one is."""
        settings = {name: getattr(self, name) for name in ("geometry", "strategy", "memory")} | changes
        executor = LayerExecutor(self.network, **settings)
        executor.frozen = self.frozen
        return executor

    def candidates(self, setting: Setting) -> Iterator[Plan]:
        """Plans for a setting, as ``tnlayers.planning.choose.candidates`` orders them."""
        return candidates(self.network, self.geometry, setting, self.strategy, self.memory)

    def plan(
        self, setting: Setting, output_padding: tuple[int, ...] | None = None, strategy: str | None = None
    ) -> Plan:
        """The plan for a setting, and for another output padding or strategy than the layer's, if one is given."""
        geometry = self.geometry
        if output_padding is not None:
            geometry = replace(geometry, output_padding=output_padding)
        return plan(self.network, geometry, setting, strategy or self.strategy, self.memory)

    def forget(self) -> None:
        """Drop the weights that a frozen layer keeps."""
        self._weights.clear()

    def thaw(self) -> None:
        """Keep no weights any more."""
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
        """Run the layer on an input of shape (batch, in_channels, *spatial)."""
        grad = torch.is_grad_enabled() and (x.requires_grad or any(core.requires_grad for core in cores))
        if grad and self.frozen:
            self.thaw()  # a step may follow; fused optimizers' steps do not count as changes
        mode, kind, dtype = "train" if grad else "infer", x.device.type, x.dtype
        if torch.compiler.is_compiling():
            whole = mode == "train" and self.strategy == STRATEGIES[0] and _open(x)
            name = self.prepare(mode, kind, str(dtype), output_padding, whole)
            return run(getattr(self, name), x, cores, bias)
        if torch._C._get_tracing_state() is not None:
            mode = "infer"  # torch.jit.trace takes its check without gradients, and wants the same operations there
        else:
            self.network.check_shapes(core.shape for core in cores)
        cast = None if dtype == torch.float64 else autocast_dtype(kind)
        dtype = cast or dtype
        layout = LAST if self.dim == 2 or _is_channels_last(x) else FIRST
        if layout == LAST and dtype == torch.float64 and kind == "cpu" and self.dim > 2:
            x, layout = x.contiguous(), FIRST  # torch's own convolution fails there in some backward passes
        if self.keeps and not grad and not training and not traced():  # a trace would hold the weights for ever
            mode = "cached"
        shape: tuple[int, ...] = sizes(x)
        if type(x) is not Tensor or traced():
            shape = tuple(map(int, shape))  # symbols; plans, and their cache, are for numbers
        key = (shape, mode, layout, dtype, kind, output_padding)
        found = self._plans.pop(key, None)  # and put in again, as the latest; threads may share a planner
        if found is None:
            batch, _, *size = shape
            setting = Setting(max(1, batch), tuple(size), layout, mode, kind, dtype)
            found = self.plan(setting, output_padding)
            self._latest = setting.batch, setting.size
            if len(self._plans) >= _KEPT:
                self._plans.popitem(last=False)
        self._plans[key] = found
        if mode != "cached":
            return run(found, x, cores, bias)
        weights = self._kept(found, cores, cast)
        if found.direct is not None:
            return found.direct.apply(x, weights[0], bias)
        return apply_steps(found, pad(found, x), weights, bias)

    def _kept(self, found: Plan, cores: Sequence[Tensor], cast: torch.dtype | None) -> list[Tensor]:
        """The weights of a plan, as autocast wants them, built once for as long as no core is seen to change."""
        try:
            versions = [(core._version, core.data_ptr()) for core in cores]
        except RuntimeError:  # inference tensors do not count their versions
            return prepare_weights(found, cores)
        key = found.signature, cast
        kept = self._weights.get(key)
        if kept is not None and kept.versions == versions and all(map(is_, kept.cores, cores)):
            return kept.weights
        if not all(type(core) is nn.Parameter for core in cores):
            return prepare_weights(found, cores)  # made up for this call, as torch.func does
        with torch.inference_mode(False), torch.no_grad():
            weights = [
                (weight.contiguous() if step.op == MATMUL else weight).to(cast or weight.dtype)
                for weight, step in zip(prepare_weights(found, cores), found.steps, strict=True)
            ]
        self._keep(key, _Kept(list(cores), versions, weights))
        return weights

    def _keep(self, key: Any, new: "_Kept") -> None:
        """Keep weights, and of older ones no more than make up the memory of one dense kernel with them."""
        self._weights.pop(key, None)
        room = self.network.dense_params * new.cores[0].element_size() - new.size
        if room < 0:
            return
        while sum(kept.size for kept in [*self._weights.values()]) > room:
            self._weights.popitem(last=False)
        self._weights[key] = new

    def prepare(
        self, mode: str, device: str, dtype: str, output_padding: tuple[int, ...] | None = None, whole: bool = False
    ) -> str:
        """Make the plan that a compiler gets, and tell the name of the attribute that holds it.

        It is made for the sizes of the latest eager call, or for typical ones: a compiler may leave sizes open. Where
        ``whole``, it reconstructs the kernel, but for an exporter, which can train every plan.
        """
        # Asked here, where a compiler runs what stands there: it takes the answer for granted in torch 2.11.
        whole = whole and not torch.compiler.is_exporting()
        extra = "_whole" * whole + ("" if output_padding is None else "_" + "_".join(map(str, output_padding)))
        name = f"_compiled_{mode}_{device}_{dtype.removeprefix('torch.')}{extra}"
        typical = tuple(max(_NOMINAL[1], span) for span in self.geometry.spans)
        batch, size = self._latest or (_NOMINAL[0], typical)
        setting = Setting(batch, size, mode=mode, device=device, dtype=getattr(torch, dtype.removeprefix("torch.")))
        setattr(self, name, self.plan(setting, output_padding, "reconstruct" if whole else None))
        return name

    # What torch.compiler.assume_constant_result sets; to call it would import the compiler for everyone.
    prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _open(x: Tensor) -> bool:
    """Whether a compiler leaves height and width open.

    There inductor (of torch 2.13) cannot train a matrix product before a convolution.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value  # noqa: PLC0415  (compilers have imported it)

    return not all(has_static_value(size) for size in x.shape[2:])


def _is_channels_last(x: Tensor) -> bool:
    if x.is_contiguous() or torch._C._are_functorch_transforms_active():
        return False
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
