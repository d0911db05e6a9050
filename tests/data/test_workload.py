"""Requests come from a file or are drawn by a seed, each with its own length and number of new tokens."""

from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from harness.config.load import Generation, Refusal, Settings
from harness.data.prompts import find
from harness.data.workload import drawn, lengths, read

BYTES = ByT5Tokenizer()


def generation_with(file: Path, text: str | bytes) -> Generation:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return Generation(workload=str(file), max_new_tokens=9)


def test_a_line_is_a_request_with_a_text_or_a_length(tmp_path: Path) -> None:
    text = '{"prompt": "one"}\n\n{"prompt_length": 5, "max_new_tokens": 2}\n'
    generation = generation_with(tmp_path / "requests.jsonl", text)
    assert read(str(generation.workload)) == [("one", 0, None, "line 1"), (None, 5, 2, "line 3")]
    actual = find(Settings(mode="infer", generation=generation), BYTES, lambda length: 9)
    assert [(len(prompt.tokens), prompt.max_new_tokens) for prompt in actual] == [(3, 9), (5, 2)]
    assert actual[0].text == "one"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_workload_is_the_same_however_an_editor_saves_it(tmp_path: Path, encoding: str) -> None:
    text = '{"prompt": "żółw"}\r\n\r\n{"prompt_length": 5}\r\n'
    generation = generation_with(tmp_path / "requests.jsonl", text.encode(encoding))
    assert read(str(generation.workload)) == [("żółw", 0, None, "line 1"), (None, 5, None, "line 3")]


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        ("{", "line 1: Invalid JSON"),
        ("[1]", "line 1: should be an object"),
        ('{"prompt": 3}', "line 1: prompt should be a valid string"),
        ('{"prompt_length": 0}', "line 1: prompt_length should be greater than or equal to 1"),
        ('{"prompt": "a", "max_new_tokens": "5"}', "line 1: max_new_tokens should be a valid integer"),
        ('{"prompt": "a", "max_new_tokens": true}', "line 1: max_new_tokens should be a number, and no true"),
        ('{"prompt": "a", "tokens": 5}', "line 1: tokens is not a field of a request; write"),
        ('{"prompt": "a", "prompt": "b"}', "line 1: prompt appears twice; write"),
        (
            '{"prompt": "a", "max_new_tokens": 5, "max_new_tokens": 5}',
            "line 1: max_new_tokens appears twice",
        ),
        ('{"max_new_tokens": 5}', "line 1 should have a prompt or its prompt_length"),
        ('{"prompt": "a", "prompt_length": 5}', "line 1 should have a prompt or its prompt_length"),
        ("\n", "there is no request in it"),
    ],
)
def test_a_line_that_is_no_request_is_refused_with_its_number(
    tmp_path: Path, line: str, reported: str
) -> None:
    generation = generation_with(tmp_path / "requests.jsonl", line)
    with pytest.raises(Refusal) as refused:
        read(str(generation.workload))
    assert reported in str(refused.value)
    assert 'write {"prompt_length": 64' in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"generation.workload=.*: Is a directory"):
        read(str(tmp_path))


def test_lengths_are_drawn_by_seed_within_their_range() -> None:
    for kind in ("uniform", "skewed"):
        actual = lengths(kind, 2000, 100, (0, 0))
        assert actual == lengths(kind, 2000, 100, (0, 0)) != lengths(kind, 2000, 100, (1, 0))
        assert (min(actual), max(actual)) == (1, 100)
    assert lengths("fixed", 3, 7, (0, 0)) == [7, 7, 7]
    assert lengths("skewed", 5, 1, (0, 0)) == [1] * 5


def test_half_of_skewed_lengths_are_within_the_root_of_the_longest() -> None:
    actual = sorted(lengths("skewed", 4001, 100, (0, 0)))
    assert 9 <= actual[2000] <= 11  # the median of 4,001 draws has a standard error of 4%
    even = sorted(lengths("uniform", 4001, 100, (0, 0)))
    assert 47 <= even[2000] <= 53


def test_prompts_and_what_follows_them_are_drawn_apart() -> None:
    requests = drawn(Generation(count=50, prompt_length=64, lengths="uniform"), 64, 3)
    assert [request.length for request in requests] != [request.max_new_tokens for request in requests]
    assert len(requests) == 50


def test_sampled_prompts_have_the_lengths_that_were_drawn() -> None:
    generation = Generation(count=6, prompt_length=32, lengths="skewed")
    actual = find(Settings(mode="infer", generation=generation), BYTES, lambda length: 16)
    expected = drawn(generation, 16, 0)
    assert [(len(prompt.tokens), prompt.max_new_tokens) for prompt in actual] == [
        (r.length, r.max_new_tokens) for r in expected
    ]
    rehearsed = find(Settings(mode="infer", generation=generation), BYTES, lambda length: 16, read=False)
    assert [(len(prompt.tokens), prompt.max_new_tokens) for prompt in rehearsed] == [
        (r.length, r.max_new_tokens) for r in expected
    ]
