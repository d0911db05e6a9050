"""`harness fit`: which of the sensible configs fit into a device's memory, each rehearsed, and which costs least."""

import json
import shlex
import sys
from collections.abc import Sequence

from harness.search import AXES, Fit, Trial
from harness.tables import Table, parse_size, size
from harness.tool import Parser

LISTED = 6
"""How many of those that do not fit are shown, the closest first."""

NODE = 8
"""Devices of a node, in the command for more than one."""

RANKING = {
    "train": "ranked by what a rank sends for each sequence (arXiv 1910.02054, section 7); "
    "those that recompute after those, offloaded ones last",
    "infer": "ranked by the tokens that are held at once, batch x (prompt + new)",
}
UNSEEN = (
    "scratch inside kernels and what lies outside the framework (CUDA context, NCCL) is not in these figures"
)

LEFT_OUT = {
    "train": "not those that need more than one that does not fit, nor those that recompute what need not be",
    "infer": "not those that need more than one that does not fit",
}

PASSED_OVER = (
    "where ZeRO-1 or 2 is offloaded, the largest partitions were rehearsed; another may peak a little higher"
)


def main(argv: Sequence[str]) -> int:
    """`harness fit`; the exit code: 0 something fits, 1 nothing does, 2 a wrong request."""
    try:
        asked, words = _parser().parse_known_args(argv)
        fit = Fit(words, _reserve(asked.reserve))
    except ValueError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    trials = fit.search()
    print(json.dumps(data(fit, trials), indent=1) if asked.json else text(fit, trials))
    return 0 if any(trial.fits for trial in trials) else 1


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
        epilog="Lists may be given for " + ", ".join(key for axes in AXES.values() for key in axes) + ".",
    )
    parser.add_argument("--reserve", default="0", metavar="SIZE", help="memory to keep free, as 2GiB")
    parser.add_argument("--json", action="store_true", help="every rehearsal, as data")
    return parser


def text(fit: Fit, trials: Sequence[Trial]) -> str:
    """A table for a person; its last line is the command to run."""
    fitting = fit.ranked(trials)
    closest = sorted((t for t in trials if not t.fits and not t.worst.failure), key=lambda t: -t.left)
    table = Table(["peak"], ["left"], ["of it"], ["filled by"])
    if fitting:
        table.section(f"fits {size(fit.memory - fit.reserve)} a device, the worst of {fit.world} ranks")
    for trial in fitting:
        table.row(*_row(fit, trial))
    if closest:
        table.section("does not fit")
    for trial in closest[:LISTED]:
        table.row(*_row(fit, trial))
    failed = [f"not rehearsed: {' '.join(t.words)}: {t.worst.failure}" for t in trials if t.worst.failure]
    lines = [table.text(), "", RANKING[fit.mode], UNSEEN, *failed]
    if any(trial.worst.passed_over for trial in trials):
        lines.append(PASSED_OVER)
    lines.append(f"{len(trials)} configs rehearsed; {LEFT_OUT[fit.mode]}")
    if fitting:
        return "\n".join([*lines, "", command(fit, fitting[0])])
    near = closest[0] if closest else None
    misses = f"; {' '.join(_short(near))} comes nearest, {size(-near.left)} too much" if near else ""
    return "\n".join([*lines, "", f"nothing fits{misses}"])


def _row(fit: Fit, trial: Trial) -> list[str]:
    worst, room = trial.worst, fit.memory - fit.reserve
    held = sorted(worst.categories.items(), key=lambda pair: -pair[1])[:2]
    filled = ", ".join(f"{name} {size(count)}" for name, count in held if count)
    return [
        f"  {' '.join(_short(trial))}",
        size(worst.bytes),
        size(trial.left),
        f"{trial.left / room:.0%}",
        filled,
    ]


def _short(trial: Trial) -> list[str]:
    """The words that differ among trials, or were chosen."""
    plain = ("zero.offload=none", "pipeline.stages=1", "checkpointing=none")
    return [word for word in trial.words if word not in plain]


def command(fit: Fit, trial: Trial) -> str:
    """The line that runs `trial`."""
    if fit.world <= NODE:
        start = f"torchrun --standalone --nproc-per-node {fit.world}"
    else:
        nodes = f"--nnodes {-(-fit.world // NODE)} --nproc-per-node {NODE}"
        start = f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    prompts = [f"generation.count={trial.settings.generation.count}"] if fit.mode == "infer" else []
    return " ".join([start, "-m harness", *map(shlex.quote, fit.words), *_short(trial), *prompts])


def data(fit: Fit, trials: Sequence[Trial]) -> dict[str, object]:
    """The same for a machine, every rehearsal in it. Bytes."""
    fitting = fit.ranked(trials)
    return {
        "memory": fit.memory,
        "reserve": fit.reserve,
        "world_size": fit.world,
        "trials": [
            {
                "words": list(trial.words),
                "fits": trial.fits,
                "peak": None if trial.worst.failure else trial.worst.bytes,
                "left": None if trial.worst.failure else trial.left,
                "rank": trial.worst.rank,
                "roles_passed_over": trial.worst.passed_over,
                "categories": trial.worst.categories,
                "failure": trial.worst.failure or None,
            }
            for trial in trials
        ],
        "ranked": [list(trial.words) for trial in fitting],
        "command": command(fit, fitting[0]) if fitting else None,
    }
