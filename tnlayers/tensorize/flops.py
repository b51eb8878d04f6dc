"""FLOPs of dense layers and of tensor layers for inputs of given shapes."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from tnlayers.execution.executor import LayerExecutor
from tnlayers.layers.base import TensorLayer
from tnlayers.spec.geometry import Geometry


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


def fewest_flops(layer: TensorLayer, shapes: Sequence[tuple[int, ...]], device: str) -> int:
    """As ``dense_flops``, of a tensor layer: of its own plan, or that of strategy 'factorized' if that has fewer.

    Plans are for the kind of device that the layer is to be on; it may be on the meta device yet.
    """
    planners = [layer._executor]
    with suppress(ValueError):  # of groups that cut through a factor
        planners.append(LayerExecutor(layer.network, layer.geometry, "factorized", layer.memory))
    settings = [replace(layer._setting(shape), device=device) for shape in shapes]
    return sum(min(executor.plan(setting).flops for executor in planners) for setting in settings)
