"""Recomputed layers: gradients bit for bit those of kept ones, and the bytes that the published formulas say."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness import Ledger
from harness.config.layout import Layout
from harness.config.load import Checkpointing, Refusal
from harness.ledger import Where
from harness.model.activation_checkpointing import apply, selective
from harness.model.activation_offload import ActivationOffload
from harness.model.stage import layers_of
from harness.rehearsal.world import rehearsed

GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 128}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
SHAPES = {
    "gpt2": {**GPT, "bos_token_id": 1, "eos_token_id": 1},
    "openai-gpt": GPT,
    "llama": LLAMA,
    "mixtral": {**LLAMA, "num_local_experts": 4},
}
ASKED = {
    "selective": Checkpointing("selective"),
    "full": Checkpointing("full"),
    "full of two layers": Checkpointing("full", layers=[1, 3]),
    "selective of every third": Checkpointing("selective", every=3),
}


def built_model(
    kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16, **more: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPES[kind], **more})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention
    )
    return model.train()


def backward(model: PreTrainedModel, batch: int = 2, sequence: int = 16) -> float:
    """A forward and its backward; the loss."""
    torch.manual_seed(1)  # of the dropout
    tokens = torch.arange(batch * sequence).reshape(batch, sequence) % 100
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


# Gradients


@pytest.mark.parametrize("requested", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize(
    ("kind", "attention", "dtype"),
    [
        ("llama", "sdpa", torch.bfloat16),
        ("llama", "eager", torch.float32),
        ("gpt2", "sdpa", torch.float32),  # its dropout is 0.1
        ("gpt2", "eager", torch.bfloat16),
        ("mixtral", "sdpa", torch.float32),
    ],
)
def test_gradients_are_bit_for_bit_those_without(
    kind: str, attention: str, dtype: torch.dtype, requested: Checkpointing
) -> None:
    plain, recomputed = built_model(kind, attention, dtype), built_model(kind, attention, dtype)
    apply(recomputed, requested)
    with Ledger(model=recomputed) as ledger:
        again = backward(recomputed)
    assert again == backward(plain)
    expected = gradients(plain)
    assert set(expected) == set(gradients(recomputed)) == {name for name, _ in plain.named_parameters()}
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(recomputed).items())
    assert ledger.allocator.unattributed == 0
    assert any(event.storage and event.storage.recomputed for event in ledger._log.events)


def summed(
    layer: Callable[..., torch.Tensor], contexts: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of what `layer` takes: x [2, 3, 4], a weight [4, 4] and a bias [4]."""
    torch.manual_seed(0)
    taken = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 4), (4, 4), (4,))]
    out = layer(*taken) if contexts is None else checkpoint(
        layer, *taken, use_reentrant=False, context_fn=contexts
    )  # fmt: skip
    out.sum().backward()
    x, weight, bias = (each.grad for each in taken)
    assert x is not None and weight is not None and bias is not None  # noqa: PT018 - for the types
    return x, weight, bias


def test_a_product_that_is_changed_in_place_is_not_changed_twice() -> None:
    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        product = x.tanh() @ weight
        product += bias  # as DeepSpeed's linear of ZeRO-3 does
        return product.tanh().exp()

    offload = ActivationOffload(torch.device("cpu"), Ledger())
    for contexts in (selective, partial(selective, offload)):
        for expected, actual in zip(summed(layer), summed(layer, contexts), strict=True):
            assert torch.equal(actual, expected)


def test_a_product_that_is_changed_after_it_was_used_is_an_error() -> None:
    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        product = x.tanh() @ weight
        used = product.relu()
        product += bias
        return used + product.tanh()

    with pytest.raises(RuntimeError, match="changes in place after it was used; use checkpointing=full"):
        summed(layer, selective)


