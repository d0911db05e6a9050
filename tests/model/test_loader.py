"""Models from shapes and from checkpoints, and back: nothing is silently random, nothing is silently dropped."""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig

from harness.config.settings import Model, Refusal
from harness.model import init_weights, loader, manifest, shape, tensor_parallel
from harness.model.generation_defaults import fields_of
from harness.model.tokenizer import of_bytes, tokenizer_of

SHAPE = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CPU = torch.device("cpu")


def settings(**more: object) -> Model:
    return Model(name="test", config={**SHAPE, **more})


def built_model(given: Model, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    decided = replace(given, attention="sdpa")
    built: torch.nn.Module = loader.build(decided, loader.model_config(given), dtype, CPU, seed)
    return built


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    built = built_model(settings(), request.param)
    loader.export(built, None, ByT5Tokenizer(), {}, tmp_path / "checkpoint")
    return built, tmp_path / "checkpoint"


@pytest.fixture
def elsewhere(exported: tuple[torch.nn.Module, Path]) -> tuple[torch.nn.Module, Path]:
    """The same as another program writes it, without a manifest."""
    (exported[1] / manifest.FILE).unlink()
    return exported


def test_the_seed_alone_decides_the_weights() -> None:
    first, again, other = built_model(settings()), built_model(settings()), built_model(settings(), seed=1)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)  # type: ignore[operator]


