"""Networks that take their convolution class as an argument."""

from tnlayers.models.imagenet import (
    Bottleneck,
    ImageNetBlock,
    ImageNetResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from tnlayers.models.resnet import (
    BasicBlock,
    ResNet,
    dense_conv,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from tnlayers.models.tednet import tednet_resnet
from tnlayers.models.wide import WideBlock, WideResNet, wrn28_10

__all__ = [
    "BasicBlock", "Bottleneck", "ImageNetBlock", "ImageNetResNet", "ResNet", "WideBlock", "WideResNet", "dense_conv",
    "resnet18", "resnet20", "resnet32", "resnet34", "resnet44", "resnet50", "resnet56", "resnet101", "resnet110",
    "resnet152", "tednet_resnet", "wrn28_10",
]  # fmt: skip
