"""A layer as plain torch modules, for deployment: nothing of ours is needed to run, pickle or export them.

``x`` meets blocks of cores one after the other, and each meeting is one convolution, as in ``tnlayers.ops.input_step``:
axes that ``x`` must keep, or that the block does not have, are its groups; those that are finished are summed. A kernel
axis brings its stride, padding and dilation into the convolution of its core. None but the last has a bias, so that all
that come before commute with padding, whatever its mode, and each axis can be padded on its own.

A convolution takes channels in the order (groups, summed) and makes (groups, new). The order within each of the three
is free, since the weight can be permuted, but that of the groups stays as it is. Where this is not enough, one
``nn.ChannelShuffle`` may stand before a convolution or at the end. Of the sequences that are left, an A* search
finds the one with the fewest multiply-adds; its bound is the cheapest sequence if every order could be had.

Sets of cores and of axes are bit masks, see ``tnlayers.planning.search_space``. An order of axes is a tuple of sets,
each in any order; axes of size 1 are in none.
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
from tnlayers.planning.search_space import SearchSpace, refine

MANY = 8
"""Up to this many cores, every sequence is searched; of more, some are contracted with each other first."""

_Order = tuple[int, ...]


class _Stage(NamedTuple):
    """One convolution and the channel shuffle before it; without cores, the shuffle at the end.

    Attributes:
        absorbed: the cores that ``x`` has met before.
        cores: those that it meets.
        front: the axes that the shuffle brings from the front to the back; 0 without a shuffle.
        order: of the axes of ``x`` behind the shuffle.
    """

    absorbed: int
    cores: int
    front: int
    order: _Order


@torch.enable_grad()  # so that parametrized cores tell whether they require gradients
def unfold(layer: TensorLayer) -> nn.Module:
    """A layer's function as a sequence of plain torch layers: of all such, the one with the fewest multiply-adds.

    A tensor ring becomes 1x1, grouped 3x3 and 1x1 convolutions, CP separable ones, BlockTT two grouped ones and a
    shuffle. Cores that are cheaper together are contracted first, all of them where nothing is cheaper than the dense
    kernel. Where a block lacks some of the groups, its weight is repeated along them: multiply-adds are those of the
    cores, parameters may be more than theirs, but are no more than the dense kernel's. Linear layers have no groups, so
    a block of theirs must take all that ``x`` has.

    Multiply-adds are counted as if borders did not matter: a stride divides the positions, a transposed one multiplies
    them. Weights are contracted in float64, where the device has it, and rounded once to the layer's dtype.

    The sequence cannot take a transposed convolution's ``output_size``. With an ``nn.ChannelShuffle`` in it, which
    counts axes from the batch, it cannot take an unbatched input either.

    Args:
        layer: a layer of any format, also on the meta device, where the result then is; parametrized cores count by
            their values.

    Returns:
        nn.Module: an ``nn.Sequential`` of convolutions, transposed only where a kernel axis is met, and of
        ``nn.ChannelShuffle`` where needed; or of ``nn.Linear``. Where no sequence has fewer multiply-adds than the
        dense kernel, ``layer.to_dense()``. Device, dtype, training flag and what requires gradients are as the layer
        has them; nothing is shared with it.

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
    # Groups that are no axis of the network are known to the dense kernel alone.
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
    # From the end, where the order of the channels is given, each stage tells the one before it which order to make.
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
    """The convolution or linear map of a stage; ``axes`` are the groups, the new and the summed ones, in order."""
    geometry, block, outputs = layer.geometry, space.weight_axes(stage.cores), (*axes[0], *axes[1])
    kernel = _part(space.kernel, block)
    order = *outputs, *axes[2], *kernel
    met = [k for k in range(len(cores)) if stage.cores >> k & 1]
    names = *(space.axes(bit)[0] for bit in _part(order, block)), *space.axes(block & ~sum(order))  # of size 1
    weight = contract([cores[k] for k in met], [space.cores[k] for k in met], names)
    # Repeated along the groups that the block does not have.
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
    # Built without storage, so that torch's own initialisation draws no random numbers.
    module: nn.Module = kind(groups * summed, groups * new, **options, bias=False, device="meta")
    module.weight = _parameter(weight, layer.cores[0], any(core.requires_grad for core in layer.cores))
    if layer.bias is not None and stage.absorbed | stage.cores == space.all:
        bias = whole(layer.bias).reshape([space.volume(bit) for bit in space.outputs])
        bias = bias.permute([space.outputs.index(bit) for bit in outputs]).flatten()
        module.bias = _parameter(bias, layer.bias, layer.bias.requires_grad)
    return module


