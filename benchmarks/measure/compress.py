"""Compress trained ResNets in every format, and fine-tune them.

    python benchmarks/measure/compress.py --weights FILE --data-dir DIR
    python benchmarks/measure/compress.py --weights FILE --data-dir DIR --config configs/compress/resnet32.yaml

A row is a network, a format and a keep ratio. It has the error of the fitted kernels, accuracy before and after a short
fine-tune, size and latency. It also has the errors, and accuracies before fine-tuning, of tensorly's own algorithms and
of tensorly-torch's `FactorizedConv.from_conv` at equal ranks. A row `dense` is the network itself, fine-tuned in the
same way. The stem and the last layer stay plain.

Rows that are there with the same settings are not measured again, so the same command goes on where it stopped. To
measure a row again, remove it.

Choose rates with --split validation: it holds out a part of the training images from fine-tuning. A network that was
trained on them favours what changes it least, so take the checkpoint of a network that did not see them (train.py with
the same --split and --held-out). Final figures are of test images.

Files of weights hold a state_dict, optionally under the key "state_dict" and with the name prefix "module.", as in
github.com/akamaster/pytorch_resnet_cifar10. As there, images are normalised with ImageNet's constants. Checkpoints of
train.py see images as they did in training.
"""

import io
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from tyro.conf import Suppress

import tnlayers
from benchmarks.common.chosen import identity
from benchmarks.common.errors import ConfigError, DataError, RunError
from benchmarks.common.families import ALL_FAMILIES
from benchmarks.common.grid import read_rows
from benchmarks.common.names import DENSE, network_name
from benchmarks.common.peer_fits import PEERS, quietly
from benchmarks.common.provenance import provenance, write_csv
from benchmarks.common.rows import RESULTS
from benchmarks.common.sizes import convolutions, keep_of, size
from benchmarks.common.timing import rounds
from benchmarks.training.config import Config, presets
from benchmarks.training.data.in_memory import ImageData, load
from benchmarks.training.loop import Loop
from benchmarks.training.progress import progress_bar, progress_bars
from benchmarks.training.teacher import Normalise, Teacher, read_trained
from tnlayers.models import ResNet

