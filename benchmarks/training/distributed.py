"""Run one training script on a laptop, on several accelerators, and on many machines.

Accelerate finds the processes that a launcher started, and sums their results. Parameters are copied to each process
(DistributedDataParallel) or sharded over them (FSDP2). Checkpoints have the same format in all cases: a run of many
processes can continue in one, and the other way round.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks.common.errors import ConfigError

Found = TypeVar("Found")


@cache
def processes(cpu: bool) -> Accelerator:
    """Return the Accelerator of this process. Without a launcher, it is the only process.

    Raises:
        ConfigError: Accelerate is configured for its own sharding.
    """
    found = Accelerator(cpu=cpu)
    if found.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(f"Accelerate is set up for {found.distributed_type.value}: take it out, and use --shard")
    return found


def first(processes: Accelerator, act: Callable[[], Found]) -> Found:
    """Call `act` only in the first process, and return its result in all processes.

    Raises:
        Exception: the first process' error, in all processes, so that none waits for an ended one.
    """
    found: Any = None
    if processes.is_main_process:
        try:
            found = act()
        except Exception as error:
            if processes.num_processes == 1:
                raise
            found = error
    (found,) = broadcast_object_list([found])
    if isinstance(found, Exception):
        raise found
    return found


class Ended(BaseException):
    """A signal that asks the program to end. A BaseException, like KeyboardInterrupt: `except Exception` lets it pass.

    Attributes:
        signal: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


class Signals:
    """Handling of the signals that ask this process to end: SIGTERM from a cluster, SIGHUP from a closed terminal.

    Attributes:
        came: the first signal that came, or 0.
    """

    WANTED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.came, self._noting = 0, False

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Raise Ended at once when a signal comes. Ignored signals stay ignored, as with nohup."""
        wanted = self.WANTED if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.getsignal(number) for number in wanted}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        self.came = 0
        for number in before:
            signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record signals without raising Ended, so that the program can end where nothing is lost.

        A second signal has no effect: a cluster sends one to every process, and the launcher forwards its own.
        """
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        another, self.came = bool(self.came), self.came or number
        if not (another or self._noting):
            raise Ended(number)


signals = Signals()


class Mean(torch.autograd.Function):
    """The mean of a tensor over all processes. Its gradient is also a mean over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sum over the processes, and divide by their number."""
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Average the gradients: every process' loss depends on every process' x."""
        return Mean.forward(ctx, grad)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the images of all processes, on the CPU, where ``nn.SyncBatchNorm`` does not run."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise as ``nn.BatchNorm2d`` does with the whole batch in one process."""
        if not self.training:
            return super().forward(x)
        dims = (0, 2, 3)
        values = x.float()  # single precision, also under autocast
        mean = Mean.apply(values.mean(dims))
        centred = values - mean.view(-1, 1, 1)
        variance = Mean.apply(centred.square().mean(dims))
        with torch.no_grad():
            count = dist.get_world_size() * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


def synced(model: nn.Module, device: torch.device) -> nn.Module:
    """Make a model's batch normalisations use the whole batch, in place. Return the model."""
    if device.type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d  # changes only forward; parameters and buffers stay
    return model


def sharded(model: nn.Module) -> nn.Module:
    """Shard a model's parameters over the processes, in place. They are gathered block by block."""
    for stage in model.children():
        if isinstance(stage, nn.Sequential):
            for block in stage:
                fully_shard(block)
    return fully_shard(model)


def copies(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model with a copy in each process and averaged gradients."""
    return DistributedDataParallel(model, device_ids=None if device.index is None else [device.index])


@torch.no_grad()
def share_(buffers: Iterable[Tensor]) -> None:
    """Replace each process' own running statistics by their mean over the processes."""
    for buffer in buffers:
        if buffer.is_floating_point() and not isinstance(buffer, DTensor):
            dist.all_reduce(buffer)
            buffer.div_(dist.get_world_size())


def full(value: Any) -> Any:
    """Return the full tensor. For a sharded tensor, this is a collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """Return this process' part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


class Average:
    """An exponential moving average of a model's parameters and running statistics.

    Args:
        model: the model that is trained.
        decay: weight of the previous average in each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.values = {name: value.clone() for name, value in self._current().items()}
        self._blend = get_ema_multi_avg_fn(decay)

    def _current(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.model.state_dict().items() if value.is_floating_point()}

    def update(self) -> None:
        """Update the average with the model's current values."""
        ours, now = ([*map(local, values.values())] for values in (self.values, self._current()))
        self._blend(ours, now, 1)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the model's own values by the average inside the context."""
        current = self._current()
        kept = {name: value.clone() for name, value in current.items()}
        for name, value in self.values.items():
            current[name].copy_(value)
        try:
            yield
        finally:
            for name, value in kept.items():
                current[name].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Return the average for a checkpoint."""
        return {name: full(value).cpu() for name, value in self.values.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the average to a saved state."""
        for name, value in self.values.items():
            saved = state[name].to(value.device)
            if isinstance(value, DTensor):
                saved = distribute_tensor(saved, value.device_mesh, value.placements)
            value.copy_(saved)


OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return full states of model and optimizer on the CPU. All processes must call it; only the first gets them."""
    weights, steps = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": weights, "optimizer": steps}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load full states into a model and an optimizer. Every process must have them."""
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
