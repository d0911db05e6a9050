"""A model says the same from a cache and in a batch as alone, or the request is refused with what would do."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from transformers import AutoConfig

from harness.config.settings import Generation, Model, Refusal, Settings
from harness.generation.cache_check import AHEAD, difference, prove
from harness.model.kv_cache import check_kind
from harness.model.plan import Plan

ALIBI = {"alibi": True}
SAME: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "static", {}),
    ("gpt2", "static", {}),
    ("mpt", "static", {}),  # whose class is not made to be compiled
    ("mistral", "static", {}),
    ("gpt_neo", "dynamic", {}),
    ("falcon", "dynamic", ALIBI),
    ("qwen3_next", "static", {}),
    ("jamba", "dynamic", {}),
    ("mamba", "none", {}),
]
OTHERS: list[tuple[str, str, bool, dict[str, Any], str]] = [
    ("gpt_neo", "static", False, {}, "logits differ by up to "),  # its window is counted from the room's end
    ("bloom", "static", True, {}, "there it fails (RuntimeError: The expanded size of the tensor (14) must"),
    ("falcon", "static", True, ALIBI, "there it fails (RuntimeError: The size of tensor a (14) must match"),
    ("moshi", "dynamic", False, {}, "logits differ by up to "),  # only a cache keeps to its window
    ("recurrent_gemma", "none", True, {}, "logits differ by up to "),  # its state takes padding in
    ("bert-generation", "none", False, {}, AHEAD),
    ("xlnet", "none", False, {}, AHEAD),
]


def reason_of(kind: str, cache: str, mixed: bool, **more: Any) -> str | None:
    shape = json.dumps(AutoConfig.for_model(kind, **more).to_dict(), sort_keys=True)
    return difference(shape, "eager", cache, mixed)


@pytest.mark.parametrize(("kind", "cache", "more"), SAME)
def test_a_model_that_is_the_same_is_taken(kind: str, cache: str, more: dict[str, Any]) -> None:
    assert reason_of(kind, cache, True, **more) is None


@pytest.mark.parametrize(("kind", "cache", "mixed", "more", "reason"), OTHERS)
def test_a_model_that_is_not_is_found_and_how_it_differs_is_said(
    kind: str, cache: str, mixed: bool, more: dict[str, Any], reason: str
) -> None:
    actual = reason_of(kind, cache, mixed, **more)
    assert actual is not None
    assert actual.startswith(reason)


def test_what_only_padding_changes_is_the_same_without() -> None:
    assert reason_of("bloom", "static", False) is None
    assert reason_of("recurrent_gemma", "dynamic", False) is None


def settings_of(
    kind: str, shape: Mapping[str, Any] | None = None, mode: Any = "infer", **generation: Any
) -> Settings:
    model = Model(name="mine", attention="eager", config={"model_type": kind, **(shape or {})})
    return Settings(mode=mode, precision="fp32", model=model, generation=Generation(**generation))


MIXED: dict[str, Any] = {"lengths": "uniform"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            settings_of("gpt_neo", cache="static"),
            "generation.cache=static: gpt_neo gives other results with it: .*; use generation.cache=dynamic$",
        ),
        (settings_of("moshi"), "generation.cache=dynamic: moshi gives .*; use generation.cache=none$"),
        (
            settings_of("moshi", cache="offloaded"),
            "generation.cache=offloaded: .*; use generation.cache=none$",
        ),
        (
            settings_of("bloom", cache="static", **MIXED),
            "generation.cache=static: .*; use generation.cache=dynamic$",
        ),
        (
            settings_of("recurrent_gemma", **MIXED),
            "generation.batch=4: recurrent_gemma gives other results where a prompt is padded .*; use 1$",
        ),
        (
            settings_of(
                "recurrent_gemma", {"num_hidden_layers": 2}, **MIXED
            ),  # of those that attend it has none
            "generation.cache=dynamic: recurrent_gemma .*; use generation.cache=none generation.batch=1$",
        ),
        (
            settings_of("mpt", cache="paged", batching="continuous"),
            "generation.batching=continuous: .* use generation.batching=static generation.cache=dynamic$",
        ),
        (
            settings_of("mpt", cache="static", compile=True),
            "generation.compile=true: .*mpt as compilable; use generation.compile=false$",
        ),
        (
            settings_of("xlnet", cache="none"),
            "model.config.model_type=xlnet: xlnet is not a causal language model: .*",
        ),
        (
            settings_of("bert-generation", mode="train"),
            "model.config.model_type=bert-generation: .*; say is_decoder=true in its config$",
        ),
        (
            settings_of("deepseek_v4", cache="static"),
            "generation.cache=static: transformers makes none for deepseek_v4",
        ),
    ],
)
def test_what_differs_is_refused_by_its_key_with_what_would_do(settings: Settings, sentence: str) -> None:
    with pytest.raises(Refusal) as refused:
        prove(Plan.of(settings))
    assert "\n" not in str(refused.value)
    with pytest.raises(Refusal, match=sentence):
        prove(Plan.of(settings))


@pytest.mark.parametrize(
    "settings",
    [
        settings_of("gpt_neo"),
        settings_of("bloom", cache="static"),  # all prompts are of one length
        settings_of("bloom", cache="static", batch=1, **MIXED),
        settings_of("recurrent_gemma", batch=1, **MIXED),
        settings_of("mpt", cache="static"),
        settings_of("llama", cache="static", compile=True, **MIXED),
        settings_of("llama", mode="train"),
    ],
)
def test_what_is_right_is_allowed(settings: Settings) -> None:
    prove(Plan.of(settings))


def test_a_cache_that_transformers_cannot_make_is_refused_before_the_model_is_made() -> None:
    with pytest.raises(
        Refusal, match=r"generation\.cache=static: .*deepseek_v4 \(KeyError: .*cache=dynamic$"
    ):
        check_kind("static", AutoConfig.for_model("deepseek_v4", num_hidden_layers=4))
