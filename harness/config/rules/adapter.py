"""The rules of `adapter.*`, and what the directory of an adapter says of itself, read without torch."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from harness.config.rules import packages, quantized
from harness.config.rules.sources import shape_of
from harness.config.settings import Adapter, Refusal, Settings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""peft's names of an adapter's files."""

SHAPE = ("rank", "alpha", "dropout", "targets")
"""What a new adapter is made of; one that is read has its own."""

KIND = {False: "lora", True: "dora"}
"""The kind by `use_dora` in the file."""

MORE = {
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "bias": "none",
    "lora_bias": False,
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config")
    ),
    **dict.fromkeys(("use_bdlora", "use_qalora"), False),
}
"""Fields of peft that train or change more than LoRA's matrices, and the value with which they do not."""


BESIDE = ("gaussian", "eva", "orthogonal")
"""peft's ways to begin an adapter that leave the weights as they are."""


def check(settings: Settings) -> None:
    """Refuse an adapter that cannot be trained or read, as far as that is known without torch."""
    adapter = settings.adapter
    if adapter == Adapter():
        return
    _check_mode(settings, adapter)
    if adapter.path is not None:
        default = Adapter()
        for name in SHAPE:
            if getattr(adapter, name) != getattr(default, name):
                remedy = f"the adapter in adapter.path={adapter.path} has its own; leave it out"
                raise Refusal(f"adapter.{name}", getattr(adapter, name), remedy)
        kind = KIND[bool(config_in(adapter.path).get("use_dora"))]
        if adapter.kind not in ("none", kind) and (adapter.kind, kind) != ("qlora", "lora"):
            raise Refusal(
                "adapter", adapter.kind, f"the one in adapter.path={adapter.path} is {kind}; use that"
            )
    config = quantized.merged(shape_of(settings.model), settings.model)
    if config is not None:
        reason = f"an adapter goes on whole weights here; {quantized.remedy(settings)}"
        raise quantized.refusal(settings.model, config, reason)
    if adapter.kind == "qlora":
        _check_packed(settings)
    packages.check(*_asked_for(adapter), "peft", "adapters")


def _check_mode(settings: Settings, adapter: Adapter) -> None:
    """Refuse keys of an adapter that the mode, or the rest of the request, has no use for."""
    if settings.mode == "infer":
        if adapter.kind == "qlora":
            remedy = "it packs the weights for training; leave it out, adapter.path= generates beside whole weights"
            raise Refusal("adapter", "qlora", remedy)
        if adapter.merge:
            raise Refusal("adapter.merge", True, "it says how training writes its weights; leave it out")
        if adapter.path is None:
            remedy = f"mode=infer trains none; give adapter.path=, a directory with {CONFIG}"
            raise Refusal(*_asked_for(adapter), remedy)
        if settings.tensor_parallel > 1:
            remedy = "an adapter is not shared among ranks here; use generation.tensor_parallel=1"
            raise Refusal("adapter.path", adapter.path, remedy)
        return
    if adapter.kind == "none":
        raise Refusal(*_asked_for(adapter), "adapter=none has none; add adapter=lora or dora")
    if adapter.merge and not settings.train.export:
        raise Refusal("adapter.merge", True, "train.export=false writes nothing; leave one of them out")


def _check_packed(settings: Settings) -> None:
    """Refuse what cannot be done beside weights in 4 bits."""
    stage, stages = settings.zero.stage, settings.pipeline.stages
    if stage == 3:
        remedy = "adapter=qlora keeps its packed weights on every rank; use zero=0, 1 or 2"
        raise Refusal("zero", stage, remedy)
    if stages > 1:
        remedy = "packed weights are not cut into stages here; use pipeline.stages=1, or adapter=lora"
        raise Refusal("pipeline.stages", stages, remedy)
    if settings.adapter.merge:
        remedy = "into 4 bits nothing is merged without rounding; leave it out, and merge with peft into whole weights"
        raise Refusal("adapter.merge", True, remedy)
    packages.check("adapter", "qlora", "bitsandbytes", "adapters")


def _asked_for(adapter: Adapter) -> tuple[str, Any]:
    """The key of an adapter that was set, as it is typed, and its value."""
    default = Adapter()
    names = [each.name for each in fields(Adapter)]
    name = next(name for name in names if getattr(adapter, name) != getattr(default, name))
    return "adapter" if name == "kind" else f"adapter.{name}", getattr(adapter, name)


def config_in(place: str) -> Mapping[str, Any]:
    """What `adapter_config.json` in the directory `place` says. Raises Refusal for one that is no LoRA or DoRA in
    safetensors.
    """
    directory = Path(place)
    if not directory.is_dir():
        raise Refusal("adapter.path", place, f"no such directory; give one that contains {CONFIG}")
    if not (directory / CONFIG).is_file():
        inside = directory / "checkpoint"
        exists = (inside / CONFIG).is_file()
        remedy = f"did you mean adapter.path={inside}?" if exists else "give a directory that contains one"
        raise Refusal("adapter.path", place, f"it contains no {CONFIG}; {remedy}")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal("adapter.path", place, f"its {CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise Refusal("adapter.path", place, f"its {CONFIG} is no adapter's config")
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise Refusal(
            "adapter.path", place, f"its peft_type is {kind}; give a LORA adapter, with or without DoRA"
        )
    for name, off in MORE.items():
        if config.get(name) not in (off, None, [], {}):
            remedy = f"it has {name}, which is more than LoRA's matrices; give one without"
            raise Refusal("adapter.path", place, remedy)
    begins = config.get("init_lora_weights", True)
    if isinstance(begins, str) and begins not in BESIDE:
        remedy = f"its init_lora_weights={begins} changes the weights beside it; convert it to plain LoRA with peft"
        raise Refusal("adapter.path", place, remedy)
    if not (directory / WEIGHTS).is_file():
        pickled = any(directory.glob("adapter_model*.bin"))
        remedy = (
            "its weights are pickled (*.bin), and opening a pickle can run code; where you trust them, open it once "
            "with peft and save it again"
            if pickled
            else f"{WEIGHTS} is missing in it; give a complete adapter"
        )
        raise Refusal("adapter.path", place, remedy)
    return config
