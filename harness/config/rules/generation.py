"""The rules between the knobs of generation, each with its sentence."""

import os
from collections.abc import Mapping
from typing import Any

from harness.config.generation_fields import KNOWN
from harness.config.rules.sources import files, generation_fields
from harness.config.settings import Generation, Model, Refusal, Settings
from harness.config.strategy import Origin, merged

STATIC = "generation.batching=static generation.cache=dynamic"
"""What to type instead of continuous batching: pages are for that alone."""


def generation(settings: Settings) -> None:
    """Refuse what cannot be generated so."""
    asked = settings.generation
    if settings.mode == "train":
        return
    _origins(asked)
    _batching(settings)
    if asked.cache_bits != 8 and asked.cache != "quantized":
        remedy = (
            f"generation.cache={asked.cache} has the precision of the run; add generation.cache=quantized"
        )
        raise Refusal("generation.cache_bits", asked.cache_bits, remedy)
    check_device(asked, settings.hardware.device)
    _tensor_parallel(settings)
    if asked.compile and asked.cache != "static":
        remedy = (
            f"generation.cache={asked.cache} grows, and a program has one shape; add generation.cache=static"
        )
        raise Refusal("generation.compile", True, remedy)
    if asked.compile and settings.pipeline.stages > 1:
        remedy = "stages are not compiled; use pipeline.stages=1, or leave it out"
        raise Refusal("generation.compile", True, remedy)
    if settings.model.path is None or os.path.isdir(os.path.expanduser(settings.model.path)):
        merged(asked, *_checkpoint(settings.model))  # a hub's is known once it is there


def _checkpoint(model: Model) -> tuple[Mapping[str, Any], Origin]:
    """The fields of the generation config that a model brings, and what names it."""
    if model.path is None:
        return {}, ("model", model.name)
    return generation_fields(model.path, KNOWN), ("model.path", model.path)


def check_device(asked: Generation, device: str) -> None:
    """Refuse a cache that a model on this kind of `device` cannot have; "auto" is not known yet."""
    if asked.cache == "offloaded" and device == "cpu":
        remedy = "the host's memory is where it would go, and the model is there; use dynamic, or a GPU"
        raise Refusal("generation.cache", "offloaded", remedy)


def _batching(settings: Settings) -> None:
    asked, key = settings.generation, "generation.batching"
    if asked.batching == "static":
        if asked.cache == "paged":
            remedy = "pages go from a request that ends to the next; add generation.batching=continuous"
            raise Refusal("generation.cache", "paged", remedy)
        for name, value, off in (
            ("page_size", asked.page_size, 16),
            ("pages", asked.pages, None),
            ("batch_tokens", asked.batch_tokens, None),
        ):
            if value != off:
                remedy = "static batching has none; add generation.batching=continuous generation.cache=paged"
                raise Refusal(f"generation.{name}", value, remedy)
        return
    if asked.cache != "paged":
        remedy = (
            f"generation.cache={asked.cache} holds a batch that begins together; add generation.cache=paged"
        )
        raise Refusal(key, asked.batching, remedy)
    for name, count in (
        ("pipeline.stages", settings.pipeline.stages),
        ("generation.tensor_parallel", asked.tensor_parallel),
    ):
        if count > 1:
            remedy = f"requests enter and leave on one rank at a time; use 1, or {STATIC}"
            raise Refusal(name, count, remedy)
    if asked.batch_tokens is not None and asked.batch_tokens < asked.batch:
        remedy = (
            f"a forward has a token of each of generation.batch={asked.batch} requests; use as many or more"
        )
        raise Refusal("generation.batch_tokens", asked.batch_tokens, remedy)


def _tensor_parallel(settings: Settings) -> None:
    ranks = settings.generation.tensor_parallel
    if ranks > 1 and settings.generation.compile:
        remedy = "ranks that share a layer take it as it is; use generation.compile=false, or 1"
        raise Refusal("generation.tensor_parallel", ranks, remedy)


def _origins(asked: Generation) -> None:
    origins = {"prompts": asked.prompts, "prompt": asked.prompt, "workload": asked.workload}
    said = {name: value for name, value in origins.items() if value}
    if len(said) > 1:
        (one, value), (other, _), *_ = said.items()
        raise Refusal(f"generation.{one}", value, f"give either it or generation.{other}=, not both")
    for name in ("prompts", "workload"):
        if name in said:
            files(f"generation.{name}", str(said[name]))
    if asked.lengths != "fixed" and said:
        remedy = f"prompts that are sampled have such lengths; leave out generation.{next(iter(said))}="
        raise Refusal("generation.lengths", asked.lengths, remedy)


def given(generation: Generation) -> bool:
    """Whether prompts are given, or their lengths."""
    return bool(generation.prompts or generation.prompt or generation.workload)
