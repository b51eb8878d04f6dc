"""Wide ResNets for small images.

Reference:
    S. Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers.models.resnet import STAGES, dense_conv, stage


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU, and the shortcut around them.

    Where size or channels change, the shortcut is a 1x1 convolution of the first activation.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: stride of the first convolution.
        conv: makes a convolution from ``nn.Conv2d``'s arguments.
        norm: makes a normalisation from a number of channels.
        dropout: dropout probability between the convolutions.

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
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.bn1 = norm(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride > 1 or in_channels != channels:
            self.shortcut = conv(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        h = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = kept + self.conv2(self.dropout(F.relu(self.bn2(self.conv1(h)))))
        return out


class WideResNet(nn.Module):
    """A wide residual network for small images.

    Args:
        depth: number of layers with weights; 4 more than a multiple of 6.
        width: factor of the stages' 16, 32 and 64 channels.
        conv: makes every convolution but the stem from ``nn.Conv2d``'s arguments: a layer class, or a partial of one.
        num_classes: size of the output.
        in_channels: channels of the images.
        norm: makes a normalisation from a number of channels.
        stem: makes the first convolution, dense by default.
        linear: makes the last layer from numbers of input and output features.
        dropout: dropout probability between a block's convolutions.

    Shape:
        (batch, in_channels, height, width) to (batch, num_classes), for any height and width.

    Raises:
        ValueError: depth is invalid.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in wrn28_10().parameters())
        36479194
    """

    def __init__(
        self,
        depth: int,
        width: int,
        conv: Callable[..., nn.Module] = dense_conv,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        stem: Callable[..., nn.Module] = dense_conv,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
        dropout: float = 0.0,
    ) -> None:
        blocks, remainder = divmod(depth - 4, 2 * len(STAGES))
        if remainder or blocks < 1:
            raise ValueError(f"depth is {depth}, but wide ResNets have 6 n + 4 layers: 10, 16, 22, 28, 34, 40, ...")
        super().__init__()
        block = partial(WideBlock, conv=conv, norm=norm, dropout=dropout)
        first, second, third = (width * channels for channels in STAGES)
        self.conv1 = stem(in_channels, STAGES[0], 3, padding=1, bias=False)
        self.layer1 = stage(blocks, STAGES[0], first, 1, block)
        self.layer2 = stage(blocks, first, second, 2, block)
        self.layer3 = stage(blocks, second, third, 2, block)
        self.bn = norm(third)
        self.linear = linear(third, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        h = F.relu(self.bn(self.layer3(self.layer2(self.layer1(self.conv1(x))))))
        logits: Tensor = self.linear(h.mean(dim=(2, 3)))
        return logits


wrn28_10 = partial(WideResNet, 28, 10)