def test_an_export_comes_back_bit_for_bit_with_its_tokenizer(exported: tuple[torch.nn.Module, Path]) -> None:
    built, directory = exported
    dtype = next(built.parameters()).dtype
    loaded = built_model(Model(name="test", path=str(directory)), dtype)
    for (name, a), (other, b) in zip(built.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    assert AutoModelForCausalLM.from_pretrained(directory).num_parameters() == loader.count(built)
    assert AutoTokenizer.from_pretrained(directory)("abc").input_ids == ByT5Tokenizer()("abc").input_ids


@pytest.mark.parametrize(("requested", "expected"), [(None, [1]), (1, 1), (7, [1, 7]), ([7, 8], [1, 7, 8])])
def test_what_ended_the_texts_that_were_trained_on_ends_what_the_export_generates(
    requested: object, expected: object, tmp_path: Path
) -> None:
    shape = settings(eos_token_id=requested)
    fields = fields_of(shape, loader.model_config(shape))
    loader.export(built_model(shape), None, of_bytes(), fields, tmp_path / "checkpoint")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert exported.generation_config.eos_token_id == expected


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json", manifest.FILE])
def test_an_export_with_a_byte_changed_is_refused_by_its_file_and_allowed_by_hand(
    exported: tuple[torch.nn.Module, Path], name: str
) -> None:
    built, directory = exported
    content = bytearray((directory / name).read_bytes())
    content[-3 if name == "model.safetensors" else content.index(b"1")] ^= 2
    (directory / name).write_bytes(content)
    given = Model(name="test", path=str(directory))
    sentence = rf"model.path={directory}: {name} in it is not what was written.* delete {manifest.FILE} in it"
    with pytest.raises(Refusal, match=sentence):
        built_model(given, next(built.parameters()).dtype)
    (directory / manifest.FILE).unlink()
    built_model(given, next(built.parameters()).dtype)


def test_a_text_of_an_export_that_is_gone_is_named_and_a_file_that_is_more_is_nothing(
    exported: tuple[torch.nn.Module, Path],
) -> None:
    _, directory = exported
    (directory / "more.json").write_text("{}")
    given = Model(name="test", path=str(directory))
    loader.model_config(given)
    (directory / "generation_config.json").unlink()
    with pytest.raises(
        Refusal, match=r"generation_config.json in it is not what was written: it was removed"
    ):
        loader.model_config(given)


def test_every_loaded_parameter_has_memory_of_its_own_and_of_its_size(
    exported: tuple[torch.nn.Module, Path],
) -> None:
    built, directory = exported
    loaded = built_model(Model(name="test", path=str(directory)), next(built.parameters()).dtype)
    file = directory / "model.safetensors"
    with file.open("r+b") as mapped:  # what is still a view of the file changes with it
        mapped.write(bytes(file.stat().st_size))
    for (name, a), b in zip(loaded.named_parameters(), built.parameters(), strict=True):
        assert a.untyped_storage().nbytes() == a.nbytes, name
        assert a.storage_offset() == 0
        assert torch.equal(a, b), name


def test_loaded_buffers_have_their_values(exported: tuple[torch.nn.Module, Path]) -> None:
    built, directory = exported
    loaded = built_model(Model(name="test", path=str(directory)), next(built.parameters()).dtype)
    for (name, a), (_, b) in zip(built.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    built = built_model(settings(tie_word_embeddings=True))
    loader.export(built, dict(built.named_parameters()), ByT5Tokenizer(), {}, tmp_path / "tied")
    loaded = built_model(Model(name="test", path=str(tmp_path / "tied")))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight  # type: ignore[operator]
    assert loader.count(loaded) == loader.count(built)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_architecture_comes_back_from_its_state_with_the_same_logits(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    shape = (
        settings().config if kind != "gpt2" else {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 384}
    )
    built = built_model(Model(name="test", config={**shape, "model_type": kind, "tie_word_embeddings": tied}))
    state = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    loader.export(built, state, ByT5Tokenizer(), {}, tmp_path / "checkpoint")
    loaded = built_model(Model(name="test", path=str(tmp_path / "checkpoint")), seed=1)
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(tokens).logits, built.eval()(tokens).logits)
    assert loader.count(loaded) == loader.count(built)


def test_a_checkpoint_in_shards_is_the_same_checkpoint(elsewhere: tuple[torch.nn.Module, Path]) -> None:
    built, directory = elsewhere
    reshard(directory)
    loaded = built_model(Model(name="test", path=str(directory)), next(built.parameters()).dtype)
    for (name, a), (_, b) in zip(built.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_name_on_the_hub_is_loaded_from_its_safetensors(
    exported: tuple[torch.nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, directory = exported
    home = tmp_path / "hub" / "models--owner--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    shutil.copytree(directory, home / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    given = Model(name="test", path="owner/name")
    loaded = built_model(given, next(built.parameters()).dtype)
    assert torch.equal(next(loaded.parameters()), next(built.parameters()))
    assert (
        tokenizer_of(given, loader.model_config(given))("abc").input_ids == ByT5Tokenizer()("abc").input_ids
    )


def test_a_name_that_the_hub_does_not_give_is_one_sentence() -> None:
    with pytest.raises(
        Refusal, match=r"model.path=nobody/nothing: no such directory, and the hub"
    ) as refusal:
        loader.model_config(Model(name="test", path="nobody/nothing"))
    assert "\n" not in str(refusal.value)


def test_random_takes_only_the_config(exported: tuple[torch.nn.Module, Path]) -> None:
    built, directory = exported
    other = built_model(Model(name="test", path=str(directory), random=True), seed=5)
    assert loader.count(other) == loader.count(built)
    assert not torch.equal(next(other.parameters()).float(), next(built.parameters()).float())


def test_a_failed_export_leaves_nothing_at_its_place(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        loader.export(built_model(settings()), None, None, {}, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_sizes_are_counted_without_making_anything() -> None:
    given = settings()
    config = loader.model_config(given)
    outline = init_weights.outline(config, torch.bfloat16)
    buffers = sum(buffer.nbytes for buffer in outline.buffers())
    assert tensor_parallel.nbytes(outline) == 2 * loader.count(built_model(given)) + buffers


def test_a_model_larger_than_the_memory_is_refused() -> None:
    given = settings(hidden_size=2**16, num_hidden_layers=2000, intermediate_size=2**18)
    with pytest.raises(
        Refusal, match=r"model=test: its parameters are [\d.,]+ GiB in bfloat16, and the cpu has .* GiB"
    ):
        built_model(given, torch.bfloat16)


def damage_truncate(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def damage_drop(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor.clone() for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def damage_add(directory: Path) -> None:
    tensors = {name: t.clone() for name, t in load_file(directory / "model.safetensors").items()}
    save_file(
        {**tensors, "model.extra": torch.ones(3)}, directory / "model.safetensors", metadata={"format": "pt"}
    )


def damage_shape(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))


def damage_remove(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def damage_pickle(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def reshard(directory: Path) -> None:
    """The same weights in several files under an index."""
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink()


def damage_shard(directory: Path) -> None:
    reshard(directory)
    next(directory.glob("model-00002-of-*")).unlink()


def damage_index(directory: Path) -> None:
    reshard(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"model.no')


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_truncate, "model.safetensors in it is corrupt"),
        (damage_drop, "3 missing, model.layers.1.mlp.down_proj.weight first"),
        (damage_add, "1 unexpected, model.extra first"),
        (damage_shape, r"of another shape, model.*mlp.down_proj.weight \(\[32, 64\], not \[32, 96\]\) first"),
        (damage_remove, "model.safetensors is missing"),
        (damage_pickle, "pickled.*convert them"),
        (damage_shard, "model-00002-of-0000.*safetensors is missing"),
        (damage_index, "model.safetensors.index.json in it is corrupt"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_never_random(
    damage: Callable[[Path], None],
    says: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader.export(built_model(settings()), None, ByT5Tokenizer(), {}, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / manifest.FILE).unlink()  # as from elsewhere
    damage(tmp_path / "checkpoint")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    with pytest.raises(Refusal, match=f"model.path=.*{says}") as refusal:
        built_model(Model(name="test", path=str(tmp_path / "checkpoint")))
    assert "\n" not in str(refusal.value)
    assert not caplog.records


def test_a_model_that_generates_nothing_is_refused() -> None:
    with pytest.raises(Refusal, match="vit is not a causal language model"):
        loader.model_config(Model(name="test", config={"model_type": "vit"}))


def test_a_model_that_reads_ahead_is_refused() -> None:
    with pytest.raises(Refusal, match=r"model.config.model_type=bert: .*not a causal language model"):
        loader.model_config(Model(name="test", config={"model_type": "bert"}))


def test_code_that_comes_with_a_checkpoint_is_refused_and_not_run(
    elsewhere: tuple[torch.nn.Module, Path],
) -> None:
    directory = elsewhere[1]
    config = json.loads((directory / "config.json").read_text())
    theirs = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (directory / "config.json").write_text(json.dumps({**config, **theirs}))
    (directory / "theirs.py").write_text(f"open({str(directory / 'ran')!r}, 'w')")
    with pytest.raises(Refusal, match=r"model.path=.*custom code"):
        loader.model_config(Model(name="test", path=str(directory)))
    assert not (directory / "ran").exists()


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(Refusal, match=r"^model.config.model_type=no-such-model: this transformers has no "):
        loader.model_config(Model(name="test", config={"model_type": "no-such-model"}))


@pytest.mark.parametrize("around", [lambda: loader.loading("mine"), lambda: shape.building(LlamaConfig())])
def test_a_mistake_of_ours_is_never_told_as_the_user_s(
    around: Callable[[], AbstractContextManager[None]],
) -> None:
    with pytest.raises(AttributeError), around():
        loader.count(None)  # type: ignore[arg-type]
    with pytest.raises(Refusal), around():
        raise AttributeError("raised by another package")
