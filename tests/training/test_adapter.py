"""Adapters: trained as peft trains them, beside weights that do not change, and written as peft writes them."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from harness.config.compose import compose
from harness.config.load import Refusal, load
from harness.data import token_batches
from harness.generation import infer
from harness.ledger import Ledger
from harness.model import adapter, loader, stage
from harness.model.partition import ranges
from harness.model.plan import Plan
from harness.model.tokenizer import tokenizer_of
from harness.record.record_file import Output
from harness.record.results import Results
from harness.runtime.world import World
from tests.training.conftest import SHORT, WORDS, Trained, of, train

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
FILES = ("adapter_model.safetensors", "adapter_config.json")
STEPS = 3
EXPORT = ("train.export=true", "train.schedule=constant", "train.clip=0", "zero=0")
LORA = ("adapter=lora", "adapter.rank=4", "adapter.targets=[q_proj,down_proj]")


def losses_of(results: Results) -> list[float]:
    assert results.training is not None
    return results.training.losses


def trainable(results: Results) -> int | None:
    assert results.model is not None
    return results.model.trainable


def plan_of(base: Path, *words: str) -> Plan:
    return Plan.of(load(compose([*SHORT, *of(base), *words])))


def by_peft(base: Path, *words: str, **options: Any) -> tuple[list[float], Any]:
    """The losses of a plain loop over peft's own model, with the same batches and the same first weights.

    `options` are those of transformers for the model that it goes on.
    """
    plan = plan_of(base, *words)
    settings = plan.settings
    first = AutoModelForCausalLM.from_pretrained(base)
    adapter.apply(settings, first, adapter.outline(settings, plan.config, torch.float32), read=True)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, **options),
        LoraConfig(
            r=settings.adapter.rank,
            lora_alpha=settings.adapter.alpha,
            target_modules=settings.adapter.targets,
            use_dora=settings.adapter.kind == "dora",
        ),
    )
    begins = {f"base_model.model.{name}": each for name, each in get_peft_model_state_dict(first).items()}
    assert not set_peft_model_state_dict(model, begins).unexpected_keys
    tokenizer = tokenizer_of(settings.model, plan.config, None)
    corpus = token_batches.corpus(settings.data, tokenizer, settings.train.sequence, ALONE)
    batches = token_batches.loader(corpus.train, settings.train.micro_batch, ALONE, settings.seed)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False
    )
    losses = []
    model.train()
    for batch in islice(batches, STEPS):
        loss = model(**batch.arguments, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("words", [LORA, ("adapter=dora", *LORA[1:])], ids=("lora", "dora"))
def test_it_learns_bit_for_bit_what_peft_learns_and_peft_opens_what_it_writes(
    trained: Trained, base: Path, words: tuple[str, ...]
) -> None:
    losses, model = by_peft(base, *words)
    results, directory = trained(*EXPORT, *words)
    assert losses_of(results) == losses
    assert len({*losses}) == STEPS
    written = directory / "checkpoint"
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), written).eval()
    assert torch.equal(logits(opened), logits(model))
    assert not torch.equal(logits(opened), logits(AutoModelForCausalLM.from_pretrained(base)))
    assert json.loads((written / FILES[1]).read_text())["base_model_name_or_path"] == str(base)
    assert not [*written.glob("model*")]
    assert trainable(results) == sum(each.numel() for each in load_file(written / FILES[0]).values())
    _, merging = trained(*EXPORT, *words, "adapter.merge=true")
    whole = AutoModelForCausalLM.from_pretrained(merging / "checkpoint").eval()
    assert torch.equal(logits(whole), logits(model.merge_and_unload()))


def test_recomputation_changes_no_bit_of_an_adapter(trained: Trained) -> None:
    plain = load_file(trained(*EXPORT, *LORA)[1] / "checkpoint" / FILES[0])
    again = load_file(trained(*EXPORT, *LORA, "checkpointing=full")[1] / "checkpoint" / FILES[0])
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    trained: Trained, world: World, base: Path, tmp_path: Path, zero: int
) -> None:
    words = (*EXPORT[:-1], f"zero={zero}", *LORA, "train.save_every=1", "train.keep=3")
    results, directory = trained(*words)
    shutil.rmtree(directory / "state" / "step-00000003")
    resumed, _ = train(world, tmp_path, *of(base), *words, f"train.resume={directory}")
    assert losses_of(resumed) == losses_of(results)[-1:]
    files = [load_file(place / "checkpoint" / FILES[0]) for place in (directory, tmp_path)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    with pytest.raises(Refusal, match=r"adapter\.rank=5: .* was saved with 4"):
        train(world, tmp_path / "b", *of(base), *words, "adapter.rank=5", f"train.resume={directory}")


def test_frozen_weights_have_no_gradients_and_no_state(trained: Trained, base: Path) -> None:
    plan = plan_of(base, *LORA)
    model = loader.build(plan.settings.model, plan.config, torch.float32, CPU, 0)
    adapter.apply(plan.settings, model, adapter.outline(plan.settings, plan.config, torch.float32), True)
    with Ledger(model=model, mode="exact") as ledger, ledger.phase("backward"):
        model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
    frozen = {name for name, each in model.named_parameters() if each.grad is None}
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == frozen
    assert {
        name.rpartition(".lora_")[2] for name, each in model.named_parameters() if each.requires_grad
    } == {
        "A.default.weight",
        "B.default.weight",
    }
    assert ledger.allocator.unattributed == 0


def test_every_split_has_the_matrices_of_the_whole(base: Path) -> None:
    plan = plan_of(base, *LORA)
    spec = (plan.settings.model, plan.config, torch.float32, CPU, 0)
    whole = loader.build(*spec)
    outline = adapter.outline(plan.settings, plan.config, torch.float32)
    adapter.apply(plan.settings, whole, outline, True)
    expected = dict(whole.named_parameters())
    parts = [stage.build(*spec, layers) for layers in ranges([1, 1])]
    for part in parts:
        adapter.apply(plan.settings, part, outline, True)
    owned = {name: tensor for part in parts for name, tensor in part.owned().items()}
    assert owned.keys() == expected.keys()
    assert all(torch.equal(owned[name], expected[name]) for name in expected)
    assert [[*part.owned()] for part in parts] == [[*part] for part in stage.parts(outline, [1, 1])]


@pytest.fixture(scope="module")
def written(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, without the manifest: it may be changed."""
    directory = tmp_path_factory.mktemp("adapter") / "it"
    shutil.copytree(trained(*EXPORT, *LORA)[1] / "checkpoint", directory)
    (directory / "harness_manifest.json").unlink()
    return directory


