"""What people are surprised by in a run's memory, each found in figures of its record. It reads no torch.

A surprise is a function from a `Run` to the findings that it makes, none where the figures do not show it.
"""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

from harness.config.load import typed
from harness.config.rules.sources import read
from harness.config.settings import Refusal, Settings
from harness.record.schema import Holding, Phase, Record
from harness.tables import size

NOTABLE = 0.1
"""The share below which a part is not worth a sentence."""

STEPS = ("data", "forward", "backward", "step", "validate", "prefill", "decode")
"""The phases that a run is made of; the others are around it."""

SHARDED = {
    0: (),
    1: ("optimizer",),
    2: ("optimizer", "gradients"),
    3: ("optimizer", "gradients", "parameters"),
}
"""What each stage of ZeRO shares out over the ranks (Rajbhandari et al. 2020, arXiv 1910.02054, section 5)."""

MOMENTS = 8
"""Bytes of Adam's two moments in fp32, for each parameter that a rank updates."""

LOSS = ("_log_softmax", "_log_softmax_backward_data", "nll_loss_backward")
"""Operators of the cross-entropy that make a tensor as large as the logits, in fp32."""


class Finding(NamedTuple):
    """A sentence about a run, its kind, and the bytes that it is about; None: about none."""

    kind: str
    sentence: str
    bytes: int | None


class Run:
    """A record with what every surprise asks of it."""

    def __init__(self, record: Record) -> None:
        self.record, self.worst = record, record.worst
        self.peak = record.worst.peak
        self.size = record.world.size

    @cached_property
    def settings(self) -> Settings | None:
        """The config that ran; None where it is not one of this version's."""
        try:
            return typed(self.record.config) if self.record.config else None
        except Refusal:
            return None

    @property
    def stage(self) -> int | None:
        """ZeRO's, in training."""
        return self.settings.zero.stage if self.settings and self.record.mode == "train" else None

    @property
    def whole(self) -> int:
        """Bytes at the peak; 0 where that was not measured."""
        return self.peak.bytes or 0

    def bytes_of(self, category: str) -> int:
        """Bytes of `category` at the peak."""
        return self.peak.categories.get(category) or 0

    def end(self, category: str) -> int:
        """Bytes of `category` at the end."""
        return (self.worst.categories[category].end or 0) if category in self.worst.categories else 0

    def highest(self, category: str) -> int:
        """Bytes of `category` at its own peak, or the most that a phase ended with."""
        return max(self.worst.highest.get(category) or 0, self.worst.seen.get(category) or 0)

    @property
    def holdings(self) -> list[Holding]:
        """What is named at the peak, the largest first."""
        return self.peak.holdings or []

    def phase(self, step: int, name: str) -> Phase | None:
        """The first of its name in `step`."""
        return next((p for p in self.worst.phases if p.step == step and p.phase == name), None)

    def step_peak(self, step: int) -> int:
        """The most bytes in `step`; 0 where that was not measured."""
        return max((p.peak or 0 for p in self.worst.phases if p.step == step and p.phase in STEPS), default=0)


def outside_a_step(run: Run) -> Iterator[Finding]:
    """The peak is in set-up, in a checkpoint: not where people look for it."""
    where = run.peak.where
    if where is None or where.phase in STEPS:
        return
    most = max((run.step_peak(step) for step in {phase.step for phase in run.worst.phases}), default=0)
    steps = f"no step goes above {size(most)}" if most else "no step was measured"
    sentence = f"The peak is not in a step but in {where.phase}; {steps}."
    yield Finding("outside", sentence, run.whole - most if most else None)


