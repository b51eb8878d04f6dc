"""Tensor networks: cores, their axes, and the sizes of the axes. Uses no tensors.

A network is written as text: cores separated by commas, each a list of axis names::

    CP       i r, o r, h r, w r                               r is one bond shared by four cores
    Tucker   i ri, ri ro h w, ro o
    ring     r0 i1 r1, r1 i2 r2, r2 h w r3, r3 o1 r4, r4 o2 r0

The names determine the roles. ``i``, ``i1``, ``i2``... are input axes and ``o``, ``o1``, ``o2``... are output axes,
most significant first (row-major). ``d``, ``h`` and ``w`` are kernel axes if exactly one core has them. Every other
axis is a bond: it is summed over and belongs to at least two cores. A bond of more than two cores is a hyperedge. A
size may follow the name, ``"n:4 i r, n o r"``. Such a bond is fixed, and the rank does not include it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tnlayers import validate
from tnlayers.spec.notation import CHANNEL, KERNEL_AXES, NAME, Axes, einsum_equation, parse


@dataclass(frozen=True)
class TensorNetwork:
    r"""An immutable tensor network: the axes of each core and the size of each axis.

    It contracts to the dense kernel of shape ``(out, in, *kernel)``,

    .. math:: W_{o\,i\,k} = \sum_{\text{bonds}} \prod_k G^{(k)}_{\text{axes of core } k}.

    Args:
        cores: axis names of each core.
        sizes: size of every axis.

    Attributes:
        bonds: axes that are summed over, in the order of first appearance. A hyperedge is listed once.
        inputs: input axes, most significant first.
        outputs: output axes, most significant first.
        kernel: kernel axes, in the order d, h, w.
        core_shapes: shape of every core.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a core is empty or repeats an axis; a bond is in one core only; a size is missing, not positive, or
            belongs to no axis; or there is no input or no output axis.

    Example:
        >>> cp = TensorNetwork.parse("i r, o r, h r, w r", {"i": 16, "o": 32, "h": 3, "w": 3, "r": 8})
        >>> cp.dense_shape, cp.num_params, cp.dense_params, cp.bonds
        ((32, 16, 3, 3), 432, 4608, ('r',))
        >>> print(cp, "->", cp.equation)
        i r, o r, h r, w r -> ab,cb,db,eb->cade
        >>> eval(repr(cp)) == cp
        True
    """

    cores: tuple[Axes, ...]
    sizes: Mapping[str, int]
    bonds: Axes = field(init=False, repr=False, compare=False)
    inputs: Axes = field(init=False, repr=False, compare=False)
    outputs: Axes = field(init=False, repr=False, compare=False)
    kernel: Axes = field(init=False, repr=False, compare=False)
    core_shapes: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        cores = tuple(tuple(core) for core in self.cores)
        object.__setattr__(self, "cores", cores)
        for position, core in enumerate(cores):
            if not core:
                raise ValueError(f"core {position} of network '{self}' is empty; a core has at least one axis")
            for axis, count in Counter(core).items():
                if not (isinstance(axis, str) and NAME.fullmatch(axis)):
                    raise ValueError(
                        f"core {position} has the axis {axis!r}; an axis' name is a letter, then letters or digits"
                    )
                if count > 1:
                    raise ValueError(
                        f"axis {axis!r} is {count} times in core {position} ({' '.join(core)!r}); "
                        "give each axis of a core its own name"
                    )
        homes: dict[str, list[int]] = {}
        for position, core in enumerate(cores):
            for axis in core:
                homes.setdefault(axis, []).append(position)
        object.__setattr__(self, "sizes", MappingProxyType(self._checked(homes, dict(self.sizes))))
        # Stored because they are read often; as plain attributes because every tracer can read those.
        channels = [match for match in map(CHANNEL.fullmatch, homes) if match]
        channels.sort(key=lambda match: int(match[2] or 0))
        for name, letter in (("inputs", "i"), ("outputs", "o")):
            object.__setattr__(self, name, tuple(match[0] for match in channels if match[1] == letter))
        bonds = tuple(axis for axis, found in homes.items() if not self._is_dense(axis, len(found)))
        object.__setattr__(self, "bonds", bonds)
        object.__setattr__(self, "core_shapes", tuple(map(self.shape, cores)))
        object.__setattr__(self, "kernel", tuple(axis for axis in KERNEL_AXES if len(homes.get(axis, ())) == 1))

    def _checked(self, homes: Mapping[str, Sequence[int]], sizes: dict[str, Any]) -> dict[str, int]:
        """Check the rules that involve several cores. Return the sizes in the order of the axes."""
        for axis, cores in homes.items():
            if len(cores) == 1 and not self._is_dense(axis, 1):
                raise ValueError(
                    f"bond {axis!r} is only in core {cores[0]} of network '{self}'; a bond "
                    "joins at least two cores (axes of the dense kernel are i, i1, ..., o, o1, ..., d, h, w)"
                )
            if axis not in sizes:
                raise ValueError(f"sizes has no entry for axis {axis!r} of network '{self}'; it has {sorted(sizes)}")
        for axis in sizes:
            if axis not in homes:
                raise ValueError(
                    f"sizes names axis {axis!r}, which network '{self}' has not; its axes are {list(homes)}"
                )
        for kind, letter in (("input", "i"), ("output", "o")):
            if not any(match[1] == letter for match in map(CHANNEL.fullmatch, homes) if match):
                raise ValueError(
                    f"network '{self}' has no {kind} axis; name one {letter}, or several {letter}1, {letter}2"
                )
        return {axis: validate.integer(f"size of axis {axis!r}", sizes[axis]) for axis in homes}

    @staticmethod
    def _is_dense(axis: str, num_cores: int) -> bool:
        return bool(CHANNEL.fullmatch(axis)) or (axis in KERNEL_AXES and num_cores == 1)

    @classmethod
    def parse(cls, text: str, sizes: Mapping[str, int] | None = None) -> "TensorNetwork":
        """Build a network from its text. ``sizes`` adds the sizes that the text does not give.

        Raises:
            ValueError: as for the class, or a size in the text differs from that in ``sizes``.

        Example:
            >>> TensorNetwork.parse("i:4 r, r o:8", {"r": 2})
            TensorNetwork.parse('i:4 r:2, r:2 o:8')
        """
        cores, written = parse(text)
        for axis, size in (sizes or {}).items():
            if written.setdefault(axis, size) != size:
                raise ValueError(
                    f"network {text!r} fixes axis {axis!r} at {written[axis]}, but its size is given as {size}"
                )
        return cls(cores, written)

    @classmethod
    def skeleton(cls, text: str) -> "TensorNetwork":
        """Build a network from its text with size 1 for every axis whose size the text does not give.

        Example:
            >>> TensorNetwork.skeleton("n:4 i r, n o r")
            TensorNetwork.parse('n:4 i:1 r:1, n:4 o:1 r:1')
        """
        cores, written = parse(text)
        return cls(cores, {axis: written.get(axis, 1) for core in cores for axis in core})

    def resize(self, sizes: Mapping[str, int]) -> "TensorNetwork":
        """Return the network with some axes resized.

        Example:
            >>> TensorNetwork.parse("i:4 r:2, r:2 o:8").resize({"r": 3})
            TensorNetwork.parse('i:4 r:3, r:3 o:8')
        """
        return TensorNetwork(self.cores, {**self.sizes, **sizes})

    def check_shapes(self, shapes: Iterable[Sequence[int]]) -> None:
        """Check that the core shapes equal the network's, including the order of axes.

        Raises:
            ValueError: a shape differs. The message gives the core, its shape and the expected shape.

        Example:
            >>> TensorNetwork.parse("i:4 r:2, r:2 o:8").check_shapes([(2, 4), (2, 8)])
            Traceback (most recent call last):
                ...
            ValueError: core 0 has shape (2, 4); network 'i r, r o' has (4, 2) there
        """
        given = tuple(shapes)
        if given == self.core_shapes:
            return
        if len(given) != len(self.cores):
            raise ValueError(f"there are {len(given)} cores; network '{self}' has {len(self.cores)}")
        number = next(k for k, shape in enumerate(given) if shape != self.core_shapes[k])
        raise ValueError(
            f"core {number} has shape {tuple(given[number])}; network '{self}' has {self.core_shapes[number]} there"
        )

    # ------------------------------------------------------------------ axes

    @property
    def axes(self) -> Axes:
        """All axes, in the order of first appearance."""
        return tuple(self.sizes)

    @property
    def dense_axes(self) -> Axes:
        """Axes of the dense kernel: output, input, then kernel axes."""
        return self.outputs + self.inputs + self.kernel

    # ------------------------------------------------------------------ sizes

    def shape(self, axes: Iterable[str]) -> tuple[int, ...]:
        """Return the sizes of the given axes."""
        return tuple(self.sizes[axis] for axis in axes)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense kernel: ``(out, in, *kernel)``."""
        return (math.prod(self.shape(self.outputs)), math.prod(self.shape(self.inputs)), *self.shape(self.kernel))

    @property
    def num_params(self) -> int:
        """Number of entries of all cores."""
        return sum(map(math.prod, self.core_shapes))

    @property
    def dense_params(self) -> int:
        """Number of entries of the dense kernel."""
        return math.prod(self.dense_shape)

    # ------------------------------------------------------------------ other forms

    @property
    def equation(self) -> str:
        """Einsum equation that contracts the cores to the kernel, its channel axes split into factors."""
        return einsum_equation(*self.cores, out=self.dense_axes)

    def __str__(self) -> str:
        return ", ".join(" ".join(core) for core in self.cores)

    def __repr__(self) -> str:
        text = ", ".join(" ".join(f"{axis}:{self.sizes[axis]}" for axis in core) for core in self.cores)
        return f"TensorNetwork.parse({text!r})"

    def __hash__(self) -> int:
        return hash((self.cores, tuple(self.sizes.values())))

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorNetwork, (self.cores, dict(self.sizes))