def _parameter(value: Tensor, like: Tensor, requires_grad: bool) -> nn.Parameter:
    """A value of its own, of a tensor's dtype."""
    value = value.detach().to(like.dtype).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad)


def _search(space: SearchSpace) -> tuple[_Stage, ...]:
    """The stages with the fewest multiply-adds, of those the fewest modules; the shuffle at the end is the last one."""
    ties, blocks, most = count(), _blocks(space), space.network.dense_params
    wide = sum(1 << k for k, size in enumerate(space.sizes) if size > 1)
    start, goal = _part(space.inputs, wide), _part(space.outputs, wide)

    @cache
    def meetings(absorbed: int) -> list[tuple[int, int, int, int, int]]:
        """What may come next: the cores met, the multiply-adds, and the axes that are kept, summed and new."""
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
    def ahead(absorbed: int) -> tuple[float, int]:
        """The fewest multiply-adds, and modules, that are left if any order of channels could be had."""
        if absorbed == space.all:
            return 0, 0
        left = ((work, *ahead(absorbed | cores)) for cores, work, *_ in meetings(absorbed))
        return min(((work + more, modules + 1) for work, more, modules in left), default=(math.inf, 0))

    # The bound below multiply-adds and modules, a tie-breaker, both so far, the cores that x has met, the order of its
    # axes, and the stages.
    heap: list[tuple[float, int, int, int, int, int, _Order, tuple[_Stage, ...]]] = [(0, 0, 0, 0, 0, 0, start, ())]
    seen: set[tuple[int, _Order]] = set()
    while True:
        *_, done, modules, absorbed, order, stages = heappop(heap)
        if stages and not stages[-1].cores:
            return stages
        if (absorbed, order) in seen:
            continue
        seen.add((absorbed, order))
        for cores, work, kept, summed, new in meetings(absorbed):
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
    """Every set of cores that ``x`` may meet at once; of many cores, those that go best together stay together."""
    units = space.units(MANY)
    return [sum(block) for size in range(len(units)) for block in combinations(units, size + 1)]


def _multiply_adds(space: SearchSpace, absorbed: int, cores: int) -> int:
    """Of a meeting, per position of the layer's output, or of its input if it is transposed."""
    *channels, kernel = space.roles(absorbed, cores)
    met = space.weight_axes(absorbed)
    strides = zip(space.kernel, space.geometry.each("stride"), strict=True)
    # In a transposed convolution, each position of the input meets every tap, else each one of the output does.
    scale = [s for bit, s in strides if (bit & met if space.geometry.transposed else not bit & (met | kernel))]
    return space.volume(sum(channels) | kernel) * math.prod(scale)


def _arrangements(order: _Order, classes: Sequence[int]) -> Iterator[tuple[int, _Order]]:
    """Ways to have all axes of a class before those of the next: as they are, or after one channel shuffle.

    Yields:
        tuple[int, _Order]: the axes that the shuffle brings from the front to the back, 0 without one; the order then.

    Example:
        >>> list(_arrangements((0b0001, 0b0110), (0b0010, 0b0101)))
        [(1, (2, 4, 1)), (5, (2, 1, 4))]
    """
    ways = {0: order}
    for k, axes in enumerate(order):
        for number in range(1, len(classes)):
            # The cut is before this set or within it: what stays in front comes last, so is of the last classes.
            front = axes & sum(classes[number:])
            ways[sum(order[:k]) | front] = (axes & ~front, *order[k + 1 :], *order[:k], front)
    for front, way in ways.items():
        if (arranged := refine(way, classes)) is not None:
            yield front, arranged


def _part(order: _Order, axes: int) -> _Order:
    return tuple(bit for bit in order if bit & axes)


def _bits(axes: int) -> _Order:
    return tuple(1 << k for k in range(axes.bit_length()) if axes >> k & 1)
