"""The files that a request refers to, as far as they can be read without torch or a hub."""

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
    """Keyword arguments of the model's transformers config; empty for a model on a hub."""
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
        raise Refusal("model.path", model.path, "no such directory; give one that contains config.json")
    if not os.path.isfile(config):
        inside = os.path.join(model.path, "checkpoint")
        exists = os.path.isfile(os.path.join(os.path.expanduser(inside), "config.json"))
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            remedy = f"it is an adapter: give its model here, and adapter.path={model.path}"
            raise Refusal("model.path", model.path, remedy)
        remedy = f"did you mean model.path={inside}?" if exists else "give a directory that contains one"
        raise Refusal("model.path", model.path, f"it contains no config.json; {remedy}")
    try:
        with open(config, encoding="utf-8") as file:
            shape = json.load(file)
    except (OSError, ValueError) as error:
        remedy = "; save it as UTF-8 without a mark, as transformers reads it" if "BOM" in str(error) else ""
        raise Refusal("model.path", model.path, f"its config.json cannot be read: {error}{remedy}") from error
    if not isinstance(shape, dict):
        raise Refusal("model.path", model.path, "its config.json is no transformers config")
    return shape


def generation_fields(directory: str, names: Iterable[str]) -> dict[str, Any]:
    """The fields of the generation config in a checkpoint's directory.

    An old checkpoint has no such file: then those of the `names` in config.json count. Raises Refusal where the file
    cannot be read.
    """
    folder = os.path.expanduser(directory)
    separate = os.path.isfile(os.path.join(folder, "generation_config.json"))
    name = "generation_config.json" if separate else "config.json"
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            fields = json.load(file)
    except (OSError, ValueError) as error:
        raise Refusal("model.path", directory, f"its {name} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise Refusal("model.path", directory, f"its {name} is no generation config")
    if separate:
        return fields
    both = {**text_of(fields), **{name: value for name, value in fields.items() if value is not None}}
    return {name: both[name] for name in names if both.get(name) is not None}


def files(key: str, path: str) -> list[str]:
    """The files of `path`, sorted: itself, those in a directory, or those of a glob. Refuses files without any text."""
    root = os.path.expanduser(path)
    if os.path.isdir(root):
        paths = [os.path.join(top, name) for top, _, names in os.walk(root) for name in names]
    elif os.path.exists(root):
        paths = [root]
        if not os.path.isfile(root):
            remedy = "it is a pipe or a device, and is read more than once; give a file"
            raise Refusal(key, path, remedy)
    else:
        paths = [each for each in glob.glob(root, recursive=True) if os.path.exists(each)]
        if not paths:
            raise Refusal(key, path, "no such file; give a file, a directory or a quoted glob that exists")
    paths = sorted(each for each in paths if os.path.isfile(each))
    if not any(os.path.getsize(each) for each in paths):
        raise Refusal(key, path, "there is no text in it; give a file that is not empty")
    return paths


MOST = 2**28
"""The most bytes of a file that is read whole. A device such as /dev/zero has no end."""


def text(key: str, path: str, remedy: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 if it has that byte order mark; lines end in "\\n". Raises Refusal.

    `remedy` says which file to choose instead.
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:
            raw = file.read(MOST + 1)
    except OSError as error:
        raise Refusal(key, path, f"{error.strerror}; {remedy}") from None
    if len(raw) > MOST:
        raise Refusal(key, path, f"it has more than {MOST:,} bytes; {remedy}")
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        decoded = raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        reason = (
            f"it is not UTF-{16 if utf16 else 8} text (byte {error.start}); save it as UTF-8, or {remedy}"
        )
        raise Refusal(key, path, reason) from None
    if "\0" in decoded:
        reason = f"it has a NUL (character {decoded.index(chr(0))}), and text has none; save it as UTF-8, or {remedy}"
        raise Refusal(key, path, reason)
    return decoded.replace("\r\n", "\n").replace("\r", "\n")


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's config inside a multimodal config, by transformers' names; else `config` itself."""
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
"""The names of these sizes in transformers' configs. A decoder's name comes before an encoder's.

A name is listed only if it means nothing else in another model's config.
"""


def read(config: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """The name that a model's config uses for the size `name`, and its value; None where the config does not set it."""
    shape = text_of(config)
    return next(((each, shape[each]) for each in NAMES[name] if shape.get(each) is not None), (name, None))


def run_state(run: Path) -> Path:
    """The directory of the full-state checkpoints in a training run's directory."""
    return run / "state" if (run / "state").is_dir() else run


def identity_in(run: Path) -> dict[str, Any]:
    """The `identity` in the newest readable checkpoint of a run's directory; empty where none can be read."""
    for manifest in sorted(run_state(run).glob("step-*/manifest.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return dict(json.loads(manifest.read_text())["identity"])
    return {}
