"""What `auto` comes to: transformers' own attention, the precision that the device is good at; and it stays that."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from harness.__main__ import main
from harness.advice.savings import settings_of
from harness.config import compose
from harness.config.load import load
from harness.config.settings import Refusal, Settings
from harness.model.resolve import _precision, precision_of_cpu, resolve
from harness.record import record_file
from harness.record.schema import parse

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64},
    "gpt2": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "num_key_value_heads": 2},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bloom": {},
    "mpt": {},
    "mamba": {},
}
WITHOUT_SDPA = set(KINDS) - {"llama", "gpt2", "qwen3_moe"}


def settings_with(*words: str) -> Settings:
    return load(compose.compose(["hardware=cpu", "world=rehearsed", "world.size=1", *words]))


def of(directory: Path, *words: str) -> Settings:
    return settings_with("precision=fp32", f"model.path={directory}", "model.random=true", *words)


@pytest.fixture
def described(tmp_path: Path) -> Any:
    """A function of a kind and keys to the directory of such a model's config."""

    def put(kind: str, **more: Any) -> Path:
        AutoConfig.for_model(kind, **SMALL, **KINDS[kind]).save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
        return tmp_path

    return put


# Attention


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gets_the_attention_that_transformers_gives_it(kind: str, described: Any) -> None:
    directory = described(kind)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    plan = resolve(of(directory))
    settings, reasons = plan.settings, plan.reasons
    expected = "eager" if kind in WITHOUT_SDPA else "sdpa"
    assert settings.model.attention == theirs.config._attn_implementation == expected
    assert reasons["model.attention"].startswith(f"{expected}: transformers")


def test_a_config_that_asks_for_its_attention_gets_it_and_a_word_wins_over_it(described: Any) -> None:
    directory = described("llama", attn_implementation="eager")
    plan = resolve(of(directory))
    settings, reasons = plan.settings, plan.reasons
    assert (settings.model.attention, reasons) == (
        "eager",
        {"model.attention": "eager: the model's config requests it"},
    )
    plan = resolve(of(directory, "model.attention=sdpa"))
    settings, reasons = plan.settings, plan.reasons
    assert (settings.model.attention, reasons) == ("sdpa", {})


@pytest.mark.parametrize("wanted", ["flash_attention_2", "flex_attention", "paged|eager", "no-such"])
def test_a_config_that_asks_for_what_is_not_run_is_refused_unless_a_word_says_another(
    wanted: str, described: Any
) -> None:
    directory = described("llama", attn_implementation=wanted)
    with pytest.raises(Refusal) as refused:
        resolve(of(directory))
    assert str(refused.value) == (
        f"model.attention=auto: the model's config requests {wanted}; use model.attention=sdpa or eager"
    )
    assert resolve(of(directory, "model.attention=sdpa")).settings.model.attention == "sdpa"


@pytest.mark.parametrize("kind", sorted(WITHOUT_SDPA))
def test_sdpa_is_refused_where_there_is_none_and_eager_is_taken(kind: str, described: Any) -> None:
    directory = described(kind)
    with pytest.raises(Refusal) as refused:
        resolve(of(directory, "model.attention=sdpa"))
    assert str(refused.value) == (
        f"model.attention=sdpa: transformers has no sdpa for {kind}; use eager, or auto"
    )
    plan = resolve(of(directory, "model.attention=eager"))
    settings, reasons = plan.settings, plan.reasons
    assert (settings.model.attention, reasons) == ("eager", {})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["model.config.model_type=gemma2", "model.attention=sdpa"],
            "model.attention=sdpa: transformers has no sdpa for gemma2; use eager, or auto",
        ),
        (
            ["model.attention=flash_attention_2"],
            "model.attention=flash_attention_2: should be 'auto', 'sdpa' or 'eager'",
        ),
        (
            ["+model.config.hidden_act=sulu"],
            "model.config.hidden_act=sulu: transformers has none of that name; ",
        ),
    ],
)
@pytest.mark.parametrize("around", [[], ["world=rehearsed", "world.size=1"]], ids=["run", "rehearsal"])
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    around: list[str], words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mode=train", "hardware=cpu", *words, *around, f"hydra.run.dir={tmp_path}/out"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"harness: {sentence}")
    assert (said.err.count("\n"), said.out) == (1, "")
    assert not (tmp_path / "out").exists()


# Precision


