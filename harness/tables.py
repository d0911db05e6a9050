"""Plain tables and byte counts for people to read."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int | None, exact: bool = False) -> str:
    """Bytes in powers of 1024, named so; all digits where `exact`; "-" for what was not measured."""
    if count is None:
        return "-"
    if exact or abs(count) < 1024:
        return f"{count:,} B"
    value, unit = float(count), 0
    while abs(value) >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:,.1f} {UNITS[unit]}"


def plain(value: object, longest: int = 60) -> str:
    """`value` as one printable line of at most `longest` characters: records come from other people's disks."""
    line = "".join(c if c.isprintable() else "?" for c in str(value))
    return line if len(line) <= longest else f"...{line[3 - longest :]}"


class Table:
    """Rows under a head, the first column to the left and the others to the right."""

    def __init__(self, head: list[str]) -> None:
        self.head = head
        self.rows: list[list[str] | None] = []

    def row(self, *cells: str) -> None:
        """One row, a cell for each column."""
        self.rows.append(list(cells))

    def rule(self) -> None:
        """A line across."""
        self.rows.append(None)

    def text(self) -> str:
        """For a terminal."""
        filled = [self.head, *(row for row in self.rows if row is not None)]
        widths = [max(len(row[column]) for row in filled) for column in range(len(self.head))]

        def line(row: list[str]) -> str:
            first = row[0].ljust(widths[0])
            rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            return "   ".join([first, *rest]).rstrip()

        across = "-" * (sum(widths) + 3 * (len(widths) - 1))
        return "\n".join(
            [line(self.head), across, *(across if row is None else line(row) for row in self.rows)]
        )

    def markdown(self) -> str:
        """For a page; what would break the table is escaped."""

        def line(row: list[str]) -> str:
            return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |"

        marks = "| --- | " + " | ".join("---:" for _ in self.head[1:]) + " |"
        return "\n".join([line(self.head), marks, *(line(row) for row in self.rows if row is not None)])
