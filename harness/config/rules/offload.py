"""Which runs can let activations wait in the host's memory."""

from harness.config.settings import Checkpointing, Refusal


def check_offload(mode: str, checkpointing: Checkpointing) -> None:
    """Refuse an offload of activations where there are none."""
    if checkpointing.offload == "none":
        return
    if mode == "infer":
        remedy = "inference saves no activations; leave it out"
        raise Refusal("checkpointing.offload", checkpointing.offload, remedy)
