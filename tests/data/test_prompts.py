"""Prompts come whole and in order from where they are given, and what a model cannot take is refused by its place."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BloomConfig, ByT5Tokenizer, LlamaConfig, PreTrainedTokenizerFast

from harness.config.load import Generation, Refusal, Settings
from harness.data.prompts import Prompt, check, encode, find, lines, text_of

BYTES = ByT5Tokenizer()


def words() -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with <s>, ends none, and takes unknown words for an end."""
    vocabulary = {"<s>": 0, "</s>": 1, "one": 2, "two": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def prompts_of(file: Path) -> list[Prompt]:
    return find(Settings(mode="infer", generation=Generation(prompts=str(file))), BYTES, lambda length: 64)


def prompt(length: int, place: str = "line 3", most: int = 1) -> Prompt:
    return Prompt("a" * length, [100] * length, most, "generation.prompts", "file.txt", place)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"one\ntwo\n", [(1, "one"), (2, "two")]),
        (b"one\ntwo", [(1, "one"), (2, "two")]),
        (b"one\r\ntwo\r\n", [(1, "one"), (2, "two")]),
        (b"\n\none\n\ntwo\n\n", [(3, "one"), (5, "two")]),
        (b"\xef\xbb\xbfone\n", [(1, "one")]),
        (b"  one \t\n", [(1, "  one \t")]),
        ("a\u2028b\x0cc\x85d\n".encode(), [(1, "a\u2028b\x0cc\x85d")]),
        ("żółw 🐢\n".encode(), [(1, "żółw 🐢")]),
        ("żółw\r\n🐢\r\n".encode("utf-16"), [(1, "żółw"), (2, "🐢")]),
        ("\ufeffżółw\n".encode("utf-16-be"), [(1, "żółw")]),
    ],
)
def test_every_line_that_is_not_empty_is_a_prompt_with_its_number(
    tmp_path: Path, written: bytes, expected: list[tuple[int, str]]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(written)
    assert lines("generation.prompts", str(file)) == expected
    assert [(prompt.place, prompt.text) for prompt in prompts_of(file)] == [
        (f"line {number}", text) for number, text in expected
    ]


@pytest.mark.parametrize("written", [b"", b"\n\n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, written: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(written)
    with pytest.raises(Refusal, match=rf"^generation.prompts={file}: there is no prompt in it"):
        prompts_of(file)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            b"one\n\xff\n",
            "it is not UTF-8 text (byte 4); save it as UTF-8, or give a text file with one prompt",
        ),
        ("ż".encode("utf-16") + b"\x7c", "it is not UTF-16 text (byte 4); save it as UTF-8, or "),
        ("one".encode("utf-16-le"), "it has a NUL (character 1), and text has none; save it as UTF-8, or "),
        (b"one\n\0\0\0", "it has a NUL (character 4), and text has none"),
        ("one".encode("utf-32"), "it has a NUL"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, written: bytes, said: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(written)
    with pytest.raises(Refusal) as refused:
        prompts_of(file)
    assert str(refused.value).startswith(f"generation.prompts={file}: {said}")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="No such file"):
        prompts_of(tmp_path / "prompts.txt")
    with pytest.raises(Refusal, match="directory"):
        prompts_of(tmp_path)


def test_prompts_on_the_command_line_keep_their_order() -> None:
    actual = find(
        Settings(mode="infer", generation=Generation(prompt=["b\n", "a", "b\n"])), BYTES, lambda length: 64
    )
    assert [prompt.text for prompt in actual] == ["b\n", "a", "b\n"]
    assert [prompt.tokens for prompt in actual] == [[101, 13], [100], [101, 13]]
    assert [prompt.place for prompt in actual] == ["prompt 1", "prompt 2", "prompt 3"]


def test_a_prompt_is_left_open_and_keeps_the_beginning_its_tokenizer_gives() -> None:
    assert BYTES("ab").input_ids == [100, 101, BYTES.eos_token_id]
    assert encode(BYTES, "ab") == [100, 101]
    assert encode(BYTES, "") == []
    assert encode(words(), "one two") == [0, 2, 3]


def test_text_leaves_out_what_has_none() -> None:
    assert text_of(BYTES, [100, 101]) == "ab"
    assert text_of(BYTES, [100, BYTES.eos_token_id, 101, BYTES.pad_token_id]) == "ab"
    assert text_of(BYTES, [100, 50_000, 101]) == "ab"
    assert text_of(BYTES, encode(BYTES, "ż")[:1]) == ""
    assert text_of(BYTES, []) == ""


def test_a_prompt_that_just_fits_is_taken() -> None:
    check([prompt(24, most=8)], LlamaConfig(max_position_embeddings=32))


@pytest.mark.parametrize(
    ("length", "new", "remedy"),
    [
        (25, 8, "shorten it to 24 or use generation.max_new_tokens=7"),
        (32, 8, "shorten it to 24"),
        (31, 32, "use generation.max_new_tokens=1"),
        (32, 32, "shorten both"),
    ],
)
def test_a_prompt_that_is_too_long_is_refused_by_line_length_and_limit(
    length: int, new: int, remedy: str
) -> None:
    with pytest.raises(Refusal) as refused:
        check([prompt(length, most=new)], LlamaConfig(max_position_embeddings=32))
    assert str(refused.value) == (
        f"generation.prompts=file.txt: line 3 is {length} tokens, {length + new} with the new ones, "
        f"and the model allows 32 (max_position_embeddings); {remedy}"
    )


def test_what_a_request_says_itself_is_mended_where_it_says_it() -> None:
    requested = prompt(3, most=100)._replace(key="generation.workload", sets_max_new_tokens=True)
    with pytest.raises(Refusal, match=r'; give it "max_new_tokens": 29$'):
        check([requested], LlamaConfig(max_position_embeddings=32))


def test_the_prompt_that_is_too_long_is_the_one_named() -> None:
    with pytest.raises(Refusal, match="line 7 is 40 tokens"):
        check(
            [prompt(2, "line 1"), prompt(40, "line 7"), prompt(2, "line 8")],
            LlamaConfig(max_position_embeddings=32),
        )


def test_a_model_without_a_limit_takes_any_length() -> None:
    check([prompt(5000)], BloomConfig())


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(Refusal, match="line 3 has no tokens"):
        check([prompt(0)], LlamaConfig())


def test_a_token_that_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(
        Refusal, match=r"line 3 has token 100, and the model's vocabulary has 100; .*data\.tokenizer="
    ):
        check([prompt(1)], LlamaConfig(vocab_size=100))


def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(Refusal, match="it has more than 268,435,456 bytes; give a text file"):
        prompts_of(Path("/dev/zero"))
