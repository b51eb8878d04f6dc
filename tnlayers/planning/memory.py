"""Estimate of a training step's memory."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tnlayers.planning.options import Pricing
from tnlayers.planning.path import Path


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory of a training step.

    Attributes:
        weights: bytes of the cores, their gradients and the results of their contractions.
        tensors: bytes of the input and of the result of each input step; the last is the output.
        copies: bytes of the reordered input of each input step, and of its gradient, 0 if it is not reordered; and of
            the copies of the input for every tap that torch makes.
    """

    weights: int
    tensors: tuple[int, ...]
    copies: tuple[int, ...]

    @classmethod
    def of(cls, pricing: Pricing, path: Path) -> "MemoryEstimate":
        """Estimate the memory of a path."""
        space, geometry, batch = pricing.space, pricing.space.geometry, pricing.setting.batch
        absorbed, between = 0, sum(pricing.contractions.between(option.cores) for option in path.options)
        built = sum(space.volume(space.weight_axes(option.cores)) for option in path.options) if between else 0
        tensors, copied = [batch * geometry.in_channels * pricing.length(0)], []
        for option in path.options:
            copied.append(pricing.copied(absorbed, option.cores, option.kind))
            absorbed |= option.cores
            tensors.append(batch * space.volume(space.x_axes(absorbed)) * pricing.length(absorbed))
        tensors[-1] = batch * geometry.out_channels * pricing.length(absorbed)
        size = pricing.setting.dtype.itemsize
        weights = size * (2 * space.params + built + between)
        steps = zip(tensors, path.options, copied, strict=False)
        copies = (2 * x * option.moved + more for x, option, more in steps)
        return cls(weights, tuple(size * entries for entries in tensors), tuple(size * entries for entries in copies))

    @property
    def held(self) -> int:
        """Bytes in use in any case: the weights, the input, the output and the output's gradient, held by others."""
        return self.weights + self.tensors[0] + 2 * self.tensors[-1]

    def passing(self, saved: Sequence[bool], whole: bool) -> int:
        """Return temporary bytes: recomputed results and two gradients at a time, the input's only if ``whole``."""
        x, *middle, _ = self.tensors
        gradients = [x if whole else 0, *middle, 0]
        made = sum(size for size, keep in zip(middle, saved, strict=True) if not keep)
        live = zip(itertools.pairwise(gradients), self.copies, strict=True)
        return made + max(sum(pair) + copies for pair, copies in live)

    def peak(self, saved: Sequence[bool], chunks: int) -> int:
        """Return the bytes at the peak, if some results are saved and the backward runs in chunks of the batch."""
        held = self.held + sum(size for size, keep in zip(self.tensors[1:-1], saved, strict=True) if keep)
        if chunks == 1:
            return held + self.passing(saved, whole=True)
        return held + self.tensors[0] + self.passing(saved, whole=False) // chunks

    def chunks(self, saved: Sequence[bool], limit: float, most: int) -> int:
        """Return the fewest chunks with a peak within a limit; 0 if ``most`` are too few."""
        if self.peak(saved, 1) <= limit:
            return 1
        room, passing = limit - self.peak(saved, 1 << 62), self.passing(saved, whole=False)
        if room <= 0 or passing > most * room:
            return 0
        return max(2, math.ceil(passing / room))
