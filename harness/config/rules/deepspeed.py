"""The rules for `deepspeed.options`: only what goes to DeepSpeed unchanged, and is the same in a rehearsal."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.config.deepspeed_keys import KEYS, Passed, Read, Refused, Setting
from harness.config.refusal import nearest
from harness.config.settings import Refusal, Settings

OPTIONS = "deepspeed.options"


def deepspeed(settings: Settings) -> None:
    """Refuse a file that no command line names; options that are settings, have no effect, or cannot be honoured."""
    file = settings.deepspeed.config
    if file is not None:
        remedy = (
            "it is read where it is typed, and here a config of yours has it; add it to the command instead"
        )
        raise Refusal("deepspeed.config", file, remedy)
    options = settings.deepspeed.options
    if settings.mode == "infer" and options:
        raise Refusal(
            OPTIONS, options, "it configures training, and mode=infer uses no DeepSpeed; leave it out"
        )
    for key, value in _leaves(options):
        entry = KEYS.get(key)
        if not isinstance(entry, Passed):
            raise Refusal(f"{OPTIONS}.{key}", value, _remedy(key, entry))
        try:
            TypeAdapter(entry.kind).validate_python(value)
        except ValidationError as error:
            why = error.errors()[0]["msg"].removeprefix("Input ")
            raise Refusal(f"{OPTIONS}.{key}", value, why) from None
        section = key.rpartition(".")[0]
        if section.endswith("offload_param") and settings.zero.offload != "all":
            raise Refusal(f"{OPTIONS}.{key}", value, "no parameters are offloaded; add zero.offload=all")
        if section.endswith("offload_optimizer") and settings.zero.offload == "none":
            raise Refusal(f"{OPTIONS}.{key}", value, "nothing is offloaded; add zero.offload=optimizer")


def _remedy(key: str, entry: Any) -> str:
    if isinstance(entry, Setting):
        return f"it is a setting; use {entry.key}="
    if isinstance(entry, Refused):
        return entry.why
    if isinstance(entry, Read):
        return "it is no option; give it in a file by deepspeed.config="
    if entry is not None:
        return f"it has no effect here: {entry.why}; leave it out"
    passed = [name for name, each in KEYS.items() if isinstance(each, Passed)]
    return nearest(key, passed).replace("--help lists them all", "DeepSpeed has none of this name")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in KEYS:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value
