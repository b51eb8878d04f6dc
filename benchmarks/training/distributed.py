"""What lets one training script run on a laptop, on several accelerators, and on many machines.

Accelerate finds the other processes that a launcher started, and adds up what they have found. Parameters are copied to
each (DistributedDataParallel), or sharded over them (FSDP2). States are read and written alike in every case: a
checkpoint of many processes goes on in one, and the other way round.
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
    """This process among those that a launcher started; one of one without a launcher.

    Raises:
        ConfigError: Accelerate is set up to shard in a way of its own.
    """
    found = Accelerator(cpu=cpu)
    if found.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(f"Accelerate is set up for {found.distributed_type.value}: take it out, and use --shard")
    return found


def first(processes: Accelerator, act: Callable[[], Found]) -> Found:
    """Act in the first process alone, and return what it found in all of them.

    Raises:
        Exception: what the first process raised, in all of them: none waits for one that has ended.
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
    """A signal asks the program to end. As KeyboardInterrupt, it is no failure that anything may catch and pass over.

    Attributes:
        signal: which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


class Signals:
    """What asks this process to end: SIGTERM of a cluster that takes its machine back, SIGHUP of a closed terminal.

    Attributes:
        came: the first that came, or 0.
    """

    WANTED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.came, self._noting = 0, False

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Raise Ended wherever the program is when a signal comes. Signals that are ignored stay so, as with nohup."""
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
        """Note signals, for the program to end where nothing is lost.

        A second one changes nothing: a cluster sends it to every process, and a launcher passes its own on.
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
    """The mean of a tensor over all processes; so is its gradient's way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Add up and divide."""
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Add up and divide: every process' loss depends on every process' x."""
        return Mean.forward(ctx, grad)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the images of all processes, on the CPU, where ``nn.SyncBatchNorm`` does not run."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; the same as ``nn.BatchNorm2d`` does with the whole batch in one process."""
        if not self.training:
            return super().forward(x)
        dims = (0, 2, 3)
        values = x.float()  # also where autocast computes in half precision
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
    """A model whose batch normalisations see the whole batch, in place."""
    if device.type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d  # the same parameters and buffers, another forward
    return model


def sharded(model: nn.Module) -> nn.Module:
    """A model whose parameters are spread over the processes, and gathered block by block, in place."""
    for stage in model.children():
        if isinstance(stage, nn.Sequential):
            for block in stage:
                fully_shard(block)
    return fully_shard(model)


def copies(model: nn.Module, device: torch.device) -> nn.Module:
    """A model of which each process has a copy, with gradients that are averaged."""
    return DistributedDataParallel(model, device_ids=None if device.index is None else [device.index])


@torch.no_grad()
def share_(buffers: Iterable[Tensor]) -> None:
    """Replace running statistics by their mean over the processes, where each has its own."""
    for buffer in buffers:
        if buffer.is_floating_point() and not isinstance(buffer, DTensor):
            dist.all_reduce(buffer)
            buffer.div_(dist.get_world_size())


def full(value: Any) -> Any:
    """A tensor as one process would hold it; a collective for those that are sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


class Average:
    """An exponential moving average of a model's parameters and running statistics.

    Args:
        model: the model that is trained.
        decay: weight of the average so far in each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.values = {name: value.clone() for name, value in self._current().items()}
        self._blend = get_ema_multi_avg_fn(decay)

    def _current(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.model.state_dict().items() if value.is_floating_point()}

    def update(self) -> None:
        """Take a step of the model in."""
        ours, now = ([*map(local, values.values())] for values in (self.values, self._current()))
        self._blend(ours, now, 1)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """With the average in place of the model's own values."""
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
        """The average, to save."""
        return {name: full(value).cpu() for name, value in self.values.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what was saved."""
        for name, value in self.values.items():
            saved = state[name].to(value.device)
            if isinstance(value, DTensor):
                saved = distribute_tensor(saved, value.device_mesh, value.placements)
            value.copy_(saved)


OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole states of a model and an optimizer, on the CPU; all processes must ask, and the first gets them."""
    weights, steps = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": weights, "optimizer": steps}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put whole states, which every process has, into a model and an optimizer."""
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


def leave() -> None:
    """Part with the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
