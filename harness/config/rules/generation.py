"""The rules between the fields of generation. Each rule raises a Refusal with its own sentence."""

import os
from collections.abc import Mapping
from typing import Any

from harness.config.generation_fields import KNOWN
from harness.config.rules.sources import files, generation_fields
from harness.config.settings import Generation, Model, Refusal, Settings
from harness.config.strategy import Origin, merged

STATIC = "generation.batching=static generation.cache=dynamic"
"""What to type instead of continuous batching; a paged cache works only with that."""


def generation(settings: Settings) -> None:
    """Refuse combinations of generation's fields that cannot work."""
    generation = settings.generation
    if settings.mode == "train":
        return
    _origins(generation)
    _batching(settings)
    if generation.cache_bits != 8 and generation.cache != "quantized":
        remedy = f"generation.cache={generation.cache} has the precision of the run; add generation.cache=quantized"
        raise Refusal("generation.cache_bits", generation.cache_bits, remedy)
    check_device(generation, settings.hardware.device)
    _tensor_parallel(settings)
    if generation.compile and generation.cache != "static":
        remedy = f"generation.cache={generation.cache} grows, and a compiled step cannot; add generation.cache=static"
        raise Refusal("generation.compile", True, remedy)
    if generation.compile and settings.pipeline.stages > 1:
        remedy = "stages are not compiled; use pipeline.stages=1, or leave it out"
        raise Refusal("generation.compile", True, remedy)
    if settings.model.path is None or os.path.isdir(os.path.expanduser(settings.model.path)):
        # a hub's generation config is known only after its download
        merged(generation, *_checkpoint(settings.model))


def _checkpoint(model: Model) -> tuple[Mapping[str, Any], Origin]:
    """The fields of the model's own generation config, and the key and value that name the model."""
    if model.path is None:
        return {}, ("model", model.name)
    return generation_fields(model.path, KNOWN), ("model.path", model.path)


def check_device(generation: Generation, device: str) -> None:
    """Refuse a cache that this kind of `device` cannot have. For "auto" nothing is refused: it is not resolved yet."""
    if generation.cache == "offloaded" and device == "cpu":
        remedy = "it would move to the host's memory, where the model is already; use dynamic, or a GPU"
        raise Refusal("generation.cache", "offloaded", remedy)


def _batching(settings: Settings) -> None:
    generation, key = settings.generation, "generation.batching"
    if generation.batching == "static":
        if generation.cache == "paged":
            remedy = "only continuous batching uses pages; add generation.batching=continuous"
            raise Refusal("generation.cache", "paged", remedy)
        for name, value, off in (
            ("page_size", generation.page_size, 16),
            ("pages", generation.pages, None),
            ("batch_tokens", generation.batch_tokens, None),
        ):
            if value != off:
                remedy = "static batching has none; add generation.batching=continuous generation.cache=paged"
                raise Refusal(f"generation.{name}", value, remedy)
        return
    if generation.cache != "paged":
        remedy = f"generation.cache={generation.cache} is for requests that start together; add generation.cache=paged"
        raise Refusal(key, generation.batching, remedy)
    for name, count in (
        ("pipeline.stages", settings.pipeline.stages),
        ("generation.tensor_parallel", generation.tensor_parallel),
    ):
        if count > 1:
            remedy = f"continuous batching works on whole models; use 1, or {STATIC}"
            raise Refusal(name, count, remedy)
    if generation.batch_tokens is not None and generation.batch_tokens < generation.batch:
        remedy = f"a forward has a token of each of generation.batch={generation.batch} requests; use as many or more"
        raise Refusal("generation.batch_tokens", generation.batch_tokens, remedy)


def _tensor_parallel(settings: Settings) -> None:
    ranks = settings.generation.tensor_parallel
    if ranks > 1 and settings.generation.compile:
        remedy = "layers that ranks share are not compiled; use generation.compile=false, or 1"
        raise Refusal("generation.tensor_parallel", ranks, remedy)


def _origins(generation: Generation) -> None:
    origins = {"prompts": generation.prompts, "prompt": generation.prompt, "workload": generation.workload}
    sources = {name: value for name, value in origins.items() if value}
    if len(sources) > 1:
        (one, value), (other, _), *_ = sources.items()
        raise Refusal(f"generation.{one}", value, f"give either it or generation.{other}=, not both")
    for name in ("prompts", "workload"):
        if name in sources:
            files(f"generation.{name}", str(sources[name]))
    if generation.lengths != "fixed" and sources:
        remedy = f"it is for prompts sampled from the data; leave out generation.{next(iter(sources))}="
        raise Refusal("generation.lengths", generation.lengths, remedy)


def has_prompts(generation: Generation) -> bool:
    """Whether the user sets prompts, or a workload with their lengths."""
    return bool(generation.prompts or generation.prompt or generation.workload)
