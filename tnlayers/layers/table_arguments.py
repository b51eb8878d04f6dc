"""Checks of the arguments of tables: what torch's embeddings have, initialisation, and factors of the vocabulary."""

from dataclasses import replace
from numbers import Real
from typing import Any

from tnlayers.formats.base import Format, factorize_up
from tnlayers.init.variance import Init

UNEVEN = 1.25
"""A vocabulary is padded if its own factors add up to more than this multiple of those of the padded one."""
_MANY = 2**20
"""A number of many factors: a format splits it into as many as it ever makes."""


def refuse(max_norm: float | None, sparse: bool) -> None:
    """Raise for the arguments of torch's embeddings that a table of shared cores cannot honour."""
    if max_norm is not None:
        raise ValueError(
            f"max_norm is {max_norm!r}; it must be None: torch renormalises the rows that it looks up in place, but "
            "rows of a tensor network share the cores"
        )
    if sparse:
        raise ValueError(
            "sparse is True; it must be False: the gradient of a row reaches slices of the cores that other rows "
            "share, and the cores are small"
        )


def number(name: str, value: Any) -> Any:
    """Return the value if it is a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    return value


def padding(value: Any, rows: int) -> int | None:
    """Return padding_idx counted from 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"padding_idx is {value!r}; it must be an integer or None")
    index = int(value)
    if not -rows <= index < rows:
        accepted = f"it must be from {-rows} to {rows - 1}, since num_embeddings is {rows}"
        raise ValueError(f"padding_idx is {index}; {accepted}")
    return index % rows


def settled(init: str | Init) -> Init:
    """Return the initialisation of a table: a std, exact in the norm.

    Fans and gains describe sums over inputs. A lookup sums over none, and its input is no smooth signal.
    """
    init = Init.of(init)
    if init.std is None:
        default = Init()
        for name in ("mode", "nonlinearity", "param"):
            if (value := getattr(init, name)) != getattr(default, name):
                raise ValueError(f"init has the {name} {value!r}, but a lookup sums over no inputs; give its std")
        init = replace(init, std=1.0)
    if init.typical:
        raise ValueError("init has typical=True, but a lookup has no smooth inputs; it must be False")
    return replace(init, exact="white") if init.exact else init


def vocabulary(format: Format, rows: int, columns: int) -> tuple[int, ...]:
    """Return the format's own factors of a vocabulary, or even ones of a padded vocabulary if these are uneven."""
    own = format.split(rows, columns, 1)[0]
    even = factorize_up(rows, len(format.split(_MANY, columns, 1)[0]))
    return even if sum(own) > UNEVEN * sum(even) else own
