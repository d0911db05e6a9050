"""What a request refers to on disk, as far as it can be known without torch or a hub."""

import codecs
import glob
import json
import os
from collections.abc import Mapping
from typing import Any

from harness.knobs import Model, Refusal


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
        raise Refusal("model.path", model.path, f"its config.json cannot be read: {error}") from error
    if not isinstance(shape, dict):
        raise Refusal("model.path", model.path, "its config.json is no transformers config")
    return shape


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


def first(shape: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """The first of `names` that `shape` has, and its value; models spell one thing in several ways."""
    return next(((name, shape[name]) for name in names if shape.get(name) is not None), (names[0], None))
