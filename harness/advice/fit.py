"""`harness fit`: rehearses the sensible configs, lists those that fit into a device's memory, ranks them by cost."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence

from harness.advice.search import AXES, Fit, Trial
from harness.analysis.args import Parser, refuse
from harness.analysis.summary import decided
from harness.device.replay import EXPANDABLE
from harness.record.fields import printable
from harness.rehearsal.pool import REFUSED
from harness.tables import Table, parse_size, size

LISTED = 6
"""How many configs that do not fit are shown, the closest first."""

NODE = 8
"""Devices on a node, in the command for several nodes."""

RANKING = {
    "train": "ranked by what a rank sends for each sequence (arXiv 1910.02054, section 7); "
    "those that recompute after those, offloaded ones last",
    "infer": "ranked by the tokens in memory at once, batch x (prompt + new)",
}
UNSEEN = {
    False: "scratch inside kernels and what lies outside the framework is in no peak here",
    True: "what lies outside the framework (CUDA context, NCCL) is in no figure here but the budget's",
}
"""What is in no figure, on a CPU and on a GPU."""

LEFT_OUT = {
    "train": "left out are those that need more than one that does not fit, and those that recompute without need",
    "infer": "left out are those that need more than one that does not fit",
}

PASSED_OVER = (
    "where ZeRO-1 or 2 is offloaded, the largest partitions were rehearsed; another may peak a little higher"
)


def main(argv: Sequence[str]) -> int:
    """`harness fit`. Exit code: 0 something fits, 1 nothing fits, 2 a wrong request, 3 nothing could be rehearsed,
    130 interrupted, with what was known by then.
    """
    try:
        options, overrides = _parser().parse_known_args(argv)
        fit = Fit(overrides, _reserve(options.reserve))
    except ValueError as error:
        return refuse(error)
    trials = fit.search()
    if trials and all(trial.worst.failure.startswith(REFUSED) for trial in trials):
        print(f"harness: {_reason(trials[0])}", file=sys.stderr)
        return 2
    print(json.dumps(data(fit, trials), indent=1) if options.json else text(fit, trials))
    return 130 if fit.interrupted else code(trials)


def code(trials: Sequence[Trial]) -> int:
    """The exit code: 0 something fits, 1 nothing fits, 3 nothing could be rehearsed."""
    if any(trial.fits for trial in trials):
        return 0
    return 1 if any(trial.known for trial in trials) else 3


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
    """The table as text. Where something fits, the last line is the command to run."""
    fitting = fit.ranked(trials)
    rehearsed = [trial for trial in trials if trial.rehearsed]
    known = [trial for trial in trials if trial.known]
    closest = sorted((trial for trial in known if not trial.fits), key=lambda trial: -trial.left)
    on_gpu = any(trial.worst.reserved is not None for trial in rehearsed)
    table = Table(
        *([["allocated"], ["reserved"]] if on_gpu else [["peak"]]), ["left"], ["of it"], ["filled by"]
    )
    if fitting:
        table.section(f"fits {size(fit.memory - fit.reserve)} a device, the worst of {fit.world} ranks")
    for trial in fitting:
        table.row(*_row(fit, trial, on_gpu))
    shown = closest[:LISTED]
    for title, because in (
        ("does not fit: what is allocated is too much" if on_gpu else "does not fit", False),
        ("does not fit: what is allocated would, what is reserved does not (fragmentation)", True),
    ):
        of_reason = [trial for trial in shown if trial.fragmented == because]
        if of_reason:
            table.section(title)
        for trial in of_reason:
            table.row(*_row(fit, trial, on_gpu))
    failed = [*_unrehearsed(trials)]
    if not known:
        unknown = f"none of the {len(trials)} configs could be rehearsed: whether one fits is not known"
        return "\n".join([*failed, "", unknown])
    lines = [
        table.text(),
        *(_remedy(trial) for trial in shown if trial.fragmented),
        *failed,
        "",
        *decided(fit.reasons),
        fit.budget.sentence(),
        RANKING[fit.mode],
        UNSEEN[on_gpu],
    ]
    lines += (
        f"not seen: {gap}" for gap in dict.fromkeys(gap for each in trials for gap in each.worst.unseen)
    )
    if any(trial.worst.passed_over for trial in trials):
        lines.append(PASSED_OVER)
    ruled_out = f", {len(known) - len(rehearsed)} ruled out by their parameters alone" * (known != rehearsed)
    if fit.interrupted:
        lines.append(f"interrupted: {len(known)} configs are known, and others were still to come")
    lines.append(f"{len(rehearsed)} configs rehearsed{ruled_out}; {LEFT_OUT[fit.mode]}")
    if fitting:
        return "\n".join([*lines, "", command(fit, fitting[0])])
    nearest = closest[0]
    nothing = "nothing that could be rehearsed fits" if failed else "nothing fits"
    more = "at least " * nearest.worst.bound
    misses = f"{' '.join(_short(nearest))} comes nearest, {more}{size(-nearest.left)} too much"
    return "\n".join([*lines, "", f"{nothing}; {misses}"])


def _unrehearsed(trials: Sequence[Trial]) -> Iterator[str]:
    """The configs that could not be rehearsed, grouped by the reason."""
    unknown = [trial for trial in trials if not trial.known]
    for reason in dict.fromkeys(map(_reason, unknown)):
        yield f"could not be rehearsed, because {reason}"
        yield from (f"  {' '.join(_short(trial))}" for trial in unknown if _reason(trial) == reason)


def _reason(trial: Trial) -> str:
    return printable(trial.worst.failure.removeprefix(REFUSED))


def _row(fit: Fit, trial: Trial, on_gpu: bool) -> list[str]:
    worst, budget = trial.worst, fit.memory - fit.reserve
    largest = sorted(worst.categories.items(), key=lambda pair: -pair[1])[:2]
    filled = ", ".join(f"{name} {size(count)}" for name, count in largest if count)
    if worst.bound:
        filled = f"at least {filled}: not rehearsed"
    return [
        f"  {' '.join(_short(trial))}",
        *(
            [size(worst.bytes)]
            if not on_gpu
            else [size(worst.allocated or worst.bytes), size(worst.reserved)]
        ),
        size(trial.left),
        f"{trial.left / budget:.0%}",
        filled,
    ]


def _remedy(trial: Trial) -> str:
    """Whether other settings of the allocator would make room for a config."""
    changes = _would_fit_with(trial)
    remedy = (
        f"PYTORCH_ALLOC_CONF={changes[0]}" if changes else "none of the allocator's settings that were tried"
    )
    return f"{' '.join(_short(trial))} would fit with {remedy}"


def _would_fit_with(trial: Trial) -> list[str]:
    """The settings of the allocator with which a config would fit, the one that wastes least by design first."""
    changes = [each.change for each in trial.worst.alternatives if each.fits]
    return sorted(changes, key=lambda change: change != EXPANDABLE)


def _short(trial: Trial) -> list[str]:
    """The trial's overrides, without those that are off by default."""
    plain = ("zero.offload=none", "pipeline.stages=1", "checkpointing=none")
    return [override for override in trial.overrides if override not in plain]


