"""The inference run: distribute prompts over ranks, generate in batches, gather the results in order."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
from harness.generation.course import WHOLE, Decoding
from harness.generation.decode import Generated, generate
from harness.generation.generation_config import as_record, strategy_of
from harness.generation.metrics import (
    Finished,
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
from harness.generation.paged_cache import limits_of
from harness.generation.pipeline_decode import Relay
from harness.ledger import Ledger, Work
from harness.ledger.traffic import READ
from harness.model import adapter, loader, stage
from harness.model.kv_cache import attention_flops_per_position, check_bits, kv_bytes_per_token
from harness.model.payload import payload
from harness.model.plan import Plan
from harness.model.stage import Stage
from harness.model.tokenizer import tokenizer_of
from harness.quantization import method
from harness.quantization.method import Quantization
from harness.record.figures import of_stretch
from harness.record.record_file import Output
from harness.record.results import Inference, Model, Performance
from harness.runtime.files import put
from harness.runtime.progress import Pace, peak_of
from harness.runtime.world import World

FILE = "generations.jsonl"
SHOWN = 2
"""How many of the texts are printed at the end."""

Say = Callable[[str], None]
T = TypeVar("T")


def prove(plan: Plan, device: str) -> None:
    """Refuse what small models show to be wrong of `plan`, on any device. It comes before a ledger counts: it makes
    tensors that are no part of a run.
    """
    adapter.prove(plan)


def run(plan: Plan, world: World, ledger: Ledger, out: Output, course: Decoding = WHOLE) -> None:
    """Generate for every prompt and write `generations.jsonl` in the run's directory. Raises Refusal."""
    start = time.perf_counter()
    settings, config = plan.settings, plan.config
    tokenizer = tokenizer_of(settings.model, config, settings.data.tokenizer)
    strategy = strategy_of(settings, config)
    prompts = find(settings, tokenizer, strategy.max_new_tokens_after, read=course.values)
    check(prompts, config)
    generation = settings.generation
    check_device(generation, world.kind)
    if generation.cache == "quantized" and course.values:
        with ledger.opaque("check", Work()):  # not part of the run's work
            check_bits(generation.cache_bits, world.device)
    dtype = getattr(torch, settings.dtype)
    quantization = method.take(config, settings, world.kind)
    if quantization is not None:
        dtype = quantization.dtype(dtype, world.kind)
    if generation.batching == "continuous":
        limits_of(generation, config, dtype, prompts)  # raises Refusal before the model is built
    with ledger.phase("setup"):
        model, out.results.model = _model_of_rank(
            plan, config, dtype, world, ledger, quantization, course.values
        )
    if generation.batching == "static":
        check_columns(
            model.model if isinstance(model, Stage) else model, prompts, generation.batch, world.dp_size
        )
    if world.stages * world.tp_size > 1:
        ways = [f"{world.stages} stages"] * (world.stages > 1)
        ways += [f"layers shared by {world.tp_size}"] * (world.tp_size > 1)
        layout = f"{out.results.model.parameters:,} parameters in {', '.join(ways)}, {world.size} ranks"
        out.say(f"{settings.model.name}: {layout}")
    if description := strategy.description():
        out.say(f"{settings.model.name}: {description}")
    startup = time.perf_counter() - start
    out.trackers.start()
    ledger.recent.take()  # the set-up
    report = Reports(out, ledger).finished
    share = share_of(settings, world, ledger, model, prompts, strategy, report, out.say, course)
    ledger.enough()  # on every rank, whatever its number of batches: an exact ledger would also record what follows
    by_rank = world.gather(share)
    shares = of_replicas(by_rank, world.layout)
    out.results.inference = inference = Inference(
        prompts=len(prompts),
        prompt_tokens=sum(len(prompt.tokens) for prompt in prompts),
        max_new_tokens=max(prompt.max_new_tokens for prompt in prompts),
        cache=settings.generation.cache,
        tensor_parallel=world.tp_size,
        kv_bytes_per_token=kv_bytes_per_token(config, dtype),
        attention_flops_per_position=attention_flops_per_position(config),
        generation_config=as_record(strategy),
    ).plus(**largest(shares), **pages(shares))
    if not course.values:
        return
    tokens = dict(sorted(pair for share in shares for pair in share.tokens.items()))
    texts = [text_of(tokenizer, new) for new in tokens.values()]
    if world.leads:
        write(out.directory / FILE, prompts, list(tokens.values()), texts)
    exact = settings.ledger.steps if settings.ledger.mode == "exact" else 0
    out.results.inference = inference.plus(new_tokens=sum(map(len, tokens.values())), **unasked(shares))
    measured = performance(shares, exact).plus(startup_seconds=startup, **scheduled(shares))
    if world.stages > 1:
        measured = measured.plus(stages=idleness(by_rank, world.layout, exact))
    out.results.performance = measured
    _tell(out.say, prompts, texts, out.results.inference, measured)


