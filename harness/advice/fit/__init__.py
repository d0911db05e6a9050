"""`harness fit`: rehearses the sensible configs, lists those that fit into a device's memory, ranks them by cost.

`axes.py` and `request.py` are what is asked, `trials.py` what is known of it and how more is learnt, `search.py` how
few rehearsals answer it in one world, `worlds.py` and `cheapest.py` in the smallest, `text.py`, `data.py` and `map.py`
how the answer looks.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from harness.advice.fit.answer import Answer
from harness.advice.fit.axes import AXES
from harness.advice.fit.data import data
from harness.advice.fit.request import Request
from harness.advice.fit.search import search
from harness.advice.fit.text import reason_of, text
from harness.advice.fit.trials import Trials
from harness.advice.fit.worlds import Worlds, open_worlds
from harness.analysis.args import Parser, refuse
from harness.config.deepspeed_file import expanded
from harness.rehearsal.pool import REFUSED
from harness.runtime.files import put
from harness.tables import parse_size


def main(argv: Sequence[str]) -> int:
    """`harness fit`. Exit code: 0 something fits, 1 nothing fits, 2 a wrong request, 3 nothing could be rehearsed,
    130 interrupted, with what was known by then.
    """
    try:
        options, overrides = _parser().parse_known_args(argv)
        if options.html:
            _check_place(options.html)
        answer, worlds = _answer(overrides, _reserve(options.reserve))
        if answer.trials and all(trial.worst.failure.startswith(REFUSED) for trial in answer.trials):
            raise ValueError(reason_of(answer.trials[0]))
        print(json.dumps(data(answer, worlds), indent=1) if options.json else text(answer, worlds))
        if options.html:
            _draw(answer, options.html)
    except ValueError as error:
        return refuse(error)
    return answer.code


def _answer(overrides: Sequence[str], reserve: int) -> tuple[Answer, Worlds | None]:
    """The answer in the world of the request; or in the smallest that is enough, with the search for it."""
    overrides = expanded(overrides).arguments
    listed = open_worlds(overrides)
    if listed is None:
        return Trials(Request(overrides, reserve)).answer(search), None
    worlds = Worlds(overrides, reserve, listed)
    return worlds.run(), worlds


def _check_place(path: Path) -> None:
    """Raise ValueError where a page could not be written after the search."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--html {path}: give a file in a directory that exists")


def _draw(answer: Answer, path: Path) -> None:
    """Write the map. Raises ValueError where that cannot be done."""
    from harness.advice.fit.map import html

    try:
        put(path, html(answer))
    except OSError as error:
        raise ValueError(f"--html {path}: it cannot be written: {error.strerror}") from None


def _reserve(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"--reserve={text}: {error}") from None


def _parser() -> Parser:
    parser = Parser(
        "fit",
        description="Rehearse the configs that could run on a device, and rank those that fit.",
        usage="harness fit mode=train|infer world.size=N hardware=NAME [key=value[,value...] ...]",
        epilog="A list, or ? for all there is, may be given for "
        + ", ".join(dict.fromkeys(key for axes in AXES.values() for key in axes))
        + ". world.size=? finds the smallest world in which anything fits.",
    )
    parser.add_argument("--reserve", default="0", metavar="SIZE", help="memory to keep free, as 2GiB")
    parser.add_argument("--json", action="store_true", help="every rehearsal, as data")
    parser.takes_place("--html", metavar="FILE", help="also a page: a map of what fits, and what fills it")
    return parser
