"""Train every family from every initialisation, and measure convergence, speed and accuracy.

    python benchmarks/measure/convergence.py --config configs/convergence-digits.yaml --workers 2

A row is one run: a network, a family, an arm (only the initialisation), a learning rate and a seed. All runs train on
the same share of the training images. At their end they are evaluated on the held-out share and on the test
images: `chosen` selects the rate by the former and reports the latter. A network that cannot be built has one row with
a note.

Runs that have a row with the same settings are skipped, so the same command continues a stopped grid. The first new
row of a network, family and arm removes its rows with other settings. To retry a row with a note, as after installing
a peer, remove it.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import initialisations, pool
from benchmarks.common.chosen import GROUP, chosen, identity
from benchmarks.common.errors import ConfigError, RunError
from benchmarks.common.families import FAMILIES
from benchmarks.common.grid import GridCommand, obey, read_rows
from benchmarks.common.names import DENSE, DENSE_ARM, NARROW, REFERENCES
from benchmarks.common.provenance import provenance, write_csv
from benchmarks.common.sizes import numel
from benchmarks.training.config import Config, read_yaml
from benchmarks.training.data.in_memory import DATASETS, ImageData, cached_load
from benchmarks.training.data.official_files import NUM_CLASSES
from benchmarks.training.loop import Loop
from tnlayers import scale_residual_
from tnlayers.models import ResNet, dense_conv

PLAIN, NO_NORM = "plain", "resnet-no-norm"
SCALED_NO_NORM = "resnet-scaled"  # without normalisation, and with tnlayers.scale_residual_ in every arm
NETWORKS = (PLAIN, "resnet", NO_NORM, SCALED_NO_NORM)
SCALED = "scaled branches"  # the default with tnlayers.scale_residual_: an arm of a network, not of a layer
DEAD = "dead branches"  # zero branches, which get no gradient: the accuracy of stem and last layer alone
ARMS = (*initialisations.ARMS, SCALED, DEAD)
DEPTH, STRIDED = 30, (4, 28)  # of the plain network: number of convolutions, and those with stride 2
LOST = 1.5 * math.log(NUM_CLASSES)  # a run has diverged if its last epoch's loss is larger; guessing has 2/3 of it
SMOOTHING = 0.1  # weight of each step in the moving average of the loss
KEY = (*GROUP, "lr", "seed")
RECIPE = (
    "epochs", "batch_size", "momentum", "weight_decay", "decay", "warmup", "label_smoothing", "augment", "pad",
    "images", "ema", "amp", "channels_last", "held_out",
)  # fmt: skip
"""Fields of a run's configuration that are settings of the grid."""
SETTINGS = (*RECIPE, "rank", "channels", "evaluated", "shrink", "reference_loss")
COLUMNS = (
    *KEY, *SETTINGS, "steps", "parameters", "keep_ratio", "diverged", "loss_first", "loss_last", "steps_to",
    "accuracy_heldout", "accuracy_test", "seconds", "note",
)  # fmt: skip
NOWHERE = {"lr": "", "seed": ""}  # in the single row of a network that cannot be built
Row = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """The product of networks, families, arms, rates and seeds that is run, and their common settings."""

    dataset: Literal[tuple(DATASETS)] = "digits"
    networks: tuple[Literal[NETWORKS], ...] = ()
    families: tuple[Literal[*REFERENCES, *FAMILIES], ...] = ()
    arms: tuple[Literal[ARMS], ...] = ()
    """Initialisations of every family except the references `dense` and `narrow`, which use He's rule: see starts."""
    lrs: tuple[float, ...] | tuple[tuple[float, ...], ...] = ()
    """Learning rates of all networks, or one list per network."""
    seeds: tuple[int, ...] = ()
    epochs: int = 20
    batch_size: int = 64
    rank: int | float = 0.25
    """Rank of every tensor convolution; a float is its keep ratio."""
    channels: int = 32
    """Channels of the plain network."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay: Literal["cores", "kernels"] = "cores"
    """What weight decay acts on in tensor convolutions."""
    warmup: float = 0.1
    label_smoothing: float = 0.0
    augment: bool = True
    """Shift training images, and mirror them where the data set allows it."""
    pad: Literal["zero", "reflect"] = "zero"
    images: int | None = None
    """Number of training images per epoch, different ones in each; all if not given."""
    ema: float | None = None
    amp: bool = False
    channels_last: bool = False
    held_out: float = 0.2
    keep_memory: bool = False
    evaluated: int | None = None
    """Number of held-out images, and of test images, to evaluate on; all if not given."""
    shrink: int = 1
    """Factor by which images are downsampled: 2 halves their height and width."""
    reference_loss: float = 1.0
    """steps_to counts the steps until the moving average of the training loss is below this value."""
    threads: int = 1
    """CPU threads of each worker."""

    def __post_init__(self) -> None:
        """Check that all runs are valid, and that there are enough rates and seeds to compare rates."""
        rates = self.rates()
        for name, holds, rule in (
            *((name, getattr(self, name), "one at least is needed") for name in ("networks", "families", "arms")),
            ("lrs", len(rates) == len(self.networks), "one list is needed, or one for each network"),
            ("lrs", all(len({*lrs}) >= 2 for lrs in rates), "two at least are needed"),
            ("lrs", all(0 < lr < math.inf for lrs in rates for lr in lrs), "they must be above 0"),
            ("seeds", len({*self.seeds}) >= 2, "two at least are needed"),
            ("rank", self.rank > 0, "it must be above 0"),
            (
                "rank",
                NARROW not in self.families or (isinstance(self.rank, float) and self.rank <= 1),
                f"{NARROW} needs a keep ratio of at most 1",
            ),
            ("channels", self.channels >= 1, "it must be at least 1"),
            ("evaluated", self.evaluated is None or self.evaluated >= 1, "it must be at least 1"),
            ("shrink", self.shrink >= 1, "it must be at least 1"),
            ("reference_loss", self.reference_loss > 0, "it must be above 0"),
        ):
            if not holds:
                value = getattr(self, name)
                raise ConfigError(f"{name} is {[*value] if isinstance(value, tuple) else value}, but {rule}")
        self.config()

    @classmethod
    def from_yaml(cls, path: Path) -> "Grid":
        """Read a grid from YAML: see Config.from_yaml."""
        return read_yaml(cls, path)

    def rates(self) -> list[tuple[float, ...]]:
        """Return the learning rates of each network."""
        return [lrs for lrs in self.lrs if isinstance(lrs, tuple)] or [self.lrs] * len(self.networks)

    def starts(self, network: str, family: str) -> list[str]:
        """Return the arms of a family in a network. Arms of branches need a network without normalisation.

        Only dense networks have the arm of dead branches.
        """
        if family == NARROW:
            return [DENSE_ARM] if network == PLAIN else []
        of_branches = (SCALED, DEAD) if network == NO_NORM else ()
        if family == DENSE:
            return [DENSE_ARM, *(arm for arm in of_branches if arm in self.arms)]
        return [arm for arm in self.arms if arm in (*initialisations.ARMS, *of_branches) and arm != DEAD]

    def config(self, **known: Any) -> Config:
        """Return the configuration of a run."""
        same = {name: getattr(self, name) for name in ("dataset", *RECIPE, "threads", "keep_memory")}
        return Config(**same, split="validation", device="cpu", **known)

    def rows(self, only: Sequence[str] = ()) -> list[Row]:
        """Return key and settings of the runs whose network, family and arm are in `only`.

        A kind without any name in `only` is not filtered. The arm of `dense` and `narrow`, He's rule, is always in.

        Raises:
            ConfigError: a name is unknown.
        """
        kinds = self.networks, self.families, self.arms
        if strange := [name for name in only if not any(name in kind for kind in kinds)]:
            known = ", ".join(name for kind in kinds for name in kind)
            raise ConfigError(f"only names {strange[0]!r}, but the grid has only {known}")
        networks, families, arms = ({*kind} & {*only} or {*kind} for kind in kinds)
        same = {name: "" if getattr(self, name) is None else getattr(self, name) for name in SETTINGS}
        rows = [
            {"dataset": self.dataset, "network": network, "family": family, "arm": arm, "lr": lr, "seed": seed}
            | same
            | ({"rank": ""} if family == DENSE else {})
            | ({} if network == PLAIN else {"channels": ""})
            for (network, lrs), family in product(zip(self.networks, self.rates(), strict=True), self.families)
            for arm in self.starts(network, family)
            for lr, seed in product(lrs, self.seeds)
            if network in networks
            and family in families
            and (arm in arms or (family in REFERENCES and arm == DENSE_ARM))
        ]
        return [*{identity(row, KEY): row for row in rows}.values()]


class Plain(nn.Module):
    """A stack of convolutions, each with a ReLU, then pooling and one linear layer. No normalisation, no shortcuts.

    Zero padding weakens the signal, by much over 30 layers on images this small. One constant factor compensates it,
    the same for every initialisation: the compared variance rules all ignore the padding.

    Args:
        conv: makes all convolutions but the first from nn.Conv2d's arguments.
        channels: output channels of every convolution.
        image: channels, height and width of the images.
    """

    def __init__(self, conv: Callable[..., nn.Module], channels: int, image: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [dense_conv(image[0], channels, 3, padding=1, bias=False)]
        moment = torch.ones(1, 1, *image[1:])
        for depth in range(DEPTH):
            stride = 2 if depth in STRIDED else 1
            moment = F.conv2d(moment, torch.full((1, 1, 3, 3), 1 / 9), stride=stride, padding=1)
            if depth:
                layers.append(conv(channels, channels, 3, stride=stride, padding=1, bias=False))
        self.convolutions = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))
        self.gain = moment.mean().item() ** -0.5
        self.linear = nn.Linear(channels, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        logits: Tensor = self.linear(self.gain * self.convolutions(x).mean(dim=(2, 3)))
        return logits


def network(row: Row, image: Sequence[int]) -> tuple[nn.Module, float]:
    """Return the network of a row, drawn with its seed, and the keep ratio of its convolutions without the stem.

    The stem and the last layer depend only on the seed and the channels.

    Raises:
        initialisations.UnavailableError, ValueError: there is no such layer.
    """
    if row["family"] == NARROW:
        width = max(1, round(row["channels"] * math.sqrt(row["rank"])))
        return network(row | {"family": DENSE, "channels": width}, image)[0], (width / row["channels"]) ** 2
    kept = dense = 0

    def conv(inputs: int, outputs: int, kernel_size: int, stride: int = 1, **same: Any) -> nn.Module:
        nonlocal kept, dense
        if row["family"] == DENSE:
            layer: nn.Module = dense_conv(inputs, outputs, kernel_size, stride=stride, **same)
        else:
            arm = "default" if row["arm"] == SCALED else row["arm"]
            layer = initialisations.make(arm, row["family"], inputs, outputs, row["rank"], stride)
        kept += numel(layer)
        dense += inputs * outputs * kernel_size**2
        return layer

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(row["seed"])
        if row["network"] == PLAIN:
            model: Any = Plain(conv, row["channels"], image)
        else:
            norm = nn.BatchNorm2d if row["network"] == "resnet" else nn.Identity
            model = ResNet(20, conv, NUM_CLASSES, image[0], norm=norm)
        torch.random.default_generator.manual_seed(row["seed"])
        model.linear.reset_parameters()
    if row["arm"] == SCALED or row["network"] == SCALED_NO_NORM:
        scale_residual_(model, "layer*.conv2")
    if row["arm"] == DEAD:
        scale_residual_(model, "layer*", 0)
    return model, kept / dense


class Trial(Loop):
    """A run of the grid. It writes nothing, records every step's loss, and ends at a non-finite loss."""

    def __init__(self, config: Config, data: ImageData, model: nn.Module, evaluated: int | None = None) -> None:
        super().__init__(config, data.validation(config.held_out).fewer_test_images(evaluated), model)
        self.tested = data.fewer_test_images(evaluated)
        self.losses: list[float] = []

    def _loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        loss = super()._loss(images, logits, labels)
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise RunError(f"the loss is {self.losses[-1]} in step {len(self.losses)}")
        return loss

    def accuracies(self) -> Row:
        """Return the accuracies on the held-out images and on the test images."""
        heldout = self._evaluate()[1]
        self.data = self.tested
        return {"accuracy_heldout": round(heldout, 6), "accuracy_test": round(self._evaluate()[1], 6)}

    def steps_to(self, reference: float) -> int | str:
        """Return the first step where the moving average of the loss is below a reference, or an empty string."""
        average = self.losses[0]
        for step, loss in enumerate(self.losses, start=1):
            average += SMOOTHING * (loss - average)
            if average < reference:
                return step
        return ""


