"""Models whose weights are packed: as large as their checkpoints, run as transformers does, never taken for whole."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, QuantoConfig

from harness.advice.explain import explain
from harness.analysis.summary import show
from harness.config.compose import compose
from harness.config.load import load
from harness.config.rules.quantized import AT_FIRST, AT_LOAD
from harness.config.settings import Generation, Hardware, Model, Refusal, Settings
from harness.config.settings import World as Asked
from harness.generation import infer
from harness.ledger import Ledger
from harness.ledger.owners import module_claims
from harness.ledger.tensors import tensors_in
from harness.model import init_weights, loader, storages, tensor_parallel
from harness.model.plan import Plan
from harness.model.tokenizer import of_bytes
from harness.quantization import layouts, method
from harness.record.record_file import Output
from harness.record.results import Model as Told
from harness.record.results import Results
from harness.record.schema import parse
from harness.rehearsal.one_rank import rehearse
from harness.runtime.world import World

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
}
MXFP4: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "quantization_config": MXFP4,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
QUANTO = {"quant_method": "quanto", "weights": "int8"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
    "ignore": ["lm_head"],
}


def asks(shape: dict[str, Any] | None = None, path: Path | None = None, **more: Any) -> Settings:
    """Settings that rehearse a model of `shape`, or of the checkpoint at `path`, for a GPU; real ones are for a CPU."""
    given = Model(
        name="test", path=None if path is None else str(path), config=shape or {}, attention="eager"
    )
    here = Hardware(device="cpu") if "world" in more else Hardware(device="cuda", capability=9.0)
    requested = {"mode": "infer", "world": Asked(kind="rehearsed", size=1), "hardware": here, "model": given}
    return Settings(**{"precision": "bf16", **requested, **more})


def taken(requested: Settings) -> tuple[Any, method.Quantization]:
    """The config without its quantization, and that."""
    config = loader.model_config(requested.model)
    actual = method.take(config, requested, requested.hardware.device)
    assert actual is not None
    return config, actual


def outlined(shape: dict[str, Any], **more: Any) -> PreTrainedModel:
    """The packed model of `shape` on meta."""
    requested = asks(shape, **more)
    config, actual = taken(requested)
    result = init_weights.outline(config, torch.bfloat16, "eager")
    actual.pack(result, requested.model)
    return result


# -- what is known of published checkpoints ----------------------------------------------------------------------------

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
"""Weights of a layer's matrices."""
ENDS = 2 * (2 * 128256 * 4096 + 65 * 4096)
"""Bytes of both tables and all norms in bf16."""


def packed_bytes(shape: dict[str, Any], given: dict[str, Any]) -> int:
    """Bytes of the packed model of `shape`, but for the frequencies of its positions."""
    result = outlined({**shape, "quantization_config": given})
    frequencies = sum(buffer.nbytes for name, buffer in result.named_buffers() if "inv_freq" in name)
    return int(tensor_parallel.nbytes(result) - frequencies)


