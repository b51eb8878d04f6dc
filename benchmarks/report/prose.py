"""Check that no measured number stands in prose by hand.

The rule: a number before a unit of measurement (UNITS) is an error, unless it is

- in a code block, in `code`, in a heading, in the target of a link, or in a comment,
- between the markers of a table or of a figure,
- on a line with the comment `<!-- setting -->`. That is for settings (a limit, a share that is asked for), for
  durations of commands and for numbers of cited publications, never for a result.

A figure's marker must not begin a line: Markdown takes such a line for HTML, and the paragraph ends.
"""

import re
from collections.abc import Iterator

UNITS = (
    "%", "per cent", "percent", "points?", "times", "x", "nats?", "ns", "us", "µs", "ms", "milliseconds?",
    "s", "seconds?", "minutes?", "hours?", "KB", "kB", "MB", "GB", "images per second", "images/s",
)  # fmt: skip
"""An x between two numbers, as in 8 x 8, is a size and not a ratio."""
MEASURED = re.compile(rf"(?<![\w.])(?<![A-Za-z]-)\d[\d.,]*[ \t]*\n?[ \t]*(?:{'|'.join(UNITS)})(?!\w)(?!(?<=x)[ \t]*\d)")
HIDDEN = tuple(
    re.compile(pattern, re.MULTILINE | re.DOTALL)
    for pattern in (
        r"<!-- table: .*?<!-- /table -->",
        r"^[ ]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ ]*(?P=fence)`*~*[ ]*$",
        r"(?<=\n\n)(?:(?: {4}|\t)[^\n]*\n(?:[ \t]*\n(?= {4}|\t))?)+",  # indented code, behind an empty line
        r"<!-- figure: .*?<!-- /figure -->",
        r"^#[^\n]*$",
        r"^[^\n]*<!-- setting -->[^\n]*$",
        r"<!--.*?-->",
        r"(?P<ticks>`+)[^`].*?(?P=ticks)",
        r"\]\([^)\s]*\)",
    )
)


def numbers_by_hand(text: str) -> Iterator[tuple[int, str]]:
    """Find what breaks the rule. Return line numbers and sentences without a full stop."""
    for match in re.finditer(r"^[ ]*(?:[-*] |\d+\. )?[ ]*<!-- /?figure", text, re.MULTILINE):
        yield text.count("\n", 0, match.start()) + 1, "a figure's marker begins the line; put a word before it"
    for pattern in HIDDEN:
        text = pattern.sub(lambda match: re.sub(r"[^\n]", "\0", match[0]), text)
    for match in MEASURED.finditer(text):
        shown = " ".join(match[0].split())
        why = f"a number with a unit by hand: {shown!r}; use a figure, or mark a setting with <!-- setting -->"
        yield text.count("\n", 0, match.start()) + 1, why
