"""`harness report RUN [RUN ...] -o DIR`: shows runs on a page, from their records and traces alone, without torch.

It may import analysis and advice. Start at `content.py`: the page's content as plain data; `page.py` renders it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.analysis.args import Parser, refuse
from harness.record.fields import printable
from harness.runtime.files import put

PAGE = "index.html"


def main(argv: Sequence[str]) -> int:
    """Run `harness report RUN [RUN ...]`; returns the exit code."""
    from harness.report import content, exports, page

    try:
        options = _parser().parse_args(argv)
        runs = content.runs_at(options.run)
        html = page.html(runs)
        options.output.mkdir(parents=True, exist_ok=True)
        put(options.output / PAGE, html)
        paths = [options.output / PAGE]
        for form in exports.FORMS:
            if getattr(options, form):
                paths += exports.FORMS[form].write(runs, options.output)
    except ValueError as error:
        return refuse(error)
    except OSError as error:
        print(
            f"harness: -o {printable(str(error.filename))}: it cannot be written: {error.strerror}",
            file=sys.stderr,
        )
        return 2
    for path in paths:
        print(path)
    return 0


def _parser() -> Parser:
    from harness.report.exports import FORMS

    parser = Parser(
        "report",
        description="Draw runs as one page that opens from disk: memory over time, runs side by side, every rank, "
        "every module, the roofline, the configs.",
        epilog="Exit code 2: a run has no record, or no trace, that can be read.",
    )
    parser.takes_runs("+")
    parser.takes_place("-o", "--output", default=Path("report"), metavar="DIR", help="where to; report/")
    for name, form in FORMS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"also {form.meaning}")
    return parser
