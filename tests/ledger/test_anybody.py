"""A ledger around whatever anybody's loop does: it changes no bit and raises nothing, and its books close."""

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch

from harness import Ledger
from harness.ledger import NotSeen
from harness.record.record_file import rank_record
from tests.programs import PROGRAMS, alike

for room in ("autograd", "compiled", "loops", "models", "tensors"):
    import_module(f"tests.programs.{room}")

COMPILED = {name for name in PROGRAMS if name.startswith(("compiled", "operators_of"))}

LACKS = {
    **{name: {"storages"} for name in COMPILED},
    "compiled_functions_of_functions": {"saved", "storages"},
    "compiled_in_a_thread": {"all"},
    "compiled_under_hooks": {"saved", "storages"},
    "gradients_of_each_sample": {"saved"},
    "grad_of_a_function": {"saved"},
    "in_threads": {"all"},
    "jacobians": {"saved"},
    "profiled": {"allocator"},
    "saved_tensor_hooks": {"saved"},
}
"""The figures that a ledger around them must say are incomplete; none where a program is not here."""


@cache
def alone(name: str) -> Any:
    """What a program comes to without a ledger."""
    torch._dynamo.reset()
    return PROGRAMS[name](Ledger(mode="off"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_comes_to_the_same_and_the_books_close_or_say_what_they_lack(name: str) -> None:
    before = alone(name)
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said, Ledger() as ledger:
        warnings.simplefilter("always")
        watched = PROGRAMS[name](ledger)
    assert alike(before, watched)
    reported = [str(each.message) for each in said if each.category is NotSeen]
    assert reported == [gap.sentence for gap in ledger.gaps]
    assert {gap.figures for gap in ledger.gaps} == LACKS.get(name, set())
    accounting = ledger.allocator
    expected = (None, None) if name == "profiled" else (ledger.peak.bytes, 0)
    assert (accounting.peak, accounting.unattributed) == expected
    assert (
        rank_record(ledger, 0).allocator.peak == accounting.peak
    )  # every figure is one that a record can have


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in COMPILED])
def test_a_program_comes_to_the_same_where_owners_are_summed(name: str) -> None:
    with Ledger(mode="phases") as ledger, ledger.phase("all"):
        watched = PROGRAMS[name](ledger)
    assert alike(alone(name), watched)
    assert not ledger.gaps
    assert len(ledger.phases) == 1
