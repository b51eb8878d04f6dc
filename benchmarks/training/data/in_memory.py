"""Image data sets in memory: digits (inside scikit-learn), Fashion-MNIST and CIFAR-10 (their official files).

Images stay bytes until a batch is made of them: a whole data set fits in memory, and a shifted image leaves black.
"""

import gzip
import hashlib
import io
import math
import pickle
import struct
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from atomic import check, write

NUM_CLASSES = 10  # of all three data sets
SPLIT_SEED = 0  # of the digits' test images, and of every validation split


class DataError(Exception):
    """Files that are missing, or not as they should be; the message is one sentence."""


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


# ----------------------------------------------------------------------------------------------------- Fashion-MNIST

FASHION_MNIST_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
FASHION_MNIST_FILES = {  # name: published MD5 of the gzipped file
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}


def _fashion_mnist(data_dir: Path, download: bool) -> ImageData:
    tensors = []
    for name, md5 in FASHION_MNIST_FILES.items():
        path = _first(data_dir / name, data_dir / f"{name}.gz")
        if path is None and download:
            path = fetch(Download(f"{FASHION_MNIST_URL}/{name}.gz", md5), data_dir / f"{name}.gz")
        if path is None:
            raise _missing("fashion-mnist", data_dir, f"{name} or {name}.gz")
        if "labels" in name:
            tensors.append(_checked_labels(path, read_idx(path, dims=1), images=len(tensors[-1])))
        else:
            tensors.append(read_idx(path, dims=3).unsqueeze(1))
            if not tensors[-1].numel() or tensors[-1].shape[1:] != tensors[0].shape[1:]:
                raise DataError(
                    f"{path} has images of shape {tuple(tensors[-1].shape)}, but some are needed, and all of one size"
                )
    return ImageData(*tensors, shift=2, flip=True)


def read_idx(path: Path, dims: int) -> Tensor:
    """The bytes in an idx file, gzipped or not.

    The format: two zero bytes, the type (8: bytes), the number of dimensions; each size as a big-endian 32-bit integer;
    the values, last dimension fastest.

    Raises:
        DataError: this is no idx file with so many dimensions, or not the whole of it.
    """
    content = _read(path)
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is not a complete gzip file: {error}") from error
    magic, header = bytes((0, 0, 8, dims)), 4 + 4 * dims
    if content[:4] != magic:
        raise DataError(
            f"{path} starts with the bytes {content[:4].hex(' ') or '(none)'}, but an idx file of bytes in {dims} "
            f"dimension(s) starts with {magic.hex(' ')}"
        )
    if len(content) < header:
        raise DataError(f"{path} is cut short: it has {len(content)} bytes, and an idx header alone has {header}")
    shape = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{path} has {len(content) - header} values, but its header promises {' x '.join(map(str, shape))}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


# ---------------------------------------------------------------------------------------------------------- CIFAR-10


class Download(NamedTuple):
    """A file at its official source, with the MD5 published there."""

    url: str
    md5: str


CIFAR10_ARCHIVE = Download(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
)
CIFAR10_BINARY, CIFAR10_PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"  # what the two archives unpack to
CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")  # .bin in the binary version
CIFAR10_IMAGES = 10_000  # in each file
CIFAR10_SHAPE = (3, 32, 32)
CIFAR10_PIXELS = math.prod(CIFAR10_SHAPE)


def _cifar10(data_dir: Path, download: bool) -> ImageData:
    parts = []
    for name in CIFAR10_FILES:
        binary = f"{name}.bin"
        path = _first(
            data_dir / binary, data_dir / CIFAR10_BINARY / binary, data_dir / name, data_dir / CIFAR10_PYTHON / name
        )
        if path is None and download:
            _unpack_cifar10(fetch(CIFAR10_ARCHIVE, data_dir / Path(CIFAR10_ARCHIVE.url).name))
            path = data_dir / CIFAR10_BINARY / binary
        if path is None:
            where = f"{binary} (or {CIFAR10_BINARY}/{binary}; {name} or {CIFAR10_PYTHON}/{name} in the python version)"
            raise _missing("cifar10", data_dir, where)
        parts.append(read_cifar10(path))
    *train, test = parts
    images, labels = (torch.cat(tensors) for tensors in zip(*train, strict=True))
    return ImageData(images, labels, *test, shift=4, flip=True)


