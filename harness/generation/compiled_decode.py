"""The compiled decoding step: one program for each batch size, with a static cache that is reused.

A program needs fixed shapes and addresses. So the newest tokens, their positions, the mask and the cache are the same
buffers for every token of every batch. On a GPU the program is replayed as a CUDA graph.
"""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from harness.config.errors import first_line
from harness.config.settings import Refusal
from harness.generation.timestamps import clock
from harness.ledger import Ledger, Work
from harness.model.kv_cache import make
from harness.runtime.compiler import not_compiled

WARM = 3
"""Warm-up steps of a program: CUDA graphs are recorded in the second."""

Step = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
"""From tokens [B, 1], mask [B, L], positions [B, 1] and a cache to logits [B, V]."""

Program = Callable[[Tensor, Tensor, Tensor, Cache, Work | None], Tensor]
"""A step that tells the ledger the work of one run, which a compiled step hides from it."""


class Compiled:
    """The decoding step of `model` for batches of up to `length` columns (L), padding and new tokens included.

    `make_program` compiles the step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        length: int,
        ledger: Ledger,
        make_program: Callable[[Step, torch.device, bool, Ledger], Program] | None = None,
    ) -> None:
        self.model, self.length, self.ledger = model, length, ledger
        self.cache: Cache | None = None
        self._work: dict[bool, Work] = {}  # of one step; the key says whether the windows are full
        windows = _windows(make("static", model.config, length))
        self._full = [False, True] if any(each.max_cache_len < length for each in windows) else [False]
        self._program = (make_program or program)(self._forward, model.device, bool(windows), ledger)
        self._tokens = self._positions = self._mask = torch.empty(0, 0, dtype=torch.int64)

    def prepare(self, sequences: int) -> tuple[Cache, float]:
        """Return an empty cache and a program for so many sequences, and the seconds that took.

        They are reused where the batch before had as many sequences. Raises Refusal where the model does not compile.
        """
        began = clock(self.model.device)
        if self.cache is None or len(self._tokens) != sequences:
            self._make(sequences)
        assert self.cache is not None
        self.cache.reset()
        return self.cache, clock(self.model.device) - began

    def shown(self, mask: Tensor | None) -> Callable[[Any, int, int], Tensor]:
        """A function that runs the step on one column of a batch with the padding in `mask` [B, columns]."""
        self._mask.fill_(1)
        if mask is not None:
            columns = min(mask.shape[1], self.length)
            self._mask[:, :columns] = mask[:, :columns]

        def show(batch: Any, begin: int, end: int) -> Tensor:
            self._tokens.copy_(batch.tokens[:, begin:end])
            self._positions.copy_(batch.positions[:, begin:end])
            return self._run()

        return show

    def _make(self, sequences: int) -> None:
        """Allocate the buffers, fill the cache with one prompt token, then decode after it to compile the step."""
        if self.cache is not None:
            self.cache = None
            gc.collect()  # reference cycles of the compiler still hold the cache before this one
        device = self.model.device
        self._tokens = torch.zeros(sequences, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._mask = torch.ones(sequences, self.length, dtype=torch.int64, device=device)
        for name in ("_tokens", "_positions", "_mask"):
            self.ledger.claim("inputs", f"compiled{name}", getattr(self, name))
        self.cache = make("static", self.model.config, self.length)
        self.model(input_ids=self._tokens, past_key_values=self.cache, logits_to_keep=1)
        self.ledger.own(cache=self.cache)
        for full in self._full:
            if self.ledger.exact:
                self._work[full] = self._counted(self.cache, full)
            self._fill(self.cache, full)
            for _ in range(min(WARM, self.length - 1)):
                self._run()

    def _fill(self, cache: Cache, full: bool) -> None:
        """Mark the windows as full: the model then takes another path, which needs another program."""
        for layer in _windows(cache) if full else []:
            layer.cumulative_length_int = layer.max_cache_len

    def _counted(self, cache: Cache, full: bool) -> Work:
        """The work of one step, counted operator by operator without compiling: the program computes the same."""
        where = self.ledger.where
        before = self.ledger.work()[where]
        self._fill(cache, full)
        self._forward(self._tokens, self._mask, self._positions, cache)
        after = self.ledger.work()[where]
        cache.reset()
        return Work(late - early for early, late in zip(before, after, strict=True))

    def _run(self) -> Tensor:
        assert self.cache is not None
        full = any(each.cumulative_length_int >= each.max_cache_len for each in _windows(self.cache))
        return self._program(self._tokens, self._mask, self._positions, self.cache, self._work.get(full))

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        output: Any = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _windows(cache: Cache | None) -> list[Any]:
    """The layers of `cache` with a sliding window whose length the host counts."""
    return [] if cache is None else [each for each in cache.layers if hasattr(each, "cumulative_length_int")]


def program(step: Step, device: torch.device, windows: bool, ledger: Ledger) -> Program:
    """`step`, compiled for `device`; `windows`: whether its cache has layers with a sliding window."""
    compiled_step = compiled(step, options(device, windows))

    def run(tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache, work: Work | None) -> Tensor:
        with ledger.opaque("compiled", work):
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            return compiled_step(tokens, mask, positions, cache)

    return run


def options(device: torch.device, windows: bool) -> dict[str, Any]:
    """The options of torch.compile: one program for each shape, on a GPU as a CUDA graph.

    The length of `windows` that the host counts changes at every step. A dynamic program accepts any value; a CUDA
    graph would be recorded for each one.
    """
    choices: dict[str, Any] = {"mode": "reduce-overhead"}
    if device.type != "cuda":
        choices = {"options": {"cpp_wrapper": True}}
    elif windows:
        choices = {}
    return {"fullgraph": True, "dynamic": None if windows else False, **choices}


def compiled(step: Step, choices: Mapping[str, Any]) -> Step:
    """`step`, compiled with these options. The first call raises Refusal where torch cannot compile it."""
    program = torch.compile(step, **choices)

    def run(tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        try:
            logits: Tensor = program(tokens, mask, positions, cache)
        except not_compiled() as error:
            remedy = f"the decoding step cannot be compiled ({first_line(error)}); leave it out"
            raise Refusal("generation.compile", True, remedy) from error
        return logits

    return run
