"""ResNet-18 to -152 for large images, with torchvision's module names, so that its weights load.

As in torchvision, the stride of a bottleneck is in its 3x3 convolution, not in the first 1x1 (variant v1.5).

Reference:
    K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from tnlayers.models.resnet import dense_conv, projection, stage

Make = Callable[..., nn.Module]
WIDTHS = (64, 128, 256, 512)  # channels of the stages; a bottleneck outputs four times as many


class ImageNetBlock(nn.Module):
    """A residual block of two 3x3 convolutions.

    Args:
        in_channels: channels of the input.
        width: channels of the output.
        stride: stride of the first convolution.
        conv: makes a convolution from ``nn.Conv2d``'s arguments.
        norm: makes a normalisation from a number of channels.

    Shape:
        (batch, in_channels, height, width) to (batch, channels, ceil(height / stride), ceil(width / stride)).
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        conv: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.downsample = projection(in_channels, width * self.expansion, stride, conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(h + (x if self.downsample is None else self.downsample(x)))
        return out


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions; the last has four times as many channels.

    Args:
        in_channels: channels of the input.
        width: channels inside, a quarter of the output's.
        stride: stride of the 3x3 convolution.
        conv: makes a convolution from ``nn.Conv2d``'s arguments.
        norm: makes a normalisation from a number of channels.

    Shape:
        (batch, in_channels, height, width) to (batch, 4 * channels, ceil(height / stride), ceil(width / stride)).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        conv: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = conv(width, width * self.expansion, 1, bias=False)
        self.bn3 = norm(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, width * self.expansion, stride, conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        out: Tensor = self.relu(h + (x if self.downsample is None else self.downsample(x)))
        return out


class ImageNetResNet(nn.Module):
    """A residual network for large images.

    Args:
        block: ``ImageNetBlock`` or ``Bottleneck``.
        blocks: number of blocks in each of the four stages.
        conv: makes every convolution but the stem from ``nn.Conv2d``'s arguments: a layer class, or a partial of one.
        num_classes: size of the output.
        in_channels: channels of the images.
        norm: makes a normalisation from a number of channels.
        stem: makes the first convolution, 7x7, dense by default.
        linear: makes the last layer from numbers of input and output features.

    Shape:
        (batch, in_channels, height, width) to (batch, num_classes), for any height and width.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in resnet50().parameters())
        25557032
        >>> from tnlayers import TRConv2d
        >>> resnet18(conv=partial(TRConv2d, rank=0.1), num_classes=10)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        blocks: Sequence[int],
        conv: Callable[..., nn.Module] = dense_conv,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        stem: Callable[..., nn.Module] = dense_conv,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.conv1 = stem(in_channels, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        made: Any = partial(block, conv=conv, norm=norm)
        channels = WIDTHS[0]
        stages: list[nn.Module] = []
        for width, count in zip(WIDTHS, blocks, strict=True):
            stages.append(stage(count, channels, width, 2 if stages else 1, made, made.func.expansion))
            channels = width * made.func.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        h = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        logits: Tensor = self.fc(self.avgpool(h).flatten(1))
        return logits


resnet18 = partial(ImageNetResNet, ImageNetBlock, (2, 2, 2, 2))
resnet34 = partial(ImageNetResNet, ImageNetBlock, (3, 4, 6, 3))
resnet50 = partial(ImageNetResNet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(ImageNetResNet, Bottleneck, (3, 4, 23, 3))
resnet152 = partial(ImageNetResNet, Bottleneck, (3, 8, 36, 3))
