"""What goes into a model's layers: shapes, and second moments over channels, seen by hooks while it runs."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.geometry import Geometry
from tnlayers.layer import TensorLayer
from tnlayers.planner import Planner


@dataclass
class Observation:
    """What one layer was given.

    Attributes:
        shapes: of its inputs, one for each call.
        moments: the sum over batch and positions of x x^T over the channels of one group, summed over groups; None
            where they were not asked for.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    moments: Tensor | None = None


def run(model: nn.Module, example: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments, or a mapping of named ones.

    Example:
        >>> run(nn.ReLU(), {"input": torch.tensor(-1.0)})
        tensor(0.)
    """
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def observe(
    model: nn.Module, layers: Mapping[nn.Module, Geometry], examples: Iterable[Any], *, moments: bool = False
) -> dict[nn.Module, Observation]:
    """Run a model in eval mode without gradients, and note what its layers get.

    Training flags, parameters and torch's random state on the CPU stay as they were; what the model's own forward
    changes (counters, lazy layers, an input in place) it changes here too.

    Args:
        model: any module.
        layers: those to watch, and their geometry.
        examples: for each run, what ``run`` takes.
        moments: also sum second moments.

    Returns:
        dict[nn.Module, Observation]: without the layers that were never called.

    Raises:
        TypeError, ValueError: what the model raises.
    """
    found: dict[nn.Module, Observation] = {}

    def listen(layer: nn.Module, geometry: Geometry) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = arguments[0] if arguments else named.get("input")
            if not isinstance(x, Tensor):  # a subclass with arguments of its own
                return
            x = x.detach()
            seen = found.setdefault(layer, Observation())
            seen.shapes.append(tuple(x.shape))
            if moments:
                new = _moments(x, geometry)
                seen.moments = new if seen.moments is None else seen.moments + new

        return hook

    # Behind the hooks that are there, which may change the input: what the layer itself gets is noted.
    handles = [
        layer.register_forward_pre_hook(listen(layer, geometry), with_kwargs=True) for layer, geometry in layers.items()
    ]
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for example in examples:
                run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def dense_flops(geometry: Geometry, shapes: Sequence[tuple[int, ...]]) -> int:
    """Floating-point operations of the plain layer on inputs of these shapes, two for each multiply-add, without bias.

    Example:
        >>> dense_flops(Geometry(16, 32, (3, 3), padding=1), [(1, 16, 8, 8)])
        589824
    """
    total, ndim, entries = 0, geometry.ndim, math.prod(geometry.weight_shape)
    for shape in shapes:
        spatial = shape[len(shape) - ndim :] if ndim else shape[:-1]
        # Each entry of a kernel meets every output position; of a transposed one, every input position.
        positions = geometry.output_size(spatial) if ndim and not geometry.transposed else spatial
        batch = shape[0] if ndim and len(shape) == ndim + 2 else 1
        total += 2 * entries * batch * math.prod(positions)
    return total


def fewest_flops(layer: TensorLayer, shapes: Sequence[tuple[int, ...]]) -> int:
    """As ``dense_flops``, of a tensor layer: of its own plan, or that of strategy 'factorized' if that has fewer."""
    planners = [layer._planner]
    with suppress(ValueError):  # of groups that cut through a factor
        planners.append(Planner(layer.network, layer.geometry, "factorized", layer.memory))
    settings = map(layer._setting, shapes)
    return sum(min(planner.plan(setting).flops for planner in planners) for setting in settings)


def _moments(x: Tensor, geometry: Geometry) -> Tensor:
    axis = x.ndim - 1 - geometry.ndim
    channels = geometry.in_channels // geometry.groups
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(axis, -1).reshape(-1, channels)
    return (rows.T @ rows).to("cpu", torch.float64)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and after it as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:  # what a module does in train() beside, it does there and back
            if module.training != training:
                module.train(training)
