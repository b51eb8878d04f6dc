"""FLOPs of dense layers and tensor layers for given input shapes."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from tnlayers.execution.executor import LayerExecutor
from tnlayers.layers.base import TensorLayer
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork


def dense_flops(geometry: Geometry, shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the plain layer's FLOPs on inputs of these shapes: two per multiply-add, without bias.

    Example:
        >>> dense_flops(Geometry(16, 32, (3, 3), padding=1), [(1, 16, 8, 8)])
        589824
    """
    total, ndim, entries = 0, geometry.ndim, math.prod(geometry.weight_shape)
    for shape in shapes:
        spatial = shape[len(shape) - ndim :] if ndim else shape[:-1]
        # Each kernel entry multiplies every output position; in a transposed convolution, every input position.
        positions = geometry.output_size(spatial) if ndim and not geometry.transposed else spatial
        batch = shape[0] if ndim and len(shape) == ndim + 2 else 1
        total += 2 * entries * batch * math.prod(positions)
    return total


def fewest_flops(
    layer: TensorLayer, shapes: Sequence[tuple[int, ...]], device: str, network: TensorNetwork | None = None
) -> int:
    """Return a tensor layer's FLOPs: those of its own plan or of a 'factorized' one, whichever has fewer.

    Plans are made for the kind of device given, since the layer may still be on the meta device. With ``network``, they
    are those of a layer that differs in its network alone.
    """
    executors = [layer._executor]
    if network is not None:
        executors = [layer.executor_type(network, layer.geometry, layer.strategy, layer.memory)]
    with suppress(ValueError):  # groups may cut through a factor
        executors.append(LayerExecutor(executors[0].network, layer.geometry, "factorized", layer.memory))
    settings = [replace(layer._setting(shape), device=device) for shape in shapes]
    return sum(min(executor.plan(setting).flops for executor in executors) for setting in settings)
