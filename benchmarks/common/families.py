"""The families of layers that the benchmarks compare, and the layers that are timed."""

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class LayerCase:
    """A layer of a family, and its pass that is timed."""

    family: str
    shape: tuple[int, int, int, int]
    rank: float
    batch: int
    mode: str

    def layer(self, **kwargs: Any) -> Any:
        """Return the layer of tnlayers."""
        kind, options = FAMILIES[self.family]
        inputs, outputs, _, stride = self.shape
        if isinstance(self.rank, int) and self.family in SPLIT:
            options = options | {"in_shape": factorize(inputs, 3), "out_shape": factorize(outputs, 3)}
        return kind(inputs, outputs, 3, stride=stride, padding=1, bias=False, rank=self.rank, **options, **kwargs)

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
