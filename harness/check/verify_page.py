"""The figures of `harness verify`, for a terminal and as a page."""

from collections.abc import Iterator

from harness.record.verified import Verified
from harness.tables import Table, difference, size

BY_NATURE = (
    "* differs by nature, and is not judged: a rehearsal knows no kernels of a CPU, and compiles nothing"
)


def _table(result: Verified) -> Table:
    table = Table(["real"], ["rehearsed"], ["difference"])
    for pair in result.pairs:
        took = f"{pair.real_seconds} s and {pair.rehearsed_seconds} s"
        share = "" if pair.mbu is None else f", decode's MBU {pair.mbu:.1%}"
        table.section(f"{pair.name}: {took}{share}")
        for each in pair.figures:
            if each.real or each.rehearsed:
                sign = " *" * (bool(each.difference) and not each.judged)
                apart = f"{difference(each.real, each.rehearsed, exact=True)}{sign}"
                table.row(
                    f"  {each.name}", size(each.real, exact=True), size(each.rehearsed, exact=True), apart
                )
    return table


def text(result: Verified) -> str:
    """The figures as an aligned table, and what they come to."""
    table = _table(result)
    return "\n".join([table.text(), *table.legend(), BY_NATURE, *_conclusion(result)])


def page(result: Verified, note: str) -> str:
    """The figures as a page in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in result.packages.items() if version)
    driver = f", driver {result.driver}" if result.driver else ""
    unseen = dict.fromkeys(sentence for pair in result.pairs for sentence in pair.unseen)
    lines = [
        f"# {result.hardware}",
        f"{result.device_name}{driver}, {result.date}: Python {result.python}, {packages}, {result.platform}.",
        *([f"{note}."] if note else []),
        "\n".join(f"{sentence}." for sentence in _conclusion(result)),
        f"By `python -m harness verify`. {BY_NATURE[2:].capitalize()} (marked \\*).",
        *([f"Not seen: {'; '.join(unseen)}."] if unseen else []),
        _table(result).markdown(),
    ]
    return "\n\n".join(lines) + "\n"


def _conclusion(result: Verified) -> Iterator[str]:
    apart = [pair for pair in result.pairs if pair.apart]
    judged = sum(
        figure.judged and figure.difference is not None for pair in result.pairs for figure in pair.figures
    )
    for pair in apart:
        worst = max(pair.apart, key=lambda figure: abs(figure.difference or 0))
        away = difference(worst.real, worst.rehearsed, exact=True)
        yield f"{pair.name}: {len(pair.apart)} figures differ, {worst.name} most, by {away}"
    if not apart:
        yield f"all {judged} figures of {len(result.pairs)} runs are equal to the byte"
    if not result.complete:
        yield "not all runs are here, so that no rehearsal calls itself verified"
