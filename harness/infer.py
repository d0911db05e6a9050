"""The inference run: prompts, shared out over ranks, continued in batches, gathered in their order."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from harness import model, stage, weights
from harness.cache import KvBytes, kv_bytes_per_token, of_stages
from harness.decode import Choose, Generated, draws, generate, greedy, sampler
from harness.ledger import Ledger
from harness.prompts import Prompt, check, find, text_of
from harness.record import Output
from harness.relay import Relay
from harness.settings import Settings
from harness.split import ranges, split_of
from harness.stage import Stage
from harness.world import World

FILE = "generations.jsonl"
SHOWN = 2
"""How many of the texts a person sees at the end."""

Say = Callable[[str], None]
T = TypeVar("T")


class Timing(NamedTuple):
    """One batch: its sequences, their real tokens, and seconds; `waited_seconds` of them for other stages."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    waited_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """From its first prompt to its last token."""
        return self.prefill_seconds + self.decode_seconds


@dataclass
class Share:
    """What one rank did: new tokens by the prompt's number, and figures by batch."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    kv: list[KvBytes] = field(default_factory=list)

    def add(self, prompts: Sequence[Prompt], numbers: Sequence[int], made: Generated) -> None:
        """Take in the batch of the prompts with these `numbers`."""
        self.tokens.update(zip(numbers, made.tokens, strict=True))
        given, new = sum(len(prompts[number].tokens) for number in numbers), sum(map(len, made.tokens))
        seconds = made.prefill_seconds, made.decode_seconds, made.waited_seconds
        self.timings.append(Timing(len(numbers), given, new, *seconds))
        if made.kv is not None:
            self.kv.append(made.kv)