def test_an_8b_in_awq_is_half_a_byte_a_weight_and_ends_that_are_whole() -> None:
    groups = LLAMA_LAYER // 128  # a scale in fp16 and a zero in half a byte
    expected = ENDS + 32 * (LLAMA_LAYER // 2 + groups * 2 + groups // 2)
    assert (
        packed_bytes(LLAMA_8B, {"quant_method": "awq", "bits": 4, "group_size": 128})
        == expected
        == 5_727_854_592
    )


def test_an_8b_in_nf4_with_double_quantization_has_a_byte_for_64_weights_and_tables_for_each_layer() -> None:
    blocks = LLAMA_LAYER // 64
    tables = 7 * (16 * 4 + 256 * 4 + 4)
    expected = ENDS + 32 * (LLAMA_LAYER // 2 + blocks + blocks // 256 * 4 + tables)
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert packed_bytes(LLAMA_8B, given) == expected


def test_an_8b_in_fp8_is_a_byte_a_weight_and_a_scale_for_128_by_128() -> None:
    expected = ENDS + 32 * (LLAMA_LAYER + LLAMA_LAYER // 128**2 * 4)
    given = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert packed_bytes(LLAMA_8B, given) == expected
    static = packed_bytes(LLAMA_8B, {**given, "activation_scheme": "static"})
    assert static == expected + 32 * 7 * 4  # and one for what each layer is given


def test_gpt_oss_20b_is_as_large_as_its_file_but_for_biases_that_are_loaded_in_fp32() -> None:
    shape = {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": False,
    }
    biases = 24 * 32 * (5760 + 2880)
    assert packed_bytes(shape, MXFP4) == 13_761_264_768 + 2 * biases


def test_qwen_7b_in_gptq_has_an_index_for_each_input_and_biases_in_fp16() -> None:
    shape = {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    inputs, biases = 6 * 3584 + 18944, 3584 + 2 * 512
    groups = layer // 128
    expected = 2 * (2 * 152064 * 3584 + 57 * 3584)
    expected += 28 * (layer // 2 + groups * 2 + groups // 2 + inputs * 4 + biases * 2)
    assert (
        packed_bytes(shape, {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False})
        == expected
    )


def test_experts_in_fp8_are_packed_and_what_routes_to_them_is_not() -> None:
    shape = {
        "model_type": "deepseek_v3",
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    }
    result = outlined({**shape, "quantization_config": {**FP8, "weight_block_size": [64, 64]}})
    experts = result.get_submodule("model.layers.1.mlp.experts")
    assert experts.gate_up_proj.shape == (8, 128, 128)
    assert experts.gate_up_proj.dtype == torch.float8_e4m3fn
    assert experts.gate_up_proj_scale_inv.shape == (8, 2, 2)
    assert experts.gate_up_proj_scale_inv.dtype == torch.float32
    assert result.get_parameter("model.layers.1.mlp.gate.weight").dtype == torch.bfloat16
    assert result.get_parameter("lm_head.weight").dtype == torch.bfloat16


# -- what stays whole --------------------------------------------------------------------------------------------------


def whole(shape: dict[str, Any], given: dict[str, Any]) -> set[str]:
    """The layers that are not packed, by their last names."""
    result = outlined({**shape, "quantization_config": given})
    return {name.rpartition(".")[2] for name, module in result.named_modules() if type(module) is nn.Linear}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (AWQ, {"lm_head"}),
        ({**AWQ, "modules_to_not_convert": ["down_proj"]}, {"lm_head", "down_proj"}),
        ({**AWQ, "quant_method": "gptq"}, {"lm_head"}),
        (
            {
                **AWQ,
                "quant_method": "gptq",
                "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]],
            },
            {"lm_head", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"},
        ),
        ({"load_in_8bit": True}, {"lm_head"}),
        (
            {"load_in_8bit": True, "llm_int8_skip_modules": ["q_proj"]},
            {"q_proj"},
        ),  # a list replaces what is usual
        (
            {**FP8, "modules_to_not_convert": ["lm_head", "model.layers.*.mlp.down_proj"]},
            {"lm_head", "down_proj"},
        ),
        (COMPRESSED, {"lm_head"}),
        (
            {**COMPRESSED, "ignore": ["re:.*self_attn", "lm_head"]},
            {"lm_head", "q_proj", "k_proj", "v_proj", "o_proj"},
        ),
        (
            {
                **COMPRESSED,
                "config_groups": {"g": {"targets": ["re:.*mlp.(up|gate)_proj$"], "weights": INT4}},
            },
            {"lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "down_proj"},
        ),
        ({"quant_method": "bitnet"}, {"lm_head"}),
        ({**QUANTO, "modules_to_not_convert": ["v_proj"]}, {"v_proj"}),
    ],
)
def test_what_a_method_leaves_whole_is_whole(given: dict[str, Any], expected: set[str]) -> None:
    assert whole(LLAMA, given) == expected


def test_a_tied_head_is_neither_packed_nor_counted_twice() -> None:
    tied = {**LLAMA, "tie_word_embeddings": True, "quantization_config": AWQ}
    result = outlined(tied)
    assert result.get_parameter("lm_head.weight") is result.get_parameter("model.embed_tokens.weight")
    apart = outlined({**tied, "tie_word_embeddings": False})
    assert tensor_parallel.nbytes(apart) - tensor_parallel.nbytes(result) == 384 * 64 * 2


def test_groups_of_layers_have_each_its_own_scheme() -> None:
    attention = {
        "targets": ["re:.*self_attn.*"],
        "weights": {**INT4, "num_bits": 8},
        "format": "int-quantized",
    }
    mixed = {**COMPRESSED, "config_groups": {"a": attention, **COMPRESSED["config_groups"]}}  # type: ignore[dict-item]
    result = outlined({**LLAMA, "quantization_config": mixed})
    assert result.get_submodule("model.layers.0.self_attn.q_proj").weight.dtype == torch.int8
    assert result.get_submodule("model.layers.0.mlp.up_proj").weight_packed.dtype == torch.int32


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is whole."""
    directory = tmp_path_factory.mktemp("plain") / "checkpoint"
    given = Model(name="test", config=LLAMA, attention="eager")
    built = loader.build(given, loader.model_config(given), torch.bfloat16, CPU, 0)
    loader.export(built, None, of_bytes(), {}, directory)
    return directory


def repacked(plain: Path, directory: Path, pack: Any, given: dict[str, Any]) -> Path:
    """A copy of the checkpoint at `plain` whose layers are as `pack` has each, by name and weight."""
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (plain / name).is_file():
            (directory / name).write_bytes((plain / name).read_bytes())
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        stored |= pack(name, weight) if "proj" in name else {name: weight}
    save_file({name: each.contiguous() for name, each in stored.items()}, directory / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": given}))
    return directory


@pytest.fixture(scope="module")
def fp8(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in fp8."""

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        out, into = weight.shape
        scales = torch.full((-(-out // 32), -(-into // 32)), 2**-8)
        return {name: (weight.float() * 2**8).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}

    return repacked(plain, tmp_path_factory.mktemp("fp8") / "checkpoint", pack, FP8)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts are in mxfp4."""
    bare = tmp_path_factory.mktemp("bare") / "checkpoint"
    given = Model(name="test", config={**GPT_OSS, "quantization_config": None}, attention="eager")
    result = loader.build(given, loader.model_config(given), torch.bfloat16, CPU, 0)
    loader.export(result, None, of_bytes(), {}, bare)

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: weight}
        experts, into, out = weight.shape
        blocks = torch.randint(256, (experts, out, into // 32, 16), dtype=torch.uint8)
        return {
            f"{name}_blocks": blocks,
            f"{name}_scales": torch.full(blocks.shape[:-1], 120, dtype=torch.uint8),
        }

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("mxfp4") / "checkpoint"
    return repacked(bare, directory, pack, MXFP4)


def refused(*words: str) -> str:
    with pytest.raises(Refusal) as refusal:
        load(compose(["mode=infer", "model=tiny", *words]))
    return str(refusal.value)


KEY = "model.config.quantization_config"
REHEARSED = ("world=rehearsed", "world.size=2")
ASKED = f"{KEY}={{quant_method:awq}}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((f"{KEY}=awq",), f"{KEY}=awq: should be null, or a mapping such as"),
        ((f"{KEY}={{bits:4}}",), f"{KEY}.quant_method=null: should name a method, as one of awq, gptq"),
        (
            (f"{KEY}.quant_method=hqq", *REHEARSED),
            f"{KEY}.quant_method=hqq: its layout is not known here, so neither is its size; "
            f"{KEY}=null leaves them unpacked",
        ),
        (
            (ASKED,),
            f"{KEY}.quant_method=awq: random weights are not packed; rehearse it, or {KEY}=null leaves them unpacked",
        ),
        (
            (ASKED, "mode=train"),
            f"{KEY}.quant_method=awq: packed weights take no gradients; {KEY}=null leaves them unpacked",
        ),
        ((ASKED, "mode=train", *REHEARSED), f"{KEY}.quant_method=awq: packed weights take no gradients"),
        (
            (ASKED, "generation.tensor_parallel=2", *REHEARSED),
            "packed weights are not shared among ranks here; use generation.tensor_parallel=1",
        ),
        (
            (ASKED, "pipeline.stages=2", *REHEARSED),
            "packed weights are not cut into stages here; use pipeline.stages=1",
        ),
        (
            (ASKED, "generation.cache=static", "generation.compile=true", *REHEARSED),
            "packed weights are not compiled here; use generation.compile=false",
        ),
        (
            (f"{KEY}={{quant_method:awq,dequantize:true}}", *REHEARSED),
            f"{KEY}.dequantize=true: transformers does not unpack awq weights as it reads them; leave it out",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_done_with_packed_weights_is_a_sentence(words: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(*words)


def test_a_checkpoint_that_is_packed_is_named_and_what_reads_it(plain: Path, tmp_path: Path) -> None:
    directory = repacked(plain, tmp_path / "awq", lambda name, weight: {name: weight}, AWQ)
    path = f"model.path={directory}"
    if importlib.util.find_spec("torchao") is None:
        given = {"quant_method": "torchao"}  # no layout of it is known here, and what reads it is
        other = repacked(plain, tmp_path / "torchao", lambda name, weight: {name: weight}, given)
        assert refused(f"model.path={other}").endswith(
            "torchao must be there to read them; pip install torchao"
        )
    if importlib.util.find_spec("gptqmodel") is None:
        reported = f"{path}: its weights are packed (awq): gptqmodel must be there to read them; pip install gptqmodel"
        assert refused(path) == reported
    remedy = (
        f"packed weights take no gradients; give a checkpoint that is whole, or model.random=true {KEY}=null"
    )
    assert refused(path, "mode=train") == f"{path}: its weights are packed (awq): {remedy}"
    reported = f"{KEY}=null: the checkpoint is packed (awq), and its weights are read; add model.random=true"
    assert refused(path, f"{KEY}=null") == reported
    reported = f"{KEY}.quant_method=gptq: the checkpoint is packed by awq, and cannot be read as another; leave it out"
    assert refused(path, f"{KEY}.quant_method=gptq") == reported


def test_the_command_line_says_over_the_checkpoint_how_weights_are_packed(
    plain: Path, tmp_path: Path
) -> None:
    directory = repacked(plain, tmp_path / "awq", lambda name, weight: {name: weight}, AWQ)
    words = ["mode=infer", f"model.path={directory}", "hardware=rtx4090", "world=rehearsed", "world.size=1"]
    changed = load(compose([*words, f"{KEY}.group_size=64"]))
    assert changed.model.config == {"quantization_config": {"group_size": 64}}
    assert dict(taken(changed)[1].quantization_config) == {**AWQ, "group_size": 64}
    requested = load(compose([*words, f"{KEY}=null"]))
    assert method.take(loader.model_config(requested.model), requested, "cuda") is None
    with pytest.raises(Refusal, match="brings a config of its own"):
        compose([*words, "model.config.hidden_size=32"])


@pytest.mark.parametrize(
    ("given", "more", "method", "reported"),
    [
        (
            {"quant_method": "awq", "group_size": 48},
            {},
            "awq",
            "group_size=48: a layer has 64 inputs, which is no",
        ),
        ({**COMPRESSED, "config_groups": {"g": ["W4A16"]}}, {}, "compressed-tensors", "config_groups.g="),
        (FP8, {}, "mxfp4", "it packs the experts of gpt-oss, and here are none"),
        (
            AWQ,
            {"model_type": "mixtral", "num_local_experts": 4},
            "awq",
            "its experts are one tensor in transformers",
        ),
        (
            {"quant_method": "bitnet", "linear_class": "autobitlinear"},
            {},
            "bitnet",
            "linear_class=autobitlinear: ",
        ),
    ],
    ids=str,
)
def test_a_layout_that_is_not_known_is_refused(given: Any, more: Any, method: str, reported: str) -> None:
    given = {"quant_method": "mxfp4"} if method == "mxfp4" else given
    with pytest.raises(Refusal) as refusal:
        outlined({**LLAMA, **more, "quantization_config": given})
    assert reported in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "reported"),
    [
        (
            {"load_in_8bit": True, "load_in_4bit": True},
            "load_in_8bit=true: transformers does not take it (load_in_4bit and load_in_8bit are both",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": "fp17"},
            "bnb_4bit_compute_dtype=fp17: transformers",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_storage": "int4"},
            "bnb_4bit_quant_storage=int4: transformers",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"},
            "bnb_4bit_quant_type=nf3: should be fp4 or nf4; ",
        ),
        ({"load_in_8bit": True, "llm_int8_threshold": "six"}, "llm_int8_threshold=six: transformers"),
        (
            {"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"},
            "llm_int8_skip_modules=lm_head: should be a list",
        ),
        (
            {"quant_method": "bitsandbytes"},
            "load_in_4bit=null: bitsandbytes packs into 4 bits or 8; say load_in_4bit",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [32]},
            "weight_block_size=[32]: transformers does not take it",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "odd"},
            "activation_scheme=odd: transformers does not take it",
        ),
        ({**AWQ, "modules_to_not_convert": 7}, "modules_to_not_convert=7: should be a list of names; "),
        (
            {**AWQ, "modules_to_not_convert": "lm_head"},
            "modules_to_not_convert=lm_head: should be a list of names; ",
        ),
        ({**AWQ, "modules_to_not_convert": [7]}, "modules_to_not_convert=[7]: should be a list of names; "),
        ({**COMPRESSED, "config_groups": 5}, "config_groups=5: should be a mapping; "),
        ({**COMPRESSED, "ignore": "lm_head"}, "ignore=lm_head: should be a list of names; "),
        (
            {"quant_method": "awq", "groupsize": 32},
            "groupsize=32: awq has no such field; did you mean group_size?",
        ),
        ({"load_in_4bit": True, "bnb_4bit_use_doublequant": True}, "did you mean bnb_4bit_use_double_quant?"),
    ],
    ids=str,
)
def test_a_field_that_no_method_can_have_is_named_with_what_would_do(given: Any, reported: str) -> None:
    with pytest.raises(Refusal) as refusal:
        outlined({**LLAMA, "quantization_config": given})
    assert reported in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_read_by_fields_that_no_method_can_have_is_refused_before_it_is_read(
    plain: Path,
) -> None:
    for mode in ("infer", "train"):
        config = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "odd"}}
        requested = asks(config, plain, mode=mode, world=Asked(), hardware=Hardware(device="cpu"))
        with pytest.raises(Refusal, match=r"activation_scheme=odd: transformers does not take it \("):
            method.take(loader.model_config(requested.model), requested, "cpu")


def test_a_method_that_transformers_does_not_know_is_not_read_as_if_weights_were_whole(plain: Path) -> None:
    config = {"quantization_config": {"quant_method": "of-tomorrow"}}
    requested = asks(
        path=plain, world=Asked(), model=Model(name="test", path=str(plain), config=config, attention="eager")
    )
    with pytest.raises(Refusal, match="this transformers knows no such method"):
        method.take(loader.model_config(requested.model), requested, "cpu")


@pytest.mark.parametrize(
    ("given", "device", "capability", "expected"),
    [
        (FP8, "cpu", None, AT_LOAD),
        (FP8, "cuda", 8.0, AT_LOAD),
        (FP8, "cuda", 8.9, None),
        (FP8, "cuda", None, None),
        ({**FP8, "dequantize": True}, "cuda", 9.0, AT_LOAD),
        ({"quant_method": "mxfp4"}, "cpu", None, AT_LOAD),
        ({"quant_method": "mxfp4"}, "cuda", 8.0, None),
        (AWQ, "cpu", None, None),
        (COMPRESSED, "cuda", 9.0, AT_FIRST),
        ({**COMPRESSED, "dequantize": True}, "cuda", 9.0, AT_LOAD),
    ],
    ids=str,
)
def test_weights_are_whole_where_nothing_computes_with_packed_ones(
    given: Any, device: Any, capability: float | None, expected: str | None
) -> None:
    here = Hardware(device=device, capability=capability)
    _, actual = taken(asks({**LLAMA, "quantization_config": given}, hardware=here))
    assert actual.whole == expected


def test_every_page_of_a_gpu_says_which_kernels_it_has() -> None:
    pages = ["rtx4090", "a100-40gb", "a100-80gb", "h100-sxm", "h200", "b200", "l40s", "mi300x"]
    actual = [load(compose(["mode=infer", f"hardware={page}"])).hardware.capability for page in pages]
    assert actual == [8.9, 8.0, 8.0, 9.0, 9.0, 10.0, 8.9, 9.4]


# -- what runs ---------------------------------------------------------------------------------------------------------


def ran(requested: Settings, directory: Path) -> tuple[Ledger, Results]:
    """A real run of `asked` in this process: its ledger and its results."""
    done = Results()
    ledger = Ledger(device="cpu", steps=requested.ledger.steps)
    with ledger:
        infer.run(
            Plan.of(requested),
            World(0, 1, 0, CPU),
            ledger,
            Output(directory, lambda line: None, done, lambda: None),
        )
    return ledger, done


def on_cpu(path: Path, **more: Any) -> Settings:
    """Two prompts on the CPU."""
    here = Hardware(device="cpu")
    requested = Generation(prompt=["def run(", "x"], max_new_tokens=3, stop_at_eos=False)
    return asks(path=path, hardware=here, generation=requested, **more)


def same_as_rehearsed(requested: Settings, directory: Path) -> dict[str, Any]:
    """Hold a real run of `asked` against its rehearsal, after the weights are read; the record's model."""
    ledger, done = ran(Settings(**{**vars(requested), "world": Asked()}), directory)
    books, reported = rehearse(Plan.of(requested), 0)
    assert done.model is not None
    assert done.model == reported.model
    assert ledger.allocator.unattributed == 0
    rehearsed = {(each["phase"], each["step"], each["micro_batch"]): each for each in books.tree()["phases"]}
    phases = [each for each in ledger.account().phases if each.where.phase in ("prefill", "decode")]
    assert len(phases) == 2
    for phase in phases:
        other = rehearsed[phase.where.phase, phase.where.step, phase.where.micro_batch]
        assert {**phase.categories, "kernel": None} == {**other["categories"], "kernel": None}
        assert (phase.peak, phase.end) == (other["peak"], other["end"])
        assert phase.work is not None
        assert phase.work.flops == other["flops"]
    return done.model.tree()


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_what_a_cpu_makes_whole_is_rehearsed_so(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reported = same_as_rehearsed(on_cpu(request.getfixturevalue(kind)), tmp_path)
    assert reported["quantization"]["method"] == kind
    assert reported["quantization"]["whole"] == AT_LOAD
    assert reported["quantization"]["bytes"] == pytest.approx(
        2 * reported["parameters"], abs=256
    )  # and frequencies


def test_weights_that_are_packed_as_they_are_read_are_rehearsed_so(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto", reason="quanto packs by optimum-quanto")
    given = Model(name="test", path=str(plain), config={"quantization_config": QUANTO}, attention="eager")
    requested = on_cpu(plain, model=given)
    config, actual = taken(requested)
    loader.build(given, config, torch.bfloat16, CPU, 0, quantization=actual)  # it makes tables once a process
    reported = same_as_rehearsed(requested, tmp_path)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    outputs = 3 * 64 + 2 * 32 + 2 * 128
    frequencies = 2 * 8 * 4
    assert reported["parameters"] == 2 * layer + 2 * 384 * 64 + 5 * 64
    assert reported["quantization"] == {
        "method": "quanto",
        "bits": 8,
        "group_size": None,
        "whole": None,
        "bytes": 2 * layer + 2 * 2 * outputs + 2 * 7 * 8 + 2 * (2 * 384 * 64 + 5 * 64) + frequencies,
    }


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "quanto"])
def test_tokens_are_those_that_transformers_generates(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options: dict[str, Any] = {}
    path = request.getfixturevalue("plain" if kind == "quanto" else kind)
    given = Model(name="test", path=str(path), attention="eager")
    if kind == "quanto":
        pytest.importorskip("optimum.quanto", reason="quanto packs by optimum-quanto")
        options["quantization_config"] = QuantoConfig(weights="int8")
        given = Model(name="test", path=str(path), config={"quantization_config": QUANTO}, attention="eager")
    ran(on_cpu(path, model=given, world=Asked()), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager", device_map={"": CPU}, **options
    )
    for line in (tmp_path / "generations.jsonl").read_text().splitlines():
        written = json.loads(line)
        tokens = torch.tensor([written["prompt_tokens"]])
        result = reference.generate(
            tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
        assert result[0, tokens.shape[1] :].tolist() == written["tokens"]


def test_what_is_trained_from_packed_weights_is_saved_whole(fp8: Path, tmp_path: Path) -> None:
    requested = asks(path=fp8, mode="train", world=Asked())
    config, actual = taken(requested)
    assert not actual.packed
    result = loader.build(requested.model, config, torch.bfloat16, CPU, 0, quantization=actual)
    loader.export(result, None, of_bytes(), {}, tmp_path / "checkpoint")
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    again = Model(name="test", path=str(tmp_path / "checkpoint"), attention="eager")
    config = loader.model_config(again)
    assert not hasattr(config, "quantization_config")
    loaded = loader.build(again, config, torch.bfloat16, CPU, 0)
    for one, other in zip(result.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_random_weights_of_a_shape_that_a_cpu_makes_whole_are_whole() -> None:
    requested = asks(GPT_OSS, hardware=Hardware(device="cpu"), world=Asked())
    config, actual = taken(requested)
    result = loader.build(requested.model, config, torch.float32, CPU, 0, quantization=actual)
    assert {each.dtype for each in result.parameters()} == {torch.float32}
    assert not hasattr(result.config, "quantization_config")  # an export would say that it is packed


def test_a_model_that_fits_packed_is_not_refused_for_what_it_would_be_whole(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = []
    monkeypatch.setattr(
        loader, "check_parameters", lambda settings, nbytes, dtype, device: needed.append(nbytes)
    )
    monkeypatch.setattr(loader, "whole_checkpoint", lambda place: (_ for _ in ()).throw(InterruptedError))
    directory = repacked(plain, tmp_path / "awq", lambda name, weight: {name: weight}, AWQ)
    for given in (AWQ, COMPRESSED):
        actual = method.Quantization(str(given["quant_method"]), given, stored=True, packed=True)
        requested = asks(path=directory)
        config, _ = taken(requested)
        with pytest.raises(InterruptedError):
            loader.build(requested.model, config, torch.bfloat16, CPU, 0, quantization=actual)
    packed = tensor_parallel.nbytes(outlined({**LLAMA, "quantization_config": AWQ}))
    config, _ = taken(asks({**LLAMA, "quantization_config": AWQ}))
    assert needed == [
        packed,
        tensor_parallel.nbytes(init_weights.outline(config, torch.bfloat16)),
    ]  # the other: at its first forward


def test_packed_weights_that_are_made_whole_at_the_first_forward_are_rehearsed_so() -> None:
    requested = asks(
        {**LLAMA, "quantization_config": COMPRESSED},
        hardware=Hardware(device="cpu"),
        generation=Generation(count=1, max_new_tokens=2),
    )
    books, done = rehearse(Plan.of(requested), 0)
    measured = {each.phase: each.categories["parameters"] for each in books.phases}
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    scales = 2 * (layer // 32 * 2 + 7 * 16)  # and shapes
    ends = 2 * (2 * 384 * 64 + 5 * 64) + 2 * 8 * 4
    assert done.model is not None
    assert done.model.quantization is not None
    assert done.model.quantization.whole == AT_FIRST
    assert done.model.quantization.bytes == measured["setup"] == 2 * layer // 2 + scales + ends
    assert measured["decode"] == 2 * layer * 2 + scales + ends


def test_packed_weights_that_a_module_around_them_would_draw_are_rehearsed(tmp_path: Path) -> None:
    shape = {
        "vocab_size": 512,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "multi_query": True,
    }
    config = AutoConfig.for_model("gpt_bigcode", **shape, bos_token_id=0, eos_token_id=0).to_dict()
    packs = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": packs}))
    requested = asks(path=tmp_path, generation=Generation(count=1, max_new_tokens=2, prompt_length=16))
    _, done = rehearse(Plan.of(requested), 0)
    assert done.model is not None
    assert done.model.quantization is not None
    whole = init_weights.outline(AutoConfig.for_model("gpt_bigcode", **shape), torch.bfloat16)
    linear = [each for each in whole.transformer.h.modules() if isinstance(each, nn.Linear)]
    packed = sum(each.weight.numel() for each in linear)
    others = 2 * (sum(each.numel() for each in whole.parameters()) - packed)
    assert packed / 2 < done.model.quantization.bytes - others < 0.7 * packed  # with a scale for 64 of them


# -- against the libraries themselves, where they are ------------------------------------------------------------------

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("package", "given"),
    [
        ("bitsandbytes", NF4),
        ("bitsandbytes", {**NF4, "bnb_4bit_use_double_quant": True}),
        ("bitsandbytes", {"load_in_8bit": True}),
        ("optimum.quanto", {"quant_method": "quanto", "weights": "int4"}),
    ],
    ids=str,
)
def test_a_library_packs_into_as_many_bytes(package: str, given: dict[str, Any], plain: Path) -> None:
    pytest.importorskip(package, reason=f"{package} is not in the test environment: it was compared by hand")
    requested = asks(
        path=plain,
        world=Asked(),
        model=Model("test", str(plain), attention="eager", config={"quantization_config": given}),
    )
    config, actual = taken(requested)
    loaded = loader.build(requested.model, config, torch.bfloat16, CPU, 0, quantization=actual)
    assert storages.nbytes(loaded) == tensor_parallel.nbytes(
        outlined({**LLAMA, "quantization_config": given})
    )


@pytest.mark.parametrize(
    ("package", "given"),
    [
        ("gptqmodel", {**AWQ, "zero_point": True}),
        ("gptqmodel", {**AWQ, "quant_method": "gptq", "sym": True, "desc_act": False}),
        ("compressed_tensors", COMPRESSED),
    ],
    ids=str,
)
def test_a_library_reads_a_checkpoint_of_its_layout(
    package: str, given: Any, plain: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package, reason=f"{package} is not in the test environment: it was compared by hand")
    scheme = next(layouts.groups(given), given)

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        out, into = weight.shape
        layout = layouts.LAYOUTS[given["quant_method"]](scheme, layouts.Linear(out, into, torch.bfloat16))
        tensors = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in layout.items()}
        if "weight_shape" in tensors:
            tensors["weight_shape"] = torch.tensor([out, into])
        return {f"{name.removesuffix('weight')}{key}": each for key, each in tensors.items()}

    directory = repacked(plain, tmp_path / "packed", pack, given)
    requested = asks(path=directory, world=Asked())
    config, actual = taken(requested)
    loaded = loader.build(requested.model, config, torch.bfloat16, CPU, 0, quantization=actual)
    kernels = sum(each.nbytes for name, each in loaded.named_buffers() if "wf_unsqueeze" in name)
    result = outlined({**LLAMA, "quantization_config": given})
    assert storages.nbytes(loaded) == tensor_parallel.nbytes(result) + kernels


# -- what the ledger sees of them --------------------------------------------------------------------------------------


class State:
    """What a library hides scales in."""

    def __init__(self) -> None:
        self.scales, self.more = torch.ones(7), None


class Hiding(nn.Linear):
    """A layer as bitsandbytes has it: scales are in an attribute of its weight, and of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.state = State()  # type: ignore[attr-defined]
        self.table = [torch.ones(3)]
        self.alias = self.weight.data


def test_scales_in_attributes_of_a_packed_layer_are_parameters() -> None:
    layer = nn.Sequential(Hiding(), nn.Linear(4, 4, bias=False))
    layer[1].last = torch.ones(100)
    claims = {name: measured.numel() for _, name, measured in module_claims(layer)}
    assert claims == {"0.weight": 8, "1.weight": 16, "0.weight.state.scales": 7, "0.table": 3, "0.alias": 8}
    assert storages.nbytes(layer) == 8 + 16 * 4 + 7 * 4 + 3 * 4
    with Ledger(model=layer) as ledger:
        pass
    assert ledger.categories["parameters"].end == storages.nbytes(layer)


class Kernels(nn.Module):
    """A layer as transformers' mxfp4 leaves it on a GPU: no parameter, and its weight three attributes deep."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = SimpleNamespace(storage=SimpleNamespace(data=torch.zeros(5, dtype=torch.uint8)))


def test_what_transformers_keeps_in_objects_of_its_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*module_claims(Kernels())] == []
    monkeypatch.setattr(Kernels, "__module__", "transformers.integrations.mxfp4")
    claims = [(name, measured.numel()) for _, name, measured in module_claims(Kernels())]
    assert claims == [("weight.storage.data", 5)]


class Wrapping(torch.Tensor):
    """A tensor that is made of another and does not say so."""

    within: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapping":
        result: Wrapping = torch.Tensor._make_wrapper_subclass(cls, (8, 8))
        result.within = inner
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError


def test_a_tensor_that_wraps_another_is_as_large_as_that() -> None:
    inner = torch.zeros(3)
    assert [each is inner for each in tensors_in([Wrapping(inner)])] == [True]


def test_what_was_read_has_memory_of_its_own_and_what_was_one_stays_one() -> None:
    layer = Hiding()
    layer.hf_quantizer = True  # type: ignore[assignment]
    layer.weight.data = torch.zeros(100, dtype=torch.uint8)[10:18].view(8, 1)
    layer.alias = layer.weight.data
    before = layer.weight.data_ptr()
    storages.give_own_storage(layer)
    assert layer.weight.data_ptr() == layer.alias.data_ptr() != before
    assert layer.weight.untyped_storage().nbytes() == 8


# -- what the record comes to ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("whole", "expected"), [(None, 700 - 20), (AT_FIRST, 2 * 990), (AT_LOAD, 2 * 990)])
def test_a_token_reads_packed_weights_and_no_more(whole: str | None, expected: int) -> None:
    packed = {"method": "awq", "bits": 4, "whole": whole, "bytes": 700}
    reported = {"name": "m", "parameters": 1000, "embeddings": 10, "dtype": "float16", "quantization": packed}
    assert Told.model_validate(reported).matrices == expected


@pytest.mark.parametrize("whole", [None, AT_FIRST, AT_LOAD])
def test_a_record_tells_of_packed_weights_and_when_they_are_whole(whole: str | None) -> None:
    packed = {"method": "awq", "bits": 4, "group_size": 128, "whole": whole, "bytes": 2**20}
    reported = {"name": "m", "parameters": 1000, "dtype": "float16", "quantization": packed}
    around = {"size": 1, "device": "cpu"}
    written = {"status": "complete", "mode": "infer", "world": around, "model": reported, "ranks": []}
    line = show(written).splitlines()
    assert line[0] == "infer m: 1,000 parameters, float16, awq 4 bits, 1 x cpu"
    took = ", 1.0 MiB" if whole == AT_FIRST else ""
    expected = f"its weights (awq 4 bits{took}) are unpacked {whole}: transformers computes with them so here"
    assert (expected in line) == (whole is not None)
    actual = [each.sentence for each in explain(parse(written, "it")) if each.kind == "packed"]
    sentence = f"The checkpoint's weights are packed (awq 4 bits), and transformers unpacks them {whole}"
    assert [each.startswith(sentence) for each in actual] == [True] * (whole is not None)


def test_awq_on_a_gpu_computes_in_fp16() -> None:
    _, actual = taken(asks({**LLAMA, "quantization_config": AWQ}))
    requested = [(dtype, device) for dtype in (torch.bfloat16, torch.float32) for device in ("cuda", "cpu")]
    expected = [torch.float16, torch.bfloat16, torch.float32, torch.float32]
    assert [actual.dtype(*each) for each in requested] == expected
