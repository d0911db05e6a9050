"""The answer of `harness fit` as text."""

from collections.abc import Iterator, Sequence

from harness.advice.fit.answer import Answer, would_fit_with
from harness.advice.fit.combination import Trial, short
from harness.advice.fit.ranking import basis
from harness.advice.fit.request import Request
from harness.advice.fit.worlds import Worlds
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


def text(answer: Answer, worlds: Worlds | None = None) -> str:
    """The table as text, and what `worlds` has tried. Where something fits, the last line is the command."""
    failed = [*_unrehearsed(answer.trials)]
    if not answer.known:
        unknown = (
            f"none of the {len(answer.trials)} configs could be rehearsed: whether one fits is not known"
        )
        return "\n".join([*failed, "", unknown])
    remedies = [_remedy(trial) for trial in answer.closest[:LISTED] if trial.fragmented]
    tried = [f"world.size={each.size}: {each.seen}" for each in sorted(worlds.tried)] if worlds else []
    if worlds and (others := worlds.not_tried):
        more = f"; and {len(others) - LISTED:,} more" * (len(others) > LISTED)
        listed = "; ".join(others[:LISTED])
        tried.append(f"not tried here: {listed}{more}; world.size={answer.request.world} tries all")
    lines = [_table(answer), *remedies, *failed, "", *tried, *[""] * bool(tried), *notes(answer), ""]
    return "\n".join([*lines, answer.command() or _nearest(answer, bool(failed))])


def _table(answer: Answer) -> str:
    """What fits, and what does not by the reason."""
    request, on_gpu = answer.request, answer.on_gpu
    table = Table(
        *([["allocated"], ["reserved"]] if on_gpu else [["peak"]]), ["left"], ["of it"], ["filled by"]
    )
    shown = answer.closest[:LISTED]
    too_much = "does not fit: what is allocated is too much" if on_gpu else "does not fit"
    fragmented = "does not fit: what is allocated would, what is reserved does not (fragmentation)"
    sections = {
        f"fits {size(request.room)} a device, the worst of {request.world} ranks": answer.fitting,
        too_much: [trial for trial in shown if not trial.fragmented],
        fragmented: [trial for trial in shown if trial.fragmented],
    }
    for title, trials in sections.items():
        if trials:
            table.section(title)
        for trial in trials:
            table.row(*_row(request, trial, on_gpu))
    return table.text()


def notes(answer: Answer) -> list[str]:
    """What was decided for all configs, how the budget is formed, what is in no figure, and what was left out."""
    request, trials = answer.request, answer.trials
    lines = [
        *decided(request.reasons),
        request.budget.sentence(),
        basis(answer.fitting, request.mode),
        UNSEEN[answer.on_gpu],
        *(f"not tried: {override}, {refusal.remedy}" for override, refusal in request.impossible.items()),
        *dict.fromkeys(f"not seen: {gap}" for each in trials for gap in each.worst.unseen),
    ]
    if any(trial.worst.passed_over for trial in trials):
        lines.append(PASSED_OVER)
    if answer.interrupted:
        lines.append(f"interrupted: {len(answer.known)} configs are known, and others were still to come")
    bounded = len(answer.known) - len(answer.rehearsed)
    ruled_out = f", {bounded} ruled out without" * bool(bounded)
    return [*lines, f"{len(answer.rehearsed)} configs rehearsed{ruled_out}; {LEFT_OUT[request.mode]}"]


def _nearest(answer: Answer, failed: bool) -> str:
    """What comes nearest, where nothing fits."""
    nearest = answer.closest[0]
    nothing = "nothing that could be rehearsed fits" if failed else "nothing fits"
    more = "at least " * nearest.worst.bound
    chosen = " ".join(short(nearest.overrides))
    return f"{nothing}; {chosen} comes nearest, {more}{size(-nearest.left)} too much"


def _unrehearsed(trials: Sequence[Trial]) -> Iterator[str]:
    """The configs that could not be rehearsed, grouped by the reason."""
    unknown = [trial for trial in trials if not trial.known]
    for reason in dict.fromkeys(map(reason_of, unknown)):
        yield f"could not be rehearsed, because {reason}"
        yield from (
            f"  {' '.join(short(trial.overrides))}" for trial in unknown if reason_of(trial) == reason
        )


def reason_of(trial: Trial) -> str:
    """Why a config could not be rehearsed."""
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
