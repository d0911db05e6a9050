"""The answer of `harness fit` as text."""

from collections.abc import Iterator, Sequence

from harness.advice.fit.answer import Answer, command, would_fit_with
from harness.advice.fit.combination import Trial, short
from harness.advice.fit.ranking import BY
from harness.advice.fit.request import Request
from harness.analysis.summary import decided
from harness.record.fields import printable
from harness.rehearsal.pool import REFUSED
from harness.tables import Table, size

LISTED = 6
"""How many configs that do not fit are shown, the closest first."""

UNSEEN = {
    False: "scratch inside kernels and what lies outside the framework is in no peak here",
    True: "what lies outside the framework (CUDA context, NCCL) is in no figure here but the budget's",
}
"""What is in no figure, on a CPU and on a GPU."""

LEFT_OUT = {
    "train": "left out are those that need less than one that fits or more than one that does not, and those that "
    "recompute without need",
    "infer": "left out are those that need less than one that fits or more than one that does not",
}

PASSED_OVER = (
    "where ZeRO-1 or 2 is offloaded, the largest partitions were rehearsed; another may peak a little higher"
)


def text(answer: Answer) -> str:
    """The table as text. Where something fits, the last line is the command to run."""
    request, trials, on_gpu = answer.request, answer.trials, answer.on_gpu
    fitting, known, rehearsed = answer.fitting, answer.known, answer.rehearsed
    table = Table(
        *([["allocated"], ["reserved"]] if on_gpu else [["peak"]]), ["left"], ["of it"], ["filled by"]
    )
    if fitting:
        table.section(f"fits {size(request.room)} a device, the worst of {request.world} ranks")
    for trial in fitting:
        table.row(*_row(request, trial, on_gpu))
    shown = answer.closest[:LISTED]
    for title, because in (
        ("does not fit: what is allocated is too much" if on_gpu else "does not fit", False),
        ("does not fit: what is allocated would, what is reserved does not (fragmentation)", True),
    ):
        of_reason = [trial for trial in shown if trial.fragmented == because]
        if of_reason:
            table.section(title)
        for trial in of_reason:
            table.row(*_row(request, trial, on_gpu))
    failed = [*_unrehearsed(trials)]
    if not known:
        unknown = f"none of the {len(trials)} configs could be rehearsed: whether one fits is not known"
        return "\n".join([*failed, "", unknown])
    lines = [
        table.text(),
        *(_remedy(trial) for trial in shown if trial.fragmented),
        *failed,
        "",
        *decided(request.reasons),
        request.budget.sentence(),
        BY[request.mode],
        UNSEEN[on_gpu],
    ]
    lines += (
        f"not seen: {gap}" for gap in dict.fromkeys(gap for each in trials for gap in each.worst.unseen)
    )
    if any(trial.worst.passed_over for trial in trials):
        lines.append(PASSED_OVER)
    ruled_out = f", {len(known) - len(rehearsed)} ruled out without" * (known != rehearsed)
    if answer.interrupted:
        lines.append(f"interrupted: {len(known)} configs are known, and others were still to come")
    lines.append(f"{len(rehearsed)} configs rehearsed{ruled_out}; {LEFT_OUT[request.mode]}")
    if fitting:
        return "\n".join([*lines, "", command(request, fitting[0])])
    nearest = answer.closest[0]
    nothing = "nothing that could be rehearsed fits" if failed else "nothing fits"
    more = "at least " * nearest.worst.bound
    misses = f"{' '.join(short(nearest.overrides))} comes nearest, {more}{size(-nearest.left)} too much"
    return "\n".join([*lines, "", f"{nothing}; {misses}"])


def _unrehearsed(trials: Sequence[Trial]) -> Iterator[str]:
    """The configs that could not be rehearsed, grouped by the reason."""
    unknown = [trial for trial in trials if not trial.known]
    for reason in dict.fromkeys(map(reason_of, unknown)):
        yield f"could not be rehearsed, because {reason}"
        yield from (
            f"  {' '.join(short(trial.overrides))}" for trial in unknown if reason_of(trial) == reason
        )


def reason_of(trial: Trial) -> str:
    return printable(trial.worst.failure.removeprefix(REFUSED))


def _row(request: Request, trial: Trial, on_gpu: bool) -> list[str]:
    worst = trial.worst
    largest = sorted(worst.categories.items(), key=lambda pair: -pair[1])[:2]
    filled = ", ".join(f"{name} {size(count)}" for name, count in largest if count)
    if worst.bound:
        filled = f"at least {filled}: not rehearsed"
    return [
        f"  {' '.join(short(trial.overrides))}",
        *(
            [size(worst.bytes)]
            if not on_gpu
            else [size(worst.allocated or worst.bytes), size(worst.reserved)]
        ),
        size(trial.left),
        f"{trial.left / request.room:.0%}",
        filled,
    ]


def _remedy(trial: Trial) -> str:
    """Whether other settings of the allocator would make room for a config."""
    changes = would_fit_with(trial)
    remedy = (
        f"PYTORCH_ALLOC_CONF={changes[0]}" if changes else "none of the allocator's settings that were tried"
    )
    return f"{' '.join(short(trial.overrides))} would fit with {remedy}"
