"""Count the communication of many processes in a training step: python benchmarks/measure/scale.py.

Nothing is estimated. A network is wrapped as in benchmarks/train.py, with a fake process group of the given size, and
runs a step; the bytes of its collectives are summed. A row is a network, the format of its convolutions, a number of
processes, and a way to distribute it: `copies` (DistributedDataParallel) or `shards` (FSDP2). Bytes sent are those of
one process with ring collectives: 2 (n - 1) / n of an all-reduce, (n - 1) / n of an all-gather or reduce-scatter.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from rich.progress import track
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # private: torch tests its own wrappers with it
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.atomic import WriteError, check
from benchmarks.common.errors import ConfigError
from benchmarks.common.families import CONVOLUTIONS, MODELS
from benchmarks.common.names import DENSE
from benchmarks.common.provenance import write_csv
from benchmarks.common.rows import RESULTS
from benchmarks.common.sizes import numel
from benchmarks.training import distributed
from benchmarks.training.config import Config

Row = dict[str, Any]
WAYS = ("copies", "shards")
STATE = 3 * 4  # bytes per parameter: itself, its gradient and its momentum, in single precision


class Collectives(TorchDispatchMode):
    """Counter of collectives: calls, and bytes, by kind."""

    KINDS = {"allreduce_": "reduced", "_allgather_base_": "gathered", "_reduce_scatter_base_": "scattered"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective, and run it."""
        kind = self.KINDS.get(function._schema.name.removeprefix("c10d::"))
        if kind:
            # Of input and output, one may be a process' part. The larger one is the whole.
            tensors = [tensor for given in args for tensor in _tensors(given)]
            self.note(kind, max(tensor.numel() * tensor.element_size() for tensor in tensors))
        return function(*args, **(kwargs or {}))

    def note(self, kind: str, size: int) -> None:
        """Add one call with `size` bytes in total."""
        self.calls[kind] += 1
        self.bytes[kind] += size

    def sent(self, world: int) -> float:
        """Return the bytes that a process sends."""
        return (world - 1) / world * (2 * self.bytes["reduced"] + self.bytes["gathered"] + self.bytes["scattered"])


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [tensor for item in given for tensor in _tensors(item)] if isinstance(given, list | tuple) else []


@cache
def flops_per_image(config: Config, size: int) -> int:
    """Return the FLOPs per image of forward and backward."""
    model, image = config.network(3, 1000), torch.zeros(2, 3, size, size)  # building contracts too: not counted
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return int(counter.get_total_flops() // len(image))


def measure(config: Config, world: int, way: str, size: int) -> Row:
    """Return the row of a network."""
    cpu = torch.device("cpu")
    model = config.network(3, 1000)
    row = {"network": config.model, "conv": config.conv, "rank": config.rank or "", "processes": world, "way": way}
    row |= {"parameters": numel(model)}
    image = torch.zeros(2, 3, size, size)
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        found, wrapped = Collectives(), distributed.synced(model, cpu)
        if way == "shards":
            distributed.sharded(wrapped)
        else:
            wrapped = distributed.copies(wrapped, cpu)
            wrapped.register_comm_hook(found, _note_bucket)
        wrapped(image).sum().backward()  # DistributedDataParallel rebuilds its buckets after the first backward
        found.calls.clear()
        found.bytes.clear()
        with found:
            wrapped(image).sum().backward()
        held = sum(distributed.local(parameter).numel() for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
    return row | {
        "collectives": found.calls.total(), "reduced": found.bytes["reduced"], "gathered": found.bytes["gathered"],
        "scattered": found.bytes["scattered"], "sent": round(found.sent(world)), "state": STATE * held,
        "flops_per_image": flops_per_image(config, size), "image_size": size,
    }  # fmt: skip


def _note_bucket(found: Collectives, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Count a bucket of gradients in place of its all-reduce."""
    found.note("reduced", bucket.buffer().numel() * bucket.buffer().element_size())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@dataclass(frozen=True)
class Command:
    """Count the communication of many processes in a training step."""

    network: Literal[tuple(MODELS)] = "resnet50"
    convs: tuple[Literal[tuple(CONVOLUTIONS)], ...] = (DENSE, "cp", "tucker", "tt", "tr", "btt")
    keep: float = 0.1
    """Keep ratio of every convolution except the stem. The last layer is dense."""
    processes: tuple[int, ...] = (8, 1000)
    size: int = 224
    """Height and width of the images."""
    out: Path = RESULTS / "scale.csv"
    """CSV file."""


def main(arguments: Sequence[str] | None = None) -> None:
    command = tyro.cli(Command, args=arguments)
    try:
        check(command.out, "out")
    except WriteError as error:
        sys.exit(f"error: {error}")
    runs = [(conv, world, way) for conv in command.convs for world in command.processes for way in WAYS]
    rows = []
    for conv, world, way in track(runs, "counting"):
        config = Config(model=command.network, conv=conv, rank=None if conv == DENSE else command.keep)
        try:
            rows.append(measure(config, world, way, command.size))
        except ConfigError as error:
            sys.exit(f"error: {error}")
    write_csv(command.out, rows)


if __name__ == "__main__":
    main()
