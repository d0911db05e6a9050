"""What a ledger makes of what it cannot see: the right figure from elsewhere, or none and a sentence."""

import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.eval_frame as dynamo
import torch._functorch._aot_autograd.runtime_wrappers as aot
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import graph
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils.flop_counter import FlopCounterMode

import harness
from harness import Ledger
from harness.analysis.summary import show
from harness.ledger import NotSeen
from harness.record import record_file, schema
from tests.programs import data, mlp, train

PARAMETERS = sum(parameter.nbytes for parameter in mlp().parameters())


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch._dynamo.reset()


# Compiled


def steps(model: nn.Module, forward: Any, **how: Any) -> Ledger:
    """A ledger around two steps, after one: whatever is compiled is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(Ledger(mode="off"), model, forward, optimizer, rows=(64,))
    with Ledger(model=model, optimizer=optimizer, **how) as ledger:
        train(ledger, model, forward, optimizer, rows=(64, 64))
    return ledger


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_keeps_what_it_keeps_as_it_is_written(backend: str) -> None:
    one, other = mlp(), mlp()
    written, compiled = steps(one, None), steps(other, torch.compile(other, backend=backend))
    assert compiled.allocator.unattributed == 0
    assert compiled.saved == written.saved
    assert compiled.forwards == written.forwards
    for name in ("parameters", "gradients", "optimizer", "activations"):
        assert compiled.categories[name] == written.categories[name]
    seen = {(phase.where.phase, phase.work is None) for phase in compiled.phases}
    assert seen >= {("forward", True), ("step", False)}


def test_a_compiled_model_whose_operators_run_one_by_one_has_the_same_peak() -> None:
    one, other = mlp(), mlp()
    written, compiled = steps(one, None), steps(other, torch.compile(other, backend="eager"))
    assert compiled.peak.categories == written.peak.categories
    assert compiled.peak.where == written.peak.where


@pytest.mark.parametrize("allocator", [True, False])
def test_what_lives_and_dies_inside_a_compiled_program_is_kernel_or_not_measured(allocator: bool) -> None:
    program = torch.compile(lambda rows: rows.exp().exp().sum(), backend="aot_eager", dynamic=False)
    rows = torch.ones(1000)
    with torch.no_grad():
        program(rows)
        with Ledger(allocator=allocator) as ledger:
            program(rows)
    assert ledger.peak.categories["kernel"] == (2 * rows.nbytes if allocator else None)
    assert ledger.allocator.unattributed == (0 if allocator else None)
    (gap,) = ledger.gaps
    assert gap.figures == "storages"
    assert "<lambda> is compiled" in gap.sentence


def test_what_a_compiled_program_leaves_is_what_its_phase_makes_though_nobody_returns_it() -> None:
    kept = []

    @torch.compile(backend="eager")
    def program(rows: Tensor) -> None:
        kept.append(rows.exp())

    with Ledger() as ledger:
        with ledger.phase("forward"):
            program(torch.ones(1000))
        torch.ones(10_000)
    assert ledger.categories["activations"].end == kept[0].nbytes
    assert ledger.allocator.unattributed == 0


def test_a_compiled_optimizer_s_state_is_the_optimizer_s_and_its_step_a_step() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Ledger() as ledger:
        step = torch.compile(optimizer.step, backend="aot_eager")
        train(ledger, model, optimizer=optimizer, rows=(8, 8), step=step)
    assert ledger.categories["optimizer"].end == PARAMETERS
    seen = [(phase.where.step, phase.where.phase) for phase in ledger.phases]
    assert seen == [(0, "idle"), *((n, name) for n in range(2) for name in ("forward", "backward", "step"))]


def test_a_compiled_module_is_named_and_draws_no_warning_of_torch_s_about_hooks() -> None:
    model: Any = torch.compile(mlp(), backend="eager")
    with warnings.catch_warnings(), Ledger(model=model, discover=True) as ledger:
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", NotSeen)
        model(data())
    assert ledger.gaps[0].sentence.startswith("Sequential is compiled")
    names = {each.name for each in ledger.peak.holdings if each.category == "parameters"}
    assert names == {name for name, _ in mlp().named_parameters()}


# Named late


@pytest.mark.parametrize("allocator", [True, False])
def test_what_was_there_before_counts_from_the_beginning_whenever_its_owner_is_named(allocator: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(Ledger(mode="off"), model, optimizer=optimizer)
    measured: list[Any] = []
    for late in (False, True):
        with Ledger(allocator=allocator) as ledger:
            if not late:
                ledger.own(model=model, optimizer=optimizer)
            large = torch.ones(100_000)
            del large
            model(data())
            if late:
                ledger.own(model=model, optimizer=optimizer)
        measured.append((ledger.peak.categories, ledger.peak.bytes, ledger.allocator, ledger.categories))
    assert measured[0] == measured[1]
    assert measured[0][0]["parameters"] == measured[0][0]["optimizer"] == PARAMETERS


def test_what_is_made_within_counts_from_its_birth_though_its_owner_is_named_late() -> None:
    with Ledger(allocator=False) as ledger:
        torch.ones(10)
        model = mlp()
        ledger.own(model=model)
    assert ledger.phases[0].where.phase == "idle"
    assert ledger.events[0].delta == 40
    assert ledger.categories["parameters"].end == PARAMETERS


def test_an_owner_named_twice_counts_once_and_one_disowned_keeps_its_name() -> None:
    model = mlp()
    with Ledger(model=model) as ledger:
        ledger.own(model=model)
        ledger.disown(model)
        ledger.disown(model)
    assert ledger.categories["parameters"].end == PARAMETERS


def test_a_storage_that_lets_go_of_its_memory_is_smaller_from_then_on() -> None:
    with Ledger(allocator=False) as ledger:
        rows = torch.ones(1000)
        rows.untyped_storage().resize_(0)
        other = torch.ones(1000)
    assert ledger.peak.bytes == ledger.phases[-1].end == other.nbytes
    assert rows.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("layout", ["sparse", "csr"])
def test_a_sparse_tensor_holds_its_indices_and_its_values(layout: str) -> None:
    rows = torch.eye(10)
    with Ledger() as ledger:
        result = rows.to_sparse() if layout == "sparse" else rows.to_sparse_csr()
        ledger.claim("inputs", "rows", result)
    indices = {"sparse": 2 * 10 * 8, "csr": 11 * 8 + 2 * 10 * 8}[layout]  # columns are a view of pairs
    assert ledger.categories["inputs"].end == indices + 10 * 4
    assert ledger.allocator.unattributed == 0


def test_what_is_fake_holds_nothing_and_around_a_ledger_it_is_what_is_counted() -> None:
    with Ledger() as ledger, torch._subclasses.FakeTensorMode():
        kept = torch.ones(1000)
    assert (ledger.peak.bytes, ledger.allocator.externally_owned) == (0, 0)
    with torch._subclasses.FakeTensorMode(), Ledger() as ledger:
        kept = torch.ones(1000)
    assert ledger.peak.bytes == kept.nbytes
    assert ledger.allocator.peak is None


# Elsewhere


def test_a_thread_that_works_is_named_once_and_one_that_does_not_is_not() -> None:
    def loop() -> None:
        for _ in range(3):
            mlp()(data())

    with pytest.warns(NotSeen, match="thread 'trainer' worked") as said, Ledger() as ledger:  # noqa: PT031
        for name, target in (("trainer", loop), ("trainer", loop), ("idle", lambda: None)):
            thread = threading.Thread(target=target, name=name)
            thread.start()
            thread.join()
    assert len(said) == len(ledger.gaps) == 1
    assert ledger.phases == []


def test_a_thread_that_was_there_before_is_named_when_it_calls_a_module() -> None:
    begin, done = threading.Event(), threading.Event()

    def loop() -> None:
        begin.wait()
        mlp()(data())
        done.set()

    thread = threading.Thread(target=loop, name="older")
    thread.start()
    with pytest.warns(NotSeen, match="thread 'older' worked"), Ledger() as ledger:  # noqa: PT031
        begin.set()
        done.wait()
    thread.join()
    assert ledger.peak.bytes == 0


def test_a_child_that_was_forked_writes_nothing_down() -> None:
    with Ledger() as ledger:
        torch.ones(10)
        seen = len(ledger.events)
        child = os.fork()
        if not child:
            torch.ones(10)
            os._exit(len(ledger.events) - seen)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_profiler_of_the_program_s_is_whole_and_the_allocator_is_not_measured() -> None:
    with pytest.warns(NotSeen, match="profiler"), Ledger() as ledger:  # noqa: PT031
        kept = torch.ones(10)
        with torch.profiler.profile(profile_memory=True) as run:
            torch.ones(100)
    (result,) = [each for each in run.key_averages() if each.key == "aten::ones"]
    assert result.count == 2  # the program's call, and the ledger's under it
    assert ledger.peak.bytes == kept.nbytes + 400
    assert ledger.peak.categories["kernel"] is None
    assert (ledger.allocator.source, ledger.allocator.peak, ledger.allocator.unattributed) == (None,) * 3
    with Ledger() as after:
        torch.ones(10)
    assert after.allocator.peak == 40


def test_what_torch_func_keeps_for_backward_is_not_known_to_be_saved() -> None:
    with pytest.warns(NotSeen, match=r"torch\.func"), Ledger(model=mlp()) as ledger:
        torch.func.grad(lambda rows: rows.exp().sum())(data())
    assert (ledger.saved, ledger.peak.saved, ledger.forwards) == (None, None, None)
    assert {phase.saved for phase in ledger.phases} == {None}
    assert record_file.rank_record(ledger, 0).peak.saved is None


def test_a_tensor_that_has_no_storage_is_named_by_its_layout() -> None:
    with pytest.warns(NotSeen, match="layout torch._mkldnn have no storage"), Ledger() as ledger:
        kept = data().to_mkldnn()
    assert ledger.allocator.unattributed == kept.numel() * 4


def test_an_operator_that_the_ledger_cannot_read_stops_nothing_and_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.ledger.log.places", lambda *_: lambda tensor: tensor.no_such_thing)
    with pytest.warns(NotSeen, match=r"ones\.default is not in the figures"), Ledger() as ledger:
        assert torch.ones(10).sum() == 10
    assert ledger.allocator.unattributed == 40


def test_an_owner_that_cannot_be_asked_stops_nothing_and_is_named() -> None:
    class Odd(nn.Linear):
        closed = False

        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            if self.closed:
                raise KeyError("closed")
            return super().named_parameters(*args, **kwargs)

    model, other = Odd(4, 4), nn.Linear(4, 4)
    with pytest.warns(NotSeen, match=r"what Odd holds is not in .*KeyError"), Ledger(model=model) as ledger:  # noqa: PT031
        ledger.own(model=other)
        with ledger.phase("forward"):
            model(torch.ones(2, 4)).sum().backward()
        model.closed = True
    assert ledger.peak.categories["parameters"] == 2 * (4 * 4 + 4) * 4
    assert ledger.allocator.unattributed == 0


def test_an_account_that_cannot_be_closed_stops_nothing_and_gives_no_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.ledger.account.replay", lambda events: events.no_such_thing)
    with pytest.warns(NotSeen, match="the account is not in the figures"), Ledger() as ledger:
        torch.ones(10)
    assert (ledger.last_peak, ledger.allocator.peak, ledger.phases) == (None, None, [])
    with pytest.raises(LookupError, match="the account is not in the figures"):
        ledger.peak  # noqa: B018


def test_a_ledger_that_ends_inside_a_compiled_program_leaves_nothing_behind() -> None:
    ledger = Ledger(model=(model := mlp()))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def ends() -> None:
        ledger.__exit__(None, None, None)

    def forward(rows: Tensor) -> Tensor:
        result: Tensor = model(rows)
        ends()
        return result.exp()

    compiled = torch.compile(forward, backend="eager")
    ledger.__enter__()
    result = compiled(data())
    assert torch.equal(result, model(data()).exp())
    assert _get_current_dispatch_mode_stack() == []
    with ledger:
        model(data()).sum().backward()
    assert ledger.categories["gradients"].peak == PARAMETERS
    assert ledger.saved


def test_what_is_made_where_modes_are_set_aside_is_unattributed_and_said() -> None:
    said = pytest.warns(NotSeen, match="4,000 bytes of the peak were allocated by no operator")
    with said, Ledger() as ledger, _disable_current_modes():
        kept = torch.ones(1000)
    assert ledger.allocator.unattributed == kept.nbytes


# What it says, and when


def test_a_program_that_makes_errors_of_warnings_is_told_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with warnings.catch_warnings(), Ledger():
        warnings.simplefilter("error")
        torch.func.grad(lambda rows: rows.exp().sum())(data())
    assert capsys.readouterr().err.startswith("what torch.func")


def test_there_is_no_peak_where_none_was_measured_and_the_sentence_says_what_would_do() -> None:
    ledger = Ledger()
    with pytest.raises(LookupError, match="run what is to be measured inside"):
        ledger.peak  # noqa: B018
    assert (ledger.saved, ledger.forwards, ledger.phases, ledger.categories) == (None, None, [], {})
    with ledger:
        pass
    assert (ledger.peak.bytes, ledger.allocator.peak, ledger.saved) == (0, 0, 0)
    for mode in ("phases", "off"):
        with Ledger(mode=mode) as other:
            torch.ones(10)
        assert (other.saved, other.allocator.peak) == (None, None)
        with pytest.raises(LookupError, match=f"mode='{mode}' measures no peak; mode='exact' does"):
            other.peak  # noqa: B018


def test_a_record_says_what_was_not_seen_and_so_does_what_shows_it(tmp_path: Path) -> None:
    model = mlp()
    with Ledger(model=model) as ledger:
        torch.compile(model, backend="eager")(data())
    harness.save(ledger, tmp_path, model=model)
    (rank,) = schema.parse(record_file.read(tmp_path), "it").ranks
    assert rank.unseen == [ledger.gaps[0].sentence]
    assert "not seen: Sequential is compiled" in show(record_file.read(tmp_path))


# One in another, and in the way of others


def test_ledgers_in_each_other_see_the_same_and_only_one_hears_the_allocator() -> None:
    model = mlp()
    with Ledger(model=model) as outer, Ledger(model=model) as inner:
        result = torch.compile(model, backend="eager")(data())
        result.sum().backward()
    assert outer.allocator.peak is not None
    assert outer.allocator.unattributed == 0
    assert inner.allocator.peak is None
    assert [phase.categories for phase in inner.phases] == [phase.categories for phase in outer.phases]
    assert [gap.figures for gap in inner.gaps] == ["allocator", "storages"]


def test_a_ledger_of_fake_tensors_in_one_of_real_tensors_counts_them_alone() -> None:
    with Ledger(allocator=False) as outer:
        with FakeTensorMode(), Ledger() as inner:
            torch.zeros(10).add(1)
        torch.zeros(5)
    assert (inner.peak.bytes, outer.peak.bytes) == (80, 20)


def test_a_mode_of_the_program_below_a_ledger_may_have_any_attributes() -> None:
    class Mode(TorchDispatchMode):
        shortcut = "residual"

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Mode(), Ledger() as ledger:
        torch.zeros(10)
    assert ledger.peak.bytes == 40


def test_a_ledger_that_is_entered_again_begins_anew_and_one_that_is_open_goes_on() -> None:
    ledger = Ledger()
    for rows in (100, 10):
        with ledger:
            with ledger:
                torch.ones(rows)
            torch.ones(1)
        assert ledger.peak.bytes == ledger.allocator.peak == 4 * rows


@pytest.mark.parametrize("error", [ValueError("its own"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_of_the_program_s_comes_out_as_it_is(error: BaseException) -> None:
    class Failing(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            raise error

    with pytest.raises(type(error)) as raised, Ledger() as ledger:
        Failing()(data())
    assert raised.value is error
    files = {Path(entry.path).name for entry in raised.traceback}
    assert files == {Path(__file__).name, "module.py"}
    assert ledger.allocator.unattributed == 0


def test_a_generator_that_is_closed_closes_its_ledger() -> None:
    def batches() -> Iterator[Tensor]:
        with Ledger():
            while True:
                yield data()

    result: Any = batches()
    next(result)
    result.close()
    assert _get_current_dispatch_mode_stack() == []


def test_modes_and_hooks_that_the_program_entered_later_outlive_the_ledger_s_last_step() -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with Ledger(steps=1) as ledger, FlopCounterMode(display=False) as flops:
        with graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ledger.begins(1)
            mlp()(data())
        assert not ledger.exact
    assert flops.get_total_flops() == 2 * 8 * (16 * 32 + 32 * 4)
    assert packed
    assert _get_current_dispatch_mode_stack() == []


def test_hooks_around_a_ledger_still_pack_what_is_saved_within() -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    rows = data().requires_grad_()
    with graph.saved_tensors_hooks(pack, packed.__getitem__):
        with Ledger():
            rows.exp().sum().backward()
        assert len(packed) == 1
        rows.sin().sum().backward()
    assert len(packed) == 2


def test_nothing_that_was_replaced_stays_so_even_after_an_error() -> None:
    places: list[tuple[Any, str]] = [
        (torch, "get_rng_state"),
        (torch.utils.checkpoint, "_VersionWrapper"),
        (torch.utils.checkpoint, "_recomputation_hook"),
        (torch.UntypedStorage, "resize_"),
        (threading.Thread, "start"),
        (graph, "disable_saved_tensors_hooks"),
        (graph.saved_tensors_hooks, "__enter__"),
        (torch.autograd.function.BackwardCFunction, "saved_tensors"),
        (torch.nn.modules.module, "_has_any_global_hook"),
        (torch.autograd.profiler, "_prepare_profiler"),
        (torch.autograd.profiler, "_enable_profiler"),
        (dynamo, "set_eval_frame"),
        (dynamo, "_callback_from_stance"),
        (aot, "call_func_at_runtime_with_args"),
        (torch._C._dynamo.compiled_autograd, "set_autograd_compiler"),
    ]

    def now() -> list[Any]:
        return [getattr(owner, name) for owner, name in places]

    before, inherited = now(), "resize_" in vars(torch.UntypedStorage)
    model = mlp()
    with pytest.raises(RuntimeError, match="inside"), Ledger(model=model):  # noqa: PT012
        torch.compile(model, backend="eager")(data()).sum().backward()
        assert not [place for place, one, other in zip(places, before, now(), strict=True) if one is other]
        raise RuntimeError("inside")
    assert all(one is other for one, other in zip(before, now(), strict=True))
    assert ("resize_" in vars(torch.UntypedStorage)) == inherited
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
