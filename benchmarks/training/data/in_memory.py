"""Image data sets in memory: digits (inside scikit-learn), Fashion-MNIST and CIFAR-10 (their official files).

Images stay bytes until a batch is made, so that a data set fits in memory.
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
    """Training and test images with their labels, and the augmentation of training images.

    Attributes:
        train_images: bytes of shape (images, channels, height, width).
        train_labels: integers of shape (images,).
        test_images: like train_images.
        test_labels: like train_labels.
        shift: maximum shift of a training image in pixels, vertically and horizontally.
        flip: whether a training image is mirrored with probability one half.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    shift: int
    flip: bool

    def to(self, device: torch.device) -> "ImageData":
        """Return the data on a device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)})

    def validation(self, fraction: float = 0.2) -> "ImageData":
        """Return data for tuning: a share of each class's training images replaces the test images."""
        images, labels = self.train_images, self.train_labels
        train, held_out = map(torch.from_numpy, hold_out(labels.cpu().numpy(), fraction))
        return ImageData(images[train], labels[train], images[held_out], labels[held_out], self.shift, self.flip)

    def smaller(self, factor: int) -> "ImageData":
        """Return the data downsampled by means of factor x factor pixels. The shift is divided too, and rounded up.

        Raises:
            DataError: the images' height or width is not a multiple of the factor.
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
        """Return the data with `count` test images, evenly spaced, or with all if it is None or there are no more."""
        images = len(self.test_labels)
        if count is None or count >= images:
            return self
        chosen = torch.arange(count) * images // count
        return replace(self, test_images=self.test_images[chosen], test_labels=self.test_labels[chosen])

    def normaliser(self) -> Callable[[Tensor], Tensor]:
        """Return the function that maps bytes to mean 0 and variance 1 in every channel of the training images."""
        # A histogram per channel is exact, and needs no float copy of the images.
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in self.train_images.unbind(1)])
        density = counts / counts.sum(1, keepdim=True)  # (channels, 256)
        values = torch.arange(256.0, device=counts.device)
        mean = density @ values
        std = (density * (values - mean[:, None]).square()).sum(1).sqrt()
        if not std.all():
            raise DataError(f"the training images have one and the same value throughout channel {int(std.argmin())}")
        mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        return lambda images: (images - mean) / std

    def augment(self, images: Tensor, moves: Tensor, pad: str = "zero") -> Tensor:
        """Shift and mirror training images, each by its row of `moves`. The border is black, or mirrored."""
        count, _, height, width = images.shape
        row, column, mirrored = moves.to(images.device).unbind(1)
        if self.shift:
            padded = F.pad(images, (self.shift,) * 4, "constant" if pad == "zero" else pad)
            crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # (n, c, row, column, height, width), a view
            images = crops[torch.arange(count, device=images.device), :, row, column]
        if self.flip:
            images = torch.where(mirrored.view(-1, 1, 1, 1) == 1, images.flip(3), images)
        return images

    def moves(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw row and column of each image's crop, and whether it is mirrored: shape (count, 3)."""
        starts = torch.randint(2 * self.shift + 1, (count, 2), generator=generator)
        return torch.cat([starts, torch.randint(2, (count, 1), generator=generator)], 1)

    def training(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of an epoch by batch. Each epoch has its own order."""
        order = torch.randperm(len(self.train_labels), generator=draws(batches.seed, batches.epoch))
        for step in range(batches.start, batches.stop):
            batch = order[step * batches.size : (step + 1) * batches.size]
            own = batches.part.of(batch).to(self.train_labels.device)
            images = self.train_images[own]
            if batches.augment:
                moves = self.moves(len(batch), draws(batches.seed, batches.epoch, step))
                images = self.augment(images, batches.part.of(moves), batches.pad)
            yield images, self.train_labels[own]

    def evaluation(self, size: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield test images and labels in batches of at most `size`."""
        yield from zip(part.of(self.test_images).split(size), part.of(self.test_labels).split(size), strict=True)

    @property
    def device(self) -> torch.device:
        """The device of the images."""
        return self.train_images.device

    @property
    def count(self) -> int:
        """Number of training images."""
        return len(self.train_labels)

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return self.train_images.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return NUM_CLASSES


def load(name: str, data_dir: Path, download: bool = False) -> ImageData:
    """Return a data set by name.

    Args:
        name: one of DATASETS.
        data_dir: directory with the official files, or with the unpacked directory of their archive. Not for digits.
        download: whether to download missing files from the official source.

    Raises:
        DataError: a file is missing or invalid.
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
    """Return ``load(name, data_dir, download).smaller(shrink)``, cached in the process."""
    return load(name, data_dir, download).smaller(shrink)


def _fashion_mnist(data_dir: Path, download: bool) -> ImageData:
    return ImageData(*fashion_mnist(data_dir, download), shift=2, flip=True)


def _cifar10(data_dir: Path, download: bool) -> ImageData:
    return ImageData(*cifar10(data_dir, download), shift=4, flip=True)


DATASETS = {"digits": _digits, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10}
