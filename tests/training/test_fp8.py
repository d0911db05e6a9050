"""Training whose linear layers multiply in 8 bits: torchao's, with bytes in closed books, rehearsed to the byte.

A CPU multiplies in fp8 too, though slowly: the runs here are let past the rule that refuses one, and nothing else is.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from harness.__main__ import main
from harness.advice.savings import candidates, settings_of
from harness.config.compose import compose
from harness.config.load import load
from harness.config.rules import packages
from harness.config.settings import Refusal
from harness.ledger import Ledger
from harness.ledger.patch import patched
from harness.model import init_weights
from harness.model.plan import Plan
from harness.model.resolve import resolve
from harness.model.stage import Stage
from harness.record import record_file
from harness.record.memory import Rank
from harness.record.record_file import Output, rank_record
from harness.record.results import Results
from harness.record.schema import parse
from harness.rehearsal.one_rank import rehearse
from harness.rehearsal.shims import process_world
from harness.runtime.imports import import_torchao
from harness.runtime.world import connected
from harness.training import fp8, train
from tests.training import test_compiled_layers
from tests.training.conftest import WORDS

CPU = (*WORDS, "hardware=cpu", "precision=bf16", "train.steps=2")
GPU = (*WORDS, "hardware=h100-sxm", "world=rehearsed", "world.size=1", "precision=fp8")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "check_device", lambda device, capability: None)


def plan_of(*words: str) -> Plan:
    settings = load(compose([*CPU, *words]))
    return Plan.of(replace(settings, precision="fp8"))


def real(directory: Path, *words: str) -> tuple[Rank, Results]:
    plan, results, ledger = plan_of(*words), Results(), Ledger(mode="exact", steps=3, settle_collectives=True)
    train.prove(plan, "cpu")
    with patched(*process_world()), connected("cpu", 60) as world, ledger:
        train.run(plan, world, ledger, Output(directory, lambda line: None, results, lambda: None))
    return rank_record(ledger, 0, 0, 0, None), results


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("zero=0",), id="ddp"),
        pytest.param(("zero=2", "checkpointing=selective", "loss=chunked", "loss.chunk=8"), id="zero-2"),
        pytest.param(
            ("zero=3", "checkpointing=full", "train.accumulation=2", "optimizer.state=bf16"), id="zero-3"
        ),
        pytest.param(("zero=1", "zero.offload=optimizer"), id="offload", marks=pytest.mark.exhaustive),
        pytest.param(("zero=3", "zero.offload=all"), id="all", marks=pytest.mark.exhaustive),
        pytest.param(("zero=2", "checkpointing.offload=cpu"), id="activations", marks=pytest.mark.exhaustive),
    ],
)
def test_books_close_and_a_rehearsal_has_the_bytes(tmp_path: Path, words: tuple[str, ...]) -> None:
    actual, results = real(tmp_path, *words)
    assert actual.allocator.unattributed == 0
    rehearsed, again = rehearse(plan_of(*words, "world=rehearsed", "world.size=1"), 0)
    assert bytes_of(rehearsed) == bytes_of(actual)
    assert rehearsed.traffic == actual.traffic
    assert results.model is not None
    assert again.model == results.model
    assert results.model.products is not None
    assert (results.model.products.layers, results.model.products.of) == (14, 15)
    assert results.model.products.share == pytest.approx(0.6, abs=0.2)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("on_cpu")
def test_compiled_layers_multiply_so_too_and_a_rehearsal_has_what_they_save(tmp_path: Path) -> None:
    words = ("zero=1", "model.config.num_hidden_layers=1", "train.compile=true")
    actual, results = real(tmp_path / "compiled", *words)
    _, eager = real(tmp_path / "eager", *words[:2])
    assert actual.allocator.unattributed == 0
    rehearsed, _ = rehearse(plan_of(*words, "world=rehearsed", "world.size=1"), 0)
    assert test_compiled_layers.bytes_of(rehearsed) == test_compiled_layers.bytes_of(actual)
    assert results.training is not None
    assert eager.training is not None
    for compiled, plain in zip(results.training.losses, eager.training.losses, strict=True):
        assert compiled == pytest.approx(plain, rel=2**-9)  # a rounding of bf16


def test_the_layers_of_each_stage_multiply_so_and_not_the_head() -> None:
    for number in (0, 1):
        stage = Stage(small(), range(number, number + 1))
        fp8.apply(plan_of().settings, stage.model)
        names = [
            name for name, module in stage.model.named_modules() if type(module).__name__ == "Float8Linear"
        ]
        assert len(names) == 7
        assert all(name.startswith(f"model.layers.{number}.") for name in names)
    assert type(stage.model.get_output_embeddings()) is torch.nn.Linear


def test_stages_are_rehearsed_so() -> None:
    words = ("world.size=2", "pipeline.stages=2", "train.accumulation=2")
    peaks = []
    for precision in ("fp8", "bf16"):
        plan = Plan.of(load(compose([*GPU, *words, f"precision={precision}"])))
        records = [rehearse(plan, rank)[0] for rank in (0, 1)]
        peaks.append([[phase.peak for phase in each.phases if phase.phase == "backward"] for each in records])
    for in_fp8, in_bf16 in zip(*peaks, strict=True):
        assert in_fp8 != in_bf16


def bytes_of(rank: Rank) -> list[tuple[Any, ...]]:
    """What a rehearsal has too, by phase: what kernels take by themselves is a real run's alone."""
    return [
        (each.phase, each.peak, each.saved, each.flops, {**each.categories, "kernel": None})
        for each in rank.phases
    ]


