"""What a plan is made for."""

from dataclasses import dataclass

import torch

from tnlayers.backend.views import FIRST, LAST


@dataclass(frozen=True)
class Setting:
    """What a plan is made for.

    Attributes:
        batch, size: of the input: number of images, positions along each spatial axis.
        layout: where its channels lie in memory, 'first' or 'last'; without positions, they are last.
        mode: 'train', 'infer' or 'cached', see ``tnlayers.backend.rates``.
        device: kind of device, as ``torch.device.type``.
        dtype: what is computed in.
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
