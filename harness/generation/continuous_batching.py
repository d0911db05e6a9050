"""Continuous batching: a request that ends leaves its place and its pages to the next; none waits for another's end.

The scheduler, the paged cache and the forward are transformers' own (`generation.continuous_batching`), driven here, in
this thread: its manager would run them in one of its own, which no ledger sees. Prompts and new tokens of all requests
are one row of tokens; each forward chooses the next token of every request whose prompt is through, as alone.

What it sizes by itself is said here: pages, tokens in a forward, requests at once. Off is what would change bytes from
run to run or hold them twice: pages shared between prompts that begin alike, CUDA graphs, batches prepared ahead.
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
from harness.generation.extrapolation import Alike
from harness.generation.metrics import Share, Timing
from harness.generation.paged_cache import Held, Paged, Room, room
from harness.generation.paged_choosing import Choosers
from harness.generation.timestamps import clock
from harness.ledger import Ledger
from harness.ledger.tensors import tensors_in
from harness.model.kv_cache import KvBytes

PLENTY = 2.0**40
"""Of the memory that transformers finds free: it would hold sizes that are given against that of this machine."""


@dataclass
class Load:
    """What was done while as many requests as there are places came to their end."""

    began: float
    first: list[int] = field(default_factory=list)
    """The requests whose first token came."""
    prompt_tokens: int = 0
    """Shown to the model, again where a request had to give up its pages."""
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    """With `decode_seconds` those of every forward, shared out by its tokens."""
    decode_seconds: float = 0.0

    def timing(self, made: "Continued") -> Timing:
        """It as a batch: of the requests whose first token came in it, wherever they end."""
        return Timing(
            len(self.first),
            self.prompt_tokens,
            self.new_tokens,
            self.prefill_seconds,
            self.decode_seconds,
            began=self.began,
            moments=[made.moments[number] for number in self.first],
            computed=self.new_tokens,
            first_seconds=[made.moments[number][0] - made.entered[number] for number in self.first],
        )


@dataclass
class Continued:
    """What came of all prompts, in their order. Moments are `time.perf_counter`'s, when the device was done."""

    tokens: list[list[int]]
    moments: list[list[float]]
    """Of each of the `tokens`."""
    entered: list[float]
    """When the first forward began that was shown any of the prompt."""
    loads: list[Load] = field(default_factory=list)
    kv: KvBytes | None = None
    """At the moment of most pages in use."""
    paged: Paged | None = None


def share_of(
    asked: Generation,
    model: PreTrainedModel,
    prompts: Mapping[int, Prompt],
    strategy: Strategy,
    ledger: Ledger,
    rehearsed: bool,
    tell: Callable[[int], None],
) -> Share:
    """What a rank makes of its `prompts`, by their numbers in the run; the rest as for `generate`. Raises Refusal."""
    if not prompts:
        return Share()
    mine = list(prompts.values())
    within = room(asked, model.config, model.dtype, mine)
    requests = Requests([prompt.tokens for prompt in mine], [prompt.most for prompt in mine], [*prompts])
    made = generate(model, requests, strategy, room=within, ledger=ledger, rehearsed=rehearsed, tell=tell)
    tokens = dict(zip(prompts, made.tokens, strict=True))
    kept = [] if made.kv is None else [made.kv]
    paged = [] if made.paged is None else [made.paged]
    return Share(tokens, [load.timing(made) for load in made.loads], kept, paged)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    requests: Requests,
    strategy: Strategy = LIKELIEST,
    *,
    room: Room,
    ledger: Ledger,
    rehearsed: bool = False,
    tell: Callable[[int], None] = lambda ended: None,
) -> Continued:
    """Continue each of `requests`, in `room`, its tokens chosen by `strategy`.

    `model` is in eval mode. The tokens are those that each request gets alone. `ledger` has a step for each load: as
    many requests ended as there are places. Its phases are `data` (what the next forward is given), `prefill` (a
    forward with any token of a prompt) and `decode` (all others). `tell` is told after a load how many ended in it.

    Where it is `rehearsed` nothing ends early, and of forwards that differ in nothing but that each request is a token
    longer only the first and the last are made; when the ledger has seen enough, none.
    """
    prompts, eos = requests.prompts, [] if rehearsed else strategy.ends
    made = Continued([[] for _ in prompts], [[] for _ in prompts], [0.0 for _ in prompts])
    with _processor(model, room, ledger) as (manager, processor):
        for number, (prompt, new) in enumerate(zip(prompts, requests.most, strict=True)):
            manager.add_request(list(prompt), str(number), new, eos_token_id=eos)
        choosers = Choosers(strategy, requests, model, processor, ledger)
        run = Run(model, processor, choosers, ledger, made, room, rehearsed, tell)
        while run.forward():
            pass
        run.end()
        while (result := manager.get_result()) is not None:
            made.tokens[int(result.request_id)] = result.generated_tokens
    return made


