"""Forward of recurrent layers: torch's fused kernels on contracted weights, or time steps through the cores.

Both work on any mixture of tensor layers and ``nn.Linear`` as the weights. The steps work on packed sequences; a padded
batch is one in which all sequences have the same length.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers.backend.rate_tables import rates_of
from tnlayers.backend.rates import MOVE
from tnlayers.execution.module import ExecutableModule
from tnlayers.planning.choose import plan
from tnlayers.planning.plan import Plan
from tnlayers.planning.setting import STRATEGIES, Setting
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.recurrence import Recurrence, Weight

_POINTWISE: Mapping[str, int] = {"LSTM": 11, "GRU": 9, "RNN": 2}
"""Number of elementwise operations in a time step."""

States = tuple[Tensor, ...]


def fused(
    recurrence: Recurrence, x: Tensor, sizes: Tensor | None, states: States, weights: Sequence[Tensor], training: bool
) -> tuple[Tensor, States]:
    """Run torch's kernel.

    Args:
        recurrence: the layer's arguments.
        x: shape ``(length, batch, input_size)`` or as ``batch_first`` says; packed data if ``sizes`` is given.
        sizes: batch sizes of packed data, or None.
        states: h, and c of an LSTM.
        weights: weights and biases in torch's order, see ``parameters``.
        training: whether dropout is active.

    Returns:
        tuple[Tensor, States]: the output in the form of ``x``, and the last states.
    """
    r, given = recurrence, list(states) if len(states) > 1 else states[0]
    kernel: Any = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": torch.rnn_tanh}[r.cell]
    if r.cell == "RNN" and r.nonlinearity == "relu":
        kernel = torch.rnn_relu
    weights = _in_one_buffer(weights) if x.is_cuda else weights
    options: list[Any] = [list(weights), r.bias, r.num_layers, r.dropout, training, r.bidirectional]
    found = kernel(x, given, *options, r.batch_first) if sizes is None else kernel(x, sizes, given, *options)
    return found[0], tuple(found[1:])


def parameters(recurrence: Recurrence, matrices: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> list[Tensor]:
    """Return weights and biases in the order of torch's kernels: of a direction w_ih, w_hh, b_ih, b_hh, w_hr."""
    found = []
    for layer, reverse in recurrence.stack():
        own = [weight.name for weight in recurrence.direction(layer, reverse)]
        found += [matrices[name] for name in own[:2]]
        found += [biases[f"bias_{name}"] for name in own[:2]] if recurrence.bias else []
        found += [matrices[name] for name in own[2:]]
    return found


