"""A tokenizer comes back as it was saved, beside whatever model; one that makes nothing of text is refused."""

import json
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from harness.config.settings import Model, Refusal
from harness.data.prompts import encode, text_of
from harness.model.loader import model_config
from harness.model.tokenizer import SAMPLE, load_tokenizer, of_bytes, opens_otherwise, tokenizer_of

TEXTS = ("abc", "Hello  world\n\tif x:\n    y = 1234567", "źółw 🐢", "  lead", "a\u2028b\x00c\r\n", SAMPLE)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 384}
TINY = Model(name="test", config={"model_type": "llama", **SHAPE})


def beside(kind: str, directory: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A directory as a checkpoint of a model of type `kind` is, but for its weights."""
    AutoConfig.for_model(kind).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def kinds() -> Iterator[str]:
    """A type of causal model for each way in which AutoTokenizer chooses a class."""
    ways = {TOKENIZER_MAPPING_NAMES.get(kind): kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    ways.pop(None)
    return iter({"llama", "mistral", "qwen2", "phi3", "gpt2", *ways.values()} - {"gemma4_assistant"})


def trained(model: models.Model, trainer: trainers.Trainer) -> PreTrainedTokenizerFast:
    """As a person makes one: it begins every text, pads on the left, knows a chat and has a token of its own."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([string.printable, "the cat sat on the mat " * 5], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
        padding_side="left",
        chat_template="{{ messages[0].content }}</s>",
    )
    result.add_tokens(["<|mine|>"])
    return result


SPECIAL = ["<unk>", "<s>", "</s>"]
OF_A_LIBRARY = {
    "bpe": lambda: trained(
        models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL)
    ),
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>"),
    ),
    "wordpiece": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL),
    ),
    "llama": lambda: LlamaTokenizer().train_new_from_iterator([string.printable], 150),
    "gpt2": lambda: GPT2Tokenizer().train_new_from_iterator([string.printable, *TEXTS], 300),
}


