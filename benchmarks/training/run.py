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
from benchmarks.training.teacher import read_teacher


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
    """Training by a configuration, with metrics files and checkpoints.

    Args:
        config: the configuration of the run.
        data: its data set, if already read.

    Raises:
        ConfigError, DataError: the network, the data or the device is not available.
        ConfigError: there is a checkpoint, and the configuration sets neither resume nor overwrite.
        RunError: the checkpoint to resume from belongs to another run.
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
        teacher = read_teacher(config.teacher, config.distil, config.dataset, data) if config.teacher else None
        super().__init__(config, data, config.network(data.channels, data.num_classes).to(device), teacher=teacher)
        if config.resume:
            self._restore()
        elif config.overwrite:  # last, after all checks
            distributed.first(processes, self._remove_checkpoint)

    @property
    def checkpoint(self) -> Path:
        """The file that --resume continues from."""
        return checkpoint(self.config)

    @property
    def way_on(self) -> str:
        """The checkpoint to continue from, in words."""
        return f"{self._there}{': --resume goes on from it' if self.saved else ''}"

    @property
    def beginning(self) -> str:
        """The point where a resumed run begins, in words."""
        if self.finished:
            return f"is finished, its result is that of {self.checkpoint}"
        return f"goes on after {self.saved}" if self.saved else "there is no checkpoint, it begins anew"

    @property
    def _there(self) -> str:
        if not self.saved:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.checkpoint}, after {self.saved}"

    def epoch(self, report: Callable[..., Any] = lambda **_: None) -> None:
        """Train for one epoch, or for the rest of it. Evaluate, and write metrics.csv and the checkpoint.

        Args:
            report: called regularly with advance= (images), epoch=, and this epoch's training loss= and accuracy=.

        Raises:
            RunError: the loss or a weight is not finite.
            WriteError: a file cannot be written. The last checkpoint is unchanged.
            distributed.Ended: a signal came. The checkpoint is written.
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
        """Write the checkpoint atomically, but not if a weight is not finite."""
        if self.step:  # at the end of an epoch, the evaluation has already done both
            self._share_statistics()
            self._check_weights(len(self.history) + 1)
        sums = self._total(self.sums).cpu()
        state = distributed.save(self.model, self.optimizer) | {
            "average": self.average.state() if self.average else None,
            "ranks": self.ranks.ranks if self.ranks else None,
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
        content = io.BytesIO()  # torch.save to a full disk raises various errors, depending on the position
        torch.save(state, content)
        write(self.checkpoint, content.getbuffer())

    def _record(self) -> None:
        """Write metrics.csv, and TensorBoard's file."""
        write_csv(self.config.directory / "metrics.csv", self.history)
        if self.config.tensorboard:
            with about_writing(self.config.directory / "events.*"):
                self._tensorboard()

    def _write(self, act: Callable[[], None]) -> None:
        """Write in the first process. If it fails, the run ends in all processes."""
        try:
            distributed.first(self.processes, act)
        except WriteError as error:
            raise WriteError(f"{self.config.arm}: {error}; {self.way_on}") from error

    def _note_saved(self) -> None:
        self.saved = f"epoch {len(self.history)}" + (f" and {self.step} steps" if self.step else "")

    @property
    def _streams(self) -> list[int] | None:
        """Numbers of processes and workers, if the order of the images depends on them."""
        return [self.part.world, self.data.workers] if isinstance(self.data, on_disk.Shards) else None

    def _restore(self) -> None:
        state = distributed.first(self.processes, self._read_checkpoint)
        if state is None:
            return
        if self.ranks:
            self.ranks.restore(state["ranks"], self.optimizer)
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
        """Return the checkpoint, if there is one."""
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
        """Values that must equal those of a checkpoint. If they do, a resumed run gives the same numbers."""
        data = {"training images": self.data.count, "labels": self.data.num_classes}
        return self.config.experiment | data

    def _tensorboard(self) -> None:
        told = threading.excepthook
        # Both the writer and its thread report a failed write. Suppress the thread's report.
        threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else told(failed)
        try:
            with tensorboard().SummaryWriter(self.config.directory) as writer:
                for name, value in self.history[-1].items():
                    if isinstance(value, int | float) and name != "epoch":
                        writer.add_scalar(name, value, self.history[-1]["epoch"])
        finally:
            threading.excepthook = told


def read_data(config: Config) -> Any:
    """Return the data set of a run.

    Raises:
        DataError: the data set is not available.
    """
    with processes_of(config).local_main_process_first():  # it may download files
        if config.dataset in on_disk.DATASETS:
            sizes = {name: getattr(config, name) for name in ("image_size", "workers", "images", "classes")}
            data: Any = on_disk.DATASETS[config.dataset](config.data_dir, **sizes)
        else:
            data = load(config.dataset, config.data_dir, config.download)
    return data if config.split == "test" else data.validation(config.held_out)


def train(config: Config, report: Callable[..., Any] = lambda **_: None) -> Result:
    """Train to the end.

    Args:
        config: the configuration of the run.
        report: see Run.epoch.

    Raises:
        ConfigError, DataError, RunError, WriteError: the run cannot start or continue.
    """
    return Run(config).finish(report)
