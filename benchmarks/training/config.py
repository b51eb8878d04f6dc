"""Configuration of a training run: fields, defaults, and YAML presets that override the defaults."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import tyro
from torch import nn

from benchmarks.common.errors import BuildError, ConfigError
from benchmarks.common.families import CONVOLUTIONS, MODELS
from benchmarks.common.names import DENSE, network_name
from benchmarks.training.data.in_memory import DATASETS
from benchmarks.training.data.on_disk import DATASETS as LARGE
from benchmarks.training.tednets import PRESETS, tednet_network
from tnlayers.tensorize import yaml_text

# Fields that say where and how a run is computed. They may change when a checkpoint is resumed.
SURROUNDINGS = (
    "name", "data_dir", "download", "workers", "device", "threads", "shard", "out", "save_every", "tensorboard",
    "resume", "overwrite", "keep_memory",
)  # fmt: skip
LEAST = {
    "epochs": 1, "batch_size": 1, "images": 1, "image_size": 1, "classes": 2, "workers": 0, "save_every": 1,
    "threads": 1, "seed": 0,
}  # fmt: skip
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Config:
    """Configuration of a training run."""

    dataset: Literal[(*DATASETS, *LARGE)] = "digits"
    model: Literal[(*MODELS, *PRESETS)] = "resnet20"
    conv: Literal[tuple(CONVOLUTIONS)] = DENSE
    """Format of every convolution except the stem, which stays dense."""
    rank: int | float | tuple[int, ...] | None = None
    """Rank of a tensor format: one for all bonds, a keep ratio, or one per bond; the format's default if not given.
    For tednet's networks: one for all layers, or seven."""
    init: str | None = None
    """Initialisation mode of a tensor format; the format's default if not given. tednet's networks also accept
    `tednet`: tednet's own initialisation."""
    rank_schedule: float | None = None
    """Share of the dense kernels' parameters that the cores end with: training starts with `rank`, and lowers the ranks
    in the first half of its epochs where the loss changes least."""
    epochs: int = 20
    batch_size: int = 64
    """Images per step, over all processes."""
    images: int | None = None
    """Number of training images per epoch, different ones in each; all if not given."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    lr: float = 0.1
    """Maximum learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "one-cycle"] = "cosine"
    """Linear warm-up, then cosine or linear decay to zero; or torch's OneCycleLR."""
    momentum: float = 0.9
    """Momentum of SGD, or AdamW's first beta."""
    weight_decay: float = 0.0005
    """Weight decay of parameters with at least two axes: kernels, cores, the last layer's matrix. L2 in SGD, decoupled
    in AdamW."""
    decay: Literal["cores", "kernels"] = "cores"
    """What weight decay acts on in tensor layers: their cores, or the kernels that they contract to
    (`tnlayers.frobenius_penalty`, L2 with both optimizers). Dense kernels decay either way."""
    rates: Literal["equal", "matched"] = "equal"
    """Learning rates of cores: those of all other parameters, or such that kernels move as dense ones do
    (`tnlayers.param_groups`)."""
    warmup: float = 0.1
    """Share of all steps in which the learning rate rises."""
    clip: float | None = None
    """Maximum norm to which the gradient is clipped."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is evaluated in place of the trained weights. The
    checkpoint holds both."""
    label_smoothing: float = 0.0
    augment: bool = True
    """Shift training images, and mirror them where the data set allows it. Crop large images at random."""
    pad: Literal["zero", "reflect"] = "zero"
    """What fills the border of shifted images: black, or the image mirrored at its edge. Not for large images."""
    cutmix: float = 0.0
    """Share of the batches with CutMix (Yun 2019): a box of each image and its share of the label come from another
    image of the same process."""
    teacher: Path | None = None
    """Trained network whose outputs the trained one learns to give: a checkpoint of this program, or a file of weights
    of a CIFAR-10 ResNet as in github.com/akamaster/pytorch_resnet_cifar10."""
    distil: float = 0.9
    """With a teacher: weight, from 0 to 1, of the KL divergence from its outputs in the loss; the rest is of labels."""
    seed: int = 0
    """Seed of the initialisation, the order of the images and their augmentation."""
    split: Literal["test", "validation"] = "test"
    """Images that accuracy is measured on. Tune on validation: it holds out a share of the training images."""
    held_out: float = 0.2
    """Share of the training images that validation holds out, equal in each class."""
    amp: bool = False
    """Compute in bfloat16 where it is safe (autocast)."""
    channels_last: bool = False
    """Store images and dense kernels with channels last in memory."""
    compile: bool = False
    """Compile the network (torch.compile)."""
    sync_norm: bool = True
    """Normalise over the images of all processes in batch normalisation."""

    name: str | None = None
    """Name of the arm in tables and directories; its convolutions and their rank if not given."""
    data_dir: Path = Path("data")
    """Directory with the official files of Fashion-MNIST or CIFAR-10, or with your own data set."""
    download: bool = False
    """Download missing files from the official source, and check them."""
    image_size: int = 224
    """Height and width of large images after cropping."""
    classes: int | None = None
    """Number of labels in shards. Other data sets define it."""
    workers: int = 4
    """Processes that decode large images, per training process."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    threads: int | None = None
    """CPU threads; all if not given."""
    keep_memory: bool = False
    """Make the C library (glibc) keep freed memory for the whole process instead of giving it back."""
    shard: bool = False
    """Shard parameters, gradients and optimizer state over the processes (FSDP2), without full copies."""
    out: Path = Path("runs")
    """Directory in which each run makes its own, with metrics.csv and checkpoint.pt."""
    save_every: int | None = None
    """Steps between checkpoints within an epoch; only at its end if not given."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard."""
    resume: bool = False
    """Continue from the run's checkpoint, if there is one."""
    overwrite: bool = False
    """Remove the run's checkpoint, if there is one, and start from the beginning."""

    def __post_init__(self) -> None:
        """Check that the values are valid."""
        for name, holds, rule in (
            *(
                (name, getattr(self, name) is None or getattr(self, name) >= least, f"it must be at least {least}")
                for name, least in LEAST.items()
            ),
            ("seed", self.seed < 2**63, "it must be below 2**63"),
            ("lr", self.lr > 0, "it must be above 0"),
            ("momentum", 0 <= self.momentum < 1, "it must be from 0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, "it must be at least 0"),
            ("warmup", 0 <= self.warmup < 1, "it must be from 0 to below 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "it must be from 0 to below 1"),
            ("clip", self.clip is None or self.clip > 0, "it must be above 0"),
            ("ema", self.ema is None or 0 < self.ema < 1, "it must be above 0 and below 1"),
            ("cutmix", 0 <= self.cutmix <= 1, "it must be from 0 to 1"),
            ("distil", 0 <= self.distil <= 1, "it must be from 0 to 1"),
            ("distil", self.teacher or self.distil == Config.distil, "there is no teacher"),
            ("held_out", 0 < self.held_out < 1, "it must be above 0 and below 1"),
            ("held_out", self.split != "test" or self.held_out == Config.held_out, "split test holds nothing out"),
            ("decay", self.decay == "cores" or not self.shard, "shard needs decay of cores"),
            ("pad", self.pad == "zero" or self.augment, "augment is off, so no image is shifted"),
            ("pad", self.pad == "zero" or self.dataset in DATASETS, "large images are cropped, not shifted"),
            ("rank", self.rank is None or self.conv != DENSE, "dense convolutions have none"),
            ("rank_schedule", not self.rank_schedule or self.conv != DENSE, "dense convolutions have no ranks"),
            ("rank_schedule", not self.rank_schedule or self.epochs > 1, "one epoch would not train the last ranks"),
            ("rank_schedule", self.rank_schedule is None or 0 < self.rank_schedule <= 1, "it must be in (0, 1]"),
            (
                "rank_schedule",
                not self.rank_schedule or not (self.ema or self.compile or self.shard),
                "ema, compile and shard need ranks that stay",
            ),
            ("init", self.init is None or self.conv != DENSE, "dense convolutions have none"),
            ("overwrite", not (self.overwrite and self.resume), "so is resume: a run goes on or begins anew"),
        ):
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)}, but {rule}")

    @classmethod
    def from_yaml(cls, path: Path) -> "Config":
        """Return the configuration of a YAML file. Fields that it does not name have their defaults.

        Raises:
            ConfigError: the file cannot be read, or has an unknown key or an invalid value.
        """
        return read_yaml(cls, path)

    @property
    def experiment(self) -> dict[str, Any]:
        """The fields that determine the result. Runs with equal fields have equal results. A teacher has its name."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in SURROUNDINGS}
        return own | {"teacher": self.teacher and network_name(self.teacher)}

    @property
    def arm(self) -> str:
        """``name``, or a short name of the convolutions: dense, tr-0.2, tucker-16x16."""
        if self.name is not None:
            return self.name
        rank = "x".join(map(str, self.rank)) if isinstance(self.rank, tuple) else self.rank
        return self.conv if rank is None else f"{self.conv}-{rank}"

    @property
    def directory(self) -> Path:
        """The directory that the run writes to."""
        return self.out / f"{self.dataset}-{self.model}-{self.arm}-seed{self.seed}"

    def network(self, in_channels: int, num_classes: int, **options: Any) -> nn.Module:
        """Return an initialised network on the CPU. It depends only on the seed, and leaves the random state unchanged.

        Raises:
            BuildError: the layer rejects its rank or its init.
        """
        own = {name: value for name, value in (("rank", self.rank), ("init", self.init)) if value is not None}
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seed)
            try:
                if self.model in PRESETS:
                    return tednet_network(
                        PRESETS[self.model], self.conv, self.rank, self.init, num_classes, in_channels
                    )
                conv = partial(CONVOLUTIONS[self.conv], **own)
                return MODELS[self.model](conv=conv, in_channels=in_channels, num_classes=num_classes, **options)
            except (TypeError, ValueError, RuntimeError, MemoryError) as error:  # the last two: too large
                raise BuildError(f"{self.model} with {self.arm} convolutions cannot be built: {error}") from error


def presets(arguments: Sequence[str] | None) -> tuple[Path, ...]:
    """Return the paths after --config. Presets replace the defaults, so they are read before the other flags."""

    def only(config: tuple[Path, ...] = ()) -> tuple[Path, ...]:
        return config

    paths, _ = tyro.cli(only, args=arguments, return_unknown_args=True, add_help=False)
    return paths


def read_yaml(kind: type[Kind], path: Path) -> Kind:
    """Return a dataclass with the values of a YAML file and defaults for the rest. See Config.from_yaml."""
    try:
        preset = yaml_text.read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if not isinstance(preset, dict):
        raise ConfigError(f"{path} holds {preset!r}, but lines of the form `field: value` are needed")
    hints = get_type_hints(kind)
    for key, value in preset.items():
        if key not in hints:
            raise ConfigError(f"{path} has the key {key!r}, but only {', '.join(hints)} are known")
        try:
            preset[key] = _fit(value, hints[key])
        except TypeError as error:
            accepted = inspect.formatannotation(hints[key])
            raise ConfigError(f"{path}: {key} is {value!r}, but {accepted} is accepted") from error
    try:
        return kind(**preset)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _fit(value: Any, hint: Any) -> Any:
    """Convert a YAML value to the type of its field, or raise TypeError. YAML has no tuples and no paths."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for option in arguments:
            try:
                return _fit(value, option)
            except TypeError:
                continue
    elif origin is tuple and isinstance(value, list):
        return tuple(_fit(item, arguments[0]) for item in value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint or (origin is Literal and value in arguments):
        return value
    raise TypeError
