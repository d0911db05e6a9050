"""Continuous batching: when a request ends, the next one takes its slot and its pages. No request waits for another to
end.

The scheduler, the paged cache and the forward are transformers' own (`generation.continuous_batching`). They run here,
in this thread: transformers' manager would run them in a thread that no ledger sees. Tokens of all requests form one
row; each forward chooses the next token of every request whose prompt is complete, independent of other requests.

This module sets the sizes that transformers would choose by itself: pages, tokens in a forward, max_num_seqs. It turns
off everything that makes bytes vary between runs or doubles them: pages shared by prompts with the same prefix, CUDA
graphs, and asynchronous batching.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from harness.config.settings import Generation
from harness.config.strategy import LIKELIEST, Strategy
from harness.data.prompts import Prompt
from harness.generation.batch import Requests
from harness.generation.course import WHOLE, Decoding
from harness.generation.metrics import Finished, Share, Timing
from harness.generation.paged_cache import Limits, Paged, Usage, limits_of
from harness.generation.paged_choosing import Choosers
from harness.generation.timestamps import clock
from harness.ledger import Ledger
from harness.ledger.tensors import tensors_in
from harness.model.kv_cache import KvBytes

PLENTY = 2.0**40
"""A max_memory_percent so large that transformers never rejects the given sizes for lack of free memory."""


@dataclass
class Load:
    """The work done while max_num_seqs requests ended."""

    began: float
    first: list[int] = field(default_factory=list)
    """The requests that got their first token."""
    prompt_tokens: int = 0
    """Prompt tokens that the model computed; those of an evicted request count again."""
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    """With `decode_seconds` the time of all forwards, divided in proportion to their tokens."""
    decode_seconds: float = 0.0

    def timing(self, output: "Continued") -> Timing:
        """This load as a batch of the requests that got their first token in it, wherever they end."""
        return Timing(
            len(self.first),
            self.prompt_tokens,
            self.new_tokens,
            self.prefill_seconds,
            self.decode_seconds,
            began=self.began,
            timestamps=[output.timestamps[number] for number in self.first],
            computed=self.new_tokens,
            first_seconds=[output.timestamps[number][0] - output.entered[number] for number in self.first],
        )


@dataclass
class Continued:
    """Results of all prompts, in order. Timestamps are from `time.perf_counter`, taken when the device was done."""

    tokens: list[list[int]]
    timestamps: list[list[float]]
    """A timestamp for each of the `tokens`."""
    entered: list[float]
    """When the first forward with a token of the prompt began."""
    loads: list[Load] = field(default_factory=list)
    kv: KvBytes | None = None
    """At the time when most pages were in use."""
    paged: Paged | None = None


def share_of(
    generation: Generation,
    model: PreTrainedModel,
    prompts: Mapping[int, Prompt],
    strategy: Strategy,
    ledger: Ledger,
    course: Decoding,
    report: Callable[[Finished], None],
) -> Share:
    """Generate for a rank's `prompts` (by number in the run); other arguments as for `generate`. Raises Refusal."""
    if not prompts:
        return Share()
    entries = list(prompts.values())
    limits = limits_of(generation, model.config, model.dtype, entries)
    requests = Requests(
        [prompt.tokens for prompt in entries], [prompt.max_new_tokens for prompt in entries], [*prompts]
    )
    output = generate(model, requests, strategy, limits=limits, ledger=ledger, course=course, report=report)
    tokens = dict(zip(prompts, output.tokens, strict=True))
    kv_sizes = [] if output.kv is None else [output.kv]
    paged = [] if output.paged is None else [output.paged]
    return Share(tokens, [load.timing(output) for load in output.loads], kv_sizes, paged)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    requests: Requests,
    strategy: Strategy = LIKELIEST,
    *,
    limits: Limits,
    ledger: Ledger,
    course: Decoding = WHOLE,
    report: Callable[[Finished], None] = lambda finished: None,
) -> Continued:
    """Continue each of `requests` within `limits`, with tokens chosen by `strategy`.

    `model` is in eval mode. Each request gets the tokens that it would get alone. `ledger` has a step for each load:
    max_num_seqs ended requests. The phases are `data` (the inputs of the next forward), `prefill` (a forward with any
    prompt token) and `decode` (all other forwards). After each load, `report` receives the requests that ended
    in it. `course` decides which forwards are run.
    """
    prompts, eos = requests.prompts, [*course.ends(strategy)]
    output = Continued([[] for _ in prompts], [[] for _ in prompts], [0.0 for _ in prompts])
    with _processor(model, limits, ledger) as (manager, processor):
        for number, (prompt, max_new_tokens) in enumerate(zip(prompts, requests.max_new_tokens, strict=True)):
            manager.add_request(list(prompt), str(number), max_new_tokens, eos_token_id=eos)
        choosers = Choosers(strategy, requests, model, processor, ledger)
        run = Run(model, processor, choosers, ledger, output, limits, course, report)
        while run.forward():
            pass
        run.end()
        while (result := manager.get_result()) is not None:
            output.tokens[int(result.request_id)] = result.generated_tokens
    return output