def test_a_rehearsal_for_a_gpu_is_in_bf16_and_a_word_wins() -> None:
    gpu = ("hardware=h100-sxm", "model.attention=sdpa")
    plan = resolve(settings_with(*gpu))
    settings, reasons = plan.settings, plan.reasons
    assert (settings.precision, settings.dtype) == ("bf16", "bfloat16")
    assert reasons == {"precision": "bf16: a GPU has units for it"}
    old = resolve(settings_with("hardware=t4", *gpu[1:]))
    assert (old.settings.precision, old.reasons["precision"]) == (
        "fp32",
        "fp32: this GPU has no units for bf16",
    )
    plan = resolve(settings_with(*gpu, "precision=fp32"))
    settings, reasons = plan.settings, plan.reasons
    assert (settings.precision, settings.dtype, reasons) == ("fp32", "float32", {})


class Nothing(TorchDispatchMode):
    """Lets no operator run: what is timed differs from one start to the next."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran")


def test_a_cpu_decides_by_what_it_has_and_not_by_what_it_takes() -> None:
    with Nothing():
        value, why = _precision(settings_with(), "cpu")
    units = torch.cpu.get_capabilities() if torch.backends.mkldnn.is_available() else {}
    assert (value, why) == precision_of_cpu(units, os.environ)


@pytest.mark.parametrize(
    ("units", "limit", "expected"),
    [
        pytest.param({"avx2": True, "avx512_bf16": True}, {}, "bf16: this CPU has units for it", id="zen4"),
        pytest.param(
            {"amx_bf16": True, "avx512_bf16": False}, {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, "bf16: ", id="amx"
        ),
        pytest.param({"neon": True, "bf16": True}, {}, "bf16: ", id="graviton3"),
        pytest.param({"neon": True, "bf16": False}, {}, "fp32: this CPU has no units", id="graviton2"),
        pytest.param(
            {"avx512_f": True, "avx512_bf16": False}, {}, "fp32: this CPU has no units", id="ice-lake"
        ),
        pytest.param({}, {}, "fp32: this CPU has no units for bf16 that oneDNN uses", id="no-onednn"),
        pytest.param(
            {"avx512_bf16": True},
            {"ONEDNN_MAX_CPU_ISA": "avx2"},
            "fp32: ONEDNN_MAX_CPU_ISA=avx2 leaves",
            id="limited",
        ),
        pytest.param({"amx_bf16": True}, {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, "fp32: DNNL_", id="old-name"),
        pytest.param({"amx_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16: ", id="enough"),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_units_that_are_used(
    units: dict[str, bool], limit: dict[str, str], expected: str
) -> None:
    assert ": ".join(precision_of_cpu(units, limit)).startswith(expected)


def test_a_run_that_is_resumed_keeps_its_precision(tmp_path: Path) -> None:
    for step, precision in ((1, "bf16"), (2, "fp32")):
        directory = tmp_path / f"state/step-{step:08d}"
        directory.mkdir(parents=True)
        (directory / "manifest.json").write_text(json.dumps({"identity": {"precision": precision}}))
    (tmp_path / "state/step-00000003").mkdir()
    (tmp_path / "state/step-00000003/manifest.json").write_text("{")  # corrupt
    words = ["mode=train", "hardware=cpu", f"train.resume={tmp_path}", "model.attention=sdpa"]
    plan = resolve(load(compose.compose(words)), "cpu")
    settings, reasons = plan.settings, plan.reasons
    assert (settings.precision, reasons["precision"]) == ("fp32", "fp32: that of the run which is resumed")


# What is left of it


def test_a_record_and_its_config_have_what_ran_and_the_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *(
            "mode=infer",
            "hardware=cpu",
            "world=rehearsed",
            "world.size=1",
            "model.config.num_hidden_layers=1",
        ),
        *("generation.count=1", "generation.max_new_tokens=2"),
    ]
    assert main([*words, f"hydra.run.dir={tmp_path}/auto"]) == 0
    said = capsys.readouterr().out
    actual = record_file.read(tmp_path / "auto")
    precision = actual["config"]["precision"]
    assert actual["model"]["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[precision]
    assert actual["config"]["model"]["attention"] == "sdpa"
    assert {key: why.partition(":")[0] for key, why in actual["resolved"].items()} == {
        "precision": precision,
        "model.attention": "sdpa",
    }
    assert said.startswith(f"precision={actual['resolved']['precision']}\n")
    assert yaml.safe_load((tmp_path / "auto/config.yaml").read_text("utf-8")) == actual["config"]

    read = parse(actual, "it")
    again = settings_of(read, {})  # as `explain` rehearses it, wherever that is
    assert (again.precision, again.model.attention) == (precision, "sdpa")
    assert (read.resolved, read.value("model.attention")) == (actual["resolved"], "sdpa")
    assert main([*words, f"precision={precision}", f"hydra.run.dir={tmp_path}/said"]) == 0
    said_so = record_file.read(tmp_path / "said")
    assert said_so["resolved"].keys() == {"model.attention"}
    assert (said_so["config"], said_so["ranks"]) == (actual["config"], actual["ranks"])
    assert not capsys.readouterr().out.startswith("precision=")
