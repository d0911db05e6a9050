"""Stages that generate give transformers' own tokens, keep nothing for a backward, and close their books."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig

from tests.distributed.conftest import Launch, complete

Words = tuple[str, ...]

PROMPTS = ["def run(", "import os", "x", "class Reader(object):", "as"]
NEW = 8
CACHES = ("dynamic", "static", "none")
COMMON = (
    "mode=infer",
    "hardware=cpu",
    "precision=fp32",
    f"generation.max_new_tokens={NEW}",
    "generation.batch=5",
)
SAMPLED = (
    *("generation.sample=true", "generation.top_k=40", "generation.config.repetition_penalty=1.3"),
    *("generation.config.no_repeat_ngram_size=3", "generation.config.min_new_tokens=5"),
)
"""Prompts of a group are of other lengths: what looks at tokens is shown each group of rows that are alike."""
WHOLE_LENGTH = ("generation.stop_at_eos=false", "generation.cache=static")
EACH_BY_ITSELF, ONE_TOKEN = "pipeline.groups=5", "generation.max_new_tokens=1"
LONG = (
    *(
        "generation.prompts=null",
        "generation.prompt_length=100",
        "generation.count=16",
        "generation.batch=16",
    ),
    "generation.max_new_tokens=3",
)
"""Four groups with enough to show at once that a stage's peak is there."""
BOUNDARY = 4 * 100 * 64 * 4
"""Bytes of the hidden states of one such group: sequences, tokens, hidden size, fp32."""
TWO, FOUR = "pipeline.stages=2", "pipeline.stages=4"
GREEDY: dict[int, list[Words]] = {
    2: [
        *((TWO, f"generation.cache={cache}") for cache in CACHES),
        (TWO, "generation.batch=3"),
        (TWO, "pipeline.groups=1"),
        (TWO, EACH_BY_ITSELF),
        (TWO, "pipeline.split=[1,3]"),
    ],
    4: [
        *((FOUR, f"generation.cache={cache}") for cache in CACHES),
        (FOUR, EACH_BY_ITSELF),
        (TWO, "generation.batch=2"),
    ],
}
RUNS: dict[int, list[Words]] = {
    1: [SAMPLED, WHOLE_LENGTH],
    2: [*GREEDY[2], (TWO, *SAMPLED), (TWO, *WHOLE_LENGTH), (TWO, ONE_TOKEN)],
    4: [
        *GREEDY[4],
        (FOUR, *SAMPLED),
        (FOUR, *WHOLE_LENGTH),
        (FOUR, ONE_TOKEN),
        (TWO, "generation.prompts=null", "generation.prompt=x"),
    ],
}
ALONE = RUNS[4][-1]
"""One prompt, so that one of the two replicas has none."""
EXHAUSTIVE = {
    (4, (FOUR, "generation.cache=static")),
    (4, (FOUR, "generation.cache=none")),
    (4, (FOUR, *SAMPLED)),
    (4, (FOUR, ONE_TOKEN)),
    (2, (TWO, "generation.batch=3")),
}
"""Two stages prove of each cache, of what is sampled and of one token what four would; replicas have batches of two."""


def cells(runs: dict[int, list[Words]]) -> list[Any]:
    """Ranks and words, with a pipeline, as pytest's parameters."""
    marks = [pytest.mark.exhaustive]
    return [
        pytest.param(ranks, words, marks=marks if (ranks, words) in EXHAUSTIVE else [])
        for ranks in (2, 4)
        for words in runs[ranks]
    ]


