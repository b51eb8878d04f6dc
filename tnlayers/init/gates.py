"""Rows of a weight in equal parts, the gates of a recurrent layer, each with the same norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tnlayers.init.draw import LARGEST
from tnlayers.ops.squared_norm import fastest, squared
from tnlayers.spec.network import TensorNetwork


@torch.no_grad()
def equal_gates(network: TensorNetwork, cores: Sequence[Tensor], gates: int, std: float) -> list[Tensor]:
    """Return cores whose kernel has, in each of its gates, the root mean square ``std``.

    One core with the most significant output axis is scaled, gate by gate. The dense kernel is not built: each gate's
    norm is contracted from the cores. If that takes tensors far larger than the kernel, the cores stay as they are.

    Args:
        network: its most significant output axis is divisible by ``gates``.
        cores: of the network, in any floating-point dtype.
        gates: number of equal parts of the rows.
        std: root mean square of each part's entries.

    Example:
        >>> network = TensorNetwork.parse("i:5 r:2, o:6 r")
        >>> cores = equal_gates(network, [torch.randn(5, 2), torch.randn(6, 2)], 3, 0.5)
        >>> [round(float(part.square().mean()), 4) for part in (cores[1] @ cores[0].T).chunk(3)]
        [0.25, 0.25, 0.25]
    """
    axis = network.outputs[0]
    size = network.sizes[axis] // gates
    part = TensorNetwork(network.cores, {**network.sizes, axis: size})
    fine = torch.float32 if cores[0].device.type == "mps" else torch.float64
    found = [core.to(fine) for core in cores]
    most = max(LARGEST, part.dense_params)
    if fastest(part, found[0].device.type, str(fine).removeprefix("torch.")).largest > most:
        return found
    factors = []
    for gate in range(gates):
        rows = [
            core.narrow(axes.index(axis), gate * size, size) if axis in axes else core
            for core, axes in zip(found, network.cores, strict=True)
        ]
        mean = float(squared(part, rows)) / part.dense_params
        factors.append(std / mean**0.5 if mean > 0 else 1.0)
    first = next(k for k, axes in enumerate(network.cores) if axis in axes)
    scale = torch.tensor(factors, dtype=fine, device=found[first].device).repeat_interleave(size)
    dims = [-1 if each == axis else 1 for each in network.cores[first]]
    found[first] = found[first] * scale.reshape(dims)
    return found