@pytest.mark.parametrize("saved", [of_bytes(), ByT5Tokenizer()], ids=["of_bytes", "byt5"])
def test_bytes_come_back_beside_every_type_of_causal_model(
    saved: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    expected = [ByT5Tokenizer()(text).input_ids for text in TEXTS]
    for kind in kinds():
        actual = load_tokenizer(beside(kind, tmp_path / kind, saved))
        assert [actual(text).input_ids for text in TEXTS] == expected, kind


def test_anybody_opens_exported_bytes_beside_every_type_of_causal_model(tmp_path: Path) -> None:
    for kind in kinds():
        actual = AutoTokenizer.from_pretrained(beside(kind, tmp_path / kind, of_bytes()))
        assert all(actual(text).input_ids == ByT5Tokenizer()(text).input_ids for text in TEXTS[:-1]), kind
        assert actual.decode([100, 101, 1], skip_special_tokens=True) == "ab", kind


def test_bytes_are_the_tokens_of_byt5() -> None:
    ours, theirs = of_bytes(), ByT5Tokenizer()
    names = ("pad_token_id", "eos_token_id", "unk_token_id", "bos_token_id")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert len(ours) == len(theirs) == 384
    for text in (*TEXTS, "", "<pad> a", "a <extra_id_3>b", "<unk>", *map(chr, range(512))):
        assert ours(text).input_ids == theirs(text).input_ids, repr(text)
    for tokens in ([100, 101], [100, 1, 101, 0], encode(theirs, "ż")[:1], [259, 100, 383], []):
        assert text_of(ours, tokens) == text_of(theirs, tokens)


@pytest.mark.parametrize("name", OF_A_LIBRARY)
def test_a_tokenizer_of_a_library_survives_exports_beside_other_models(name: str, tmp_path: Path) -> None:
    first = OF_A_LIBRARY[name]()
    actual: PreTrainedTokenizerBase = first
    for kind in ("llama", "qwen2", "mistral", "qwen3_5_text"):  # each opens what the one before has saved
        actual = load_tokenizer(beside(kind, tmp_path / kind, actual))
        for text in (*TEXTS, "the <|mine|> cat"):
            assert encode(actual, text) == encode(first, text), kind
        for trait in ("padding_side", "chat_template", "bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(actual, trait) == getattr(first, trait), kind


def test_what_autotokenizer_reads_otherwise_is_said(tmp_path: Path) -> None:
    words = OF_A_LIBRARY["wordpiece"]()
    assert opens_otherwise(beside("llama", tmp_path / "llama", words), words) is None
    assert opens_otherwise(beside("mistral", tmp_path / "bytes", of_bytes()), of_bytes()) is None
    said = opens_otherwise(beside("qwen2", tmp_path / "qwen2", words), words)
    assert said is not None
    assert "reads it as a Qwen2Tokenizer, which gives other tokens" in said
    assert said.endswith("TokenizersBackend.from_pretrained opens it as it is")
    said = opens_otherwise(beside("mistral", tmp_path / "byt5", ByT5Tokenizer()), ByT5Tokenizer())
    assert said is not None
    assert "does not open its tokenizer; ByT5Tokenizer.from_pretrained opens it as it is" in said


def test_a_class_that_a_hub_s_file_names_wrongly_is_left_to_transformers(tmp_path: Path) -> None:
    result = OF_A_LIBRARY["gpt2"]()
    directory = beside("llama", tmp_path / "saved", result)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["backend"]  # as files from before transformers 5 are
    config["tokenizer_class"] = "LlamaTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(directory)(SAMPLE).input_ids == result(SAMPLE).input_ids


def emptied(directory: Path) -> None:
    """What is left of ByT5's in a qwen2's directory for who goes by the model's type."""
    ByT5Tokenizer().save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": "Qwen2Tokenizer"})
    )


def without_model(directory: Path) -> None:
    of_bytes().save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')


def cut(directory: Path) -> None:
    of_bytes().save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.')


def listed(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("[]")


def marked(directory: Path) -> None:
    of_bytes().save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            emptied,
            r"its Qwen2Tokenizer gives no tokens for a text; are its files complete\? Give another with ",
        ),
        (
            without_model,
            r"it cannot be loaded: its tokenizer\.json has no model, as tokenizers writes it; save ",
        ),
        (
            cut,
            r"it cannot be loaded: its tokenizer\.json is not JSON \(Unterminated .*\); save the tokenizer again",
        ),
        (listed, r"it cannot be loaded: its tokenizer_config\.json is not a JSON object; save "),
        (marked, r"it cannot be loaded: its tokenizer_config\.json is not JSON \(.*BOM"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(damage: object, says: str, tmp_path: Path) -> None:
    assert callable(damage)
    AutoConfig.for_model("qwen2", **SHAPE, num_key_value_heads=4).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(Refusal, match=f"^model.path={tmp_path}: {says}"):
        opened_for(Model(name="test", path=str(tmp_path)))
    with pytest.raises(Refusal, match=f"^data.tokenizer={tmp_path}: {says}"):
        opened_for(TINY, str(tmp_path))


def opened_for(model: Model, other: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a run of `model`."""
    return tokenizer_of(model, model_config(model), other)


def test_a_checkpoint_without_a_tokenizer_takes_bytes(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path)
    assert opened_for(Model(name="test", path=str(tmp_path)))("abc").input_ids == [100, 101, 102, 1]


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=rf"^data.tokenizer={tmp_path}: it cannot be loaded"):
        opened_for(TINY, str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model_knows_is_refused(tmp_path: Path) -> None:
    less = Model(name="test", config={**TINY.config, "vocab_size": 300})
    with pytest.raises(
        Refusal, match=r"model=test: the tokenizer has 384 tokens, and the model's vocabulary has 300"
    ):
        opened_for(less)
    ByT5Tokenizer(extra_ids=200).save_pretrained(tmp_path)
    with pytest.raises(
        Refusal, match=r"data.tokenizer=.* has 459 tokens, and the model's vocabulary has 384"
    ):
        opened_for(TINY, str(tmp_path))
