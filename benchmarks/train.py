"""Train a ResNet with dense or tensor-network convolutions: python benchmarks/train.py --config configs/digits-tr.yaml.

Several presets are the arms of a comparison, and with --seeds each arm runs once per seed:

    python benchmarks/train.py --config configs/digits-dense.yaml configs/digits-tr.yaml --seeds 0 1 2 \
        --results benchmarks/results/digits.csv

Every other flag overrides the presets. Accuracy is that of the last epoch: none is picked by looking at test images.

On several processes the same command runs under a launcher, with the same losses but for rounding:

    torchrun --nproc-per-node 8 benchmarks/train.py --config configs/cifar10-tr.yaml

Each takes its part of every batch; batch_size is of all together. With --shard they share the parameters out too. The
first process writes, and reads the checkpoint for all. A run that was killed goes on from its last checkpoint with
--resume, to the same numbers as if it had not been.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import engine
import large
import tnlayers
from atomic import replacing
from config import Config, ConfigError
from data import Batches, DataError, ImageData, Part, draws, load
from provenance import provenance, write_csv

REPORT_EVERY = 10  # steps; each report waits for the device
EVALUATION_BATCH = 1000  # images


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


class Run:
    """A training run, one epoch at a time, with checkpoints to go on from.

    Args:
        config: what to run.
        data: its data set, where that was read before.

    Raises:
        ConfigError, DataError: the network, the data or the device cannot be had.
        RunError: the checkpoint to resume from is of another run.
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
        self._begin(config, data, config.network(data.channels, data.num_classes).to(device))
        if config.resume:
            self._restore()

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
        count = min(config.images or data.count, data.count)
        if not count:
            raise DataError(f"{config.dataset} has no training images")
        self.batch_size = min(config.batch_size, count)
        if self.batch_size % self.part.world:
            raise ConfigError(
                f"batch_size is {self.batch_size}, of {count} images, but {self.part.world} processes need a multiple "
                "of their number"
            )
        self.steps = count // self.batch_size  # per epoch; which images are left over changes from epoch to epoch
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
        return self.config.directory / "checkpoint.pt"

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
        if self.processes.is_main_process:
            write_csv(self.config.directory / "metrics.csv", self.history)
            if self.config.tensorboard:
                self._tensorboard()
        self._save()

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
            saving = config.save_every and self.step % config.save_every == 0 and self.step < self.steps
            if self.step % REPORT_EVERY == 0 or self.step == self.steps or saving:
                mean_loss, accuracy = (self._total(self.sums) / (self.step * self.batch_size)).tolist()
                if not math.isfinite(mean_loss):
                    raise self._lost(f"the loss is {mean_loss} in epoch {epoch}")
                done = (self.step - reported) * self.batch_size
                report(advance=done, epoch=epoch, loss=mean_loss, accuracy=accuracy)
                reported = self.step
            if saving:
                self.seconds = time.perf_counter() - self.started
                self._save()
        self._start_epoch()
        return mean_loss, accuracy

    def _lost(self, what: str) -> RunError:
        there = "there is no checkpoint yet"
        if self.saved:
            there = f"the last good checkpoint is {self.checkpoint}, after {self.saved}"
        return RunError(f"{self.config.arm}: {what}: try a smaller --lr; {there}")

    def _total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        total: Tensor = self.processes.reduce(values, "sum") if self.part.world > 1 else values
        return total

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
            "config": self.config.experiment,
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "step": self.step,
            "sums": sums,
            "seconds": self.seconds,
            "lr": self.lr,
            "streams": self._streams,
        }
        if self.processes.is_main_process:
            with replacing(self.checkpoint) as file:
                torch.save(state, file)
        self.processes.wait_for_everyone()
        self._note_saved()

    def _note_saved(self) -> None:
        self.saved = f"epoch {len(self.history)}" + (f" and {self.step} steps" if self.step else "")

    @property
    def _streams(self) -> list[int] | None:
        """Processes and workers, where the order of the images depends on them."""
        return [self.part.world, self.data.workers] if isinstance(self.data, large.Shards) else None

    def _restore(self) -> None:
        found: list[Any] = [None]
        if self.processes.is_main_process:
            try:
                found = [self._read_checkpoint()]
            except RunError as error:  # which all processes are to raise
                found = [error]
        state = broadcast_object_list(found)[0]
        if isinstance(state, RunError):
            raise state
        if state is None:
            return
        engine.restore(self.model, self.optimizer, state)
        if self.average:
            self.average.restore(state["average"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history, self.step, self.seconds, self.lr = (state[name] for name in ("history", "step", "seconds", "lr"))
        self.sums = (state["sums"] if self.processes.is_main_process else torch.zeros(2)).to(self.sums)
        self._note_saved()

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, if there is one."""
        for name in ("checkpoint.pt", "metrics.csv"):
            for half in self.config.directory.glob(f".{name}.*"):
                half.unlink()  # what a run left that was killed while it wrote
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
        for name, value in self.config.experiment.items():
            if theirs.get(name) != value:
                raise RunError(
                    f"{self.checkpoint} was made with {name} {theirs.get(name)}, but this run has {name} {value}: "
                    f"go on with {name} {theirs.get(name)}, or start anew without --resume"
                )
        return state

    def _tensorboard(self) -> None:
        with tensorboard().SummaryWriter(self.config.directory) as writer:
            for name, value in self.history[-1].items():
                if isinstance(value, int | float) and name != "epoch":
                    writer.add_scalar(name, value, self.history[-1]["epoch"])


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
        ConfigError, DataError, RunError: it cannot start or go on.
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
    seeds: tuple[int, ...] = ()
    """Run every arm once with each of these, in place of --seed."""
    results: Path | None = None
    """CSV file for one row per run."""
    run: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)


def parse(arguments: Sequence[str] | None) -> list[Command]:
    """One command per preset; a single one without any."""

    def presets(config: tuple[Path, ...] = ()) -> tuple[Path, ...]:
        return config

    # Presets take the place of the defaults, so they are read before the other flags are looked at.
    paths, _ = tyro.cli(presets, args=arguments, return_unknown_args=True, add_help=False)
    defaults = [Command(run=Config.from_yaml(path)) for path in paths] or [Command()]
    return [tyro.cli(Command, args=arguments, default=default) for default in defaults]


def check_distinct(commands: Sequence[Command]) -> None:
    """Refuse two runs that would write to one directory and count as two seeds of one arm, and a useless --results.

    Raises:
        ConfigError: there are such runs, or --results is a directory.
    """
    taken: set[Path] = set()
    for command in commands:
        if command.results and command.results.is_dir():
            raise ConfigError(f"results is {command.results}, a directory, but a file to write is needed")
        for seed in command.seeds or (command.run.seed,):
            run = replace(command.run, seed=seed)
            if run.directory in taken:
                raise ConfigError(
                    f"seeds: arm {run.arm} with seed {seed} is there twice; name the presets apart (name: in the YAML)"
                )
            taken.add(run.directory)


def main(arguments: Sequence[str] | None = None) -> None:
    console = Console()
    results: list[Result] = []
    try:
        commands = parse(arguments)
        check_distinct(commands)
        sets = [read_data(command.run) for command in commands]
        for command, data in zip(commands, sets, strict=True):  # all of them, before the first is trained
            with torch.device("meta"):
                command.run.network(data.channels, data.num_classes)
        processes = _processes(commands[0].run)
        main_process = processes.is_main_process
        with progress_bars(console, disable=not main_process) as progress:
            for command, data in zip(commands, sets, strict=True):
                for seed in command.seeds or (command.run.seed,):
                    run = Run(replace(command.run, seed=seed), data)
                    results.append(run.finish(progress_bar(progress, run)))
                    if command.results and main_process:
                        write_csv(command.results, [result.row for result in results])
        if main_process:
            console.print(table(results))
        processes.wait_for_everyone()
    except (ConfigError, DataError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on from the last checkpoint")
    finally:
        engine.leave()


if __name__ == "__main__":
    main()