def measure(grid: Grid, data_dir: Path, row: Row) -> Row:
    """Complete the row of a run from its key and settings. It has no rate and seed if the network cannot be built."""
    torch.set_num_threads(grid.threads)
    data = cached_load(grid.dataset, data_dir, shrink=grid.shrink)
    row = {column: row.get(column, "") for column in COLUMNS}
    try:
        model, keep_ratio = network(row, data.train_images.shape[1:])
    except (initialisations.UnavailableError, ValueError) as error:
        return row | NOWHERE | {"note": " ".join(str(error).split())}
    trial = Trial(grid.config(lr=row["lr"], seed=row["seed"]), data, model, grid.evaluated)
    row |= {"parameters": numel(model), "keep_ratio": round(keep_ratio, 4), "diverged": True}
    start = time.perf_counter()
    torch.set_flush_denormal(True)  # denormal numbers make a run with vanishing signals take minutes
    try:
        last = trial.finish().history[-1]["train_loss"]
        row |= {"loss_last": round(last, 6), "diverged": last > LOST, **trial.accuracies()}
    except RunError as error:
        row["note"] = str(error)
    finally:
        torch.set_flush_denormal(False)
    row |= {"steps": len(trial.losses), "loss_first": round(trial.losses[0], 6)}
    return row | {
        "steps_to": trial.steps_to(grid.reference_loss),
        "seconds": round(time.perf_counter() - start, 2),
    }


