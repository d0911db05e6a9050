"""The course of a rehearsal: it computes a few of the steps and tokens that repeat, and tensors have no values."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from harness.config.strategy import Strategy
from harness.generation import choosing
from harness.generation.batch import Requests
from harness.generation.compiled_decode import Program, Step
from harness.generation.course import Decoding, Forwards, Turns
from harness.generation.paged_cache import Usage
from harness.generation.paged_choosing import Choosers
from harness.ledger import Ledger, Work
from harness.rehearsal import cache_growth
from harness.rehearsal.extrapolation import Alike
from harness.runtime.course import Backend


def uncompiled(step: Step, device: torch.device, windows: bool, ledger: Ledger) -> Program:
    """The decoding step itself: its operators are those of its program, and the ledger sees them."""

    def run(tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache, work: Work | None) -> Tensor:
        return step(tokens, mask, positions, cache)

    return run


class Shortened(Decoding):
    """The course of a rehearsed rank, in both modes."""

    values = False
    program = staticmethod(uncompiled)

    def __init__(self, compiler: Backend | None = None) -> None:
        self.compiler = compiler

    def steps(self, steps: range, recorded: int) -> range:
        """The steps that the ledger records: the next one would do the same."""
        return steps[:recorded]

    def turns(
        self, batches: Sequence[tuple[Requests, Cache | None]], strategy: Strategy, ledger: Ledger
    ) -> Turns:
        """The first and last tokens of each stretch in which bytes and work grow steadily."""
        lengths = {requests.new_columns for requests, _ in batches}
        if len(lengths) > 1 or not all(cache_growth.can_advance(cache) for _, cache in batches):
            return super().turns(batches, strategy, ledger)
        numbers, starts = range(1, max(lengths)), set[int]()
        for requests, cache in batches:
            starts |= cache_growth.stretch_starts(cache, requests.width, max(lengths))
            starts |= choosing.stretch_starts(strategy, requests)
        return cache_growth.ends(numbers, starts, ledger)

    def skip(self, cache: Cache | None, tokens: int, ledger: Ledger) -> None:
        """Make `cache` as long as after so many more `tokens`, and register its new tensors with `ledger`."""
        if tokens:
            with ledger.uncounted():
                cache_growth.advance(cache, tokens)
            ledger.own(cache=cache)

    def ends(self, strategy: Strategy) -> Sequence[int]:
        """None: no token has a value that could end a request."""
        return ()

    def forwards(self, ledger: Ledger, choosers: Choosers, usage: Usage) -> Forwards:
        """What leaves out forwards that differ only in one more token for each request."""
        return _FirstAndLast(ledger, choosers, usage)


class _FirstAndLast(Forwards):
    """Of forwards that differ only in one more token for each request, the first two and the last are run; once the
    ledger has seen enough, none is.
    """

    def __init__(self, ledger: Ledger, choosers: Choosers, usage: Usage) -> None:
        self.ledger, self.choosers, self.usage = ledger, choosers, usage
        self.alike = Alike(ledger)
        self._previous: list[str] = []  # the requests of the previous decode forward
        self._repeats = 0  # forwards since the first of a series that differ only in longer requests

    def run(self, forward: Callable[[], object], batch: Sequence[Any], prompt_tokens: int) -> None:
        if self._decides(batch, prompt_tokens):
            self.alike.make(forward, self._repeats)
        else:
            self.alike.leave_out()

    def _decides(self, batch: Sequence[Any], prompt_tokens: int) -> bool:
        """Whether this forward must run: it is the first or second of a series of similar ones, or the last.

        Similar forwards have the same requests and differ only in their lengths.
        """
        previous, self._previous = (
            self._previous,
            [] if prompt_tokens else [each.state.request_id for each in batch],
        )
        boundaries = [self.choosers.stretch_boundary(each.state) for each in batch]
        similar = (
            not prompt_tokens and self._previous == previous and not any(first for first, _ in boundaries)
        )
        self._repeats = self._repeats + 1 if similar else 0
        short = self.usage.free < len(batch)  # a request may lose its pages before the next forward
        last = short or any(last for _, last in boundaries)
        last = last or any(each.state.generated_len() + 1 == each.state.max_new_tokens for each in batch)
        return self.ledger.exact and (last or self._repeats < 2)
