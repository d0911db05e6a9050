"""What a request refers to on disk, as far as it can be known without torch or a hub."""

import codecs
import glob
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.config.settings import Model, Refusal


def shape_of(model: Model) -> Mapping[str, Any]:
    """Keyword arguments of the model's transformers config, as far as they can be known without a hub."""
    if model.path is None:
        if model.random or model.config:
            return model.config
        raise Refusal(
            "model", model.name, "the group gives no config; choose one with model= or give model.path="
        )
    path = os.path.expanduser(model.path)
    config = os.path.join(path, "config.json")
    if not os.path.isdir(path):
        if path.count("/") == 1 and path[0] not in "./~" and not os.path.isdir(os.path.dirname(path)):
            return {}  # an owner/name on a hub
        raise Refusal("model.path", model.path, "no such directory; give one that holds config.json")
    if not os.path.isfile(config):
        inside = os.path.join(model.path, "checkpoint")
        found = os.path.isfile(os.path.join(os.path.expanduser(inside), "config.json"))
        remedy = f"did you mean model.path={inside}?" if found else "give a directory that holds one"
        raise Refusal("model.path", model.path, f"it holds no config.json; {remedy}")
    try:
        with open(config, encoding="utf-8") as file:
            shape = json.load(file)
    except (OSError, ValueError) as error:
        remedy = "; save it as UTF-8 without a mark, as transformers reads it" if "BOM" in str(error) else ""
        raise Refusal("model.path", model.path, f"its config.json cannot be read: {error}{remedy}") from error
    if not isinstance(shape, dict):
        raise Refusal("model.path", model.path, "its config.json is no transformers config")
    return shape


def generation_fields(directory: str, known: Iterable[str]) -> dict[str, Any]:
    """The fields of the generation config in a checkpoint's directory; of an old one, those `known` in config.json.

    Raises Refusal where it cannot be read.
    """
    where = os.path.expanduser(directory)
    whole = os.path.isfile(os.path.join(where, "generation_config.json"))
    name = "generation_config.json" if whole else "config.json"
    try:
        with open(os.path.join(where, name), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise Refusal("model.path", directory, f"its {name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise Refusal("model.path", directory, f"its {name} is no generation config")
    if whole:
        return found
    both = {**text_of(found), **{name: value for name, value in found.items() if value is not None}}
    return {name: both[name] for name in known if both.get(name) is not None}


def files(key: str, path: str) -> list[str]:
    """The files that `path` names, in order: itself, those in a directory or of a glob. Refuses what has no text."""
    where = os.path.expanduser(path)
    if os.path.isdir(where):
        found = [os.path.join(top, name) for top, _, names in os.walk(where) for name in names]
    elif os.path.exists(where):
        found = [where]
        if not os.path.isfile(where):
            remedy = "it is a pipe or a device, and is read more than once; give a file"
            raise Refusal(key, path, remedy)
    else:
        found = [each for each in glob.glob(where, recursive=True) if os.path.exists(each)]
        if not found:
            raise Refusal(key, path, "no such file; give a file, a directory or a quoted glob that exists")
    found = sorted(each for each in found if os.path.isfile(each))
    if not any(os.path.getsize(each) for each in found):
        raise Refusal(key, path, "there is no text in it; give a file that is not empty")
    return found


def text(key: str, path: str, remedy: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 where its mark says so; its lines end in "\\n". Raises Refusal.

    `remedy` says what file to give where there is none to read.
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:
            raw = file.read()
    except OSError as error:
        raise Refusal(key, path, f"{error.strerror}; {remedy}") from None
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        found = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        said = f"it is not UTF-{16 if wide else 8} text (byte {error.start}); save it as UTF-8, or {remedy}"
        raise Refusal(key, path, said) from None
    if "\0" in found:
        said = f"it has a NUL (character {found.index(chr(0))}), and text has none; save it as UTF-8, or {remedy}"
        raise Refusal(key, path, said)
    return found.replace("\r\n", "\n").replace("\r", "\n")


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a model of several kinds of input the config of its text, under transformers' own names for that."""
    within = (config.get(name) for name in ("decoder", "generator", "text_config"))
    return next((each for each in within if isinstance(each, Mapping)), config)


NAMES = {
    "num_hidden_layers": (
        *("decoder_layers", "num_decoder_layers", "num_hidden_layers"),
        *("n_layer", "n_layers"),
    ),
    "num_attention_heads": (
        *("decoder_attention_heads", "num_decoder_attention_heads", "num_attention_heads"),
        *("n_head", "n_heads", "attention_heads"),
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim"),
}
"""What transformers' configs call these, where it is nothing else in another; a decoder's before an encoder's."""


def read(config: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """A length in a model's config by the name that it has there, and its value: None where it is not said."""
    shape = text_of(config)
    return next(((each, shape[each]) for each in NAMES[name] if shape.get(each) is not None), (name, None))


def run_state(run: Path) -> Path:
    """Where the full-state checkpoints of a training run's directory are."""
    return run / "state" if (run / "state").is_dir() else run


def identity_in(run: Path) -> dict[str, Any]:
    """What the newest checkpoint in a run's directory says that its run was; nothing where none can be read."""
    for manifest in sorted(run_state(run).glob("step-*/manifest.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return dict(json.loads(manifest.read_text())["identity"])
    return {}
