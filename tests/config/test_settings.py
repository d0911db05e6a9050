"""Words become typed settings, and each wrong request is one sentence with its key, its value and what would work."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harness.config import compose
from harness.config.load import Refusal, Settings, Train, load
from harness.config.rules import check_world, optimizer
from harness.config.settings import described_fields

MODELS = compose.groups()["model"]
EARLY, WHOLE = "train.optimizer_in_backward=true", "zero=0 precision=fp32"


def settings(*words: str) -> Settings:
    return load(compose.compose(words))


def refusal(*words: str) -> str:
    with pytest.raises(Refusal) as refused:
        settings(*words)
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("word", "trackers"),
    [
        ("tracker=none", []),
        ("tracker=null", []),
        ("tracker=[]", []),
        ("tracker=wandb", ["wandb"]),
        ("tracker=[wandb,mlflow,wandb]", ["wandb", "mlflow"]),
    ],
)
def test_a_tracker_is_a_name_or_a_list_of_them(word: str, trackers: list[str]) -> None:
    assert settings(word).tracker == trackers


def test_nothing_said_is_a_training_run_of_the_declared_defaults() -> None:
    loaded = settings()
    assert loaded.mode == "train"
    assert loaded.train == Train()
    assert loaded.model.name == "tiny"


def test_every_key_that_help_lists_can_be_overridden_by_its_own_default() -> None:
    given = [
        f"{key}={json.dumps(field.default)}"
        for key, field in described_fields().items()
        if not key.startswith("model.")
    ]
    written = settings(*given)
    assert dataclasses.replace(written, model=settings().model, hardware=settings().hardware) == settings()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_zero_option_sets_the_stage(stage: int) -> None:
    assert settings(f"zero={stage}").zero.stage == stage


def test_a_group_and_a_key_in_it_combine() -> None:
    loaded = settings(
        "zero=3", "zero.offload=all", "zero.reduce_bucket_size=5e5", "ledger=off", "data=hub", "data.name=a/b"
    )
    assert (loaded.zero.stage, loaded.zero.offload, loaded.zero.reduce_bucket_size) == (3, "all", 500_000)
    assert loaded.ledger.mode == "off"
    assert (loaded.data.kind, loaded.data.name) == ("hub", "a/b")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().train.steps = 3  # type: ignore[misc]


def test_text_is_taken_as_it_is_typed(tmp_path: Path) -> None:
    file = tmp_path / "a, b=(c) [d].txt"
    file.write_text("text")
    loaded = settings("data=text", f"data.path={file}", "generation.prompt=Once, upon a (time")
    assert loaded.data.path == str(file)
    assert loaded.generation.prompt == ["Once, upon a (time"]


def test_several_prompts_are_a_list() -> None:
    assert settings("generation.prompt=['a, b','c']").generation.prompt == ["a, b", "c"]


def test_a_key_of_a_model_config_can_be_changed_or_added() -> None:
    loaded = settings("model.config.num_hidden_layers=2", "+model.config.attention_bias=true")
    assert loaded.model.config["num_hidden_layers"] == 2
    assert loaded.model.config["attention_bias"] is True


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train.stepz=3", "train.stepz=3: no such key; did you mean train.steps?"),
        ("+train.stepz=3", "train.stepz=3: no such key; did you mean train.steps?"),
        ("trian.steps=3", "trian.steps=3: no such key; did you mean train.steps?"),
        ("stage=3", "stage=3: no such key; did you mean zero.stage?"),
        ("xyz.qqq=3", "xyz.qqq=3: no such key; --help lists them all"),
        ("modl=tiny", "modl=tiny: no such key; did you mean mode"),
        (
            "model=gpt2 model.config.n_hed=3",
            "model.config.n_hed=3: no such key; did you mean model.config.n_head?",
        ),
        (
            "model.config.model_type=mpt model.config.max_seq_len=32",
            "model.config.max_seq_len=32: no such key; did you mean model.config.vocab_size? "
            "Where a model's config has it, ++model.config.max_seq_len= adds it",
        ),
        (
            "model.config.rope_parameters={rope_type:linear,factor:2.0}",
            "model.config.rope_parameters={rope_type:linear,factor:2.0}: the group's shape does not have all of it; "
            "add new keys as ++model.config.rope_parameters=",
        ),
        ("train=5", "train=5: is a group of keys; set one of them, as train.steps="),
        ("zero=4", "zero=4: no such option; one of 0, 1, 2, 3"),
        ("model=huge", "model=huge: no such option; one of gpt2, "),
        ("mode=trian", "mode=trian: should be 'train' or 'infer'"),
        ("tracker=wand", "tracker=wand: should be 'tensorboard', 'wandb' or 'mlflow'"),
        ("tracker=[[wandb]]", "tracker=[wandb]: should be 'tensorboard', 'wandb' or 'mlflow'"),
        ("tracker=[{a:1}]", "tracker={a:1}: should be 'tensorboard', 'wandb' or 'mlflow'"),
        ("tracker=[wandb,csv]", "tracker=csv: should be 'tensorboard', 'wandb' or 'mlflow'"),
        ("tracker.name=x", "tracker.name=x: tracker is a list; give it as a whole, as tracker=[a,b]"),
        ("checkpointing.layers.0=1", "checkpointing.layers.0=1: checkpointing.layers is a list; give it "),
        ("tracker={a:1}", "tracker={a:1}: should be a valid list, as [a,b]"),
        ("checkpointing=some", "checkpointing=some: no such option; one of full, none, selective"),
        ("loss=nonsense", "loss=nonsense: no such option; one of chunked, full, fused"),
        ("zero.offload=some", "zero.offload=some: should be 'none', 'optimizer' or 'all'"),
        ("checkpointing.offload=nvme", "checkpointing.offload=nvme: should be 'none' or 'cpu'"),
        (
            "generation.cache=page",
            "generation.cache=page: should be 'dynamic', 'static', 'paged', 'quantized', 'offloaded' or 'none'",
        ),
        ("train.steps=many", "train.steps=many: should be a valid integer, 1 or more"),
        ("train.steps=1.5", "train.steps=1.5: should be a valid integer, 1 or more"),
        ("train.steps=null", "train.steps=null: should be a valid integer, 1 or more"),
        ("train.steps=inf", "train.steps=inf: should be a valid integer, 1 or more"),
        ("train.steps=1e300", "train.steps=1e+300: should be a valid integer, 1 or more"),
        ("train.steps=[3]", "train.steps=[3]: should be a valid integer, 1 or more"),
        ("train.steps={a:3}", "train.steps={a:3}: should be a valid integer, 1 or more"),
        ("train.steps=true", "train.steps=true: should be a number, and no true or false"),
        ("seed=abc", "seed=abc: should be a valid integer, 0 or more and below 4294967296"),
        ("generation.top_p=high", "generation.top_p=high: should be a valid number, above 0 and 1 or less"),
        ("train.clip=", "train.clip=: should be a valid number, 0 or more"),
        ("train.export=maybe", "train.export=maybe: should be a valid boolean, true or false"),
        ("checkpointing.layers=1", "checkpointing.layers=1: should be a valid list, as [a,b]"),
        ("checkpointing.layers={a:1}", "checkpointing.layers={a:1}: should be a valid list, as [a,b]"),
        (
            "model.config=3",
            "model.config=3: should be a valid dictionary; set a key of it, as model.config.NAME=",
        ),
        ("model.config=[3]", "model.config=[3]: should be "),
        ("data.tokenizer=[a]", "data.tokenizer=[a]: should be a valid string"),
        ("data.tokenizer=", "data.tokenizer=: is empty; give it a value, or leave it out"),
        ("hydra.run.dir=", "hydra.run.dir=: is empty; give it a value, or leave it out"),
        ("hydra.run.dir=null", "hydra.run.dir=null: should be a valid string"),
        (
            "seed=${x}",
            "seed=${x}: Interpolation key 'x' not found; give a value, and write \\${ or \\??? where ",
        ),
        ("mode=${x}", "mode=${x}: Interpolation key 'x' not found; give a value"),
        ("hydra.run.dir=${x}", "hydra.run.dir=${x}: Interpolation key 'x' not found; give a value"),
        ("model.path=???", "model.path=???: Missing mandatory value"),
        ("train.steps=1,2", "train.steps=1,2: several values; add -m to run each, or give one value"),
        ("train.clip=((", "train.clip=((: cannot be read"),
        ("+model=small", "model=small: it exists already; leave out the + of +model"),
    ],
)
def test_what_does_not_exist_or_does_not_fit_is_refused(words: str, expected: str) -> None:
    assert refusal(*words.split(" ")).startswith(expected)


@pytest.mark.parametrize(
    "words",
    [
        "train.steps=0",
        "train.micro_batch=-1",
        "train.accumulation=0",
        "train.sequence=0",
        "train.learning_rate=0",
        "train.learning_rate=nan",
        "train.clip=-0.5",
        "train.clip=inf",
        "train.keep=0",
        "generation.batch=0",
        "generation.max_new_tokens=0",
        "generation.temperature=0",
        "generation.top_p=1.5",
        "generation.top_k=-1",
        "data.validation=1",
        "ledger.steps=0",
        "pipeline.stages=0",
        "checkpointing.every=0",
        "loss.chunk=0",
        "world.size=0",
        "world.timeout=0",
        "world.timeout=0.5",
        "world.timeout=10000000000",
        "world.timeout=1e+300",
        "world.size=1048577",
        "train.steps=9007199254740992",
        "train.learning_rate=inf",
        "hardware.bandwidth=1e+300",
        "data.validation=nan",
        "seed=-1",
        "seed=4294967296",
        "hardware.memory=0",
        "hardware.memory=-1",
        "hardware.memory_torch=-1",
        "hardware.memory_driver=0",
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_key(words: str) -> None:
    assert refusal(words).startswith(f"{words}: should be ")


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        ("zero=0 zero.offload=optimizer", "zero.offload=optimizer", "use zero=1, 2 or 3"),
        ("zero=2 zero.offload=all", "zero.offload=all", "use zero.offload=optimizer"),
        ("zero=2 pipeline.stages=2", "zero=2", "with pipeline.stages=2 use zero=0 or 1"),
        ("optimizer=adafactor zero=1", "optimizer=adafactor", "it needs whole matrices; use zero=0"),
        ("optimizer=muon zero=3", "train.clip=1.0", "muon's updates, not its gradients; use train.clip=0"),
        ("optimizer=muon zero=2", "train.clip=1.0", "muon's updates, not its gradients; use train.clip=0"),
        (
            "optimizer=muon zero=1 train.clip=0 train.nonfinite=skip",
            "train.nonfinite=skip",
            "use train.nonfinite=stop",
        ),
        (
            "optimizer=muon zero=1 train.clip=0 zero.offload=optimizer",
            "zero.offload=optimizer",
            "use zero.offload=none",
        ),
        (
            "optimizer=muon zero=0 precision=bf16 pipeline.stages=2",
            "optimizer=muon",
            "it needs whole matrices; use zero=0 precision=fp32",
        ),
        (
            "optimizer=sgd train.betas=[0.9,0.95]",
            "train.betas=[0.9,0.95]",
            "or use adamw, adamw_8bit, muon, lion",
        ),
        ("optimizer=sgd train.epsilon=1e-6", "train.epsilon=1e-06", "or use adamw, adamw_8bit, muon"),
        ("optimizer=muon zero=0 train.fused=true", "train.fused=true", "or use adamw, sgd"),
        ("optimizer.momentum=0.9", "optimizer.momentum=0.9", "leave it out, or use sgd or muon"),
        *(
            (f"{EARLY} {words}", refused, f"with {EARLY} use {remedy}")
            for words, refused, remedy in (
                ("zero=1", "zero=1", "zero=0"),
                ("zero=0 pipeline.stages=2", "pipeline.stages=2", "pipeline.stages=1"),
                ("zero=0 precision=bf16", "precision=bf16", "precision=fp32"),
                (f"{WHOLE} train.accumulation=2", "train.accumulation=2", "train.accumulation=1"),
                (WHOLE, "train.clip=1.0", "train.clip=0"),
                (
                    f"{WHOLE} train.clip=0 train.nonfinite=skip",
                    "train.nonfinite=skip",
                    "train.nonfinite=stop or",
                ),
                (
                    f"{WHOLE} train.clip=0 optimizer=muon",
                    "optimizer=muon",
                    "optimizer=adamw or adamw_8bit or",
                ),
            )
        ),
        ("optimizer.state=bf16 precision=fp32", "optimizer.state=bf16", "use precision=bf16"),
        ("optimizer.state=bf16 precision=bf16 zero=0", "optimizer.state=bf16", "use zero=1, 2 or 3"),
        (
            "optimizer.state=bf16 precision=bf16 zero.offload=optimizer",
            "optimizer.state=bf16",
            "use zero.offload=none",
        ),
        ("pipeline.stages=5", "pipeline.stages=5", "the model has 4 layers; use 4 or fewer"),
        ("pipeline.split=memory", "pipeline.split=memory", "one stage needs none; add pipeline.stages="),
        ("pipeline.groups=2", "pipeline.groups=2", "one stage needs none; add pipeline.stages="),
        (
            "pipeline.stages=2 pipeline.split=[1,1,2]",
            "pipeline.split=[1,1,2]",
            "names the layers of 3 stages",
        ),
        (
            "pipeline.stages=2 pipeline.split=[1,2]",
            "pipeline.split=[1,2]",
            "adds up to 3 layers, and the model has 4",
        ),
        ("pipeline.stages=2 pipeline.split=[0,4]", "pipeline.split=[0,4]", "1 or more, as [3,5]"),
        (
            "pipeline.stages=2 pipeline.split=evenly",
            "pipeline.split=evenly",
            "uniform, parameters, memory, or",
        ),
        (
            "mode=infer pipeline.stages=2 pipeline.groups=5",
            "pipeline.groups=5",
            "each group needs a prompt, and generation.batch=4",
        ),
        ("mode=infer checkpointing=full", "checkpointing=full", "use checkpointing=none"),
        (
            "mode=infer checkpointing.offload=cpu",
            "checkpointing.offload=cpu",
            "inference saves no activations; leave it out",
        ),
        ("checkpointing.layers=[1]", "checkpointing.layers=[1]", "use checkpointing=selective or full"),
        ("checkpointing.every=2", "checkpointing.every=2", "use checkpointing=selective or full"),
        (
            "checkpointing=full checkpointing.every=2 checkpointing.layers=[1]",
            "checkpointing.every=2",
            "not both",
        ),
        ("checkpointing=full checkpointing.layers=[1,1]", "checkpointing.layers=[1,1]", "each layer once"),
        (
            "checkpointing=full checkpointing.layers=[0,4]",
            "checkpointing.layers=[0,4]",
            "the model has 4, from 0 to 3",
        ),
        ("checkpointing=full checkpointing.every=5", "checkpointing.every=5", "the model has 4 layers"),
        ("model=gpt2 checkpointing=full checkpointing.every=13", "checkpointing.every=13", "has 12 layers"),
        ("mode=infer loss=chunked", "loss=chunked", "inference has no loss; use loss=full"),
        ("loss.chunk=64", "loss.chunk=64", "loss=full has no chunks to choose; use loss=chunked"),
        (
            "loss=chunked train.sequence=16 loss.chunk=64",
            "loss.chunk=64",
            "are 64 tokens; give fewer, or use",
        ),
        ("loss=fused hardware=cpu", "loss=fused", "for a GPU, and this is a CPU; use loss=chunked"),
        (
            "loss=fused world=rehearsed world.size=2 hardware=h100-sxm",
            "loss=fused",
            "it cannot be rehearsed; use loss=chunked or full",
        ),
        (
            "mode=infer adapter=lora",
            "adapter=lora",
            "give adapter.path=, a directory with adapter_config.json",
        ),
        ("mode=infer adapter.merge=true", "adapter.merge=true", "it says how training writes its weights"),
        ("adapter.merge=true", "adapter.merge=true", "adapter=none has none; add adapter=lora or dora"),
        ("adapter.rank=4", "adapter.rank=4", "adapter=none has none; add adapter=lora or dora"),
        ("adapter.targets=[q_proj]", "adapter.targets=[q_proj]", "add adapter=lora or dora"),
        ("adapter=lora adapter.merge=true train.export=false", "adapter.merge=true", "writes nothing"),
        ("adapter=qlora zero=3", "zero=3", "keeps its packed weights on every rank; use zero=0, 1 or 2"),
        ("adapter=qlora zero=3 zero.offload=all", "zero=3", "use zero=0, 1 or 2"),
        ("adapter=qlora pipeline.stages=2", "pipeline.stages=2", "packed weights are not cut into stages"),
        ("adapter=qlora adapter.merge=true", "adapter.merge=true", "merge with peft into whole weights"),
        ("mode=infer adapter=qlora", "adapter=qlora", "it packs the weights for training; leave it out"),
        ("adapter=lora adapter.path=/nowhere", "adapter.path=/nowhere", "no such directory; give one that"),
        ("world=rehearsed", "world.size=null", "needs world.size="),
        ("world=rehearsed world.size=2 ledger=phases", "ledger=phases", "use ledger=exact"),
        (
            "world=rehearsed world.size=2 ledger.snapshot=true",
            "ledger.snapshot=true",
            "rehearse a GPU, as by hardware=h100-sxm",
        ),
        (
            "hardware.allocator=expandable_segments:True",
            "hardware.allocator=expandable_segments:True",
            "a run takes what PYTORCH_ALLOC_CONF says",
        ),
        ("world=rehearsed world.size=2 train.resume=/tmp", "train.resume=/tmp", "leave it out"),
        ("world=rehearsed world.size=2 tracker=wandb", "tracker=[wandb]", "its peaks are in its record"),
        (
            "model.config.num_key_value_heads=3",
            "model.config.num_key_value_heads=3",
            "must divide num_attention_heads=4",
        ),
        ("model.config.hidden_size=255", "model.config.hidden_size=255", "multiple of num_attention_heads=4"),
        ("model=gpt2 model.config.n_head=5", "model.config.n_embd=768", "multiple of n_head=5"),
        ("model.config.num_attention_heads=0", "model.config.num_attention_heads=0", "1 or more"),
        ("model.config.num_hidden_layers=two", "model.config.num_hidden_layers=two", "a whole number"),
        ("train.sequence=1025", "train.sequence=1025", "allows 1024 tokens (max_position_embeddings)"),
        ("model=gpt2 train.sequence=1025", "train.sequence=1025", "allows 1024 tokens (n_positions)"),
        (
            "model.config.rope_parameters.rope_type=yarn +model.config.rope_parameters.factor=4 train.sequence=4097",
            "train.sequence=4097",
            "allows 4096 tokens (max_position_embeddings=1024 x factor=4 of rope_parameters)",
        ),
        ("train.sequence=1", "train.sequence=1", "2 or more"),
        ("train.steps=5 train.warmup_steps=5", "train.warmup_steps=5", "fewer than train.steps=5"),
        ("train.steps=5 train.save_every=6", "train.save_every=6", "never save within train.steps=5"),
        ("train.resume=/nowhere/at/all", "train.resume=/nowhere/at/all", "no such directory"),
        ("mode=infer train.resume=/tmp", "train.resume=/tmp", "give model.path="),
        ("mode=infer generation.prompt_length=1024", "generation.prompt_length=1024", "allows 1024"),
        ("mode=infer generation.max_new_tokens=1000", "generation.max_new_tokens=1000", "allows 1024"),
        ("mode=infer generation.temperature=0.5", "generation.temperature=0.5", "generation.sample=true"),
        ("mode=infer generation.top_k=5", "generation.top_k=5", "generation.sample=true"),
        ("mode=infer generation.top_p=0.5", "generation.top_p=0.5", "generation.sample=true"),
        ("mode=infer generation.prompts=/nowhere", "generation.prompts=/nowhere", "no such file"),
        ("mode=infer generation.workload=/nowhere", "generation.workload=/nowhere", "no such file"),
        (
            "mode=infer generation.prompt=a generation.workload=/nowhere",
            "generation.prompt=[a]",
            "either it or generation.workload=",
        ),
        (
            "mode=infer generation.prompt=a generation.lengths=skewed",
            "generation.lengths=skewed",
            "leave out generation.prompt=",
        ),
        ("mode=infer generation.compile=true", "generation.compile=true", "add generation.cache=static"),
        ("mode=infer train.compile=true", "train.compile=true", "use generation.compile=true"),
        ("train.compile=true zero=3", "train.compile=true", "use zero=0, 1 or 2"),
        ("train.compile=true checkpointing=selective", "train.compile=true", "use full or none"),
        (
            "train.compile=true checkpointing.offload=cpu",
            "train.compile=true",
            "use checkpointing.offload=none",
        ),
        ("train.compile=true adapter=lora", "train.compile=true", "use adapter=none"),
        ("train.compile=true pipeline.stages=2", "train.compile=true", "use pipeline.stages=1"),
        (
            "mode=infer generation.tensor_parallel=2 generation.compile=true generation.cache=static",
            "generation.tensor_parallel=2",
            "use generation.compile=false, or 1",
        ),
        (
            "mode=infer generation.tensor_parallel=2 generation.batching=continuous generation.cache=paged",
            "generation.tensor_parallel=2",
            "or generation.batching=static generation.cache=dynamic",
        ),
        (
            "mode=infer generation.compile=true generation.cache=static pipeline.stages=2",
            "generation.compile=true",
            "use pipeline.stages=1",
        ),
        (
            "mode=infer generation.prompts=/nowhere generation.prompt=a",
            "generation.prompts=/nowhere",
            "not both",
        ),
        ("data=text", "data.path=null", "needs data.path="),
        ("data=text data.path=/nowhere/*.txt", "data.path=/nowhere/*.txt", "no such file"),
        ("data.path=/tmp", "data.path=/tmp", "use data=text"),
        ("data=hub", "data.name=null", "needs data.name="),
        ("data.name=a/b", "data.name=a/b", "use data=hub"),
        ("data.streaming=true", "data.streaming=true", "only data=hub streams"),
        ("data=chat", "data.path=null", "data=chat needs data.path="),
        ("data=chat data.path=/nowhere/*.jsonl", "data.path=/nowhere/*.jsonl", "no such file"),
        ("data=chat data.path=/etc/hostname mode=infer", "data=chat", "conversations are for training"),
        ("data.packing=false mode=infer", "data.packing=false", "pads no document"),
        ("data.packing=2", "data.packing=2", ""),
        ("model.path=/nowhere", "model.path=/nowhere", "no such directory"),
        ("model.trust_remote_code=true", "model.trust_remote_code=true", "should be false"),
    ],
)
def test_what_cannot_go_together_is_refused_with_a_remedy(words: str, key: str, remedy: str) -> None:
    sentence = refusal(*words.split(" "))
    assert sentence.startswith(f"{key}: ")
    assert remedy in sentence


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        ("mode=infer adapter.path=ADAPTER adapter.rank=4", "adapter.rank=4", "has its own; leave it out"),
        ("adapter=lora adapter.path=ADAPTER adapter.alpha=4", "adapter.alpha=4", "has its own; leave it out"),
        ("mode=infer adapter=dora adapter.path=ADAPTER", "adapter=dora", "is lora; use that"),
        ("adapter.path=ADAPTER", "adapter.path=ADAPTER", "add adapter=lora or dora"),
        (
            "mode=infer adapter.path=ADAPTER generation.tensor_parallel=2",
            "adapter.path=ADAPTER",
            "use generation.tensor_parallel=1",
        ),
        (
            "mode=infer adapter.path=ADAPTER model.config.quantization_config={load_in_4bit:true} world=rehearsed "
            "world.size=1",
            "model.config.quantization_config.quant_method=bitsandbytes",
            "an adapter goes on whole weights here",
        ),
    ],
)
def test_what_cannot_go_together_with_an_adapter_is_refused(
    tmp_path: Path, words: str, key: str, remedy: str
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": false}')
    (tmp_path / "adapter_model.safetensors").touch()
    said = refusal(*words.replace("ADAPTER", str(tmp_path)).split())
    assert said.startswith(key.replace("ADAPTER", str(tmp_path)) + ": ")
    assert remedy in said


def test_an_empty_data_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for path in (tmp_path, tmp_path / "empty.txt"):
        assert refusal("data=text", f"data.path={path}").startswith(
            f"data.path={path}: there is no text in it"
        )


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    for key in ("data=text data.path", "mode=infer generation.prompts", "mode=infer generation.workload"):
        *words, key = key.split()
        for path in (tmp_path / "pipe", "/dev/zero"):
            said = f"{key}={path}: it is a pipe or a device, and is read more than once; give a file"
            assert refusal(*words, f"{key}={path}") == said
        assert refusal(*words, f"{key}={tmp_path}/gone").startswith(f"{key}={tmp_path}/gone: no such file")
        assert refusal(*words, f"{key}={tmp_path}").startswith(f"{key}={tmp_path}: there is no text in it")


def test_a_directory_that_is_no_checkpoint_is_refused_and_the_one_inside_it_named(tmp_path: Path) -> None:
    assert (
        refusal(f"model.path={tmp_path}")
        == f"model.path={tmp_path}: it contains no config.json; give a directory that contains one"
    )
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    assert refusal(f"model.path={tmp_path}").endswith(f"did you mean model.path={tmp_path}/checkpoint?")


def test_the_shape_of_a_checkpoint_replaces_that_of_the_group(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    assert "allows 64 tokens" in refusal(f"model.path={tmp_path}", "train.sequence=65")
    assert settings(f"model.path={tmp_path}", "train.sequence=64").model.path == str(tmp_path)


def test_a_config_with_a_checkpoint_says_nothing_of_another_shape() -> None:
    model = settings("model=small", "model.path=owner/name").model
    assert (model.name, model.config) == ("owner/name", {})
    assert settings("model.path=owner/name", "model.name=mine").model.name == "mine"
    said = refusal("model.path=owner/name", "model.config.num_hidden_layers=2")
    assert said.startswith("model.config.num_hidden_layers=2: model.path= brings a config of its own")


def test_a_corrupt_config_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 25')
    assert refusal(f"model.path={tmp_path}").startswith(
        f"model.path={tmp_path}: its config.json cannot be read"
    )


def test_a_name_on_a_hub_is_no_missing_directory() -> None:
    assert settings("model.path=owner/name").model.path == "owner/name"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_page_has_as_many_parameters_as_it_says(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    page = (compose.directory() / "model" / f"{name}.yaml").read_text()
    said = re.search(r"([\d,]{7,}) parameters", page)
    assert said is not None
    assert OmegaConf.select(OmegaConf.create(page), "name") == name
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**settings(f"model={name}").model.config)
        )
    assert sum(each.numel() for each in model.parameters()) == int(said[1].replace(",", ""))


@pytest.mark.parametrize(
    ("name", "intensity"),
    [
        ("rtx4090", 164),
        ("a100-40gb", 201),
        ("a100-80gb", 153),
        ("h100-sxm", 295),
        ("h200", 206),
        ("b200", 281),
        ("l40s", 419),
        ("mi300x", 247),
        ("rtx3090", 76),
        ("rtx5090", 117),
        ("l4", 403),
    ],
)
def test_a_hardware_page_has_the_dense_rate(name: str, intensity: int) -> None:
    page = settings(f"hardware={name}").hardware
    assert page.name == name
    assert page.flops_bf16 is not None
    assert page.bandwidth is not None
    assert round(page.flops_bf16 / page.bandwidth) == intensity


def test_an_unknown_card_is_refused_with_those_that_have_a_page() -> None:
    assert refusal("hardware=rtx6090").startswith("hardware=rtx6090: no such option; one of a100-40gb, ")


def test_a_link_to_the_host_is_the_page_s_or_that_between_cards_by_pcie() -> None:
    assert settings("hardware=h100-sxm").hardware.to_host == 6.4e10
    assert settings("hardware=rtx4090").hardware.to_host == 3.2e10
    assert settings("hardware=mi300x").hardware.to_host is None


def test_a_network_page_has_the_rate_of_its_ports_and_where_it_was_read() -> None:
    pages = [name for name in compose.groups()["network"] if name != "auto"]
    rates = {name: settings(f"network={name}").network for name in pages}
    assert {name: page.name for name, page in rates.items()} == dict(zip(pages, pages, strict=True))
    assert all(page.of_node and page.sources for page in rates.values())
    assert rates["aws-efa-p5"].of_node == 3200e9 / 8
    assert settings().network.of_node is None


def test_an_unknown_network_is_refused_with_those_that_have_a_page() -> None:
    assert refusal("network=token-ring").startswith(
        "network=token-ring: no such option; one of auto, aws-efa-p4d, "
    )


def test_a_memory_from_the_user_replaces_every_figure_of_the_page() -> None:
    page = settings("hardware=h100-sxm", "hardware.memory=80000000000").hardware
    assert (page.memory, page.memory_driver, page.memory_torch) == (80_000_000_000, None, None)
    assert page.bandwidth == settings("hardware=h100-sxm").hardware.bandwidth
    assert settings("hardware=h100-sxm").hardware.memory_torch == 81_089 * 2**20


@pytest.mark.parametrize("group", list(compose.groups()))
def test_every_option_is_a_page_of_its_group(group: str) -> None:
    fields = {key.partition(".")[2] for key in described_fields() if key.startswith(f"{group}.")}
    for option in compose.groups()[group]:
        assert set(OmegaConf.load(compose.directory() / group / f"{option}.yaml")) <= fields


def test_a_config_written_by_hand_meets_the_same_rules() -> None:
    with pytest.raises(Refusal, match=r"train\.stepz=3: no such key"):
        load(OmegaConf.create({"model": {"config": {"hidden_size": 8}}, "train": {"stepz": 3}}))


def test_another_world_size_than_asked_for_is_refused_with_the_line_to_type() -> None:
    words = ["mode=train", "world.size=4"]
    with pytest.raises(Refusal) as refused:
        check_world(settings(*words), 1, words)
    assert str(refused.value) == (
        "world.size=4: 1 rank here; start torchrun --standalone --nproc-per-node 4 -m harness mode=train world.size=4"
    )
    check_world(settings(*words), 4, words)


def test_updates_in_backward_are_for_one_rank() -> None:
    early = settings(EARLY, *WHOLE.split(), "train.clip=0")
    with pytest.raises(Refusal, match=r"in_backward=true: gradients of 2 ranks are averaged after backward"):
        check_world(early, 2)
    check_world(early, 1)


def test_a_world_that_stages_do_not_divide_is_refused() -> None:
    three = dataclasses.replace(settings(), pipeline=dataclasses.replace(settings().pipeline, stages=3))
    with pytest.raises(Refusal, match=r"pipeline.stages=3: 4 ranks here.*--nproc-per-node 6"):
        check_world(three, 4)
    check_world(three, 6)


def test_a_world_that_ranks_which_share_layers_do_not_divide_is_refused() -> None:
    shared = settings("mode=infer", "generation.tensor_parallel=2", "pipeline.stages=2")
    with pytest.raises(Refusal, match=r"tensor_parallel=2: 3 ranks here, and so many .*--nproc-per-node 4"):
        check_world(shared, 3)
    with pytest.raises(Refusal, match=r"stages=2: 6 ranks here, and stages of 2 ranks .*--nproc-per-node 8"):
        check_world(shared, 6)
    check_world(shared, 8)
    check_world(dataclasses.replace(shared, mode="train"), 2)


def test_a_world_that_sharers_of_a_layer_do_not_divide_is_refused_with_the_line_to_type() -> None:
    words = ["mode=infer", "generation.tensor_parallel=3"]
    with pytest.raises(Refusal, match=r"generation.tensor_parallel=3: 2 ranks here.*--nproc-per-node 3 -m"):
        check_world(settings(*words), 2, words)
    check_world(settings(*words), 6, words)
    check_world(settings("mode=train", "generation.tensor_parallel=3"), 2)  # training shares no layer


def test_a_batch_that_micro_batches_do_not_make_up_is_refused_with_what_would() -> None:
    check_world(settings("train.batch=16", "train.accumulation=2"), 2)
    with pytest.raises(
        Refusal, match=r"train.batch=16: .* on 2 replicas is 8 at once.*train.accumulation=2 makes that"
    ):
        check_world(settings("train.batch=16"), 2)
    with pytest.raises(Refusal, match=r"train.batch=18: .*a multiple of that, as 24 is"):
        check_world(settings("train.batch=18"), 2)


def test_a_refusal_is_one_line_whatever_is_in_it() -> None:
    assert str(Refusal("a.b", "x\ny", "do\n this")) == "a.b=x y: do this"


@pytest.mark.parametrize("kind", ["adamw_8bit", "lion"])
def test_an_optimizer_without_its_package_is_refused_with_the_command_that_installs_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "LIBRARY", "bitsandbytes_of_nobody")
    sentence = refusal(f"optimizer={kind}")
    assert sentence.startswith(f"optimizer={kind}: bitsandbytes_of_nobody is not installed; ")
    assert sentence.endswith("pip install 'harness[optimizers]'")


def test_an_optimizer_of_no_such_name_is_refused_with_those_that_there_are() -> None:
    sentence = refusal("optimizer=nonsense")
    assert sentence.startswith("optimizer=nonsense: ")
    assert all(kind in sentence for kind in optimizer.USED)
