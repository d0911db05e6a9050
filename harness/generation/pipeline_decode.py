"""Generate through the stages of a pipeline. Groups of sequences follow each other, so that every stage has work.

A stage computes a token of one group while the next stage computes the group before it. Hidden states go to the next
stage. Tokens that the last stage chose go back to the first stage; where a token may end a sequence they go to all
stages, so that all see the same end. Every stage knows every prompt, so both sides know the shapes and never send them.

B sequences in a group, T columns, H the hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Cache

from harness.config.strategy import Strategy
from harness.generation.batch import Batch, Requests
from harness.generation.choosing import Choose, chooser, greedy, nobody, reporting
from harness.generation.course import WHOLE, Decoding
from harness.generation.decode import Generated, finish, ready
from harness.generation.timestamps import Marks, clock
from harness.ledger import Ledger
from harness.ledger.timer import moment, seconds
from harness.model.kv_cache import KvBytes, of_groups
from harness.model.stage import Stage
from harness.runtime import faults
from harness.runtime.world import World

Sent = tuple[Tensor, Any]
"""A tensor in transit, kept alive until it has arrived, and its handle to wait on."""


class Link:
    """Communication of this stage with the other stages of its replica, and the time it waits for them. Every rank must
    create one.
    """

    def __init__(self, world: World) -> None:
        self.world, self.gpu = world, world.device.type == "cuda"
        # NCCL runs all sends between two ranks in order: without a second group, tokens would wait for hidden states
        self.back = dist.new_group()
        self._waits: list[tuple[Any, Any]] = []

    def send(self, tensor: Tensor, stage: int, back: bool = False) -> Sent:
        """Start to send `tensor` to `stage`; pass the result to `settle` later."""
        work = dist.isend(tensor, self.world.at_stage(stage), self.back if back else None)
        return tensor, work

    def receive(self, tensor: Tensor, stage: int, back: bool = False) -> Tensor:
        """Fill `tensor` with what `stage` sends, and return it."""
        with self._waiting():
            work: Any = dist.irecv(tensor, self.world.at_stage(stage), self.back if back else None)
            work.wait()
        return tensor

    def settle(self, sent: list[Sent]) -> None:
        """Wait until everything in `sent` has arrived, and free it."""
        while sent:
            with self._waiting():
                sent.pop(0)[1].wait()

    def waited(self) -> float:
        """Seconds waited since the last call. On a GPU this reads CUDA events, so the device must be idle."""
        waits, self._waits = self._waits, []
        return sum(seconds(self.gpu, *wait) for wait in waits)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        start = moment(self.gpu)
        yield
        self._waits.append((start, moment(self.gpu)))


@dataclass(eq=False)
class Group:
    """Sequences that go through the stages together, with their own cache on each stage."""

    number: int
    requests: Requests
    batch: Batch
    cache: Cache | None
    choose: Choose
    marks: Marks
    sent: list[Sent] = field(default_factory=list)
    """Its newest token, in transit."""
    ended: bool = False


class Relay:
    """A stage that generates together with the other stages of its replica."""

    def __init__(self, stage: Stage, world: World, ledger: Ledger) -> None:
        self.stage, self.world, self.ledger = stage, world, ledger
        self.link = Link(world)
        self.width = stage.config.get_text_config(decoder=True).hidden_size
        self._sent: list[Sent] = []  # hidden states in transit

    @torch.no_grad()
    def generate(
        self,
        groups: Sequence[Requests],
        strategy: Strategy,
        *,
        cache: str = "dynamic",
        bits: int = 8,
        step: int = 0,
        course: Decoding = WHOLE,
        report: Callable[[int], object] = nobody,
    ) -> Generated:
        """Generate for each of `groups`, as `decode.generate` does. Every stage must call this with the same arguments.

        The result has the last stage's tokens; where nothing ends a sequence, other stages do not know them. The
        ledger's micro-batches are the groups.
        """
        device, ledger = self.world.device, self.ledger
        start_time, in_flight = clock(device), []
        for number, requests in enumerate(groups):
            with ledger.phase("prefill", step, number):
                faults.at("prefill", step)
                batch, kv_cache = ready(requests, strategy, cache, bits, self.stage.config, device, ledger)
                choose = reporting(self._chooser(strategy, requests, batch), report)
                in_flight.append(Group(number, requests, batch, kv_cache, choose, Marks(device)))
                self._next_token(in_flight[-1], 0, batch.width)
        first_token_time = clock(device)
        turns = course.turns([(group.requests, group.cache) for group in in_flight], strategy, ledger)
        for number, skipped in turns:
            for group in in_flight:
                if number < group.requests.new_columns and not group.ended:
                    with ledger.phase("decode", step, group.number, again=True):
                        faults.at("decode", step)
                        course.skip(group.cache, skipped, ledger)
                        self._decode(group, number)
        tokens, kv = self._finish(in_flight, strategy.ends, step)
        end_time = clock(device)
        by_group = [(group.marks.timestamps(), len(group.requests.prompts)) for group in in_flight]
        by_sequence = (timestamps for timestamps, sequences in by_group for _ in range(sequences))
        return Generated(
            tokens,
            first_token_time - start_time,
            end_time - first_token_time,
            kv,
            self.link.waited(),
            began=start_time,
            timestamps=[timestamps[: len(row)] for timestamps, row in zip(by_sequence, tokens, strict=True)],
            computed=sum(len(timestamps) * sequences for timestamps, sequences in by_group),
        )

    def _chooser(self, strategy: Strategy, requests: Requests, batch: Batch) -> Choose:
        """The token chooser of the last stage; other stages never call theirs."""
        if not self.stage.last:
            return greedy
        return chooser(strategy, requests, batch.tokens, self.stage.config, self.ledger)

    def _decode(self, group: Group, number: int) -> None:
        """Compute new token `number` of `group`. Does nothing if all its sequences have ended."""
        batch, end = group.batch, group.batch.width + number
        if self.world.stage in self._listeners(batch):
            batch.write(self._receive_token(batch), end - 1)
        group.ended = batch.done(end)
        if not group.ended:
            self._next_token(group, 0 if group.cache is None else end - 1, end)

    def _next_token(self, group: Group, begin: int, end: int) -> None:
        """Run the stage on columns `begin` to `end` and send the result on."""
        batch = group.batch
        output = self.stage(
            self._input(batch, begin, end),  # [B, T], or [B, T, H]
            None if batch.mask is None else batch.mask[:, :end],  # [B, end]
            batch.positions[:, begin:end],  # [B, T]
            group.cache,
            keep=1,
        )
        if not self.stage.last:
            self.link.settle(self._sent)  # one in transit at a time: more would pile up before a slower stage
            self._sent.append(self.link.send(output.contiguous(), self.world.stage + 1))
            return
        token = group.choose(output[:, -1].float(), end - batch.width)
        batch.write(token, end)
        group.marks.mark()
        if end + 1 < batch.tokens.shape[1]:  # the last token is never an input
            self.link.settle(group.sent)
            group.sent += [self.link.send(token, stage, back=True) for stage in self._listeners(batch)]

    def _input(self, batch: Batch, begin: int, end: int) -> Tensor:
        """The input of this stage: tokens for the first, else the hidden states that the stage before sent."""
        tokens = batch.tokens[:, begin:end]
        if self.stage.first:
            return tokens
        hidden = torch.empty(*tokens.shape, self.width, dtype=self.stage.model.dtype, device=tokens.device)
        self.ledger.claim("activations", "received hidden states", hidden)
        return self.link.receive(hidden, self.world.stage - 1)

    def _receive_token(self, batch: Batch) -> Tensor:
        """Receive the tokens that the last stage chose, [B]."""
        token = torch.empty_like(batch.tokens[:, 0])
        self.ledger.claim("activations", "received token", token)
        return self.link.receive(token, self.world.stages - 1, back=True)

    def _listeners(self, batch: Batch) -> range:
        """The stages that receive the tokens of the last stage."""
        return range(self.world.stages - 1 if len(batch.eos) else 1)

    def _finish(
        self, groups: Sequence[Group], eos: Sequence[int], step: int
    ) -> tuple[list[list[int]], KvBytes | None]:
        """The tokens and cache sizes of `groups`, once everything in transit has arrived."""
        tokens, sizes = [], []
        for group in groups:
            with self.ledger.phase("decode", step, group.number):
                self.link.settle(self._sent)
                self.link.settle(group.sent)
                new, kv = finish(group.requests, group.batch, group.cache, eos)
            self.ledger.disown(group.cache)
            tokens += new
            sizes += [] if kv is None else [kv]
        return tokens, of_groups(sizes) if sizes else None
