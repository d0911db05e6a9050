"""A model cut into stages: every weight is somewhere and is the whole's, and the stages in a row are the whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from harness import Ledger
from harness.config.settings import Model, Refusal
from harness.model import init_weights, loader, stage, stage_check
from harness.model.kv_cache import make
from harness.model.partition import ranges
from harness.model.stage import Stage, Uncuttable

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 150,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
WIDER = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, **WIDER},
    "llama-tied": {**SIZES, **WIDER, "tie_word_embeddings": True},
    "qwen3": {**SIZES, **WIDER},
    "mixtral": {**SIZES, **WIDER, "num_local_experts": 4},
    "gemma2": {**SIZES, **WIDER, "sliding_window": 4},
    "falcon": SIZES,
    "bloom": {"vocab_size": 150, "hidden_size": 32, "n_layer": 4, "n_head": 4},
}
SPLITS = ([4], [2, 2], [1, 2, 1], [1, 1, 1, 1])


def config_of(name: str) -> PretrainedConfig:
    return AutoConfig.for_model(name.partition("-")[0], **{**SHAPES[name], **NO_TOKENS})


def settings_of(name: str) -> Model:
    shape = {"model_type": name.partition("-")[0], **SHAPES[name], **NO_TOKENS}
    return Model(name=name, config=shape, attention="eager")


def whole_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    return loader.build(settings_of(name), config_of(name), dtype, CPU, seed).eval()


def stages_of(name: str, split: list[int], dtype: torch.dtype = torch.float32) -> list[Stage]:
    built = (stage.build(settings_of(name), config_of(name), dtype, CPU, 0, each) for each in ranges(split))
    return [each.eval() for each in built]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_weights_and_buffers_of_a_stage_are_those_of_the_whole(name: str, dtype: torch.dtype) -> None:
    whole = whole_of(name, dtype)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    buffers = dict(whole.named_buffers())
    for part in stages_of(name, [1, 2, 1], dtype):
        for key, parameter in part.owned().items():
            assert torch.equal(parameter, expected[key]), key
        for key, buffer in part.model.named_buffers():
            assert torch.equal(buffer, buffers[key]), key


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_is_in_one_stage_and_a_tied_one_in_the_first_and_the_last(
    name: str, split: list[int]
) -> None:
    whole = init_weights.outline(config_of(name), torch.float32)
    stages = stages_of(name, split)
    owned = [set(each.owned()) for each in stages]
    every = {key for key, _ in whole.named_parameters()}
    assert set().union(*owned) == every
    tied = {key for key in every if sum(key in part for part in owned) > 1}
    assert tied == (set(stages[0].tied) if len(split) > 1 else set())
    assert tied <= owned[0] & owned[-1]
    actual = [[(tuple(p.shape)) for p in part.values()] for part in stage.parts(whole, split)]
    if len(split) > 1:
        assert actual == [[tuple(p.shape) for p in each.parameters()] for each in stages]


KEPT = [(name, kept) for name in SHAPES for kept in ("none", "dynamic", "static")]
KEPT.remove(("bloom", "static"))  # refused where prompts are padded


@pytest.mark.parametrize(("name", "kept"), KEPT)
def test_stages_in_a_row_give_what_the_whole_gives(name: str, kept: str) -> None:
    whole, stages = whole_of(name), stages_of(name, [1, 2, 1])
    tokens = torch.arange(20).reshape(2, 10) * 7 % 149 + 1
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [make(kept, each.config, 10) for each in stages]
    whole_cache = make(kept, whole.config, 10)
    spans = [(0, 10)] if kept == "none" else [(0, 7), (7, 8), (8, 10)]
    with torch.no_grad():
        for begin, end in spans:
            given = tokens[:, begin:end]
            reported = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            expected = whole(
                input_ids=given, past_key_values=whole_cache, use_cache=whole_cache is not None, **reported
            ).logits
            for each, cache in zip(stages, caches, strict=True):
                given = each(given, mask[:, :end], positions[:, begin:end], cache)
            assert torch.equal(given, expected)


def test_a_stage_keeps_its_layers_names_and_a_cache_of_its_own_layers() -> None:
    _, middle, last = stages_of("gemma2", [1, 2, 1])
    assert {key.split(".")[2] for key in middle.owned()} == {"1", "2"}
    assert middle.config.num_hidden_layers == 2
    assert middle.config.layer_types == config_of("gemma2").layer_types[1:3]
    assert len(make("dynamic", middle.config, 8).layers) == 2  # type: ignore[union-attr]
    assert (middle.first, middle.last, last.last) == (False, False, True)
    assert not any("embed" in key or "lm_head" in key for key in middle.owned())


def test_layers_of_one_kind_are_known_as_such() -> None:
    alike = stage.layer_kinds(init_weights.outline(config_of("llama"), torch.float32))
    assert len(set(alike)) == 1
    by_turns = stage.layer_kinds(
        init_weights.outline(config_of("gemma2"), torch.float32)
    )  # sliding and full attention
    assert by_turns[0] == by_turns[2] != by_turns[1] == by_turns[3]


def test_a_model_without_a_list_of_layers_is_no_model_to_cut() -> None:
    whole = init_weights.outline(config_of("llama"), torch.float32)
    whole.config.num_hidden_layers = 5
    with pytest.raises(Uncuttable, match="its 5 layers are not in one list"):
        stage.layers_of(whole)


def test_layers_that_share_parameters_are_not_cut() -> None:
    whole = init_weights.outline(config_of("llama"), torch.float32)
    _, layers = stage.layers_of(whole)
    layers[1].input_layernorm = layers[0].input_layernorm
    with pytest.raises(Uncuttable, match="share parameters"):
        Stage(whole, range(2))


@pytest.fixture(params=["llama", "llama-tied", "mixtral"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A checkpoint in several files, and the model that was saved."""
    built = whole_of(request.param, seed=5)
    built.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 2
    return tmp_path / "checkpoint", AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")