def test_what_is_not_kept_need_not_be_done_alike_both_times() -> None:
    done: list[int] = []

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        done.append(len(done))
        for _ in done:  # as ZeRO-3 gathers other parameters in backward
            torch.zeros(4).add_(1)
        return (x.tanh() @ weight + bias).tanh().exp()

    expected = summed(layer)
    done.clear()
    for actual, wanted in zip(summed(layer, selective), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert done == [0, 1]


# Which layers


@pytest.mark.parametrize(
    ("requested", "first", "expected"),
    [
        (Checkpointing("none"), 0, []),
        (Checkpointing("full"), 0, [0, 1, 2, 3]),
        (Checkpointing("full", layers=[1]), 0, [1]),
        (Checkpointing("full", every=2), 0, [0, 2]),
        (Checkpointing("selective", every=3), 0, [0, 3]),
        (Checkpointing("full", layers=[1, 5, 7]), 4, [1, 3]),  # the second stage of two
        (Checkpointing("full", every=3), 4, [2]),
        (Checkpointing("full", layers=[1]), 4, []),
    ],
)
def test_layers_are_counted_over_the_whole_model(
    requested: Checkpointing, first: int, expected: list[int]
) -> None:
    model = built_model("llama")
    apply(model, requested, first)
    with Ledger(model=model) as ledger:
        backward(model)
    events = [event for event in ledger._log.events if event.storage and event.storage.recomputed]
    seen = {event.module.removeprefix("model.layers.").partition(".")[0] for event in events}
    assert sorted(map(int, seen)) == expected
    _, layers = layers_of(model)
    assert [number for number, layer in enumerate(layers) if layer.gradient_checkpointing] == expected


def test_a_model_that_evaluates_recomputes_nothing() -> None:
    model = built_model("gpt2").eval()
    apply(model, Checkpointing("full"))
    with Ledger(model=model) as ledger:
        backward(model)
    assert not any(phase.recomputed for phase in ledger.phases)


def test_a_model_whose_layers_cannot_be_recomputed_is_refused() -> None:
    with pytest.raises(Refusal, match=r"checkpointing=full: the layers of openai-gpt cannot be recomputed"):
        apply(built_model("openai-gpt", "eager"), Checkpointing("full"))


# What is held


def kept(mode: Any, layers: int, shape: tuple[int, int, int, int]) -> int:
    """Bytes kept for backward by a GPT of so many `layers` and of `shape` (b, s, h, a), in eager attention and bf16."""
    batch, sequence, hidden, heads = shape
    gpt: dict[str, Any] = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": sequence}
    model = built_model("gpt2", "eager", **gpt, activation_function="gelu")
    apply(model, Checkpointing(mode))
    with Ledger(model=model) as ledger:
        backward(model, batch, sequence)
    assert ledger.forwards is not None
    (stash,) = ledger.forwards.saved_bytes
    return stash


@pytest.mark.parametrize("shape", [(2, 16, 32, 4), (3, 24, 64, 2), (1, 64, 32, 8)])
def test_a_layer_of_a_gpt_keeps_what_the_published_formulas_say(shape: tuple[int, int, int, int]) -> None:
    """Korthikanti et al. 2022, arXiv 2205.05198, equations 1 and 5: 34sbh + 5as^2b plain, 2sbh fully recomputed.

    They count 2 bytes an element, 1 for a dropout's mask, and no statistics of the norms. On a CPU masks have the
    dtype of what they mask, and checkpointing keeps the state of the random numbers. Their selective recomputes what is
    within attention (34sbh); this one goes by operator, and keeps what each matrix product gave: of h, 3 of q, k and v,
    1 of the values weighed, 1 of the projection, 4 and 1 of the MLP, beside the input, and a*s*s scores.
    """
    b, s, h, a = shape
    plain, full, chosen = (
        kept(mode, 3, shape) - kept(mode, 2, shape) for mode in ("none", "full", "selective")
    )
    masks = (
        2 * s * b * h + a * s * s * b
    )  # the second byte of three masks: of two hidden states, of the scores
    norms = 2 * 2 * 2 * s * b  # two of them, a mean and a deviation for each token
    state = torch.get_rng_state().nbytes
    assert plain == 34 * s * b * h + 5 * a * s * s * b + masks + norms
    assert full == 2 * s * b * h + state
    assert chosen == 2 * (3 + 1 + 1 + 4 + 1 + 1) * s * b * h + 2 * a * s * s * b + state


def peaks(mode: Any, layers: int = 4) -> Ledger:
    model = built_model("gpt2", "eager", n_layer=layers)
    with Ledger(model=model) as ledger:
        apply(model, Checkpointing(mode))
        backward(model, 4, 32)
    return ledger


def test_what_is_recomputed_is_shown_as_such_within_backward() -> None:
    by_mode = {mode: peaks(mode) for mode in ("none", "selective", "full")}
    for mode, ledger in by_mode.items():
        forward, backward_ = (next(p for p in ledger.phases if p.where == Where(0, name, 0))
                              for name in ("forward", "backward"))  # fmt: skip
        assert forward.recomputed == 0
        assert ledger.allocator.unattributed == 0
        assert ledger.peak.where.phase == "backward"
        assert (backward_.recomputed or 0) <= (backward_.categories["activations"] or 0)
        assert bool(backward_.recomputed) == (mode != "none")
        assert bool(ledger.peak.recomputed) == (mode != "none")
    assert by_mode["none"].peak.bytes > by_mode["selective"].peak.bytes > by_mode["full"].peak.bytes


def test_a_layer_of_its_own_operators_is_named_where_it_is_recomputed() -> None:
    made_again = [
        event.storage for event in peaks("full")._log.events if event.storage and event.storage.recomputed
    ]
    modules = {storage.module for storage in made_again if storage.op == "add.Tensor"}
    assert {f"transformer.h.{number}" for number in range(4)} <= modules  # its residuals


def test_the_state_of_the_random_numbers_is_an_activation_by_name() -> None:
    ledger, state = peaks("full"), torch.get_rng_state()
    result = [event.storage for event in ledger._log.events if event.delta > 0 and event.storage]
    states = [storage for storage in result if storage.op == "get_rng_state"]
    for number in range(4):
        mine = [s for s in states if s.module == f"transformer.h.{number}" and s.saved_at is not None]
        assert [(s.nbytes, s.category, s.where.phase) for s in mine] == [
            (state.nbytes, "activations", "forward")
        ]
    again = [s for s in states if s.recomputed]  # what the recomputation of each goes back to
    assert [(s.category, s.where.phase) for s in again] == [("activations", "backward")] * 4


def test_a_rehearsed_state_has_the_name_and_the_bytes_of_a_real_one() -> None:
    books = []
    for around in (nullcontext(), rehearsed(0, Layout())):
        with around, Ledger(device="cpu", allocator=False) as ledger, ledger.phase("forward"):
            state = torch.get_rng_state()
            torch.set_rng_state(state)
            state.clone()
        books.append((ledger.peak, ledger.categories))
    assert books[0] == books[1]
    assert [holding.name for holding in books[0][0].holdings] == ["forward: clone", "forward: get_rng_state"]


def test_torch_is_as_it_was_when_the_ledger_ends() -> None:
    own: Any = torch.utils.checkpoint
    before = torch.get_rng_state, own._VersionWrapper, own._recomputation_hook
    with Ledger():
        assert torch.get_rng_state is not before[0]
    assert (torch.get_rng_state, own._VersionWrapper, own._recomputation_hook) == before