def small(**shape: int) -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes | shape, num_attention_heads=4, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def result_of(model: Any) -> list[torch.Tensor]:
    tokens = torch.arange(32).reshape(2, 16) * 7 % 96
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_loss_and_gradients_are_those_of_torchao_s_own_layers() -> None:
    torch.manual_seed(0)
    ours, theirs, plain = small(), small(), small()
    theirs.load_state_dict(ours.state_dict())
    plain.load_state_dict(ours.state_dict())
    parameters = dict(ours.named_parameters())
    fp8.apply(plan_of().settings, ours)
    import_torchao().convert_to_float8_training(theirs, module_filter_fn=lambda _, name: name != "lm_head")
    assert dict(ours.named_parameters()) == parameters
    results = [result_of(model) for model in (ours, theirs, plain)]
    for own, library, without in zip(*results, strict=True):
        assert torch.equal(own, library)
        assert not torch.equal(own, without)


def test_layers_of_other_sizes_and_the_head_stay_in_bf16() -> None:
    model = small(intermediate_size=104)  # no multiple of 16
    assert {name.rpartition(".")[2] for name in fp8.converted(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert len(fp8.converted(model)) == 8


@pytest.mark.usefixtures("on_cpu")
def test_a_run_is_resumed_bit_for_bit_and_its_checkpoint_opens_elsewhere(tmp_path: Path) -> None:
    words = ("train.steps=4", "zero=1", "train.export=true")
    _, whole = real(tmp_path / "whole", *words)
    _, first = real(tmp_path / "first", *words, "train.save_every=2")
    state = tmp_path / "first/state"
    for later in sorted(state.glob("step-*"))[1:]:
        later.rename(tmp_path / later.name)
    _, second = real(tmp_path / "second", *words, f"train.resume={tmp_path}/first")
    assert whole.training is not None
    assert first.training is not None
    assert second.training is not None
    assert first.training.losses == whole.training.losses
    assert second.training.losses == whole.training.losses[2:]
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint") for name in ("whole", "second")
    ]
    for left, right in zip(*(each.state_dict().values() for each in loaded), strict=True):
        assert torch.equal(left, right)


def test_a_gpu_is_rehearsed_and_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = {}
    for precision in ("fp8", "bf16"):
        assert main([*GPU, f"precision={precision}", f"hydra.run.dir={tmp_path}/{precision}"]) == 0
        record = record_file.read(tmp_path / precision)
        peaks[precision] = record["ranks"][0]["peak"]
    assert (
        "bfloat16, 14 of 15 linear layers (71% of its matrices) multiply in float8_e4m3fn"
        in capsys.readouterr().out
    )
    assert any("_scaled_mm" in each["name"] for each in peaks["fp8"]["holdings"])
    assert peaks["fp8"]["categories"]["parameters"] == peaks["bf16"]["categories"]["parameters"]
    assert main(["explain", f"{tmp_path}/fp8", "--no-rehearsal"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "(71% of its matrices) multiply in float8_e4m3fn, which is for speed" in said


def test_zero_3_cannot_free_the_weights_that_such_layers_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("zero=3", "world.size=8", "zero.persistence_threshold=0", "zero.prefetch_bucket_size=0")
    wide = (
        "model.config.hidden_size=512",
        "model.config.num_hidden_layers=6",
        "model.config.num_attention_heads=8",
    )
    options = tmp_path / "ds.json"
    zero = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "reduce_bucket_size": 600_000}
    options.write_text(json.dumps({"zero_optimization": zero}))
    peaks = {}
    for precision in ("fp8", "bf16"):
        out = f"hydra.run.dir={tmp_path}/{precision}"
        assert main([*GPU, *words, *wide, f"deepspeed.config={options}", f"precision={precision}", out]) == 0
        record = record_file.read(tmp_path / precision)
        peaks[precision] = max(
            each["peak"] for each in record["ranks"][0]["phases"] if each["phase"] == "forward"
        )
    layers = fp8.converted(init_weights.outline(Plan.of(load(compose([*GPU, *wide]))).config, torch.bfloat16))
    assert peaks["fp8"] - peaks["bf16"] > 0.9 * sum(layer.weight.nbytes for layer in layers.values())
    capsys.readouterr()
    assert main(["explain", f"{tmp_path}/fp8", "--no-rehearsal"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "each keeps its gathered weight for its backward" in said
    read = parse(record_file.read(tmp_path / "fp8"), "fp8")
    changes = [values for _, values, _ in candidates(read, settings_of(read, {}))]
    assert {"precision": "bf16"} in changes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("hardware=cpu",), "it is for a GPU, and this is a CPU; use bf16, or rehearse a GPU"),
        (
            ("hardware=a100-80gb",),
            "a GPU of compute capability 8 has no units for it, as from 8.9 on; use bf16",
        ),
        (("mode=infer",), "it is for training, whose products it rounds"),
        (("adapter=lora",), "an adapter's layers are not converted; use bf16, or adapter=none"),
        (("train.sequence=40",), "train.sequence=40: fp8 multiplies multiples of 16 tokens; use 48, or"),
        (("hardware=auto",), "it is for a GPU, and this is a CPU"),
        (("train.optimizer_in_backward=true",), "in bf16 DeepSpeed makes fp32 gradients of all first"),
    ],
)
def test_what_cannot_be_in_8_bits_is_refused(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(Refusal) as refused:
        load(compose([*GPU, "zero=0", *words]))
    assert sentence in str(refused.value)


def test_it_is_refused_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda package: package != "torchao")
    with pytest.raises(
        Refusal, match=r"torchao is not installed; install it with pip install 'harness\[fp8\]'"
    ):
        load(compose(list(GPU)))


@pytest.mark.parametrize(
    ("words", "device", "expected"),
    [
        (("world=rehearsed", "world.size=1", "hardware=h100-sxm"), "cuda", "gpt2 has no linear layer of 16s"),
        ((), "cpu", "it is for a GPU, and this is a CPU"),
    ],
)
def test_a_model_without_a_layer_for_it_and_a_cpu_are_refused_before_the_run(
    words: tuple[str, ...], device: str, expected: str, tmp_path: Path
) -> None:
    GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64).save_pretrained(tmp_path)
    plan = Plan.of(load(compose([*WORDS[:8], f"model.path={tmp_path}", "precision=fp8", *words])))
    with pytest.raises(Refusal, match=expected):
        fp8.prove(plan, device)


def test_a_run_that_goes_on_in_fp8_is_checked_as_one_that_begins_in_it(tmp_path: Path) -> None:
    directory = tmp_path / "state/step-00000001"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps({"identity": {"precision": "fp8"}}))
    words = ("hardware=a100-80gb", "precision=auto", f"train.resume={tmp_path}")
    with pytest.raises(Refusal, match="a GPU of compute capability 8 has no units for it"):
        resolve(load(compose([*WORDS, *words])), "cuda")
