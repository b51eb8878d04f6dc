"""Find, download, check and read the official files of Fashion-MNIST and CIFAR-10."""

import gzip
import hashlib
import io
import math
import pickle
import struct
import tarfile
import urllib.request
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.atomic import check, write
from benchmarks.common.errors import DataError

NUM_CLASSES = 10  # in both, and in the digits

FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


# ----------------------------------------------------------------------------------------------------- Fashion-MNIST

FASHION_MNIST_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
FASHION_MNIST_FILES = {  # name: published MD5 of the gzipped file
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}


def fashion_mnist(data_dir: Path, download: bool) -> FourTensors:
    """Return training images and labels, and test images and labels, of Fashion-MNIST."""
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
    return tensors[0], tensors[1], tensors[2], tensors[3]


def read_idx(path: Path, dims: int) -> Tensor:
    """Return the bytes in an idx file, gzipped or not.

    The format: two zero bytes, the type (8: bytes), the number of dimensions; each size as a big-endian 32-bit integer;
    the values, last dimension fastest.

    Raises:
        DataError: the file is not an idx file with `dims` dimensions, or is incomplete.
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
    """A file at its official source, with its published MD5."""

    url: str
    md5: str


CIFAR10_ARCHIVE = Download(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
)
CIFAR10_BINARY, CIFAR10_PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"  # directories in the two archives
CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")  # .bin in the binary version
CIFAR10_IMAGES = 10_000  # in each file
CIFAR10_SHAPE = (3, 32, 32)
CIFAR10_PIXELS = math.prod(CIFAR10_SHAPE)


def cifar10(data_dir: Path, download: bool) -> FourTensors:
    """Return training images and labels, and test images and labels, of CIFAR-10."""
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
    return images, labels, *test


def read_cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """Return images and labels of one file of the binary version (.bin) or of the python version (no suffix).

    Raises:
        DataError: the file does not hold 10,000 images with labels from 0 to 9.
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
    """Unpickler of arrays, containers, numbers and strings only.

    A pickle is a program: an unrestricted load can run any code.
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


# ------------------------------------------------------------------------------------------------------------- files


def fetch(source: Download, path: Path) -> Path:
    """Download a file, and write it only if its MD5 is right.

    Raises:
        DataError: the file cannot be downloaded, or has another MD5. Nothing is written.
    """
    try:
        check(path, "a file of the data set")
        with urllib.request.urlopen(source.url, timeout=60) as response:
            content = b"".join(
                iter(partial(response.read, 1 << 20), b"")
            )  # a plain read() raises if the file ends early
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
