"""The inference run: prompts, shared out over ranks, continued in batches, gathered in their order."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from harness.config.load import Settings
from harness.config.rules.generation import check_device
from harness.config.settings import Refusal
from harness.config.strategy import Strategy
from harness.data.prompts import Prompt, check, find, text_of
from harness.generation import continuous_batching
from harness.generation.batch import Requests
from harness.generation.compiled_decode import Compiled
from harness.generation.decode import Generated, generate
from harness.generation.extrapolation import NOTHING
from harness.generation.generation_config import strategy_of
from harness.generation.metrics import (
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
from harness.generation.paged_cache import room
from harness.generation.pipeline_decode import Relay
from harness.ledger import Ledger
from harness.model import init_weights, loader, stage
from harness.model.kv_cache import attention_flops_per_position, check_bits, kv_bytes_per_token
from harness.model.partition import ranges, split_of
from harness.model.stage import Stage
from harness.model.tokenizer import tokenizer_of
from harness.quantization import method
from harness.quantization.method import Quantization
from harness.record.record_file import Output
from harness.runtime.progress import Pace
from harness.runtime.world import World

FILE = "generations.jsonl"
SHOWN = 2
"""How many of the texts a person sees at the end."""

Say = Callable[[str], None]
T = TypeVar("T")


def run(settings: Settings, world: World, ledger: Ledger, out: Output) -> None:
    """Continue every prompt into `generations.jsonl` in the run's directory. Raises Refusal."""
    began = time.perf_counter()
    config = loader.model_config(settings.model)
    tokenizer = tokenizer_of(settings.model, settings.data.tokenizer)
    strategy = strategy_of(settings, config)
    prompts = find(settings, tokenizer, strategy.most, world.rehearsed)
    check(prompts, config)
    asked = settings.generation
    check_device(asked, world.kind)
    if asked.cache == "quantized" and not world.rehearsed:
        with ledger.opaque("check", NOTHING):  # it is no part of the run
            check_bits(asked.cache_bits, world.device)
    dtype = getattr(torch, settings.dtype)
    quantization = method.take(config, settings, world.kind)
    if quantization is not None:
        dtype = quantization.dtype(dtype, world.kind)
    if asked.batching == "continuous":
        room(asked, config, dtype, prompts)  # refused before the model is made
    with ledger.phase("setup"):
        built, sizes = _built(settings, config, dtype, world, ledger, quantization)
    if asked.batching == "static":
        check_columns(
            built.model if isinstance(built, Stage) else built, prompts, asked.batch, world.replicas
        )
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
    if description := strategy.description():
        out.say(f"{settings.model.name}: {description}")
    startup = time.perf_counter() - began
    share = share_of(settings, world, ledger, built, prompts, strategy, out.flush, out.say)
    ledger.enough()  # on every rank, however many batches each had: an exact one takes part in what follows
    by_rank = world.gather(share)
    shares = of_replicas(by_rank, world.replicas, world.tensor)
    out.done["inference"] = {
        "prompts": len(prompts),
        "prompt_tokens": sum(len(prompt.tokens) for prompt in prompts),
        "max_new_tokens": max(prompt.most for prompt in prompts),
        "cache": settings.generation.cache,
        "tensor_parallel": world.tensor,
        "kv_bytes_per_token": kv_bytes_per_token(config, dtype),
        "attention_flops_per_position": attention_flops_per_position(config),
        "generation_config": strategy.as_record(),
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
        built = loader.build(*asked, *how, quantization)
        ledger.own(model=built.eval().requires_grad_(False))
        if quantization is not None and not world.rehearsed:
            quantization = quantization.as_read(built)
        return built, loader.sizes(built, quantization)
    part = stage.build(*asked, ranges(split_of(settings, config))[world.stage], *how, quantization)
    part.eval().requires_grad_(False)
    ledger.own(model=part.model)
    whole = init_weights.outline(config, dtype, settings.model.attention)
    return part, loader.sizes(whole, quantization)


def share_of(
    settings: Settings,
    world: World,
    ledger: Ledger,
    built: PreTrainedModel | Stage,
    prompts: Sequence[Prompt],
    strategy: Strategy,
    flush: Callable[[], None],
    say: Say = lambda line: None,
) -> Share:
    """This replica's prompts, every `world.replicas`-th of them, in batches."""
    asked = settings.generation
    mine = {number: prompts[number] for number in of_replica(len(prompts), world.replica, world.replicas)}
    quiet = world.rehearsed or not world.leads
    if asked.batching == "continuous" and isinstance(built, PreTrainedModel):
        with Pace(len(mine), "prompt", say, quiet) as pace:

            def tell(ended: int) -> None:
                pace.advance(ended)
                flush()

            return continuous_batching.share_of(asked, built, mine, strategy, ledger, world.rehearsed, tell)
    with Pace(sum(prompt.most for prompt in mine.values()), "token", say, quiet) as pace:
        return _in_batches(settings, world, ledger, built, mine, strategy, pace, flush)


def _in_batches(
    settings: Settings,
    world: World,
    ledger: Ledger,
    built: PreTrainedModel | Stage,
    prompts: Mapping[int, Prompt],
    strategy: Strategy,
    pace: Pace,
    flush: Callable[[], None],
) -> Share:
    """These prompts, by their numbers, in batches that begin and end together."""
    asked, share, done = settings.generation, Share(), 0
    relay = Relay(built, world, ledger) if isinstance(built, Stage) else None
    together = [_requests(prompts, numbers) for numbers in batches(list(prompts), asked.batch)]
    cache: str | Compiled = asked.cache
    if asked.compile and isinstance(built, PreTrainedModel) and together:
        longest = max(requests.shown for requests in together)
        cache = Compiled(built, longest, ledger, world.rehearsed)
    for step, requests in enumerate(together):
        if world.rehearsed and step == settings.ledger.steps:
            ledger.enough()  # as at the next prefill
            break
        groups = [requests]
        how: Any = {"cache": cache, "bits": asked.cache_bits, "step": step, "tell": pace.advance}
        how["ends_only"] = world.rehearsed
        if relay is not None:
            parts = cut(requests.numbers, settings.pipeline.groups or world.stages)
            groups = [_requests(prompts, numbers) for numbers in parts]
            made = relay.generate(groups, strategy, **how)
        else:
            made = generate(built, requests, strategy, ledger=ledger, **how)
        share.tokens.update(zip(requests.numbers, made.tokens, strict=True))
        share.timings.append(timing(groups, made))
        share.kv += [] if made.kv is None else [made.kv]
        done += sum(requests.most)
        pace.up_to(done)
        flush()
    return share


def of_replica(prompts: int, replica: int, replicas: int) -> range:
    """The numbers of a replica's prompts among so many."""
    return range(replica, prompts, replicas)


def check_columns(built: PreTrainedModel, prompts: Sequence[Prompt], batch: int, replicas: int = 1) -> None:
    """Refuse a batch with more columns, padding among them, than `built` has places for in its attention's own table.

    Where the longest prompt has not the most after it, no request alone has so many. Every rank refuses the same.
    """
    tables = [
        each.shape[-1] for each in built.buffers() if each.dim() == 4 and each.shape[-2] == each.shape[-1]
    ]
    if built.config.model_type == "mpt":
        tables.append(built.config.max_seq_len)  # biases by distance, made at every forward
    numbers = [of_replica(len(prompts), replica, replicas) for replica in range(replicas)]
    together = [each for mine in numbers for each in batches(mine, batch)]
    columns = max(_requests(dict(enumerate(prompts)), each).shown for each in together)
    if tables and columns > min(tables):
        told = f"padded, a batch comes to {columns} columns, and the model's attention has {min(tables)}"
        raise Refusal("generation.batch", batch, f"{told}; use 1, or prompts of more like lengths together")


def _requests(prompts: Mapping[int, Prompt], numbers: Sequence[int]) -> Requests:
    chosen = [prompts[number] for number in numbers]
    return Requests([prompt.tokens for prompt in chosen], [prompt.most for prompt in chosen], numbers)


def timing(groups: Sequence[Requests], made: Generated) -> Timing:
    """What became of the prompts in `groups` in time."""
    given = [len(prompt) for group in groups for prompt in group.prompts]
    padding = sum(len(group.prompts) * group.width for group in groups) - sum(given)
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


def cut(numbers: Sequence[int], groups: int) -> list[Sequence[int]]:
    """`numbers` in so many runs as even as can be, or fewer where they are fewer; none is empty."""
    groups = min(groups, len(numbers))
    ends = [len(numbers) * group // groups for group in range(groups + 1)]
    return [numbers[begin:end] for begin, end in pairwise(ends)]


def batches(numbers: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`numbers` in runs of `size`; the last may be shorter."""
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


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