def _model_of_rank(
    plan: Plan,
    config: PretrainedConfig,
    dtype: torch.dtype,
    world: World,
    ledger: Ledger,
    quantization: Quantization | None,
    read: bool,
) -> tuple[PreTrainedModel | Stage, Model]:
    """The model, or this rank's stage of it, and the record of the whole model. `read`: read its weights, if it has any
    stored.
    """
    settings = plan.settings
    spec, options = (settings.model, config, dtype, world.device, settings.seed), (read, world.mesh)
    if world.stages == 1:
        model = loader.build(*spec, *options, quantization)
        ledger.traffic.report(READ, payload(settings.model, dict(model.named_parameters()), read))
        if adapter.wanted(settings):
            whole = adapter.outline(settings, config, dtype)
            ledger.traffic.report(READ, adapter.apply(settings, model, whole, read))
        ledger.own(model=model.eval().requires_grad_(False))
        if quantization is not None and read:
            quantization = quantization.as_read(model)
        return model, loader.sizes(settings.model, model, dtype, quantization)
    part = stage.build(*spec, plan.layers[world.stage], *options, quantization)
    ledger.traffic.report(READ, payload(settings.model, part.owned(), read))
    whole = adapter.outline(settings, config, dtype)
    ledger.traffic.report(READ, adapter.apply(settings, part, whole, read))
    part.eval().requires_grad_(False)
    ledger.own(model=part.model)
    return part, loader.sizes(settings.model, whole, dtype, quantization)


def share_of(
    settings: Settings,
    world: World,
    ledger: Ledger,
    model: PreTrainedModel | Stage,
    prompts: Sequence[Prompt],
    strategy: Strategy,
    report: Callable[[Finished], None],
    say: Say = lambda line: None,
    course: Decoding = WHOLE,
) -> Share:
    """Generate for this replica's prompts: every `world.dp_size`-th one. `report` receives those that have ended."""
    generation = settings.generation
    own_prompts = {
        number: prompts[number] for number in of_replica(len(prompts), world.dp_rank, world.dp_size)
    }
    quiet, peak = not (course.values and world.leads), partial(peak_of, ledger)
    if generation.batching == "continuous" and isinstance(model, PreTrainedModel):
        with Pace(len(own_prompts), "prompt", say, quiet, more=peak) as pace:

            def finished(requests: Finished) -> None:
                pace.advance(requests.prompts)
                report(requests)

            return continuous_batching.share_of(
                generation, model, own_prompts, strategy, ledger, course, finished
            )
    tokens = sum(prompt.max_new_tokens for prompt in own_prompts.values())
    with Pace(tokens, "token", say, quiet, more=peak) as pace:
        return _in_batches(settings, world, ledger, model, own_prompts, strategy, pace, report, course)


def _in_batches(
    settings: Settings,
    world: World,
    ledger: Ledger,
    model: PreTrainedModel | Stage,
    prompts: Mapping[int, Prompt],
    strategy: Strategy,
    pace: Pace,
    report: Callable[[Finished], None],
    course: Decoding,
) -> Share:
    """Generate for these prompts in batches; all requests of a batch begin and end together."""
    generation, share, done = settings.generation, Share(), 0
    relay = Relay(model, world, ledger) if isinstance(model, Stage) else None
    request_batches = [_requests(prompts, numbers) for numbers in batches(list(prompts), generation.batch)]
    cache: str | Compiled = generation.cache
    if generation.compile and isinstance(model, PreTrainedModel) and request_batches:
        longest = max(requests.shown for requests in request_batches)
        cache = Compiled(model, longest, ledger, course.program)
    for step in course.steps(range(len(request_batches)), settings.ledger.steps):
        requests = request_batches[step]
        groups = [requests]
        options: Any = {"cache": cache, "bits": generation.cache_bits, "step": step, "report": pace.advance}
        options["course"] = course
        if relay is not None:
            parts = cut(requests.numbers, settings.pipeline.groups or world.stages)
            groups = [_requests(prompts, numbers) for numbers in parts]
            output = relay.generate(groups, strategy, **options)
        else:
            output = generate(model, requests, strategy, ledger=ledger, **options)
        share.tokens.update(zip(requests.numbers, output.tokens, strict=True))
        times = timing(groups, output)
        share.timings.append(times)
        share.kv += [] if output.kv is None else [output.kv]
        done += sum(requests.max_new_tokens)
        pace.up_to(done)
        report(Finished(times.sequences, times.new_tokens, times.seconds, output.kv))
    return share


