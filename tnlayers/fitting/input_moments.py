"""Second moments of layer inputs: the metric of fits to calibration data, and kernels corrected for new inputs."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers.backend.observe import Seen, observe
from tnlayers.backend.torch_state import own_precision
from tnlayers.fitting.metric import damped
from tnlayers.spec.geometry import Geometry

LARGEST_PATCH = 2304
"""Maximum patch size (its square: 42 MB). For larger patches, moments are over the channels alone."""
CHUNK = 2**25
"""Maximum number of patch entries in memory at a time, but at least those of one image."""


def channels(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the input channels at every position, of shape (groups, positions, channels of a group).

    Example:
        >>> channels(torch.ones(2, 6, 5), Geometry(6, 4, (3,), groups=2)).shape
        torch.Size([2, 10, 3])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(x.ndim - 1 - geometry.ndim, -1)
    return x.reshape(-1, geometry.groups, geometry.in_channels // geometry.groups).transpose(0, 1)


def columns(x: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Yield the patches that the kernel multiplies, (groups, positions, entries), for a few images at a time.

    An entry is an input channel at a kernel position, in the order of ``weight[0].flatten()``. It is an input channel
    alone if patches are too large or the layer is transposed, where a position uses only a part of the kernel.

    Example:
        >>> (found,) = columns(torch.ones(2, 6, 5), Geometry(6, 4, (3,), groups=2))
        >>> found.shape
        torch.Size([2, 6, 9])
    """
    ndim, groups, taps = geometry.ndim, geometry.groups, math.prod(geometry.kernel_size)
    patch = geometry.in_channels // groups * taps
    if taps == 1 or geometry.transposed or patch > LARGEST_PATCH:
        yield channels(x, geometry)
        return
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x.unsqueeze(0) if x.ndim == ndim + 1 else x
    pads = [amount for pair in reversed(geometry.pads) for amount in pair]
    positions = math.prod(geometry.output_size(x.shape[2:]))
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    steps = tuple(slice(None, None, step) for step in geometry.each("dilation"))
    for images in torch.split(x, max(1, CHUNK // (positions * patch * groups))):
        found = F.pad(images, pads, mode=mode) if any(pads) else images
        for axis, (span, stride) in enumerate(zip(geometry.spans, geometry.each("stride"), strict=True), start=2):
            found = found.unfold(axis, span, stride)
        # From (batch, channels, *positions, *span). The slices drop the positions that a dilated kernel skips.
        yield found[(slice(None),) * (2 + ndim) + steps].movedim(1, 1 + ndim).reshape(-1, groups, patch).transpose(0, 1)


def products(left: Tensor, right: Tensor) -> Tensor:
    """Sum outer products of rows: (groups, entries, entries) in float64, multiplied in the rows' dtype, no autocast."""
    with own_precision(left):
        return left.mT.matmul(right).to("cpu", torch.float64)


def second_moments(pairs: Iterable[tuple[Tensor, Tensor]], geometry: Geometry) -> tuple[Tensor, Tensor] | None:
    """Sum ``x x^T`` and ``x0 x^T`` over batch and positions, each (groups, entries, entries). None without inputs.

    Args:
        pairs: original inputs x0 of a layer, and its new inputs x.
        geometry: geometry of the layer.
    """
    own = cross = None
    for before, now in pairs:
        for old, new in zip(columns(before, geometry), columns(now, geometry), strict=True):
            squares, others = products(new, new), products(old, new)
            own = squares if own is None else own + squares
            cross = others if cross is None else cross + others
    # x x^T is symmetric only up to rounding.
    return None if own is None or cross is None else ((own + own.mT) / 2, cross)


def follow(kernel: Tensor, own: Tensor, cross: Tensor) -> Tensor:
    r"""Return the kernel whose outputs on new inputs are nearest to the old kernel's on the original inputs.

    It solves, for each group, :math:`\min_{W'} \sum \|W x_0 - W' x\|^2`, that is :math:`W' = W (\sum x_0 x^T)
    (\sum x x^T)^{-1}`. A thousandth of the mean diagonal is added to both sums, which pulls W' towards W.

    Args:
        kernel: shape ``(out, in of one group, *kernel)``.
        own: first sum of ``second_moments``.
        cross: second sum of ``second_moments``.

    Reference:
        Zhang, Zou, He, Sun, "Accelerating Very Deep Convolutional Networks for Classification and Detection", IEEE
        TPAMI 2016, for the asymmetric reconstruction.

    Example:
        >>> x = torch.randn(1, 3, 50, dtype=torch.float64)
        >>> kernel = torch.randn(2, 3, dtype=torch.float64)  # for half the inputs, twice the kernel
        >>> new = follow(kernel, x @ x.mT / 4, x @ x.mT / 2)
        >>> bool((new - 2 * kernel).norm() < 0.02 * kernel.norm())
        True
    """
    (groups, side), (out, width) = own.shape[:2], kernel.shape[:2]
    mean = own.diagonal(dim1=1, dim2=2).mean(1)
    # Moments over channels alone correct every kernel position in the same way.
    split = kernel.to("cpu", torch.float64).reshape(groups, out // groups, width, -1)
    rows = split.flatten(2) if side > width else split.mT.flatten(1, 2)
    found = torch.linalg.solve(damped(own, mean), rows @ damped(cross, mean), left=False)
    found = found if side > width else found.reshape(groups, out // groups, -1, width).mT
    new: Tensor = found.reshape(kernel.shape).to(kernel.device, kernel.dtype)
    return new


def pairs(
    model: nn.Module,
    layer: nn.Module,
    stand_ins: Mapping[nn.Module, nn.Module],
    examples: Iterable[Any],
    once: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a layer's inputs in runs of the original model, and with the modules ``stand_ins`` in place.

    Runs end at the layer if it is called ``once`` in each of them.
    """
    for example in examples:
        before, now = (_inputs(model, layer, example, others, once) for others in ({}, stand_ins))
        # If control flow depends on values, the inputs may not correspond. Then use the new ones for both.
        same = [x.shape for x in before] == [x.shape for x in now]
        yield from zip(before if same else now, now, strict=True)


def _inputs(
    model: nn.Module, layer: nn.Module, example: Any, stand_ins: Mapping[nn.Module, nn.Module], once: bool
) -> list[Tensor]:
    found: list[Tensor] = []

    def see(_: nn.Module, x: Tensor) -> None:
        found.append(x if once else x.clone())  # a copy, because later modules may write into it in place
        if once:
            raise Seen

    observe(model, [layer], [example], see, stand_ins)
    return found
