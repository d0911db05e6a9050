"""The config as typed settings, each field checked by its type and all by the rules between them."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from harness.knobs import (
    Checkpointing,
    Data,
    Generation,
    Hardware,
    Ledger,
    Model,
    Pipeline,
    Refusal,
    Settings,
    Train,
    World,
    Zero,
    knobs,
)
from harness.rules import check

__all__ = [
    "Checkpointing",
    "Data",
    "Generation",
    "Hardware",
    "Ledger",
    "Model",
    "Pipeline",
    "Refusal",
    "Settings",
    "Train",
    "World",
    "Zero",
    "checked",
    "load",
    "nearest",
    "typed",
]


def load(cfg: DictConfig) -> Settings:
    """`cfg` as settings, every rule checked that needs neither torch nor the other ranks.

    Raises `Refusal` for an unknown key, a wrong type or range, a file that is not there, an impossible combination.
    """
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        tree: Any = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise Refusal(error.full_key or "config", "?", str(error.msg or error)) from error
    return checked(typed(tree))


def typed(tree: Mapping[str, Any]) -> Settings:
    """A config's plain `tree` as settings, each field by itself. Raises `Refusal` as `load` does for a field."""
    generation = tree.get("generation")
    if isinstance(generation, Mapping) and isinstance(generation.get("prompt"), str):
        tree = {**tree, "generation": {**generation, "prompt": [generation["prompt"]]}}
    try:
        return TypeAdapter(Settings).validate_python(tree)
    except ValidationError as error:
        raise _refusal(error, tree) from None


def checked(settings: Settings) -> Settings:
    """`settings`, every rule checked that `load` checks. Raises `Refusal`."""
    check(settings)
    return settings


def nearest(key: str, known: Iterable[str]) -> str:
    """The remedy for an unknown `key`: the closest known one, by the whole path or by its last name."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    last = key.rpartition(".")[2]
    close = close or [each for each in known if each.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"no such key; did you mean {close[0]}?" if close else "no such key; --help lists them all"


def _refusal(error: ValidationError, tree: Mapping[str, Any]) -> Refusal:
    """pydantic's first complaint as a sentence."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    if parts[:2] == ["pipeline", "split"]:
        choices = "uniform, parameters, memory, or the layers of each stage, 1 or more, as [3,5]"
        return Refusal("pipeline.split", tree["pipeline"]["split"], f"should be {choices}")
    key, value, text = ".".join(parts), first["input"], first["msg"]
    if first["type"] == "unexpected_keyword_argument":
        return Refusal(key, value, nearest(key, _keys()))
    if first["type"] == "dataclass_type":
        names = [name for name in knobs() if name.startswith(f"{key}.")]
        return Refusal(key, value, f"is a group of keys; set one of them, as {names[0]}=")
    return Refusal(key, value, text.removeprefix("Input ").replace("False", "false"))


def _keys() -> list[str]:
    """Every key's path, and that of every group of keys."""
    return list(dict.fromkeys(part for key in knobs() for part in (key.partition(".")[0], key)))
