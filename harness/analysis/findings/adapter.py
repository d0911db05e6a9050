"""The finding about an adapter: what it leaves out, and what it leaves as it was. It imports no torch."""

from collections.abc import Iterator

from harness.analysis.findings.finding import NOTABLE, Finding, Run
from harness.analysis.findings.memory import MOMENTS, in_fp32_by_adam
from harness.record.results import ITEMSIZE
from harness.tables import size

MASTER = 4
"""Bytes of a parameter's fp32 master, beside 16-bit weights."""


def adapter(run: Run) -> Iterator[Finding]:
    """Frozen weights have no gradients and no optimizer state, but activations are saved for backward as without it."""
    model, settings = run.record.model, run.settings
    if run.record.mode != "train" or not model.trainable or not model.parameters or settings is None:
        return
    sentence = (
        f"{model.trainable:,} of {model.parameters:,} parameters are trained. The others have no gradients and no "
        f"optimizer state{_spared(run, model.parameters - model.trainable)}."
    )
    saved = run.peak.saved or 0
    if saved >= NOTABLE * run.whole > 0:
        sentence += (
            f" But {size(saved)} of the peak ({saved / run.whole:.0%}) are activations saved for backward, which an "
            "adapter does not make smaller: gradients pass through all layers above the first that is trained"
        )
        whole = settings.checkpointing.mode == "full"
        sentence += (
            "." if whole else "; checkpointing=full keeps a layer's input and computes the rest again."
        )
    yield Finding("adapter", sentence, saved)


def _spared(run: Run, frozen: int) -> str:
    """What AdamW would have for the `frozen` parameters on this rank, as text; empty where stages divide them, or the
    optimizer has another state.
    """
    itemsize = ITEMSIZE.get(run.record.model.dtype or "")
    if itemsize is None or run.stage is None or run.record.pipeline.stages > 1 or not in_fp32_by_adam(run):
        return ""
    each = MOMENTS + (MASTER if itemsize < MASTER else 0)
    ranks = run.size if run.stage else 1
    return f", which would take {size(each * frozen // ranks)} more on this rank ({each} bytes a parameter)"


ADAPTED = (adapter,)
"""The findings in printing order."""