def read(directory: Path, split: list[int]) -> list[Stage]:
    requested = Model(name="saved", path=str(directory), attention="eager")
    config = loader.model_config(requested)
    return [stage.build(requested, config, torch.float32, CPU, 0, each) for each in ranges(split)]


@pytest.mark.parametrize("split", [[2, 2], [1, 2, 1]], ids=str)
def test_a_checkpoint_comes_into_stages_as_into_the_whole(
    saved: tuple[Path, PreTrainedModel], split: list[int]
) -> None:
    directory, whole = saved
    expected = dict(whole.named_parameters(remove_duplicate=False))
    for part in read(directory, split):
        for key, parameter in part.owned().items():
            assert torch.equal(parameter, expected[key]), key


def test_a_checkpoints_file_is_no_memory_of_the_stage_that_reads_it(tmp_path: Path) -> None:
    whole_of("llama").save_pretrained(tmp_path / "whole")
    file = (tmp_path / "whole/model.safetensors").stat().st_size
    requested = Model(name="saved", path=str(tmp_path / "whole"), attention="eager")
    with Ledger(device="cpu") as ledger:
        part = stage.build(requested, loader.model_config(requested), torch.float32, CPU, 0, range(1))
        ledger.own(model=part.model)
    measured = sum(parameter.nbytes for parameter in part.parameters())
    assert ledger.allocator.unattributed == 0
    assert ledger.peak.bytes < measured + file // 2


def test_a_checkpoint_without_a_tensor_of_a_stage_is_refused(tmp_path: Path) -> None:
    whole_of("llama").save_pretrained(tmp_path / "whole")
    broken = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"model\.path="):
        read(broken, [2, 2])
    assert json.loads((broken / "config.json").read_text())["num_hidden_layers"] == 4


def test_proof_and_stages_agree_on_every_shape() -> None:
    for name in SHAPES:
        shape = json.dumps(config_of(name).to_dict(), sort_keys=True)
        assert stage_check.difference(shape, "eager", "float32", "dynamic", (1, 2, 1)) is None, name
