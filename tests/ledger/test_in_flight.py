"""How many forwards wait for their backward, counted in plain loops whose answer is known."""

import pytest
import torch

from harness import Ledger

Schedule = list[tuple[str, int]]

WIDTH, BATCH = 64, 8


def model() -> torch.nn.Sequential:
    """Linear, tanh, linear: autograd saves the tanh's output, [BATCH, WIDTH] fp32, once for each forward."""
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1))


STASH = BATCH * WIDTH * 4


def loss_of(net: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = net(torch.ones(BATCH, WIDTH)).sum()
    return result


def test_one_after_another_there_is_one() -> None:
    net = model()
    with Ledger(model=net) as ledger:
        for _ in range(3):
            loss_of(net).backward()
    assert ledger.forwards is not None
    assert (ledger.forwards.alive, ledger.forwards.saved_bytes) == (1, (STASH,))


def test_all_forwards_before_any_backward_are_all_alive() -> None:
    net = model()
    with Ledger(model=net) as ledger:
        given, losses = torch.ones(BATCH, WIDTH), []
        for number in range(4):
            with ledger.phase("forward", 0, number):
                losses.append(net(given).sum())
        for number, loss in enumerate(losses):
            with ledger.phase("backward", 0, number):
                loss.backward()
    assert ledger.forwards is not None
    assert ledger.forwards.saved_bytes == (STASH,) * 4
    assert ledger.forwards.where == (0, "forward", 3)


def test_what_outlives_its_backward_is_no_forward() -> None:
    net, kept = model(), []
    with Ledger(model=net) as ledger:
        for number in range(3):
            with ledger.phase("forward", 0, number):
                hidden = net[1](net[0](torch.ones(BATCH, WIDTH)))
                kept.append(hidden.detach())
                loss = net[2](hidden).sum()
            with ledger.phase("backward", 0, number):
                loss.backward()
    assert ledger.forwards is not None
    assert ledger.forwards.alive == 1


def test_without_gradients_there_is_none() -> None:
    net = model()
    with Ledger(model=net) as ledger, torch.no_grad():
        loss_of(net)
    assert ledger.forwards is not None
    assert (ledger.forwards.alive, ledger.forwards.saved_bytes, ledger.forwards.where) == (0, (), None)


def test_where_nothing_is_seen_the_number_is_not_known() -> None:
    net = model()
    with Ledger(model=net, mode="phases") as ledger:
        loss_of(net).backward()
    assert ledger.forwards is None


def saved(net: torch.nn.Module, rows: int) -> int:
    """Bytes that autograd keeps of a forward over so many rows, its input and parameters apart, as its hooks tell."""
    given, kept = torch.ones(rows, WIDTH), {}
    known = {tensor.data_ptr() for tensor in (*net.parameters(), given)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(given)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)


@pytest.mark.parametrize(
    ("schedule", "alive"),
    [
        ([("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1)], (1,)),
        ([("forward", 0), ("forward", 1), ("backward", 0), ("forward", 2), ("backward", 1)], (1, 2)),
        ([("forward", 1), ("validate", 2), ("backward", 1), ("forward", 0), ("backward", 0)], (1,)),
    ],
)
def test_each_keeps_what_autograd_saved_whatever_the_schedule(
    schedule: Schedule, alive: tuple[int, ...]
) -> None:
    net = torch.nn.Sequential(*model(), torch.nn.Softmax(dim=-1))
    with Ledger(model=net) as ledger:
        waiting: dict[int, torch.Tensor] = {}
        for phase, number in schedule:
            with ledger.phase("data", 0, number):
                given = torch.ones(number + 3, WIDTH)  # each is of a size of its own
            with ledger.phase(phase, 0, number), torch.set_grad_enabled(phase != "validate"):
                if phase == "backward":
                    waiting.pop(number).sum().backward()
                else:
                    waiting[number] = net(given)
    assert ledger.forwards is not None
    assert ledger.forwards.saved_bytes == tuple(saved(net, number + 3) for number in alive)
    assert ledger.forwards.where == (0, "forward", alive[-1])


def test_parts_that_are_called_one_by_one_are_not_alive_after_their_backward() -> None:
    first, second = model(), torch.nn.Sequential(torch.nn.Linear(1, WIDTH), torch.nn.Tanh())
    with Ledger(model=torch.nn.ModuleList([first, second])) as ledger:
        for _ in range(3):
            loss_of(torch.nn.Sequential(first, second)).backward()
            second(first(torch.ones(BATCH, WIDTH))).sum().backward()
    assert ledger.forwards is not None
    assert ledger.forwards.alive == 2
    assert min(ledger.forwards.saved_bytes) > 0