STAGES = [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.exhaustive)]
"""Where two stages have proved it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says something else after each prompt, and ends some of its texts early."""
    directory = tmp_path_factory.mktemp("model") / "checkpoint"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    said = [
        model.generate(torch.tensor([[byte + 3 for byte in prompt.encode()]]), max_new_tokens=NEW)[0, -NEW:]
        for prompt in PROMPTS
    ]
    model.generation_config.eos_token_id = [int(said[0][3]), int(said[1][6])]
    model.save_pretrained(directory)
    ByT5Tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run(launch: Launch, tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Callable[..., Path]:
    """A function of a number of ranks and words to the directory of that run."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    given = (*COMMON, f"model.path={checkpoint}", f"generation.prompts={file}")
    return lambda ranks, words, **more: launch(*given, *words, ranks=ranks, **more)


def tokens(directory: Path) -> list[list[int]]:
    complete(directory)
    return [json.loads(line)["tokens"] for line in (directory / "generations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """transformers' `generate` on one left-padded batch, each row up to its end."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    batch = tokenizer(PROMPTS, add_special_tokens=False, padding=True, return_tensors="pt")
    result = model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    rows = []
    for row in result[:, batch.input_ids.shape[1] :].tolist():
        ends = [place + 1 for place, token in enumerate(row) if token in model.generation_config.eos_token_id]
        rows.append(row[: min([*ends, NEW])])
    assert len({len(row) for row in rows}) > 1  # some end early
    return rows


@pytest.mark.parametrize(("ranks", "words"), cells(GREEDY), ids=str)
def test_stages_give_transformers_own_tokens(
    run: Callable[..., Path], expected: list[list[int]], ranks: int, words: Words
) -> None:
    assert tokens(run(ranks, words)) == expected


@pytest.mark.parametrize(("ranks", "stages"), STAGES)
def test_what_is_sampled_does_not_depend_on_the_stages(
    run: Callable[..., Path], ranks: int, stages: str
) -> None:
    whole = tokens(run(1, SAMPLED))
    assert tokens(run(ranks, (stages, *SAMPLED))) == whole
    assert len({tuple(row) for row in whole}) == len(PROMPTS)


@pytest.mark.parametrize(("ranks", "stages"), STAGES)
def test_one_new_token_is_the_first_of_many(
    run: Callable[..., Path], expected: list[list[int]], ranks: int, stages: str
) -> None:
    assert tokens(run(ranks, (stages, ONE_TOKEN))) == [row[:1] for row in expected]


@pytest.mark.parametrize(("ranks", "stages"), [(2, TWO), (4, FOUR)])
def test_a_group_that_has_ended_is_shown_to_no_stage_any_more(
    run: Callable[..., Path], expected: list[list[int]], ranks: int, stages: str
) -> None:
    kv = complete(run(ranks, (stages, EACH_BY_ITSELF)))["inference"]
    shown = sum(len(prompt) + len(row) - 1 for prompt, row in zip(PROMPTS, expected, strict=True))
    assert kv["kv_reserved"] == kv["kv_live"] == shown * kv["kv_bytes_per_token"]


def test_a_replica_without_a_prompt_waits_for_the_other(
    run: Callable[..., Path], expected: list[list[int]]
) -> None:
    assert tokens(run(4, ALONE)) == [expected[2]]


@pytest.mark.parametrize(("ranks", "words"), cells(RUNS), ids=str)
def test_every_stage_closes_its_books_and_saves_nothing(
    run: Callable[..., Path], ranks: int, words: Words
) -> None:
    actual = complete(run(ranks, words))["ranks"]
    assert len(actual) == ranks
    for rank in actual:
        assert rank["allocator"]["unattributed"] == 0
        assert sum(rank["peak"]["categories"].values()) == rank["peak"]["bytes"] == rank["allocator"]["peak"]
        assert rank["peak"]["saved"] == rank["forwards"]["alive"] == rank["forwards"]["bytes"] == 0
        assert all(phase["saved"] == 0 for phase in rank["phases"])


def test_a_stage_keeps_no_more_with_more_stages(run: Callable[..., Path]) -> None:
    ran = [(1, WHOLE_LENGTH), (2, (TWO, *WHOLE_LENGTH)), (4, (FOUR, *WHOLE_LENGTH))]
    peaks = [
        max(rank["categories"]["activations"]["peak"] for rank in complete(run(*each))["ranks"])
        for each in ran
    ]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("words", [(), pytest.param(WHOLE_LENGTH, marks=pytest.mark.exhaustive)], ids=str)
def test_two_runs_of_one_config_give_the_same_books(run: Callable[..., Path], words: Words) -> None:
    again = complete(run(4, (FOUR, *words), again=1))
    assert complete(run(4, (FOUR, *words)))["ranks"] == again["ranks"]


def test_what_a_stage_receives_is_an_activation_and_no_communication(run: Callable[..., Path]) -> None:
    first, *others = complete(run(4, (FOUR, *LONG)))["ranks"]
    for rank in others:
        assert rank["peak"]["where"]["phase"] == "prefill"
        (received,) = [each for each in rank["peak"]["holdings"] if each["name"] == "received hidden states"]
        assert received["category"] == "activations"
        assert received["bytes"] == BOUNDARY
    for rank in (first, *others):
        assert rank["categories"]["communication"]["peak"] == 0


def test_a_stage_keeps_one_group_of_what_it_sent_however_many_follow(run: Callable[..., Path]) -> None:
    *senders, _ = complete(run(4, (FOUR, *LONG)))["ranks"]
    for rank in senders:
        measured = {
            phase["micro_batch"]: phase["categories"]["activations"]
            for phase in rank["phases"]
            if phase["phase"] == "prefill"
        }
        assert measured == {0: measured[0], **dict.fromkeys((1, 2, 3), measured[0] + BOUNDARY)}
        assert rank["categories"]["activations"]["end"] == 0


def test_the_caches_of_all_stages_hold_what_one_would(run: Callable[..., Path]) -> None:
    whole, *cut = (
        complete(run(*each))["inference"]
        for each in [(1, WHOLE_LENGTH), (2, (TWO, *WHOLE_LENGTH)), (4, (FOUR, *WHOLE_LENGTH))]
    )
    for each in cut:
        assert each["kv_live"] == whole["kv_live"]
        assert each["kv_bytes_per_token_measured"] == whole["kv_bytes_per_token_measured"]
        assert each["kv_reserved"] < whole["kv_reserved"]  # each group is padded by itself


@pytest.mark.parametrize(("ranks", "words"), cells(RUNS), ids=str)
def test_the_record_says_how_idle_each_stage_was(run: Callable[..., Path], ranks: int, words: Words) -> None:
    actual = complete(run(ranks, words))
    stages = actual["pipeline"]["stages"]
    idle = actual["performance"]["stages"]
    assert [each["stage"] for each in idle] == list(range(stages))
    assert all(0 < each["idle"] < 1 and each["busy_seconds"] > 0 for each in idle)
