"""Tensors sharded over several processes."""

from typing import Any

from torch import Tensor


def place(value: Tensor, target: Any) -> Tensor:
    """Return a value sharded as its target, with all shards from the first process's value."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415  (only if it is in use anyway)

    return distribute_tensor(value.to(target.dtype), mesh, target.placements)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered from its shards if it has any."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
