"""A training run: its network, its data, its files and its checkpoints."""

import io
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.common.atomic import WriteError, about_writing, write
from benchmarks.common.errors import ConfigError, RunError
from benchmarks.common.provenance import provenance, write_csv
from benchmarks.training import distributed
from benchmarks.training.config import Config
from benchmarks.training.data import on_disk
from benchmarks.training.data.in_memory import load
from benchmarks.training.loop import Loop, batches
from benchmarks.training.records import Result, checkpoint, prepare, tensorboard


def device_of(name: str) -> torch.device:
    try:
        if name == "meta":
            raise RuntimeError("it holds no numbers")
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # AssertionError: this build of torch has no CUDA
        raise ConfigError(f"device is {name!r}, which cannot be used here: {str(error).splitlines()[0]}") from error


def processes_of(config: Config) -> Accelerator:
    return distributed.processes(device_of(config.device).type == "cpu")


class Run(Loop):
    """Train as a configuration says, with files of what is measured and with checkpoints to go on from.

    Args:
        config: what to run.
        data: its data set, where that was read before.

    Raises:
        ConfigError, DataError: the network, the data or the device cannot be had.
        ConfigError: there is a checkpoint, and the configuration says neither resume nor overwrite.
        RunError: the checkpoint to resume from is of another run.
        WriteError: the run's files cannot be written.
    """

    def __init__(self, config: Config, data: Any = None) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.tensorboard:
            tensorboard()
        torch.backends.cudnn.deterministic = True
        processes = processes_of(config)
        device = processes.device if processes.num_processes > 1 else device_of(config.device)
        try:
            config.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out is {config.out}, where {config.directory} cannot be made: {error}") from error
        data = (read_data(config) if data is None else data).to(device)
        batches(config, data)
        distributed.first(processes, partial(prepare, config))
        super().__init__(config, data, config.network(data.channels, data.num_classes).to(device))
        if config.resume:
            self._restore()
        elif config.overwrite:  # now that nothing else can be wrong
            distributed.first(processes, self._remove_checkpoint)

    @property
    def checkpoint(self) -> Path:
        """The file that --resume goes on from."""
        return checkpoint(self.config)

    @property
    def way_on(self) -> str:
        """What is there to go on from."""
        return f"{self._there}{': --resume goes on from it' if self.saved else ''}"

    @property
    def beginning(self) -> str:
        """Where a run that may go on begins."""
        if self.finished:
            return f"is finished, its result is that of {self.checkpoint}"
        return f"goes on after {self.saved}" if self.saved else "there is no checkpoint, it begins anew"

    @property
    def _there(self) -> str:
        if not self.saved:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.checkpoint}, after {self.saved}"

    def epoch(self, report: Callable[..., Any] = lambda **_: None) -> None:
        """Train for one epoch, or for what is left of it, evaluate, write metrics.csv and the checkpoint.

        Args:
            report: called now and then with advance= (images), epoch=, and this epoch's training loss= and accuracy=.

        Raises:
            RunError: the loss is no longer a number.
            WriteError: a file cannot be written; the last checkpoint is still there.
            distributed.Ended: a signal has asked for it; the checkpoint is written.
        """
        lr = self.lr
        train_loss, train_accuracy = self._train_epoch(report)
        loss, accuracy = self._evaluate()
        if not math.isfinite(loss):
            raise self._lost(f"the loss on images not trained on is {loss} after epoch {len(self.history) + 1}")
        self._check_weights(len(self.history) + 1)
        self.history.append(
            {
                "epoch": len(self.history) + 1,
                "lr": lr,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "loss": loss,
                "accuracy": accuracy,
                "seconds": round(time.perf_counter() - self.started, 2),
                "precision": "bf16" if self.config.amp else self.processes.mixed_precision,
                "processes": self.part.world,
                **provenance(self.config.device),
            }
        )
        self._write(self._record)
        self._save()
        if self.ending and not self.finished:
            raise self._ended()

    def _check_weights(self, epoch: int) -> None:
        values = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        if not torch.stack([distributed.full(value).isfinite().all() for value in values]).all():
            raise self._lost(f"a weight is no number in epoch {epoch}")

    def _save(self) -> None:
        """Write the checkpoint, whole or not at all; never one of a network that is lost."""
        if self.step:  # at the end of an epoch, both were done when it was evaluated
            self._share_statistics()
            self._check_weights(len(self.history) + 1)
        sums = self._total(self.sums).cpu()
        state = distributed.save(self.model, self.optimizer) | {
            "average": self.average.state() if self.average else None,
            "config": self._identity,
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "step": self.step,
            "sums": sums,
            "seconds": self.seconds,
            "lr": self.lr,
            "streams": self._streams,
        }
        self._write(partial(self._write_checkpoint, state))
        self._note_saved()

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()  # into a file, what torch.save raises where that is full depends on where it was
        torch.save(state, content)
        write(self.checkpoint, content.getbuffer())

    def _record(self) -> None:
        """Write metrics.csv, and for TensorBoard."""
        write_csv(self.config.directory / "metrics.csv", self.history)
        if self.config.tensorboard:
            with about_writing(self.config.directory / "events.*"):
                self._tensorboard()

    def _write(self, act: Callable[[], None]) -> None:
        """Let the first process write; that it cannot ends the run in all."""
        try:
            distributed.first(self.processes, act)
        except WriteError as error:
            raise WriteError(f"{self.config.arm}: {error}; {self.way_on}") from error

    def _note_saved(self) -> None:
        self.saved = f"epoch {len(self.history)}" + (f" and {self.step} steps" if self.step else "")

    @property
    def _streams(self) -> list[int] | None:
        """Processes and workers, where the order of the images depends on them."""
        return [self.part.world, self.data.workers] if isinstance(self.data, on_disk.Shards) else None

    def _restore(self) -> None:
        state = distributed.first(self.processes, self._read_checkpoint)
        if state is None:
            return
        distributed.restore(self.model, self.optimizer, state)
        if self.average:
            self.average.restore(state["average"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history, self.step, self.seconds, self.lr = (state[name] for name in ("history", "step", "seconds", "lr"))
        self.sums = (state["sums"] if self.processes.is_main_process else torch.zeros(2)).to(self.sums)
        self._note_saved()

    def _remove_checkpoint(self) -> None:
        with about_writing(self.checkpoint):
            self.checkpoint.unlink(missing_ok=True)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            theirs, streams = state["config"], state["streams"]
        except Exception as error:  # a damaged file can raise anything
            reason = next(iter(str(error).splitlines()), "")
            raise RunError(f"{self.checkpoint} is not a checkpoint of this script, or damaged: {reason}") from error
        if state["step"] and streams != self._streams:
            raise RunError(
                f"{self.checkpoint} is from the middle of an epoch with {streams} processes and workers, but this run "
                f"has {self._streams}: with others, shards give other batches"
            )
        ours = self._identity
        odd = [name for name in {**theirs, **ours} if name not in theirs or theirs[name] != ours.get(name)]
        if odd:
            was, has = (
                " and ".join(f"{name} {fields.get(name, 'unknown')}" for name in odd) for fields in (theirs, ours)
            )
            why = " (the learning rate follows a schedule over all epochs)" if "epochs" in odd else ""
            raise RunError(
                f"{self.checkpoint} was made with {was}, but this run has {has}{why}: go on with what it "
                "was made with, or begin another run with another --name or --out"
            )
        return state

    @property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in: with all of it equal, a run goes on to the same numbers."""
        data = {"training images": self.data.count, "labels": self.data.num_classes}
        return self.config.experiment | data

    def _tensorboard(self) -> None:
        told = threading.excepthook
        # The writer's thread shows what it cannot write, and so does the writer: once is enough.
        threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else told(failed)
        try:
            with tensorboard().SummaryWriter(self.config.directory) as writer:
                for name, value in self.history[-1].items():
                    if isinstance(value, int | float) and name != "epoch":
                        writer.add_scalar(name, value, self.history[-1]["epoch"])
        finally:
            threading.excepthook = told


def read_data(config: Config) -> Any:
    """The data set of a run.

    Raises:
        DataError: it cannot be had.
    """
    with processes_of(config).local_main_process_first():  # which may download
        if config.dataset in on_disk.DATASETS:
            sizes = {name: getattr(config, name) for name in ("image_size", "workers", "images", "classes")}
            data: Any = on_disk.DATASETS[config.dataset](config.data_dir, **sizes)
        else:
            data = load(config.dataset, config.data_dir, config.download)
    return data if config.split == "test" else data.validation()


def train(config: Config, report: Callable[..., Any] = lambda **_: None) -> Result:
    """Train to the end.

    Args:
        config: what to run.
        report: see Run.epoch.

    Raises:
        ConfigError, DataError, RunError, WriteError: it cannot start or go on.
    """
    return Run(config).finish(report)
