"""Image data sets in memory: digits (inside scikit-learn), Fashion-MNIST and CIFAR-10 (their official files).

Images stay bytes until a batch is made of them: a whole data set fits in memory, and a shifted image leaves black.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from benchmarks.common.errors import DataError
from benchmarks.training.data.batches import SPLIT_SEED, Batches, Part, draws, hold_out
from benchmarks.training.data.official_files import NUM_CLASSES, cifar10, fashion_mnist


@dataclass(frozen=True)
class ImageData:
    """Training and test images with their labels, and what may be done to a training image.

    Attributes:
        train_images: bytes of shape (images, channels, height, width).
        train_labels: integers of shape (images,).
        test_images: as train_images.
        test_labels: as train_labels.
        shift: a training image moves by up to so many pixels, up or down and left or right.
        flip: a training image is mirrored with probability one half.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    shift: int
    flip: bool

    def to(self, device: torch.device) -> "ImageData":
        """The same data on a device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)})

    def validation(self, fraction: float = 0.2) -> "ImageData":
        """The data to tune on: part of the training images, chosen class by class, in place of the test images."""
        images, labels = self.train_images, self.train_labels
        train, held_out = map(torch.from_numpy, hold_out(labels.cpu().numpy(), fraction))
        return ImageData(images[train], labels[train], images[held_out], labels[held_out], self.shift, self.flip)

    def smaller(self, factor: int) -> "ImageData":
        """The same data with the mean of so many by so many pixels in place of each; shifts shrink along, rounded up.

        Raises:
            DataError: the images' height or width is no multiple of it.
        """
        if factor == 1:
            return self
        height, width = self.train_images.shape[2:]
        if factor < 1 or height % factor or width % factor:
            raise DataError(f"shrink is {factor}, but images of {height} x {width} pixels cannot be divided by it")

        def mean(images: Tensor) -> Tensor:
            parts = (F.avg_pool2d(part.float(), factor).round().byte() for part in images.split(1000))
            return torch.cat([*parts])

        images = {"train_images": mean(self.train_images), "test_images": mean(self.test_images)}
        return replace(self, **images, shift=math.ceil(self.shift / factor))

    def fewer_test_images(self, count: int | None) -> "ImageData":
        """The same data with so many test images, at even distances; with all, if it is None or there are no more."""
        images = len(self.test_labels)
        if count is None or count >= images:
            return self
        chosen = torch.arange(count) * images // count
        return replace(self, test_images=self.test_images[chosen], test_labels=self.test_labels[chosen])

    def normaliser(self) -> Callable[[Tensor], Tensor]:
        """The function from bytes to numbers with mean 0 and variance 1 in every channel of the training images."""
        # A histogram per channel is exact, and needs no copy of the images as floats.
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in self.train_images.unbind(1)])
        density = counts / counts.sum(1, keepdim=True)  # (channels, 256)
        values = torch.arange(256.0, device=counts.device)
        mean = density @ values
        std = (density * (values - mean[:, None]).square()).sum(1).sqrt()
        if not std.all():
            raise DataError(f"the training images have one and the same value throughout channel {int(std.argmin())}")
        mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        return lambda images: (images - mean) / std

    def augment(self, images: Tensor, moves: Tensor) -> Tensor:
        """Training images, each shifted and mirrored as its row of moves says."""
        count, _, height, width = images.shape
        row, column, mirrored = moves.to(images.device).unbind(1)
        if self.shift:
            padded = F.pad(images, (self.shift,) * 4)
            crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # (n, c, row, column, height, width), a view
            images = crops[torch.arange(count, device=images.device), :, row, column]
        if self.flip:
            images = torch.where(mirrored.view(-1, 1, 1, 1) == 1, images.flip(3), images)
        return images

    def moves(self, count: int, generator: torch.Generator) -> Tensor:
        """Where the crop of each of so many images begins, and whether it is mirrored: shape (count, 3)."""
        starts = torch.randint(2 * self.shift + 1, (count, 2), generator=generator)
        return torch.cat([starts, torch.randint(2, (count, 1), generator=generator)], 1)

    def training(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of an epoch, in an order of its own, batch by batch."""
        order = torch.randperm(len(self.train_labels), generator=draws(batches.seed, batches.epoch))
        for step in range(batches.start, batches.stop):
            batch = order[step * batches.size : (step + 1) * batches.size]
            own = batches.part.of(batch).to(self.train_labels.device)
            images = self.train_images[own]
            if batches.augment:
                moves = self.moves(len(batch), draws(batches.seed, batches.epoch, step))
                images = self.augment(images, batches.part.of(moves))
            yield images, self.train_labels[own]

    def evaluation(self, size: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Test images and labels, in batches of this size at most."""
        yield from zip(part.of(self.test_images).split(size), part.of(self.test_labels).split(size), strict=True)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.train_images.device

    @property
    def count(self) -> int:
        """Training images."""
        return len(self.train_labels)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.train_images.shape[1]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return NUM_CLASSES


def load(name: str, data_dir: Path, download: bool = False) -> ImageData:
    """The data set of this name.

    Args:
        name: one of DATASETS.
        data_dir: holds the official files, itself or in the directory that their archive makes. Digits need none.
        download: fetch what is missing there from the official source.

    Raises:
        DataError: a file is missing, or is not what it should be.
    """
    return DATASETS[name](data_dir, download)


def _digits(data_dir: Path, download: bool) -> ImageData:
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)  # (1797, 1, 8, 8), values from 0 to 16
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=360, stratify=digits.target, random_state=SPLIT_SEED
    )
    return ImageData(images[train], labels[train], images[test], labels[test], shift=1, flip=False)


@cache
def cached_load(name: str, data_dir: Path, download: bool = False, shrink: int = 1) -> ImageData:
    """``load(name, data_dir, download).smaller(shrink)``, once in a process."""
    return load(name, data_dir, download).smaller(shrink)


def _fashion_mnist(data_dir: Path, download: bool) -> ImageData:
    return ImageData(*fashion_mnist(data_dir, download), shift=2, flip=True)


def _cifar10(data_dir: Path, download: bool) -> ImageData:
    return ImageData(*cifar10(data_dir, download), shift=4, flip=True)


DATASETS = {"digits": _digits, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10}
