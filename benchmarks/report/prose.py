"""Check that no measured number stands in prose by hand.

The rule: a number before a unit of measurement (UNITS) is an error, unless it is

- in a code block, in `code`, in a heading, in the target of a link, or in a comment,
- between the markers of a table or of a figure,
- on a line with the comment `<!-- setting -->`. That is for settings (a limit, a share that is asked for), for
  durations of commands and for numbers of cited publications, never for a result.

A figure's marker must not begin a line: Markdown takes such a line for HTML, and the paragraph ends.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

UNITS = (
    "%", "per cent", "percent", "percentage points?", "(?:accuracy )?points?", "times",
    "x", "\u00d7", "-?fold", "nats?",
    "dB", "ns", "us", "µs", "ms", "milliseconds?", "s", "seconds?", "min", "minutes?", "h", "hours?", "[kKMG]i?B",
    "[MGT]?FLOPs?(?:/s)?", "(?:images?|img)(?: per second|/s|/sec)", "of the dense (?:layer|network|time)",
)  # fmt: skip
"""An x between two numbers, as in 8 x 8, is a size and not a ratio."""
NUMBER = r"\d(?:[\d.,]*\d)?"
COUNTS = "two|three|four|five|six|seven|eight|nine|ten|twenty|fifty|a hundred"
MEASURED = re.compile(
    "|".join(
        (
            rf"(?<![\w.])(?<![A-Za-z]-){NUMBER}(?:[ \t]*\n?[ \t]*|-)(?:{'|'.join(UNITS)})"
            r"(?!\w)(?!(?<=[x\u00d7])[ \t]*\d)",
            r"\b(?:twice|thrice|half) as (?!many\b|large\b|wide\b|deep\b)\w+",
            rf"\b(?:{COUNTS}|several) times (?:faster|slower|as (?:fast|slow|long|accurate)|less|more)\b",
            rf"\b(?:factor|accuracy) of (?:about )?(?![01]\b(?!\.)){NUMBER}",
            rf"(?<![\w.-]){NUMBER} of (?:the )?{NUMBER} (?:rows|cases|layers|runs|pairs)\b",
            r"\b(?:a|one|two|three) (?:half|third|quarter|fifth|sixth|tenth)s? of "
            r"(?:the (?:time|memory|error|accuracy)|tednet|tensorly)\b",
        )
    )
)
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


EXAMPLE = re.compile(r"^ *>>> .*?(?=^\s*$|\Z)", re.MULTILINE | re.DOTALL)


def numbers_by_hand(text: str) -> Iterator[tuple[int, str]]:
    """Find what breaks the rule. Return line numbers and sentences without a full stop."""
    for match in re.finditer(r"^[ ]*(?:[-*] |\d+\. )?[ ]*<!-- /?figure", text, re.MULTILINE):
        yield text.count("\n", 0, match.start()) + 1, "a figure's marker begins the line; put a word before it"
    text = re.sub(r"&nbsp;| ", " ", text)
    for pattern in HIDDEN:
        text = pattern.sub(lambda match: re.sub(r"[^\n]", "\0", match[0]), text)
    text = re.sub(r"(?<!\w)[*_]{1,3}(?=[\d\w])|(?<=[\d\w%])[*_]{1,3}(?!\w)", "", text)  # emphasis
    for match in MEASURED.finditer(text):
        shown = " ".join(match[0].split())
        why = f"a number with a unit by hand: {shown!r}; use a figure, or mark a setting with <!-- setting -->"
        yield text.count("\n", 0, match.start()) + 1, why


def prose_of(code: str, comments: bool = False) -> str:
    """Return a program's docstrings, and its comments if asked, each in its line, with empty lines for the rest.

    Examples in docstrings are left out: they are run.

    Example:
        >>> prose_of("'Return 2 s.'; x = 1  # 3 s", comments=True)
        'Return 2 s. 3 s'
    """
    lines = [""] * (code.count("\n") + 1)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = EXAMPLE.sub(lambda match: "\n" * match[0].count("\n"), ast.get_docstring(node, clean=False) or "")
            for number, line in enumerate(text.splitlines(), node.body[0].lineno - 1):
                lines[number] = line.strip()
    for token in tokenize.generate_tokens(io.StringIO(code).readline) if comments else ():
        if token.type == tokenize.COMMENT:
            line = token.start[0] - 1
            lines[line] = f"{lines[line]} {token.string.lstrip('# ')}".lstrip()
    return "\n".join(lines)
