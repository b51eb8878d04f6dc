"""Networks whose every convolution is an argument."""

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

__all__ = ["BasicBlock", "ResNet", "dense_conv", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
