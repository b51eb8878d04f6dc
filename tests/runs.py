"""What a run measured and wrote, and a disk that is full."""

import csv
import resource
from contextlib import contextmanager


def numbers(result):
    """What a run measured, but for the time it took."""
    return [
        {key: row[key] for key in ("epoch", "lr", "train_loss", "train_accuracy", "loss", "accuracy")}
        for row in result.history
    ]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def full(free):
    """A disk on which no file may grow beyond so many bytes, for the kernel's own errors."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}
