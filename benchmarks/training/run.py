"""Train a ResNet with dense or tensor-network convolutions: python benchmarks/train.py --config configs/digits-tr.yaml.

Several presets are the arms of a comparison, and with --seeds each arm runs once per seed:

    python benchmarks/train.py --config configs/digits-dense.yaml configs/digits-tr.yaml --seeds 0 1 2 \
        --results benchmarks/results/digits.csv --overwrite

Every other flag overrides the presets. Accuracy is that of the last epoch: none is picked by looking at test images.

On several processes the same command runs under a launcher, with the same losses but for rounding:

    torchrun --nproc-per-node 8 benchmarks/train.py --config configs/cifar10-tr.yaml

Each takes its part of every batch; batch_size is of all together. With --shard they share the parameters out too. The
first process writes, and reads the checkpoint for all.

A run that was killed goes on from its last checkpoint with --resume, to the same numbers as if it had not been. SIGTERM
and SIGHUP end it after the step or the evaluation it is in, with a checkpoint and with exit code 128 + the signal's
number. Several processes end together, where their losses are added up: REPORT_EVERY steps later at most.
"""

import csv
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import engine
import large
import tnlayers
from atomic import WriteError, about_writing, check, remove_unfinished, write
from config import Config, ConfigError
from data import Batches, DataError, ImageData, Part, draws, load
from provenance import provenance, read_csv, write_csv

REPORT_EVERY = 10  # steps; each report waits for the device
EVALUATION_BATCH = 1000  # images
NOTHING = "nothing was trained"


