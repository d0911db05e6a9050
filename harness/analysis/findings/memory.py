"""Findings about training's memory: the bucket, the logits, what stays gathered. It imports no torch.

Each function here takes a `Run` and yields its findings, or nothing where the figures do not show any.
"""

import re
from collections.abc import Callable, Iterator

from harness.analysis.findings.finding import NOTABLE, STEPS, Finding, Run
from harness.record.memory import Holding
from harness.tables import size

SHARDED = {
    0: (),
    1: ("optimizer",),
    2: ("optimizer", "gradients"),
    3: ("optimizer", "gradients", "parameters"),
}
"""The categories that each stage of ZeRO shards (Rajbhandari et al. 2020, arXiv 1910.02054, section 5)."""

MOMENTS = 8
"""Bytes of Adam's two moments in fp32, for each parameter that a rank updates."""

LOSS = ("_log_softmax", "_log_softmax_backward_data", "nll_loss_backward")
"""Operators of the cross-entropy that allocate a tensor as large as the logits, in fp32."""


def outside_a_step(run: Run) -> Iterator[Finding]:
    """The peak is outside the steps, as in setup or in a checkpoint, where people do not look for it."""
    where = run.peak.where
    if where is None or where.phase in STEPS:
        return
    highest = max((run.step_peak(step) for step in {phase.step for phase in run.worst.phases}), default=0)
    steps = f"no step goes above {size(highest)}" if highest else "no step was measured"
    sentence = f"The peak is not in a step but in {where.phase}; {steps}."
    yield Finding("outside", sentence, run.whole - highest if highest else None)


def bucket(run: Run) -> Iterator[Finding]:
    """The reduce bucket is larger than this rank's parameters."""
    bucket_bytes = max(run.buckets, default=0)
    parameters = run.bytes_of("parameters")
    if run.settings is None or bucket_bytes <= parameters:
        return
    stays = ", and ZeRO-3 keeps it from start to end" if run.end("communication") >= bucket_bytes else ""
    sentence = (
        f"The reduce bucket takes {size(bucket_bytes)}, more than the {size(parameters)} of parameters on the rank"
        f"{stays}: zero.reduce_bucket_size={run.settings.zero.reduce_bucket_size} elements, "
        "whatever the model's size."
    )
    yield Finding("bucket", sentence, bucket_bytes)


def first_step(run: Run) -> Iterator[Finding]:
    """Adam allocates its moments at the end of the first optimizer step, so the second step peaks higher."""
    if run.record.mode != "train":
        return
    forwards = [phase for phase in run.worst.phases if phase.phase == "forward"]
    steps = sorted({phase.step for phase in forwards if phase.categories.get("optimizer") is not None})
    before = (run.phase(steps[0], "forward") if steps else None) or run.phase(0, "setup")
    if before is None or before.categories.get("optimizer") is None:
        return
    before_step = before.categories["optimizer"] or 0
    if len(steps) > 1:
        later = run.phase(steps[1], "forward")
        added = ((later and later.categories.get("optimizer")) or 0) - before_step
        if added > 0:
            peaks = run.step_peak(steps[0]), run.step_peak(steps[1])
            higher = ""
            if all(peaks):
                higher = f": step {steps[0]} peaks at {size(peaks[0])}, step {steps[1]} at {size(peaks[1])}"
            sentence = (
                f"The first optimizer step made the optimizer's moments, {size(added)} that stay{higher}."
            )
            yield Finding("first_step", sentence, added)
        return
    added = run.end("optimizer") - before_step
    if added > 0:
        sentence = (
            f"It ends with its first step. The optimizer's moments came at the end of that: the next step would begin "
            f"with {size(added)} more than this one did."
        )
        yield Finding("first_step", sentence, added)
    elif before_step < (expected := _moments(run)):
        sentence = f"Adam's moments are not there yet: the first optimizer step will add {size(expected)}."
        yield Finding("first_step", sentence, expected)


