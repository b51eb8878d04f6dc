"""Train a ResNet with dense or tensor-network convolutions: python benchmarks/train.py --config configs/digits-tr.yaml.

Several presets are the arms of a comparison, and with --seeds each arm runs once per seed:

    python benchmarks/train.py --config configs/digits-dense.yaml configs/digits-tr.yaml --seeds 0 1 2 \
        --results benchmarks/results/digits.csv

Every other flag overrides the presets. Accuracy is that of the last epoch: none is picked by looking at test images.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import tnlayers
from atomic import replacing
from config import Config, ConfigError
from data import NUM_CLASSES, DataError, ImageData, load
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
    kernels = sum(conv.weight.numel() for conv in convolutions(model))  # no convolution has a bias
    return {
        "parameters": parameters,
        "dense_parameters": parameters - cores + kernels,
        "keep_ratio": round(cores / kernels, 4),
    }


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # AssertionError: this build of torch has no CUDA
        raise ConfigError(f"device is {name!r}, which cannot be used here: {str(error).splitlines()[0]}") from error


class Run:
    """A training run, one epoch at a time, with a checkpoint after each.

    Args:
        config: what to run.

    Raises:
        ConfigError, DataError: the network, the data or the device cannot be had.
        RunError: the checkpoint to resume from is of another run.
    """

    def __init__(self, config: Config) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.backends.cudnn.deterministic = True
        device = _device(config.device)
        data = load(config.dataset, config.data_dir, config.download)
        data = (data if config.split == "test" else data.validation()).to(device)
        self._begin(config, data, config.network(data.train_images.shape[1], NUM_CLASSES).to(device))
        if config.resume and self.checkpoint.exists():
            self._restore()

    def _begin(
        self,
        config: Config,
        data: ImageData,
        model: nn.Module,
        images: int | None = None,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        """Everything at its beginning: so many images per epoch, all if not given, and groups for the optimizer."""
        self.config, self.data, self.model, self.device = config, data, model, data.test_images.device
        self.normalise = data.normaliser()
        count = min(images or len(data.train_labels), len(data.train_labels))
        self.batch_size = min(config.batch_size, count)
        self.steps = count // self.batch_size  # per epoch; which images are left over changes from epoch to epoch
        if groups is None:
            matrices = [p for p in model.parameters() if p.ndim > 1]
            vectors = [p for p in model.parameters() if p.ndim <= 1]  # normalisation and biases
            groups = [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
        self.optimizer = torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.momentum > 0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        # All that is random after the initialisation: the order of the images and their augmentation.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.history: list[dict[str, Any]] = []

    @property
    def checkpoint(self) -> Path:
        """The file that --resume goes on from."""
        return self.config.directory / "checkpoint.pt"

    @property
    def images(self) -> int:
        """Images in all epochs together."""
        return self.config.epochs * self.steps * self.batch_size

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) == self.config.epochs

    def epoch(self, report: Callable[..., Any] = lambda **_: None) -> None:
        """Train for one epoch, evaluate, write metrics.csv and the checkpoint.

        Args:
            report: called now and then with advance= (images), epoch=, and this epoch's training loss= and accuracy=.

        Raises:
            RunError: the loss is no longer a number.
        """
        start = time.perf_counter()
        lr = self.scheduler.get_last_lr()[0]
        train_loss, train_accuracy = self._train_epoch(report)
        loss, accuracy = self._evaluate()
        self.history.append(
            {
                "epoch": len(self.history) + 1,
                "lr": lr,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "loss": loss,
                "accuracy": accuracy,
                "seconds": round(time.perf_counter() - start, 2),
                **provenance(self.config.device),
            }
        )
        write_csv(self.config.directory / "metrics.csv", self.history)
        self._save()

    def finish(self, report: Callable[..., Any] = lambda **_: None) -> Result:
        """Train to the end. For the arguments and exceptions, see epoch."""
        while not self.finished:
            self.epoch(report)
        return Result(self.config, self.model, self.history)

    def _train_epoch(self, report: Callable[..., Any]) -> tuple[float, float]:
        self.model.train()
        epoch, reported = len(self.history) + 1, 0
        total, correct = (torch.zeros((), device=self.device) for _ in range(2))
        order = torch.randperm(len(self.data.train_labels), generator=self.generator)
        batches = order.to(self.device).split(self.batch_size)[: self.steps]
        for step, batch in enumerate(batches, start=1):
            images, labels = self.data.train_images[batch], self.data.train_labels[batch]
            if self.config.augment:
                images = self.data.augment(images, self.generator)
            logits = self._logits(images)
            loss = self._loss(images, logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            total += loss.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
            if step % REPORT_EVERY == 0 or step == self.steps:
                mean_loss, accuracy = total.item() / step, correct.item() / (step * self.batch_size)
                if not math.isfinite(mean_loss):
                    raise RunError(f"{self.config.arm}: the loss is {mean_loss} in epoch {epoch}: try a smaller --lr")
                report(advance=(step - reported) * self.batch_size, epoch=epoch, loss=mean_loss, accuracy=accuracy)
                reported = step
        return mean_loss, accuracy

    def _loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    @torch.inference_mode()
    def _evaluate(self) -> tuple[float, float]:
        self.model.eval()
        images, labels = self.data.test_images, self.data.test_labels
        logits = torch.cat([self._logits(batch) for batch in images.split(EVALUATION_BATCH)])
        return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            logits: Tensor = self.model(self.normalise(images))
        return logits.float()

    def _lr_factor(self, step: int) -> float:
        """Share of the learning rate: up along a line, down along half a cosine."""
        steps = self.config.epochs * self.steps
        warmup = round(self.config.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    def _save(self) -> None:
        state = {
            "config": self.config.experiment,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "history": self.history,
        }
        with replacing(self.checkpoint) as file:
            torch.save(state, file)

    def _restore(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            theirs = state["config"]
        except Exception as error:  # a damaged file can raise anything
            raise RunError(f"{self.checkpoint} is not a checkpoint of this script: {error}") from error
        for name, value in self.config.experiment.items():
            if theirs.get(name) != value:
                raise RunError(
                    f"{self.checkpoint} was made with {name} {theirs.get(name)}, but this run has {name} {value}: "
                    f"go on with {name} {theirs.get(name)}, or start anew without --resume"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"].cpu())
        self.history = state["history"]


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


def progress_bars(console: Console) -> Progress:
    """A bar per run, with epoch, training loss and accuracy, images per second, and the time that remains."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        _Speed(),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )


def progress_bar(progress: Progress, run: Run) -> Callable[..., None]:
    """A new bar for a run; what is returned is to be its report function."""
    done = run.images * len(run.history) // run.config.epochs
    task = progress.add_task(f"{run.config.arm} seed {run.config.seed}", total=run.images, completed=done, status="")

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
        with progress_bars(console) as progress:
            for command in commands:
                for seed in command.seeds or (command.run.seed,):
                    run = Run(replace(command.run, seed=seed))
                    results.append(run.finish(progress_bar(progress, run)))
                    if command.results:
                        write_csv(command.results, [result.row for result in results])
        console.print(table(results))
    except (ConfigError, DataError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on from the last complete epoch")


if __name__ == "__main__":
    main()
