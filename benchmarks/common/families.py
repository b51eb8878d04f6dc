"""The families of layers that the benchmarks compare, and the layers that are timed."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tnlayers
from benchmarks.common.names import DENSE
from benchmarks.common.timing import Step
from tnlayers import models
from tnlayers.formats import factorize

CONVOLUTIONS = {DENSE: models.dense_conv} | {
    name: getattr(tnlayers, f"{form.__name__}Conv2d")
    for name, form in tnlayers.FORMATS.items()
    if name != "einsum"  # not a family: the user writes the network
}
MODELS = {
    name: getattr(models, name)
    for name in (*(f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 18, 34, 50, 101, 152)), "wrn28_10")
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "cp": (tnlayers.CPConv2d, {}),
    "tucker": (tnlayers.TuckerConv2d, {}),
    "tt": (tnlayers.TTConv2d, {}),
    "tt-chain": (tnlayers.TTConv2d, {"layout": "chain"}),
    "tr": (tnlayers.TRConv2d, {}),
    "btt": (tnlayers.BTTConv2d, {}),
}
SPLIT = ("tt", "tr", "btt")  # split into three factors where the rank is an integer, as tednet's users do
ALL_FAMILIES = FAMILIES | {name: (conv, {}) for name, conv in CONVOLUTIONS.items() if name not in (DENSE, *FAMILIES)}
"""FAMILIES, and every other format that needs no network from the user."""
WIDTHS = (64, 128, 256, 512)
IMAGE, LINEAR, TRANSPOSED = "image", "linear", "transposed"


class LayerKind(NamedTuple):
    """A kind of layer that is timed.

    Attributes:
        name: end of the layers' names, here and in torch.
        ndim: number of spatial axes.
        shapes: input and output channels, size of the input along each axis, stride, kernel size.
        batches: numbers of images, sounds, volumes or rows.
        ranks, families: what is timed by default.
    """

    name: str
    ndim: int
    shapes: tuple[tuple[int, int, int, int, int], ...]
    batches: tuple[int, ...]
    ranks: tuple[float, ...] = (0.1,)
    families: tuple[str, ...] = (*FAMILIES,)


KINDS = {
    IMAGE: LayerKind(
        "Conv2d",
        2,
        shapes=(
            (64, 64, 32, 1, 3), (64, 128, 32, 2, 3), (128, 128, 16, 1, 3), (256, 256, 14, 1, 3), (512, 512, 7, 1, 3),
            (64, 64, 56, 1, 3),
        ),
        batches=(1, 32),
        ranks=(8, 10, 16, 0.05, 0.1, 0.25),
    ),
    LINEAR: LayerKind(
        "Linear",
        0,
        shapes=((256, 256, 1, 1, 1), (1024, 1024, 1, 1, 1), (1024, 4096, 1, 1, 1), (4096, 4096, 1, 1, 1)),
        batches=(1, 32, 512, 4096),
        families=(*FAMILIES, "blocktt"),
    ),
    TRANSPOSED: LayerKind(
        "ConvTranspose2d",
        2,
        shapes=((256, 128, 8, 2, 4), (128, 64, 16, 2, 4), (64, 32, 32, 2, 4)),
        batches=(1, 32),
    ),
    "audio": LayerKind(
        "Conv1d",
        1,
        shapes=((64, 64, 8000, 5, 10), (256, 256, 1600, 5, 10), (256, 256, 400, 1, 3), (512, 512, 800, 2, 3)),
        batches=(1, 8),
    ),
    "volume": LayerKind(
        "Conv3d",
        3,
        shapes=((16, 16, 32, 1, 3), (32, 32, 24, 1, 3), (64, 64, 12, 1, 3)),
        batches=(1, 4),
    ),
}  # fmt: skip
"""What ``measure/speed.py`` times: images as in a ResNet; linear layers as in a transformer; layers that double the
size of an image; sounds; medical volumes."""


@dataclass(frozen=True)
class LayerCase:
    """A layer of a family, and its pass that is timed.

    Attributes:
        family: key of ALL_FAMILIES.
        shape: input and output channels, size along each axis, stride.
        rank, batch, mode: rank or keep ratio; number of inputs; 'train', 'infer' or 'frozen'.
        kind, kernel: key of KINDS, and kernel size.
    """

    family: str
    shape: tuple[int, int, int, int]
    rank: float
    batch: int
    mode: str
    kind: str = IMAGE
    kernel: int = 3

    @property
    def input_size(self) -> tuple[int, ...]:
        """Size of the input along each spatial axis."""
        return (self.shape[2],) * KINDS[self.kind].ndim

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a layer beside the channels, here and in torch."""
        if self.kind == LINEAR:
            return {"bias": False}
        padding = (self.kernel - 1) // 2
        return {"kernel_size": self.kernel, "stride": self.shape[3], "padding": padding, "bias": False}

    def layer(self, **kwargs: Any) -> Any:
        """Return the layer of tnlayers."""
        conv, options = ALL_FAMILIES[self.family]
        make = getattr(tnlayers, conv.__name__.removesuffix("Conv2d") + KINDS[self.kind].name)
        inputs, outputs, *_ = self.shape
        if isinstance(self.rank, int) and self.family in SPLIT:
            options = options | {"in_shape": factorize(inputs, 3), "out_shape": factorize(outputs, 3)}
        return make(inputs, outputs, rank=self.rank, **self.arguments, **options, **kwargs)

    def dense(self) -> nn.Module:
        """Return the layer of torch."""
        made: nn.Module = getattr(nn, KINDS[self.kind].name)(*self.shape[:2], **self.arguments)
        return made

    def step(self, module: nn.Module, x: Tensor) -> Step:
        """Return a function that runs one pass through a module."""
        if self.mode != "train":
            module.eval()
            if self.mode == "frozen" and isinstance(module, tnlayers.TensorLayer):
                tnlayers.freeze_(module)

            def infer() -> object:
                with torch.no_grad():
                    return module(x)

            return infer
        parameters = [*module.parameters()]
        with torch.no_grad():
            gradient = torch.randn_like(module(x))

        def train() -> object:
            return torch.autograd.grad(module(x), [x, *parameters], gradient)

        return train


@dataclass(frozen=True)
class SquareLayer:
    """A 3x3 layer of a family with equal input and output channels, at a keep ratio."""

    family: str
    channels: int
    keep: float

    def layer(self, **kwargs: Any) -> Any:
        """Return the layer of tnlayers."""
        kind, options = ALL_FAMILIES[self.family]
        return kind(self.channels, self.channels, 3, bias=False, rank=self.keep, **options, **kwargs)

    def __str__(self) -> str:
        return f"{self.family}, {self.channels} channels, keep {self.keep}"
