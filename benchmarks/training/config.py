"""What a training run is: its fields, their defaults, and the YAML presets that state what differs from them."""

import inspect
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from benchmarks.common.errors import ConfigError
from benchmarks.common.families import CONVOLUTIONS, MODELS
from benchmarks.common.names import DENSE
from benchmarks.training.data.in_memory import DATASETS
from benchmarks.training.data.on_disk import DATASETS as LARGE
from benchmarks.training.tednets import PRESETS, tednet_network
from tnlayers.tensorize import yaml_text

# Fields that say where and how a run is computed, not what: a checkpoint may be resumed with others.
SURROUNDINGS = (
    "name", "data_dir", "download", "workers", "device", "threads", "shard", "out", "save_every", "tensorboard",
    "resume", "overwrite",
)  # fmt: skip
LEAST = {
    "epochs": 1, "batch_size": 1, "images": 1, "image_size": 1, "classes": 2, "workers": 0, "save_every": 1,
    "threads": 1, "seed": 0,
}  # fmt: skip
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Config:
    """One training run."""

    dataset: Literal[(*DATASETS, *LARGE)] = "digits"
    model: Literal[(*MODELS, *PRESETS)] = "resnet20"
    conv: Literal[tuple(CONVOLUTIONS)] = DENSE
    """The format of every convolution but the stem, which stays dense."""
    rank: int | float | tuple[int, ...] | None = None
    """Rank of a tensor format: every bond, a keep ratio, or each bond; the format's own default where not given. Of
    tednet's networks: one for all layers, or seven."""
    init: str | None = None
    """Mode of a tensor format's initialisation; the format's own default where not given. Of tednet's networks also
    `tednet`: as tednet draws them."""
    epochs: int = 20
    batch_size: int = 64
    """Images in a step, of all processes together."""
    images: int | None = None
    """Train on so many images per epoch, others in each; all where not given."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    lr: float = 0.1
    """Largest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    """Up along a line, then down to zero along a cosine; or torch's OneCycleLR."""
    momentum: float = 0.9
    """Of SGD; the first of AdamW's betas."""
    weight_decay: float = 0.0005
    """Of all that has two axes or more: kernels, cores, the last layer's matrix. L2 in SGD, decoupled in AdamW."""
    warmup: float = 0.1
    """Share of all steps during which the learning rate rises."""
    clip: float | None = None
    """Largest norm of the gradient; longer ones are shortened to it."""
    ema: float | None = None
    """Evaluate an exponential moving average of the weights, which keeps this share of itself in each step. It is in
    the checkpoint, beside the weights as they are trained."""
    label_smoothing: float = 0.0
    augment: bool = True
    """Shift training images, and mirror those that may be; random crops of large ones."""
    cutmix: float = 0.0
    """Share of the batches in which a box of each image comes from another one of the same process, and so do its
    labels (Yun 2019)."""
    seed: int = 0
    """Of the initialisation, the order of the images and their augmentation."""
    split: Literal["test", "validation"] = "test"
    """What accuracy is measured on. Tune on validation: a fifth of the training images, then not trained on."""
    amp: bool = False
    """Compute in bfloat16 where that is safe (autocast)."""
    channels_last: bool = False
    """Keep images and dense kernels with their channels last in memory."""
    compile: bool = False
    """Compile the network (torch.compile)."""
    sync_norm: bool = True
    """With several processes, batch normalisation sees the images of all."""

    name: str | None = None
    """Of the arm in tables and directories; its convolutions and their rank where not given."""
    data_dir: Path = Path("data")
    """Directory with the official files of Fashion-MNIST or CIFAR-10, or with a data set of one's own."""
    download: bool = False
    """Fetch missing files from the official source, and check them."""
    image_size: int = 224
    """Height and width of large images, once cropped."""
    classes: int | None = None
    """How many labels shards have; the other data sets tell."""
    workers: int = 4
    """Processes that decode large images, of each process that trains."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    threads: int | None = None
    """CPU threads; all where not given."""
    shard: bool = False
    """Spread parameters, gradients and the optimizer's state over the processes (FSDP2), not a copy to each."""
    out: Path = Path("runs")
    """Directory in which each run makes one of its own, with metrics.csv and checkpoint.pt."""
    save_every: int | None = None
    """Steps between checkpoints within an epoch; at its end alone where not given."""
    tensorboard: bool = False
    """Write what metrics.csv has for TensorBoard too."""
    resume: bool = False
    """Go on from the run's checkpoint, if there is one."""
    overwrite: bool = False
    """Begin anew, and remove the run's checkpoint, if there is one."""

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
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
            ("rank", self.rank is None or self.conv != DENSE, "dense convolutions have none"),
            ("init", self.init is None or self.conv != DENSE, "dense convolutions have none"),
            ("overwrite", not (self.overwrite and self.resume), "so is resume: a run goes on or begins anew"),
        ):
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)}, but {rule}")

    @classmethod
    def from_yaml(cls, path: Path) -> "Config":
        """The defaults, but for what a YAML file says.

        Raises:
            ConfigError: the file cannot be read, has an unknown key, or a value of a wrong type or size.
        """
        return read_yaml(cls, path)

    @property
    def experiment(self) -> dict[str, Any]:
        """The fields that say what is computed: with these equal, so is the result."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in SURROUNDINGS}

    @property
    def arm(self) -> str:
        """``name``, or a short one for the convolutions: dense, tr-0.2, tucker-16x16."""
        if self.name is not None:
            return self.name
        rank = "x".join(map(str, self.rank)) if isinstance(self.rank, tuple) else self.rank
        return self.conv if rank is None else f"{self.conv}-{rank}"

    @property
    def directory(self) -> Path:
        """Where the run writes."""
        return self.out / f"{self.dataset}-{self.model}-{self.arm}-seed{self.seed}"

    def network(self, in_channels: int, num_classes: int, **options: Any) -> nn.Module:
        """A freshly initialised network on the CPU; the same one for the same seed, and no other random state moves.

        Raises:
            ConfigError: the layer refuses its rank or its init.
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
            except (TypeError, ValueError, RuntimeError, MemoryError) as error:  # the last two: it is too large
                raise ConfigError(f"{self.model} with {self.arm} convolutions cannot be built: {error}") from error


def read_yaml(kind: type[Kind], path: Path) -> Kind:
    """A dataclass' defaults, but for what a YAML file says. For the exceptions, see Config.from_yaml."""
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
    """A value read from YAML as the type of its field, or TypeError. YAML knows no tuples and no paths."""
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
