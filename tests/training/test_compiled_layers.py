"""Compiled layers train as eager ones, in books that close, and a rehearsal has their bytes."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.config.compose import compose
from harness.config.load import Refusal, load
from harness.ledger import Ledger
from harness.ledger.patch import patched
from harness.model.resolve import resolve
from harness.record.memory import Phase, Rank
from harness.record.record_file import Output, rank_record
from harness.record.results import Results
from harness.rehearsal.all_ranks import described
from harness.rehearsal.card_ledger import UNCOMPILED
from harness.rehearsal.one_rank import rehearse
from harness.rehearsal.shims import process_world
from harness.runtime.world import World, connected
from harness.training.compiled_layers import apply, uncompiled
from harness.training.train import run
from tests.training.conftest import WORDS

CELL = (*WORDS, "hardware=cpu", "train.steps=2", "model.config.num_hidden_layers=1")
VALIDATED = ("train.validate_every=2", "train.validation_batches=1", "model.config.num_hidden_layers=2")
COMPILED, REHEARSED = "train.compile=true", ("world=rehearsed", "world.size=1")


class Pair(NamedTuple):
    """The words of a run, and its rank's record and losses, with eager layers and with compiled ones."""

    words: tuple[str, ...]
    eager: Rank
    compiled: Rank
    eager_losses: list[float]
    compiled_losses: list[float]


def real(world: World, directory: Path, words: tuple[str, ...]) -> tuple[Rank, list[float]]:
    results, ledger = Results(), Ledger(mode="exact", steps=3, settle_collectives=True)
    with ledger:
        output = Output(directory, lambda line: None, results, lambda: None)
        run(resolve(load(compose(list(words)))), world, ledger, output)
    assert results.training is not None
    return rank_record(ledger, 0, 0, 0, None), list(results.training.losses)


def of(words: tuple[str, ...], directory: Path) -> Pair:
    with patched(*process_world()), connected("cpu", 60) as world:
        eager, eager_losses = real(world, directory, words)
        compiled, compiled_losses = real(world, directory, (*words, COMPILED))
    return Pair(words, eager, compiled, eager_losses, compiled_losses)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return of(CELL, tmp_path_factory.mktemp("compiled"))


def rehearsal(*words: str) -> Rank:
    rank, _ = rehearse(resolve(load(compose([*words, *REHEARSED]))), 0)
    return rank


def bytes_of(rank: Rank) -> dict[tuple[int, str, int], dict[str, Any]]:
    """What a rehearsal has too, by phase: which of two is entered first depends on when a tensor is freed."""
    return {(phase.step, phase.phase, phase.micro_batch): _bytes(phase) for phase in rank.phases}


def _bytes(phase: Phase) -> dict[str, Any]:
    categories = {name: nbytes for name, nbytes in phase.categories.items() if name != "kernel"}
    return {"end": phase.end, "saved": phase.saved, **categories}


def same_results_and_bytes(pair: Pair) -> None:
    assert pair.compiled_losses == pytest.approx(pair.eager_losses, rel=1e-6)  # some roundings of fp32
    assert pair.compiled.allocator.unattributed == 0
    rehearsed = rehearsal(*pair.words, COMPILED)
    assert bytes_of(rehearsed) == bytes_of(pair.compiled)


def test_losses_are_the_eager_ones_and_a_rehearsal_has_the_bytes(pair: Pair) -> None:
    same_results_and_bytes(pair)


def test_less_is_saved_for_backward(pair: Pair) -> None:
    eager, compiled = (
        [phase.saved or 0 for phase in rank.phases if phase.phase == "forward"]
        for rank in (pair.eager, pair.compiled)
    )
    assert 0 < max(compiled) < max(eager)


def test_what_is_not_seen_inside_is_said_and_has_no_figure(pair: Pair) -> None:
    (sentence,) = pair.compiled.unseen or []
    assert "its operators are not seen one by one" in sentence
    assert {phase.recomputed for phase in pair.compiled.phases} == {None}
    assert {phase.recomputed for phase in pair.eager.phases} == {0}
    by_phase = {phase.phase: phase for phase in pair.compiled.phases}
    assert by_phase["forward"].flops is by_phase["backward"].flops is None
    assert by_phase["step"].flops is not None


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "words",
    [
        "checkpointing=full",
        "loss=chunked zero=2",
        "zero=0 train.accumulation=2",
        "train.micro_batch=2",
        "zero.offload=optimizer",
    ],
)
def test_every_kind_of_run_that_is_allowed_is_the_same(words: str, tmp_path: Path) -> None:
    same_results_and_bytes(of((*CELL, *VALIDATED, *words.split()), tmp_path))


def test_a_rehearsal_says_how_it_differs() -> None:
    plan = resolve(load(compose([*CELL, COMPILED, *REHEARSED])))
    assert any("compiled layers run operator by operator" in each for each in described(plan).differences)


def test_a_gpu_is_rehearsed_with_eager_layers_and_that_is_said() -> None:
    words = [word for word in CELL if word != "hardware=cpu"]
    eager, compiled = (rehearsal(*words, "hardware=rtx4090", *more) for more in ((), (COMPILED,)))
    assert UNCOMPILED in (compiled.unseen or [])
    assert UNCOMPILED not in (eager.unseen or [])
    assert bytes_of(compiled) == bytes_of(eager)


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes))


def test_a_layer_that_cannot_be_compiled_whole_is_refused_with_the_reason(model: LlamaForCausalLM) -> None:
    class Branching(nn.Module):
        def forward(self, hidden: Tensor, **_: Any) -> Tensor:
            return hidden if hidden.sum().item() > 0 else hidden + 1

    model.model.layers[0] = Branching()
    apply(model, "eager")
    with pytest.raises(Refusal, match=r"^train\.compile=true: a layer of the model cannot be compiled \(\w"):
        model(torch.zeros(1, 4, dtype=torch.int64), use_cache=False)


def test_a_search_for_what_is_not_finite_finds_the_modules_of_a_layer(model: LlamaForCausalLM) -> None:
    apply(model, "eager")
    tokens, called = torch.zeros(1, 4, dtype=torch.int64), list[nn.Module]()
    model(tokens, use_cache=False)
    inside = model.model.layers[0].mlp
    inside.register_forward_hook(lambda module, *_: called.append(module))
    model(tokens, use_cache=False)
    assert not called  # the program was made without it
    with uncompiled():
        model(tokens, use_cache=False)
    assert called == [inside]
