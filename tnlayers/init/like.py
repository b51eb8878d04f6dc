"""Initialisation like a given weight: ``init="like"``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tnlayers.init.variance import Init

LIKE = "like"
"""As ``init`` of a layer that replaces another: the kernel has the other's root mean square."""


def like(weight: Tensor, name: str) -> Init:
    """Return the initialisation that draws kernels of a weight's size.

    Args:
        weight: the weight. The root mean square of its entries becomes the standard deviation of the kernel's, so that
            both have the same norm. The mean of a weight as torch and transformers draw it is nearly zero.
        name: name of the layer in messages.

    Raises:
        ValueError: the weight is on the meta device, is zero, or holds NaN or infinity.

    Example:
        >>> round(like(torch.tensor([[3.0, -4.0]]), "linear").std, 6)
        3.535534
    """
    if weight.is_meta:
        raise ValueError(f"init is {LIKE!r}, but {name} is on the meta device and has no values; name another init")
    values = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    # Scaled, because squares of small or large entries leave float32's range.
    largest = float(values.abs().max())
    std = largest * float((values / (largest or 1.0)).square().mean().sqrt())
    if not 0 < std < float("inf"):
        why = "is zero" if std == 0 else "holds NaN or infinity"
        raise ValueError(f"init is {LIKE!r}, but the weight of {name} {why} and has no size to keep; name another init")
    return Init(std=std)


def resolved(arguments: Mapping[str, Any], dense: Any, name: str) -> dict[str, Any]:
    """Return a layer's keyword arguments with an ``init`` of 'like' replaced by ``like`` of a plain layer's weight.

    The row of an embedding's ``padding_idx`` does not count.

    Example:
        >>> linear = torch.nn.Linear(2, 2)
        >>> resolved({"init": "fan_in"}, linear, "linear")
        {'init': 'fan_in'}
        >>> torch.nn.init.ones_(linear.weight)[0, 0].item(), resolved({"init": "like"}, linear, "linear")["init"].std
        (1.0, 1.0)
    """
    found = arguments.get("init")
    if not (isinstance(found, str) and found == LIKE):
        return dict(arguments)
    weight, padding = dense.weight.detach(), getattr(dense, "padding_idx", None)
    if padding is not None and len(weight) > 1:
        weight = torch.cat([weight[:padding], weight[padding + 1 :]])
    return {**arguments, "init": like(weight, name)}
