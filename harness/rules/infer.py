"""The rules between the knobs of generation, each with its sentence."""

from harness.knobs import Generation, Refusal, Settings, as_typed
from harness.rules.sources import files


def generation(settings: Settings) -> None:
    """Refuse what cannot be generated so."""
    asked = settings.generation
    if settings.mode == "train":
        return
    if asked.prompts is not None and asked.prompt:
        raise Refusal("generation.prompts", asked.prompts, "give either it or generation.prompt=, not both")
    if asked.prompts is not None:
        files("generation.prompts", asked.prompts)
    if asked.tensor_parallel > 1:
        for key, value, alone in (
            ("batching", asked.batching, "static"),
            ("compile", asked.compile, False),
        ):
            if value != alone:
                told = f"generation.{key}={as_typed(value)} goes by one rank to a model; use generation.tensor_parallel=1"
                raise Refusal("generation.tensor_parallel", asked.tensor_parallel, told)
    if not asked.sample:
        for key, value, off in (
            ("temperature", asked.temperature, 1.0),
            ("top_k", asked.top_k, 0),
            ("top_p", asked.top_p, 1.0),
        ):
            if value != off:
                remedy = "the likeliest token is taken whatever it is; add generation.sample=true"
                raise Refusal(f"generation.{key}", value, remedy)


def given(generation: Generation) -> bool:
    """Whether prompts are given, and none is sampled."""
    return generation.prompts is not None or bool(generation.prompt)
