"""Text notation of networks: axis names, parsing, and conversion to einsum equations."""

import re
from collections.abc import Iterator

Axes = tuple[str, ...]

KERNEL_AXES = ("d", "h", "w")
"""Names of the kernel axes, in the order of ``torch.nn.Conv3d``'s ``kernel_size``."""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*")
CHANNEL = re.compile(r"([io])(\d*)", re.ASCII)
_WORD = re.compile(rf"({NAME.pattern})(?::(\d+))?", re.ASCII)


def parse(text: str) -> tuple[tuple[Axes, ...], dict[str, int]]:
    """Parse a network's text into its cores and the sizes written in it.

    Raises:
        TypeError: ``text`` is not a string.
        ValueError: a core is empty, a word is not an axis name, or an axis has two different sizes.

    Example:
        >>> parse("n:4 i r, n o r")
        ((('n', 'i', 'r'), ('n', 'o', 'r')), {'n': 4})
    """
    if not isinstance(text, str):
        raise TypeError(f"network is {text!r}; it must be text such as 'i r, o r, h r, w r'")
    sizes: dict[str, int] = {}
    cores = []
    for position, core in enumerate(text.split(",")):
        if not core.split():
            raise ValueError(f"network {text!r}: core {position} is empty; write its axes, such as 'i r'")
        axes = []
        for word in core.split():
            match = _WORD.fullmatch(word)
            if match is None:
                raise ValueError(
                    f"network {text!r}: {word!r} in core {position} is no axis; write a letter, then letters or "
                    "digits, and a size behind ':' where it is fixed (r, i1, n:4)"
                )
            axis, size = match[1], match[2]
            if size is not None and sizes.setdefault(axis, int(size)) != int(size):
                raise ValueError(
                    f"network {text!r}: axis {axis!r} is given the sizes {sizes[axis]} and {size}; write one"
                )
            axes.append(axis)
        cores.append(tuple(axes))
    return tuple(cores), sizes


def einsum_equation(*operands: Axes, out: Axes) -> str:
    """Return the einsum equation over named axes, with one letter per name.

    Example:
        >>> einsum_equation(("i1", "r"), ("r", "o1"), out=("o1", "i1"))
        'ab,bc->ca'
    """
    # torch.einsum takes 52 ASCII letters. Beyond those, one unicode character each, as in opt_einsum.
    names = dict.fromkeys(axis for operand in operands for axis in operand)
    letter = {name: chr(97 + k) if k < 26 else chr(39 + k) if k < 52 else chr(140 + k) for k, name in enumerate(names)}
    left = ",".join("".join(letter[axis] for axis in operand) for operand in operands)
    return f"{left}->{''.join(letter[axis] for axis in out)}"


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the set bits of a mask, lowest first.

    Example:
        >>> list(bits(0b1010))
        [1, 3]
    """
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
