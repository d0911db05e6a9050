"""Generation through the stages of a pipeline: groups of sequences follow each other, so that every stage has one.

A stage computes a token of one group while the stage after it computes the group before. Hidden states go on to the
next stage; tokens that the last one chose go back to the first, and to all where one may end a sequence, so that all
see the same end. Every stage knows every prompt, so shapes are known on both sides and never sent.

B sequences of a group, T columns, H the hidden size.
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
from harness.generation import cache_growth, choosing
from harness.generation.batch import Batch, Requests
from harness.generation.choosing import Choose, chooser, greedy, nobody, telling
from harness.generation.decode import Generated, finish, grow, ready
from harness.generation.extrapolation import Turns
from harness.generation.timestamps import Marks, clock
from harness.ledger import Ledger
from harness.ledger.timer import moment, seconds
from harness.model.kv_cache import KvBytes, of_groups
from harness.model.stage import Stage
from harness.runtime.world import World

Sent = tuple[Tensor, Any]
"""A tensor on its way, which is kept until it has arrived, and what says that it has."""


class Link:
    """This stage's traffic with the others of its replica, and how long it waits for them. Every rank must make one."""

    def __init__(self, world: World) -> None:
        self.world, self.gpu = world, world.device.type == "cuda"
        # NCCL keeps the order of all that two ranks send each other: what goes back would wait for what goes on
        self.back = dist.new_group()
        self._waits: list[tuple[Any, Any]] = []

    def send(self, tensor: Tensor, stage: int, back: bool = False) -> Sent:
        """Begin to send `tensor` to `stage`; `settle` what is returned."""
        work = dist.isend(tensor, self.world.at_stage(stage), self.back if back else None)
        return tensor, work

    def receive(self, tensor: Tensor, stage: int, back: bool = False) -> Tensor:
        """`tensor`, filled with what `stage` sent."""
        with self._waiting():
            work: Any = dist.irecv(tensor, self.world.at_stage(stage), self.back if back else None)
            work.wait()
        return tensor

    def settle(self, sent: list[Sent]) -> None:
        """Wait until all of `sent` has arrived, and let go of it."""
        while sent:
            with self._waiting():
                sent.pop(0)[1].wait()

    def waited(self) -> float:
        """Seconds waited since this was last asked; on a GPU, for which its own clock is read, it must have no work."""
        waits, self._waits = self._waits, []
        return sum(seconds(self.gpu, *wait) for wait in waits)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = moment(self.gpu)
        yield
        self._waits.append((began, moment(self.gpu)))


@dataclass(eq=False)
class Group:
    """Sequences that go through the stages together, with a cache of their own on each."""

    number: int
    requests: Requests
    batch: Batch
    cache: Cache | None
    choose: Choose
    marks: Marks
    sent: list[Sent] = field(default_factory=list)
    """Its newest token."""
    ended: bool = False


