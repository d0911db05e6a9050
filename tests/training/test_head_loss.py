"""A loss from hidden states: the model's own loss and gradients, without the logits of a batch; what is refused."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness.config.compose import compose
from harness.config.load import Refusal, load
from harness.config.settings import Loss
from harness.data.batch import IGNORED
from harness.ledger import Ledger
from harness.model.plan import Plan
from harness.rehearsal.one_rank import rehearse
from harness.runtime import faults
from harness.runtime.world import World
from harness.training import loss_check
from harness.training.head_loss import apply
from tests import poison
from tests.training.conftest import WORDS, train

SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "phi": {},  # its head has a bias
    "mixtral": {"output_router_logits": True, "num_local_experts": 4},  # its loss has a second part
}


def made(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **KINDS[kind]), dtype=dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def batch(ignored: float = 0.2) -> dict[str, torch.Tensor]:
    """Tokens [4, 40], and labels of which so many are ignored."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 500, (4, 40), generator=generator)
    return {
        "input_ids": tokens,
        "labels": tokens.masked_fill(torch.rand((4, 40), generator=generator) < ignored, IGNORED),
    }


def step(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the gradients of all parameters."""
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, over that of `expected`."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_in_chunks_the_loss_and_all_gradients_are_those_of_the_whole(kind: str, chunk: int | None) -> None:
    expected, expected_gradients = step(made(kind), batch())
    model = made(kind)
    apply(model, Loss(kind="chunked", chunk=chunk))
    actual, gradients = step(model, batch())
    assert math.isclose(actual, expected, rel_tol=1e-6)
    assert len(gradients) == len(expected_gradients) == len([*model.parameters()])
    assert distance(joined(gradients), joined(expected_gradients)) < 1e-6
    assert (
        max(map(distance, gradients, expected_gradients)) < 1e-5
    )  # that of a key's bias is a sum of almost 0


def test_with_a_number_of_items_the_loss_is_the_sum_by_that_number_as_of_the_whole() -> None:
    inputs = {**batch(), "num_items_in_batch": 20.5}
    expected, expected_gradients = step(made("llama"), inputs)
    model = made("llama")
    apply(model, Loss(kind="chunked"))
    actual, gradients = step(model, inputs)
    assert math.isclose(actual, expected, rel_tol=1e-6)
    assert distance(joined(gradients), joined(expected_gradients)) < 1e-6


def test_a_bf16_model_has_a_loss_that_is_not_rounded_to_bf16() -> None:
    expected, expected_gradients = step(made("llama", torch.bfloat16), batch())
    model = made("llama", torch.bfloat16)
    apply(model, Loss(kind="chunked"))
    actual, gradients = step(model, batch())
    assert actual.dtype == expected.dtype == torch.float32
    assert abs(actual - expected) < 2**-8 * expected / 4  # a bf16 keeps 8 bits
    assert max(map(distance, gradients, expected_gradients)) < 4 * 2**-8


def test_where_no_token_has_a_label_the_loss_is_nan_and_its_gradients_are_0_as_of_the_whole() -> None:
    whole, model = made("llama"), made("llama")
    apply(model, Loss(kind="chunked"))
    for loss, gradients in (step(each, batch(ignored=2)) for each in (whole, model)):
        assert math.isnan(loss)
        assert all(not gradient.any() for gradient in gradients)


def largest(loss: str) -> int:
    """The bytes of the largest storage that a step makes, after one of validation."""
    model = made("llama")
    apply(model, Loss(kind=loss))  # type: ignore[arg-type]
    with Ledger(model=model) as ledger:
        with torch.no_grad():
            model(**batch(), use_cache=False)
        step(model, batch())
    return max(event.storage.nbytes for event in ledger.events if event.storage and event.storage.op)


def test_no_storage_of_a_step_in_chunks_is_as_large_as_the_logits() -> None:
    logits = 4 * 40 * SMALL["vocab_size"] * 4
    assert largest("full") >= logits
    assert largest("chunked") <= logits / 2


REFUSED = {
    "gemma2": ({}, "eager", "changes its logits after its head"),
    "granite": ({"logits_scaling": 8.0}, "sdpa", "changes its logits after its head"),
    "cohere": ({}, "sdpa", "changes its logits after its head"),
    "bart": ({}, "eager", "does not compute its loss once from its head's output"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_head_that_is_not_linear_alone_is_refused_by_what_its_forward_does(kind: str) -> None:
    fields, attention, reason = REFUSED[kind]
    fields = {} if kind == "bart" else SMALL | fields
    shape = json.dumps(AutoConfig.for_model(kind, **fields).to_dict(), sort_keys=True)
    assert str(loss_check.difference(shape, attention)).startswith(reason)


def test_a_head_with_more_than_a_product_is_refused() -> None:
    class Scaled(nn.Linear):
        """What an adapter or a quantized layer is: no plain product."""

    model = made("llama")
    model.lm_head.__class__ = Scaled
    _, reason = loss_check.own(model)
    assert reason == "has a Scaled for a head, not a linear layer"


def plan(*words: str) -> Plan:
    return Plan.of(load(compose([*WORDS, *words])))


def test_a_run_and_a_rehearsal_refuse_a_model_by_its_type() -> None:
    granite = ("model.config.model_type=granite", "+model.config.logits_scaling=8.0", "loss=chunked")
    with pytest.raises(Refusal, match=r"loss=chunked: granite changes its logits .*; use loss=full"):
        loss_check.prove(plan(*granite), "cpu")
    with pytest.raises(Refusal, match=r"loss=chunked: granite changes its logits .*; use loss=full"):
        rehearse(plan(*granite, "world=rehearsed", "world.size=2", "hardware=cpu"), 0)


def test_a_vocabulary_that_torch_would_not_cut_is_refused_without_a_chunk() -> None:
    with pytest.raises(Refusal, match=r"vocabulary of 60 and hidden states of 64 .* give loss.chunk="):
        loss_check.prove(plan("loss=chunked", "model.config.vocab_size=60"), "cpu")
    loss_check.prove(plan("loss=chunked", "loss.chunk=4", "model.config.vocab_size=60"), "cpu")


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's weight is NaN in the second step."""

    def inject(point: str, number: int) -> None:
        for module in poison.modules("lm_head") if (point, number) == ("forward", 1) else ():
            module.weight.data.fill_(torch.nan)

    monkeypatch.setattr(faults, "inject", inject)


@pytest.mark.usefixtures("spoiled")
def test_a_head_that_is_not_finite_is_named(world: World, tmp_path: Path) -> None:
    _, said = train(world, tmp_path, "loss=chunked")
    assert "forward 1: the loss is nan: lm_head is the first module whose output is not finite" in said


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "checkpoint/model.safetensors")


def test_a_run_in_chunks_goes_on_bit_for_bit_and_exports_the_model_s_own_weights(
    world: World, tmp_path: Path
) -> None:
    words: Sequence[str] = ("loss=chunked", "loss.chunk=5", "zero=3", "train.export=true", "train.steps=3")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected, _ = train(world, whole, *words, "train.save_every=2")
    assert expected.training is not None
    actual, _ = train(world, cut, *words, f"train.resume={whole}")
    assert actual.training is not None
    assert actual.training.losses == expected.training.losses[2:]
    left, right = weights(whole), weights(cut)
    assert left.keys() == {*made("llama").state_dict()}
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    assert (cut / "checkpoint/config.json").read_text() == (whole / "checkpoint/config.json").read_text()
    with pytest.raises(
        Refusal, match=r"loss.chunk=6: .* was saved with 5; .*train.resume_changes=\[loss.chunk\]"
    ):
        train(world, tmp_path / "other", *words, f"train.resume={whole}", "loss.chunk=6")
