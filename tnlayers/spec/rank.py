"""Bond sizes from the user's rank: one integer, one integer per bond, or a keep ratio, solved by search."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from numbers import Real
from typing import Any

from tnlayers import validate
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import parse

Rank = int | float | Sequence[int] | Mapping[str, int]

DEFAULT_KEEP = 0.25
"""Keep ratio of a layer without a rank. If the smallest network needs more, the smallest network is used."""

_EXHAUSTIVE = 12
"""Up to this many bonds, the last step of the keep-ratio search tries every subset (4,096). With more bonds, they are
raised one by one, which may leave a few parameters of the budget unused."""


class BondsError(ValueError):
    """A rank that sizes other bonds than the network has."""


def resolve(text: str, dense_sizes: Mapping[str, int], rank: Rank | None) -> tuple[TensorNetwork, dict[str, int]]:
    """Determine the size of every bond of a network.

    Args:
        text: the network. A bond whose size is written in it is fixed.
        dense_sizes: sizes of the input, output and kernel axes.
        rank: one integer for all free bonds; a sequence in the order of ``network.bonds``, without fixed bonds; a
            mapping from bond to size; or a float in (0, 1], the keep ratio. The keep ratio selects the largest network
            with at most this share of the dense kernel's parameters. All its bonds are equal to within one, unless a
            larger bond adds nothing; bonds that lead to one kernel axis alone keep full size. Without free bonds a keep
            ratio has no effect. None: a keep ratio of ``DEFAULT_KEEP``, or the smallest network if that is larger.

    Returns:
        tuple[TensorNetwork, dict[str, int]]: the network with all sizes, and the sizes of the free bonds.

    Raises:
        TypeError: ``rank`` has another type.
        ValueError: a size is below 1, or the keep ratio is out of range or too small for any network of this form.
        BondsError: the number of sizes is wrong, or a bond is unknown or missing.

    Example:
        >>> dense = {"i": 64, "o": 64, "h": 3, "w": 3}
        >>> resolve("i ri, ri ro h w, ro o", dense, 0.1)[1]
        {'ri': 14, 'ro': 14}
    """
    written = parse(text)[1]
    ones = {axis: 1 for axis in TensorNetwork.skeleton(text).axes if axis not in written}
    template = TensorNetwork.parse(text, ones | dict(dense_sizes))
    free = tuple(bond for bond in template.bonds if bond not in written)
    if rank is None:
        chosen = _keep(template, free, DEFAULT_KEEP, least=True)
        return template.resize(chosen), chosen
    if isinstance(rank, bool | str | bytes) or not isinstance(rank, Real | Sequence | Mapping):
        accepted = "an integer, a sequence or mapping of integers, or a keep ratio in (0, 1]"
        raise TypeError(f"rank is {rank!r}; it must be {accepted}")
    if isinstance(rank, Real) and not hasattr(rank, "__index__"):
        chosen = _keep(template, free, float(rank))
        return template.resize(chosen), chosen
    if not free and rank not in ((), [], {}):
        raise BondsError(f"rank is {rank!r}, but network '{text}' has no bond left to size; leave rank out")
    chosen = _named(template, free, rank)
    return template.resize(chosen), chosen


def resize(network: TensorNetwork, free: Sequence[str], rank: Rank, *, larger: bool) -> dict[str, int]:
    """Determine the sizes of the free bonds of a network that is to become smaller, or larger.

    Args:
        network: the network now.
        free: bonds that may change.
        rank: as for ``resolve``. For a single number, bonds that are small (or large) enough keep their size. So does
            a bond that a mapping leaves out.
        larger: whether the bonds are to become larger.

    Raises:
        TypeError, ValueError: as ``resolve`` does; a given size is above the bond's size, or below with ``larger``; or
            a keep ratio is too small for a larger network.

    Example:
        >>> network = TensorNetwork.parse("i:8 a:2, a b:4, b o:8")
        >>> resize(network, ["a", "b"], 3, larger=False), resize(network, ["a", "b"], {"a": 5}, larger=True)
        ({'a': 2, 'b': 3}, {'a': 5, 'b': 4})
    """
    now = {bond: network.sizes[bond] for bond in free}
    texts = (
        " ".join(a if a in now or a in network.dense_axes else f"{a}:{network.sizes[a]}" for a in core)
        for core in network.cores
    )
    dense = {axis: network.sizes[axis] for axis in network.dense_axes}
    asked = {**now, **rank} if isinstance(rank, Mapping) else rank
    sizes = resolve(", ".join(texts), dense, asked)[1]
    limit = max if larger else min
    if isinstance(rank, Real):
        sizes = {bond: limit(size, now[bond]) for bond, size in sizes.items()}
        wanted = network.resize(sizes)
        if larger and not hasattr(rank, "__index__") and wanted.num_params > float(rank) * network.dense_params:
            raise ValueError(
                f"rank is {rank}; no bond becomes smaller, so the keep ratio would be "
                f"{wanted.num_params / wanted.dense_params:.3g}; give a larger one, or the sizes of bonds"
            )
    for bond, size in sizes.items():
        if size != limit(size, now[bond]):
            least, other = ("least", "truncate_ takes smaller") if larger else ("most", "grow_ takes larger")
            raise ValueError(
                f"rank[{bond!r}] is {size}; it must be at {least} the bond's present size, {now[bond]}; {other} ones"
            )
    return sizes


def _named(template: TensorNetwork, free: tuple[str, ...], rank: Any) -> dict[str, int]:
    if isinstance(rank, Mapping):
        for bond in rank:
            if bond not in free:
                raise BondsError(f"rank names {bond!r}; the bonds of network '{template}' are {', '.join(free)}")
        for bond in free:
            if bond not in rank:
                raise BondsError(f"rank {dict(rank)} has no size for bond {bond!r}; the bonds are {', '.join(free)}")
        return {bond: validate.integer(f"rank[{bond!r}]", rank[bond]) for bond in free}
    if isinstance(rank, Sequence):
        if len(rank) != len(free):
            raise BondsError(
                f"rank {tuple(rank)} has {len(rank)} entries; network '{template}' has {len(free)} bonds: "
                f"{', '.join(free)}"
            )
        return {bond: validate.integer(f"rank[{k}]", rank[k]) for k, bond in enumerate(free)}
    return dict.fromkeys(free, validate.integer("rank", rank))


def _keep(template: TensorNetwork, free: tuple[str, ...], keep: float, least: bool = False) -> dict[str, int]:
    """Return the bond sizes of the largest network of at most ``keep`` times the dense parameters.

    If the smallest network has more, raise ValueError; with ``least``, return the smallest.
    """
    if not 0 < keep <= 1:
        raise ValueError(
            f"rank is {keep}; a float is a keep ratio and must be in (0, 1] (write an integer for a bond's size)"
        )
    if not free:
        return {}
    budget = keep * template.dense_params
    caps, whole = _caps(template, free), _kernel_bonds(template, free)

    def level(common: int, raised: Iterable[str] = ()) -> dict[str, int]:
        raised = set(raised)
        return {bond: int(caps[bond] if bond in whole else min(common + (bond in raised), caps[bond])) for bond in free}

    def params(sizes: Mapping[str, int]) -> int:
        full = {**template.sizes, **sizes}
        return sum(math.prod(full[axis] for axis in core) for core in template.cores)

    if (smallest := params(level(1))) > budget:
        if least:
            return level(1)
        fixed = [f"{bond}:{template.sizes[bond]}" for bond in template.bonds if bond not in free]
        hint = f"; {', '.join(fixed)} is fixed by the network's text or the format's options" if fixed else ""
        raise ValueError(
            f"rank is {keep}; that keep ratio leaves {int(budget)} of {template.dense_params} parameters, but network "
            f"'{template}' has at least {smallest} (keep ratio {smallest / template.dense_params:.3g}){hint}"
        )
    low, high = 1, 2
    while params(level(high)) <= budget and level(high) != level(low):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if params(level(middle)) <= budget else (low, middle)
    room = [bond for bond in free if bond not in whole and caps[bond] > low]
    best = level(low)
    if len(room) <= _EXHAUSTIVE:
        options = (level(low, subset) for size in range(1, len(room) + 1) for subset in combinations(room, size))
        best = max((o for o in options if params(o) <= budget), key=params, default=best)
    else:
        raised: list[str] = []
        for bond in room:
            if params(level(low, [*raised, bond])) <= budget:
                raised.append(bond)
        best = level(low, raised)
    return best


def _caps(template: TensorNetwork, free: tuple[str, ...]) -> dict[str, float]:
    """Return the size of each bond beyond which it adds nothing.

    A bond between two cores is the rank of a matrix. Its rows and columns are the other axes of the two cores; another
    axis that both have only indexes such matrices. A hyperedge has no such bound.
    """
    caps = dict.fromkeys(free, math.inf)
    homes = {bond: [set(core) for core in template.cores if bond in core] for bond in free}
    while True:
        before = dict(caps)
        for bond, cores in homes.items():
            if len(cores) == 2:
                common = cores[0] & cores[1]
                sides = (math.prod(caps.get(a, template.sizes[a]) for a in core - common) for core in cores)
                caps[bond] = min(caps[bond], *sides)
        if caps == before:
            return caps


def _kernel_bonds(template: TensorNetwork, free: tuple[str, ...]) -> set[str]:
    """Return the bonds that lead to one kernel axis alone. A smaller size would collapse that axis."""
    bonds = set()
    for core in template.cores:
        inner = [axis for axis in core if axis in template.kernel or axis in free]
        if len(inner) == 2 and sum(axis in template.kernel for axis in inner) == 1:
            bonds |= {axis for axis in inner if sum(axis in other for other in template.cores) == 2}
    return bonds
