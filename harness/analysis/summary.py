"""What a run prints at its end: the memory of its worst rank, and the run's results."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.analysis.speed.roofline import line
from harness.record.memory import UNHEARD, Rank, Where
from harness.record.results import Training
from harness.record.schema import Failure, Record, parse
from harness.tables import AT_LEAST, Table, size


def show(record: Mapping[str, Any]) -> str:
    """A run's ledger as text. Raises ValueError where `record` is no valid record."""
    run = parse(record, "the record")
    world, worst = run.world, run.worst
    lines = [title(run), *_made_whole(run)]
    if worst.peak.bytes is None and not worst.seen:
        lines.append("no memory was measured; ledger=exact measures it")
    else:
        table = _table(run)
        lines += [table.text(), *_notes(worst, table)]
    if run.pipeline.stages > 1:
        lines += _stages(run)
    if world.rehearsed:
        lines += _rehearsed(run)
    return "\n".join([*lines, *_results(run), *filter(None, [line(run)])])


def out_of_memory(failure: Failure, directory: Path) -> Iterator[str]:
    """What was allocated where memory ran out, by category, and which tool says what to change. Nothing otherwise."""
    if failure.shortage is None:
        return
    allocated = {name: count for name, count in failure.shortage.categories.items() if count}
    if allocated:
        table = Table(["allocated then"], ["share"])
        total = sum(allocated.values())
        for name, count in sorted(allocated.items(), key=lambda pair: -pair[1]):
            table.row(f"  {name}", *_with_share(count, total))
        table.rule()
        table.row("  total", *_with_share(total, total))
        yield table.text()
    yield f"what would change it: python -m harness explain {shlex.quote(str(directory))}"


def decided(reasons: Mapping[str, str]) -> Iterator[str]:
    """The keys whose `auto` resolved to something unusual, with the value and reason.

    Usual are sdpa attention, and nodes that are assumed: those are said where what moves is.
    """
    for key, why in reasons.items():
        if key != "world.per_node" and (key, why.partition(":")[0]) != ("model.attention", "sdpa"):
            yield f"{key}={why}"


def title(run: Record) -> str:
    """One line about what ran."""
    model = run.model
    rehearsed = ", rehearsed" * run.world.rehearsed
    dtype = model.dtype or "-"
    packed = "" if model.quantization is None else f", {model.quantization.short}"
    products = "" if model.products is None else f", {model.products.short}"
    return f"{run.title}{rehearsed}: {model.counted}, {dtype}{packed}{products}, {run.world.devices}"


def _made_whole(run: Record) -> Iterator[str]:
    """A line where weights are packed in the checkpoint, and whole in memory."""
    packed = run.model.quantization
    if packed is not None and packed.whole is not None:
        from harness.config.rules.quantized import AT_FIRST

        packed_size = f", {size(packed.bytes)}" if packed.whole == AT_FIRST else ""
        why = "transformers computes with them so here"
        yield f"its weights ({packed.short}{packed_size}) are unpacked {packed.whole}: {why}"


def _table(run: Record) -> Table:
    """The categories of the worst rank, largest first; then the total and, to compare, the allocator's figures."""
    worst = run.worst
    at_peak, total, allocator = worst.peak.categories, worst.peak.bytes, worst.allocator
    table = Table(["at the peak"], ["share"], ["own peak"], ["at the end"])
    table.section(_rank_title(run))
    for name in _used_categories(worst):
        end = worst.categories[name].end
        table.row(f"  {name}", *_with_share(at_peak.get(name), total), _own_peak(worst, name), size(end))
        if name == "activations":
            table.row("    saved for backward", *_with_share(worst.peak.saved, total))
            if worst.peak.recomputed:
                table.row("    recomputed in backward", *_with_share(worst.peak.recomputed, total))
    if "kernel" not in _used_categories(worst):
        table.row("  kernel", *_with_share(at_peak.get("kernel"), total))
    table.rule()
    table.row("  total", *_with_share(total, total))
    if not run.world.rehearsed:
        table.row("  allocator's own peak", _size_text(allocator.peak))
        table.row("  unattributed", _size_text(allocator.unattributed))
    if allocator.reserved is not None:
        table.row("  allocated, in blocks", size(worst.peak.allocated))
        table.row("  reserved, in segments", size(allocator.reserved))
        table.row("  slack: reserved then, not allocated", size(allocator.slack))
    if worst.on_host is not None:
        table.row("  activations that wait on the host", size(worst.on_host.activations))
    if allocator.foreign:
        table.row("  foreign, in no figure", size(allocator.foreign))
    return table


def _stages(run: Record) -> Iterator[str]:
    """The layers of each stage, the share of a step that it waits, and the forwards that wait for their backward."""
    cut, ranks = run.pipeline, {rank.stage: rank for rank in reversed(run.ranks)}
    layers = ", ".join(map(str, cut.split))
    waits = ""
    if cut.bubble is not None:
        plural = "es" * (cut.micro_batches != 1)
        waits = f"; each waits {cut.bubble:.0%} of a step ({cut.micro_batches} micro-batch{plural})"
    yield f"{cut.stages} stages of {layers} layers{waits}"
    forwards = [ranks[stage].forwards for stage in sorted(ranks)]
    if run.mode == "train" and all(each is not None for each in forwards) and len(forwards) == cut.stages:
        text = ", ".join(f"{each.alive} ({size(each.bytes)})" for each in forwards if each is not None)
        yield f"forwards alive at once, by stage: {text}"


