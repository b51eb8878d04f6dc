"""Conversion of a layer to plain torch modules, which run, unpickle and export without this library.

Each input step contracts ``x`` with a block of cores, and is one convolution, as in ``tnlayers.ops.input_step``. Axes
that ``x`` must keep, or that the block lacks, are its groups; finished axes are summed. The convolution of a kernel
axis takes that axis's stride, padding and dilation. Only the last convolution has a bias. So all earlier ones commute
with padding of any mode, and each axis can be padded on its own.

A convolution maps channels in the order (groups, summed) to (groups, new). The order within each of the three is free,
since the weight can be permuted, but the order of the groups is kept. Where this does not suffice, one
``nn.ChannelShuffle`` may precede a convolution or end the sequence. An A* search finds the sequence with the fewest
multiply-adds. Its lower bound is the cheapest sequence with every order allowed.

Sets of cores and of axes are bit masks, see ``tnlayers.planning.search_space``. An order of axes is a tuple of sets,
each in any order; it omits axes of size 1.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from heapq import heappop, heappush
from itertools import combinations, count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnlayers.backend.sharding import whole
from tnlayers.backend.views import exchange
from tnlayers.layers.base import TensorLayer
from tnlayers.ops.contraction import contract
from tnlayers.planning.search_space import CoreMask, SearchSpace, refine

MANY = 8
"""Maximum number of cores for a search of every sequence. Of more cores, some are contracted first."""

_Order = tuple[int, ...]


class _Stage(NamedTuple):
    """One convolution and the channel shuffle before it; without cores, the shuffle at the end.

    Attributes:
        absorbed: cores that earlier stages contracted with ``x``.
        cores: cores that this stage contracts with ``x``.
        front: axes that the shuffle moves from the front to the back; 0 without a shuffle.
        order: order of the axes of ``x`` after the shuffle.
    """

    absorbed: CoreMask
    cores: CoreMask
    front: int
    order: _Order


@torch.enable_grad()  # so that requires_grad of parametrized cores is right
def unfold(layer: TensorLayer) -> nn.Module:
    """Return the sequence of plain torch layers with the layer's function and the fewest multiply-adds.

    A tensor ring becomes 1x1, grouped 3x3 and 1x1 convolutions, CP separable ones, BlockTT two grouped ones and a
    shuffle. Cores that are cheaper together are contracted first: all of them where nothing is cheaper than the dense
    kernel. Where a block lacks some groups, its weight is repeated along them. This keeps the cores' multiply-adds, and
    may add parameters, up to the dense kernel's number. Linear layers have no groups, so each block must contract all
    axes of ``x``.

    The count of multiply-adds ignores borders: a stride divides the positions, a transposed stride multiplies them.
    Weights are contracted in float64, where the device has it, and rounded once to the layer's dtype.

    The sequence does not accept a transposed convolution's ``output_size``. With an ``nn.ChannelShuffle``, which needs
    the batch axis, it does not accept an unbatched input either.

    Args:
        layer: a layer of any format, also on the meta device, where the result then is; of parametrized cores, the
            values are used.

    Returns:
        nn.Module: an ``nn.Sequential`` of convolutions (transposed only for a kernel axis) and ``nn.ChannelShuffle``
        where needed, or of ``nn.Linear``. Where no sequence has fewer multiply-adds than the dense kernel,
        ``layer.to_dense()``. Device, dtype, training flag and requires_grad are the layer's; no memory is shared.

    Raises:
        TypeError: ``layer`` is no tensor layer.
        ValueError: a core has another shape than the network says.

    Example:
        >>> from tnlayers import CPConv2d
        >>> unfold(CPConv2d(16, 32, 3, padding=1, rank=8, bias=False))
        Sequential(
          (0): Conv2d(16, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)
          (1): Conv2d(8, 8, kernel_size=(3, 1), stride=(1, 1), padding=(1, 0), groups=8, bias=False)
          (2): Conv2d(8, 8, kernel_size=(1, 3), stride=(1, 1), padding=(0, 1), groups=8, bias=False)
          (3): Conv2d(8, 32, kernel_size=(1, 1), stride=(1, 1), bias=False)
        )
    """
    if not isinstance(layer, TensorLayer):
        raise TypeError(f"layer is {type(layer).__name__}; it must be a TensorLayer")
    layer.network.check_shapes(core.shape for core in layer.cores)
    space = SearchSpace(layer.network, layer.geometry)
    # Groups that are no axis of the network exist only in the dense kernel.
    stages = _search(space) if space.split else ()
    if len(stages) < 3:
        return layer.to_dense()  # type: ignore[no-any-return]
    sizes = dict(zip(space.names, space.sizes, strict=True))
    fine = torch.float32 if layer.cores[0].device.type == "mps" else torch.float64
    cores = [
        whole(core).detach().to(fine).reshape([sizes[axis] for axis in axes])
        for core, axes in zip(layer.cores, space.cores, strict=True)
    ]
    modules: list[nn.Module] = []
    # Backwards: the last stage's channel order is given, and each stage fixes the output order of the one before it.
    order = space.outputs
    for stage in reversed(stages):
        roles = space.roles(stage.absorbed, stage.cores)
        groups, new = _part(order, roles.folded | roles.groups), _part(order, roles.new)
        summed = tuple(bit for axes in stage.order for bit in _bits(axes & roles.summed))
        if stage.cores:
            modules.append(_convolution(layer, space, stage, cores, (groups, new, summed)))
        order = groups + summed
        if stage.front:
            modules.append(nn.ChannelShuffle(space.volume(stage.front)))
            order = _part(order, stage.front) + _part(order, ~stage.front)
    return nn.Sequential(*reversed(modules)).train(layer.training)


def _convolution(
    layer: TensorLayer, space: SearchSpace, stage: _Stage, cores: Sequence[Tensor], axes: tuple[_Order, _Order, _Order]
) -> nn.Module:
    """Return the convolution or linear map of a stage. ``axes``: its groups, new and summed axes, in order."""
    geometry, block, outputs = layer.geometry, space.weight_axes(stage.cores), (*axes[0], *axes[1])
    kernel = _part(space.kernel, block)
    order = *outputs, *axes[2], *kernel
    met = [k for k in range(len(cores)) if stage.cores >> k & 1]
    names = *(space.axes(bit)[0] for bit in _part(order, block)), *space.axes(block & ~sum(order))  # of size 1
    weight = contract([cores[k] for k in met], [space.cores[k] for k in met], names)
    # Repeat the weight along the groups that the block lacks.
    weight = weight.reshape([space.volume(bit & block) for bit in order]).expand([space.volume(bit) for bit in order])
    groups, new, summed = (space.volume(sum(part)) for part in axes)

    def each(name: str, neutral: int) -> tuple[int, ...]:
        values = zip(space.kernel, geometry.each(name), strict=True)
        return tuple(value if bit & block else neutral for bit, value in values)

    taps = each("kernel_size", 1)
    weight = weight.reshape(groups * new, summed, *taps)
    options: dict[str, Any] = {"kernel_size": taps, "groups": groups} if taps else {}
    kind: Any = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[geometry.ndim]
    if kernel:
        kind, padding = layer.dense_type, "same" if geometry.padding == "same" else each("padding", 0)
        options |= {"stride": each("stride", 1), "padding": padding, "dilation": each("dilation", 1)}
        if geometry.transposed:
            options["output_padding"] = each("output_padding", 0)
            weight = exchange(weight, groups)
        else:
            options["padding_mode"] = geometry.padding_mode
    # On the meta device, so that torch's own initialisation draws no random numbers.
    module: nn.Module = kind(groups * summed, groups * new, **options, bias=False, device="meta")
    module.weight = _parameter(weight, layer.cores[0], any(core.requires_grad for core in layer.cores))
    if layer.bias is not None and stage.absorbed | stage.cores == space.all:
        bias = whole(layer.bias).reshape([space.volume(bit) for bit in space.outputs])
        bias = bias.permute([space.outputs.index(bit) for bit in outputs]).flatten()
        module.bias = _parameter(bias, layer.bias, layer.bias.requires_grad)
    return module


def _parameter(value: Tensor, like: Tensor, requires_grad: bool) -> nn.Parameter:
    """Return a copy of the value as a parameter, in the dtype of ``like``."""
    value = value.detach().to(like.dtype).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad)


def _search(space: SearchSpace) -> tuple[_Stage, ...]:
    """Return the stages with the fewest multiply-adds, then the fewest modules. The last one is the final shuffle."""
    ties, blocks, most = count(), _blocks(space), space.network.dense_params
    wide = sum(1 << k for k, size in enumerate(space.sizes) if size > 1)
    start, goal = _part(space.inputs, wide), _part(space.outputs, wide)

    @cache
    def steps(absorbed: CoreMask) -> list[tuple[int, int, int, int, int]]:
        """Return the possible next input steps: cores, multiply-adds, and the kept, summed and new axes."""
        if absorbed == space.all:
            return [(0, 0, sum(goal), 0, 0)]
        found = []
        for cores in (block for block in blocks if not block & absorbed):
            roles, work = space.roles(absorbed, cores), _multiply_adds(space, absorbed, cores)
            kept, summed, new = (axes & wide for axes in (roles.folded | roles.groups, roles.summed, roles.new))
            if work <= most and (space.geometry.ndim or not kept):
                found.append((cores, work, kept, summed, new))
        return found

    @cache
    def ahead(absorbed: CoreMask) -> tuple[float, int]:
        """Return lower bounds of the remaining multiply-adds and modules: those with every channel order allowed."""
        if absorbed == space.all:
            return 0, 0
        left = ((work, *ahead(absorbed | cores)) for cores, work, *_ in steps(absorbed))
        return min(((work + more, modules + 1) for work, more, modules in left), default=(math.inf, 0))

    # Entries: lower bounds of multiply-adds and modules, a tie-breaker, both numbers so far, the absorbed cores, the
    # order of the axes of x, and the stages.
    heap: list[tuple[float, int, int, int, int, int, _Order, tuple[_Stage, ...]]] = [(0, 0, 0, 0, 0, 0, start, ())]
    seen: set[tuple[int, _Order]] = set()
    while True:
        *_, done, modules, absorbed, order, stages = heappop(heap)
        if stages and not stages[-1].cores:
            return stages
        if (absorbed, order) in seen:
            continue
        seen.add((absorbed, order))
        for cores, work, kept, summed, new in steps(absorbed):
            more, least = ahead(absorbed | cores)
            if done + work + more > most:
                continue
            for front, arranged in _arrangements(order, (kept, summed) if cores else goal):
                number = modules + bool(cores) + bool(front)
                after = *_part(arranged, kept), *((new,) if new else ())
                path = *stages, _Stage(absorbed, cores, front, arranged)
                bound = done + work + more, number + least, next(ties)
                heappush(heap, (*bound, done + work, number, absorbed | cores, after, path))


def _blocks(space: SearchSpace) -> list[int]:
    """Return every set of cores that one input step may contract; many cores are first merged into cheap units."""
    units = space.units(MANY)
    return [sum(block) for size in range(len(units)) for block in combinations(units, size + 1)]


def _multiply_adds(space: SearchSpace, absorbed: CoreMask, cores: CoreMask) -> int:
    """Return an input step's multiply-adds per output position of the layer (transposed: per input position)."""
    *channels, kernel = space.roles(absorbed, cores)
    met = space.weight_axes(absorbed)
    strides = zip(space.kernel, space.geometry.each("stride"), strict=True)
    # Every tap multiplies each output position; in a transposed convolution, each input position.
    scale = [s for bit, s in strides if (bit & met if space.geometry.transposed else not bit & (met | kernel))]
    return space.volume(sum(channels) | kernel) * math.prod(scale)


def _arrangements(order: _Order, classes: Sequence[int]) -> Iterator[tuple[int, _Order]]:
    """Yield the orders, with at most one channel shuffle, in which each class of axes precedes the next.

    Yields:
        tuple[int, _Order]: the axes that the shuffle moves from the front to the back, or 0; the resulting order.

    Example:
        >>> list(_arrangements((0b0001, 0b0110), (0b0010, 0b0101)))
        [(1, (2, 4, 1)), (5, (2, 1, 4))]
    """
    ways = {0: order}
    for k, axes in enumerate(order):
        for number in range(1, len(classes)):
            # The shuffle cuts before this set or within it. The part in front moves to the back: the last classes.
            front = axes & sum(classes[number:])
            ways[sum(order[:k]) | front] = (axes & ~front, *order[k + 1 :], *order[:k], front)
    for front, way in ways.items():
        if (arranged := refine(way, classes)) is not None:
            yield front, arranged


def _part(order: _Order, axes: int) -> _Order:
    return tuple(bit for bit in order if bit & axes)


def _bits(axes: int) -> _Order:
    return tuple(1 << k for k in range(axes.bit_length()) if axes >> k & 1)
