"""What a request refers to on disk, as far as it can be known without torch or a hub."""

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


def files(key: str, path: str) -> None:
    """Refuse a file, directory or glob that gives no text."""
    where = os.path.expanduser(path)
    if os.path.isdir(where):
        found = [os.path.join(top, name) for top, _, names in os.walk(where) for name in names]
    else:
        found = (
            [where] if os.path.isfile(where) else [each for each in glob.glob(where) if os.path.isfile(each)]
        )
    if not found and not os.path.isdir(where):
        raise Refusal(key, path, "no such file; give a file, a directory or a quoted glob that exists")
    if not any(os.path.getsize(each) for each in found):
        raise Refusal(key, path, "there is no text in it; give a file that is not empty")


def first(shape: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """The first of `names` that `shape` has, and its value; models spell one thing in several ways."""
    return next(((name, shape[name]) for name in names if shape.get(name) is not None), (names[0], None))