class RunError(Exception):
    """A run that cannot start or go on; the message is one sentence."""


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        config: what was run.
        model: the trained network.
        history: one row per epoch, as in metrics.csv.
    """

    config: Config
    model: nn.Module
    history: Sequence[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        """Accuracy after the last epoch."""
        return self.history[-1]["accuracy"]

    @property
    def row(self) -> dict[str, Any]:
        """The run as a row of a results file."""
        last = self.history[-1]
        return {
            "arm": self.config.arm,
            **self.config.experiment,
            **size(self.model),
            **{key: value for key, value in last.items() if key not in ("epoch", "lr")},
            "seconds": round(sum(row["seconds"] for row in self.history), 1),
        }


def convolutions(model: nn.Module) -> list[nn.Module]:
    """The convolutions of a network, dense or not, by depth."""
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, tnlayers.TensorLayer))]


def size(model: nn.Module) -> dict[str, float]:
    """Parameters, what they would be with dense convolutions, and the keep ratio of the convolutions together."""
    parameters = numel(model)
    cores = sum(numel(conv) for conv in convolutions(model))
    kernels = sum(  # no convolution has a bias
        conv.network.dense_params if isinstance(conv, tnlayers.TensorLayer) else conv.weight.numel()
        for conv in convolutions(model)
    )
    return {
        "parameters": parameters,
        "dense_parameters": parameters - cores + kernels,
        "keep_ratio": round(cores / kernels, 4),
    }


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _device(name: str) -> torch.device:
    try:
        if name == "meta":
            raise RuntimeError("it holds no numbers")
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # AssertionError: this build of torch has no CUDA
        raise ConfigError(f"device is {name!r}, which cannot be used here: {str(error).splitlines()[0]}") from error


def _processes(config: Config) -> Accelerator:
    return engine.processes(_device(config.device).type == "cpu")


def batches(config: Config, data: Any) -> tuple[int, int]:
    """Images in a step, and steps in an epoch.

    Raises:
        ConfigError, DataError: there are fewer images than the configuration asks for.
    """
    if not data.count:
        raise DataError(f"{config.dataset} has no training images")
    held_out = ", which leaves out those to validate on" if config.split == "validation" else ""
    if config.images is not None and config.images > data.count:
        raise ConfigError(f"images is {config.images}, but there are {data.count} to train on{held_out}")
    count = config.images or data.count
    if config.batch_size > count:
        few = "images is" if config.images else "the number of training images is"
        raise ConfigError(f"batch_size is {config.batch_size}, but {few} {count}{'' if config.images else held_out}")
    return config.batch_size, count // config.batch_size  # which images are left over changes from epoch to epoch


def checkpoint(config: Config) -> Path:
    """The file that --resume goes on from."""
    return config.directory / "checkpoint.pt"


def check_new(config: Config) -> None:
    """Refuse to begin anew where a run could go on.

    Raises:
        ConfigError: there is a checkpoint, and neither resume nor overwrite.
    """
    if os.path.exists(checkpoint(config)) and not config.resume and not config.overwrite:
        raise ConfigError(
            f"{checkpoint(config)} is there from an earlier run: go on from it with --resume, keep it with another "
            "--name or --out, or remove it with --overwrite"
        )


def prepare(config: Config) -> None:
    """See to it that a run's directory can take its files, and keeps nothing that the run would mistake for its own.

    Raises:
        ConfigError: there is a checkpoint that would be lost.
        WriteError: it cannot.
    """
    check_new(config)
    for path in (checkpoint(config), config.directory / "metrics.csv"):
        check(path, "a file of the run")
    remove_unfinished(config.directory)


class Run:
    """A training run, one epoch at a time, with checkpoints to go on from.

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
        processes = _processes(config)
        device = processes.device if processes.num_processes > 1 else _device(config.device)
        try:
            config.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out is {config.out}, where {config.directory} cannot be made: {error}") from error
        data = (read_data(config) if data is None else data).to(device)
        batches(config, data)
        engine.first(processes, partial(prepare, config))
        self._begin(config, data, config.network(data.channels, data.num_classes).to(device))
        if config.resume:
            self._restore()
        elif config.overwrite:  # now that nothing else can be wrong
            engine.first(processes, self._remove_checkpoint)

    def _begin(
        self,
        config: Config,
        data: Any,
        model: nn.Module,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        """Everything at its beginning, with groups for the optimizer: all that has two axes decays if none are told."""
        self.config, self.data, self.device = config, data, data.device
        self.processes = engine.processes(self.device.type == "cpu")
        self.part = Part(self.processes.process_index, self.processes.num_processes)
        self.normalise = data.normaliser()
        self.batch_size, self.steps = batches(config, data)
        if self.batch_size % self.part.world:
            raise ConfigError(
                f"batch_size is {self.batch_size}, but {self.part.world} processes need a multiple of their number"
            )
        self._place(model)
        if groups is None:
            matrices = [p for p in self.model.parameters() if p.ndim > 1]
            vectors = [p for p in self.model.parameters() if p.ndim <= 1]  # normalisation and biases
            groups = [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
        if config.optimizer == "sgd":
            sgd = torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.momentum > 0)
            self.optimizer: torch.optim.Optimizer = sgd
        else:
            self.optimizer = torch.optim.AdamW(groups, config.lr, (config.momentum, 0.999))
        self.scheduler = self._schedule()
        # For half precision, if Accelerate has it on. Prepared by Accelerate, it would be kept after the run.
        self.scaled = AcceleratedOptimizer(self.optimizer, device_placement=False, scaler=self.processes.scaler)
        self.average = engine.Average(self.model, config.ema) if config.ema else None
        self.history: list[dict[str, Any]] = []
        self.ending = False  # whether any process was asked to end, as all of them know
        self._start_epoch()

    def _place(self, model: nn.Module) -> None:
        """The model as it is, and as it is trained: with the other processes, in its layout of memory, compiled."""
        self.image_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d) and not self.config.shard:  # FSDP2 cuts contiguous tensors alone
                conv.to(memory_format=self.image_format)
        if self.part.world > 1 and self.config.sync_norm:
            model = engine.synced(model, self.device)
        if self.config.compile:
            model.compile()
        self.model = self.trained = model
        if self.config.shard:
            if self.part.world == 1:
                raise ConfigError("shard is True, but there is one process: start several, as with torchrun")
            engine.sharded(model)
        elif self.part.world > 1:
            self.trained = engine.copies(model, self.device)

    def _schedule(self) -> Any:
        steps = self.config.epochs * self.steps
        if self.config.schedule == "cosine":
            return torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        rates, momentum = [group["lr"] for group in self.optimizer.param_groups], self.config.momentum
        return torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rates, steps + 1, pct_start=max(self.config.warmup, 2 / (steps + 1)),
            base_momentum=0.85 / 0.95 * momentum, max_momentum=momentum,
        )  # fmt: skip

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

    @property
    def images(self) -> int:
        """Images in all epochs together."""
        return self.config.epochs * self.steps * self.batch_size

    @property
    def images_done(self) -> int:
        """Images trained on so far."""
        return (len(self.history) * self.steps + self.step) * self.batch_size

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) == self.config.epochs

    def epoch(self, report: Callable[..., Any] = lambda **_: None) -> None:
        """Train for one epoch, or for what is left of it, evaluate, write metrics.csv and the checkpoint.

        Args:
            report: called now and then with advance= (images), epoch=, and this epoch's training loss= and accuracy=.

        Raises:
            RunError: the loss is no longer a number.
            WriteError: a file cannot be written; the last checkpoint is still there.
            engine.Ended: a signal has asked for it; the checkpoint is written.
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

    def finish(self, report: Callable[..., Any] = lambda **_: None) -> Result:
        """Train to the end. For the arguments and exceptions, see epoch."""
        while not self.finished:
            self.epoch(report)
        return Result(self.config, self.model, self.history)

    def _start_epoch(self) -> None:
        self.step, self.seconds, self.lr = 0, 0.0, self.scheduler.get_last_lr()[0]
        # Of the losses and of the right answers, in this process.
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def _train_epoch(self, report: Callable[..., Any]) -> tuple[float, float]:
        self.started = time.perf_counter() - self.seconds
        self.model.train()
        epoch, reported, config = len(self.history) + 1, self.step, self.config
        batches = Batches(self.batch_size, self.step, self.steps, config.seed, epoch, config.augment, self.part)
        for images, labels in self.data.training(batches):
            self.image_shape = images.shape[1:]
            mixed, targets = self._mix(images, labels, epoch)
            logits = self._logits(mixed, self.trained)
            loss = self._loss(mixed, logits, targets)
            self.scaled.zero_grad()
            self.processes.backward(loss)
            if config.clip is not None:
                self.processes.unscale_gradients(self.scaled)
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            self.scaled.step()
            self.scheduler.step()
            if self.average:
                self.average.update()
            correct = (logits.detach().argmax(1) == labels).sum()
            self.sums += torch.stack([loss.detach() * len(labels), correct]).to(self.sums)
            self.step += 1
            last = self.step == self.steps
            asked = self.part.world == 1 and engine.signals.came  # several processes agree in _total
            saving = not last and (asked or (config.save_every and self.step % config.save_every == 0))
            if self.step % REPORT_EVERY == 0 or last or saving:
                mean_loss, accuracy = (self._total(self.sums) / (self.step * self.batch_size)).tolist()
                if not math.isfinite(mean_loss):
                    raise self._lost(f"the loss is {mean_loss} in epoch {epoch}")
                done = (self.step - reported) * self.batch_size
                report(advance=done, epoch=epoch, loss=mean_loss, accuracy=accuracy)
                reported = self.step
            if saving or (self.ending and not last):
                self.seconds = time.perf_counter() - self.started
                self._save()
            if self.ending and not last:
                raise self._ended()
        self._start_epoch()
        return mean_loss, accuracy

    def _lost(self, what: str) -> RunError:
        return RunError(f"{self.config.arm}: {what}: try a smaller --lr; {self._there}")

    def _ended(self) -> engine.Ended:
        return engine.Ended(engine.signals.came or signal.SIGTERM)  # the second where another process got it

    def _total(self, values: Tensor) -> Tensor:
        """The sum over all processes, which agree here whether to end: the same step is the end of all.

        It is taken where the device is waited for anyway, so that this costs no step more than one number in it.
        """
        asked = bool(engine.signals.came)
        if self.part.world == 1:
            self.ending = asked
            return values
        total: Tensor = self.processes.reduce(torch.cat([values.flatten(), values.new_tensor([asked])]), "sum")
        self.ending = total[-1].item() > 0
        return total[:-1].view_as(values)

    def _mix(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Images with boxes of others (CutMix), and the shares of the labels; or both as they are."""
        if not self.config.cutmix:
            return images, labels
        generator = draws(self.config.seed, epoch, self.step, 1)
        wanted, keep, down, right = torch.rand(4, generator=generator).tolist()
        if wanted >= self.config.cutmix:
            return images, labels
        sizes = [round(math.sqrt(1 - keep) * size) for size in images.shape[2:]]
        top, left = (
            round(a * size) - b // 2 for a, size, b in zip((down, right), images.shape[2:], sizes, strict=True)
        )
        box = (..., slice(max(0, top), max(0, top + sizes[0])), slice(max(0, left), max(0, left + sizes[1])))
        images, others = images.clone(), images.roll(1, 0)  # the order of a batch is random
        images[box] = others[box]
        share = images[box].shape[2:].numel() / images.shape[2:].numel()
        one, other = (F.one_hot(which, self.data.num_classes).float() for which in (labels, labels.roll(1)))
        return images, (1 - share) * one + share * other

    def _loss(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)

    def _evaluate(self) -> tuple[float, float]:
        self.model.eval()
        self._share_statistics()
        size = EVALUATION_BATCH if isinstance(self.data, ImageData) else self.batch_size // self.part.world
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        inference = torch.no_grad() if self.config.shard else torch.inference_mode()
        with self.average.applied() if self.average else nullcontext(), inference:
            for images, labels in self._in_step(self.data.evaluation(size, self.part)):
                logits = self._logits(images, self.model)[: len(labels)]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([loss, (logits.argmax(1) == labels).sum(), loss.new_tensor(len(labels))]).to(sums)
        loss, correct, count = self._total(sums).tolist()
        if not count:
            raise RunError(f"{self.config.dataset} has no images to evaluate on")
        return loss / count, correct / count

    def _in_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; where parameters are sharded, as many as any process has, because all must gather them."""
        if not self.config.shard:
            yield from batches
            return
        while True:
            batch = next(batches, None)
            if not self._total(torch.tensor(float(batch is not None), device=self.device)):
                return
            blank = torch.zeros(1, *self.image_shape, device=self.device)
            yield (blank, torch.zeros(0, dtype=torch.int64, device=self.device)) if batch is None else batch

    def _logits(self, images: Tensor, model: nn.Module) -> Tensor:
        images = self.normalise(images).contiguous(memory_format=self.image_format)
        ours = torch.autocast(self.device.type, torch.bfloat16) if self.config.amp else nullcontext()
        with self.processes.autocast(), ours:  # the first does something if Accelerate has it on
            logits: Tensor = model(images)
        return logits.float()

    def _lr_factor(self, step: int) -> float:
        """Share of the learning rate: up along a line, down along half a cosine."""
        steps = self.config.epochs * self.steps
        warmup = round(self.config.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    saved = ""  # after what the last checkpoint was made

    def _share_statistics(self) -> None:
        """Where processes have running statistics of their own, one for all: what is evaluated and saved."""
        if self.part.world > 1 and not self.config.sync_norm:
            engine.share_(self.model.buffers())
            if self.average:
                names = {name for name, _ in self.model.named_buffers()}
                engine.share_(value for name, value in self.average.values.items() if name in names)

    def _check_weights(self, epoch: int) -> None:
        values = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        if not torch.stack([engine.full(value).isfinite().all() for value in values]).all():
            raise self._lost(f"a weight is no number in epoch {epoch}")

    def _save(self) -> None:
        """Write the checkpoint, whole or not at all; never one of a network that is lost."""
        if self.step:  # at the end of an epoch, both were done when it was evaluated
            self._share_statistics()
            self._check_weights(len(self.history) + 1)
        sums = self._total(self.sums).cpu()
        state = engine.save(self.model, self.optimizer) | {
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
            engine.first(self.processes, act)
        except WriteError as error:
            raise WriteError(f"{self.config.arm}: {error}; {self.way_on}") from error

    def _note_saved(self) -> None:
        self.saved = f"epoch {len(self.history)}" + (f" and {self.step} steps" if self.step else "")

    @property
    def _streams(self) -> list[int] | None:
        """Processes and workers, where the order of the images depends on them."""
        return [self.part.world, self.data.workers] if isinstance(self.data, large.Shards) else None

    def _restore(self) -> None:
        state = engine.first(self.processes, self._read_checkpoint)
        if state is None:
            return
        engine.restore(self.model, self.optimizer, state)
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


def tensorboard() -> Any:
    """The writer for TensorBoard.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ConfigError("tensorboard is True, but it is not installed: pip install tensorboard") from error


