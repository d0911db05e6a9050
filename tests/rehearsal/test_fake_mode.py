"""The shortcuts of a rehearsal's fake mode: whoever asks, they are what torch's own dispatch would do."""

import torch

import harness
from harness import Ledger
from harness.rehearsal.fake_mode import Fakes


def test_of_two_ledgers_one_can_see_a_region_as_opaque() -> None:
    with Fakes(), Ledger() as outer, Ledger() as inner:
        torch.zeros(10)
        with outer.opaque("kernel"):
            torch.empty(100)
    assert (inner.peak.bytes, outer.peak.bytes) == (400, 40)


def test_of_two_ledgers_the_outer_may_end_first() -> None:
    with Fakes():
        outer, inner = Ledger(), Ledger()
        outer.__enter__()
        inner.__enter__()
        torch.empty(10)
        outer.__exit__()
        torch.empty(100)
        inner.__exit__()
    assert (inner.peak.bytes, outer.peak.bytes) == (400, 40)
    assert not [each for each in outer.events if each.delta == 400]


def test_a_program_that_has_a_ledger_can_be_rehearsed() -> None:
    with Ledger(allocator=False) as real:
        with harness.rehearse("h100-sxm") as ledger:
            torch.ones(10, device="cuda") + 1
        torch.zeros(5)
    assert real.peak.bytes == 20
    assert ledger.peak.bytes == 2 * 512
