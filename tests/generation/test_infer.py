"""The inference run: every prompt once and in order, with transformers' own tokens, whatever the number of ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    LlamaConfig,
)

from harness.config.load import Generation, Model, Refusal, Settings
from harness.data.prompts import Prompt, find
from harness.generation import infer
from harness.generation.batch import Requests
from harness.generation.decode import generate
from harness.generation.generation_config import strategy_of
from harness.generation.infer import share_of, shown
from harness.ledger import Ledger
from harness.model.loader import model_config
from harness.model.plan import Plan
from harness.record.record_file import Output
from harness.record.results import Results
from harness.rehearsal.course import Shortened
from harness.runtime.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
PROMPTS = ["def run(", "import os", "x", "a prompt that is longer than the others", "żółw"]
NEW = 12
LAYERS, KV_HEADS, HEAD = 2, 2, 16
PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD * 4

Infer = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that says many different things, with the byte tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    said = [
        model.generate(torch.tensor([[byte + 3 for byte in prompt.encode()]]), max_new_tokens=NEW)[0, -NEW:]
        for prompt in PROMPTS[:2]
    ]
    model.generation_config.eos_token_id = [int(said[0][3]), int(said[1][7])]  # so that some texts end early
    model.save_pretrained(directory)
    ByT5Tokenizer().save_pretrained(directory)
    return directory


def ask(
    checkpoint: Path, precision: str = "fp32", seed: int = 0, place: Path | None = None, **generation: Any
) -> Settings:
    requested = Generation(**{"prompt": PROMPTS, "batch": 2, "max_new_tokens": NEW, **generation})
    model = Model(name="test", path=str(place or checkpoint), attention="sdpa")
    return Settings(mode="infer", precision=precision, seed=seed, model=model, generation=requested)  # type: ignore[arg-type]


def no_flush(*finished: object) -> None:
    """These runs need nothing on disk before their end."""


def quiet(directory: Path, results: Results) -> Output:
    return Output(directory, lambda line: None, results, no_flush)


@pytest.fixture
def inferred(checkpoint: Path, tmp_path: Path) -> Infer:
    """A function of generation settings to what the record gets, and the lines that were written."""

    def run(**options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        results = Results()
        ledger = Ledger(mode="off")
        infer.run(Plan.of(ask(checkpoint, **options)), ALONE, ledger, quiet(tmp_path, results))
        written = (tmp_path / "generations.jsonl").read_text().splitlines()
        return results.tree(), [json.loads(line) for line in written]

    return run


def reference(checkpoint: Path, precision: str, prompts: list[str], **options: Any) -> list[list[int]]:
    """transformers' own `generate` on one left-padded batch, cut after each end."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    result = model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    ends = model.generation_config.eos_token_id
    rows = []
    for row in result[:, batch.input_ids.shape[1] :].tolist():
        stop = next((place + 1 for place, token in enumerate(row) if token in ends), NEW)
        rows.append(row[:stop])
    return rows