def read_data(config: Config) -> Any:
    """The data set of a run.

    Raises:
        DataError: it cannot be had.
    """
    with _processes(config).local_main_process_first():  # which may download
        if config.dataset in large.DATASETS:
            sizes = {name: getattr(config, name) for name in ("image_size", "workers", "images", "classes")}
            data: Any = large.DATASETS[config.dataset](config.data_dir, **sizes)
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


class _Speed(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} img/s", style="progress.data.speed")


def progress_bars(console: Console, disable: bool = False) -> Progress:
    """A bar per run, with epoch, training loss and accuracy, images per second, and the time that remains."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        _Speed(),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        disable=disable,
    )


def progress_bar(progress: Progress, run: Run) -> Callable[..., None]:
    """A new bar for a run; what is returned is to be its report function."""
    name = f"{run.config.arm} seed {run.config.seed}"
    task = progress.add_task(name, total=run.images, completed=run.images_done, status="")

    def report(advance: int, epoch: int, loss: float, accuracy: float) -> None:
        progress.update(task, advance=advance, status=f"epoch {epoch:2d}  loss {loss:.3f}  acc {accuracy:6.1%}")

    return report


def table(results: Sequence[Result]) -> Table:
    """One line per run."""
    splits = " or ".join(sorted({result.config.split for result in results}))
    table = Table("run", "accuracy", "parameters", "keep ratio", "seconds", title=f"accuracy on the {splits} images")
    for result in results:
        row = result.row
        table.add_row(
            result.config.directory.name,
            f"{row['accuracy']:.2%}",
            f"{row['parameters']:,}",
            f"{row['keep_ratio']:.3f}",
            f"{row['seconds']:.0f}",
        )
    return table


@dataclass(frozen=True)
class Command:
    """Train a ResNet with dense or tensor-network convolutions."""

    config: tuple[Path, ...] = ()
    """YAML presets, one per arm; the other flags override them."""
    seeds: tuple[int, ...] | None = None
    """Run every arm once with each of these, in place of --seed."""
    results: Path | None = None
    """CSV file for one row per run."""
    run: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)

    @property
    def runs(self) -> list[Config]:
        """One per seed.

        Raises:
            ConfigError: a seed is there twice or negative, or there is none.
        """
        if self.seeds is None:
            return [self.run]
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise ConfigError(f"seeds is {[*self.seeds]}, but one at least is needed, and none twice")
        return [replace(self.run, seed=seed) for seed in self.seeds]


def parse(arguments: Sequence[str] | None) -> list[Command]:
    """One command per preset; a single one without any."""

    def presets(config: tuple[Path, ...] = ()) -> tuple[Path, ...]:
        return config

    # Presets take the place of the defaults, so they are read before the other flags are looked at.
    paths, _ = tyro.cli(presets, args=arguments, return_unknown_args=True, add_help=False)
    defaults = [Command(run=Config.from_yaml(path)) for path in paths] or [Command()]
    return [tyro.cli(Command, args=arguments, default=default) for default in defaults]


def check_distinct(commands: Sequence[Command]) -> None:
    """Refuse two runs that would write to one directory and count as two seeds of one arm.

    Raises:
        ConfigError: there are such runs.
    """
    taken: set[Path] = set()
    for run in (run for command in commands for run in command.runs):
        if run.directory in taken:
            raise ConfigError(
                f"arm {run.arm} with seed {run.seed} is there twice: name the presets apart (name: in the YAML)"
            )
        taken.add(run.directory)


def check_files(commands: Sequence[Command]) -> None:
    """Refuse, before anything is trained, what would lose a checkpoint, or results.

    Raises:
        ConfigError: a checkpoint would be lost.
        WriteError: --results cannot be written.
    """
    for command in commands:
        if command.results is not None:
            check(command.results, "results")
            check_kept(command.results, [run for each in commands for run in each.runs])
        for run in command.runs:
            check_new(run)


def check_kept(path: Path, runs: Sequence[Config]) -> None:
    """Refuse to replace the rows of other runs.

    Raises:
        ConfigError: the file has rows, and neither overwrite is asked for, nor resume by the runs that they are of.
    """
    if not path.is_file() or not path.stat().st_size or all(run.overwrite for run in runs):
        return
    mine = {(run.arm, str(run.seed)) for run in runs if run.resume}
    try:
        rows = {(row.get("arm"), row.get("seed")) for row in read_csv(path)}
    except (UnicodeDecodeError, csv.Error):  # no table
        rows = {(None, None)}
    if not rows <= mine:
        raise ConfigError(
            f"results is {path}, which has rows of other runs: choose another file, or replace them with --overwrite"
        )


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write a row per run.

    Raises:
        WriteError: the file cannot be written.
    """
    try:
        write_csv(path, [result.row for result in results])
    except WriteError as error:
        raise WriteError(
            f"{error}; the same command with --resume trains nothing again that is in a checkpoint"
        ) from error


