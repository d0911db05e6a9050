"""Token batches: held-out text apart, every rank its own, and the same place after a skip."""

import dataclasses
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from harness.config.settings import Data, Refusal
from harness.data import token_batches
from harness.data.text import STDLIB_BYTES
from harness.runtime.world import World

BYTES = ByT5Tokenizer()


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, rank, torch.device("cpu"))


@pytest.fixture
def text(tmp_path: Path) -> Data:
    """Ten documents, each of one letter, 100 bytes and an end: 1,010 tokens."""
    (tmp_path / "text").mkdir()
    for letter in "abcdefghij":
        (tmp_path / "text" / f"{letter}.txt").write_text(letter * 100)
    return Data(kind="text", path=str(tmp_path / "text"), validation=0.1, cache_dir=str(tmp_path / "cache"))


def blocks(part: token_batches.Blocks | token_batches.Stream | None) -> list[list[int]]:
    assert isinstance(part, token_batches.Blocks)
    return [part[index].tokens for index in range(len(part))]


def test_the_row_is_every_document_in_order_with_ends_between(text: Data) -> None:
    corpus = token_batches.corpus(text, BYTES, 10)
    row = [token for block in blocks(corpus.train) + blocks(corpus.validation) for token in block]
    expected = [token for letter in "abcdefghij" for token in BYTES(letter * 100).input_ids]
    assert row == expected[: len(row)]
    assert len(row) == 1010 // 10 * 10


def test_held_out_text_is_the_end_and_never_trained_on(text: Data) -> None:
    corpus = token_batches.corpus(text, BYTES, 10)
    assert (len(blocks(corpus.train)), len(blocks(corpus.validation))) == (90, 11)
    held_out = [token for block in blocks(corpus.validation) for token in block]
    assert held_out == [*BYTES("i" * 8).input_ids, *BYTES("j" * 100).input_ids]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_an_epoch_out_with_nothing_twice(text: Data, size: int) -> None:
    train = token_batches.corpus(text, BYTES, 10).train
    assert isinstance(train, token_batches.Blocks)
    each = len(train) // (2 * size)
    seen = [
        tuple(row)
        for rank in range(size)
        for batch in islice(token_batches.loader(_numbered(train), 2, world(rank, size), 0), each)
        for row in batch.tokens.tolist()
    ]
    assert len(seen) == len(set(seen)) == each * 2 * size


def test_a_step_takes_the_same_sequences_however_many_ranks_share_it(text: Data) -> None:
    numbered = _numbered(token_batches.corpus(text, BYTES, 10).train)
    alone = next(token_batches.loader(numbered, 4, world(), 3))
    shared = [next(token_batches.loader(numbered, 2, world(rank, 2), 3)).tokens for rank in (0, 1)]
    assert torch.equal(torch.cat(shared), alone.tokens)


@pytest.mark.parametrize("skip", [0, 1, 21, 22, 23, 50, 100])
def test_a_skip_goes_on_exactly_where_it_says(text: Data, skip: int) -> None:
    numbered = _numbered(token_batches.corpus(text, BYTES, 10).train)
    whole = list(islice(token_batches.loader(numbered, 2, world(1, 2), 7), skip + 3))
    after = list(islice(token_batches.loader(numbered, 2, world(1, 2), 7, skip=skip), 3))
    assert [batch.tokens.tolist() for batch in after] == [batch.tokens.tolist() for batch in whole[skip:]]


def test_epochs_are_shuffled_anew_and_the_seed_decides_how(text: Data) -> None:
    numbered = _numbered(token_batches.corpus(text, BYTES, 10).train)

    def order(seed: int) -> list[list[int]]:
        return [
            batch.tokens[:, 0].tolist()
            for batch in islice(token_batches.loader(numbered, 9, world(), seed), 20)
        ]

    first, second = order(0)[:10], order(0)[10:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(90))
    assert first != second
    assert order(0) == order(0)
    assert order(0) != order(1)


def test_reading_batches_leaves_the_global_random_state_alone(text: Data) -> None:
    train = token_batches.corpus(text, BYTES, 10).train
    before = torch.get_rng_state()
    list(islice(token_batches.loader(train, 2, world(), 0, skip=3), 60))
    assert torch.equal(before, torch.get_rng_state())


def test_the_row_is_made_once_and_again_when_the_text_changes(text: Data, tmp_path: Path) -> None:
    token_batches.corpus(text, BYTES, 10)
    token_batches.corpus(text, BYTES, 20)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    (tmp_path / "text" / "k.txt").write_text("k" * 100)
    assert blocks(token_batches.corpus(text, BYTES, 10).validation)[-1][0] == BYTES("k").input_ids[0]
    assert not list((tmp_path / "cache").glob(".partial-*"))


def test_the_standard_library_is_enough_for_a_first_run(tmp_path: Path) -> None:
    corpus = token_batches.corpus(Data(cache_dir=str(tmp_path)), BYTES, 256)
    assert len(blocks(corpus.train)) * 256 > STDLIB_BYTES / 2
    assert "    def " in BYTES.decode([*chain(*blocks(corpus.validation))])


