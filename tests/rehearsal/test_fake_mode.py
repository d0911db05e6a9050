"""The shortcuts of a rehearsal's fake mode: whoever asks, they are what torch's own dispatch would do."""

from collections.abc import Callable

import pytest
import torch

import harness
from harness import Ledger
from harness.rehearsal.card import CARD, CARD_IN_CPP
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


def coordinates(tensor: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.zeros(2, 3, dtype=torch.int64), tensor[0], tensor.shape)


@pytest.mark.parametrize("sparse", [coordinates, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_is_not_taken_for_a_dense_one(
    sparse: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    with Fakes():
        tensors = sparse(torch.ones(3, 3)), torch.ones(1).expand(3, 3)
        for tensor in (*tensors, *tensors):
            results = tensor.clone(), tensor * 2, -tensor, tensor + tensor, torch.empty_like(tensor)
            assert {each.layout for each in results} == {tensor.layout}
            assert (tensor @ torch.ones(3, 3)).layout == torch.strided


def test_what_cpp_asks_for_is_on_the_card_from_the_first_time_on() -> None:
    with harness.rehearse("h100-sxm"):
        tensor = torch.ones(3, device="cuda")
        assert [torch.empty_like(tensor, device=CARD_IN_CPP).device for _ in range(2)] == [CARD, CARD]
