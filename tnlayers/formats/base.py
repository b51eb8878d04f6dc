"""Base class of formats: maps channel axes, kernel axes and the user's rank to the text of a network."""

import math
import reprlib
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from itertools import zip_longest
from typing import Any, ClassVar, Self

from tnlayers import validate
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import KERNEL_AXES, Axes
from tnlayers.spec.rank import resolve

Shape = tuple[int, ...]

_MOST = 2**32
"""Maximum number of channels to factorise. Up to it, a number has at most 1,536 divisors, and the search takes 1 s."""

FORMATS: dict[str, type["Format"]] = {}
"""All registered formats, by name."""


def register(name: str) -> Callable[[type["Format"]], type["Format"]]:
    """Return a class decorator that registers a format under ``name``.

    Args:
        name: the format's name, as in ``tnlayers.TensorizeConfig(name)``.

    Returns:
        Callable: a decorator of a subclass of ``Format``. It returns the class, with ``name`` as its name.

    Raises:
        ValueError: the name is already registered. The decorator raises it.

    Example:
        >>> @register("pair")
        ... @dataclass(frozen=True)
        ... class Pair(Format):
        ...     def text(self, inputs, outputs, kernel, rank):
        ...         return f"{' '.join(inputs + kernel)} r, r {' '.join(outputs)}"
        >>> FORMATS["pair"]().text(("i",), ("o",), ("h", "w"), rank=8)
        'i h w r, r o'
        >>> del FORMATS["pair"]  # so that other examples do not see it
    """

    def enter(cls: type["Format"]) -> type["Format"]:
        if name in FORMATS:
            raise ValueError(f"format name {name!r} is taken by {FORMATS[name].__name__}")
        FORMATS[name] = cls
        cls.name = name
        return cls

    return enter