@engine.signals.obeyed()
def main(arguments: Sequence[str] | None = None) -> None:
    console = Console()
    results: list[Result] = []
    run: Run | None = None
    try:
        commands = parse(arguments)
        check_distinct(commands)
        processes = _processes(commands[0].run)
        engine.first(processes, partial(check_files, commands))
        sets = [read_data(command.run) for command in commands]
        for command, data in zip(commands, sets, strict=True):  # all of them, before the first is trained
            batches(command.run, data)
            with torch.device("meta"):
                command.run.network(data.channels, data.num_classes)
        main_process = processes.is_main_process
        with progress_bars(console, disable=not main_process) as progress, engine.signals.noted():
            for command, data in zip(commands, sets, strict=True):
                for config in command.runs:
                    run = Run(config, data)
                    if config.resume and main_process:
                        told = f"{config.directory.name}: {run.beginning}"
                        progress.console.print(told, markup=False, highlight=False, soft_wrap=True)
                    results.append(run.finish(progress_bar(progress, run)))
                    if command.results is not None:
                        engine.first(processes, partial(write_results, command.results, results))
        if main_process:
            console.print(table(results))
        processes.wait_for_everyone()
    except (ConfigError, DataError, RunError, WriteError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # of what is read, or of the standard output
        sys.exit(f"error: {error}; {run.way_on if run else NOTHING}")
    except KeyboardInterrupt:
        _leave("interrupted", signal.SIGINT, run)
    except engine.Ended as ended:
        _leave(f"ended by {ended.signal.name}", ended.signal, run)
    finally:
        engine.leave()


def _leave(why: str, number: signal.Signals, run: Run | None) -> NoReturn:
    """Exit as a shell says that a signal ended a program, with a sentence."""
    if run is None or run.processes.is_main_process:
        print(f"{why}: {run.way_on if run else NOTHING}", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