def test_a_line_for_each_prompt_in_order(inferred: Infer, checkpoint: Path) -> None:
    _, lines = inferred()
    assert [line["prompt"] for line in lines] == PROMPTS
    assert {tuple(line) for line in lines} == {("prompt", "prompt_tokens", "tokens", "text")}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for line in lines:
        assert line["prompt_tokens"] == [byte + 3 for byte in line["prompt"].encode()]
        assert line["text"] == tokenizer.decode(line["tokens"], skip_special_tokens=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_tokens_are_those_of_transformers_up_to_each_end(
    inferred: Infer, checkpoint: Path, cache: str, precision: str
) -> None:
    kind = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    expected = [
        row
        for first in range(0, len(PROMPTS), 2)
        for row in reference(checkpoint, precision, PROMPTS[first : first + 2], **kind)
    ]
    _, lines = inferred(cache=cache, precision=precision)
    assert [line["tokens"] for line in lines] == expected
    assert len({len(row) for row in expected}) > 1  # some end early


def test_without_stopping_every_text_has_all_its_tokens(inferred: Infer) -> None:
    done, lines = inferred(stop_at_eos=False)
    assert {len(line["tokens"]) for line in lines} == {NEW}
    assert done["inference"]["new_tokens"] == NEW * len(PROMPTS)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_batch_changes_no_text(inferred: Infer, batch: int) -> None:
    assert inferred(batch=batch)[1] == inferred()[1]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_share_the_prompts_out_and_change_no_text(
    inferred: Infer, checkpoint: Path, size: int, sample: bool
) -> None:
    settings = ask(checkpoint, sample=sample)
    strategy = strategy_of(settings, model_config(settings.model))
    prompts = find(settings, AutoTokenizer.from_pretrained(checkpoint), strategy.max_new_tokens_after)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ledger = Ledger(mode="off")
    shares = [
        share_of(settings, World(rank, size, 0, CPU), ledger, model, prompts, strategy, no_flush).tokens
        for rank in range(size)
    ]
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == len(PROMPTS)
    together = {number: new for share in shares for number, new in share.items()}
    _, lines = inferred(sample=sample)
    assert [together[number] for number in range(len(PROMPTS))] == [line["tokens"] for line in lines]


OWN = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_new_tokens": 6, "max_new_tokens": 9}


@pytest.mark.parametrize(
    "requested", [{}, {"cache": "static"}, {"cache": "paged", "batching": "continuous"}], ids=str
)
def test_a_checkpoints_generation_config_gives_each_prompt_what_it_gives_it_in_transformers(
    inferred: Infer, checkpoint: Path, tmp_path: Path, requested: dict[str, Any]
) -> None:
    place = shutil.copytree(checkpoint, tmp_path / "own")
    ends = json.loads((place / "generation_config.json").read_text())["eos_token_id"]
    (place / "generation_config.json").write_text(json.dumps({**OWN, "eos_token_id": ends}))
    model = AutoModelForCausalLM.from_pretrained(place)
    expected = []
    for prompt in PROMPTS:
        given = torch.tensor([[byte + 3 for byte in prompt.encode()]])
        result = model.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0)
        expected.append(result[0, given.shape[1] :].tolist())
    done, lines = inferred(place=place, max_new_tokens=None, **requested)
    assert [line["tokens"] for line in lines] == expected
    assert done["inference"]["generation_config"]["min_new_tokens"] == {"value": 6, "source": "checkpoint"}
    reported = inferred(place=place, max_new_tokens=None, config={"repetition_penalty": None}, **requested)[1]
    assert reported != lines


CROSSED = [(30, 2), (3, 40), (9, 20)]
"""Requests of which the longest prompt has the shortest answer: together they take more than any alone."""


