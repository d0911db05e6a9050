"""What the ledger keeps alive, which is nothing; whom it finds by itself; and the lines that made what it sees."""

from pathlib import Path

import torch

from harness import Ledger
from harness.record import record_file


def test_a_forward_without_a_backward_leaves_nothing_behind_when_its_result_is_let_go() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Tanh()
    )  # two save their results
    with Ledger(model=model, allocator=False) as ledger:
        for _ in range(3):
            model(torch.ones(2, 8))
    assert ledger.categories["activations"].end == 0
    assert (ledger.categories["activations"].peak or 0) < 3 * 3 * 2 * 8 * 4


def test_gradients_of_gradients_are_those_without_a_ledger() -> None:
    def twice() -> torch.Tensor:
        x = torch.linspace(-1, 1, 8, requires_grad=True)
        (first,) = torch.autograd.grad(x.softmax(0).tanh().exp().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        return second

    alone = twice()
    with Ledger():
        seen = twice()
    assert torch.equal(alone, seen)


def test_an_owner_that_is_found_is_named_and_not_kept_alive() -> None:
    with Ledger(allocator=False, discover=True) as ledger:
        for _ in range(2):
            model = torch.nn.Linear(8, 8, bias=False)
            optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9)
            model(torch.ones(1, 8)).sum().backward()
            optimizer.step()
            del model, optimizer
    measured = {name: (category.peak, category.end) for name, category in ledger.categories.items()}
    assert measured["parameters"] == measured["gradients"] == measured["optimizer"] == (256, 0)


def test_without_a_word_nobody_is_found() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    with Ledger(allocator=False) as ledger:
        model(torch.ones(1, 8))
    assert ledger.categories["parameters"].peak == 0


def test_the_line_that_made_a_storage_is_its_caller_s_and_only_on_request() -> None:
    def made(lines: bool) -> tuple[Ledger, torch.Tensor]:
        with Ledger(allocator=False, lines=lines) as ledger:
            kept = torch.nn.functional.normalize(torch.ones(8), dim=0)
        return ledger, kept

    requested, _ = made(lines=True)
    number = made.__code__.co_firstlineno + 2
    assert {holding.line for holding in requested.peak.holdings} == {f"{Path(__file__)}:{number}"}
    unasked, _ = made(lines=False)
    assert {holding.line for holding in unasked.peak.holdings} == {""}
    assert all(
        "line" in holding for holding in record_file.rank_record(requested, 0).tree()["peak"]["holdings"]
    )
    assert not any(
        "line" in holding for holding in record_file.rank_record(unasked, 0).tree()["peak"]["holdings"]
    )


def test_what_is_saved_for_backward_has_a_peak_of_its_own() -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    with Ledger(allocator=False, discover=True) as ledger:
        with ledger.phase("forward"):
            x = torch.ones(4, 8)
            loss = (x @ weight).exp().sum()
        loss.backward()
    assert ledger.saved == 4 * 8 * 4 * 2  # the input and the result of exp
