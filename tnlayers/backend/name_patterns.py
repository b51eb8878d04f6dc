"""Patterns for qualified names of modules."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Return whether a pattern matches one of the names, or of the modules around them.

    Example:
        >>> matches("layer?", ["layer1.0.conv"]), matches("re:layer1.*conv", ["layer1.0.conv"]), matches("0", ["10"])
        (True, True, False)
    """
    expression = re.compile(pattern[3:]) if pattern.startswith("re:") else None
    for name in names:
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            path = ".".join(parts[:count])
            if bool(expression.fullmatch(path)) if expression else path == pattern or fnmatchcase(path, pattern):
                return True
    return False


def check_pattern(name: str, pattern: Any) -> str:
    """Return the pattern if ``matches`` accepts it."""
    if not isinstance(pattern, str) or not pattern:
        raise TypeError(f"{name} has the pattern {pattern!r}; it must be a name, a glob, or 're:...'")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{name} has the pattern {pattern!r}, which is no regular expression: {error}") from None
    return pattern
