"""Reads DeepSpeed's config file: JSON, or JSON with comments."""

import base64
import json
import os
from collections.abc import Iterable
from typing import Any

from harness.config.rules.sources import text
from harness.config.settings import Refusal

KEY = "deepspeed.config"

MOST_BYTES = 2**20


def read(path: str) -> dict[str, Any]:
    """The config in a file of JSON, or of JSON with comments, which DeepSpeed reads too. Raises Refusal."""
    place = os.path.expanduser(path)
    if os.path.exists(place) and not os.path.isfile(place):
        raise Refusal(
            KEY, path, "it is a directory or a device; give DeepSpeed's config file, ds_config.json"
        )
    if os.path.isfile(place) and os.path.getsize(place) > MOST_BYTES:
        size = os.path.getsize(place)
        raise Refusal(
            KEY, path, f"it has {size:,} bytes, and a config at most {MOST_BYTES:,}; give ds_config.json"
        )
    if not os.path.exists(place) and _is_base64(path):
        raise Refusal(KEY, path[:20] + "...", "it is a config in base64; write it to a file, and name that")
    content = text(KEY, path, "give DeepSpeed's config file, ds_config.json")
    if not content.strip():
        raise Refusal(KEY, path, "it is empty; give DeepSpeed's config file, ds_config.json")
    try:
        tree = _parsed(content)
    except (ValueError, RecursionError) as error:
        said = str(error).partition("\n")[0] or "it is nested too deeply"
        raise Refusal(KEY, path, f"it is no JSON: {said}") from None
    if not isinstance(tree, dict):
        raise Refusal(KEY, path, 'it has no keys at its top; a config is {"zero_optimization": {...}, ...}')
    return tree


def _parsed(content: str) -> Any:
    """JSON; where it is none, Hjson, which is how DeepSpeed reads comments. Raises ValueError."""
    try:
        return json.loads(content, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        try:
            from hjson import HjsonDecodeError, loads  # comes with DeepSpeed
        except ImportError:
            raise error from None
        try:
            return loads(content, object_pairs_hook=_once)
        except HjsonDecodeError:
            raise error from None


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f'"{key}" is in it twice; leave one out')
        tree[key] = value
    return tree


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _is_base64(value: str) -> bool:
    try:
        return base64.urlsafe_b64decode(value).decode().lstrip().startswith("{")
    except ValueError:
        return False
