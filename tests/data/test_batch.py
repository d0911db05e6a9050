"""Padded batches: their text alone counts, and the mean of their losses is the mean per label."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.config.settings import Data
from harness.data import token_batches
from harness.data.batch import IGNORED, Batch, Example, Form, Share, share_of
from harness.model.tokenizer import of_bytes
from harness.runtime.world import World

LENGTHS = (1, 3, 20, 2, 5, 8, 1, 4, 9)
FORM = Form(8, packed=False, pad=0)


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, rank, torch.device("cpu"))


@pytest.fixture
def documents(tmp_path: Path) -> Data:
    """Documents of `LENGTHS` bytes, an end after each, and one without any."""
    (tmp_path / "text").mkdir()
    for number, length in enumerate((*LENGTHS, 0)):
        (tmp_path / "text" / f"{number}.txt").write_text(chr(ord("a") + number) * length)
    return Data(
        kind="text",
        path=str(tmp_path / "text"),
        packing=False,
        validation=0,
        cache_dir=str(tmp_path / "cache"),
    )


def test_each_document_is_a_sequence_cut_or_padded_and_an_empty_one_is_none(documents: Data) -> None:
    tokenizer = of_bytes()
    corpus = token_batches.corpus(documents, tokenizer, 8)
    batches = islice(token_batches.loader(corpus.train, 1, world(), 0), len(LENGTHS))
    seen = {}
    for tokens, labels, mask, _ in batches:
        assert labels is not None
        assert mask is not None
        assert torch.equal(labels, tokens.where(mask == 1, IGNORED))
        assert mask.tolist() == [sorted(mask.flatten().tolist(), reverse=True)]
        seen[int(tokens[0, 0])] = int(mask.sum())
    assert sorted(seen.values()) == sorted(min(length + 1, 8) for length in LENGTHS)
    assert len(seen) == len(LENGTHS)
    assert corpus.cut == sum(max(0, length + 1 - 8) for length in LENGTHS)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_rank_knows_what_its_step_has_on_all_ranks(
    documents: Data, tmp_path: Path, streaming: bool
) -> None:
    if streaming:
        (tmp_path / "rows").mkdir()
        lines = "".join(f'{{"text": "{"a" * length}"}}\n' for length in LENGTHS * 2)
        (tmp_path / "rows" / "train.jsonl").write_text(lines)
        documents = Data(kind="hub", name=str(tmp_path / "rows"), packing=False, validation=0, streaming=True)
    train = token_batches.corpus(documents, of_bytes(), 8).train
    # with 4 micro-batches in an epoch on each of 2 ranks, every other step of 3 is of two epochs
    whole = [list(islice(token_batches.loader(train, 1, world(rank, 2), 3, 0, 3), 9)) for rank in (0, 1)]
    for step in range(3 if not streaming else 2):
        of_step = [batch for own in whole for batch in own[step * 3 : step * 3 + 3]]
        labels = sum(int((batch.targets[:, 1:] != IGNORED).sum()) for batch in of_step)
        tokens = sum(int(batch.mask.sum()) for batch in of_step if batch.mask is not None)
        assert {batch.share for batch in of_step} == {Share(labels / 6, tokens / 6)}
    resumed = next(token_batches.loader(train, 1, world(1, 2), 3, 4, 3))
    assert torch.equal(resumed.tokens, whole[1][4].tokens)
    assert resumed.share == whole[1][4].share


def test_the_mean_of_the_losses_is_the_mean_per_label_and_nothing_to_learn_is_0() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    examples = [Example([1, 2]), Example([3, 4, 5, 6, 7, 8, 9]), Example([1, 2, 3], [IGNORED] * 3)]
    share = share_of([each.counts for each in examples], 3)
    batches = [FORM.collate([each._replace(share=share)]) for each in examples]
    losses = [model(**batch.arguments).loss for batch in batches]
    together = FORM.collate(examples)
    assert sum(each.item() for each in losses) / 3 == pytest.approx(
        float(model(**together.arguments).loss), rel=1e-6
    )
    assert float(losses[2]) == 0
    nothing = examples[2]._replace(share=share_of([examples[2].counts], 1))
    assert float(model(**FORM.collate([nothing]).arguments).loss) == 0


def test_a_packed_batch_is_its_tokens_alone() -> None:
    batch = Form(2).collate([Example([1, 2]), Example([3, 4])])
    assert batch == Batch(batch.tokens)
    assert batch.arguments["labels"] is batch.arguments["input_ids"] is batch.tokens
    assert [*batch.arguments] == ["input_ids", "labels"]