def bucket(run: Run) -> Iterator[Finding]:
    """The reduce bucket is larger than this rank's parameters."""
    found = max(
        (h.bytes for h in run.holdings if h.category == "communication" and h.name.startswith("ipg_bucket")),
        default=0,
    )
    parameters = run.bytes_of("parameters")
    if run.settings is None or found <= parameters:
        return
    stays = ", and ZeRO-3 keeps it from start to end" if run.end("communication") >= found else ""
    sentence = (
        f"The reduce bucket takes {size(found)}, more than the {size(parameters)} of parameters on the rank"
        f"{stays}: zero.reduce_bucket_size={run.settings.zero.reduce_bucket_size} elements, "
        "whatever the model's size."
    )
    yield Finding("bucket", sentence, found)


def first_step(run: Run) -> Iterator[Finding]:
    """Adam makes its moments in the first step of the optimizer, so the second step is higher than the first."""
    if run.record.mode != "train":
        return
    forwards = [phase for phase in run.worst.phases if phase.phase == "forward"]
    steps = sorted({phase.step for phase in forwards if phase.categories.get("optimizer") is not None})
    before = (run.phase(steps[0], "forward") if steps else None) or run.phase(0, "setup")
    if before is None or before.categories.get("optimizer") is None:
        return
    had = before.categories["optimizer"] or 0
    if len(steps) > 1:
        later = run.phase(steps[1], "forward")
        came = ((later and later.categories.get("optimizer")) or 0) - had
        if came > 0:
            tops = run.step_peak(steps[0]), run.step_peak(steps[1])
            higher = ""
            if all(tops):
                higher = f": step {steps[0]} peaks at {size(tops[0])}, step {steps[1]} at {size(tops[1])}"
            sentence = f"The first optimizer step made Adam's moments, {size(came)} that stay{higher}."
            yield Finding("first_step", sentence, came)
        return
    came = run.end("optimizer") - had
    if came > 0:
        sentence = (
            f"It ends with its first step. Adam's moments came at the end of that: the next step would begin "
            f"with {size(came)} more than this one did."
        )
        yield Finding("first_step", sentence, came)
    elif had < (coming := _moments(run)):
        sentence = f"Adam's moments are not there yet: the first optimizer step will add {size(coming)}."
        yield Finding("first_step", sentence, coming)


