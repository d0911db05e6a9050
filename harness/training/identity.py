"""What makes a training run the run it is: saved with each checkpoint, and compared before a run goes on from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from harness.config.refusal import as_typed
from harness.config.resume import AGAIN, CHANGEABLE, differences
from harness.config.settings import Data, Refusal, Settings
from harness.data import token_batches
from harness.data.text_digest import of_tokenizer
from harness.model.plan import Plan
from harness.record.fields import flat
from harness.record.results import Change
from harness.runtime.world import World

_NAMES_ONLY = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
"""Keys of a model's config that say nothing of how it computes."""


def identity(
    plan: Plan, world: World, tokenizer: PreTrainedTokenizerBase, corpus: token_batches.Corpus
) -> dict[str, Any]:
    """The values of all keys in `config/resume.py`, as JSON has them. The model's shape is `model.config.NAME`."""
    settings, shape = plan.settings, plan.config.to_dict()
    values = {
        "world.size": world.size,
        "pipeline.stages": world.stages,
        "pipeline.split": plan.split if world.stages > 1 else None,
        **_of_group("zero", settings, "stage", "offload", "reduce_bucket_size"),
        "precision": settings.precision,
        **_of_group("optimizer", settings, "kind", "state", "momentum"),
        **_of_group("train", settings, "micro_batch", "accumulation", "sequence", "fused"),
        **_of_group("train", settings, "steps", "learning_rate", "betas", "epsilon", "weight_decay", "clip"),
        **_of_group("train", settings, "warmup_steps", "schedule", "compile"),
        **_of_group("loss", settings, "kind", "chunk"),
        **_of_group("adapter", settings, "kind", "rank", "alpha", "dropout", "targets", "path"),
        "deepspeed.options": settings.deepspeed.options or None,
        "model": settings.model.path or settings.model.name,
        "model.attention": settings.model.attention,
        **{
            f"model.config.{key}": value for key, value in flat(shape) if key.split(".")[0] not in _NAMES_ONLY
        },
        "data": _data(settings.data, corpus),
        "data.tokenizer": f"{type(tokenizer).__name__} {of_tokenizer(tokenizer)[:16]}",
        "data.packing": settings.data.packing,
        "data.validation": settings.data.validation,
        "seed": settings.seed,
        "hardware.device": world.kind,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return as_read


def compared(
    saved: Mapping[str, Any], own: Mapping[str, Any], changes: list[str], checkpoint: Path
) -> tuple[list[Change], list[str]]:
    """The `changes` of a run from `checkpoint`, with both values, and the keys that cannot be compared.

    Raises Refusal for a difference that `changes` does not name, and for a key in it that is no difference.
    """
    different, unknown = differences(saved, own)
    for key in different:
        if key not in changes:
            more = [each for each in different if each not in (key, *changes)]
            others = f"; {', '.join(more)} too" if more else ""
            remedy = (
                f"or train.resume_changes=[{','.join([*changes, *filter(CHANGEABLE.__contains__, [key, *more])])}]"
                if key in CHANGEABLE
                else f"or {AGAIN}"
            )
            before = as_typed(saved[key])
            raise Refusal(key, own[key], f"{checkpoint} was saved with {before}{others}; use that, {remedy}")
    for key in changes:
        if key not in different and key not in unknown:
            remedy = f"{key} is as it was saved in {checkpoint}; leave it out"
            raise Refusal("train.resume_changes", changes, remedy)
    return [Change(key=key, saved=saved[key], value=own[key]) for key in different], unknown


def _of_group(group: str, settings: Settings, *names: str) -> dict[str, Any]:
    return {f"{group}.{name}": getattr(getattr(settings, group), name) for name in names}


def _data(settings: Data, corpus: token_batches.Corpus) -> str:
    """The text by its digest, wherever it lies; of a stream, which is never read whole, its name."""
    if corpus.digest:
        return f"{settings.kind} {corpus.digest[:16]}"
    return f"{settings.kind} {settings.name} {settings.split} {settings.column}, streamed"
