"""The answer of `harness fit` as data."""

from collections.abc import Sequence

from harness.advice.fit.answer import Answer, would_fit_with
from harness.advice.fit.combination import Trial
from harness.advice.fit.ranking import basis, sent
from harness.advice.fit.request import Request
from harness.advice.fit.worlds import Tried


def data(answer: Answer, worlds: Sequence[Tried] = ()) -> dict[str, object]:
    """The result for `--json`, with every rehearsal. Figures are in bytes. `worlds`: those that were tried."""
    request = answer.request
    return {
        "memory": request.memory,
        "budget": _formed(request),
        "reserve": request.reserve,
        "world_size": request.world,
        "worlds": [each._asdict() for each in worlds],
        "impossible": {override: str(refusal) for override, refusal in request.impossible.items()},
        "resolved": request.reasons,
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
                "would_fit_with": would_fit_with(trial),
                "rank": trial.worst.rank,
                "roles_passed_over": trial.worst.passed_over,
                "categories": trial.worst.categories,
                "sent": _sent(trial),
                "failure": trial.worst.failure or None,
            }
            for trial in answer.trials
        ],
        "ranked_by": basis(answer.fitting, request.mode),
        "ranked": [list(trial.overrides) for trial in answer.fitting],
        "command": answer.command(),
    }


def _sent(trial: Trial) -> dict[str, float] | None:
    """The bytes that a rank sends for each sequence; None: not counted."""
    counted = sent(trial)
    return counted and dict(zip(("between_nodes", "within_node"), counted, strict=True))


def _formed(request: Request) -> dict[str, object]:
    """How `memory` was formed, for `--json`; null is what is not known, and was not subtracted."""
    beside = request.budget.outside
    parts = {} if beside is None else beside._asdict()
    return {
        "total": request.budget.total,
        "source": request.budget.source,
        "context": None,
        "nccl": None,
        **{name: each and each._asdict() for name, each in parts.items()},
        "sentence": request.budget.sentence(),
    }