def table(choices: Sequence[Row]) -> Table:
    """Return a table with one line per network, family and arm."""
    formats = {"accuracy": ".2%", "error": ".2%", "diverged": ".0%", "lost": ".0%", "steps_to": ".0f"}
    table = Table(*choices[0])
    for choice in choices:
        table.add_row(*("" if cell is None else format(cell, formats.get(name, "")) for name, cell in choice.items()))
    return table


@dataclass(frozen=True, kw_only=True)
class Command(GridCommand):
    """Train every family from every initialisation, and measure convergence, speed and accuracy."""

    only: tuple[str, ...] = ()
    """Names of networks, families and arms: run only this part of the grid."""


def run(command: Command, console: Console) -> None:
    """Measure the runs that are not yet in the file.

    Raises:
        ConfigError, DataError: the grid cannot be run, or the file cannot be written.
    """
    grid = Grid.from_yaml(command.config)
    wanted = grid.rows(command.only)
    rows: list[Row] = [*read_rows(command.file, COLUMNS, command.workers)]
    cached_load(grid.dataset, command.data_dir, shrink=grid.shrink)
    torch.set_num_threads(grid.threads)
    names = (*KEY, *SETTINGS)
    there = {identity(row, names) for row in rows}
    todo = [row for row in wanted if not there & {identity(row, names), identity(row | NOWHERE, names)}]

    def keep(row: Row) -> None:
        row = {column: str(value) for column, value in (row | provenance()).items()}
        group, same = identity(row, GROUP), identity(row, SETTINGS)
        rows[:] = [old for old in rows if identity(old, GROUP) != group or identity(old, SETTINGS) == same]
        rows[:] = [old for old in rows if identity(old, KEY) != identity(row, KEY)] + [row]
        write_csv(command.file, rows)

    pool.measure_all(partial(measure, grid, command.data_dir), todo, command.workers, keep, console)
    groups = {identity(row, GROUP) for row in wanted}
    console.print(table(chosen([row for row in rows if identity(row, GROUP) in groups])))


def main(arguments: Sequence[str] | None = None) -> None:
    obey(Command, run, arguments)


if __name__ == "__main__":
    main()
