"""Which tokens of a generation are computed, and how: all of them. A rehearsal leaves out those that repeat others."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import Cache

from harness.config.strategy import Strategy
from harness.generation.batch import Requests
from harness.generation.compiled_decode import Program, program
from harness.generation.paged_cache import Usage
from harness.generation.paged_choosing import Choosers
from harness.ledger import Ledger
from harness.runtime.course import Course

Turns = Iterator[tuple[int, int]]
"""The numbers of new tokens to compute, each with how many tokens are left out before it."""


class Forwards:
    """The forwards of a continuous batch: each one is run."""

    def run(self, forward: Callable[[], object], batch: Sequence[Any], prompt_tokens: int) -> None:
        """Run the `forward` of transformers' `batch`, which has so many tokens of prompts."""
        forward()


class Decoding(Course):
    """The course of a real generation."""

    program: Callable[..., Program] = staticmethod(program)
    """Makes the program of a compiled decoding step."""

    def turns(
        self, batches: Sequence[tuple[Requests, Cache | None]], strategy: Strategy, ledger: Ledger
    ) -> Turns:
        """The new tokens to compute after the first ones (number 0), for `batches` that take turns."""
        return ((number, 0) for number in range(1, max(requests.new_columns for requests, _ in batches)))

    def skip(self, cache: Cache | None, tokens: int, ledger: Ledger) -> None:
        """Make up in `cache` for so many `tokens` that were left out."""

    def ends(self, strategy: Strategy) -> Sequence[int]:
        """The tokens that end a request before it has its max_new_tokens."""
        return strategy.ends

    def forwards(self, ledger: Ledger, choosers: Choosers, usage: Usage) -> Forwards:
        """What runs the forwards of a continuous batch, whose pages are `usage`."""
        return Forwards()


WHOLE = Decoding()
"""The course of a real run."""
