"""Setting that a plan is made for."""

from dataclasses import dataclass

import torch

from tnlayers.backend.views import FIRST, LAST
from tnlayers.spec.geometry import Geometry

INDEX = "index"
"""Layout of the input of a lookup: indices in place of one-hot channels."""


@dataclass(frozen=True)
class Setting:
    """Setting that a plan is made for.

    Attributes:
        batch, size: number of images in the input, positions along each spatial axis.
        layout: memory layout of its channels, 'first' or 'last'; without spatial axes 'last', or 'index' in lookups.
        mode: 'train', 'infer' or 'cached', see ``tnlayers.backend.rates``.
        device: device type, as ``torch.device.type``.
        dtype: dtype of the computation.
    """

    batch: int
    size: tuple[int, ...]
    layout: str = FIRST
    mode: str = "train"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not self.size and self.layout == FIRST:
            object.__setattr__(self, "layout", LAST)


TYPICAL = 32
"""Batch size, and least size of each spatial axis, of an input that is not known."""


def typical(geometry: Geometry) -> tuple[int, tuple[int, ...]]:
    """Return the batch and spatial size of an input that is not known. The kernel fits into it.

    Example:
        >>> typical(Geometry(16, 32, (3, 40)))
        (32, (32, 40))
    """
    return TYPICAL, tuple(max(TYPICAL, span) for span in geometry.spans)


STRATEGIES = ("auto", "reconstruct", "factorized")

MEMORY = ("auto", "low")
