"""Execution of lookups: rows of the table by index, gathered from the cores."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tnlayers.backend.input_checks import check_cores
from tnlayers.backend.torch_state import plain_autograd, sizes, traced
from tnlayers.execution.executor import LayerExecutor, static_sizes
from tnlayers.ops.contraction import order
from tnlayers.planning import lookup
from tnlayers.planning.lookup_plan import LookupPlan
from tnlayers.planning.setting import STRATEGIES, Setting
from tnlayers.planning.tuned import Choice
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork


class LookupExecutor(LayerExecutor):
    """The plans of one table. ``contraction`` gives its rows: the inputs' axes come first.

    Args:
        network: the table's network; its input axes are the factors of the vocabulary.
        geometry: the linear map of one-hot rows.
        strategy, memory: see ``tnlayers.planning.lookup.candidates``.
    """

    def __init__(self, network: TensorNetwork, geometry: Geometry, strategy: str, memory: str) -> None:
        super().__init__(network, geometry, strategy, memory)
        self.contraction = order(network.cores, network.inputs + network.outputs, tuple(network.sizes.items()))

    def candidates(self, setting: Setting) -> Iterator[Any]:
        """Return the plans for a setting, in the order of ``tnlayers.planning.lookup.candidates``."""
        return lookup.candidates(self.network, self.geometry, setting, self.strategy, self.memory)

    def plan(self, setting: Setting, output_padding: tuple[int, ...] | None = None, strategy: str | None = None) -> Any:
        """Return the plan for a setting. The strategy defaults to the table's."""
        return lookup.plan(self.network, self.geometry, setting, strategy or self.strategy, self.memory)

    def tuned(self, setting: Setting) -> Choice | None:
        """Return what ``tnlayers.autotune`` kept for a setting; None too if the strategy is not 'auto'."""
        auto = self.strategy == STRATEGIES[0]
        return lookup.tuned(self.network, self.geometry, setting, self.memory) if auto else None

    def __call__(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        bias: Tensor | None,
        training: bool,
        output_padding: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Return a row for each index; ``x`` has shape (tokens,)."""
        grad = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
        if grad and self.frozen:
            self.thaw()
        mode, kind, dtype = "train" if grad else "infer", x.device.type, cores[0].dtype
        if torch.compiler.is_compiling():
            found = getattr(self, self.prepare(mode, kind, str(dtype), static_sizes(x)))
            return self._rows(found, x, cores, grad, open_sizes=True)
        check_cores(cores)
        if torch._C._get_tracing_state() is None:
            self.network.check_shapes(core.shape for core in cores)
        if self.keeps and not grad and not training and not traced():
            mode = "cached"
        count = int(sizes(x)[0])
        key = count, mode, kind, dtype
        found = self._plans.pop(key, None)  # reinserted below as the latest; threads may share an executor
        if found is None:
            found = self._new(Setting(max(1, count), (), mode=mode, device=kind, dtype=dtype))
        self._plans[key] = found
        if mode == "cached":
            cached: Tensor = found.rows(x, self._kept(found, cores, None), open_sizes=count == 0)
            return cached
        return self._rows(found, x, cores, grad, open_sizes=count == 0 or traced())

    def _rows(self, found: LookupPlan, x: Tensor, cores: Sequence[Tensor], grad: bool, open_sizes: bool) -> Tensor:
        def rows(x: Tensor, *cores: Tensor) -> Tensor:
            return found.rows(x, found.matrices(cores), open_sizes)

        if grad and self.memory == "low" and (plain_autograd() or torch.compiler.is_compiling()):
            # Only the indices are saved; the backward runs the lookup again.
            return checkpoint(rows, x, *cores, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return rows(x, *cores)

    def _prepared(self, found: Any, cores: Sequence[Tensor], lasting: bool = False) -> list[Tensor]:
        """Return what a plan gathers from."""
        return found.matrices(cores)  # type: ignore[no-any-return]
