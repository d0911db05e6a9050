"""`harness.rehearse`: rehearses any PyTorch program for a GPU that is not there. Nothing is computed or allocated."""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from harness.config import hardware_page
from harness.device import allocator_settings
from harness.device.outside import budget
from harness.ledger.patch import patched
from harness.rehearsal import card_memory, card_operators
from harness.rehearsal.card_kernels import CardKernels
from harness.rehearsal.card_ledger import CardLedger
from harness.rehearsal.card_memory import CardMemory
from harness.rehearsal.cuda_shims import CUDA_SHIMS
from harness.rehearsal.from_outside import Outside, ProgramFakes
from harness.rehearsal.known_values import Values
from harness.rehearsal.shims import PROGRAM_SHIMS

SETTINGS = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
"""Environment variables with the settings of PyTorch's allocator. The later one wins."""


@contextmanager
def rehearse(
    hardware: str, *, allocator: str | None = None, assume: float | None = None, lines: bool = True
) -> Iterator[CardLedger]:
    """Inside this context every new tensor is fake, `cuda` is the card on the page `hardware`, and a ledger counts.

    `allocator` are the settings of PyTorch's caching allocator, as in PYTORCH_ALLOC_CONF, which is the default. A
    program that reads a value of a tensor, as by `.item()`, is refused by its line, unless `assume` says what to take
    for each value that is not known.

    Raises ValueError for an unknown page, for one without a GPU, and for a setting that is none. In the block, raises
    `NeedsValue` where a value is read, and `FromOutside` where a tensor from before the block would be changed.
    """
    page = hardware_page.gpu(hardware)
    settings = allocator_settings.parse(_settings() if allocator is None else allocator)
    formed = budget(page, 1)
    memory = CardMemory(page, settings, None if formed is None else formed.bytes)
    outside = Outside()
    with ExitStack() as context:
        context.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        context.enter_context(card_memory.being(memory))
        context.enter_context(patched(*CUDA_SHIMS, *PROGRAM_SHIMS, outside.shim()))
        context.enter_context(card_operators.registered())
        context.enter_context(outside)
        for mode in (ProgramFakes(), Values(assume, strict=True)):
            context.enter_context(mode)
        ledger = CardLedger(memory, CardKernels(page.capability or 0), discover=True, lines=lines)
        context.enter_context(_garbage_collected())
        context.enter_context(ledger)
        yield ledger


def _settings() -> str:
    return next((os.environ[name] for name in reversed(SETTINGS) if name in os.environ), "")


@contextmanager
def _garbage_collected() -> Iterator[None]:
    """Collect what others left, so that it is freed at no moment of this context."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
