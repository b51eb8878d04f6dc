"""tednet's compressed CIFAR ResNets built from our layers: the same networks and numbers of parameters.

Every layer is a tensor network, including the stem and the last layer. Channels have the shapes of ``SHAPES``.

Reference:
    Y. Pan, M. Wang, Z. Xu, "TedNet: A Pytorch Toolkit for Tensor Decomposition Networks", Neurocomputing 2022.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

from torch import nn

from tnlayers import validate
from tnlayers.layers import by_format
from tnlayers.models.resnet import ResNet

SHAPES = {3: (3, 1, 1), 16: (4, 2, 2), 32: (4, 4, 2), 64: (4, 4, 4), 100: (10, 10, 1)}
"""tednet's factors of numbers of channels and classes; others are ``(n, 1, 1)``."""
FORMATS = ("tr", "tt", "tucker", "cp", "btt")
BLOCKS = 2
"""Block terms of BTT."""
PLACES = ("stem", "layer1", "layer2's first block", "layer2", "layer3's first block", "layer3", "linear")
"""Places in the network of the seven ranks."""


def channel_shape(channels: int, format: str) -> tuple[int, ...]:
    """Return the factors of a number of channels. 'tr' omits ones; 'cp' and 'tucker' do not factorise channels.

    Example:
        >>> channel_shape(32, "tt"), channel_shape(3, "tr"), channel_shape(32, "cp")
        ((4, 4, 2), (3,), (32,))
    """
    shape = SHAPES.get(channels, (channels, 1, 1))
    if format == "tr":
        return tuple(size for size in shape if size > 1) or (1,)
    return shape if format in ("tt", "btt") else (channels,)


def tednet_resnet(
    depth: int, format: str, ranks: int | Sequence[int], num_classes: int = 10, in_channels: int = 3, **kwargs: Any
) -> ResNet:
    """Make tednet's CIFAR ResNet, with the same networks and numbers of parameters, initialised by our solver.

    Args:
        depth: 2 more than a multiple of 6.
        format: 'tr', 'tt', 'tucker' (tednet's Tucker-2), 'cp' or 'btt' (with 2 block terms).
        ranks: one, or seven: of the stem, layer1, layer2's first block, layer2's others, layer3's first block, layer3's
            others, and the last layer. As in tednet, ranks are not clipped to their maximum.
        num_classes: size of the output.
        in_channels: channels of the images.
        **kwargs: other arguments of every layer: init, strategy, memory, device, dtype.

    Raises:
        TypeError, ValueError: depth, format or rank is invalid.

    Example:
        >>> [sum(p.numel() for p in tednet_resnet(20, "tr", rank, device="meta").parameters()) for rank in (2, 6, 10)]
        [3626, 21546, 57386]
    """
    validate.choice("format", format, FORMATS)
    if not isinstance(ranks, int | Sequence):
        raise TypeError(f"ranks is {ranks!r}; it must be one integer or {len(PLACES)}: {', '.join(PLACES)}")
    given = [ranks] * len(PLACES) if isinstance(ranks, int) else list(ranks)
    if len(given) != len(PLACES):
        raise ValueError(
            f"ranks has {len(given)} entries; it must be one integer or {len(PLACES)}: {', '.join(PLACES)}"
        )
    given = [validate.integer(f"the rank of {place}", rank) for place, rank in zip(PLACES, given, strict=True)]
    pairs = 2 * max((depth - 2) // 6, 1)  # convolutions of a stage
    counts = (pairs, 2, pairs - 2, 2, pairs - 2)
    order = chain.from_iterable(repeat(rank, count) for rank, count in zip(given[1:-1], counts, strict=True))
    family = {"tr": "TR", "tt": "TT", "tucker": "Tucker", "cp": "CP", "btt": "BTT"}[format]
    options: dict[str, Any] = {"blocks": BLOCKS} if format == "btt" else {}

    def conv(taken: Iterator[int]) -> Callable[..., nn.Module]:
        def make(inputs: int, outputs: int, *args: Any, **own: Any) -> nn.Module:
            own |= {"in_shape": channel_shape(inputs, format), "out_shape": channel_shape(outputs, format)}
            layer: nn.Module = getattr(by_format, f"{family}Conv2d")(
                inputs, outputs, *args, rank=next(taken), **own, **options, **kwargs
            )
            return layer

        return make

    def linear(inputs: int, outputs: int) -> nn.Module:
        own = {"rank": given[-1], "in_shape": SHAPES[inputs], "out_shape": channel_shape(outputs, format)} | options
        kind = f"{family}Linear"
        if format == "cp":
            own["out_shape"] = channel_shape(outputs, "tt")
        if format == "tucker":  # tednet's last layer has the input's three factors in two cores
            kind, own["network"] = "EinsumLinear", "i1 ri, ri i2 i3 ro, ro o"
        made: nn.Module = getattr(by_format, kind)(inputs, outputs, **own, **kwargs)
        return made

    return ResNet(depth, conv(order), num_classes, in_channels, stem=conv(iter(given[:1])), linear=linear)