def read_cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """Images and labels in one file of the binary version (.bin) or of the python version (no suffix).

    Raises:
        DataError: it holds anything but 10,000 images with labels from 0 to 9.
    """
    content = _read(path)
    if path.suffix == ".bin":  # per image: a byte with its label, then its bytes, red, green, blue
        size = CIFAR10_IMAGES * (1 + CIFAR10_PIXELS)
        if len(content) != size:
            raise DataError(f"{path} has {len(content)} bytes, but {CIFAR10_IMAGES} images and labels have {size}")
        rows = np.frombuffer(content, np.uint8).reshape(CIFAR10_IMAGES, 1 + CIFAR10_PIXELS)
        labels, images = rows[:, 0], rows[:, 1:]
    else:  # a pickled dict
        try:
            batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
            labels, images = np.asarray(batch[b"labels"]), np.asarray(batch[b"data"])
        except Exception as error:  # a damaged pickle can raise anything
            raise DataError(f"{path} is not a batch of CIFAR-10's python version: {error!r}") from error
        if (images.dtype, images.shape) != (np.uint8, (CIFAR10_IMAGES, CIFAR10_PIXELS)) or labels.dtype != np.int64:
            raise DataError(
                f"{path} holds images of type {images.dtype} and shape {images.shape} with labels of type "
                f"{labels.dtype}, but uint8, {(CIFAR10_IMAGES, CIFAR10_PIXELS)} and int64 are needed"
            )
    return (
        torch.from_numpy(images.reshape(-1, *CIFAR10_SHAPE).copy()),
        _checked_labels(path, torch.from_numpy(labels.copy()), images=CIFAR10_IMAGES),
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays, containers, numbers and strings, and looks up nothing else.

    A pickle is a program: an unrestricted load runs whatever the file asks for.
    """

    MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    NAMES = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0]}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if module in self.MODULES and name in self.NAMES:
            return self.NAMES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, but only NumPy arrays are accepted")


def _unpack_cifar10(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        for name in CIFAR10_FILES:
            member = f"{CIFAR10_BINARY}/{name}.bin"
            with tar.extractfile(member) as source:
                write(archive.parent / member, source.read())
    archive.unlink()


# -------------------------------------------------------------------------------------------------------------- files


def fetch(source: Download, path: Path) -> Path:
    """Download a file, check its MD5, and only then give it its name.

    Raises:
        DataError: it cannot be had, or has another MD5; nothing is left behind.
    """
    try:
        check(path, "a file of the data set")
        with urllib.request.urlopen(source.url, timeout=60) as response:
            content = b"".join(
                iter(partial(response.read, 1 << 20), b"")
            )  # read() alone raises where a file ends early
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != source.md5:
            raise DataError(f"{source.url} has MD5 {md5}, but {source.md5} was published: nothing was kept")
        write(path, content)
    except OSError as error:
        raise DataError(f"{source.url} cannot be downloaded to {path}: {error}") from error
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _missing(name: str, data_dir: Path, file: str) -> DataError:
    found = "has no such file" if data_dir.is_dir() else "is not a directory"
    return DataError(f"{name} needs {file}, but {data_dir} {found}: name another --data-dir, or add --download")


def _checked_labels(path: Path, labels: Tensor, images: int) -> Tensor:
    if len(labels) != images:
        raise DataError(f"{path} has {len(labels)} labels, but there are {images} images")
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < NUM_CLASSES:
        wrong = next(label for label in labels.tolist() if not 0 <= label < NUM_CLASSES)
        raise DataError(f"{path} has the label {wrong}, but labels run from 0 to {NUM_CLASSES - 1}")
    return labels.long()


@cache
def cached_load(name: str, data_dir: Path, download: bool = False, shrink: int = 1) -> ImageData:
    """``load(name, data_dir, download).smaller(shrink)``, once in a process."""
    return load(name, data_dir, download).smaller(shrink)


DATASETS = {"digits": _digits, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10}
