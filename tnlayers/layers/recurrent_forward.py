"""Forward of a recurrent layer: checks of input and states, and the choice between torch's kernel and steps."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from tnlayers import validate
from tnlayers.backend.input_checks import check_dtypes, check_tensor
from tnlayers.backend.rate_tables import table_of
from tnlayers.backend.torch_state import autocast_dtype, constant_to_compilers, traced
from tnlayers.execution.recurrence import Calls, States, Way, fused, lengths, parameters, stepwise, ways
from tnlayers.layers.base import TensorLayer
from tnlayers.planning.setting import MEMORY, STRATEGIES
from tnlayers.spec.recurrence import Recurrence
from tnlayers.text_tables import Shown, page, text

_KEPT = 256
"""Maximum number of cached choices per layer."""


class RunsRecurrence(nn.Module):
    """A module with weights by torch's names without "weight_", each a tensor layer or ``nn.Linear``, and biases."""

    untuned: ClassVar[str] = "a recurrent layer, which chooses between torch's kernel and time steps by estimate"
    """Why ``autotune`` leaves it out."""
    recurrence: Recurrence
    _ways: "OrderedDict[Calls, tuple[Way, ...] | None]"
    """Cached choices, for the executors and plain layers in ``_planned``."""
    _planned: tuple[object, ...]

    def __init__(self) -> None:
        super().__init__()
        self._ways, self._planned = OrderedDict(), ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ways": OrderedDict(), "_planned": ()}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The layers that hold the weights, by name."""
        modules: Any = self._modules
        return {weight.name: modules[weight.name] for weight in self.recurrence.weights()}

    def _tensor_parts(self) -> Iterator[TensorLayer]:
        return (part for part in self.parts.values() if isinstance(part, TensorLayer))

    def _common(self, name: str) -> str:
        found = {getattr(part, name): None for part in self._tensor_parts()}
        return next(iter(found), "auto") if len(found) < 2 else "mixed"

    @property
    def strategy(self) -> str:
        """'auto', 'reconstruct' or 'factorized'; 'mixed' if the weights' layers differ. Setting it sets all of them.

        'reconstruct' runs torch's fused kernel on contracted weights; any layer with another strategy makes the forward
        go in time steps, each weight by its own plan; with 'auto' everywhere the faster by estimate is taken. Traced
        and exported forwards always run the fused kernel.
        """
        return self._common("strategy")

    @strategy.setter
    def strategy(self, strategy: str) -> None:
        self._set("strategy", strategy, STRATEGIES)

    @property
    def memory(self) -> str:
        """'auto' or 'low', which saves only input and states for the backward; 'mixed' if the weights differ."""
        return self._common("memory")

    @memory.setter
    def memory(self, memory: str) -> None:
        self._set("memory", memory, MEMORY)

    def _set(self, name: str, value: str, accepted: Sequence[str]) -> None:
        parts = [*self._tensor_parts()]
        if validate.choice(name, value, accepted) != accepted[0] and not parts:
            raise ValueError(f"{name} is {value!r}, but all weights are plain; it must be {accepted[0]!r}")
        for part in parts:
            setattr(part, name, value)

    def _biases(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.recurrence.biases()}

    def _used(self) -> Iterator[Tensor]:
        """Yield cores, plain weights and biases. In a replica of DataParallel they are no parameters."""
        for part in self.parts.values():
            yield from part._listed() if isinstance(part, TensorLayer) else (part.weight,)  # type: ignore[misc]
        yield from self._biases().values()

    def _like(self) -> Tensor:
        """Return a parameter whose dtype and device are the layer's."""
        part = next(iter(self.parts.values()))
        return part.cores[0] if isinstance(part, TensorLayer) else part.weight  # type: ignore[return-value]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Apply the layer.

        Args:
            input: shape ``(length, batch, input_size)``, ``(batch, length, input_size)`` with ``batch_first``,
                ``(length, input_size)``, or a ``PackedSequence``.
            hx: the initial state, for an LSTM the pair (h, c), each of shape ``(num_layers * directions, batch, size)``
                or without batch; None: zeros.

        Returns:
            Any: the output in the form of ``input``, and the last state in the form of ``hx``.

        Raises:
            RuntimeError, ValueError: a shape or dtype is wrong; the types are those of torch's layers.
        """
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return getattr(self, _outside_of_graphs())(input, hx)
        return self._forward(input, hx)

    def _forward(self, input: Any, hx: Any) -> Any:
        r, packed = self.recurrence, isinstance(input, PackedSequence)
        x: Any
        sizes: Any
        y: Any
        x, sizes, order, back = input if packed else (input, None, None, None)
        check_tensor(type(self).__name__, x)
        batched = packed or x.dim() == 3
        self._check(x, packed)
        x = x if batched else x.unsqueeze(0 if r.batch_first else 1)
        batch = int(sizes[0]) if packed else x.shape[0 if r.batch_first else 1]
        states = self._states(hx, batch, batched, x)
        states = states if order is None else tuple(state.index_select(1, order) for state in states)
        y, states = self._compute(x, sizes, states)
        states = states if back is None else tuple(state.index_select(1, back) for state in states)
        if packed:
            y = PackedSequence(y, sizes, order, back)
        elif not batched:
            y, states = y.squeeze(0 if r.batch_first else 1), tuple(state.squeeze(1) for state in states)
        return y, states if len(states) > 1 else states[0]

    def _check(self, x: Tensor, packed: bool) -> None:
        name, size, like = type(self).__name__, self.recurrence.input_size, self._like()
        if packed and x.dim() != 2:
            raise RuntimeError(f"input is packed with data of shape {tuple(x.shape)}; {name} takes (total, {size})")
        if x.dim() not in (2, 3):
            raise ValueError(
                f"input has shape {tuple(x.shape)}; {name} takes (length, batch, {size}), with batch_first "
                f"(batch, length, {size}), or (length, {size}) unbatched"
            )
        if x.shape[-1] != size:
            raise RuntimeError(f"input has shape {tuple(x.shape)}, so {x.shape[-1]} features; input_size is {size}")
        if x.dtype != like.dtype and autocast_dtype(x.device.type) is None:
            try:
                check_dtypes(x, like.dtype, None)
            except RuntimeError as error:
                raise ValueError(str(error)) from None
        if x.shape[1 if x.dim() == 3 and self.recurrence.batch_first else 0] == 0:
            raise RuntimeError(f"input has shape {tuple(x.shape)}; {name} takes at least one time step")

    def _states(self, hx: Any, batch: int, batched: bool, x: Tensor) -> States:
        """Return the initial states with a batch axis."""
        r = self.recurrence
        shapes = [(r.num_layers * r.directions, batch, size) for size in r.state_sizes]
        if hx is None:
            return tuple(x.new_zeros(shape) for shape in shapes)
        given = (hx,) if len(shapes) == 1 else hx
        if not isinstance(given, tuple | list) or len(given) != len(shapes) or not all(map(torch.is_tensor, given)):
            wanted = "a tensor" if len(shapes) == 1 else "a pair of tensors, (h, c)"
            raise TypeError(f"hx is of type {type(hx).__name__}; {type(self).__name__} takes {wanted}, or None")
        for k, (state, shape) in enumerate(zip(given, shapes, strict=True)):
            name = "hx" if len(shapes) == 1 else f"hx[{k}]"
            wanted_shape = shape if batched else (shape[0], shape[2])
            if tuple(state.shape) != wanted_shape:
                raise RuntimeError(f"{name} has shape {tuple(state.shape)}; it must be {wanted_shape}")
            # torch's kernels take c in another dtype.
            if k == 0 and state.dtype != x.dtype and autocast_dtype(x.device.type) is None:
                raise RuntimeError(f"{name} has dtype {state.dtype}, but the input has {x.dtype}; they must be equal")
        return tuple(given) if batched else tuple(state.unsqueeze(1) for state in given)

    def _compute(self, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Compute output and last states of checked tensors."""
        if self.memory != "low" or not torch.is_grad_enabled() or traced():
            return self._run(x, sizes, states)
        found: tuple[Tensor, States] = checkpoint(self._run, x, sizes, states, use_reentrant=False)
        return found

    def _run(self, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        r, parts, biases = self.recurrence, self.parts, self._biases()
        time_first = x.transpose(0, 1) if r.batch_first and sizes is None else x
        chosen = self._chosen(time_first, sizes, states)
        if chosen is None:
            matrices = {name: _matrix(part, self.training) for name, part in parts.items()}
            return fused(r, x, sizes, states, parameters(r, matrices, biases), self.training)
        steps = list(lengths(sizes, time_first))
        data = time_first if sizes is not None else time_first.reshape(-1, r.input_size)
        y, states = stepwise(r, data, steps, states, parts, biases, chosen, self.training)
        if sizes is None:
            y = y.reshape(*time_first.shape[:2], y.shape[-1])
            y = y.transpose(0, 1) if r.batch_first else y
        return y, states

    def _chosen(self, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Way, ...] | None:
        """Return the weights' ways in time steps; None for the fused kernel."""
        if torch.compiler.is_compiling() or traced():
            return None  # a trace would hold each step
        wanted = tuple(part.strategy for part in self._tensor_parts())
        if {*wanted} <= {"reconstruct"} or ({*wanted} == {"auto"} and autocast_dtype(x.device.type) is not None):
            return None
        length = x.shape[0] if sizes is None else len(sizes)
        total = x.shape[0] * x.shape[1] if sizes is None else len(x)
        grad = torch.is_grad_enabled() and any(each.requires_grad for each in (x, *states, *self._used()))
        calls = self._calls(int(length), int(total), grad, x)
        parts = tuple(part._executor if isinstance(part, TensorLayer) else part for part in self.parts.values())
        if parts != self._planned:  # a setting or a rank was changed, or a layer replaced
            self._planned, self._ways = parts, OrderedDict()
        if calls not in self._ways:
            stepping, _, (steps, _) = ways(self.recurrence, self.parts, calls)
            while len(self._ways) >= _KEPT:
                self._ways.popitem(last=False)
            self._ways[calls] = tuple(steps) if stepping else None
        return self._ways[calls]

    def _calls(self, length: int, total: int, grad: bool, like: Tensor) -> Calls:
        kept = any(part._executor.keeps for part in self._tensor_parts()) and not self.training
        mode = "train" if grad else "cached" if kept else "infer"
        return Calls(length, max(1, total // max(1, length)), max(1, total), mode, like.device.type, like.dtype)

    def _ways_of(self, input_shape: Sequence[int]) -> Any:
        if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
            raise TypeError(f"input_shape is {input_shape!r}; it must be a sequence of integers, the shape of an input")
        shape = [validate.integer(f"input_shape[{k}]", size) for k, size in enumerate(input_shape)]
        like = self._like()
        self._check(torch.empty(shape, device="meta", dtype=like.dtype), packed=False)
        batched = len(shape) == 3
        length = shape[1 if self.recurrence.batch_first and batched else 0]
        total = length * (shape[0 if self.recurrence.batch_first else 1] if batched else 1)
        calls = self._calls(length, total, self.training, like)
        return calls, ways(self.recurrence, self.parts, calls)

    def flops(self, input_shape: Sequence[int]) -> int:
        """Return the FLOPs of one forward on a padded input of this shape: two per multiply-add.

        Biases and elementwise operations do not count. In training mode the forward records gradients.
        """
        _, (stepping, (dense, _), (steps, _)) = self._ways_of(input_shape)
        return sum(way.flops for way in (steps if stepping else dense))

    def explain(self, input_shape: Sequence[int]) -> str:
        """Return a table of the plan for a padded input of this shape: fused or in steps, and each weight's plan.

        Args:
            input_shape: shape of an input that is no packed sequence.

        Example:
            >>> import tnlayers
            >>> layer = tnlayers.TRLSTM(16, 32, rank=2)
            >>> print(layer.explain((5, 2, 16)))  # doctest: +ELLIPSIS
            torch's fused kernel on contracted weights, input (5, 2, 16), training: ... FLOPs
            weight        class     times  order ...FLOPs
            weight_ih_l0  TRLinear      1  ...
            weight_hh_l0  TRLinear      5  ...
            in time steps: ... times the estimated time
            rates: cpu ...
        """
        calls, (stepping, (dense, kernel), (steps, walk)) = self._ways_of(input_shape)
        rows = [("weight", "class", "times", "order", "FLOPs")]
        for way in steps if stepping else dense:
            name = way.weight.name
            order = way.plan.order if isinstance(self.parts[name], TensorLayer) else "-"
            rows.append((f"weight_{name}", type(self.parts[name]).__name__, str(way.often), order, f"{way.flops:,}"))
        kinds = "torch's fused kernel on contracted weights", "in time steps"
        how = {"train": "training", "infer": "inference", "cached": "inference with cached weights"}[calls.mode]
        flops = sum(way.flops for way in (steps if stepping else dense))
        head = f"{kinds[stepping]}, input {tuple(input_shape)}, {how}: {flops:,} FLOPs"
        seconds = (walk, kernel) if stepping else (kernel, walk)
        below = [f"{kinds[not stepping]}: {seconds[1] / (seconds[0] or 1):.2f} times the estimated time"]
        below.append(f"rates: {table_of(calls.device, str(calls.dtype).removeprefix('torch.'))}")
        return Shown("\n".join([head, text(rows, (2, 4)), *below]), page(rows, head, (2, 4), below))


@constant_to_compilers
def _outside_of_graphs() -> str:
    """Return the name of a method that ``torch.compile`` runs as it is, between two graphs, as it runs ``nn.LSTM``.

    In a graph, inductor (torch 2.13) fails on torch's kernel for the CPU, and steps would take minutes to compile. The
    method is made here, since ``torch.compiler.disable`` imports the compiler.
    """
    if not hasattr(RunsRecurrence, "_eager"):
        disable: Any = torch.compiler.disable
        RunsRecurrence._eager = disable(RunsRecurrence._forward)  # type: ignore[attr-defined]
    return "_eager"


def _matrix(part: nn.Module, training: bool) -> Tensor:
    """Return a weight, from the cache of a frozen layer in inference."""
    if not isinstance(part, TensorLayer):
        return part.weight  # type: ignore[return-value]
    executor, cores = part._executor, part._listed()
    if executor.caches(cores, training):
        return executor.cached("dense", cores, lambda _: [part._kernel()])[0]
    return part._kernel(part._thinned(cores))