class Run:
    """The loop until no request is left: prepare a batch, run a forward, store its tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        choosers: Choosers,
        ledger: Ledger,
        output: Continued,
        limits: Limits,
        course: Decoding,
        report: Callable[[Finished], None],
    ) -> None:
        self.model, self.processor, self.ledger, self.output = model, processor, ledger, output
        self.max_num_seqs, self.report = limits.max_num_seqs, report
        self.choosers, self.usage = choosers, Usage(processor.cache)
        self.ended = self.reported = self.forwards = self.tokens = self.evicted = 0
        self.phases: set[str] = set()
        self.runner = course.forwards(ledger, choosers, self.usage)
        self.now = clock(model.device)
        output.loads.append(Load(self.now))

    def forward(self) -> bool:
        """Run one forward and handle its results; False where no work is left."""
        processor, scheduler, step = self.processor, self.processor.scheduler, self.ended // self.max_num_seqs
        if step == len(self.output.loads):
            self._close()
            # an exact ledger may end here, which takes time that the load does not include
            self.ledger.begins(step)
            self.now = clock(self.model.device)
            self.output.loads.append(Load(self.now))
        load, active = self.output.loads[-1], set(scheduler.active_requests)
        with self.ledger.phase("data", step, again=True):
            if not processor.prepare_next_batch():
                return False
        self.evicted += len(active - set(scheduler.active_requests))
        self.usage.look(state.position_offset for state in scheduler.active_requests.values())
        batch = processor.inputs_and_outputs.requests_in_batch
        input_tokens = sum(each.query_length for each in batch)
        prompt_tokens = sum(map(_prompt_tokens, batch))
        phase = "prefill" if prompt_tokens else "decode"
        self.phases |= {"data", phase}
        with self.ledger.phase(phase, step, again=True):
            self.runner.run(lambda: processor._generation_step(self.model), batch, prompt_tokens)
            start, self.now = self.now, clock(self.model.device)
            processor.update_batch()
        self._record_times(batch, load, start)
        ended_states = [
            each.state for each in batch if each.state.request_id not in scheduler.active_requests
        ]
        for state in ended_states:
            self.choosers.leave(state)
        self.ended += len(ended_states)
        self.forwards, self.tokens = self.forwards + 1, self.tokens + input_tokens
        load.prompt_tokens += prompt_tokens
        load.prefill_seconds += (self.now - start) * prompt_tokens / input_tokens
        load.decode_seconds += (self.now - start) * (input_tokens - prompt_tokens) / input_tokens
        return True

    def _record_times(self, batch: Sequence[Any], load: Load, start: float) -> None:
        """Record when a request entered, and the timestamp of each new token."""
        for each in batch:
            number = int(each.state.request_id)
            self.output.entered[number] = self.output.entered[number] or start
            if each.has_new_token:
                timestamps = self.output.timestamps[number]
                load.first += [] if timestamps else [number]
                load.new_tokens += 1
                timestamps.append(self.now)

    def end(self) -> None:
        """Store the final figures."""
        self._close()
        self.output.kv = self.usage.peak
        counts = self.forwards, self.tokens, self.evicted
        self.output.paged = Paged(*counts, self.processor.cache.num_blocks, self.usage.used)

    def _close(self) -> None:
        """End a load: open each of its phases once more, so that the ledger measures what every owner
        has at its end.
        """
        for phase in sorted(self.phases):
            with self.ledger.phase(phase, len(self.output.loads) - 1):
                pass
        self.phases = set()
        load, ended = self.output.loads[-1], self.ended - self.reported
        seconds = load.prefill_seconds + load.decode_seconds
        self.report(Finished(ended, load.new_tokens, seconds, self.usage.peak))
        self.reported = self.ended


def _prompt_tokens(future: Any) -> int:
    """Prompt tokens in the next forward. For an evicted request that restarts, its earlier new tokens count too."""
    state, input_tokens = future.state, future.query_length
    position: int = state.position_offset - input_tokens
    return max(0, min(len(state.initial_tokens) - position, int(input_tokens)))


@contextmanager
def _processor(model: PreTrainedModel, limits: Limits, ledger: Ledger) -> Iterator[tuple[Any, Any]]:
    """transformers' manager, not started, and its batch processor, with `limits`. Restores
    `model` on exit.
    """
    from transformers.generation.continuous_batching.utils import stream_context

    attention = model.config._attn_implementation
    with ledger.phase("setup"):
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1), _config(limits)
        )
        processor = manager._create_batch_processor()
        ledger.own(cache=processor.cache)
        buffers = processor.inputs_and_outputs
        for name, tensor in ((n, t) for n, value in vars(buffers).items() for t in tensors_in((value,))):
            ledger.claim("inputs", name, tensor)
    cache = processor.cache
    try:
        with stream_context(buffers.compute_stream):  # write inputs on the stream that reads them
            yield manager, processor
    finally:
        ledger.disown(cache)
        manager.batch_processor = None
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _config(limits: Limits) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        page_size=limits.block_size,
        num_blocks=limits.num_blocks,
        max_batch_tokens=limits.max_num_batched_tokens,
        max_requests_per_batch=min(limits.max_num_seqs, limits.max_num_batched_tokens),
        max_blocks_per_request=0,
        max_memory_percent=PLENTY,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        safety_margin=0.0,
        seed=0,
        auto_switch_to_flash=False,
        disable_nccl_graph_mixing=False,  # True would set an environment variable for the whole process
    )
