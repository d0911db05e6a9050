"""Converts the config to typed settings: pydantic checks each field, then the rules check combinations."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from harness.config.refusal import nearest
from harness.config.rules import check
from harness.config.settings import (
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
    described_fields,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

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
    "typed",
]


def load(cfg: "DictConfig") -> Settings:
    """`cfg` as settings, after every check that needs neither torch nor the other ranks.

    Raises `Refusal` for an unknown key, a wrong type or range, a missing file, an impossible combination.
    """
    return checked(typed(resolved(cfg)))


def without_hydra(cfg: "DictConfig") -> "DictConfig":
    """A copy of `cfg` without Hydra's own node."""
    from omegaconf import OmegaConf

    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def resolved(cfg: "DictConfig") -> dict[str, Any]:
    """`cfg` as plain nested dicts, without Hydra's own node. Raises `Refusal` for a missing or empty value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    own_keys = without_hydra(cfg)
    try:
        tree: Any = OmegaConf.to_container(own_keys, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise unresolved(error, own_keys) from error
    for key, field in described_fields().items():
        if field.text and OmegaConf.select(own_keys, key) == "":
            raise Refusal(key, "", "is empty; give it a value, or leave it out")
    return tree  # type: ignore[no-any-return]


def unresolved(error: "OmegaConfBaseException", cfg: "DictConfig") -> Refusal:
    """OmegaConf's error about a value of `cfg`, as a Refusal."""
    from omegaconf import OmegaConf

    key, message = error.full_key or "config", str(error.msg or error).partition("\n")[0]
    value = OmegaConf.to_container(cfg, resolve=False)
    for name in key.split("."):
        value = value.get(name, "?") if isinstance(value, dict) else "?"
    return Refusal(key, value, f"{message}; give a value, and write \\${{ or \\??? where a text has that")


def typed(tree: Mapping[str, Any]) -> Settings:
    """A config's plain `tree` as settings. Checks each field alone, and raises `Refusal` for one that is wrong."""
    generation = tree.get("generation")
    if isinstance(generation, Mapping) and isinstance(generation.get("prompt"), str):
        tree = {**tree, "generation": {**generation, "prompt": [generation["prompt"]]}}
    try:
        return TypeAdapter(Settings).validate_python(tree)
    except ValidationError as error:
        raise _refusal(error, tree) from None


def checked(settings: Settings) -> Settings:
    """Check `settings` with every rule that `load` applies, and return them. Raises `Refusal`."""
    check(settings)
    return settings


def _refusal(error: ValidationError, tree: Mapping[str, Any]) -> Refusal:
    """pydantic's first error, as a Refusal."""
    first = error.errors()[0]
    parts = [part for part in first["loc"] if isinstance(part, str)]  # without the place in a list
    if parts[:2] == ["pipeline", "split"]:
        choices = "uniform, parameters, memory, or the layers of each stage, 1 or more, as [3,5]"
        return Refusal("pipeline.split", tree["pipeline"]["split"], f"should be {choices}")
    key, value, kind = ".".join(parts), first["input"], first["type"]
    if kind == "unexpected_keyword_argument":
        return Refusal(key, value, nearest(key, _keys()))
    if kind == "dataclass_type":
        names = [name for name in described_fields() if name.startswith(f"{key}.")]
        return Refusal(key, value, f"is a group of keys; set one of them, as {names[0]}=")
    expected = _KINDS.get(kind.partition("_")[0])
    if expected is not None:
        field = described_fields().get(key)
        limits = f", {field.range}" if field and field.range else ""
        return Refusal(key, value, f"should be {expected.format(key=key)}{limits}")
    text = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return Refusal(key, value, text.replace("False", "false"))


_KINDS = {
    "int": "a valid integer",
    "finite": "a valid integer",
    "float": "a valid number",
    "bool": "a valid boolean, true or false",
    "list": "a valid list, as [a,b]",
    "dict": "a valid dictionary; set a key of it, as {key}.NAME=",
    "string": "a valid string",
}
"""What a value should be, by the first part of pydantic's error type."""


def _keys() -> list[str]:
    """Every key's path, and that of every group of keys."""
    return list(dict.fromkeys(part for key in described_fields() for part in (key.partition(".")[0], key)))