class Reports:
    """What this rank has generated so far, for the record on disk and for trackers."""

    def __init__(self, out: Output, ledger: Ledger) -> None:
        self.out, self.ledger = out, ledger
        self.batches = self.prompts = self.tokens = 0

    def finished(self, requests: Finished) -> None:
        """These `requests` have ended."""
        self.out.flush()
        if not requests.prompts:
            return
        self.batches, self.prompts = self.batches + 1, self.prompts + requests.prompts
        self.tokens += requests.new_tokens
        if self.out.trackers:
            generated = {
                "generate/prompts": self.prompts,
                "generate/tokens": self.tokens,
                "generate/tokens_per_second": requests.new_tokens / requests.seconds
                if requests.seconds
                else None,
                "generate/kv_reserved": None if requests.kv is None else requests.kv.reserved,
                "generate/kv_filled": None if requests.kv is None else requests.kv.filled,
            }
            self.out.trackers.log(self.batches, {**generated, **of_stretch(self.ledger.recent.take())})


def of_replica(prompts: int, dp_rank: int, dp_size: int) -> range:
    """The numbers of one replica's prompts, out of so many `prompts`."""
    return range(dp_rank, prompts, dp_size)


def check_columns(model: PreTrainedModel, prompts: Sequence[Prompt], batch: int, dp_size: int = 1) -> None:
    """Refuse a batch whose columns, with padding, exceed the positions of the model's own attention table.

    A single request may fit where the padded batch does not. Every rank refuses the same.
    """
    tables = [
        buffer.shape[-1]
        for buffer in model.buffers()
        if buffer.dim() == 4 and buffer.shape[-2] == buffer.shape[-1]
    ]
    if model.config.model_type == "mpt":
        tables.append(model.config.max_seq_len)  # biases by distance, built in every forward
    numbers = [of_replica(len(prompts), dp_rank, dp_size) for dp_rank in range(dp_size)]
    every_batch = [
        row_numbers for replica_numbers in numbers for row_numbers in batches(replica_numbers, batch)
    ]
    by_number = dict(enumerate(prompts))
    columns = max(_requests(by_number, row_numbers).shown for row_numbers in every_batch)
    if tables and columns > min(tables):
        problem = f"with padding a batch has {columns} columns, and the model's attention has {min(tables)}"
        raise Refusal(
            "generation.batch", batch, f"{problem}; use 1, or prompts of more like lengths together"
        )


def _requests(prompts: Mapping[int, Prompt], numbers: Sequence[int]) -> Requests:
    chosen = [prompts[number] for number in numbers]
    return Requests(
        [prompt.tokens for prompt in chosen], [prompt.max_new_tokens for prompt in chosen], numbers
    )


def timing(groups: Sequence[Requests], output: Generated) -> Timing:
    """The figures of the batch that these `groups` formed."""
    prompt_lengths = [len(prompt) for group in groups for prompt in group.prompts]
    padding = sum(len(group.prompts) * group.width for group in groups) - sum(prompt_lengths)
    return Timing(
        len(prompt_lengths),
        sum(prompt_lengths),
        sum(map(len, output.tokens)),
        output.prefill_seconds,
        output.decode_seconds,
        output.waited_seconds,
        output.compile_seconds,
        output.began,
        output.timestamps,
        output.computed,
        padding,
    )


def cut(numbers: Sequence[int], groups: int) -> list[Sequence[int]]:
    """Split `numbers` into so many groups of nearly equal size, or into fewer where there are fewer; none is empty."""
    groups = min(groups, len(numbers))
    ends = [len(numbers) * group // groups for group in range(groups + 1)]
    return [numbers[begin:end] for begin, end in pairwise(ends)]


def batches(numbers: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Split `numbers` into batches of `size`; the last may be smaller."""
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


def write(
    file: Path, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], texts: Sequence[str]
) -> None:
    """Write a JSON line for each prompt, in order. The file appears complete or not at all. Raises NotWritten."""
    lines = [
        json.dumps(
            {
                "prompt": prompt.text,
                "prompt_tokens": list(prompt.tokens),
                "tokens": list(new),
                "text": text,
            }
        )
        for prompt, new, text in zip(prompts, tokens, texts, strict=True)
    ]
    put(file, "".join(f"{line}\n" for line in lines))


def _tell(
    say: Say,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    inference: Inference,
    measured: Performance,
) -> None:
    first, bytes_per_token = measured.time_to_first_token_seconds, inference.kv_bytes_per_token
    figures = [
        f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}",
        f"{inference.new_tokens:,} new tokens",
        f"{measured.tokens_per_second or 0:,.0f} tokens/s",
        *([] if first is None else [f"first token after {first * 1000:.1f} ms"]),
        *(
            []
            if bytes_per_token is None
            else [f"KV {bytes_per_token / 1024:g} KiB a token ({inference.cache} cache)"]
        ),
    ]
    say(", ".join(figures))
    if measured.stages:
        say(", ".join(f"stage {each.stage} idle {each.idle:.0%}" for each in measured.stages))
    for prompt, text in list(zip(prompts, texts, strict=True))[:SHOWN]:
        say(f"  prompt  {shown(prompt.text)}")
        say(f"  text    {shown(text)}")


def shown(text: str, width: int = 100) -> str:
    """`text` on one line in quotes, with control characters escaped, cut after `width` characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"'{line}'" if len(line) <= width else f"'{line[:width]}'..."