@dataclass(frozen=True)
class Format(ABC):
    """A family of tensor networks. Its options are its dataclass fields. A subclass writes ``text``; see ``register``.

    Example:
        >>> FORMATS["tt"](layout="chain").text(("i",), ("o",), ("h", "w"), rank=8)
        'i r1, r1 h r2, r2 w r3, r3 o'
    """

    name: ClassVar[str]
    """Name of the format: the class name in lower case, unless ``register`` sets another."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = cls.__name__.lower()

    @classmethod
    def of(cls, options: Mapping[str, Any], owner: str, others: str) -> Self:
        """Return the format with the options that a user gave to ``owner``.

        Raises:
            TypeError: an option is unknown or missing; ``others`` names what ``owner`` accepts beside the options.

        Example:
            >>> FORMATS["tt"].of({"layouts": "chain"}, "TTLinear", "rank")
            Traceback (most recent call last):
                ...
            TypeError: layouts is 'chain', but TTLinear has no such argument; accepted beside rank: layout
        """
        own = {field.name: field.default is MISSING for field in fields(cls)}
        for name, value in options.items():
            if name not in own:
                accepted = f"beside {others}: {', '.join(own) or 'none'}"
                raise TypeError(
                    f"{name} is {reprlib.repr(value)}, but {owner} has no such argument; accepted {accepted}"
                )
        for name, required in own.items():
            if required and name not in options:
                raise TypeError(f"{name} is missing; {owner} needs it as a keyword argument")
        return cls(**options)

    @abstractmethod
    def text(self, inputs: Axes, outputs: Axes, kernel: Axes, rank: Any) -> str:
        """Return the text of the network over the given dense axes, in the notation of ``tnlayers.spec.network``.

        Args:
            inputs: names of the input axes, ``("i",)`` or ``("i1", "i2", ...)``.
            outputs: names of the output axes, ``("o",)`` or ``("o1", "o2", ...)``.
            kernel: names of the kernel axes, such as ``("h", "w")``.
            rank: the user's rank, for formats whose cores depend on it (Tucker). None: no rank was given.
        """

    @property
    def factors(self) -> int:
        """Default maximum number of factors of the input and of the output channels. 1: channels are not split.

        At an equal number of parameters, more factors give larger ranks and so more FLOPs.
        """
        return 1

    def split(self, in_channels: int, out_channels: int, groups: int) -> tuple[Shape, Shape]:
        """Return the default ``in_shape`` and ``out_shape``. ``in_channels`` counts the channels of one group."""
        return factorize(in_channels, self.factors), factorize(out_channels, self.factors, groups)

    def build(
        self, in_shape: Shape, out_shape: Shape, kernel: Shape, rank: Any
    ) -> tuple[TensorNetwork, dict[str, int]]:
        """Return the network with all its sizes, and the bond sizes that follow from ``rank``.

        Args:
            in_shape: factors of the input channels of one group, most significant first.
            out_shape: factors of the output channels, most significant first.
            kernel: kernel size along each spatial axis.
            rank: as in the layers.

        Raises:
            ValueError: the network has another number of input, output or kernel axes, or ``rank`` does not fit it.

        Example:
            >>> from tnlayers.formats import TR
            >>> TR().build((4, 4), (8,), (3, 3), rank=2)[0]
            TensorNetwork.parse('r0:2 i1:4 r1:2, r1:2 i2:4 r2:2, r2:2 h:3 w:3 r3:2, r3:2 o:8 r0:2')
        """
        spatial = KERNEL_AXES[len(KERNEL_AXES) - len(kernel) :]
        text = self.text(numbered("i", len(in_shape)), numbered("o", len(out_shape)), spatial, rank)
        skeleton = TensorNetwork.skeleton(text)
        sizes: dict[str, int] = {}
        for name, axes, shape in (
            ("in_shape", skeleton.inputs, in_shape),
            ("out_shape", skeleton.outputs, out_shape),
            ("kernel_size", skeleton.kernel, kernel),
        ):
            if len(axes) != len(shape):
                if not kernel and name == "kernel_size":
                    raise ValueError(
                        f"network '{skeleton}' has the kernel axis {axes[0]!r}, but a linear layer has none"
                    )
                hint = "; a kernel axis is named d, h or w and is in one core" if name == "kernel_size" else ""
                raise ValueError(
                    f"{name} {shape} has {len(shape)} entries, but network '{skeleton}' has {len(axes)} axes for it "
                    f"({', '.join(axes)}){hint}"
                )
            sizes.update(zip(axes, shape, strict=True))
        return resolve(text, sizes, rank)


def paired(inputs: Axes, outputs: Axes) -> list[str]:
    """Pair the k-th input axis with the k-th output axis. Axes without a partner stand alone.

    Example:
        >>> paired(("i1", "i2", "i3"), ("o1", "o2"))
        ['i1 o1', 'i2 o2', 'i3']
    """
    return [" ".join(pair).strip() for pair in zip_longest(inputs, outputs, fillvalue="")]


def numbered(letter: str, count: int) -> Axes:
    """Return the axis names of ``count`` factors: the letter alone for one, else numbered from 1."""
    return (letter,) if count == 1 else tuple(f"{letter}{k}" for k in range(1, count + 1))


def checked_shape(name: str, value: Any, product_name: str, product: int, more: bool = False) -> tuple[int, ...]:
    """Return the user's channel shape ``value`` as a tuple if its product is ``product``, or with ``more`` above it."""
    try:
        given = tuple(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a sequence of integers with product {product}") from None
    shape = tuple(validate.integer(f"{name}[{k}]", factor) for k, factor in enumerate(given))
    if not shape or (found := math.prod(shape)) < product or (found > product and not more):
        least = "; it must be at least that" if more else ""
        raise ValueError(f"{name} {shape} has product {math.prod(shape)}, but {product_name} is {product}{least}")
    return shape


@lru_cache(maxsize=1024)
def factorize(number: int, parts: int, multiple_of: int = 1, exact: bool = False) -> Shape:
    """Split a number of channels into at most ``parts`` factors of similar size, largest first.

    Args:
        number: the product.
        parts: maximum number of factors.
        multiple_of: divisor of the first factor (and of ``number``): groups.
        exact: pad with ones to exactly ``parts`` factors.

    Returns:
        Shape: the factors with the smallest sum; ties go to more factors, then to the largest factors first.

    Raises:
        ValueError: ``number`` is above 2^32, where the search would take long.

    Example:
        >>> factorize(64, 3), factorize(32, 3), factorize(10, 3), factorize(7, 3), factorize(24, 3, multiple_of=6)
        ((4, 4, 4), (4, 4, 2), (5, 2), (7,), (6, 2, 2))
        >>> factorize(10, 3, exact=True)
        (5, 2, 1)
    """
    if number > _MOST:
        raise ValueError(f"{number:,} channels are to be split into factors; at most {_MOST:,} can be")
    divisors = _divisors(number)
    others = _descending(divisors, parts - 1)
    firsts = [first for first in divisors if first % multiple_of == 0 and number // first in others]
    best = min(((first, *others[number // first]) for first in firsts), key=_order)
    return best + (1,) * (parts - len(best)) if exact else best


def factorize_up(number: int, parts: int) -> Shape:
    """Return ``parts`` factors of similar size, largest first, whose product is ``number`` or a little more.

    Example:
        >>> factorize_up(50257, 2), factorize_up(50257, 3), factorize_up(64, 3), factorize_up(7, 1)
        ((225, 224), (37, 37, 37), (4, 4, 4), (7,))
    """
    factors = []
    for left in range(parts, 0, -1):
        factor = max(1, round(number ** (1 / left)))
        factor += factor**left < number
        factors.append(factor)
        number = -(-number // factor)
    return tuple(factors)


def _order(shape: Shape) -> tuple[int, int, Shape]:
    """Return the sort key of factors: smaller sum, then more factors, then the largest factors first."""
    return sum(shape), -len(shape), tuple(-factor for factor in shape)


def _divisors(number: int) -> list[int]:
    small = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return sorted({*small, *(number // k for k in small)})


def _descending(divisors: list[int], parts: int) -> dict[int, Shape]:
    """Return, for each divisor, its best factors above 1: at most ``parts`` of them, largest first.

    Dynamic programming: the best factors of a number are its largest factor and the best factors of the quotient. So
    the table for one factor less suffices, and not all factorisations are tried.
    """
    found: dict[int, Shape] = {1: ()}  # the empty product
    for count in range(1, parts + 1):
        before, found = found, {}
        for value in divisors:
            best = before.get(value, (value,))
            # The largest factor is at least the root. A factor above the best sum cannot improve it.
            for factor in divisors[bisect_left(divisors, max(2, int(value ** (1 / count)))) :]:
                if factor > sum(best):
                    break
                rest = before.get(value // factor) if value % factor == 0 else None
                if rest is not None and rest[:1] <= (factor,):
                    best = min(best, (factor, *rest), key=_order)
            found[value] = best
        if found == before:
            break
    return found
