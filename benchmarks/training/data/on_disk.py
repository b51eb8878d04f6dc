"""Image data sets too large for memory, decoded on demand: folders in ImageNet's layout, and webdataset's shards.

A folder holds `train` and `val`, each with one folder per class that holds JPEG or PNG files. Shards are tar files
`train-*.tar` and `val-*.tar` of samples `name.jpg` (or .jpeg, .png) with their class number, `name.cls`. Both give
bytes of shape (3, size, size). Training images are random crops of 8 to 100 % of the image, mirrored at random.
Evaluation images are the middle 7/8 of the shorter side (Szegedy et al., "Going Deeper with Convolutions", CVPR 2015).

A process' images depend only on seed, epoch and step, so a run can continue from any step. Folders give the same
batches with any number of processes. Shards are split over processes and workers, so batches depend on their numbers.
"""

import io
import math
import os
import random
import signal
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from benchmarks.common.errors import DataError
from benchmarks.training.data.batches import Batches, Part, draws, hold_out

SUFFIXES = (".jpg", ".jpeg", ".png")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SHUFFLED = 1000  # size of each worker's shuffle buffer, in samples
TAR_END = bytes(1024)  # the end of every complete tar file

Item = tuple[Tensor, int] | DataError
File = tuple[Path, int]


def normalise(images: Tensor) -> Tensor:
    """Normalise bytes by ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


@dataclass(frozen=True)
class Large:
    """Base of both kinds of data sets.

    Attributes:
        num_classes: number of labels.
        count: number of training images.
        size: height and width of a decoded image.
        workers: decoding processes per training process; 0: it decodes itself.
        device: device of the batches.
    """

    num_classes: int
    count: int
    size: int
    workers: int
    device: torch.device
    channels: ClassVar[int] = 3

    def to(self, device: torch.device) -> "Large":
        """Return the data set with batches on a device."""
        return replace(self, device=device)

    def normaliser(self) -> Callable[[Tensor], Tensor]:
        """Return the function that normalises bytes by ImageNet's mean and standard deviation."""
        return normalise

    def _load(self, source: Dataset[Item], **batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
        pinned = self.device.type == "cuda"
        loader = DataLoader(
            source,
            num_workers=self.workers,
            worker_init_fn=_leave_ending_to_parent,
            collate_fn=_collate,
            pin_memory=pinned,
            **batches,
        )
        loader.generator = torch.Generator()  # otherwise it would use the global generator
        for batch in loader:
            if isinstance(batch, DataError):  # raised in the worker, it would have a long traceback
                raise batch
            yield batch[0].to(self.device, non_blocking=True), batch[1].to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Folder(Large):
    """Images in a folder per class.

    Attributes:
        train, test: files with their labels.
    """

    train: Sequence[File]
    test: Sequence[File]

    def validation(self, fraction: float = 0.2) -> "Folder":
        """Return data for tuning: a share of each class's training images replaces the test images."""
        indices = hold_out([label for _, label in self.train], fraction)
        train, test = ([self.train[index] for index in some] for some in indices)
        return replace(self, train=train, test=test, count=len(train))

    def training(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch: see ImageData.training."""
        where = batches.seed, batches.epoch
        order = torch.randperm(self.count, generator=draws(*where))

        def keys() -> Iterator[list[tuple[int, ...]]]:
            for step in range(batches.start, batches.stop):
                own = batches.part.of(order[step * batches.size : (step + 1) * batches.size])
                yield [(index, *where, index) if batches.augment else (index,) for index in own.tolist()]

        return self._load(_Files(self.train, self.size), batch_sampler=keys())

    def evaluation(self, size: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an evaluation: see ImageData.evaluation."""
        own = [(index,) for index in part.of(torch.arange(len(self.test))).tolist()]
        return self._load(_Files(self.test, self.size), sampler=own, batch_size=size)


@dataclass(frozen=True)
class Shards(Large):
    """Images in tar files.

    Attributes:
        train, test: the tar files.
    """

    train: Sequence[Path]
    test: Sequence[Path]

    def validation(self, fraction: float = 0.2) -> "Shards":
        """Raise an error: it is not known which images are in which shard.

        Raises:
            DataError: always.
        """
        raise DataError("split is validation, but shards cannot be split: name other ones val-*.tar")

    def training(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch: see ImageData.training."""
        streams = batches.part.world * max(1, self.workers)
        if len(self.train) < streams:
            raise DataError(
                f"there are {len(self.train)} shards to train on, but {batches.part.world} processes with "
                f"{max(1, self.workers)} workers each need {streams}: make more, or take fewer --workers"
            )
        own = batches.size // batches.part.world
        source = _Samples(self.train, self, batches.part, batches)
        return islice(self._load(source, batch_size=own), batches.stop - batches.start)

    def evaluation(self, size: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an evaluation: see ImageData.evaluation."""
        return self._load(_Samples(self.test, self, part), batch_size=size)


class _Files(Dataset[Item]):
    """Decoded files by key: the file's index, and the random key of its crop, if it is random."""

    def __init__(self, files: Sequence[File], size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(self, key: tuple[int, ...]) -> Item:
        path, label = self.files[key[0]]
        try:
            return decode(path.read_bytes(), self.size, *key[1:]), label
        except Exception as error:  # a damaged file can raise anything
            return DataError(f"{path} is not a whole image: {error}")


class _Samples(IterableDataset[Item]):
    """Samples of this process' and worker's shards. With `batches`, they are shuffled and repeated for training."""

    def __init__(self, shards: Sequence[Path], like: Shards, part: Part, batches: Batches | None = None) -> None:
        self.shards, self.like, self.part, self.batches = shards, like, part, batches

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.batches is None:
            own = self.shards[self.part.rank :: self.part.world][worker::workers]
            yield from (self._item(sample) for sample in _samples(own))
            return
        # Workers give batches in turn. Worker 0 gives the first one, so it takes the role of that step's worker.
        step, where = self.batches.start + worker, (self.batches.seed, self.batches.epoch)
        worker = step % workers
        order = torch.randperm(len(self.shards), generator=draws(*where)).tolist()
        own = [self.shards[index] for index in order][self.part.rank :: self.part.world][worker::workers]
        key = *where, self.part.rank, worker
        done = step // workers * (self.batches.size // self.part.world)
        for number, sample in islice(enumerate(_endless(own, key)), done, None):
            yield self._item(sample, *((*key, number) if self.batches.augment else ()))

    def _item(self, sample: dict[str, Any] | DataError, *key: int) -> Item:
        if isinstance(sample, DataError):
            return sample
        name = f"{sample['__url__']}: {sample['__key__']}"
        image = next((sample[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in sample), None)
        try:
            label = int(sample["cls"])
        except (KeyError, ValueError):
            return DataError(f"{name} has no number of a class (.cls)")
        if image is None:
            return DataError(f"{name} has no image ({', '.join(SUFFIXES)})")
        if not 0 <= label < self.like.num_classes:
            return DataError(f"{name} has the label {label}, but labels run from 0 to {self.like.num_classes - 1}")
        try:
            return decode(image, self.like.size, *key), label
        except Exception as error:  # a damaged file can raise anything
            return DataError(f"{name} is not a whole image: {error}")


def _samples(shards: Sequence[Path]) -> Iterator[dict[str, Any] | DataError]:
    """Yield all samples of tar files once."""
    from webdataset.tariterators import group_by_keys  # noqa: PLC0415 - an extra

    for shard in shards:
        try:
            yield from group_by_keys(_files(shard))
        except Exception as error:  # a damaged file can raise anything
            yield DataError(f"{shard} is not a whole tar file: {' '.join(str(error).split())[:200]}")


def _files(shard: Path) -> Iterator[dict[str, Any]]:
    """Yield the files in a tar file, in the form that webdataset groups."""
    with shard.open("rb") as stream, tarfile.open(fileobj=stream) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield {"fname": member.name, "data": file.read(), "__url__": os.fspath(shard)}
        stream.seek(tar.offset)  # tarfile takes a damaged header for the end
        if stream.read().strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")


def _endless(shards: Sequence[Path], key: Sequence[int]) -> Iterator[dict[str, Any] | DataError]:
    """Yield all samples of tar files repeatedly, shuffled differently each time."""
    from webdataset.filters import shuffle  # noqa: PLC0415 - an extra

    for times in count():
        found = False
        for sample in shuffle(SHUFFLED, initial=SHUFFLED, rng=random.Random(str((*key, times))))(_samples(shards)):
            found = True
            yield sample
        if not found:
            yield DataError(f"{', '.join(shard.name for shard in shards)}: there is no sample in these shards")


def _leave_ending_to_parent(worker: int) -> None:
    """Ignore SIGTERM in a worker: a cluster sends it to all processes, and the parent must finish its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(items: Sequence[Item]) -> tuple[Tensor, Tensor] | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    images, labels = zip(*items, strict=True)  # type: ignore[arg-type]
    return torch.stack(images), torch.tensor(labels)


def decode(content: bytes, size: int, *key: int) -> Tensor:
    """Decode an image file to bytes of shape (3, size, size): a random crop if there is a key, else the middle.

    Raises:
        Exception: the file is not a complete image.
    """
    from PIL import Image  # noqa: PLC0415 - an extra

    rng = np.random.default_rng(key) if key else None
    with Image.open(io.BytesIO(content)) as file:
        if file.mode.startswith(("I", "F")):  # PIL would clip the values
            raise ValueError(f"its pixels are of mode {file.mode}, but 8 bits a channel are needed")
        box = _middle(*file.size) if rng is None else _random_box(*file.size, rng)
        image = file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box)
    pixels = np.array(image)
    if rng is not None and rng.integers(2):
        pixels = pixels[:, ::-1]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _middle(width: int, height: int) -> tuple[float, float, float, float]:
    side = 7 / 8 * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw a box with 8 to 100 % of the area and ratio 3:4 to 4:3. Return the middle if ten draws do not fit."""
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1) * width * height, math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return _middle(width, height)


# ------------------------------------------------------------------------------------------------------------- loading


def folder(data_dir: Path, *, image_size: int, workers: int, **_: Any) -> Folder:
    """Return the data set in a folder.

    Raises:
        DataError: a folder is missing, a class has no images, or a file is empty.
    """
    needs("PIL", "pillow")
    classes: list[str] = []
    splits = []
    for split in ("train", "val"):
        directory = data_dir / split
        if not directory.is_dir():
            raise DataError(f"image-folder needs {directory}, with a folder per class, but there is no such directory")
        found = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        classes = classes or found
        if len(found) < 2:
            raise DataError(f"{directory} has {len(found)} classes, but two at least are needed, a folder for each")
        if found != classes:
            odd = min({*found} ^ {*classes})
            raise DataError(f"{directory} must have the classes of train, but they differ in {odd}")
        splits.append([(path, label) for label, name in enumerate(classes) for path in _images(directory / name)])
    return Folder(len(classes), len(splits[0]), image_size, workers, torch.device("cpu"), *splits)


def _images(directory: Path) -> list[Path]:
    files = [entry for entry in os.scandir(directory) if entry.name.lower().endswith(SUFFIXES)]
    if not files:
        raise DataError(f"the class {directory} is empty: it has no {', '.join(SUFFIXES)}")
    for file in files:
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"{file.path} cannot be read: {error.strerror}") from error
        if not size:
            raise DataError(f"{file.path} is empty, but an image is needed")
    return sorted(Path(file.path) for file in files)


def shards(data_dir: Path, *, image_size: int, workers: int, images: int | None, classes: int | None) -> Shards:
    """Return the data set in shards.

    Raises:
        DataError: there are no shards, one is incomplete, or the numbers of images and classes are not given.
    """
    needs("PIL", "pillow")
    needs("webdataset", "webdataset")
    if images is None or classes is None:
        raise DataError("webdataset needs --images and --classes: shards do not tell how many they have")
    found = []
    for split in ("train", "val"):
        found.append(sorted(data_dir.glob(f"{split}-*.tar")))
        if not found[-1]:
            raise DataError(f"webdataset needs {data_dir / split}-*.tar, but there are none")
        for path in found[-1]:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - len(TAR_END)))
                if file.read() != TAR_END:
                    raise DataError(f"{path} is cut short: it does not end as tar files do")
    return Shards(classes, images, image_size, workers, torch.device("cpu"), *found)


def needs(module: str, package: str) -> None:
    """Check that a module is installed.

    Raises:
        DataError: it is missing. The message names its package.
    """
    try:
        __import__(module)
    except ImportError as error:
        raise DataError(f"large data sets need {package}: pip install '.[large]'") from error


DATASETS: dict[str, Callable[..., Large]] = {"image-folder": folder, "webdataset": shards}
"""Loaders of the user's own data sets in --data-dir."""