def _moments(run: Run) -> int:
    """Bytes of Adam's moments for a rank's share of the parameters that are trained; 0 where that is not known, or the
    optimizer has others.
    """
    if run.stage is None or run.record.model.parameters is None or run.record.pipeline.stages > 1:
        return 0
    if not in_fp32_by_adam(run):
        return 0
    trained = run.record.model.trainable or run.record.model.parameters
    return MOMENTS * -(-trained // (run.size if run.stage else 1))


def in_fp32_by_adam(run: Run) -> bool:
    """Whether the optimizer is AdamW with moments in fp32."""
    if run.settings is None:
        return True
    return (run.settings.optimizer.kind, run.settings.optimizer.state) == ("adamw", "fp32")


def logits(run: Run) -> Iterator[Finding]:
    """The loss holds copies of the logits at the peak, each of sequences x tokens x vocabulary elements."""
    loss_holdings = [h for h in run.holdings if h.storages and h.name.rpartition(": ")[2] in LOSS]
    if not loss_holdings or run.record.mode != "train":
        return
    logits_bytes = max(h.bytes // h.storages for h in loss_holdings)
    copies = [h for h in run.holdings if h in loss_holdings or _is_logits_sized(h, logits_bytes)]
    total, count = sum(h.bytes for h in copies), sum(h.storages for h in copies)
    if total < NOTABLE * run.whole:
        return
    sentence = (
        f"The loss holds {count} tensors as large as the logits at the peak, "
        f"{size(total)}{_shape(run, logits_bytes)}."
    )
    yield Finding("logits", sentence, total)


def checkpointing(run: Run) -> Iterator[Finding]:
    """Activation checkpointing lowers this peak little or not at all, and why."""
    settings, where = run.settings, run.peak.where
    if settings is None or settings.checkpointing.mode == "none" or where is None:
        return
    options = settings.checkpointing
    name, activations = f"checkpointing={options.mode}", run.bytes_of("activations")
    from harness.config.rules.sources import read

    layers = read(settings.model.config, "num_hidden_layers")[1]
    layers = layers if isinstance(layers, int) else 0  # 0: it does not say
    recomputed = len(options.layers) or -(-layers // options.every)
    beside = sum(h.bytes for h in run.holdings if h.category == "activations" and not _in_layer(h))
    if where.phase not in ("forward", "backward"):
        sentence = f"{name} does not reach this peak: in {where.phase} no layer keeps activations."
    elif activations < NOTABLE * run.whole:
        sentence = f"{name} has little left to save: activations are {size(activations)} of the peak."
    elif 2 * beside >= activations:
        sentence = (
            f"{name} has little left to save: {size(beside)} of the {size(activations)} of activations are made "
            "outside the layers, as logits are."
        )
    elif layers == 1:
        again = size(run.peak.recomputed)
        sentence = (
            f"{name} recomputes one layer: in backward all its activations are in memory at once, {again}."
        )
    elif 2 * recomputed <= layers:
        sentence = f"{name} is for {recomputed} of {layers} layers; the others keep their activations."
    else:
        return
    yield Finding("checkpointing", sentence, activations)


def _in_layer(holding: Holding) -> bool:
    """Whether a layer allocated it: the names of layers contain a number."""
    return holding.name == "others" or bool(re.search(r"\.\d+[.:]", holding.name))


def _is_logits_sized(holding: Holding, logits_bytes: int) -> bool:
    """Whether the head or the loss allocated these tensors, each as large as the logits, in fp32 or a 16-bit type."""
    module = holding.name.rpartition(": ")[0]
    by_head = module.endswith("lm_head") or (module != "" and "." not in module)
    return by_head and holding.category in ("activations", "workspace") and (
        holding.bytes in (holding.storages * logits_bytes, holding.storages * logits_bytes // 2)
    )  # fmt: skip


def _shape(run: Run, logits_bytes: int) -> str:
    """The shape of one copy of the logits in fp32; empty where its bytes do not fit the settings."""
    if run.settings is None:
        return ""
    train = run.settings.train
    vocabulary, remainder = divmod(logits_bytes, 4 * train.micro_batch * train.sequence)
    if remainder or not vocabulary:
        return ""
    return (
        f": {train.micro_batch} sequences x {train.sequence} tokens x {vocabulary:,} words are "
        f"{size(logits_bytes)} in fp32"
    )


def still_gathered(run: Run) -> Iterator[Finding]:
    """ZeRO-3's whole parameters are still there at the end."""
    remaining = run.end("gathered")
    if remaining and remaining >= NOTABLE * run.highest("gathered"):
        last = [p.phase for p in run.worst.phases if p.categories.get("gathered") and p.phase in STEPS]
        after = f", after {last[-1]}" if last else ""
        sentence = (
            f"{size(remaining)} of whole parameters stay gathered at the end{after}: what comes next, as generating "
            "or saving, begins with that much less memory."
        )
        yield Finding("gathered", sentence, remaining)


def same_on_more_ranks(run: Run) -> Iterator[Finding]:
    """Most of the peak is not sharded, so more ranks do not lower it."""
    if run.size == 1 or not run.whole or run.record.pipeline.stages > 1:
        return
    if run.record.mode == "infer":
        whole = run.bytes_of("parameters")
        sentence = (
            f"Each of the {run.size} ranks holds all {size(whole)} of the parameters: more ranks divide "
            "prompts, not the model."
        )
        yield Finding("ranks", sentence, whole)
    elif run.stage is not None:
        sharded = sum(map(run.bytes_of, SHARDED[run.stage]))
        not_sharded = run.whole - sharded
        if 2 * not_sharded >= run.whole:
            sentence = (
                f"{size(not_sharded)} of the peak ({not_sharded / run.whole:.0%}) are not partitioned under "
                f"ZeRO-{run.stage}, and stay on each rank however many there are; "
                f"{size(sharded) + ' are' if sharded else 'nothing is'}."
            )
            yield Finding("ranks", sentence, not_sharded)


def offload(run: Run) -> Iterator[Finding]:
    """Optimizer state that should be in the host's memory is on the device."""
    if run.settings is None or run.record.mode != "train" or run.settings.zero.offload == "none":
        return
    option, optimizer = run.settings.zero.offload, run.highest("optimizer")
    # below half of that, only Adam's step counters are left
    if optimizer and in_fp32_by_adam(run) and 2 * optimizer >= _moments(run):
        why = ": the device is the host" if run.record.world.device == "cpu" else ""
        sentence = (
            f"zero.offload={option} moved no optimizer state: {size(optimizer)} of it are on the device{why}."
        )
        yield Finding("offload", sentence, optimizer)


def waiting(run: Run) -> Iterator[Finding]:
    """Activations wait for their backward in the host's memory, which no category of a GPU counts."""
    on_host = run.worst.on_host
    if on_host is None:
        return
    text = size(on_host.activations)
    if run.record.world.device == "cpu":
        sentence = (
            f"checkpointing.offload=cpu saves nothing: the device is the host, and has the {text} of copies."
        )
    else:
        pinned = "" if on_host.pinned is None else f", for which {size(on_host.pinned)} or more are pinned"
        sentence = f"{text} of activations wait for their backward in the host's memory, in no category here{pinned}."
    yield Finding("waiting", sentence, on_host.activations)


FINDINGS: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    outside_a_step,
    first_step,
    logits,
    checkpointing,
    bucket,
    still_gathered,
    offload,
    waiting,
    same_on_more_ranks,
)
"""The findings in printing order."""