BATCHES = (1, 32)  # batch sizes of the latencies
KEEPS = (0.5, 0.25)
KEY = ("weights", "format", "keep", "split")
SETTINGS = (
    "allocation", "calibration", "distil", "hint", "hint_schedule",
    "epochs", "batch_size", "lr", "momentum", "weight_decay", "decay", "schedule", "warmup", "clip", "label_smoothing",
    "augment", "pad", "ema", "seed", "amp", "channels_last", "optimizer", "cutmix", "compile", "held_out",
)  # fmt: skip
COLUMNS = (
    *KEY, "kept", "swapped", "refused", "parameters", "dense_parameters", "bytes", "dense_bytes", "error", "error_max",
    "accuracy_dense", "accuracy_before", "accuracy_after", "drop", *SETTINGS, "images", "evaluated", "fit_seconds",
    "tune_seconds", "dense_ms_1", "dense_ms_32", "latency_1", "latency_32", "unfolded_1", "unfolded_32", "note",
    *(f"{peer}_{column}" for peer in ("tensorly", "tltorch") for column in ("error", "before", "seconds")),
)  # fmt: skip
IDENTITY = (*KEY, *SETTINGS, "images")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Command(Config):
    """Compress trained CIFAR-10 ResNets in every format, and fine-tune them briefly."""

    config: tuple[Path, ...] = ()
    """A YAML preset. The other flags override it."""
    weights: tuple[Path, ...] = ()
    """Files with the networks' weights, or checkpoints of train.py of dense networks. Tables omit a hash at the end of
    a file's name."""
    formats: tuple[str, ...] = (DENSE, "tucker", "cp", "tt-chain", "tr", "tt", "btt")
    keeps: tuple[float, ...] = ()
    """Keep ratios of the convolutions, without the stem; 0.5 and 0.25 if there are no ratios either."""
    ratios: tuple[float, ...] = ()
    """In place of keep ratios: parameters of the whole network over those of the compressed one."""
    allocation: Literal["budget", "uniform"] = "budget"
    """Distribute the parameters over the convolutions by singular values, or use the same keep ratio for each."""
    calibration: int = 16
    """Number of training batches to which the layers are fitted one after another; 0: plain least squares."""
    distil: float = 0.9
    """Weight, from 0 to 1, of the KL divergence from the dense network's outputs in the loss; 0: labels only."""
    hint: float = 64.0
    """Weight of the relative squared error of the blocks' outputs against the dense network's."""
    hint_schedule: Literal["constant", "linear"] = "constant"
    """The hint keeps its weight, or loses it linearly: near the end only labels and outputs count."""
    epochs: int = 2
    """Epochs of fine-tuning; 0: none."""
    lr: float = 0.005
    """Maximum learning rate of plain layers. Cores get those of `tnlayers.param_groups`."""
    batch_size: int = 128
    weight_decay: float = 0.0001
    """L2 on dense kernels, and on those that cores contract to."""
    warmup: float = 0.1
    peers: bool = True
    """Also decompose with tensorly and tensorly-torch, if installed."""
    budget: float = 2.0
    """Seconds of timing per batch size; at least 5 rounds."""
    out: Path = RESULTS / "compress.csv"
    """CSV file. Its rows of other networks, formats, sizes and settings are kept."""

    dataset: Suppress[str] = "cifar10"
    model: Suppress[str] = ""
    conv: Suppress[str] = DENSE
    rank: Suppress[None] = None
    teacher: Suppress[None] = None
    decay: Suppress[str] = "kernels"
    rates: Suppress[str] = "equal"
    rank_schedule: Suppress[None] = None
    shard: Suppress[bool] = False
    overwrite: Suppress[bool] = False
    init: Suppress[None] = None
    image_size: Suppress[int] = 224
    classes: Suppress[None] = None
    save_every: Suppress[None] = None
    tensorboard: Suppress[bool] = False
    resume: Suppress[bool] = False
    name: Suppress[str | None] = None

    def __post_init__(self) -> None:
        """Do nothing: tyro would reformat an error raised here. `check` has the checks."""

    def check(self) -> None:
        """Check that the values can be run."""
        names = [*map(network_name, self.weights)]
        hints = get_type_hints(Command, include_extras=True)
        fixed = [name for name, hint in hints.items() if Suppress in getattr(hint, "__metadata__", ())]
        for name, holds, rule in (
            ("weights", len(set(names)) == len(names), "the names of the networks must differ"),
            (
                "formats",
                set(self.formats) <= {DENSE, *ALL_FAMILIES},
                f"there are only {DENSE}, {', '.join(ALL_FAMILIES)}",
            ),
            *((name, getattr(self, name) == getattr(Command, name), "this script sets it") for name in fixed),
            ("config", len(self.config) <= 1, "one at most is possible"),
            ("weights", names, "one file at least is needed"),
            ("keeps", all(0 < keep <= 1 for keep in self.keeps), "they must be above 0 and at most 1"),
            ("ratios", all(ratio > 1 for ratio in self.ratios), "they must be above 1"),
            ("keeps", not (self.keeps and self.ratios), "the sizes are given by ratios"),
            ("calibration", self.calibration >= 0, "it must be at least 0"),
            ("distil", 0 <= self.distil <= 1, "it must be from 0 to 1"),
            ("hint", 0 <= self.hint < math.inf, "it must be at least 0"),
            ("epochs", self.epochs >= 0, "it must be at least 0"),
        ):
            if not holds:
                value = getattr(self, name)
                raise ConfigError(
                    f"{name} is {' '.join(map(str, value)) if type(value) is tuple else value}, but {rule}"
                )
        Config.__post_init__(replace(self, epochs=max(1, self.epochs), distil=Config.distil))


class Tuning(Loop):
    """A run that fine-tunes a network on given data, and writes nothing. Its inputs are those of the dense network."""

    def __init__(
        self, config: Command, data: ImageData, model: nn.Module, dense: Teacher, taught: bool = False
    ) -> None:
        # Fitted cores differ much in scale. With one learning rate for all, TR and CP lose the fit's accuracy.
        model.to(data.test_images.device)
        same = {"weight_decay": config.weight_decay, "optimizer": config.optimizer}
        groups = tnlayers.param_groups(model, config.lr, **same)
        super().__init__(config, data, model, groups, deepcopy(dense) if taught else None)
        self.normalise = dense.normalise
        self.blocks: tuple[list[Tensor], ...] = ()
        if self.teacher is not None and config.hint:
            self.blocks = tuple(map(outputs_of_blocks, (self.model, self.teacher.network)))

    def _loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        loss = super()._loss(images, logits, labels)
        for ours, theirs in zip(*self.blocks, strict=True):
            near = F.mse_loss(ours.float(), theirs.float()) / theirs.float().square().mean()
            loss = loss + self.hint * near
        for found in self.blocks:
            found.clear()
        return loss

    @property
    def hint(self) -> float:
        """The hint's weight in this step."""
        left = 1 - self.images_done / self.images if self.config.hint_schedule == "linear" else 1.0
        return float(self.config.hint * left)

    def accuracy(self) -> float:
        """Return the network's current accuracy on images that are not trained on."""
        return round(self._evaluate()[1], 6)


