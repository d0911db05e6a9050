"""The finding about products in 8 bits: what they leave as it was, and what they add. It imports no torch."""

from collections.abc import Iterator

from harness.analysis.findings.finding import NOTABLE, Finding, Run
from harness.tables import size


def fp8(run: Run) -> Iterator[Finding]:
    """`precision=fp8` changes what is multiplied, and nothing that is kept; with ZeRO-3 more is kept."""
    products, settings = run.record.model.products, run.settings
    if products is None:
        return
    saved = "" if run.peak.saved is None else f" ({size(run.peak.saved)} of the peak)"
    sentence = (
        f"{products.short}, which is for speed: weights, gradients and what is saved for backward{saved} stay in "
        f"{run.record.model.dtype}"
    )
    passes = run.peak.where is not None and run.peak.where.phase in ("forward", "backward")
    if passes:
        copies = run.bytes_of("workspace")
        sentence += f". Products copy their factors, in fp32 and then in 8 bits: temporary tensors take {size(copies)}"
    if passes and settings is not None and settings.zero.stage == 3 and settings.checkpointing.mode == "none":
        received = run.bytes_of("communication") - sum(run.buckets)
        if received >= NOTABLE * run.whole > 0:
            sentence += (
                f". And each keeps its gathered weight for its backward, which ZeRO-3 cannot free then: "
                f"{size(received)} of communication at the peak; checkpointing=full keeps none"
            )
    yield Finding("fp8", f"{sentence}.", None)


IN_8_BITS = (fp8,)
"""The findings in printing order."""