def _in_one_buffer(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return copies in one buffer, matrices before vectors. cuDNN would copy them too, and warn at each call."""
    order = sorted(range(len(weights)), key=lambda k: weights[k].ndim == 1)
    flat = torch.split(torch.cat([weights[k].reshape(-1) for k in order]), [weights[k].numel() for k in order])
    found = dict(zip(order, flat, strict=True))
    return [found[k].view(weight.shape) for k, weight in enumerate(weights)]


class Calls(NamedTuple):
    """Sizes of a forward, and where it runs: what the choice of its way depends on.

    Attributes:
        length: number of time steps.
        batch: number of sequences, on average over the steps.
        total: number of vectors in all sequences.
        mode, device, dtype: as in ``Setting``.
    """

    length: int
    batch: int
    total: int
    mode: str
    device: str
    dtype: torch.dtype

    def of(self, weight: Weight) -> tuple[int, Setting]:
        """Return how often a weight is applied, and the setting of each time."""
        often, batch = (1, self.total) if weight.kind == "ih" else (self.length, self.batch)
        return often, Setting(max(1, batch), (), mode=self.mode, device=self.device, dtype=self.dtype)


class Way(NamedTuple):
    """One way to run a weight: its plan, and how often a call applies it after one contraction of its cores."""

    weight: Weight
    plan: Plan
    often: int

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward, without biases and elementwise operations."""
        contraction = 0 if self.plan.setting.mode == "cached" else self.plan.weight_flops
        return contraction + self.often * sum(cost.flops for cost in self.plan.costs)

    @property
    def parts(self) -> tuple[float, float]:
        """Estimated seconds of the contraction, and of all steps."""
        steps = sum(cost.seconds for cost in self.plan.costs)
        return self.plan.seconds - steps, self.often * steps


def ways(
    recurrence: Recurrence, parts: Mapping[str, nn.Module], calls: Calls
) -> tuple[bool, tuple[list[Way], float], tuple[list[Way], float]]:
    """Return whether steps are taken, then the ways of the weights and the seconds, fused and in steps.

    The fused kernel is taken in doubt. Its elementwise operations are not counted, and not its products with weights on
    devices other than the CPU, where it runs many steps in one launch.
    """
    rates = rates_of(calls.device, str(calls.dtype).removeprefix("torch."))
    dense, steps = [], []
    for weight in recurrence.weights():
        often, setting = calls.of(weight)
        dense.append(Way(weight, _plan(weight, parts[weight.name], setting, "reconstruct"), often))
        steps.append(_fastest(weight, parts[weight.name], setting, often))
    kernel = sum(way.parts[0] + (way.parts[1] if calls.device == "cpu" else 0) for way in dense)
    size = 2 * calls.batch * recurrence.hidden_size * calls.dtype.itemsize
    each = rates.of(calls.mode)[MOVE].seconds(0, size) * _POINTWISE[recurrence.cell]
    walk = sum(sum(way.parts) for way in steps) + each * calls.length * sum(1 for _ in recurrence.stack())
    wanted = {part.strategy for part in parts.values() if isinstance(part, ExecutableModule)}
    forced = not wanted <= {*STRATEGIES[:2]}
    chosen = forced or (wanted != {STRATEGIES[1]} and walk * (1 + rates.doubt) < kernel)
    return chosen, (dense, kernel), (steps, walk)


def _fastest(weight: Weight, part: nn.Module, setting: Setting, often: int) -> Way:
    """Return the way of a weight in steps: by the strategy of its layer, with 'auto' the faster of two plans."""
    own = part.strategy if isinstance(part, ExecutableModule) else "auto"
    named = ("auto", "factorized") if own == "auto" and isinstance(part, ExecutableModule) else (own,)
    found = [Way(weight, _plan(weight, part, setting, each), often) for each in named]
    return min(found, key=lambda way: sum(way.parts))


def _plan(weight: Weight, part: nn.Module, setting: Setting, strategy: str) -> Plan:
    if isinstance(part, ExecutableModule):
        return part._executor.plan(setting, strategy=strategy)
    network = TensorNetwork.parse(f"o:{weight.outputs} i:{weight.inputs}")
    return plan(network, Geometry(weight.inputs, weight.outputs, ()), setting)


Map = Callable[[Tensor, Tensor | None], Tensor]


def _map(part: nn.Module, way: Way, training: bool) -> Map:
    """Return a weight as a function of input and bias, for many calls."""
    if isinstance(part, ExecutableModule):
        return part._executor.repeated(way.plan, part._thinned(part._listed()), training)
    weight: Any = part.weight
    return lambda x, bias: F.linear(x, weight, bias)


def stepwise(
    recurrence: Recurrence,
    x: Tensor,
    sizes: Sequence[int],
    states: States,
    parts: Mapping[str, nn.Module],
    biases: Mapping[str, Tensor],
    chosen: Sequence[Way],
    training: bool,
) -> tuple[Tensor, States]:
    """Run all layers time step by time step.

    Args:
        recurrence: the layer's arguments.
        x: packed data: all vectors of the first step, then of the second, and so on.
        sizes: number of sequences in each step; it does not grow.
        states: h, and c of an LSTM.
        parts: tensor layers or ``nn.Linear`` without bias, by the weights' names.
        biases: by torch's names.
        chosen: the way of each weight.
        training: whether dropout is active.

    Returns:
        tuple[Tensor, States]: the output, packed, and the last states.
    """
    how = {way.weight.name: way for way in chosen}
    last: list[States] = []
    outputs: list[Tensor] = []
    for number, (layer, reverse) in enumerate(recurrence.stack()):
        if layer and not reverse:
            x, outputs = F.dropout(torch.cat(outputs, -1), recurrence.dropout, training), []
        first, hidden, *more = recurrence.direction(layer, reverse)
        b_ih, b_hh = (biases.get(f"bias_{weight.name}") for weight in (first, hidden))
        entered = parts[first.name](x)
        if b_ih is not None and b_hh is not None:
            entered = entered + (b_ih if recurrence.cell == "GRU" else b_ih + b_hh)
        matrices = [_map(parts[weight.name], how[weight.name], training) for weight in (hidden, *more)]
        cell = _cell(recurrence, matrices, b_hh)
        output, final = _scan(cell, entered.split(list(sizes)), tuple(s[number] for s in states), reverse)
        outputs.append(output)
        last.append(final)
    return torch.cat(outputs, -1), tuple(torch.stack(each) for each in zip(*last, strict=True))


def _cell(recurrence: Recurrence, matrices: Sequence[Map], bias: Tensor | None) -> Callable[[Tensor, States], States]:
    """Return one time step: from what enters the gates and the states before, the states after."""
    hidden, *project = matrices

    def lstm(entered: Tensor, states: States) -> States:
        i, f, g, o = (entered + hidden(states[0], None)).chunk(4, 1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (project[0](h, None) if project else h), c

    def gru(entered: Tensor, states: States) -> States:
        r, z, n = entered.chunk(3, 1)
        from_r, from_z, from_n = hidden(states[0], bias).chunk(3, 1)
        new = (n + (r + from_r).sigmoid() * from_n).tanh()
        return (new + (z + from_z).sigmoid() * (states[0] - new),)

    def rnn(entered: Tensor, states: States) -> States:
        both = entered + hidden(states[0], None)
        return (both.tanh() if recurrence.nonlinearity == "tanh" else both.relu(),)

    return {"LSTM": lstm, "GRU": gru, "RNN": rnn}[recurrence.cell]


def _scan(
    cell: Callable[[Tensor, States], States], steps: Sequence[Tensor], start: States, reverse: bool
) -> tuple[Tensor, States]:
    """Run a cell over the steps, forward or from the last. A sequence has its first state until its first step."""
    outputs: list[Tensor] = []
    ended: list[States] = []
    now = tuple(state[: len(steps[-1])] for state in start) if reverse else start
    for step in reversed(steps) if reverse else steps:
        live, have = len(step), len(now[0])
        if live < have:
            ended.append(tuple(state[live:] for state in now))
            now = tuple(state[:live] for state in now)
        elif live > have:
            now = tuple(torch.cat([state, first[have:live]]) for state, first in zip(now, start, strict=True))
        now = cell(step, now)
        outputs.append(now[0])
    final = tuple(torch.cat(each) for each in zip(now, *reversed(ended), strict=True))
    return torch.cat(outputs[::-1] if reverse else outputs), final


def lengths(sizes: Tensor | None, x: Tensor) -> Iterator[int]:
    """Yield the number of sequences of each step: of packed data, or of a padded batch with the time axis first."""
    yield from [x.shape[1]] * x.shape[0] if sizes is None else sizes.tolist()