def run(settings: Settings, world: World, ledger: Ledger, out: Output) -> None:
    """Continue every prompt into `generations.jsonl` in the run's directory. Raises Refusal."""
    began = time.perf_counter()
    config = model.model_config(settings.model)
    tokenizer = model.tokenizer(settings.model, settings.data.tokenizer)
    prompts = find(settings, tokenizer, world.rehearsed)
    check(prompts, config, settings.generation.max_new_tokens)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    with ledger.phase("setup"):
        built, parameters = _built(settings, config, dtype, world, ledger)
    out.done["model"] = {
        "name": settings.model.name,
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if world.stages * world.tensor > 1:
        ways = (
            f"{world.stages} stage{'s' * (world.stages > 1)}, {world.tensor} to a layer, {world.size} ranks"
        )
        out.say(f"{settings.model.name}: {parameters:,} parameters in {ways}")
    startup = time.perf_counter() - began
    by_rank = world.gather(share_of(settings, world, ledger, built, prompts, out.flush))
    shares = of_replicas(by_rank, world.replicas, world.tensor)
    out.done["inference"] = {
        "prompts": len(prompts),
        "prompt_tokens": sum(len(prompt.tokens) for prompt in prompts),
        "cache": settings.generation.cache,
        "tensor_parallel": world.tensor,
        "kv_bytes_per_token": kv_bytes_per_token(config, dtype),
        **largest(shares),
    }
    if world.rehearsed:
        return
    tokens = dict(sorted(pair for share in shares for pair in share.tokens.items()))
    texts = [text_of(tokenizer, new) for new in tokens.values()]
    if world.leads:
        write(out.directory / FILE, prompts, list(tokens.values()), texts)
    exact = settings.ledger.steps if settings.ledger.mode == "exact" else 0
    out.done["inference"]["new_tokens"] = sum(map(len, tokens.values()))
    out.done["performance"] = {"startup_seconds": startup, **performance(shares, exact)}
    if world.stages > 1:
        out.done["performance"]["stages"] = idleness(by_rank, world.stages, exact)
    _tell(out.say, prompts, texts, out.done)


def _built(
    settings: Settings, config: PretrainedConfig, dtype: torch.dtype, world: World, ledger: Ledger
) -> tuple[PreTrainedModel | Stage, int]:
    """The model, or this rank's stage of it, and the parameters of the whole."""
    asked = settings.model, config, dtype, world.device, settings.seed
    if world.stages == 1:
        built = model.build(*asked, world.rehearsed, world.mesh)
        ledger.own(model=built.eval().requires_grad_(False))
        return built, model.count(built)
    part = stage.build(*asked, ranges(split_of(settings, config))[world.stage], world.rehearsed, world.mesh)
    part.eval().requires_grad_(False)
    ledger.own(model=part.model)
    return part, model.count(weights.outline(config, dtype, settings.model.attention))


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
    eos = end_tokens(built if relay is None else relay.stage.model) if asked.stop_at_eos else ()
    quiet = None if world.leads and not world.rehearsed else True  # None: only on a terminal
    with tqdm(total=len(mine), disable=quiet, unit="prompt", leave=False, desc="generate") as bar:
        for step, numbers in enumerate(batches(mine, asked.batch)):
            groups = cut(numbers, 1 if relay is None else settings.pipeline.groups or world.stages)
            choose = [_chooser(settings, world, ledger, group) for group in groups]
            if world.rehearsed and step == settings.ledger.steps:
                ledger.enough()  # as at the next prefill
                break
            given = [[prompts[number].tokens for number in group] for group in groups]
            how: Any = {"cache": asked.cache, "eos": eos, "step": step, "ends_only": world.rehearsed}
            if isinstance(relay, Relay):
                made = relay.generate(given, asked.max_new_tokens, choose=choose, **how)
            else:
                made = generate(built, given[0], asked.max_new_tokens, choose=choose[0], ledger=ledger, **how)
            share.add(prompts, numbers, made)
            bar.update(len(numbers))
            flush()
    return share


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


def of_replicas(shares: Sequence[Share], replicas: int, tensor: int = 1) -> list[Share]:
    """The ranks' shares as one a replica: the last stage knows tokens and times, and a cache is all ranks' together.

    `tensor` ranks that share a layer choose the same tokens. A rehearsal has one rank's share alone.
    """
    of_layers = list(batches(shares, tensor))
    found = []
    for stages in [of_layers[replica::replicas] for replica in range(replicas)]:
        if stages:
            last, *others = stages[-1]
            assert all(other.tokens == last.tokens for other in others), (
                "ranks that share layers chose otherwise"
            )
            kv = zip(*(share.kv for ranks in stages for share in ranks), strict=True)
            found.append(Share(last.tokens, last.timings, [of_stages(each) for each in kv]))
    return found


def _timed(share: Share, exact: int) -> list[Timing]:
    """Its batches; those that an exact ledger slowed, the first `exact`, only where there are no others."""
    return share.timings[exact:] or share.timings


def performance(shares: Sequence[Share], exact: int) -> dict[str, Any]:
    """Seconds, and tokens a second over all replicas, of which `shares` are.

    An exact ledger slows a rank's first `exact` batches; they count only where it has no others.
    """
    working = [share for share in shares if share.timings]
    timed = [timing for share in working for timing in _timed(share, exact)]

    def rate(tokens: int, seconds: float) -> float | None:
        return len(working) * tokens / seconds if tokens and seconds else None

    prefill, decode = sum(t.prefill_seconds for t in timed), sum(t.decode_seconds for t in timed)
    new = sum(t.new_tokens for t in timed)
    return {
        "tokens_per_second": rate(new, prefill + decode),
        "prefill_tokens_per_second": rate(sum(t.prompt_tokens for t in timed), prefill),
        "decode_tokens_per_second": rate(new - sum(t.sequences for t in timed), decode),
        "time_to_first_token_seconds": statistics.median(t.prefill_seconds for t in timed),
        "generation_seconds": max(sum(t.seconds for t in share.timings) for share in working),
    }


def idleness(shares: Sequence[Share], stages: int, exact: int) -> list[dict[str, Any]]:
    """Of every stage, a replica's seconds at work, and the part of all its seconds that it waited for other stages.

    `shares` are the ranks'. Batches count as in `performance`.
    """
    found = []
    for number, of_stage in enumerate(batches(shares, len(shares) // stages)):
        timed = [_timed(share, exact) for share in of_stage if share.timings]
        seconds = sum(timing.seconds for timings in timed for timing in timings)
        waited = sum(timing.waited_seconds for timings in timed for timing in timings)
        busy = (seconds - waited) / len(timed)
        found.append({"stage": number, "busy_seconds": busy, "idle": waited / seconds})
    return found


def largest(shares: Sequence[Share]) -> dict[str, int | None]:
    """What the largest cache of a replica held when its batch ended, in bytes; None where nothing was cached."""
    held = max((kv for share in shares for kv in share.kv), key=lambda kv: kv.reserved, default=None)
    return {
        "kv_bytes_per_token_measured": None if held is None else held.per_token,
        "kv_reserved": None if held is None else held.reserved,
        "kv_filled": None if held is None else held.filled,
        "kv_live": None if held is None else held.live,
    }


def _tell(say: Say, prompts: Sequence[Prompt], texts: Sequence[str], done: dict[str, Any]) -> None:
    speed, inference = done["performance"], done["inference"]
    figures = [
        f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}",
        f"{inference['new_tokens']:,} new tokens",
        f"{speed['tokens_per_second'] or 0:,.0f} tokens/s",
        f"first token after {speed['time_to_first_token_seconds'] * 1000:.1f} ms",
        f"KV {inference['kv_bytes_per_token'] / 1024:g} KiB a token ({inference['cache']} cache)",
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
