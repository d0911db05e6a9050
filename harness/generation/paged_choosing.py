"""The next token of each request of a continuous batch: chosen as alone, whoever is beside it.

transformers' own continuous batching drops most processors, and draws for all requests at once.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from harness.config.rules.generation import STATIC
from harness.config.settings import Refusal
from harness.config.strategy import Strategy
from harness.generation.batch import PADDING, Requests
from harness.generation.choosing import Choose, bends, chooser
from harness.ledger import Ledger


class Choosers:
    """What chooses each request's tokens, in the place of transformers' likeliest of all."""

    def __init__(
        self, strategy: Strategy, requests: Requests, model: PreTrainedModel, processor: Any, ledger: Ledger
    ) -> None:
        self.strategy, self.requests, self.model, self.ledger = strategy, requests, model, ledger
        self._batch = processor.inputs_and_outputs
        self._each: dict[int, tuple[torch.Tensor, Choose]] = {}
        if strategy.processed or strategy.samples:
            runner: Any = getattr(processor, "model_runner", None)
            if not hasattr(runner, "_sample"):
                remedy = f"the transformers here chooses tokens in another place; use {STATIC}"
                raise Refusal("generation.batching", "continuous", remedy)
            runner._sample = self._sample

    def leave(self, state: Any) -> None:
        """A request has ended."""
        self._each.pop(int(state.request_id), None)

    def bends(self, state: Any) -> tuple[bool, bool]:
        """Whether a request's next token is the first that some processor does another thing to, or the last before."""
        if not self.strategy.processed:
            return False, False
        found, number = bends(self.strategy, self._alone(int(state.request_id))), self._number(state)
        return number in found, number + 1 in found

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """Choose for each request of a forward whose prompt is through, from `scores` [1, R, V] into `output_ids`."""
        through = [each.state for each in self._batch.requests_in_batch if each.has_new_token]
        for place, state in enumerate(through):
            tokens, choose = self._of(int(state.request_id))
            number = self._number(state)
            token = choose(scores[0, place : place + 1], number)
            tokens[:, number - self.requests.most[int(state.request_id)]] = token
            output_ids[0, place : place + 1] = token

    def _of(self, place: int) -> tuple[torch.Tensor, Choose]:
        if place not in self._each:
            alone = self._alone(place)
            row = [*alone.prompts[0], *([PADDING] * alone.room)]
            tokens = torch.tensor([row], device=self.model.device)
            self.ledger.claim("inputs", "tokens", tokens)
            choose = chooser(self.strategy, alone, tokens, self.model.config, self.ledger)
            self._each[place] = tokens, choose
        return self._each[place]

    def _alone(self, place: int) -> Requests:
        """A request as a batch."""
        every = self.requests
        return Requests([every.prompts[place]], [every.most[place]], every.numbers[place : place + 1])

    def _number(self, state: Any) -> int:
        """Of a request's next token; one that gave up its pages has those before among its prompt's."""
        had = len(state.initial_tokens) + len(state.generated_tokens)
        return had - len(self.requests.prompts[int(state.request_id)])