def test_prompts_are_held_out_text_that_the_seed_chooses(text: Data) -> None:
    held_out = blocks(token_batches.corpus(text, BYTES, 10).validation)
    prompts = token_batches.sample_prompts(text, BYTES, 5, 10, 0)
    assert len(prompts) == 5
    assert all(prompt in held_out for prompt in prompts)
    assert prompts == token_batches.sample_prompts(text, BYTES, 5, 10, 0)


def test_more_prompts_than_there_is_text_for_are_refused(text: Data) -> None:
    with pytest.raises(Refusal, match=r"generation.count=12: the held-out text has 11 pieces of 10 tokens"):
        token_batches.sample_prompts(text, BYTES, 12, 10, 0)


def test_text_shorter_than_a_block_is_refused(text: Data) -> None:
    with pytest.raises(Refusal, match=r"data.path=.*1,010 tokens, too few for a block of 1024"):
        token_batches.corpus(text, BYTES, 1024)


def test_text_shorter_than_a_global_batch_is_refused_before_it_is_read(text: Data) -> None:
    train = token_batches.corpus(text, BYTES, 10).train
    with pytest.raises(Refusal, match=r"train.micro_batch=50: 2 ranks take 100 sequences .* has 90"):
        token_batches.loader(train, 50, world(0, 2), 0)


def test_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(Refusal, match=r"data.path=.*there is no text in it"):
        token_batches.corpus(
            Data(kind="text", path=str(tmp_path / "empty.txt"), cache_dir=str(tmp_path)), BYTES, 10
        )


def test_a_file_that_is_not_text_is_named(text: Data, tmp_path: Path) -> None:
    (tmp_path / "text" / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(Refusal, match=r"data.path=.*picture.png: it is not UTF-8 text \(byte 0\)"):
        token_batches.corpus(text, BYTES, 10)


@pytest.mark.parametrize(
    "written", ["\ufeffa\nbż".encode(), "a\r\nbż".encode(), "a\nbż".encode("utf-16"), b"a\rb\xc5\xbc"]
)
def test_text_is_the_same_however_an_editor_saves_it(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(written)
    given = Data(kind="text", path=f"{tmp_path}/*.txt", cache_dir=str(tmp_path / "cache"), validation=0)
    assert blocks(token_batches.corpus(given, BYTES, 6).train) == [BYTES("a\nbż").input_ids]


def test_files_are_found_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_text("abc")
    (tmp_path / "a" / "gone.txt").symlink_to("nowhere")
    for path in (f"{tmp_path}/**/*.txt", str(tmp_path / "a")):
        given = Data(kind="text", path=path, cache_dir=str(tmp_path / "cache"), validation=0)
        assert blocks(token_batches.corpus(given, BYTES, 4).train) == [BYTES("abc").input_ids]


def test_a_column_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": null, "n": 1}\n{"text": "abc", "n": 2}\n')
    rows = str(tmp_path / "rows")
    given = Data(kind="hub", name=rows, cache_dir=str(tmp_path / "cache"), validation=0)
    assert blocks(token_batches.corpus(given, BYTES, 5).train) == [[1, *BYTES("abc").input_ids]]
    with pytest.raises(Refusal, match=r"^data.column=n: it has int, and not text"):
        token_batches.corpus(dataclasses.replace(given, column="n"), BYTES, 5)


def test_a_hub_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(Refusal, match=r"data.name=nobody/nothing: it cannot be loaded") as refusal:
        token_batches.corpus(Data(kind="hub", name="nobody/nothing", cache_dir=str(tmp_path)), BYTES, 10)
    assert "\n" not in str(refusal.value)


def test_a_dataset_of_the_hubs_kind_is_read_and_streamed(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(f'{{"text": "{"ab" * 50}"}}\n' for _ in range(20)))
    mapped = Data(kind="hub", name=str(tmp_path / "rows"), cache_dir=str(tmp_path / "cache"), validation=0.1)
    streamed = Data(kind="hub", name=str(tmp_path / "rows"), streaming=True, validation=0.1)
    whole, stream = token_batches.corpus(mapped, BYTES, 10), token_batches.corpus(streamed, BYTES, 10)
    rows = [block.tokens for block in stream.train]  # type: ignore[union-attr]
    assert len(rows) == 202 - 21
    assert len(blocks(whole.train)) == 202 - 21
    pairs = [list(islice(token_batches.loader(stream.train, 2, world(rank, 2), 0), 3)) for rank in (0, 1)]
    assert [b.tokens.tolist() for pair in zip(*pairs, strict=True) for b in pair] == [
        rows[i : i + 2] for i in range(0, 12, 2)
    ]


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": "ab"}\n')
    given = Data(kind="hub", name=str(tmp_path / "rows"), column="body", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(Refusal, match=r"data.column=body: it has the columns text"):
        token_batches.corpus(given, BYTES, 10)


def _numbered(train: token_batches.Blocks | token_batches.Stream) -> token_batches.Blocks:
    """The same number of blocks, each of its own number: what a test can tell apart."""
    assert isinstance(train, token_batches.Blocks)

    class Row:
        def __getitem__(self, part: slice) -> dict[str, list[int]]:
            return {"token": [part.start // train.form.sequence] * train.form.sequence}

    return token_batches.Blocks(Row(), train.form, 0, len(train))