class Run:
    """The loop: `prepare`, then a forward, then the tokens that it chose, until no request is left."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        choosers: Choosers,
        ledger: Ledger,
        made: Continued,
        room: Room,
        rehearsed: bool,
        tell: Callable[[int], None],
    ) -> None:
        self.model, self.processor, self.ledger, self.made = model, processor, ledger, made
        self.rehearsed, self.places, self.tell = rehearsed, room.requests, tell
        self.choosers, self.held = choosers, Held(processor.cache)
        self.ended = self.told = self.forwards = self.tokens = self.evicted = 0
        self.phases: set[str] = set()
        self.before: list[str] = []  # the requests of the decode before
        self.repeats = 0  # forwards since the first of those that differ only in that requests are longer
        self.alike = Alike(ledger)
        self.now = clock(model.device)
        made.loads.append(Load(self.now))

    def forward(self) -> bool:
        """One forward, and what follows from it; False where there was nothing left to do."""
        processor, scheduler, step = self.processor, self.processor.scheduler, self.ended // self.places
        if step == len(self.made.loads):
            self._close()
            self.ledger.begins(step)  # here an exact ledger may end, which takes time of its own
            self.now = clock(self.model.device)
            self.made.loads.append(Load(self.now))
        load, active = self.made.loads[-1], set(scheduler.active_requests)
        with self.ledger.phase("data", step, again=True):
            if not processor.prepare_next_batch():
                return False
        self.evicted += len(active - set(scheduler.active_requests))
        self.held.look(state.position_offset for state in scheduler.active_requests.values())
        batch = processor.inputs_and_outputs.requests_in_batch
        shown = sum(each.query_length for each in batch)
        given = sum(map(_of_prompt, batch))
        phase = "prefill" if given else "decode"
        self.phases |= {"data", phase}
        with self.ledger.phase(phase, step, again=True):
            if not self.rehearsed:
                processor._generation_step(self.model)
            elif self._decides(batch, given):
                self.alike.make(lambda: processor._generation_step(self.model), self.repeats)
            else:
                self.alike.leave_out()
            began, self.now = self.now, clock(self.model.device)
            processor.update_batch()
        self._came(batch, load, began)
        gone = [each.state for each in batch if each.state.request_id not in scheduler.active_requests]
        for state in gone:
            self.choosers.leave(state)
        self.ended += len(gone)
        self.forwards, self.tokens = self.forwards + 1, self.tokens + shown
        load.prompt_tokens += given
        load.prefill_seconds += (self.now - began) * given / shown
        load.decode_seconds += (self.now - began) * (shown - given) / shown
        return True

    def _came(self, batch: Sequence[Any], load: Load, began: float) -> None:
        """Note when which request entered, and the moment of each new token."""
        for each in batch:
            number = int(each.state.request_id)
            self.made.entered[number] = self.made.entered[number] or began
            if each.has_new_token:
                moments = self.made.moments[number]
                load.first += [] if moments else [number]
                load.new_tokens += 1
                moments.append(self.now)

    def end(self) -> None:
        """All is done: the figures."""
        self._close()
        self.made.kv = self.held.most
        counted = self.forwards, self.tokens, self.evicted
        self.made.paged = Paged(*counted, self.processor.cache.num_blocks, self.held.used)

    def _close(self) -> None:
        """Let the ledger ask every owner, once a load, what it holds at the end of each of its phases."""
        for phase in sorted(self.phases):
            with self.ledger.phase(phase, len(self.made.loads) - 1):
                pass
        self.phases = set()
        self.tell(self.ended - self.told)
        self.told = self.ended

    def _decides(self, batch: Sequence[Any], given: int) -> bool:
        """Whether a forward can show what no other does: neither the one before nor the next is the same one with
        requests of other lengths, or it is the second of those.
        """
        before, self.before = self.before, [] if given else [each.state.request_id for each in batch]
        turns = [self.choosers.bends(each.state) for each in batch]
        again = not given and self.before == before and not any(first for first, _ in turns)
        self.repeats = self.repeats + 1 if again else 0
        short = self.held.free < len(batch)  # one of them may not be in the next
        last = short or any(last for _, last in turns)
        last = last or any(each.state.generated_len() + 1 == each.state.max_new_tokens for each in batch)
        return self.ledger.exact and (last or self.repeats < 2)


def _of_prompt(future: Any) -> int:
    """Tokens of a prompt that the next forward is shown; of a request that was begun anew, all that it had."""
    state, shown = future.state, future.query_length
    before: int = state.position_offset - shown
    return max(0, min(len(state.initial_tokens) - before, int(shown)))


@contextmanager
def _processor(model: PreTrainedModel, room: Room, ledger: Ledger) -> Iterator[tuple[Any, Any]]:
    """transformers' manager, never started, and its batch processor, in `room`. Afterwards `model` is as before."""
    from transformers.generation.continuous_batching.utils import stream_context

    attention = model.config._attn_implementation
    with ledger.phase("setup"):
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1), _config(room)
        )
        processor = manager._create_batch_processor()
        ledger.own(cache=processor.cache)
        given = processor.inputs_and_outputs
        for name, tensor in ((n, t) for n, value in vars(given).items() for t in tensors_in((value,))):
            ledger.claim("inputs", name, tensor)
    cache = processor.cache
    try:
        with stream_context(given.compute_stream):  # inputs are written on the stream that reads them
            yield manager, processor
    finally:
        ledger.disown(cache)
        manager.batch_processor = None
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _config(room: Room) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        page_size=room.page_size,
        num_blocks=room.pages,
        max_batch_tokens=room.tokens,
        max_requests_per_batch=min(room.requests, room.tokens),
        max_blocks_per_request=0,
        max_memory_percent=PLENTY,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        safety_margin=0.0,
        seed=0,
        auto_switch_to_flash=False,
        disable_nccl_graph_mixing=False,  # it would set a variable for the whole process
    )
