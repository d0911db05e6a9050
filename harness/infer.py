"""The inference run: prompts, shared out over ranks, continued in batches, gathered in their order."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from harness import continuous, model, quantized, stage, weights
from harness.cache import attention_flops_per_position, check_bits, check_kind, kv_bytes_per_token
from harness.compiled import Compiled
from harness.decode import Choose, Generated, draws, generate, greedy, sampler
from harness.ledger import Ledger
from harness.paging import room
from harness.prompts import Prompt, check, find, text_of
from harness.quantized import Quantization
from harness.record import Output
from harness.relay import Relay
from harness.rules.infer import check_device
from harness.settings import Settings
from harness.skipped import NOTHING
from harness.speed import (
    Share,
    Timing,
    idleness,
    largest,
    of_replicas,
    pages,
    performance,
    scheduled,
    unasked,
)
from harness.split import ranges, split_of
from harness.stage import Stage
from harness.tokenizer import tokenizer_of
from harness.world import World

FILE = "generations.jsonl"
SHOWN = 2
"""How many of the texts a person sees at the end."""

Say = Callable[[str], None]
T = TypeVar("T")


def run(settings: Settings, world: World, ledger: Ledger, out: Output) -> None:
    """Continue every prompt into `generations.jsonl` in the run's directory. Raises Refusal."""
    began = time.perf_counter()
    config = model.model_config(settings.model)
    tokenizer = tokenizer_of(settings.model, settings.data.tokenizer)
    prompts = find(settings, tokenizer, world.rehearsed)
    check(prompts, config)
    asked = settings.generation
    check_device(asked, world.kind)
    check_kind(asked.cache, config, asked.cache_bits, world.tensor)
    if asked.cache == "quantized" and not world.rehearsed:
        with ledger.opaque("check", NOTHING):  # it is no part of the run
            check_bits(asked.cache_bits, world.device)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    quantization = quantized.take(config, settings, world.kind)
    if quantization is not None:
        dtype = quantization.dtype(dtype, world.kind)
    if asked.batching == "continuous":
        room(asked, config, dtype, prompts)  # refused before the model is made
    with ledger.phase("setup"):
        built, sizes = _built(settings, config, dtype, world, ledger, quantization)
    out.done["model"] = {
        "name": settings.model.name,
        **sizes,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if world.stages * world.tensor > 1:
        ways = [f"{world.stages} stages"] * (world.stages > 1)
        ways += [f"layers shared by {world.tensor}"] * (world.tensor > 1)
        told = f"{sizes['parameters']:,} parameters in {', '.join(ways)}, {world.size} ranks"
        out.say(f"{settings.model.name}: {told}")
    startup = time.perf_counter() - began
    share = share_of(settings, world, ledger, built, prompts, out.flush)
    ledger.enough()  # on every rank, however many batches each had: an exact one takes part in what follows
    by_rank = world.gather(share)
    shares = of_replicas(by_rank, world.replicas, world.tensor)
    out.done["inference"] = {
        "prompts": len(prompts),
        "prompt_tokens": sum(len(prompt.tokens) for prompt in prompts),
        "cache": settings.generation.cache,
        "tensor_parallel": world.tensor,
        "kv_bytes_per_token": kv_bytes_per_token(config, dtype),
        "attention_flops_per_position": attention_flops_per_position(config),
        **largest(shares),
        **pages(shares),
    }
    if world.rehearsed:
        return
    tokens = dict(sorted(pair for share in shares for pair in share.tokens.items()))
    texts = [text_of(tokenizer, new) for new in tokens.values()]
    if world.leads:
        write(out.directory / FILE, prompts, list(tokens.values()), texts)
    exact = settings.ledger.steps if settings.ledger.mode == "exact" else 0
    out.done["inference"] |= {"new_tokens": sum(map(len, tokens.values())), **unasked(shares)}
    measured = {**performance(shares, exact), **scheduled(shares)}
    out.done["performance"] = {"startup_seconds": startup, **measured}
    if world.stages > 1:
        out.done["performance"]["stages"] = idleness(by_rank, world.stages, exact)
    _tell(out.say, prompts, texts, out.done)


def _built(
    settings: Settings,
    config: PretrainedConfig,
    dtype: torch.dtype,
    world: World,
    ledger: Ledger,
    quantization: Quantization | None,
) -> tuple[PreTrainedModel | Stage, dict[str, Any]]:
    """The model, or this rank's stage of it, and the sizes of the whole."""
    asked, how = (settings.model, config, dtype, world.device, settings.seed), (world.rehearsed, world.mesh)
    if world.stages == 1:
        built = model.build(*asked, *how, quantization)
        ledger.own(model=built.eval().requires_grad_(False))
        if quantization is not None and not world.rehearsed:
            quantization = quantization.as_read(built)
        return built, model.sizes(built, quantization)
    part = stage.build(*asked, ranges(split_of(settings, config))[world.stage], *how, quantization)
    part.eval().requires_grad_(False)
    ledger.own(model=part.model)
    whole = weights.outline(config, dtype, settings.model.attention)
    return part, model.sizes(whole, quantization)


def share_of(
    settings: Settings,
    world: World,
    ledger: Ledger,
    built: PreTrainedModel | Stage,
    prompts: Sequence[Prompt],
    flush: Callable[[], None],
) -> Share:
    """This replica's prompts, every `world.replicas`-th of them, in batches."""
    asked = settings.generation
    share, mine = Share(), range(world.replica, len(prompts), world.replicas)
    relay = Relay(built, world, ledger) if isinstance(built, Stage) else None
    compiled = None
    if asked.compile and isinstance(built, PreTrainedModel) and mine:
        longest = max(len(prompts[number].tokens) + prompts[number].most for number in mine)
        compiled = Compiled(built, longest - 1, ledger, world.rehearsed)
    eos = end_tokens(built if relay is None else relay.stage.model) if asked.stop_at_eos else ()
    quiet = None if world.leads and not world.rehearsed else True  # None: only on a terminal
    with tqdm(total=len(mine), disable=quiet, unit="prompt", leave=False, desc="generate") as bar:
        if asked.batching == "continuous" and isinstance(built, PreTrainedModel):

            def tell(ended: int) -> None:
                bar.update(ended)
                flush()

            by_number = {number: prompts[number] for number in mine}
            return continuous.share_of(asked, built, by_number, eos, ledger, world.rehearsed, tell)
        for step, numbers in enumerate(batches(mine, asked.batch)):
            groups = cut(numbers, 1 if relay is None else settings.pipeline.groups or world.stages)
            choose = [_chooser(settings, world, ledger, group) for group in groups]
            if world.rehearsed and step == settings.ledger.steps:
                ledger.enough()  # as at the next prefill
                break
            given = [[prompts[number].tokens for number in group] for group in groups]
            most = [[prompts[number].most for number in group] for group in groups]
            how: Any = {"cache": asked.cache, "bits": asked.cache_bits, "eos": eos, "step": step}
            how["ends_only"] = world.rehearsed
            if isinstance(relay, Relay):
                made = relay.generate(given, most, choose=choose, **how)
            else:
                how |= {"compiled": compiled, "ledger": ledger}
                made = generate(built, given[0], most[0], choose=choose[0], **how)
            share.tokens.update(zip(numbers, made.tokens, strict=True))
            share.timings.append(timing(given, made))
            share.kv += [] if made.kv is None else [made.kv]
            bar.update(len(numbers))
            flush()
    return share


def timing(groups: Sequence[Sequence[Sequence[int]]], made: Generated) -> Timing:
    """What became of the prompts in `groups` in time."""
    given = [len(prompt) for group in groups for prompt in group]
    padding = sum(len(group) * max(map(len, group)) for group in groups) - sum(given)
    return Timing(
        len(given),
        sum(given),
        sum(map(len, made.tokens)),
        made.prefill_seconds,
        made.decode_seconds,
        made.waited_seconds,
        made.compile_seconds,
        made.began,
        made.moments,
        made.computed,
        padding,
    )


def _chooser(settings: Settings, world: World, ledger: Ledger, numbers: Sequence[int]) -> Choose:
    asked = settings.generation
    if not asked.sample or world.stage < world.stages - 1:  # only the last stage chooses
        return greedy
    uniform = draws(settings.seed, numbers, asked.max_new_tokens, world.device)
    ledger.claim("inputs", "draws", uniform)
    return sampler(uniform, asked.temperature, asked.top_k, asked.top_p)


def cut(numbers: Sequence[int], groups: int) -> list[Sequence[int]]:
    """`numbers` in so many runs as even as can be, or fewer where they are fewer; none is empty."""
    groups = min(groups, len(numbers))
    ends = [len(numbers) * group // groups for group in range(groups + 1)]
    return [numbers[begin:end] for begin, end in pairwise(ends)]


def batches(numbers: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`numbers` in runs of `size`; the last may be shorter."""
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


def end_tokens(built: PreTrainedModel) -> list[int]:
    """The tokens that the model itself says end a sequence; none, one or several."""
    config = built.generation_config
    found = None if config is None else config.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


def write(
    file: Path, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], texts: Sequence[str]
) -> None:
    """A JSON line for each prompt, in their order; the whole file or none of it."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="ascii") as stream:
        for prompt, new, text in zip(prompts, tokens, texts, strict=True):
            line = {
                "prompt": prompt.text,
                "prompt_tokens": list(prompt.tokens),
                "tokens": list(new),
                "text": text,
            }
            stream.write(json.dumps(line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def _tell(say: Say, prompts: Sequence[Prompt], texts: Sequence[str], done: dict[str, Any]) -> None:
    speed, inference = done["performance"], done["inference"]
    first, token = speed["time_to_first_token_seconds"], inference["kv_bytes_per_token"]
    figures = [
        f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}",
        f"{inference['new_tokens']:,} new tokens",
        f"{speed['tokens_per_second'] or 0:,.0f} tokens/s",
        *([] if first is None else [f"first token after {first * 1000:.1f} ms"]),
        *([] if token is None else [f"KV {token / 1024:g} KiB a token ({inference['cache']} cache)"]),
    ]
    say(", ".join(figures))
    if stages := speed.get("stages"):
        say(", ".join(f"stage {each['stage']} idle {each['idle']:.0%}" for each in stages))
    for prompt, text in list(zip(prompts, texts, strict=True))[:SHOWN]:
        say(f"  prompt  {shown(prompt.text)}")
        say(f"  text    {shown(text)}")


def shown(text: str, width: int = 100) -> str:
    """`text` on one line, quoted, its control characters escaped, cut after `width` characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"'{line}'" if len(line) <= width else f"'{line[:width]}'..."
