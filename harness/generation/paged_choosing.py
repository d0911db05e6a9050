"""Choose the next token of each request in a continuous batch, independent of the other requests.

transformers' continuous batching drops most logits processors, and samples for all requests at once.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from harness.config.rules.generation import STATIC
from harness.config.settings import Refusal
from harness.config.strategy import Strategy
from harness.generation.batch import PADDING, Requests
from harness.generation.choosing import Choose, chooser, stretch_starts
from harness.ledger import Ledger
from harness.ledger.patch import TRANSFORMERS, DoesNotFit, Patch, install, table

_RUNNER = "transformers.generation.continuous_batching.model_runner.ModelRunner"
_SAMPLE = f"{_RUNNER}._sample"

PATCHES = table(
    Patch(
        _RUNNER,
        "_sample",
        "transformers drops most logits processors, and samples for all requests at once",
        TRANSFORMERS,
        stays="as long as the batch processor lives",
    )
)


class Choosers:
    """One token chooser for each request; it replaces the argmax in transformers' model runner."""

    def __init__(
        self, strategy: Strategy, requests: Requests, model: PreTrainedModel, processor: Any, ledger: Ledger
    ) -> None:
        self.strategy, self.requests, self.model, self.ledger = strategy, requests, model, ledger
        self._batch = processor.inputs_and_outputs
        self._each: dict[int, tuple[torch.Tensor, Choose]] = {}
        if strategy.processed or strategy.samples:
            runner: Any = getattr(processor, "model_runner", None)
            try:
                install(PATCHES[_SAMPLE].by(lambda _: self._sample, runner))
            except DoesNotFit as error:
                remedy = f"this transformers chooses tokens in another place; use {STATIC}"
                raise Refusal("generation.batching", "continuous", remedy) from error

    def leave(self, state: Any) -> None:
        """Drop the chooser of a request that has ended."""
        self._each.pop(int(state.request_id), None)

    def stretch_boundary(self, state: Any) -> tuple[bool, bool]:
        """Whether a request's next token is the first on which some processor acts differently, and whether it is the
        last before such a token.
        """
        if not self.strategy.processed:
            return False, False
        numbers, number = (
            stretch_starts(self.strategy, self._single(int(state.request_id))),
            self._number(state),
        )
        return number in numbers, number + 1 in numbers

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """Choose a token for each request of a forward that completed its prompt, from `scores` [1, R, V] into
        `output_ids`.
        """
        states = [each.state for each in self._batch.requests_in_batch if each.has_new_token]
        for row, state in enumerate(states):
            tokens, choose = self._chooser_of(int(state.request_id))
            number = self._number(state)
            token = choose(scores[0, row : row + 1], number)
            tokens[:, number - self.requests.max_new_tokens[int(state.request_id)]] = token
            output_ids[0, row : row + 1] = token

    def _chooser_of(self, request_number: int) -> tuple[torch.Tensor, Choose]:
        if request_number not in self._each:
            request = self._single(request_number)
            row = [*request.prompts[0], *([PADDING] * request.new_columns)]
            tokens = torch.tensor([row], device=self.model.device)
            self.ledger.claim("inputs", "tokens", tokens)
            choose = chooser(self.strategy, request, tokens, self.model.config, self.ledger)
            self._each[request_number] = tokens, choose
        return self._each[request_number]

    def _single(self, request_number: int) -> Requests:
        """One request as a batch."""
        requests = self.requests
        return Requests(
            [requests.prompts[request_number]],
            [requests.max_new_tokens[request_number]],
            requests.numbers[request_number : request_number + 1],
        )

    def _number(self, state: Any) -> int:
        """The number of a request's next token. An evicted request has its earlier new tokens at the end
        of its prompt.
        """
        tokens = len(state.initial_tokens) + len(state.generated_tokens)
        return tokens - len(self.requests.prompts[int(state.request_id)])
