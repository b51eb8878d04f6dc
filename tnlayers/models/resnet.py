"""ResNets for small images, built from any convolution that takes ``nn.Conv2d``'s arguments.

The networks of section 4.2 of He et al.: a stem, three stages of ``(depth - 2) / 6`` blocks with 16, 32 and 64
channels, global average pooling and one linear layer. Shortcuts have no parameters (option A), or are 1x1 convolutions
where the channels change (option B). The pooling is global, so images may have any size.

A network never draws its convolutions' weights: each convolution initialises itself. So the default is
:func:`dense_conv` instead of ``nn.Conv2d``, whose own draw has a sixth of the variance that preserves the signal behind
a ReLU.

Reference:
    K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers import validate

__all__ = ["BasicBlock", "ResNet", "dense_conv", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]

STAGES = (16, 32, 64)  # channels
SHORTCUTS = ("A", "B")


def dense_conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    """Make an ``nn.Conv2d`` with He's rule, the tensor layers' default: normal, ``Var(W) = 2 / fan_in``."""
    conv = nn.Conv2d(*args, **kwargs)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    return conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them: ``relu(x' + bn2(conv2(relu(bn1(conv1(x))))))``.

    ``x'`` is ``x``. Where the block changes size or channels, it is every ``stride``-th pixel of ``x`` with zeros for
    the new channels (option A), or a strided 1x1 convolution and a normalisation of ``x`` (option B).

    Args:
        in_channels: channels of the input.
        channels: channels of the output, at least ``in_channels``.
        stride: stride of the first convolution.
        conv: makes a convolution from ``nn.Conv2d``'s arguments.
        norm: makes a normalisation from a number of channels.
        shortcut: 'A' or 'B'.

    Shape:
        (batch, in_channels, height, width) to (batch, channels, ceil(height / stride), ceil(width / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        conv: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
        shortcut: str = "A",
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = conv(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.stride = stride
        self.new_channels = channels - in_channels
        self.downsample: nn.Module | None = None
        if validate.choice("shortcut", shortcut, SHORTCUTS) == "B":
            self.downsample = projection(in_channels, channels, stride, conv, norm)

    def shortcut(self, x: Tensor) -> Tensor:
        """Apply option B; or option A: subsample the pixels, and pad the channels with zeros, half on each side."""
        if self.downsample is not None:
            projected: Tensor = self.downsample(x)
            return projected
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + self.shortcut(x))


def projection(
    in_channels: int, channels: int, stride: int, conv: Callable[..., nn.Module], norm: Callable[[int], nn.Module]
) -> nn.Module | None:
    """Make the shortcut of option B, a strided 1x1 convolution and a normalisation; None if no size changes."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(conv(in_channels, channels, 1, stride=stride, bias=False), norm(channels))


def stage(
    blocks: int,
    in_channels: int,
    width: int,
    stride: int,
    block: Callable[[int, int, int], nn.Module],
    expansion: int = 1,
) -> nn.Sequential:
    """Make a sequence of blocks. The first has the stride; each outputs ``expansion * width`` channels."""
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(width * expansion, width, 1) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """A residual network for small images.

    Args:
        depth: number of layers with weights; 2 more than a multiple of 6.
        conv: makes every convolution but the stem from ``nn.Conv2d``'s arguments: a layer class, or a partial of one.
        num_classes: size of the output.
        in_channels: channels of the images.
        norm: makes a normalisation from a number of channels; ``nn.Identity`` for none.
        stem: makes the first convolution. It is dense by default: it has only 144 parameters per image channel, and
            the other layers' keep ratio would leave it one or two filters.
        linear: makes the last layer from numbers of input and output features.
        shortcut: 'A', without parameters, or 'B', with 1x1 convolutions made by ``conv``.

    Shape:
        (batch, in_channels, height, width) to (batch, num_classes), for any height and width.

    Raises:
        ValueError: depth or shortcut is invalid.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> net = resnet20(num_classes=10, in_channels=1)
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in resnet20().parameters())
        269722
        >>> from tnlayers import TRConv2d
        >>> net = resnet20(conv=partial(TRConv2d, rank=0.2))
        >>> sum(p.numel() for p in net.parameters()) / 269722 < 0.22
        True
    """

    def __init__(
        self,
        depth: int,
        conv: Callable[..., nn.Module] = dense_conv,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        stem: Callable[..., nn.Module] = dense_conv,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
        shortcut: str = "A",
    ) -> None:
        blocks, remainder = divmod(depth - 2, 2 * len(STAGES))
        if remainder or blocks < 1:
            raise ValueError(f"depth is {depth}, but these ResNets have 6 n + 2 layers: 8, 14, 20, 26, 32, ...")
        super().__init__()
        self.conv1 = stem(in_channels, STAGES[0], 3, padding=1, bias=False)
        self.bn1 = norm(STAGES[0])
        block = partial(BasicBlock, conv=conv, norm=norm, shortcut=shortcut)
        self.layer1 = stage(blocks, STAGES[0], STAGES[0], 1, block)
        self.layer2 = stage(blocks, STAGES[0], STAGES[1], 2, block)
        self.layer3 = stage(blocks, STAGES[1], STAGES[2], 2, block)
        self.linear = linear(STAGES[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.layer3(self.layer2(self.layer1(h)))
        logits: Tensor = self.linear(h.mean(dim=(2, 3)))
        return logits


resnet20 = partial(ResNet, 20)
resnet32 = partial(ResNet, 32)
resnet44 = partial(ResNet, 44)
resnet56 = partial(ResNet, 56)
resnet110 = partial(ResNet, 110)
