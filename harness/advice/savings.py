"""Which single change of a run's config would save most. Each change is rehearsed, so its figure is not an estimate.

Each row of `TRAIN` or `INFER` is a change that keeps the meaning of the run: the same model, the same sequences in a
step, the same number of tokens for a prompt. The tokens are the same too, except for rounding where the cost says so.
The rules between settings refuse impossible changes.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from harness.analysis.findings.finding import Finding
from harness.config import compose
from harness.config.load import checked, typed
from harness.config.rules import check_world
from harness.config.settings import Refusal, Settings, as_typed
from harness.device.replay import Alternative
from harness.record.schema import Record
from harness.rehearsal.pool import REFUSED, Worst, progress, rehearse_all, workers
from harness.tables import size

Tree = Mapping[str, Any]


class Change(NamedTuple):
    """A function from the run's settings to new values by key, and the cost of the change."""

    values: Callable[[Settings], dict[str, Any]]
    cost: str


def _whole_cache(settings: Settings, kind: str) -> dict[str, Any]:
    """The values for a cache of `kind` in the run's own precision."""
    bits = {"generation.cache_bits": 8} if settings.generation.cache_bits != 8 else {}
    return {"generation.cache": kind, **bits}


TRAIN = (
    Change(lambda s: {"zero.stage": s.zero.stage + 1}, "more communication"),
    Change(lambda s: {"zero.stage": s.zero.stage - 1}, "less communication"),
    Change(
        lambda s: {
            "train.micro_batch": s.train.micro_batch // 2,
            "train.accumulation": s.train.accumulation * 2,
        },
        "twice the passes, each of half the sequences",
    ),
    Change(lambda s: {"zero.reduce_bucket_size": s.zero.reduce_bucket_size // 10}, "more, smaller messages"),
    Change(
        lambda s: {"zero.prefetch_bucket_size": s.zero.prefetch_bucket_size // 10}, "waits for parameters"
    ),
    Change(lambda s: {"zero.offload": "optimizer"}, "an optimizer that steps on the host"),
    Change(
        lambda s: {"zero.offload": "all"},
        "an optimizer that steps on the host, and parameters fetched from there",
    ),
    Change(lambda s: {"checkpointing.mode": "selective"}, "some activations computed twice"),
    Change(lambda s: {"checkpointing.mode": "full"}, "every forward computed twice"),
    Change(
        lambda s: {
            "checkpointing.mode": "none",
            **({"checkpointing.layers": []} if s.checkpointing.layers else {}),
            **({"checkpointing.every": 1} if s.checkpointing.every > 1 else {}),
        },
        "every activation kept",
    ),
    Change(
        lambda s: {"loss.kind": "chunked"}, "the head's logits computed twice, a chunk of tokens at a time"
    ),
    Change(
        lambda s: {"optimizer.kind": "adamw_8bit"} if s.optimizer.kind == "adamw" else {},
        "moments rounded to 8 bits in blocks of 256, so that losses differ a little",
    ),
    Change(
        lambda s: {"optimizer.state": "bf16"},
        "master weights and moments rounded to bf16, so that small updates are lost",
    ),
    Change(
        # a CPU's activations are in its host's memory already
        lambda s: {
            "checkpointing.offload": "cpu" if s.hardware.device == "cuda" else s.checkpointing.offload
        },
        "activations over the host's link, both ways, in each micro-batch",
    ),
    Change(
        lambda s: {"train.optimizer_in_backward": True},
        "no clipping, no accumulation and no second rank, which this run is without already",
    ),
    Change(
        lambda s: {"precision": "bf16"} if s.precision == "fp8" else {},
        "products in 16 bits, which take longer",
    ),
    Change(lambda s: {"model.attention": "sdpa"}, "nothing"),
    Change(lambda s: {"pipeline.split": "memory"}, "other layers on each stage"),
)
INFER = (
    Change(
        lambda s: {"generation.batch": s.generation.batch // 2}, "twice the batches, each of half the prompts"
    ),
    Change(lambda s: _whole_cache(s, "static"), "space for the longest answer from the start"),
    Change(lambda s: _whole_cache(s, "dynamic"), "a copy of a layer's cache at each token"),
    Change(
        lambda s: {"generation.cache": "quantized"},
        "keys and values rounded to so few bits that some tokens differ",
    ),
    Change(
        lambda s: _whole_cache(s, "offloaded"),
        "a layer's cache over the host's link, both ways, at each token",
    ),
    Change(lambda s: {"model.attention": "sdpa"}, "nothing"),
)

SPELLED = {
    "zero.stage": "zero",
    "checkpointing.mode": "checkpointing",
    "loss.kind": "loss",
    "optimizer.kind": "optimizer",
}
"""Keys that the command line spells as an option of their group."""


OTHERS = 2
"""How many further settings of the allocator are named."""

WORTH = 0.01
"""A saving below this share of the peak is not worth a change."""


class Rehearsed(NamedTuple):
    """A change, and the highest peak of any rank with it in bytes, or the reason why there is none."""

    values: dict[str, Any]
    cost: str
    peak: int | str

    @property
    def overrides(self) -> str:
        """The change as command-line overrides."""
        return " ".join(f"{SPELLED.get(key, key)}={as_typed(value)}" for key, value in self.values.items())

    def more(self, before: int) -> int:
        """The bytes that the change adds to the peak `before`; 0 where its peak is not known."""
        return self.peak - before if isinstance(self.peak, int) else 0


class Failed(Exception):
    """The rehearsal of the run as it is failed by itself: no change of it can be compared with it."""


def savings(record: Record) -> Iterator[Finding]:
    """Whether a rehearsal agrees with the record, which change would save most, and the other changes tried.

    Raises Failed before it yields anything.
    """
    try:
        base = settings_of(record, {})
    except Refusal as refusal:
        yield Finding(
            "saving", f"No change was rehearsed, because the run itself cannot be: {refusal}.", None
        )
        return
    changes = list(candidates(record, base))
    rehearsals = rehearse([base, *(settings for settings, _, _ in changes)])
    peaks = [worst.failure or worst.bytes for worst in rehearsals]
    before = peaks[0]
    if isinstance(before, str) and not before.startswith(REFUSED):
        raise Failed(f"no change was rehearsed, because the run's own rehearsal failed: {before}")
    if isinstance(before, str):
        reason = before.removeprefix(REFUSED)
        yield Finding("saving", f"No change was rehearsed, because the run itself cannot be: {reason}.", None)
        return
    tried = [
        Rehearsed(values, cost, peak) for (_, values, cost), peak in zip(changes, peaks[1:], strict=True)
    ]
    tried.sort(key=lambda change: change.more(before))
    yield from agreement(record, rehearsals[0])
    yield from stage_three(base, before, tried)
    yield from recomputation(base, before, tried)
    yield from ranked(record, before, tried)
    yield from allocator_settings(rehearsals[0])
    unrehearsed = [
        each.overrides for each in tried if isinstance(each.peak, str) and not each.peak.startswith(REFUSED)
    ]
    if unrehearsed:
        yield Finding("not_rehearsed", f"Could not be rehearsed: {'; '.join(unrehearsed)}.", None)


def settings_of(record: Record, values: Mapping[str, Any]) -> Settings:
    """The record's config with `values` in it, for a rehearsal. Raises Refusal where the combination is impossible."""
    if not record.config:
        raise Refusal("config", None, "the record has none")
    typed(record.config)  # raises Refusal where a group is not a mapping
    rehearsal_values = {
        "world.kind": "rehearsed",
        "world.size": record.world.size,
        "hardware.device": record.world.device,
        "ledger.mode": "exact",
        "train.resume": None,
        "tracker": [],
    }
    settings = checked(typed(changed(record.config, {**rehearsal_values, **values})))
    check_world(settings, record.world.size)
    return settings


def changed(tree: Tree, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `tree` with `values` set at their paths."""
    copy = dict(tree)
    for path, value in values.items():
        head, _, rest = path.partition(".")
        copy[head] = changed(copy.get(head, {}), {rest: value}) if rest else value
    return copy


def candidates(record: Record, base: Settings) -> Iterator[tuple[Settings, dict[str, Any], str]]:
    """The possible changes that differ from `base`, each as settings, values by key, and cost."""
    for change in TRAIN if base.mode == "train" else INFER:
        values = change.values(base)
        try:
            settings = settings_of(record, values)
        except Refusal:
            continue
        same = settings.train.micro_batch * settings.train.accumulation == (
            base.train.micro_batch * base.train.accumulation
        )
        if same and settings != base:
            yield settings, values, change.cost


def rehearse(wanted: Sequence[Settings]) -> list[Worst]:
    """Rehearse each of `wanted` in parallel. Of the first, other settings of a GPU's allocator are tried too."""
    with workers() as pool, progress(len(wanted)) as pace:
        return rehearse_all(pool, wanted, pace, advised=1)


def agreement(record: Record, base: Worst) -> Iterator[Finding]:
    """Whether the rehearsal gives the record's own peak. If it does, the savings can be trusted."""
    peak, rehearsed = record.worst.peak, base.bytes
    if record.status == "failed" or peak.bytes is None:
        yield Finding("rehearsal", f"A rehearsal of the whole run peaks at {size(rehearsed)}.", rehearsed)
        return
    kernel = (
        0 if base.reserved is not None else peak.categories.get("kernel") or 0
    )  # a GPU's rehearsal has it too
    difference = peak.bytes - kernel - rehearsed
    without = f", its {size(kernel)} of scratch inside kernels left out" if kernel else ""
    if not difference and not record.world.rehearsed:
        sentence = f"A rehearsal of this run gives the same peak, to the byte{without}."
        yield Finding("agreement", sentence, 0)
    elif difference:
        more = "more" if difference > 0 else "less"
        sentence = (
            f"A rehearsal of this run gives {size(rehearsed)}; the record has {size(abs(difference))} {more}"
            f"{without}. The saving is close, not exact."
        )
        yield Finding("agreement", sentence, difference)


def allocator_settings(base: Worst) -> Iterator[Finding]:
    """Under which settings a GPU's allocator would reserve less, or where the run does not fit, would fit."""
    if base.reserved is None:
        return
    better = [each for each in base.alternatives if each.saved > 0 or (base.exhausted and each.fits)]
    if not better:
        yield Finding("allocator", "No other setting of the allocator that was tried would reserve less.", 0)
        return
    best, *others = better
    fits = " and the run would fit" if base.exhausted and best.fits else ""
    sentence = (
        f"With PYTORCH_ALLOC_CONF={best.change} the allocator would reserve {_of_reserved(best)}{fits}: "
        f"{size(best.reserved)}, computed."
    )
    if others:
        also = (f"{each.change} ({_of_reserved(each)})" for each in others[:OTHERS])
        sentence += f" Also: {'; '.join(also)}."
    yield Finding("allocator", sentence, max(0, best.saved))


def _of_reserved(alternative: Alternative) -> str:
    return _more_or_less(-alternative.saved) if alternative.saved else "as much"


def stage_three(base: Settings, before: int, tried: Sequence[Rehearsed]) -> Iterator[Finding]:
    """ZeRO-3 takes more memory than ZeRO-2 would."""
    for change in tried:
        saved = -change.more(before)
        if base.zero.stage == 3 and change.values == {"zero.stage": 2} and saved > 0:
            sentence = (
                f"ZeRO-3 takes {size(saved)} more here than ZeRO-2 would ({size(before)} against "
                f"{size(before - saved)}): what it gathers and its buckets outweigh what it shards."
            )
            yield Finding("zero3", sentence, saved)


def recomputation(base: Settings, before: int, tried: Sequence[Rehearsed]) -> Iterator[Finding]:
    """What activation checkpointing saves, by the rehearsal without it."""
    for change in tried:
        if change.values.get("checkpointing.mode") == "none" and isinstance(change.peak, int):
            saved, mode = change.peak - before, base.checkpointing.mode
            if saved < WORTH * change.peak:
                amount = f"only {size(saved)}" if saved > 0 else "nothing"
                sentence = f"checkpointing={mode} saves {amount} here, and computes again for it"
            else:
                sentence = f"checkpointing={mode} saves {size(saved)} here"
            sentence += f": without it the peak is {size(change.peak)}, rehearsed."
            yield Finding("recomputation", sentence, saved)


def ranked(record: Record, before: int, tried: Sequence[Rehearsed]) -> Iterator[Finding]:
    """The best change with the command for it, then the others."""
    others = [
        f"{change.overrides} ({_more_or_less(change.more(before))})"
        for change in tried
        if change.more(before)
    ]
    saved = -tried[0].more(before) if tried else 0
    if saved < WORTH * before:
        sentence = f"No single change that was rehearsed saves as much as {WORTH:.0%}"
        yield Finding("saving", f"{sentence}{': ' * bool(others)}{'; '.join(others)}.", max(0, saved))
        return
    best = tried[0]
    sentence = (
        f"{best.overrides} would save {size(saved)} (from {size(before)} to {size(before - saved)} at the peak, "
        f"rehearsed). It costs {best.cost}."
    )
    yield Finding("saving", sentence, saved)
    yield Finding("command", command(record, best), None)
    if others[1:]:
        yield Finding("others", f"Rehearsed too: {'; '.join(others[1:])}.", None)


def _more_or_less(extra: int) -> str:
    return f"{size(abs(extra))} {'more' if extra > 0 else 'less'}"


def command(record: Record, change: Rehearsed) -> str:
    """The command line that runs `record`'s config with `change`.

    Where the typed overrides do not reproduce that config, it contains only the change.
    """
    replaced = {*change.values, *(SPELLED.get(key, key) for key in change.values)}
    kept_overrides = [
        override
        for override in record.environment.command
        if override.partition("=")[0] not in replaced and not override.startswith("hydra.")
    ]
    arguments = [*kept_overrides, *change.overrides.split()]
    decided = [f"{key}={as_typed(record.value(key))}" for key in record.resolved if key not in change.values]
    start = "python -m harness"
    if not record.world.rehearsed and record.world.size > 1:
        start = f"torchrun --standalone --nproc-per-node {record.world.size} -m harness"
    try:
        composed: Any = OmegaConf.to_container(
            compose.compose([*kept_overrides, *decided, *change.overrides.split()]), resolve=True
        )
        del composed["hydra"]
        same = typed(composed) == typed(changed(record.config, change.values))
    except (Refusal, ValueError):
        same = False
    return f"{start} {shlex.join(arguments if same else ['...', *change.overrides.split()])}"
