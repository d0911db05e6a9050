"""A checkpoint's generation config is honoured or refused by name, and the command line wins over it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GenerationConfig

from harness.config.generation_fields import BOOKKEEPING, KNOWN, REFUSED
from harness.config.load import Generation, Refusal, Settings
from harness.config.rules.sources import generation_fields
from harness.config.settings import Model
from harness.config.strategy import Strategy, merged
from harness.generation.generation_config import as_record, strategy_of
from harness.model import loader
from harness.model.generation_defaults import fields_of

PATH = ("model.path", "DIR")
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "eos_token_id": 7,
}


def of(file: dict[str, Any], **requested: Any) -> Strategy:
    return merged(Generation(**requested), file, PATH)


def in_force(strategy: Strategy) -> dict[str, tuple[Any, str]]:
    return {name: (each.value, each.source) for name, each in strategy.settings.items() if not each.moot}


def test_every_field_of_transformers_is_known() -> None:
    theirs = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert theirs - {*KNOWN, *BOOKKEEPING} == set()


CHECKPOINT, TYPED, DEFAULT = "checkpoint", "command line", "default"


@pytest.mark.parametrize(
    ("file", "requested", "holds"),
    [
        ({}, {}, {"do_sample": (False, DEFAULT), "max_new_tokens": (64, DEFAULT)}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 8},
            {},
            {
                "do_sample": (True, CHECKPOINT),
                "temperature": (0.6, CHECKPOINT),
                "top_p": (0.9, CHECKPOINT),
                "top_k": (0, DEFAULT),
                "max_new_tokens": (8, CHECKPOINT),
            },
        ),
        (
            {"do_sample": True, "temperature": 0.6, "repetition_penalty": 2, "max_new_tokens": 8},
            {"temperature": 0.5, "max_new_tokens": 9, "config": {"repetition_penalty": 1.5}},
            {
                "do_sample": (True, CHECKPOINT),
                "temperature": (0.5, TYPED),
                "top_p": (1.0, DEFAULT),
                "top_k": (0, DEFAULT),
                "repetition_penalty": (1.5, TYPED),
                "max_new_tokens": (9, TYPED),
            },
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": -1},  # what is wrong there no longer matters
            {"sample": False},
            {"do_sample": (False, TYPED), "max_new_tokens": (64, DEFAULT)},
        ),
        (
            {"temperature": 0.6},
            {"sample": True, "top_k": 5},
            {
                "do_sample": (True, TYPED),
                "temperature": (0.6, CHECKPOINT),
                "top_p": (1.0, DEFAULT),
                "top_k": (5, TYPED),
                "max_new_tokens": (64, DEFAULT),
            },
        ),
        (
            {"num_beams": 4, "own_setting": 3, "max_length": 20},
            {"config": {"num_beams": 1, "own_setting": None}},
            {
                "num_beams": (1, TYPED),
                "own_setting": (None, TYPED),
                "do_sample": (False, DEFAULT),
                "max_new_tokens": (64, DEFAULT),
            },
        ),
        (
            {"max_length": 90, "min_new_tokens": 3},
            {"config": {"min_length": 5}},
            {"max_length": (90, CHECKPOINT), "min_length": (5, TYPED), "do_sample": (False, DEFAULT)},
        ),
        (
            {"max_length": 90, "max_new_tokens": 5, "eos_token_id": [3, 4]},
            {"stop_at_eos": False},
            {"max_new_tokens": (5, CHECKPOINT), "eos_token_id": (None, TYPED), "do_sample": (False, DEFAULT)},
        ),
        (
            {"use_cache": False, "pad_token_id": 0, "length_penalty": 2.0, "transformers_version": "4.1"},
            {},
            {"do_sample": (False, DEFAULT), "max_new_tokens": (64, DEFAULT)},
        ),
    ],
)
def test_the_command_line_wins_over_the_file_and_each_source_is_told(
    file: dict[str, Any], requested: dict[str, Any], holds: dict[str, Any]
) -> None:
    assert in_force(of(file, **requested)) == holds


def test_what_is_moot_is_told_with_the_reason() -> None:
    record = as_record(of({"use_cache": False, "temperature": 0.6, "num_beams": None}))
    assert record["use_cache"].tree() == {
        "value": False,
        "source": "checkpoint",
        "moot": "generation.cache= says how keys and values are kept",
    }
    assert record["temperature"].moot == "the likeliest token is always taken"
    assert "num_beams" not in record


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_with_the_override_that_then_works(name: str) -> None:
    value = {"dola_layers": "low", "constraints": [1], "stop_strings": ["."], "watermarking_config": {}}
    file = {name: value.get(name, 3)}
    with pytest.raises(Refusal) as refused:
        of(file)
    reported = str(refused.value)
    assert reported.startswith(f"model.path=DIR: its generation config has {name}=")
    override = reported.rpartition("; add ")[2]
    key, _, instead = override.partition("=")
    assert key == f"generation.config.{name}"
    of(file, config={name: json.loads(instead)})
    with pytest.raises(Refusal, match=f"^generation.config.{name}="):
        of({}, config=file)


@pytest.mark.parametrize(
    ("file", "reported"),
    [
        (
            {"own_setting": 3},
            "has own_setting=3: it is not known here; add generation.config.own_setting=null",
        ),
        (
            {"do_sample": True, "temperature": 0.0},
            "temperature=0.0: it should be greater than 0; generation.sample=false",
        ),
        ({"do_sample": "yes"}, "do_sample=yes: it should be a valid boolean; add generation.sample=false"),
        ({"max_new_tokens": 0}, "it should be greater than or equal to 1; add generation.max_new_tokens=64"),
        (
            {"repetition_penalty": -1.0},
            "it should be greater than 0; add generation.config.repetition_penalty=1.0",
        ),
        ({"bad_words_ids": [[]]}, "has bad_words_ids=[[]]: List should have at least 1 item"),
        ({"suppress_tokens": 3}, "has suppress_tokens=3: it should be a valid array"),
    ],
)
def test_a_value_of_the_file_that_cannot_be_is_refused(file: dict[str, Any], reported: str) -> None:
    with pytest.raises(Refusal) as refused:
        of(file)
    assert str(refused.value).startswith("model.path=DIR: its generation config has ")
    assert reported in str(refused.value)


@pytest.mark.parametrize(
    ("requested", "reported"),
    [
        (
            {"config": {"num_beam": 1}},
            "generation.config.num_beam=1: no such field of a generation config; did you mean generation.config.num_b",
        ),
        (
            {"config": {"zzzzz": 1}},
            "generation.config.zzzzz=1: no such field of a generation config; see transformers",
        ),
        (
            {"config": {"temperature": 0.5}},
            "generation.config.temperature=0.5: it has a key of its own; use generation.temperature=",
        ),
        ({"config": {"use_cache": False}}, "generation.config.use_cache=false: generation.cache= says"),
        ({"config": {"length_penalty": 2}}, "generation.config.length_penalty=2: it is for beam search"),
        (
            {"config": {"min_p": 0.1}},
            "generation.config.min_p=0.1: the likeliest token is always taken; add generation.sample=true",
        ),
        ({"temperature": 0.5, "sample": False}, "generation.temperature=0.5: the likeliest token is always"),
        (
            {"sample": True, "config": {"min_p": 2}},
            "generation.config.min_p=2: should be less than or equal to 1",
        ),
        ({"config": {"min_length": "5"}}, "generation.config.min_length=5: should be a valid integer"),
        (
            {"config": {"repetition_penalty": True}},
            "generation.config.repetition_penalty=true: should be a number",
        ),
        (
            {"config": {"min_length": 5, "min_new_tokens": 3}},
            "generation.config.min_length=5: min_new_tokens sets the length",
        ),
        (
            {"max_new_tokens": 5, "config": {"max_length": 9}},
            "generation.config.max_length=9: max_new_tokens sets the length",
        ),
        (
            {"stop_at_eos": False, "config": {"eos_token_id": 3}},
            "generation.config.eos_token_id=3: generation.stop_at_eos=false",
        ),
    ],
)
def test_a_wrong_request_is_refused_by_its_key(requested: dict[str, Any], reported: str) -> None:
    with pytest.raises(Refusal) as refused:
        of({}, **requested)
    assert str(refused.value).startswith(reported)


def test_the_length_counts_the_prompt_where_the_file_says_so() -> None:
    assert of({"max_length": 30}).max_new_tokens_after(12) == 18
    assert of({"max_length": 30}, max_new_tokens=4).max_new_tokens_after(12) == 4
    assert of({"max_length": 30, "max_new_tokens": 5}).max_new_tokens_after(12) == 5
    assert of({"max_new_tokens": 5}, config={"max_length": 30}).max_new_tokens_after(12) == 18


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint's config, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def read(place: Path | None, random: bool = False, **requested: Any) -> Strategy:
    shape = Model(name="test", config=SHAPE) if place is None else Model(path=str(place), random=random)
    settings = Settings(mode="infer", model=shape, generation=Generation(**requested))
    return strategy_of(settings, loader.model_config(shape))


def test_an_old_checkpoint_has_its_fields_in_the_model_s_config(checkpoint: Path) -> None:
    old = {
        **SHAPE,
        "repetition_penalty": 1.3,
        "max_length": 20,
        "num_beams": 1,
        "task_specific_params": {"top_k": 3},
    }
    (checkpoint / "config.json").write_text(json.dumps(old))
    strategy = read(checkpoint)
    assert strategy.processed == {"repetition_penalty": 1.3}
    assert strategy.ends == [7]
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert (read(checkpoint).processed, read(checkpoint).ends) == ({}, [8, 9])


def test_a_model_within_another_has_its_fields_there(checkpoint: Path) -> None:
    whole = {
        "top_p": None,
        "eos_token_id": 2,
        "text_config": {"eos_token_id": 3, "top_p": 0.5, "hidden_size": 8},
    }
    (checkpoint / "config.json").write_text(json.dumps(whole))
    assert generation_fields(str(checkpoint), KNOWN) == {"eos_token_id": 2, "top_p": 0.5}


def test_random_weights_keep_the_generation_config_of_the_path_and_a_shape_has_its_own_end(
    checkpoint: Path,
) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 9, "min_new_tokens": 3}')
    assert in_force(read(checkpoint, random=True)) == in_force(read(checkpoint))
    assert read(checkpoint).get("min_new_tokens") == 3
    assert in_force(read(None)) == {
        "eos_token_id": (7, "model"),
        "do_sample": (False, DEFAULT),
        "max_new_tokens": (64, DEFAULT),
    }


@pytest.mark.parametrize(
    ("fields", "reported"),
    [
        (
            {"bad_words_ids": [[3, 64]]},
            "bad_words_ids=[[3,64]]: it has token 64, and the model's vocabulary has 64",
        ),
        (
            {"forced_eos_token_id": 99},
            "forced_eos_token_id=99: it has token 99, and the model's vocabulary has 64",
        ),
        (
            {"exponential_decay_length_penalty": [3, 1.5]},
            "exponential_decay_length_penalty=[3,1.5]: it raises an end token",
        ),
        (
            {"suppress_tokens": [5], "forced_eos_token_id": 5},
            "forced_eos_token_id=5: transformers refuses it",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused(checkpoint: Path, fields: dict[str, Any], reported: str) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(Refusal) as refused:
        read(checkpoint)
    assert reported in str(refused.value)
    (checkpoint / "generation_config.json").write_text("{}")
    with pytest.raises(Refusal) as refused:
        read(checkpoint, config=fields)
    assert str(refused.value).startswith(f"generation.config.{reported}")


@pytest.mark.parametrize("text", ["[1]", '{"a":', ""])
def test_a_corrupt_file_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "generation_config.json").write_text(text)
    with pytest.raises(Refusal, match=r"generation.config"):
        read(checkpoint)


def test_a_trained_model_takes_the_fields_along_even_those_that_are_refused(tmp_path: Path) -> None:
    built = AutoModelForCausalLM.from_config(loader.model_config(Model(name="test", config=SHAPE)))
    built.save_pretrained(tmp_path / "first")
    end = ByT5Tokenizer().eos_token_id
    fields = {"num_return_sequences": 3, "temperature": 0.6, "own_setting": [1], "eos_token_id": [end, 6]}
    (tmp_path / "first" / "generation_config.json").write_text(json.dumps(fields))
    requested = Model(path=str(tmp_path / "first"), attention="sdpa")
    config = loader.model_config(requested)
    loaded = loader.build(requested, config, built.dtype, built.device, 0)
    loader.export(loaded, None, ByT5Tokenizer(), fields_of(requested, config), tmp_path / "second")
    assert json.loads((tmp_path / "second" / "generation_config.json").read_text()) == fields
