"""Generation on two ranks from a checkpoint that two ranks trained: transformers' own tokens, and closed books."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.model.kv_cache import kv_bytes_per_token
from harness.record import record_file
from tests.distributed.conftest import NARROW, QUICK, Launch, Warm

PROMPTS = ["def run(", "import os\\n", "x", "class Reader(object):", "żółw"]
NEW, BATCH, RANKS = 16, 2, 2
SAMPLED = ("generation.sample=true", "generation.top_k=40", "precision=fp32")


@pytest.fixture(scope="session")
def checkpoint(launch: Launch) -> Path:
    return launch("mode=train", "zero=2", *QUICK, *NARROW, "train.export=true") / "checkpoint"


@pytest.fixture(scope="session")
def generated(launch: Launch, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """A function of overrides to the directory of a run that continued PROMPTS with them."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    words = ("mode=infer", f"model.path={checkpoint}", f"generation.prompts={file}")
    sizes = (f"generation.max_new_tokens={NEW}", f"generation.batch={BATCH}")
    return lambda *more, **options: launch(*words, *sizes, *more, **options)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]


def expected(checkpoint: Path, dtype: torch.dtype, **options: Any) -> list[list[int]]:
    """transformers' `generate` on each rank's own left-padded batches, put back in order."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    ends = model.generation_config.eos_token_id
    result: dict[int, list[int]] = {}
    for rank in range(RANKS):
        mine = range(rank, len(PROMPTS), RANKS)
        for first in range(0, len(mine), BATCH):
            numbers = mine[first : first + BATCH]
            texts = [PROMPTS[number] for number in numbers]
            batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            rows = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)
            for number, row in zip(numbers, rows[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                stop = row.index(ends) + 1 if ends in row else NEW
                result[number] = row[:stop]
    return [result[number] for number in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("cache", "precision"), [("dynamic", "bf16"), ("static", "bf16"), ("none", "bf16"), ("dynamic", "fp32")]
)
def test_two_ranks_give_transformers_tokens_and_their_books_close(
    generated: Launch, checkpoint: Path, cache: str, precision: str
) -> None:
    directory = generated(f"generation.cache={cache}", f"precision={precision}")
    kind = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    actual = lines(directory)
    assert [line["prompt"] for line in actual] == PROMPTS
    assert [line["tokens"] for line in actual] == expected(checkpoint, dtype, **kind)
    assert [line["text"] for line in actual] == [
        tokenizer.decode(line["tokens"], skip_special_tokens=True) for line in actual
    ]
    for rank in record_file.read(directory)["ranks"]:
        assert rank["allocator"]["unattributed"] == 0
        assert sum(rank["peak"]["categories"].values()) == rank["peak"]["bytes"] == rank["allocator"]["peak"]
        assert rank["peak"]["saved"] == 0
        assert (rank["categories"]["kv_cache"]["peak"] == 0) == (cache == "none")


def test_the_kv_bytes_told_are_the_formulas_and_a_static_cache_reserves_more(
    generated: Launch, checkpoint: Path
) -> None:
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config
    per_token = kv_bytes_per_token(config, torch.bfloat16)
    reported = {}
    for cache in ("dynamic", "static"):
        reported[cache] = record_file.read(generated(f"generation.cache={cache}", "precision=bf16"))[
            "inference"
        ]
        assert (
            reported[cache]["kv_bytes_per_token"]
            == reported[cache]["kv_bytes_per_token_measured"]
            == per_token
        )
    assert (
        reported["dynamic"]["kv_reserved"]
        == reported["dynamic"]["kv_filled"]
        > reported["dynamic"]["kv_live"]
    )
    assert (
        reported["static"]["kv_reserved"] - reported["dynamic"]["kv_reserved"] == 8 * config.num_hidden_layers
    )


def test_two_runs_of_one_config_generate_the_same_and_give_the_same_books(generated: Launch) -> None:
    first, second = generated(*SAMPLED), generated(*SAMPLED, again=1)
    assert lines(first) == lines(second)
    assert record_file.read(first)["ranks"] == record_file.read(second)["ranks"]
    assert record_file.read(first)["inference"] == record_file.read(second)["inference"]


def test_one_rank_samples_what_two_do(generated: Launch) -> None:
    assert lines(generated(*SAMPLED, ranks=1)) == lines(generated(*SAMPLED))


def test_a_rank_without_prompts_caches_nothing(launch: Launch, checkpoint: Path) -> None:
    directory = launch(
        "mode=infer",
        f"model.path={checkpoint}",
        "generation.prompt=['def main(']",
        f"generation.max_new_tokens={NEW}",
    )
    assert [line["prompt"] for line in lines(directory)] == ["def main("]
    first, second = record_file.read(directory)["ranks"]
    assert first["categories"]["kv_cache"]["peak"] > 0 == second["categories"]["kv_cache"]["peak"]


def test_a_prompt_that_is_too_long_is_said_once_and_nothing_is_written(
    warm: Warm, checkpoint: Path, tmp_path: Path
) -> None:
    file, directory = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("short\n" + "a" * 2000 + "\n")
    words = [
        "mode=infer",
        f"model.path={checkpoint}",
        f"generation.prompts={file}",
        f"hydra.run.dir={directory}",
    ]
    assert f"generation.prompts={file}: line 2 is 2000 tokens" in warm.refused(words)
    assert not directory.exists()


def test_requests_that_enter_and_leave_get_the_tokens_of_static_batches_and_books_close(
    generated: Launch,
) -> None:
    paged = ("generation.batching=continuous", "generation.cache=paged", "generation.page_size=4")
    directory = generated(*paged, "precision=fp32")
    static = generated("generation.cache=dynamic", "precision=fp32")
    assert lines(directory) == lines(static)
    actual = record_file.read(directory)
    assert actual["inference"]["unasked_tokens"] == 0
    assert actual["performance"]["forwards"] > 0
    assert actual["performance"]["evicted"] == 0
    for rank in actual["ranks"]:
        assert rank["allocator"]["unattributed"] == 0
        assert rank["categories"]["kv_cache"]["peak"] > 0
        assert rank["categories"]["kv_cache"]["end"] == 0


@pytest.mark.parametrize("batching", [(), ("generation.batching=continuous", "generation.cache=paged")])
def test_ranks_with_other_numbers_of_batches_end_together(launch: Launch, batching: tuple[str, ...]) -> None:
    sizes = ("generation.count=3", "generation.batch=1", "generation.max_new_tokens=2", "ledger.steps=1")
    actual = record_file.read(launch("mode=infer", "model.config.num_hidden_layers=1", *sizes, *batching))
    assert actual["status"] == "complete"
    assert actual["inference"]["prompts"] == 3