class Relay:
    """A stage that generates together with the others of its replica."""

    def __init__(self, stage: Stage, world: World, ledger: Ledger) -> None:
        self.stage, self.world, self.ledger = stage, world, ledger
        self.link = Link(world)
        self.width = stage.config.get_text_config(decoder=True).hidden_size
        self._sent: list[Sent] = []  # hidden states

    @torch.no_grad()
    def generate(
        self,
        groups: Sequence[Requests],
        strategy: Strategy,
        *,
        cache: str = "dynamic",
        bits: int = 8,
        step: int = 0,
        ends_only: bool = False,
        tell: Callable[[int], object] = nobody,
    ) -> Generated:
        """As `decode.generate`, for each of `groups`. Every stage must be asked for the same.

        The tokens are those of the last one; where nothing ends a sequence, others do not know them. The ledger's
        micro-batches are groups.
        """
        device, ledger = self.world.device, self.ledger
        started, relayed = clock(device), []
        for number, requests in enumerate(groups):
            with ledger.phase("prefill", step, number):
                batch, kept = ready(requests, strategy, cache, bits, self.stage.config, device, ledger)
                choose = telling(self._chooser(strategy, requests, batch), tell)
                relayed.append(Group(number, requests, batch, kept, choose, Marks(device)))
                self._next_token(relayed[-1], 0, batch.width)
        first = clock(device)
        for number, skipped in self._turns(relayed, strategy, ends_only):
            for group in relayed:
                if number < group.requests.room and not group.ended:
                    with ledger.phase("decode", step, group.number, again=True):
                        self._decode(group, number, skipped)
        tokens, held = self._finish(relayed, strategy.ends, step)
        last = clock(device)
        at = [(group.marks.moments(), len(group.requests.prompts)) for group in relayed]
        came = (moments for moments, sequences in at for _ in range(sequences))
        return Generated(
            tokens,
            first - started,
            last - first,
            held,
            self.link.waited(),
            began=started,
            moments=[moments[: len(row)] for moments, row in zip(came, tokens, strict=True)],
            computed=sum(len(moments) * sequences for moments, sequences in at),
        )

    def _chooser(self, strategy: Strategy, requests: Requests, batch: Batch) -> Choose:
        """What the last stage chooses by; no other chooses."""
        if not self.stage.last:
            return greedy
        return chooser(strategy, requests, batch.tokens, self.stage.config, self.ledger)

    def _turns(self, groups: Sequence[Group], strategy: Strategy, ends_only: bool) -> Turns:
        """The numbers of the new tokens after the first, all or those at the ends of each stretch."""
        rooms = {group.requests.room for group in groups}
        numbers, bent = range(1, max(rooms)), set[int]()
        if (
            not ends_only
            or len(rooms) > 1
            or not all(cache_growth.can_advance(group.cache) for group in groups)
        ):
            return cache_growth.every(numbers)
        for group in groups:
            bent |= cache_growth.bends(group.cache, group.batch.width, max(rooms))
            bent |= choosing.bends(strategy, group.requests)
        return cache_growth.ends(numbers, bent, self.ledger)

    def _decode(self, group: Group, number: int, skipped: int) -> None:
        """New token `number` of `group`, once `skipped` others are taken for done; none if all its sequences ended."""
        batch, end = group.batch, group.batch.width + number
        if skipped:
            grow(group.cache, self.ledger, skipped)
        if self.world.stage in self._listeners(batch):
            batch.write(self._chosen(batch), end - 1)
        group.ended = batch.done(end)
        if not group.ended:
            self._next_token(group, 0 if group.cache is None else end - 1, end)

    def _next_token(self, group: Group, begin: int, end: int) -> None:
        """Show the stage columns `begin` to `end`, and pass on what it makes of them."""
        batch = group.batch
        made = self.stage(
            self._given(batch, begin, end),  # [B, T], or [B, T, H]
            None if batch.mask is None else batch.mask[:, :end],  # [B, end]
            batch.positions[:, begin:end],  # [B, T]
            group.cache,
            keep=1,
        )
        if not self.stage.last:
            self.link.settle(self._sent)  # one at a time: more would pile up before a slower stage
            self._sent.append(self.link.send(made.contiguous(), self.world.stage + 1))
            return
        token = group.choose(made[:, -1].float(), end - batch.width)
        batch.write(token, end)
        group.marks.mark()
        if end + 1 < batch.tokens.shape[1]:  # the last one is never shown to the model
            self.link.settle(group.sent)
            group.sent += [self.link.send(token, stage, back=True) for stage in self._listeners(batch)]

    def _given(self, batch: Batch, begin: int, end: int) -> Tensor:
        """What the first stage is shown, or what the one before sent."""
        shown = batch.tokens[:, begin:end]
        if self.stage.first:
            return shown
        hidden = torch.empty(*shown.shape, self.width, dtype=self.stage.model.dtype, device=shown.device)
        self.ledger.claim("activations", "received hidden states", hidden)
        return self.link.receive(hidden, self.world.stage - 1)

    def _chosen(self, batch: Batch) -> Tensor:
        """What the last stage chose, [B]."""
        token = torch.empty_like(batch.tokens[:, 0])
        self.ledger.claim("activations", "received token", token)
        return self.link.receive(token, self.world.stages - 1, back=True)

    def _listeners(self, batch: Batch) -> range:
        """The stages that must know which tokens the last one chose."""
        return range(self.world.stages - 1 if len(batch.eos) else 1)

    def _finish(
        self, groups: Sequence[Group], eos: Sequence[int], step: int
    ) -> tuple[list[list[int]], KvBytes | None]:
        """What came of `groups`, once all that was sent has arrived."""
        tokens, held = [], []
        for group in groups:
            with self.ledger.phase("decode", step, group.number):
                self.link.settle(self._sent)
                self.link.settle(group.sent)
                new, kept = finish(group.requests, group.batch, group.cache, eos)
            self.ledger.disown(group.cache)
            tokens += new
            held += [] if kept is None else [kept]
        return tokens, of_groups(held) if held else None
