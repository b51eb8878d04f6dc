"""Setting that a plan is made for."""

from dataclasses import dataclass

import torch

from tnlayers.backend.views import FIRST, LAST


@dataclass(frozen=True)
class Setting:
    """Setting that a plan is made for.

    Attributes:
        batch, size: number of images in the input, positions along each spatial axis.
        layout: memory layout of its channels, 'first' or 'last'; 'last' without spatial axes.
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
        if not self.size:
            object.__setattr__(self, "layout", LAST)


STRATEGIES = ("auto", "reconstruct", "factorized")

MEMORY = ("auto", "low")