def outputs_of_blocks(model: nn.Module) -> list[Tensor]:
    """Return a list to which every residual block appends its output, except in inference mode."""
    found: list[Tensor] = []

    def note(_: nn.Module, __: Any, out: Tensor) -> None:
        if not torch.is_inference_mode_enabled():
            found.append(out)

    for name, module in model.named_modules():
        if re.fullmatch(r"layer\d+\.\d+", name):
            module.register_forward_hook(note)
    return found


def decompose(peer: str, family: str, model: nn.Module, ranks: dict[str, list[int]], seed: int) -> Row:
    """Put a peer's kernels into a plain network. Return their mean relative error and the seconds, or its refusal."""
    errors, start, name = [], time.perf_counter(), ""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        try:
            with quietly():
                for name, rank in ranks.items():
                    conv, weight = model.get_submodule(name), model.get_submodule(name).weight
                    kernels = PEERS[peer](family, conv, rank, seed)
                    fits = {float((kernel - weight).norm() / weight.norm()): kernel for kernel in kernels}
                    if not fits:
                        return {}
                    errors.append(min(fits))
                    weight.copy_(fits[min(fits)])
        except Exception as error:
            return {f"{peer}_error": f"{name}: {' '.join(str(error).split())}"}
    seconds = round(time.perf_counter() - start, 2)
    return {f"{peer}_error": round(statistics.mean(errors), 5), f"{peer}_seconds": seconds}


def latencies(models: dict[str, nn.Module], device: torch.device, budget: float) -> Row:
    """Return medians of interleaved rounds: milliseconds of `dense`, and the others' times over its time."""

    def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
        def infer() -> None:
            with torch.no_grad():
                model(x)
            if x.is_cuda:
                torch.cuda.synchronize()

        return infer

    row: Row = {}
    for batch in BATCHES:
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
        steps = {name: step(model.to(device).eval(), x) for name, model in models.items()}
        for warm_up in (*steps.values(), *steps.values()):
            warm_up()
        medians = {name: statistics.median(times) for name, times in rounds(steps, budget, twins=()).items()}
        dense = medians.pop("dense")
        row |= {f"dense_ms_{batch}": round(1e3 * dense, 4)}
        row |= {f"{name}_{batch}": round(seconds / dense, 4) for name, seconds in medians.items()}
    return row


def file_bytes(model: nn.Module) -> int:
    torch.save(model.state_dict(), file := io.BytesIO())
    return file.tell()


def measure(command: Command, known: Row, trained: Teacher, data: ImageData, progress: Progress) -> Row:
    """Return a complete row. `known` holds its identity and the dense accuracy."""
    dense = trained.network
    family, model, swap, start = known["format"], deepcopy(dense), {}, time.perf_counter()
    if family != DENSE:
        form, options = family.partition("-")[0], ALL_FAMILIES[family][1]
        ranks = {"budget": {"params": known["keep"]}} if command.allocation == "budget" else {"rank": known["keep"]}
        config = tnlayers.TensorizeConfig(form, **ranks, options=options, include=["layer*"])
        images = trained.normalise(data.train_images[: 128 * command.calibration]).cpu()
        try:
            swap = tnlayers.tensorize_(model, config, calibration=images.split(128) if len(images) else None)
        except ValueError as error:  # every layer refuses
            return known | {"swapped": 0, "refused": len(convolutions(dense)) - 1, "note": str(error)}
    row = known | {"fit_seconds": round(time.perf_counter() - start, 2)}
    layers = {name: layer for name, layer in swap.items() if layer.swapped}
    refused = [layer.reason for layer in swap.values() if layer.reason.startswith("refused")]
    errors, counts = [layer.error for layer in layers.values()] or [0.0], size(model)
    row |= {
        "kept": counts.pop("keep_ratio"), "swapped": len(layers), "refused": len(refused), **counts,
        "bytes": file_bytes(model), "dense_bytes": file_bytes(dense), "error": round(statistics.mean(errors), 5),
        "error_max": round(max(errors), 5), "note": "; ".join(dict.fromkeys(refused)),
    }  # fmt: skip
    timed = {"dense": deepcopy(dense), "latency": deepcopy(model)}
    if swap:
        tnlayers.unfold_(timed.setdefault("unfolded", deepcopy(model)))
    row |= latencies(timed, data.test_images.device, command.budget)
    for peer in filter(find_spec, PEERS) if command.peers and swap else ():
        other, ranks = deepcopy(dense), {name: [*layer.rank.values()] for name, layer in layers.items()}
        row |= decompose(peer, family, other, ranks, command.seed)
        if f"{peer}_seconds" in row:
            row[f"{peer}_before"] = Tuning(command, data, other, trained).accuracy()
    named = replace(command, name=f"{row['weights']} {family} {row['keep']}")
    tuning = Tuning(named, data, model, trained, taught=bool(command.distil or command.hint))
    row |= {"accuracy_before": tuning.accuracy()}
    if command.epochs:
        start = time.perf_counter()
        try:
            tuning.finish(progress_bar(progress, tuning))
        except RunError as error:
            return row | {"note": "; ".join(filter(None, (row["note"], str(error))))}
        row |= {"tune_seconds": round(time.perf_counter() - start, 2), "accuracy_after": tuning.accuracy()}
    return row | {"drop": round(100 * (row["accuracy_dense"] - row.get("accuracy_after", row["accuracy_before"])), 2)}


