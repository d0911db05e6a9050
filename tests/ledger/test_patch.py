"""Patches: each fits or is named, all are undone, and a ledger leaves out what does not fit."""

import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import graph
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from harness import Ledger
from harness.ledger import NotSeen
from harness.ledger.patch import DoesNotFit, Patch, install, patched
from harness.ledger.patch_table import PATCHES
from tests.programs import alike, data, mlp, train

CHECKED = ("1.0",)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of nobody's, with a function, a class and a dict."""

    class Base:
        def method(self, one: int) -> int:
            return one

    class Inner(Base):
        @staticmethod
        def static(one: int) -> int:
            return one

    module: Any = ModuleType("torch_like")
    module.function = lambda one, two: one + two
    module.Inner, module.entries = Inner, {"here": 1}
    monkeypatch.setitem(import_module("sys").modules, "torch_like", module)
    return module


def patch(attribute: str, owner: str = "torch_like", **how: Any) -> Patch:
    return Patch(owner, attribute, "of a reason", CHECKED, **how)


def times(factor: int) -> Callable[[Any], Any]:
    """What replaces a function of two by its result so many times."""
    return lambda original: lambda one, two: factor * original(one, two)


def test_what_was_replaced_is_back_after_an_exception(place: Any) -> None:
    before = place.function
    with pytest.raises(ArithmeticError), patched(patch("function").by(times(2))):  # noqa: PT012
        assert place.function(1, 2) == 6
        raise ArithmeticError
    assert place.function is before


def test_all_that_was_replaced_is_back_where_a_later_one_does_not_fit(place: Any) -> None:
    before = place.function
    with pytest.raises(DoesNotFit), patched(patch("function").by(times(2)), patch("gone").by(times(2))):
        pass
    assert place.function is before


def test_an_inherited_method_a_static_one_and_an_entry_are_as_they_were(place: Any) -> None:
    inner, owner = place.Inner, "torch_like.Inner"
    static = vars(inner)["static"]
    with patched(
        patch("method", owner).by(lambda original: lambda self, one: -original(self, one)),
        patch("static", owner).by(lambda original: staticmethod(lambda one: -original(one))),
        patch("here", "torch_like.entries", unchecked="data").by(lambda _: 2),
    ):
        assert (inner().method(1), inner.static(1), place.entries) == (-1, -1, {"here": 2})
    assert "method" not in vars(inner)
    assert vars(inner)["static"] is static
    assert (inner().method(1), inner.static(1), place.entries) == (1, 1, {"here": 1})


def test_contexts_may_be_nested_and_may_end_in_any_order(place: Any) -> None:
    before, function = place.function, patch("function")
    outer, inner = patched(function.by(times(2))), patched(function.by(times(5)))
    outer.__enter__()
    inner.__enter__()
    assert place.function(1, 0) == 10
    outer.__exit__(None, None, None)
    assert place.function(1, 0) == 10
    inner.__exit__(None, None, None)
    assert place.function is before


def test_an_instance_alone_keeps_what_is_installed_in_it(place: Any) -> None:
    one, other = place.Inner(), place.Inner()
    install(
        patch("method", "torch_like.Inner", stays="as it is").by(
            lambda original: lambda one: -original(one), one
        )
    )
    assert (one.method(1), other.method(1)) == (-1, 1)


@pytest.mark.parametrize(
    ("attribute", "stand_in", "said"),
    [
        ("function", lambda one: one, r"it takes \('one', 'two'\), not \('one',\)"),
        ("function", lambda one, three: one, r"it takes \('one', 'two'\), not \('one', 'three'\)"),
        ("function", lambda two, *rest: two, r"it takes \('one', 'two'\), not \('two',\)"),
        ("gone", lambda: None, "it is not there"),
    ],
    ids=["fewer", "another name", "another, and more", "gone"],
)
def test_a_patch_that_does_not_fit_is_named(place: Any, attribute: str, stand_in: Any, said: str) -> None:
    wrong = replace(patch(attribute), owner="torch_like")
    with (
        pytest.raises(
            DoesNotFit, match=f"torch_like.{attribute} is replaced because of a reason; .*{said}, "
        ),
        patched(wrong.by(lambda _: stand_in)),
    ):
        pass


@pytest.mark.parametrize("stand_in", [lambda one, *rest: one, lambda *args, **kwargs: 0])
def test_what_passes_the_rest_on_fits(place: Any, stand_in: Any) -> None:
    with patched(patch("function").by(lambda _: stand_in)):
        assert place.function is stand_in


def test_what_only_some_releases_have_need_not_be_there(place: Any) -> None:
    with patched(patch("gone", optional=True).by(times(2))):
        assert not hasattr(place, "gone")


def test_the_error_survives_the_way_from_another_process() -> None:
    with pytest.raises(DoesNotFit) as caught, patched(patch("gone", "torch").by(times(2))):
        pass
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.patch) == (DoesNotFit, str(caught.value), "torch.gone")
    assert f"in torch {version('torch')}" in str(copy)


# A ledger


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE


class Doubled(torch.autograd.Function):
    """It reads an attribute of a tensor that it saved."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return 2 * rows

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (rows,) = ctx.saved_tensors
        product: torch.Tensor = gradient * rows.factor
        return product


def everything(ledger: Ledger) -> Any:
    """A program that meets every instrument but a compiler's."""
    model = mlp()
    contexts: Any = {"context_fn": lambda: create_selective_checkpoint_contexts(keep_products)}

    def forward(rows: torch.Tensor) -> Any:
        return checkpoint(model, rows, use_reentrant=False, **contexts)

    results: list[Any] = [train(ledger, model, forward)]
    rows: Any = data().requires_grad_()
    rows.factor = 3
    Doubled.apply(rows).sum().backward()
    results += [rows.grad, torch.func.grad(lambda each: each.sin().sum())(data())]
    with graph.disable_saved_tensors_hooks(error_message="none here"):
        results.append(data().exp())
    with graph.saved_tensors_hooks(lambda each: each + 1, lambda each: each - 1):
        kept = data().requires_grad_()
        kept.exp().sum().backward()
    thread = threading.Thread(target=lambda: results.append(data().cos()))
    thread.start()
    thread.join()
    storage = torch.ones(8).untyped_storage()
    storage.resize_(0)
    storage.resize_(32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        results.append(data().tanh())
    return [*results, kept.grad]


def compiled(ledger: Ledger) -> Any:
    """A program that a compiler meets."""
    model = mlp()
    return train(ledger, model, torch.compile(model, backend="aot_eager", fullgraph=True))


@cache
def alone(program: Callable[[Ledger], Any]) -> Any:
    torch._dynamo.reset()
    return program(Ledger(mode="off"))


def around(program: Callable[[Ledger], Any]) -> tuple[Ledger, list[str]]:
    """A ledger around the program, which comes to the same, and what it warned of."""
    before = alone(program)
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said, Ledger() as ledger:
        warnings.simplefilter("always")
        watched = program(ledger)
    assert alike(before, watched)
    return ledger, [str(each.message) for each in said if each.category is NotSeen]


COMPILERS = {
    name
    for name in PATCHES
    if any(part in name for part in ("dynamo", "_aot_autograd", "export")) and not PATCHES[name].optional
}
HERE = {
    name for name, each in PATCHES.items() if not (each.stays or each.optional or "cuda" in name)
}  # what concerns a GPU is in test_cuda_allocator.py
FIGURES = {
    "saved_tensors": "saved",
    "get_rng_state": "saved",
    "VersionWrapper": "saved",
    "profiler": "allocator",
    "Thread": "all",
}


@pytest.mark.parametrize("name", sorted(HERE))
def test_a_ledger_leaves_out_what_does_not_fit_says_so_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(PATCHES, name, replace(PATCHES[name], attribute="_gone"))
    ledger, said = around(compiled if name in COMPILERS else everything)
    (gap,) = (gap for gap in ledger.gaps if "it is not there" in gap.sentence)
    assert gap.sentence in said
    assert PATCHES[name].reason in gap.sentence
    figures = (figures for part, figures in FIGURES.items() if part in name)
    assert gap.figures == ("all" if name in COMPILERS else next(figures, "storages"))
    if name in COMPILERS:
        with pytest.raises(LookupError, match="it is not there"):
            _ = ledger.peak
    else:
        assert ledger.peak.bytes > 0


def test_a_ledger_whose_patches_fit_leaves_nothing_out() -> None:
    for program in (everything, compiled):
        ledger, _ = around(program)
        assert not [gap for gap in ledger.gaps if "is replaced because" in gap.sentence]
        assert ledger.peak.bytes > 0


STATE = torch.get_rng_state


def test_a_function_that_takes_other_arguments_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_rng_state(device: str = "cpu") -> torch.Tensor:
        return STATE()

    monkeypatch.setattr(torch, "get_rng_state", get_rng_state)
    ledger, said = around(everything)
    assert torch.get_rng_state is get_rng_state
    (sentence,) = (each for each in said if "it takes" in each)
    assert sentence.startswith("torch.get_rng_state is replaced because checkpointing keeps this state")
    assert "it takes ('device',), not ()" in sentence
    assert ledger.saved is None


def test_an_offloaded_cache_that_does_not_fit_is_owned_all_the_same() -> None:
    class Cache:
        offloading, layers = True, ()

        def update(self, keys: torch.Tensor) -> torch.Tensor:
            return keys

    cache = Cache()
    with warnings.catch_warnings(), Ledger() as ledger:
        warnings.simplefilter("ignore")
        ledger.own(cache=cache)
        assert torch.equal(cache.update(data()), data())
    (gap,) = ledger.gaps
    assert gap.sentence.startswith("transformers.cache_utils.Cache.update is replaced because")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ledgers_that_overlap_leave_nothing_replaced(order: tuple[int, int]) -> None:
    names = [name for name in HERE if PATCHES[name].package == "python"]
    assert names == ["threading.Thread.start"]
    before, start = threading.Thread.start, [threading.Event() for _ in range(2)]
    end = [threading.Event() for _ in range(2)]
    closed = [threading.Event() for _ in range(2)]

    def loop(number: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Ledger(allocator=False):
                start[number].set()
                end[number].wait()
        closed[number].set()

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(2)]
    for number, thread in enumerate(threads):
        thread.start()
        start[number].wait()
    assert threading.Thread.start is not before
    for number in order:
        end[number].set()
        closed[number].wait()
    for thread in threads:
        thread.join()
    assert threading.Thread.start is before
    assert torch.get_rng_state is STATE
    assert nn.modules.module._has_any_global_hook.__module__ == "torch.nn.modules.module"
