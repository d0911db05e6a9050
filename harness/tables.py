"""Tables and byte counts as text."""

from collections.abc import Sequence
from contextlib import suppress

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
GAP = "   "
AT_LEAST = ">= "
SIGNS = {"-": "- not measured", AT_LEAST: ">= the most when a phase ended; in between nothing was watched"}
"""Signs in place of a figure or before it, and the line under a table that explains each."""


def size(figure: float | None, exact: bool = False) -> str:
    """Bytes with a unit, in powers of 1024; all digits if `exact`; "-" if not measured."""
    if figure is None:
        return "-"
    if exact or abs(figure) < 1024:
        return f"{figure:,.0f} B"
    value, unit = float(figure), 0
    while round(abs(value), 1) >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:,.1f} {UNITS[unit]}"


def parse_size(text: str) -> int:
    """Bytes of a text such as `2GiB`, `1.5 KiB` or `500`. Raises ValueError, which names the valid forms."""
    number, factor = text.strip(), 1
    for power, unit in reversed([*enumerate(UNITS)]):
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), 1024**power
            break
    with suppress(ValueError, OverflowError):
        if (count := float(number)) >= 0:
            return int(count * factor)
    raise ValueError(f"not a size; give bytes, or a number with one of {', '.join(UNITS[1:])}")


def seconds(figure: float | None) -> str:
    """Seconds in a unit that shows three or more digits; "-" if not measured."""
    if figure is None:
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(figure) >= unit:
            return f"{figure / unit:,.{2 if figure < 100 * unit else 0}f} {name}"
    return f"{figure / 1e-6:,.1f} us"


def duration(figure: float) -> str:
    """Seconds as a rounded number of s, min or h: the largest unit of which there are at least two."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if figure >= 2 * unit:
            return f"{figure / unit:,.0f} {name}"
    return f"{figure:,.0f} s"


def count(figure: float | None, unit: str = "") -> str:
    """A number with an SI prefix and `unit`, in powers of 1000; "-" if not measured."""
    if figure is None:
        return "-"
    value, names = float(figure), ["", "k", "M", "G", "T", "P", "E"]
    while round(abs(value), 2) >= 1000 and len(names) > 1:
        value, names = value / 1000, names[1:]
    return f"{value:,.2f} {names[0]}{unit}".rstrip()


def difference(first: int | None, other: int | None, exact: bool = False) -> str:
    """How many bytes more, or fewer, `other` is than `first`."""
    if first is None or other is None:
        return "-"
    if first == other:
        return "same"
    return f"{'+' if other > first else '-'}{size(abs(other - first), exact)}"


def factor(first: float | None, other: float | None) -> str:
    """`other` as a multiple of `first`; empty if there is no useful factor."""
    return f"x {other / first:,.2f}" if first and other and first != other else ""


def tail(text: str, longest: int) -> str:
    """The end of `text`, the most useful part of a path, in at most `longest` characters."""
    return text if len(text) <= longest else f"...{text[3 - longest :]}"


class Table:
    """Rows in titled sections. The first column is left-aligned, the others are right-aligned under their headings."""

    def __init__(self, *headings: Sequence[str]) -> None:
        """One heading for each column after the first, as a sequence of lines."""
        height = max(map(len, headings))
        padded = ([*[""] * (height - len(heading)), *heading] for heading in headings)
        self._heads = [["", *line] for line in zip(*padded, strict=True)]
        self._rows: list[list[str] | str | None] = []

    def section(self, title: str) -> None:
        """Put the following rows under `title`."""
        self._rows.append(title)

    def row(self, *cells: str) -> None:
        """Add a row. Missing cells at its end are empty."""
        self._rows.append([*cells, *[""] * (len(self._heads[0]) - len(cells))])

    def rule(self) -> None:
        """Add a horizontal line, for a terminal."""
        self._rows.append(None)

    def legend(self) -> list[str]:
        """The meaning of the signs in the table."""
        cells = [f"{cell} " for row in self._rows if isinstance(row, list) for cell in row[1:]]
        return [
            meaning for sign, meaning in SIGNS.items() if any(c.startswith(sign.strip() + " ") for c in cells)
        ]

    def text(self) -> str:
        """The table for a terminal."""
        columns = zip(*self._heads, *(row for row in self._rows if isinstance(row, list)), strict=True)
        widths = [max(map(len, column)) for column in columns]

        def line(row: list[str]) -> str:
            others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            return GAP.join([row[0].ljust(widths[0]), *others]).rstrip()

        across = "-" * (sum(widths) + len(GAP) * (len(widths) - 1))
        lines = [line(head) for head in self._heads]
        for row in self._rows:
            if isinstance(row, str):
                lines += [across, row]
            else:
                lines.append(across if row is None else line(row))
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table in Markdown. Characters that would break it are escaped."""

        def line(row: Sequence[str]) -> str:
            return "| " + " | ".join(row) + " |"

        columns = len(self._heads[0])
        headings = [escaped(" ".join(filter(None, lines))) for lines in zip(*self._heads, strict=True)]
        lines = [line(headings), "| --- |" + " ---: |" * (columns - 1)]
        for row in self._rows:
            if isinstance(row, str):
                lines.append(line([f"**{escaped(row)}**", *[""] * (columns - 1)]))
            elif row is not None:
                lines.append(line([*map(escaped, row)]))
        return "\n".join(lines)


def escaped(cell: str) -> str:
    """`cell` without characters that Markdown or HTML interprets."""
    indent = (len(cell) - len(cell.lstrip())) // 2
    text = cell.strip().replace("&", "&amp;")
    for character in "\\|<`*[]":
        text = text.replace(character, f"\\{character}")
    return "&emsp;" * max(0, indent - 1) + text
