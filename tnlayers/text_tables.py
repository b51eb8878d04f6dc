"""Tables of text cells for terminals and notebooks, and the text of counts and ranks in them."""

import html
from collections.abc import Collection, Mapping, Sequence
from typing import Self


def text(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """Format a table as text; the columns in ``numbers`` are right-aligned.

    Example:
        >>> print(text([("layer", "FLOPs"), ("stem", "12"), ("head", "3,456")], numbers=[1]))
        layer  FLOPs
        stem      12
        head   3,456
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = [">" if k in numbers else "<" for k in range(len(widths))]
    line = "  ".join(f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True))
    return "\n".join(line.format(*row).rstrip() for row in rows)


def page(
    rows: Sequence[Sequence[str]],
    caption: str,
    numbers: Collection[int] = (),
    below: Sequence[str] = (),
    marked: Mapping[int, str] | None = None,
) -> str:
    """Format a table as HTML with the first row as header, and lines below it. All text is escaped.

    In a narrow notebook, text wraps, numbers do not, and the table scrolls sideways.

    Args:
        rows: cells; the first row is the header.
        caption: text of the table's caption.
        numbers: columns that are right-aligned.
        below: lines below the table.
        marked: rows with a coloured ground, by their numbers (the header is row 0), and the text that a pointer shows.

    Example:
        >>> page([("layer", "FLOPs"), ("a<b", "12")], "all", numbers=[1]).splitlines()[3]
        '<tr><td style="text-align: left">a&lt;b</td><td style="text-align: right; white-space: nowrap">12</td></tr>'
    """
    left, right = "text-align: left", "text-align: right; white-space: nowrap"
    styles = [f'style="{right if k in numbers else left}"' for k in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        start, end = ("<td", "</td>") if number else ('<th scope="col"', "</th>")
        cells = (f"{start} {style}>{html.escape(cell)}{end}" for style, cell in zip(styles, row, strict=True))
        mark = ""
        if marked and number in marked:  # a ground that can be read on light and on dark pages
            mark = f' style="background-color: rgba(214, 39, 40, 0.25)" title="{html.escape(marked[number])}"'
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    notes = [f"<p>{html.escape(line)}</p>" for line in below]
    head = f'<div style="overflow-x: auto"><table><caption>{html.escape(caption)}</caption>'
    body = [f"<thead>{lines[0]}</thead>", "<tbody>", *lines[1:], "</tbody>"]
    return "\n".join([head, *body, "</table>", *notes, "</div>"])


class Shown(str):
    """A text that notebooks show as HTML.

    Example:
        >>> shown = Shown("a < b", "<b>a &lt; b</b>")
        >>> shown == "a < b", shown.startswith("a"), shown._repr_html_()
        (True, True, '<b>a &lt; b</b>')
    """

    _page: str

    def __new__(cls, text: str, page: str) -> Self:
        """Make the text of its two forms."""
        shown = super().__new__(cls, text)
        shown._page = page
        return shown

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self._page

    def _repr_html_(self) -> str:
        """Return the HTML."""
        return self._page


def place(name: str, aliases: Sequence[str]) -> str:
    """Join the names of a module."""
    return " = ".join((name, *aliases))


def count(number: int | None) -> str:
    """Format a count with thousands separators; empty for None."""
    return "" if number is None else f"{number:,}"


def sizes(rank: Mapping[str, int] | None) -> str:
    """Format the sizes of a rank's bonds: one number if all are equal."""
    values = [*(rank or {}).values()]
    return ", ".join(map(str, values[:1] if len(set(values)) == 1 else values))
