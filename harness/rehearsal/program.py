"""`harness.rehearse`: rehearses any PyTorch program for a GPU that is not there. Nothing is computed or allocated."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness.config import hardware_page
from harness.ledger.patch import patched
from harness.rehearsal import card_memory, card_operators
from harness.rehearsal.card_ledger import CardLedger
from harness.rehearsal.card_tensors import CARD_SHIMS, COMPILE
from harness.rehearsal.cuda_shims import CUDA_SHIMS
from harness.rehearsal.fake_mode import existing_objects_frozen
from harness.rehearsal.from_outside import Outside, ProgramFakes, refuse_step
from harness.rehearsal.shims import program_shims


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
    ledger = ledger_of(hardware, allocator=allocator, lines=lines)
    with rehearsing(ledger, assume):
        yield ledger


def ledger_of(hardware: str, *, allocator: str | None = None, lines: bool = True) -> CardLedger:
    """The ledger of a rehearsal that has not begun; the arguments and what is raised are those of `rehearse`."""
    return CardLedger(card_memory.of(hardware_page.gpu(hardware), 1, allocator), discover=True, lines=lines)


@contextmanager
def rehearsing(ledger: CardLedger, assume: float | None = None) -> Iterator[None]:
    """Inside this context the program is rehearsed for the card of `ledger`, as `rehearse` says."""
    if assume is not None and (isinstance(assume, bool) or not isinstance(assume, (int, float))):
        raise ValueError(f"assume={assume!r}: a number, as 1.0, is taken for every value that is not known")
    memory, outside = ledger.memory, Outside()
    random = torch.default_generator.get_state()
    with ExitStack() as context:
        context.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        context.enter_context(card_memory.being(memory))
        context.enter_context(patched(*CUDA_SHIMS, *CARD_SHIMS, *program_shims(), COMPILE, outside.shim()))
        context.enter_context(card_operators.registered(memory.card))
        context.enter_context(outside)
        context.callback(torch.default_generator.set_state, random)
        context.callback(register_optimizer_step_pre_hook(refuse_step).remove)
        if "torch._dynamo" in sys.modules:  # what was compiled before
            context.enter_context(torch.compiler.set_stance("force_eager"))
        context.enter_context(ProgramFakes(memory.card, assume, strict=True))
        context.enter_context(existing_objects_frozen())
        context.enter_context(ledger)
        context.callback(register_module_parameter_registration_hook(partial(_claim, ledger)).remove)
        yield


def _claim(ledger: CardLedger, module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """A module gets a parameter, which may be gone before the module is called and can name it."""
    if parameter is not None and not is_lazy(parameter):
        for each in (ledger, ledger.host):
            each.claim("parameters", "", parameter)