def command(fit: Fit, trial: Trial) -> str:
    """The command line that runs the config of `trial`."""
    if fit.world <= NODE:
        start = f"torchrun --standalone --nproc-per-node {fit.world}"
    else:
        nodes = f"--nnodes {-(-fit.world // NODE)} --nproc-per-node {NODE}"
        start = f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    allocator = (
        [f"PYTORCH_ALLOC_CONF={shlex.quote(trial.settings.hardware.allocator)}"]
        if (trial.settings.hardware.allocator is not None)
        else []
    )
    overrides = [each for each in fit.overrides if not each.startswith("hardware.allocator=")]
    prompts = [f"generation.count={trial.settings.generation.count}"] if fit.mode == "infer" else []
    return " ".join([*allocator, start, "-m harness", *map(shlex.quote, overrides), *_short(trial), *prompts])


def data(fit: Fit, trials: Sequence[Trial]) -> dict[str, object]:
    """The result for `--json`, with every rehearsal. Figures are in bytes."""
    fitting = fit.ranked(trials)
    return {
        "memory": fit.memory,
        "budget": _formed(fit),
        "reserve": fit.reserve,
        "world_size": fit.world,
        "resolved": fit.reasons,
        "trials": [
            {
                "words": list(trial.overrides),
                "fits": trial.fits,
                "peak": trial.worst.bytes if trial.rehearsed else None,
                "at_least": trial.worst.bytes if trial.worst.bound else None,
                "allocated": trial.worst.allocated,
                "reserved": trial.worst.reserved,
                "left": trial.left if trial.rehearsed else None,
                "fragmented": trial.fragmented,
                "would_fit_with": _would_fit_with(trial),
                "rank": trial.worst.rank,
                "roles_passed_over": trial.worst.passed_over,
                "categories": trial.worst.categories,
                "failure": trial.worst.failure or None,
            }
            for trial in trials
        ],
        "ranked": [list(trial.overrides) for trial in fitting],
        "command": command(fit, fitting[0]) if fitting else None,
    }


def _formed(fit: Fit) -> dict[str, object]:
    """How `memory` was formed, for `--json`; null is what is not known, and was not subtracted."""
    beside = fit.budget.outside
    parts = {} if beside is None else beside._asdict()
    return {
        "total": fit.budget.total,
        "source": fit.budget.source,
        "context": None,
        "nccl": None,
        **{name: each and each._asdict() for name, each in parts.items()},
        "sentence": fit.budget.sentence(),
    }
