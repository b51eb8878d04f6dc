"""The memory of a training step, by estimate."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tnlayers.planning.options import Pricing
from tnlayers.planning.path import Path


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training step takes, by estimate.

    Attributes:
        weights: bytes of the cores, their gradients and what they contract to.
        tensors: bytes of the input, of what each meeting makes of it, and of the output.
        copies: bytes of the reordered input of each meeting, and of its gradient; 0 where it is not reordered.
    """

    weights: int
    tensors: tuple[int, ...]
    copies: tuple[int, ...]

    @classmethod
    def of(cls, pricing: Pricing, path: Path) -> "MemoryEstimate":
        """That of a trail."""
        space, geometry, batch = pricing.space, pricing.space.geometry, pricing.setting.batch
        absorbed, between = 0, sum(pricing.contractions.between(option.cores) for option in path.options)
        built = sum(space.volume(space.weight_axes(option.cores)) for option in path.options) if between else 0
        tensors = [batch * geometry.in_channels * pricing.length(0)]
        for option in path.options:
            absorbed |= option.cores
            tensors.append(batch * space.volume(space.x_axes(absorbed)) * pricing.length(absorbed))
        tensors[-1] = batch * geometry.out_channels * pricing.length(absorbed)
        size = pricing.setting.dtype.itemsize
        weights = size * (2 * space.params + built + between)
        copies = (2 * x * option.moved for x, option in zip(tensors, path.options, strict=False))
        return cls(weights, tuple(size * entries for entries in tensors), tuple(size * entries for entries in copies))

    @property
    def held(self) -> int:
        """What is there in any case: the weights, the input, the output and the output's gradient, held by others."""
        return self.weights + self.tensors[0] + 2 * self.tensors[-1]

    def passing(self, saved: Sequence[bool], whole: bool) -> int:
        """What comes and goes: gradients of two tensors at a time, and what is made again; the input's if ``whole``."""
        x, *middle, _ = self.tensors
        gradients = [x if whole else 0, *middle, 0]
        made = sum(size for size, keep in zip(middle, saved, strict=True) if not keep)
        live = zip(itertools.pairwise(gradients), self.copies, strict=True)
        return made + max(sum(pair) + copies for pair, copies in live)

    def peak(self, saved: Sequence[bool], chunks: int) -> int:
        """Bytes at the peak, where some tensors are kept, and the backward goes through the batch in parts."""
        held = self.held + sum(size for size, keep in zip(self.tensors[1:-1], saved, strict=True) if keep)
        if chunks == 1:
            return held + self.passing(saved, whole=True)
        return held + self.tensors[0] + self.passing(saved, whole=False) // chunks

    def chunks(self, saved: Sequence[bool], limit: float, most: int) -> int:
        """The fewest parts with which the peak is within a limit; 0 if there are none."""
        if self.peak(saved, 1) <= limit:
            return 1
        room, passing = limit - self.peak(saved, 1 << 62), self.passing(saved, whole=False)
        if room <= 0 or passing > most * room:
            return 0
        return max(2, math.ceil(passing / room))
