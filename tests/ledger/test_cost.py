"""What the exact ledger costs a program, in instructions of Python: no machine and no other work changes their number.

A bound is a seventh above what Python 3.11 counts, as another release compiles the same code to more or fewer.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import harness.ledger
from harness import Ledger

LEDGER = str(Path(harness.ledger.__file__).parent)
TIMES = 20


def instructions(act: Callable[[], object]) -> int:
    """How many bytecode instructions of the ledger run within `act`."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(LEDGER):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def each(act: Callable[[], object], **owners: Any) -> float:
    """The instructions of one more `act` within a ledger, after the first, of which the ledger remembers something."""
    with Ledger(**owners) as ledger, ledger.phase("act"):
        act()
        few = instructions(lambda: [act() for _ in range(TIMES)])
        many = instructions(lambda: [act() for _ in range(2 * TIMES)])
    return (many - few) / TIMES


VALUES, WEIGHT = torch.ones(8, 8), torch.ones(8, 8, requires_grad=True)


@pytest.mark.parametrize(
    ("act", "most"),
    [
        # one look-up of the storage, which is known
        pytest.param(lambda: VALUES.t(), 150, id="view"),
        # the same, and the bytes of its arguments
        pytest.param(lambda: VALUES.add_(VALUES), 340, id="in place"),
        # a record and an event for the storage, and an event for its end
        pytest.param(lambda: VALUES * VALUES, 560, id="result made and freed"),
        # the operations too
        pytest.param(lambda: VALUES @ VALUES, 610, id="product made and freed"),
        # one tensor is saved besides
        pytest.param(lambda: WEIGHT * VALUES, 710, id="result made and freed, with a tensor saved"),
    ],
)
def test_an_operator_costs_no_more_instructions_than_what_there_is_to_see(
    act: Callable[[], object], most: int
) -> None:
    assert 0 < each(act) <= most


MODULES = 10


def test_a_module_within_another_costs_a_name_and_a_mark_on_its_result() -> None:
    def nested(number: int) -> float:
        model = nn.Sequential(*(nn.Identity() for _ in range(number)))
        return each(lambda: model(WEIGHT))

    assert 0 < (nested(2 * MODULES) - nested(MODULES)) / MODULES <= 250


def test_asking_an_owner_costs_little_for_each_parameter() -> None:
    def asked(number: int) -> int:
        model = nn.ParameterList(torch.zeros(4) for _ in range(number))
        with Ledger(model=model) as ledger:
            return instructions(ledger.own)

    assert 0 < (asked(2 * MODULES) - asked(MODULES)) / MODULES <= 270


def test_the_bytes_of_many_tensors_at_once_cost_no_more_for_each() -> None:
    def fused(number: int) -> float:
        tensors = [torch.ones(4) for _ in range(number)]
        return each(lambda: torch._foreach_add_(tensors, tensors[:])) / number

    assert fused(8 * MODULES) <= 1.1 * fused(MODULES)