def _moments(run: Run) -> int:
    """Bytes of the moments that a rank's share of the parameters has; 0 where that is not known."""
    if run.stage is None or run.record.model.parameters is None or run.record.pipeline.stages > 1:
        return 0
    return MOMENTS * -(-run.record.model.parameters // (run.size if run.stage else 1))


def logits(run: Run) -> Iterator[Finding]:
    """The loss holds copies of the logits at the peak: sequences x tokens x vocabulary."""
    of_loss = [h for h in run.holdings if h.storages and h.name.rpartition(": ")[2] in LOSS]
    if not of_loss or run.record.mode != "train":
        return
    one = max(h.bytes // h.storages for h in of_loss)
    copies = [h for h in run.holdings if h in of_loss or _as_large(h, one)]
    total, count = sum(h.bytes for h in copies), sum(h.storages for h in copies)
    if total < NOTABLE * run.whole:
        return
    sentence = (
        f"The loss holds {count} tensors as large as the logits at the peak, {size(total)}{_shape(run, one)}."
    )
    yield Finding("logits", sentence, total)


def checkpointing(run: Run) -> Iterator[Finding]:
    """Recomputing layers has no hold on this peak, or little, and why."""
    settings, where = run.settings, run.peak.where
    if settings is None or settings.checkpointing.mode == "none" or where is None:
        return
    asked = settings.checkpointing
    name, held = f"checkpointing={asked.mode}", run.bytes_of("activations")
    layers = int(read(settings.model.config, "num_hidden_layers")[1] or 0)  # 0: it does not say
    recomputed = len(asked.layers) or -(-layers // asked.every)
    beside = sum(h.bytes for h in run.holdings if h.category == "activations" and not _of_layer(h))
    if where.phase not in ("forward", "backward"):
        sentence = f"{name} does not reach this peak: in {where.phase} no layer keeps activations."
    elif held < NOTABLE * run.whole:
        sentence = f"{name} has little left to save: activations are {size(held)} of the peak."
    elif 2 * beside >= held:
        sentence = (
            f"{name} has little left to save: {size(beside)} of the {size(held)} of activations are made "
            "outside the layers, as logits are."
        )
    elif layers == 1:
        again = size(run.peak.recomputed)
        sentence = f"{name} recomputes a single layer: in backward all of it is there again at once, {again}."
    elif 2 * recomputed <= layers:
        sentence = f"{name} is for {recomputed} of {layers} layers; the others keep their activations."
    else:
        return
    yield Finding("checkpointing", sentence, held)


def _of_layer(holding: Holding) -> bool:
    """Whether a layer made it: those have numbers."""
    return holding.name == "others" or bool(re.search(r"\.\d+[.:]", holding.name))


def _as_large(holding: Holding, one: int) -> bool:
    """Whether these are made by the head or the loss, and each as large as the logits, in fp32 or in half of it."""
    module = holding.name.rpartition(": ")[0]
    by_head = module.endswith("lm_head") or (module != "" and "." not in module)
    return by_head and holding.category in ("activations", "workspace") and (
        holding.bytes in (holding.storages * one, holding.storages * one // 2)
    )  # fmt: skip


def _shape(run: Run, one: int) -> str:
    """What `one` copy in fp32 is made of, where that comes out even."""
    if run.settings is None:
        return ""
    train = run.settings.train
    words, left = divmod(one, 4 * train.micro_batch * train.sequence)
    if left or not words:
        return ""
    return (
        f": {train.micro_batch} sequences x {train.sequence} tokens x {words:,} words are {size(one)} in fp32"
    )


def still_gathered(run: Run) -> Iterator[Finding]:
    """ZeRO-3's whole parameters are still there at the end."""
    left = run.end("gathered")
    if left and left >= NOTABLE * run.highest("gathered"):
        last = [p.phase for p in run.worst.phases if p.categories.get("gathered") and p.phase in STEPS]
        after = f", after {last[-1]}" if last else ""
        sentence = (
            f"{size(left)} of whole parameters stay gathered at the end{after}: what comes next, as generating "
            "or saving, begins with so much less room."
        )
        yield Finding("gathered", sentence, left)


def same_on_more_ranks(run: Run) -> Iterator[Finding]:
    """Most of the peak is not shared out, so more ranks do not make it smaller."""
    if run.size == 1 or not run.whole or run.record.pipeline.stages > 1:
        return
    if run.record.mode == "infer":
        whole = run.bytes_of("parameters")
        sentence = (
            f"Each of the {run.size} ranks holds all {size(whole)} of the parameters: more ranks share out "
            "prompts, not the model."
        )
        yield Finding("ranks", sentence, whole)
    elif run.stage is not None:
        shared = sum(map(run.bytes_of, SHARDED[run.stage]))
        same = run.whole - shared
        if 2 * same >= run.whole:
            sentence = (
                f"{size(same)} of the peak ({same / run.whole:.0%}) are not shared out under ZeRO-{run.stage}, "
                f"and stay on each rank however many there are; {size(shared) + ' are' if shared else 'nothing is'}."
            )
            yield Finding("ranks", sentence, same)


def offload(run: Run) -> Iterator[Finding]:
    """What should be in the host's memory is on the device."""
    if run.settings is None or run.record.mode != "train" or run.settings.zero.offload == "none":
        return
    asked, held = run.settings.zero.offload, run.highest("optimizer")
    if held and 2 * held >= _moments(run):  # what is left of it is a count of steps
        why = ": the device is the host" if run.record.world.device == "cpu" else ""
        sentence = (
            f"zero.offload={asked} moved no optimizer state: {size(held)} of it are on the device{why}."
        )
        yield Finding("offload", sentence, held)


SURPRISES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    outside_a_step,
    first_step,
    logits,
    checkpointing,
    bucket,
    still_gathered,
    offload,
    same_on_more_ranks,
)
"""In the order in which they are told."""
