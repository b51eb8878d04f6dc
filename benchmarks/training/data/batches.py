"""Choice of the images in each batch. All randomness depends only on the run's seed, epoch and step."""

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
    """Return a random generator for a key of numbers: seed, epoch, step...

    Randomness depends on the current position in the run, not on earlier draws. So a run can continue from any step,
    with any number of processes.
    """
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


@dataclass(frozen=True)
class Part:
    """One process' part of every batch.

    Attributes:
        rank: index of the process.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    def of(self, items: Tensor) -> Tensor:
        """Return every ``world``-th item."""
        return items[self.rank :: self.world]


class Batches(NamedTuple):
    """The training batches of an epoch.

    Attributes:
        size: images per batch, over all processes.
        start, stop: first step, and last step + 1.
        seed: seed of the run.
        epoch: number of the epoch, from 1.
        augment: whether to augment the images.
        part: this process' part.
        pad: what fills the border of shifted images in memory: zero or reflect.
    """

    size: int
    start: int
    stop: int
    seed: int
    epoch: int
    augment: bool
    part: Part
    pad: str = "zero"


def hold_out(labels: Sequence[int] | NDArray[np.int64], fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the items that stay, and of a held-out share of each class.

    Raises:
        DataError: a class has too few items.
    """
    try:
        train, held_out = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise DataError(f"split is validation, but the training images cannot be split: {error}") from error
    return train, held_out