@pytest.fixture
def crossed(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "crossed.jsonl"
    lines = ({"prompt": "x" * prompt, "max_new_tokens": most} for prompt, most in CROSSED)
    file.write_text("\n".join(map(json.dumps, lines)))
    return {"workload": str(file), "prompt": [], "batch": 3, "max_new_tokens": None, "stop_at_eos": False}


@pytest.mark.parametrize("sample", [False, True])
def test_a_batch_has_room_for_its_longest_prompt_and_its_longest_answer(
    inferred: Infer, checkpoint: Path, crossed: dict[str, Any], sample: bool
) -> None:
    alone = inferred(**{**crossed, "batch": 1}, sample=sample)[1]
    assert [len(line["tokens"]) for line in alone] == [most for _, most in CROSSED]
    for requested in ({}, {"cache": "static"}, {"cache": "paged", "batching": "continuous"}):
        assert inferred(**crossed, sample=sample, **requested)[1] == alone
    settings = ask(checkpoint, **crossed, sample=sample, cache="static", compile=True)
    strategy = strategy_of(settings, model_config(settings.model))
    prompts = find(settings, AutoTokenizer.from_pretrained(checkpoint), strategy.max_new_tokens_after)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    course = Shortened()  # the step is not compiled, in the cache that a program would have
    share = share_of(settings, ALONE, Ledger(mode="off"), model, prompts, strategy, no_flush, course=course)
    assert share.kv[0].reserved == 3 * (30 + 40 - 1) * PER_TOKEN + 8 * LAYERS
    assert [share.tokens[0]] == [line["tokens"] for line in alone][:1]


def test_what_follows_a_sequences_end_is_at_positions_that_the_model_has(crossed: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 384,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(GPT2Config(n_positions=43, **sizes)).eval()
    given = [([7 + length] * length, most) for length, most in CROSSED]
    alone = [
        generate(model, Requests([prompt], [most]), ledger=Ledger(mode="off")).tokens[0]
        for prompt, most in given
    ]
    together = Requests([prompt for prompt, _ in given], [most for _, most in given])
    assert together.shown > 43
    assert generate(model, together, ledger=Ledger(mode="off")).tokens == alone


@pytest.mark.parametrize("kind", ["gpt_neo", "mpt"])
def test_a_batch_with_more_columns_than_attentions_own_table_is_refused(kind: str) -> None:
    sizes = {"hidden_size": 16, "d_model": 16, "n_heads": 2, "num_heads": 2, "n_layers": 1, "num_layers": 1}
    limits = {"max_position_embeddings": 43, "max_seq_len": 43, "attention_types": [[["global"], 1]]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **limits, vocab_size=384))
    prompts = [Prompt("", [7] * length, most, "", "", "") for length, most in CROSSED]
    infer.check_columns(model, prompts, 1)
    reported = (
        "generation.batch=3: with padding a batch has 69 columns, and the model's attention has 43; use 1"
    )
    with pytest.raises(Refusal, match=reported):
        infer.check_columns(model, prompts, 3)
    with pytest.raises(Refusal, match="use 1"):
        infer.check_columns(
            model, [prompts[2], prompts[0], prompts[0], prompts[1]], 3, dp_size=2
        )  # of the second


def test_a_seed_gives_the_same_sample_and_another_seed_another(inferred: Infer) -> None:
    first = inferred(sample=True, seed=1)[1]
    assert inferred(sample=True, seed=1)[1] == first
    assert inferred(sample=True, seed=2)[1] != first
    assert inferred()[1] != first


def test_the_same_prompt_twice_is_sampled_twice(inferred: Infer) -> None:
    _, lines = inferred(prompt=["def", "def"], sample=True)
    assert lines[0]["prompt"] == lines[1]["prompt"]
    assert lines[0]["tokens"] != lines[1]["tokens"]


def test_prompts_are_sampled_from_the_data_where_none_are_given(inferred: Infer) -> None:
    _, lines = inferred(prompt=[], count=3, prompt_length=20)
    assert [len(line["prompt_tokens"]) for line in lines] == [20, 20, 20]
    assert len({line["prompt"] for line in lines}) == 3
    assert inferred(prompt=[], count=3, prompt_length=20)[1] == lines


def test_the_record_gets_counts_and_kv_bytes(inferred: Infer) -> None:
    done, _ = inferred(batch=8, stop_at_eos=False)
    tokens = [len(prompt.encode()) for prompt in PROMPTS]
    shown = max(tokens) + NEW - 1
    assert done["model"]["dtype"] == "float32"
    config = done["inference"]["generation_config"]
    done["inference"]["generation_config"] = {key: each for key, each in config.items() if "moot" not in each}
    assert done["inference"] == {
        "prompts": len(PROMPTS),
        "prompt_tokens": sum(tokens),
        "max_new_tokens": NEW,
        "generation_config": {
            "do_sample": {"value": False, "source": "default"},
            "eos_token_id": {"value": None, "source": "command line"},
            "max_new_tokens": {"value": NEW, "source": "command line"},
        },
        "new_tokens": NEW * len(PROMPTS),
        "unasked_tokens": 0,
        "padding_tokens": len(PROMPTS) * max(tokens) - sum(tokens),
        "cache": "dynamic",
        "tensor_parallel": 1,
        "kv_bytes_per_token": PER_TOKEN,
        "kv_bytes_per_token_measured": PER_TOKEN,
        "kv_reserved": len(PROMPTS) * shown * PER_TOKEN,
        "kv_filled": len(PROMPTS) * shown * PER_TOKEN,
        "kv_live": sum(length + NEW - 1 for length in tokens) * PER_TOKEN,
        "kv_positions": len(PROMPTS) * shown,
        "kv_pinned": 0,
        "kv_state": 0,
        "kv_host": 0,
        "attention_flops_per_position": 4 * LAYERS * 64,
    }
    speed = done["performance"]
    assert speed.pop("compile_seconds") is None
    for reported in speed.pop("latency").values():
        assert 0 < reported["p50"] <= reported["p95"] <= reported["p99"]
    assert all(figure > 0 for figure in speed.values())


def test_kv_figures_are_null_where_nothing_is_cached(inferred: Infer) -> None:
    inference = inferred(cache="none")[0]["inference"]
    assert inference["kv_bytes_per_token"] == PER_TOKEN
    measured = ("kv_bytes_per_token_measured", "kv_reserved", "kv_filled", "kv_live")
    assert [inference[key] for key in measured] == [None] * 4


def test_one_new_token_has_no_decoding_rate(inferred: Infer) -> None:
    speed = inferred(max_new_tokens=1)[0]["performance"]
    assert speed["decode_tokens_per_second"] is None
    assert speed["tokens_per_second"] > 0


def test_a_run_under_the_exact_ledger_closes_its_books(checkpoint: Path, tmp_path: Path) -> None:
    results = Results()
    with Ledger(mode="exact") as ledger:
        infer.run(Plan.of(ask(checkpoint, cache="static")), ALONE, ledger, quiet(tmp_path, results))
    assert ledger.allocator.unattributed == 0
    assert ledger.peak.bytes == ledger.allocator.peak
    assert ledger.categories["kv_cache"].peak == results.tree()["inference"]["kv_reserved"] > 0
    batches = [(phase.where.step, phase.where.phase) for phase in ledger.phases]
    assert [each for each in batches if each[1] in ("prefill", "decode")] == [
        (step, phase) for step in range(3) for phase in ("prefill", "decode")
    ]


def test_a_prompt_that_is_too_long_leaves_what_was_there(inferred: Infer, tmp_path: Path) -> None:
    inferred()
    before = (tmp_path / "generations.jsonl").read_bytes()
    with pytest.raises(
        Refusal, match="prompt 2 is 120 tokens, 132 with the new ones, and the model allows 128"
    ):
        inferred(prompt=["a", "b" * 120])
    assert (tmp_path / "generations.jsonl").read_bytes() == before


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "generations.jsonl"
    file.write_text("before\n")
    prompts = [Prompt("a", [100], 1, "generation.prompt", "a", "prompt 1")] * 2
    with pytest.raises(TypeError):
        infer.write(file, prompts, [[1], [2]], ["one", object()])  # type: ignore[list-item]
    assert file.read_text() == "before\n"


def test_texts_with_line_breaks_of_any_kind_stay_on_one_line(tmp_path: Path) -> None:
    file, text = tmp_path / "generations.jsonl", "a\nb\u2028c\x85d\x0ce\ud800"
    infer.write(file, [Prompt(text, [100], 1, "generation.prompt", text, "prompt 1")], [[1]], [text])
    (line,) = file.read_text().splitlines()
    assert json.loads(line)["text"] == json.loads(line)["prompt"] == text


def test_what_is_shown_is_one_line_without_control_characters() -> None:
    assert shown("a\tb\n\x1b[31mż") == r"'a\tb\n\x1b[31mż'"
    assert shown("x" * 200, width=10) == "'" + "x" * 10 + "'..."