def compress(command: Command, there: Collection[tuple[str, ...]], progress: Progress) -> Iterator[Row]:
    """Yield the rows whose identities are not there."""
    torch.backends.cudnn.deterministic = True
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    data = load("cifar10", command.data_dir, command.download)
    networks = {network_name(path): read_dense(path, data) for path in command.weights}
    try:
        data = (data if command.split == "test" else data.validation(command.held_out)).to(torch.device(command.device))
    except (AssertionError, RuntimeError) as error:  # AssertionError: this build of torch has no CUDA
        raise ConfigError(f"device is {command.device!r}, which cannot be used here: {error}") from error
    same = {name: getattr(command, name) for name in ("split", *SETTINGS)} | {"evaluated": len(data.test_labels)}
    for name, (dense, inputs) in networks.items():
        trained = Teacher(dense, inputs or data.normaliser(), command.distil)
        plain = Tuning(command, data, deepcopy(dense), trained)
        each = {"weights": name, "images": plain.steps * plain.batch_size, **same}
        keeps = [keep_of(dense, ratio) for ratio in command.ratios] or command.keeps or KEEPS
        every = ((family, 1.0 if family == DENSE else keep) for family in command.formats for keep in keeps)
        wanted = [each | {"format": family, "keep": keep} for family, keep in dict.fromkeys(every)]
        todo = [row for row in wanted if identity(row, IDENTITY) not in there]
        accuracy = plain.accuracy() if todo else None
        for row in todo:
            known = row | {"accuracy_dense": accuracy}
            yield dict.fromkeys(COLUMNS, "") | measure(command, known, trained, data, progress)


def read_dense(path: Path, data: ImageData) -> tuple[nn.Module, Normalise | None]:
    """Return the dense network of a file: see read_trained.

    Raises:
        ConfigError: the file holds no dense ResNet for these images.
    """
    network, inputs = read_trained(path, "cifar10", data)
    if not isinstance(network, ResNet) or not all(type(conv) is nn.Conv2d for conv in convolutions(network)):
        raise ConfigError(f"{path} is no dense ResNet of tnlayers.models, but only these can be compressed here")
    return network, inputs


def table(rows: Sequence[Row]) -> Table:
    """Return a table with one line per row."""
    titles = ("network", "convolutions", "keep", "parameters", "error", "dense", "before", "after", "drop", "layers")
    names = ("weights", "format", "keep", "parameters", "error", "accuracy_dense", "accuracy_before", "accuracy_after")
    table = Table(*titles, title=f"accuracy on the {rows[0]['split']} images")
    for row in rows:
        shown = [f"{row[n]:.2%}" if n.startswith("accuracy") and row[n] != "" else str(row[n]) for n in names]
        table.add_row(*shown, str(row["drop"]), f"{row['swapped']} of {row['swapped'] + row['refused']}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    console = Console()
    try:
        default = next(map(Command.from_yaml, presets(arguments)), Command())
        command = tyro.cli(Command, args=arguments, default=default)
        command.check()
        rows, done = read_rows(command.out, COLUMNS, workers=1), []
        with progress_bars(console) as progress:
            for row in compress(command, {identity(row, IDENTITY) for row in rows}, progress):
                done.append(row)
                rows.append(row | provenance(command.device))
                write_csv(command.out, rows, command.device)
        console.print(table(done) if done else f"all rows are in {command.out}")
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the rows that were done are written; the same command goes on")


if __name__ == "__main__":
    main()
