"""Which training runs can compile their layers: those whose losses and books were seen to be right."""

from harness.config.settings import Refusal, Settings

KEY = "train.compile"


def check(settings: Settings) -> None:
    """Refuse to compile layers that are not called as the compiler needs them."""
    if not settings.train.compile:
        return
    if settings.mode == "infer":
        raise Refusal(KEY, True, "it is for training; in inference use generation.compile=true")
    if settings.zero.stage == 3:
        # torch: "Skip calling `torch.compiler.disable()`d function", which are DeepSpeed's hooks inside of a layer
        raise Refusal(KEY, True, "zero=3 gathers parameters inside of a layer; use zero=0, 1 or 2")
    if settings.checkpointing.mode == "selective":
        # torch: "`context_fn` must generate a tuple of two `TorchDispatchMode`s", and ours are nested
        remedy = (
            "checkpointing=selective chooses by operators, and a compiled layer has none; use full or none"
        )
        raise Refusal(KEY, True, remedy)
    if settings.checkpointing.offload != "none":
        # the losses are right, but what layers save is then the hooks', and not known of a compiled one
        remedy = "what compiled layers keep for backward is not followed to the host; use checkpointing.offload=none"
        raise Refusal(KEY, True, remedy)
    if settings.adapter.kind != "none":
        # the losses are right, but a rehearsal keeps other bytes in backward: by 8 KiB of 20 MiB in a model of 2 layers
        raise Refusal(KEY, True, "a rehearsal of compiled adapters has other bytes; use adapter=none")
    if settings.pipeline.stages > 1:
        raise Refusal(KEY, True, "the layers of a pipeline's stages are not compiled; use pipeline.stages=1")
