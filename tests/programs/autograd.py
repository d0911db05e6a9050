"""What autograd and torch.func are asked for, under modes and hooks of the program's own."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, graph
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from harness import Ledger
from tests.programs import PROGRAMS, data, gradients, mlp, program, train


@program
def grad_of_a_function(ledger: Ledger) -> Any:
    return torch.func.grad(lambda x: (x.sin() * x).sum())(data())


@program
def gradients_of_each_sample(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: Any, row: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(model, weights, (row[None],))
        return made.pow(2).mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    return each(weights, data())


@program
def jacobians(ledger: Ledger) -> Any:
    model, rows = mlp(), data(2)
    ledger.own(model=model)
    pulled: Any = torch.func.vjp(model, rows)
    made, back = pulled
    return torch.func.jacrev(model)(rows), back(made), torch.autograd.functional.jacobian(model, rows)


@program
def dual_numbers(ledger: Ledger) -> Any:
    layer = mlp()[0]
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(data(), data(seed=1))))


class Ops(TorchDispatchMode):
    """Counts operators, but for the aliases that autograd makes of what it saves, or of what hooks gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "detach" not in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@program
def modes_of_its_own(ledger: Ledger) -> Any:
    with FlopCounterMode(display=False) as flops, Ops() as ops, Calls() as calls, torch.device("cpu"):
        made = train(ledger, mlp())
    return made, flops.get_total_flops(), ops.names, calls.names


@program
def anomaly(ledger: Ledger) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        made = train(ledger, mlp())
        with pytest.raises(RuntimeError, match="nan values"):
            (data().requires_grad_() * 0 / 0).sqrt().sum().backward()
    return made


@program
def without_gradients(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)
    with torch.inference_mode():
        made = model(data())
    with torch.no_grad():
        return made.clone(), model(data())


def checkpointed(ledger: Ledger, **how: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 4))
    return train(ledger, model, lambda rows: checkpoint(model, rows.requires_grad_(), **how))


PROGRAMS["checkpointed"] = partial(checkpointed, use_reentrant=False)
PROGRAMS["checkpointed_reentrant"] = partial(checkpointed, use_reentrant=True)


@program
def twice_differentiated(ledger: Ledger) -> Any:
    model, rows = mlp(), data().requires_grad_()
    ledger.own(model=model)
    (first,) = torch.autograd.grad(model(rows).pow(2).sum(), rows, create_graph=True)
    first.pow(2).sum().backward()
    lost = model(rows).sum()
    lost.backward(retain_graph=True)
    lost.backward()
    return rows.grad, gradients(model)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.made = x.exp()
        return ctx.made * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.made * 2 + 0 * ctx.saved_tensors[0]


class Tangent(torch.autograd.Function):
    """Saves its result, and has autograd make nodes of its own before that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        with torch.enable_grad():
            made = x.detach().requires_grad_().tanh().atanh().tanh()
        ctx.save_for_backward(result := made.detach() * 1)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * (1 - ctx.saved_tensors[0] ** 2)


@program
def a_function_of_its_own(ledger: Ledger) -> Any:
    rows = data().requires_grad_()
    Twice.apply(rows).sum().backward()
    return rows.grad


@program
def saved_tensor_hooks(ledger: Ledger) -> Any:
    rows = data().requires_grad_()
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Any:
        packed.append(tensor.shape)
        return tensor.detach().numpy()

    with graph.saved_tensors_hooks(pack, torch.from_numpy):
        one = (rows.exp() * rows).sum()
    with graph.save_on_cpu():
        two = (rows.exp() * rows).sum()
    with graph.disable_saved_tensors_hooks("none"):
        three = rows.exp().sum()
    (one + two + three).backward()
    return rows.grad, packed


def error_of(run: Callable[[], Any]) -> str:
    """What `run` raises, in words."""
    with pytest.raises(RuntimeError) as raised:
        run()
    return str(raised.value)


class Accumulates(torch.autograd.Function):
    """As Megatron's layers: a gradient goes where an attribute of the weight says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, other: Tensor) -> Any:
        ctx.save_for_backward(x, None, weight, other)
        return x @ weight + other

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, _, weight, other = ctx.saved_tensors
        weight.main_grad.add_(x.T @ gradient)
        return gradient @ weight.T, None, gradient * len(other.note)


@program
def attributes_of_what_is_saved(ledger: Ledger) -> Any:
    weight: Any = nn.Parameter(data(16))
    rows, other = data().requires_grad_(), data().requires_grad_() * 1
    weight.main_grad = torch.zeros(16, 16)
    other.note = "noted"  # type: ignore[attr-defined]
    made: Any = Accumulates.apply(rows, weight, other)
    made.sum().backward()
    return rows.grad, weight.main_grad


@program
def saved_and_then_changed(ledger: Ledger) -> Any:
    """Autograd refuses a backward from what is no longer what was saved."""
    rows, weight = data().requires_grad_(), data(seed=1)
    result, argument, view = rows.exp(), rows * 1, (rows * 1)[0]
    own: Any = Tangent.apply(rows)
    made = [result, argument.sin(), rows * weight, view.sin(), rows.sin(), Twice.apply(rows), own]
    with torch.no_grad():
        for changed in (result, argument, weight, view, rows, own):
            changed.add_(1)
    return [error_of(each.sum().backward) for each in made]


@program
def saved_and_then_exchanged(ledger: Ledger) -> Any:
    rows = data().requires_grad_()
    argument = rows * 1
    made = argument.sin()
    argument.data = data(seed=1)
    made.sum().backward()
    return rows.grad


@program
def saved_as_it_is(ledger: Ledger) -> Any:
    """What is saved lives on as itself, not as another tensor beside it, and a result goes with its last name."""
    rows = data().requires_grad_()
    argument, result = rows * 1, rows.exp()
    own: Any = Tangent.apply(rows)
    made = argument.sin()
    kept, gone, passed = weakref.ref(argument), weakref.ref(result), weakref.ref(own)
    del argument, result, own
    return kept() is None, gone() is None, passed() is None, made


@program
def hooks(ledger: Ledger) -> Any:
    model: Any = mlp()
    called: list[str] = []
    ledger.own(model=model)
    model[0].register_forward_hook(lambda *_: called.append("forward"))
    model[0].register_full_backward_hook(lambda *_: called.append("backward"))
    model[0].weight.register_hook(lambda gradient: gradient * 2)
    model[0].weight.register_post_accumulate_grad_hook(lambda _: called.append("accumulated"))
    model(data()).sum().backward()
    return called, gradients(model)


@program
def hooks_that_raise(ledger: Ledger) -> Any:
    model: Any = mlp()
    for handle in (
        model[1].register_forward_hook(lambda *_: 1 / 0),
        model[3].weight.register_hook(lambda _: 1 / 0),
    ):
        with pytest.raises(ZeroDivisionError):
            model(data()).sum().backward()
        handle.remove()
    return train(ledger, model)


@program
def steps_within_backward(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)
    steps = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter: Any) -> None:
        steps[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        model(data()).sum().backward()
    return [parameter.detach() for parameter in model.parameters()]
