"""Weights are the seed's or the checkpoint's, whoever has which part; and what nothing gives a value is refused."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from harness.config.settings import Model, Refusal
from harness.model import init_weights, loader, stage
from harness.model.partition import ranges
from harness.model.stage import Stage

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 150,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
"""Merged as they are read; and their routers have a buffer that is learnt, and is in fp32 whatever the rest is in."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama": WIDER,
    "glm4_moe": {**WIDER, **EXPERTS},
    "gpt2": SIZES,
    "falcon_h1": {**WIDER, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_head": 8},
    "bloom": SIZES,
}


def settings_of(kind: str, **more: Any) -> Model:
    return Model(name=kind, config={"model_type": kind, **SHAPES[kind], **more}, attention="eager")


def config_of(kind: str, **more: Any) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **{**SHAPES[kind], **more})


def built_model(kind: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    return loader.build(settings_of(kind, **more), config_of(kind, **more), torch.float32, CPU, seed)


def tensors(built: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(built.named_parameters(remove_duplicate=False)), **dict(built.named_buffers())}


def save(kind: str, directory: Path, **more: Any) -> PreTrainedModel:
    """A checkpoint no part of which is what a seed would give."""
    built = built_model(kind, seed=5, **more)
    with torch.no_grad():
        for name in built.state_dict():
            tensor = tensors(built)[name]
            tensor.add_(torch.rand_like(tensor))
    built.save_pretrained(directory)
    return built


def read(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, list[Stage]]:
    """It as a whole, and in a stage for each layer."""
    requested = Model(name="saved", path=str(directory), attention="eager")
    whole = loader.build(requested, loader.model_config(requested), dtype, CPU, 0)
    layers = whole.config.num_hidden_layers
    return whole, [
        stage.build(requested, loader.model_config(requested), dtype, CPU, 0, each)
        for each in ranges([1] * layers)
    ]


def assert_same(stages: list[Stage], whole: PreTrainedModel) -> None:
    """That the stages have the whole's values in the whole's types."""
    expected = tensors(whole)
    for part in stages:
        for name, tensor in {**part.owned(), **dict(part.model.named_buffers())}.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name


def change(directory: Path, by: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the checkpoint's tensors."""
    actual = load_file(directory / "model.safetensors")
    by(actual)
    save_file(actual, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", SHAPES)
def test_a_seed_alone_decides_whatever_was_drawn_before(kind: str) -> None:
    torch.manual_seed(1)
    first = tensors(built_model(kind))
    torch.rand(3)
    again, other = tensors(built_model(kind)), tensors(built_model(kind, seed=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", SHAPES)
def test_weights_are_spread_as_transformers_spreads_them(kind: str) -> None:
    torch.manual_seed(0)
    mine, theirs = tensors(built_model(kind)), tensors(AutoModelForCausalLM.from_config(config_of(kind)))
    for name, tensor in theirs.items():
        if bool((tensor == tensor.flatten()[0]).all()):
            assert torch.equal(mine[name], tensor), name
        elif tensor.numel() > 500:  # the spread of fewer says little
            five_sigma = 5 / math.sqrt(
                tensor.numel()
            )  # of the ratio of two samples' deviations, each 1 / sqrt(2 n)
            assert mine[name].std().item() == pytest.approx(tensor.std().item(), rel=five_sigma), name


def test_all_that_a_model_has_gets_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, poisonings = torch.empty_strided, 0

    def poisoned(*shape: Any, **kind: Any) -> Tensor:
        nonlocal poisonings
        poisonings += 1
        tensor = plain(*shape, **kind)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    expected = {kind: built_model(kind) for kind in SHAPES}
    monkeypatch.setattr(torch, "empty_strided", poisoned)
    for kind, whole in expected.items():
        before = poisonings
        again = tensors(built_model(kind))
        assert poisonings - before >= len(again)
        for name, tensor in again.items():
            assert torch.equal(tensor, tensors(whole)[name]), (kind, name)


APERTUS = Model(name="apertus", config={"model_type": "apertus", **WIDER}, attention="eager")


def test_a_model_that_transformers_gives_no_first_values_is_refused() -> None:
    config = loader.model_config(APERTUS)
    reported = r"model=apertus: transformers does not initialise its .*act_fn\.alpha_n"
    with pytest.raises(Refusal, match=reported):
        loader.build(APERTUS, config, torch.float32, CPU, 0)
    with pytest.raises(Refusal, match=reported):
        stage.build(APERTUS, config, torch.float32, CPU, 0, range(1, 2))


def test_its_checkpoint_has_them_all_and_is_read(tmp_path: Path) -> None:
    built = AutoModelForCausalLM.from_config(loader.model_config(APERTUS))
    built.save_pretrained(tmp_path)
    whole, stages = read(tmp_path)
    assert_same(stages, whole)
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(built).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "glm4_moe", "bloom"])
def test_a_checkpoint_comes_into_stages_in_transformers_values_and_types(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save(kind, tmp_path)
    whole, stages = read(tmp_path, dtype)
    assert_same(stages, whole)


@pytest.mark.parametrize("kind", ["llama", "glm4_moe", "bloom"])
def test_what_is_asked_of_each_stage_for_a_checkpoint_is_what_it_has(kind: str) -> None:
    whole = init_weights.outline(config_of(kind), torch.float32, "eager")
    requested = stage.parts(whole, [1, 2], buffers=True)
    stages = [
        stage.build(settings_of(kind), config_of(kind), torch.float32, CPU, 0, each)
        for each in ranges([1, 2])
    ]
    first = {other: name for each in stages for name, others in each.tied.items() for other in others}
    assert [{first.get(name, name) for name in part} for part in requested] == [
        set(each.stored()) for each in stages
    ]
    assert set().union(*requested) == set(whole.state_dict())


def test_a_tied_head_that_is_not_in_the_file_is_read_at_both_ends(tmp_path: Path) -> None:
    built = save("llama", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    whole, stages = read(tmp_path)
    assert_same(stages, whole)
    for end in (stages[0], stages[-1]):
        assert torch.equal(end.owned()["model.embed_tokens.weight"], built.get_parameter("lm_head.weight"))


def test_a_head_that_is_not_the_embedding_that_its_config_ties_it_to_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path, tie_word_embeddings=True)
    change(
        tmp_path, lambda actual: actual.update({"lm_head.weight": actual["model.embed_tokens.weight"] + 1})
    )
    with pytest.raises(Refusal, match=r"lm_head\.weight differ in it, .* tie_word_embeddings=false"):
        read(tmp_path)


def test_names_of_old_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    save("bloom", tmp_path)

    def shorten(actual: dict[str, Tensor]) -> None:
        for name in [name for name in actual if name.startswith("transformer.")]:
            actual[name.removeprefix("transformer.")] = actual.pop(name)

    change(tmp_path, shorten)
    whole, stages = read(tmp_path)
    assert_same(stages, whole)


def test_tensors_that_transformers_passes_over_do_not_have_the_whole_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path)
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    change(tmp_path, lambda actual: actual.update(old))
    requested = Model(name="saved", path=str(tmp_path), attention="eager")
    monkeypatch.delattr(loader, "build")
    stage.build(requested, loader.model_config(requested), torch.float32, CPU, 0, range(1))


@pytest.mark.parametrize(
    ("by", "reported"),
    [
        (lambda actual: actual.pop("model.norm.weight"), r"1 missing, model\.norm\.weight first"),
        (
            lambda actual: actual.update({"model.layers.3.mlp.up_proj.weight": torch.ones(48, 32)}),
            r"1 unexpected, model\.layers\.3\.mlp\.up_proj\.weight first",
        ),
        (
            lambda actual: actual.update({"model.norm.weight": torch.ones(31)}),
            r"1 of another shape, model\.norm\.weight \(\[31\], not \[32\]\) first",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_what_is_refused_as_a_whole_is_refused_in_the_stage_that_has_it(
    by: Callable[[dict[str, Tensor]], None], reported: str, tmp_path: Path
) -> None:
    save("llama", tmp_path / "whole")
    broken = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    change(broken, by)
    requested = Model(name="saved", path=str(broken), attention="eager")
    config = loader.model_config(requested)
    with pytest.raises(Refusal, match=reported):
        loader.build(requested, config, torch.float32, CPU, 0)
    with pytest.raises(Refusal, match=reported):
        stage.build(requested, config, torch.float32, CPU, 0, range(2, 3))