def generated(base: Path, directory: Path, *words: str) -> list[list[int]]:
    settings = load(
        compose(
            [
                "mode=infer",
                "precision=fp32",
                "model.attention=sdpa",
                f"model.path={base}",
                "hardware=cpu",
                *words,
            ]
        )
    )
    plan = Plan.of(settings)
    adapter.prove(plan)
    ledger = Ledger(mode="exact", steps=1)
    with ledger:
        infer.run(plan, ALONE, ledger, Output(directory, lambda line: None, Results(), lambda: None))
    assert ledger.allocator.unattributed == 0
    lines = (directory / "generations.jsonl").read_text().splitlines()
    return [json.loads(line)["tokens"] for line in lines]


@pytest.mark.parametrize("more", [(), ("generation.batching=continuous", "generation.cache=paged")])
def test_it_generates_the_tokens_of_peft_s_own_model(
    base: Path, written: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    prompt = "a text"
    words = (f"generation.prompt=[{prompt}]", "generation.max_new_tokens=12", "generation.stop_at_eos=false")
    strong = tmp_path / "strong"
    shutil.copytree(written, strong)
    weights = {name: each + 0.1 for name, each in load_file(written / FILES[0]).items()}
    save_file(weights, strong / FILES[0], metadata={"format": "pt"})
    actual = generated(base, tmp_path, f"adapter.path={strong}", *words, *more)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), strong).eval()
    tokens = torch.tensor([[byte + 3 for byte in prompt.encode()]])
    new = model.generate(
        input_ids=tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert actual == [new[0, tokens.shape[1] :].tolist()]
    assert actual != generated(base, tmp_path, *words)


def test_training_goes_on_from_an_adapter(trained: Trained, base: Path, written: Path) -> None:
    results, _ = trained(*EXPORT, "adapter=lora", f"adapter.path={written}")
    first, _ = trained(*EXPORT, *LORA)
    assert losses_of(results)[0] < losses_of(first)[0]
    assert trainable(results) == trainable(first)


def test_an_adapter_on_the_head_is_read_again(trained: Trained) -> None:
    on_head = (*EXPORT, "adapter=lora", "adapter.targets=[q_proj,lm_head]")
    first, directory = trained(*on_head)
    more, _ = trained(*EXPORT, "adapter=lora", f"adapter.path={directory / 'checkpoint'}")
    assert losses_of(more)[0] < losses_of(first)[0]


@pytest.mark.parametrize("targets", ["[lm_head]", "[q_proj,lm_head]"])
def test_a_loss_by_the_head_s_weight_alone_is_refused_with_an_adapter_on_the_head(
    base: Path, targets: str
) -> None:
    words = ("adapter=lora", f"adapter.targets={targets}")
    with pytest.raises(Refusal, match=r"loss=chunked: the adapter is on the head"):
        adapter.prove(plan_of(base, *words, "loss=chunked"))
    adapter.prove(plan_of(base, *words))


def changed(written: Path, directory: Path, **values: Any) -> Path:
    copied = directory / "changed"
    shutil.copytree(written, copied)
    config = json.loads((copied / FILES[1]).read_text())
    (copied / FILES[1]).write_text(json.dumps({**config, **values}))
    return copied


def refusal(base: Path, place: Path, directory: Path, *words: str) -> str:
    with pytest.raises(Refusal) as refused:
        generated(base, directory, f"adapter.path={place}", *words)
    return str(refused.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"peft_type": "LOHA"}, "its peft_type is LOHA; give a LORA adapter"),
        ({"target_modules": ["qkv"]}, "peft cannot put it on this model: Target modules"),
        ({"target_modules": ["q_proj"]}, "it is an adapter of another model: 4 unexpected"),
        (
            {"target_modules": ["q_proj", "down_proj", "up_proj"]},
            "it is an adapter of another model: 4 missing",
        ),
        ({"r": 5}, "it is an adapter of another model: 8 of another shape"),
        ({"r": 0}, "peft cannot put it on this model: `r` should be a positive integer"),
        ({"r": "8"}, "peft cannot put it on this model: "),
        ({"modules_to_save": ["lm_head"]}, "it has modules_to_save, which is more than LoRA's matrices"),
        (
            {"alora_invocation_tokens": [1]},
            "it has alora_invocation_tokens, which is more than LoRA's matrices",
        ),
        ({"use_dora": True}, "it is an adapter of another model: 4 missing"),
        ({"init_lora_weights": "pissa"}, "its init_lora_weights=pissa changes the weights beside it"),
    ],
)
def test_an_adapter_of_another_kind_or_model_is_refused(
    base: Path, written: Path, tmp_path: Path, values: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(base, changed(written, tmp_path, **values), tmp_path)


def test_an_adapter_that_is_not_whole_or_pickled_is_refused(
    base: Path, written: Path, tmp_path: Path
) -> None:
    place = changed(written, tmp_path)
    raw = (place / FILES[0]).read_bytes()
    (place / FILES[0]).write_bytes(raw[:100])
    assert "adapter_model.safetensors in it is corrupt" in refusal(base, place, tmp_path)
    (place / FILES[0]).rename(place / "adapter_model.bin")
    assert "opening a pickle can run code" in refusal(base, place, tmp_path)
    (place / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors is missing in it" in refusal(base, place, tmp_path)
    (place / FILES[1]).write_text("{")
    assert "its adapter_config.json cannot be read" in refusal(base, place, tmp_path)
    (place / FILES[1]).unlink()
    assert "it contains no adapter_config.json" in refusal(base, place, tmp_path)


def test_an_exported_adapter_with_a_byte_changed_is_refused(
    trained: Trained, base: Path, tmp_path: Path
) -> None:
    place = tmp_path / "copy"
    shutil.copytree(trained(*EXPORT, *LORA)[1] / "checkpoint", place)
    raw = bytearray((place / FILES[0]).read_bytes())
    raw[-1] ^= 1
    (place / FILES[0]).write_bytes(raw)
    assert "adapter_model.safetensors in it is not what was written" in refusal(base, place, tmp_path)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ("[q_prj]", "the model has no q_prj; did you mean q_proj?"),
        ("[xyz]", "the model has no xyz; it has down_proj, "),
        ("[embed_tokens]", "model.embed_tokens is no linear layer but Embedding"),
        ("[self_attn]", "model.layers.0.self_attn is no linear layer but LlamaAttention"),
    ],
)
def test_targets_that_are_no_linear_layers_are_refused(base: Path, targets: str, sentence: str) -> None:
    with pytest.raises(Refusal, match=r"adapter\.targets=") as refused:
        adapter.prove(plan_of(base, "adapter=lora", f"adapter.targets={targets}"))
    assert sentence in str(refused.value)


def test_a_stage_without_anything_to_train_is_refused(base: Path) -> None:
    plan = plan_of(base, "adapter=lora", "adapter.targets=[layers.1.mlp.up_proj]", "pipeline.stages=2")
    with pytest.raises(Refusal, match="stage 0 has none of them, and nothing to train"):
        adapter.prove(plan)


def test_a_tied_head_is_refused_and_a_rank_above_the_width_is_not(base: Path) -> None:
    shape = "model.config.tie_word_embeddings=true"
    plan = Plan.of(load(compose([*WORDS, shape, "adapter=lora", "adapter.targets=[lm_head]"])))
    with pytest.raises(Refusal, match="the weight of lm_head is another layer's too"):
        adapter.prove(plan)
    adapter.prove(plan_of(base, "adapter=lora", "adapter.rank=1000"))


def test_an_adapter_in_the_place_of_a_model_is_refused_with_the_key_for_it(written: Path) -> None:
    with pytest.raises(Refusal, match=r"it is an adapter: give its model here, and adapter\.path="):
        load(compose(["mode=infer", f"model.path={written}"]))
