"""The tokenizer of a run: of the class that saved it, whatever the model; a byte tokenizer where there is none."""

import json
import string
from itertools import islice
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from harness.config.settings import Model, Refusal
from harness.model import loader

CONFIG = "tokenizer_config.json"
WHOLE = "tokenizer.json"
JSON = (CONFIG, WHOLE, "special_tokens_map.json", "added_tokens.json", "vocab.json")
FILES = (CONFIG, WHOLE, "tokenizer.model", "vocab.json", "vocab.txt")
SAMPLE = "It's  1234567 words,\n\tof which SOME are like_this(): e\u0301\u00e9 \u6f22\u5b57 \U0001f422\r\n\n "
"""Text that tokenizer classes are known to split in different ways."""


def tokenizer_of(
    settings: Model, config: PretrainedConfig, other: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in `other` (`data.tokenizer`), else the one in `model.path`, else a byte tokenizer.

    `config` is the model's.
    Raises Refusal where it cannot be loaded, gives no tokens for text, or has more tokens than the model's vocabulary.
    """
    key, place = ("data.tokenizer", other) if other is not None else ("model.path", settings.path)
    tokenizer = None
    if place is not None:
        with loader.loading(place, key):
            directory = loader.directory_of(place)
            if other is not None or any((directory / name).is_file() for name in FILES):
                tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        tokenizer = of_bytes()
    _check(settings, config, tokenizer, key, place)
    return tokenizer


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, of the class that saved it. Raises what transformers raises.

    `AutoTokenizer` chooses the class by the model type, and for some types ignores the saved class.
    """
    _check_files(directory)
    kind = _saved_class(directory) or AutoTokenizer
    return kind.from_pretrained(directory, trust_remote_code=False)


def _check_files(directory: Path) -> None:
    """Raise ValueError for a tokenizer file whose contents do not match its name."""
    for name in JSON:
        file = directory / name
        if not file.is_file():
            continue
        try:
            contents = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"its {name} is not JSON ({error}); save the tokenizer again") from error
        if not isinstance(contents, dict):
            raise ValueError(f"its {name} is not a JSON object; save the tokenizer again")
        if name == WHOLE and not isinstance(contents.get("model"), dict):
            raise ValueError(f"its {name} has no model, as tokenizers writes it; save the tokenizer again")


def _saved_class(directory: Path) -> type[PreTrainedTokenizerBase] | None:
    """The class that the config names; None where transformers has no such class, or an older transformers saved it."""
    file = directory / CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kind = getattr(transformers, str(config.get("tokenizer_class")), None)
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedTokenizerBase):
        return None
    exact = "backend" in config  # transformers 5 writes this next to the exact class
    return kind if exact or not issubclass(kind, PreTrainedTokenizerFast) else None


def of_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer of UTF-8 bytes, with `</s>` at the end: the tokens of ByT5, 384 with the reserved ones.

    It is a fast tokenizer with a tokenizer.json, which `AutoTokenizer` opens for any model type; ByT5's own class has
    no such file.
    """
    names, letters = ("<pad>", "</s>", "<unk>"), bytes_to_unicode()
    vocabulary = {name: number for number, name in enumerate(names)}
    vocabulary |= {letters[byte]: byte + len(names) for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\ufffd", "")])
    ends = {"single": "$A </s>", "pair": "$A </s> $B </s>", "special_tokens": [("</s>", 1)]}
    tokenizer.post_processor = processors.TemplateProcessing(**ends)
    tokenizer.add_special_tokens([AddedToken(name, lstrip=True, rstrip=True) for name in names])
    tokenizer.add_special_tokens([AddedToken(f"<extra_id_{number}>") for number in range(125)])
    named = dict(zip(("pad_token", "eos_token", "unk_token"), names, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def opens_otherwise(directory: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A warning where `AutoTokenizer` opens `directory`, in which `tokenizer` was saved, differently; None if it does
    not.
    """
    try:
        with loader.quiet():
            auto = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if auto(SAMPLE).input_ids == tokenizer(SAMPLE).input_ids:
            return None
        problem = f"reads it as a {type(auto).__name__}, which gives other tokens for some texts"
    except Exception:  # tokenizer classes may raise any type
        problem = "does not open its tokenizer"
    correct_call = f"{type(tokenizer).__name__}.from_pretrained"
    return f"for this type of model AutoTokenizer {problem}; {correct_call} opens it as it is"


def _check(
    settings: Model, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, key: str, place: str | None
) -> None:
    """Raise Refusal for a tokenizer that gives no tokens for text, or more tokens than the model's vocabulary."""
    text = f"{string.printable} {' '.join(islice(tokenizer.get_vocab(), 1000))}"
    if not {*tokenizer(text, verbose=False).input_ids} - {*tokenizer.all_special_ids}:
        remedy = f"its {type(tokenizer).__name__} gives no tokens for a text; are its files complete?"
        raise Refusal(key, place, f"{remedy} Give another with data.tokenizer=")
    vocab_size = config.get_text_config(decoder=True).vocab_size
    if len(tokenizer) > vocab_size:
        key, value = (key, place) if place is not None else ("model", settings.name)
        raise Refusal(
            key,
            value,
            f"the tokenizer has {len(tokenizer)} tokens, and the model's vocabulary has {vocab_size}; give one that "
            "fits with data.tokenizer=, or a model with a larger vocab_size",
        )