def _rehearsed(run: Record) -> Iterator[str]:
    """What a rehearsal does not see, and whether its peak fits into the device's memory."""
    memory, where = run.world.memory, run.world.device_name
    scratch = (
        ""
        if run.worst.peak.categories.get("kernel") is not None
        else "no scratch inside kernels (kernel), and "
    )
    yield f"a rehearsal sees {scratch}nothing outside the framework's allocator"
    if run.worst.why:
        yield f"rank {run.worst.rank} is the worst: {run.worst.why}"
    if run.world.differences:
        yield f"{len(run.world.differences)} known to differ from a real run: differences, in the record's world"
    if run.world.verified is not None:
        yield f"{where or run.world.device}: {run.world.verified}"
    fullest = max(run.ranks, key=_needs, default=UNHEARD)
    if (needs := _needs(fullest)) and memory is not None:
        yield f"{size(needs)} of {size(memory)} on {where or run.world.device}: {_fits(fullest, memory)}"


def _needs(rank: Rank) -> int:
    """The bytes that a rank takes of its device's memory: what is reserved, where that is known."""
    return (rank.peak.bytes if rank.allocator.reserved is None else rank.allocator.reserved) or 0


def _fits(rank: Rank, memory: int) -> str:
    """Whether a rank fits into `memory`; a GPU's allocator at its limit empties its cache first, and tries again."""
    free, missing, retries = memory - _needs(rank), rank.allocator.exhausted, rank.allocator.retries
    if missing is not None:
        place = f"{size(missing.bytes)} have no room in {_place_text(missing)}"
        within = rank.peak.allocated is not None and rank.peak.allocated <= memory
        return f"does not fit{', by fragmentation alone' * within}: {place}"
    if free < 0:
        return f"does not fit: {size(-free)} too much"
    return f"fits, with {size(free)} left" + f"; its cache was emptied {retries} times for it" * bool(retries)


def _rank_title(run: Record) -> str:
    """The rank that the table shows, and how it compares with the others."""
    ranks, peaks = run.world.size, run.peaks
    if ranks == 1:
        return f"rank {run.worst.rank}"
    if any(rank.bounds for rank in run.ranks):
        return f"rank {run.worst.rank} of {ranks}, the worst of {len(run.ranks)} rehearsed; no other rank has more"
    alike = len(peaks) == ranks and len(set(peaks.values())) == 1
    return f"rank {run.worst.rank} of {ranks}, {'all alike' if alike else 'the worst'}"


def _with_share(figure: int | None, total: int | None) -> tuple[str, str]:
    """Bytes, and their share of `total`."""
    return size(figure), "-" if figure is None or not total else f"{figure / total:.1%}"


def _size_text(figure: int | None) -> str:
    return "not measured" if figure is None else size(figure)


def _own_peak(rank: Rank, name: str) -> str:
    """A category's own peak, or a lower bound of it."""
    peak, seen = rank.highest[name], rank.seen.get(name) or 0
    return f"{AT_LEAST}{size(seen)}" if seen > (peak or 0) else size(peak)


def _used_categories(rank: Rank) -> list[str]:
    """The categories that were ever above 0 bytes, the largest at the peak first."""
    at_peak = rank.peak.categories
    highest = {name: max(peak or 0, rank.seen.get(name) or 0) for name, peak in rank.highest.items()}
    names = [name for name in highest if highest[name] or at_peak.get(name)]
    return sorted(names, key=lambda name: (-(at_peak.get(name) or 0), -highest[name]))


def _notes(rank: Rank, table: Table) -> Iterator[str]:
    """The categories that the table leaves out, the meaning of its signs, and the place of the peak."""
    others = [name for name in rank.highest if name not in _used_categories(rank)]
    zero = [name for name in others if rank.highest[name] == 0]
    null = [name for name in others if rank.highest[name] is None]
    if zero:
        yield f"0 B throughout: {', '.join(zero)}"
    if null:
        yield f"not measured: {', '.join(null)}"
    yield from table.legend()
    if rank.peak.where is not None:
        yield f"peak in {_place_text(rank.peak.where)}"
    for sentence in rank.unseen:
        yield f"not seen: {sentence}"


def _place_text(where: Where) -> str:
    micro_batch = f" of micro-batch {where.micro_batch}"
    module = f"module {where.module}" if where.module else "outside any module"
    return f"step {where.step}, {where.phase}{micro_batch}, {module}, {where.op or 'no operator'}"


def _results(run: Record) -> Iterator[str]:
    """The loss, the speed and the KV cache's bytes a token, in a line."""
    speed, losses = run.performance, run.training.losses
    parts = []
    if losses:
        parts.append(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")
    if speed.tokens_per_second is not None:
        parts.append(f"{speed.tokens_per_second:,.0f} tokens/s")
    if speed.time_to_first_token_seconds is not None:
        parts.append(f"first token after {speed.time_to_first_token_seconds * 1000:,.1f} ms")
    if run.inference.kv_bytes_per_token is not None:
        parts.append(f"KV {size(run.inference.kv_bytes_per_token)} a token")
    if parts:
        yield ", ".join(parts)
    yield from _padding(run.training)
    if unsaved := run.training.unsaved:
        last = unsaved[-1]
        times = "1 checkpoint" if len(unsaved) == 1 else f"{len(unsaved)} checkpoints"
        yield f"{times} could not be written, the last after step {last.step}: {last.error}"


def _padding(training: Training) -> Iterator[str]:
    """A line about the positions that hold no text, and one about tokens without a loss."""
    if training.padding_tokens:
        positions = training.padding_tokens + (training.tokens or 0)
        yield (
            f"padding: {training.padding_tokens:,} of {positions:,} positions, and so {training.padded:.1%} of the "
            "operations and activations; data.packing=true has none"
        )
    if training.label_tokens is not None:
        yield f"{training.tokens or 0:,} tokens, {training.label_tokens:,} of them with a loss"
