"""QLoRA: weights in 4 bits as transformers and peft have them, frozen beside an adapter that is trained."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from harness.config.load import Refusal
from harness.ledger import Ledger
from harness.model import loader
from harness.quantization import method, nf4
from harness.runtime.world import World
from tests.training.conftest import Trained, of, train
from tests.training.test_adapter import CPU, EXPORT, FILES, by_peft, logits, losses_of, plan_of

QLORA = ("adapter=qlora", "adapter.rank=4", "adapter.targets=[q_proj,down_proj]")
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
PACKED = {"quantization_config": NF4}


def test_it_learns_bit_for_bit_what_peft_learns_beside_the_weights_that_transformers_packs(
    trained: Trained, base: Path
) -> None:
    losses, model = by_peft(base, *QLORA, **PACKED)
    results, directory = trained(*EXPORT, *QLORA)
    assert losses_of(results) == losses
    assert losses != by_peft(base, *QLORA)[0]
    written = directory / "checkpoint"
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **PACKED), written)
    for each in (opened, model):
        nf4.keep_layout(each.eval())
    assert torch.equal(logits(opened), logits(model))
    assert {each.name for each in written.glob("*model*")} == {FILES[0]}
    assert json.loads((written / FILES[1]).read_text())["base_model_name_or_path"] == str(base)
    assert results.model is not None
    assert results.model.quantization is not None
    assert results.model.quantization.bits == 4


def test_random_weights_are_packed_as_those_that_are_read(base: Path, tmp_path: Path) -> None:
    """The same weights: random ones, and a checkpoint of them."""
    plan = plan_of(base, *QLORA, "model.random=true")
    model, spec = plan.settings.model, (plan.config, torch.float32, CPU, 0)
    loader.build(model, *spec).save_pretrained(tmp_path)
    quantization = method.of_adapter(plan.settings)
    models = [
        loader.build(replace(model, path=str(place), random=random), *spec, quantization=quantization)
        for place, random in ((base, True), (tmp_path, False))
    ]
    states = [each.state_dict() for each in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(name.endswith("absmax") for name in states[0])


def test_recomputation_and_validation_change_no_bit(trained: Trained) -> None:
    plain = load_file(trained(*EXPORT, *QLORA)[1] / "checkpoint" / FILES[0])
    for more in ("checkpointing=full", "train.validate_every=1"):
        again = load_file(trained(*EXPORT, *QLORA, more)[1] / "checkpoint" / FILES[0])
        assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    trained: Trained, world: World, base: Path, tmp_path: Path
) -> None:
    words = (*EXPORT[:-1], "zero=2", "precision=bf16", *QLORA, "train.save_every=1", "train.keep=3")
    results, directory = trained(*words)
    shutil.rmtree(directory / "state" / "step-00000003")
    state = load_file(directory / "state" / "step-00000002" / "rank-00000.safetensors")
    name = "weights/model.layers.0.self_attn.q_proj.base_layer"
    assert state[f"{name}.weight"].dtype == torch.uint8
    assert state[f"{name}.quant_state.absmax"].dtype == torch.uint8
    assert state[f"{name}.quant_state.state2.absmax"].dtype == torch.float32
    resumed, _ = train(world, tmp_path, *of(base), *words, f"train.resume={directory}")
    assert losses_of(resumed) == losses_of(results)[-1:]
    files = [load_file(place / "checkpoint" / FILES[0]) for place in (directory, tmp_path)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    with pytest.raises(Refusal, match=r"adapter\.kind=lora: .* was saved with qlora"):
        train(world, tmp_path / "b", *of(base), *words, "adapter=lora", f"train.resume={directory}")


def test_the_books_close_and_packed_weights_scales_and_copies_have_their_names(base: Path) -> None:
    plan = plan_of(base, *QLORA)
    nf4.import_library()
    model = loader.build(
        *(plan.settings.model, plan.config, torch.float32, CPU, 0),
        quantization=method.of_adapter(plan.settings),
    )
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    with Ledger(model=model, mode="exact") as ledger:
        inputs = torch.zeros(2, 96, requires_grad=True)
        with ledger.phase("forward"):
            output = layer(inputs)
        with ledger.phase("backward"):
            output.sum().backward()
    assert ledger.allocator.unattributed == 0
    elements = 64 * 96
    for name, of_layer in ((".weight", elements // 2), (".quant_state.absmax", elements // 64)):
        of_both = [each for each in ledger.peak.holdings if each.name.endswith(f"mlp.down_proj{name}")]
        assert sum(each.bytes for each in of_both) == 2 * of_layer
        assert {each.category for each in of_both} == {"parameters"}
    copies = [each.bytes for each in ledger.peak.holdings if each.name.endswith("dequantize_4bit")]
    assert copies == [4 * elements]


def test_it_says_nothing_when_it_is_imported() -> None:
    code = "from harness.runtime.imports import import_peft; import_peft().LoraConfig"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
