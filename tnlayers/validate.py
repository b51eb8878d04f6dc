"""Argument checks. Each error message gives the argument's name, its value and what is accepted."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any


def integer(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` as an ``int`` of at least ``minimum``. A bool is refused.

    Example:
        >>> integer("rank", 0)
        Traceback (most recent call last):
            ...
        ValueError: rank is 0; it must be an integer >= 1
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer >= {minimum}") from None
    if number < minimum:
        raise ValueError(f"{name} is {number}; it must be an integer >= {minimum}")
    return number


def integers(name: str, value: Any, length: int, minimum: int = 1, *, repeat: bool = False) -> tuple[int, ...]:
    """Return ``length`` integers from one integer, which is repeated, or from a sequence or array of that length.

    With ``repeat``, a sequence of one integer is repeated too, as in torch's convolutions.

    Example:
        >>> integers("stride", 2, 2), integers("stride", (2, 1), 2), integers("stride", [2], 2, repeat=True)
        ((2, 2), (2, 1), (2, 2))
    """
    if hasattr(value, "tolist"):  # an array or tensor
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        values = tuple(value)
        if repeat and len(values) == 1:
            values *= length
        if len(values) != length:
            raise ValueError(f"{name} {values} has {len(values)} entries; it must be one integer or {length} of them")
        return tuple(integer(f"{name}[{k}]", v, minimum) for k, v in enumerate(values))
    return (integer(name, value, minimum),) * length


def choice(name: str, value: Any, accepted: Iterable[str]) -> str:
    """Return ``value`` if it is one of the ``accepted`` strings.

    Example:
        >>> choice("mode", "fan", ("fan_in", "fan_out"))
        Traceback (most recent call last):
            ...
        ValueError: mode is 'fan'; accepted: 'fan_in', 'fan_out'
    """
    words = tuple(accepted)
    if not isinstance(value, str) or value not in words:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} is {value!r}; accepted: {', '.join(map(repr, words))}")
    return value


def boolean(name: str, value: Any, others: str = "") -> bool:
    """Return ``value`` if it is True or False. ``others`` ends the error message: what else is accepted.

    Example:
        >>> boolean("bias", True)
        True
    """
    if str(getattr(value, "dtype", "")) == "bool" and not value.shape:  # numpy.bool
        value = bool(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False{others}")
    return value


def fraction(name: str, value: Any) -> float:
    """Return ``value`` as a ``float`` of at least 0 and below 1.

    Example:
        >>> fraction("p", 1)
        Traceback (most recent call last):
            ...
        ValueError: p is 1; it must be a number of at least 0 and below 1
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}; it must be a number of at least 0 and below 1")
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a number of at least 0 and below 1")
    return float(value)
