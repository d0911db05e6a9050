"""Bars of bytes by category or link, drawn by the style alone: they need no script, and print as they are."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.analysis.palette import LINKS, LOOKS, OTHER, Look
from harness.tables import size

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent

KNOWN = LOOKS | LINKS
"""What has a look of its own, in stacking order."""

LINE = "var(--back)"
"""The colour of a pattern's lines."""

STRIPES = {
    "/": (-45,),
    "\\": (45,),
    "x": (45, -45),
    "-": (0,),
    "|": (90,),
    "+": (0, 90),
}
"""The angles of a pattern's stripes, in degrees."""


def templates(directory: Path) -> "Environment":
    """The templates in `directory`, and the macros of bars; what they print is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([directory, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "bytes": lambda figure: size(figure, exact=True),
        "size": size,
        "look": look,
    }
    return environment


class Part(NamedTuple):
    """A stretch of a bar: its class in the style, its width in percent of the scale, and what it is."""

    look: str
    width: float
    told: str


class Bar(NamedTuple):
    """A bar, and its bytes as text. Without a part nothing is drawn."""

    parts: list[Part]
    told: str

    @property
    def label(self) -> str:
        """What the bar shows, in words."""
        return ", ".join(part.told for part in self.parts) or self.told


def stacked(categories: Mapping[str, int | None], total: int | None, scale: int) -> Bar:
    """A bar of all categories, of which `scale` bytes would be the whole width."""
    parts = [part(name, categories[name] or 0, scale) for name in present([categories])]
    return Bar(parts, "not measured" if total is None else size(total))


def part(name: str, nbytes: int, scale: int, told: str = "") -> Part:
    """The stretch of a category's or a link's bytes."""
    return Part(look(name), _percent(nbytes, scale), told or f"{name} {size(nbytes)}")


def look(name: str) -> str:
    """The class of a category or a link."""
    return f"is-{name}" if name in KNOWN else "is-other"


def _percent(nbytes: int, scale: int) -> float:
    return round(100 * nbytes / scale, 3) if scale else 0.0


def present(categories: Iterable[Mapping[str, int | None]]) -> list[str]:
    """The categories that are above 0 in any of these, in stacking order."""
    names = {name for each in categories for name, nbytes in each.items() if nbytes}
    return [*(name for name in KNOWN if name in names), *sorted(names - KNOWN.keys())]


def css() -> str:
    """The style of text, of bars, and of each category and link."""
    looks = [(f".is-{name}", each) for name, each in KNOWN.items()] + [(".is-other", OTHER)]
    rules = [f"{selector} {{ {_declarations(each)} }}" for selector, each in looks]
    return "\n".join([(HERE / "bars.css").read_text("utf-8"), *rules])


def _declarations(each: Look) -> str:
    if each.pattern == ".":
        pattern = f"radial-gradient({LINE} 1px, transparent 1.4px)"
        return f"background: {pattern} 0 0 / 6px 6px {each.colour};"
    stripes = [
        f"repeating-linear-gradient({angle}deg, {LINE} 0 1px, transparent 1px 6px)"
        for angle in STRIPES.get(each.pattern, ())
    ]
    return f"background: {', '.join([*stripes, each.colour])};"


def plain() -> dict[str, Any]:
    """The looks as plain data, for the script."""
    return {**{name: list(each) for name, each in LOOKS.items()}, "": list(OTHER)}
