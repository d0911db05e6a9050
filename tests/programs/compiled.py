"""What torch.compile makes of models, losses, optimizers and whole steps, and torch.export of a model."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.autograd import graph
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from harness import Ledger
from tests.programs import PROGRAMS, data, gradients, mlp, program, train

ROWS = (8, 5, 7)
"""Shapes that compile once, then as dynamic."""


def aot(function: Callable[..., Any]) -> Any:
    """Compiled, but for the code that inductor would write."""
    return torch.compile(function, backend="aot_eager")


def compiled(ledger: Ledger, rows: Sequence[int] = ROWS, **how: Any) -> Any:
    counters.clear()
    model = mlp()
    result = train(ledger, model, torch.compile(model, **how), rows=rows)
    return result, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


PROGRAMS["compiled_eager"] = partial(compiled, backend="eager")
PROGRAMS["compiled_dynamic"] = partial(compiled, backend="aot_eager", dynamic=True, fullgraph=True)
PROGRAMS["compiled_static"] = partial(compiled, backend="aot_eager", dynamic=False)
PROGRAMS["compiled_inductor"] = partial(compiled, rows=(8, 8), mode="reduce-overhead")


@program
def compiled_in_place(ledger: Ledger) -> Any:
    model = mlp()
    model.compile(backend="aot_eager")
    return train(ledger, model, rows=ROWS)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.seen = mlp(), 0.0

    def forward(self, rows: Tensor) -> Tensor:
        self.seen += 1
        torch._dynamo.graph_break()
        result: Tensor = self.layers(torch.compiler.disable(torch.sin)(rows))
        return result * 2


@program
def compiled_with_breaks(ledger: Ledger) -> Any:
    model = Breaks()
    forward = torch.compile(model.forward, backend="eager")
    return train(ledger, model, forward, rows=ROWS), model.seen


@program
def compiled_blocks(ledger: Ledger) -> Any:
    model = mlp()
    model[0], model[3] = aot(model[0]), aot(model[3])
    return train(ledger, model, lambda rows: checkpoint(model, rows, use_reentrant=False), rows=ROWS)


@program
def compiled_optimizer(ledger: Ledger) -> Any:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    return train(ledger, model, optimizer=optimizer, step=aot(optimizer.step))


@program
def compiled_loss(ledger: Ledger) -> Any:
    return train(ledger, mlp(), loss=aot(lambda result: result.pow(2).mean()), rows=ROWS)


@program
def compiled_step(ledger: Ledger) -> Any:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger.own(model=model, optimizer=optimizer)

    @torch.compile(backend="eager")
    def step(rows: Tensor) -> Tensor:
        lost: Tensor = model(rows).pow(2).mean()
        lost.backward()
        optimizer.step()
        optimizer.zero_grad()
        return lost.detach()

    return [step(data(count)) for count in ROWS], [parameter.detach() for parameter in model.parameters()]


@program
def compiled_backward(ledger: Ledger) -> Any:
    model = mlp()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        return train(ledger, model, rows=(8, 5))


@program
def compiled_without_gradients(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)
    with torch.inference_mode():
        return [aot(model)(data(count)).clone() for count in ROWS]


@program
def compiled_under_stances(ledger: Ledger) -> Any:
    forward, result = torch.compile(mlp(), backend="eager"), list[Tensor]()
    for stance in ("force_eager", "default", "eager_on_recompile"):
        with torch.compiler.set_stance(stance):
            result += [forward(data(count)).detach() for count in (8, 5)]
    return result


@program
def compiled_under_modes(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)
    with FlopCounterMode(display=False) as flops:
        aot(model)(data()).sum().backward()
    return flops.get_total_flops(), gradients(model)


@program
def compiled_under_hooks(ledger: Ledger) -> Any:
    model = mlp()
    called: list[Any] = []
    ledger.own(model=model)

    def note(tensor: Tensor) -> Tensor:
        called.append(tensor.shape)
        return tensor

    with graph.saved_tensors_hooks(note, note):
        lost = aot(model)(data()).sum()
    lost.backward()
    return called, gradients(model)


@program
def compiled_functions_of_functions(ledger: Ledger) -> Any:
    model = mlp()

    def total(rows: Tensor) -> Tensor:
        result: Tensor = model(rows).sum()
        return result

    return aot(torch.func.grad(total))(data()), torch.func.grad(aot(total))(data())


@program
def compiled_and_raising(ledger: Ledger) -> Any:
    def fails(rows: Tensor) -> Tensor:
        if rows.shape[0] == 5:
            raise ValueError("five")
        return rows.sin()

    result: list[Any] = []
    for count in (8, 5, 8):
        try:
            result.append(aot(fails)(data(count)))
        except ValueError as error:
            result.append(str(error))
    return [*result, *train(ledger, mlp())]


@program
def compiled_in_a_thread(ledger: Ledger) -> Any:
    """Nothing of a ledger is among what a compiler traces there."""
    model, counted = mlp(), CompileCounter()
    result: list[Any] = []

    def forward(rows: Tensor) -> Tensor:
        out: Tensor = checkpoint(model, rows, use_reentrant=False)
        return out

    def run() -> None:
        result.append(
            train(Ledger(mode="off"), model, torch.compile(forward, backend=counted, fullgraph=True))
        )

    ledger.own(model=model)
    thread = threading.Thread(target=run, name="loop")
    thread.start()
    thread.join()
    return result, counted.frame_count, counted.op_count


@program
def operators_of_operators(ledger: Ledger) -> Any:
    heads = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    chosen = torch.cond(data().sum() > 0, torch.sin, torch.cos, (data(),))
    return chosen, flex_attention(heads, heads, heads)


@program
def exported(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)
    whole: Any = torch.export.export(model, (data(),), strict=True)
    return str(whole.graph), str(torch.export.export(model, (data(),)).graph), whole.module()(data()).detach()
