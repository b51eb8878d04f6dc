"""Which images make the batches of a run: all that is random follows from where the run is."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor

from benchmarks.common.errors import DataError

SPLIT_SEED = 0  # of the digits' test images, and of every validation split


def draws(*key: int) -> torch.Generator:
    """A generator for one purpose, told by numbers: seed, epoch, step...

    What is random in a run depends on where the run is and on nothing before. So it can go on from any step, and on
    any number of processes.
    """
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


@dataclass(frozen=True)
class Part:
    """The part of every batch that is one process' own.

    Attributes:
        rank: number of the process.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def of(self, items: Tensor) -> Tensor:
        """Every ``world``-th item."""
        return items[self.rank :: self.world]


class Batches(NamedTuple):
    """What is trained on in one epoch.

    Attributes:
        size: images in a batch, of all processes together.
        start, stop: the first step, and the one after the last.
        seed: of the run.
        epoch: from 1.
        augment: change the images at random.
        part: what of it is wanted here.
    """

    size: int
    start: int
    stop: int
    seed: int
    epoch: int
    augment: bool
    part: Part


def hold_out(labels: Sequence[int] | NDArray[np.int64], fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the items that stay, and of a share that is held out, chosen class by class.

    Raises:
        DataError: a class has too few.
    """
    try:
        train, held_out = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise DataError(f"split is validation, but the training images cannot be split: {error}") from error
    return train, held_out
