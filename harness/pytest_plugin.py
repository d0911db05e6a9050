"""pytest's side of the ledger: budgets and baselines of what a test's body holds, and which lines made it.

    @pytest.mark.memory_budget(activations="10 MiB", total="64 MiB")
    @pytest.mark.memory_baseline
    def test_a_step_holds_what_it_held(memory_ledger): ...

Nothing heavy is imported until a test asks. What counts are storages of tensors that the test's own thread makes or an
owner names, while its body runs; scratch inside kernels is no storage.
"""

import gc
import hashlib
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.ledger import Ledger

MARKS = {
    "memory_budget": "memory_budget(**bytes): the most it may hold, as activations='10 MiB', total='64 MiB', saved=0",
    "memory_baseline": "memory_baseline: a test must hold, to the byte, what the file next to it says",
}
LEDGER = pytest.StashKey["Ledger"]()
REFUSED = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's flags."""
    group = parser.getgroup("memory", "memory that tests hold")
    group.addoption(
        "--memory-update", action="store_true", help="write what tests marked memory_baseline hold"
    )
    group.addoption(
        "--memory-device", choices=("cpu", "cuda"), help="whose memory; a GPU's where one is in use"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marks known."""
    for mark in MARKS.values():
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a mark that cannot be read before any test runs. Raises pytest.UsageError.

    A worker of xdist has nobody to raise that to; there the test fails.
    """
    for item in items:
        if any(item.iter_markers("memory_budget")):
            from harness.check.budget import limits

            try:
                limits(item.iter_markers("memory_budget"))
            except ValueError as error:
                if not hasattr(config, "workerinput"):
                    raise pytest.UsageError(f"{item.nodeid}: {error}") from None
                item.stash[REFUSED] = str(error)


@pytest.fixture
def memory_ledger(request: pytest.FixtureRequest) -> "Ledger":
    """An exact Ledger that is open while the test's body runs; modules that are called and optimizers that step are
    owned without a word, others by `memory_ledger.own(model=..., cache=...)`."""
    return _ledger(request.node)


def _ledger(item: pytest.Item) -> "Ledger":
    if LEDGER not in item.stash:
        from harness.ledger import Ledger

        device = item.config.getoption("memory_device")
        item.stash[LEDGER] = Ledger(device=device, kernel=False, discover=True, lines=True)
    return item.stash[LEDGER]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose mark cannot be read."""
    if refused := item.stash.get(REFUSED, None):
        pytest.fail(refused, pytrace=False)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Open the ledger around the body; fail a body that passed and held too much, or something else than it did."""
    if any(item.get_closest_marker(mark) for mark in MARKS):
        _ledger(item)
    elif LEDGER not in item.stash:
        return (yield)
    with _settled(), item.stash[LEDGER]:
        result = yield
    wrong = [*_wrong(item)]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
    return result


@contextmanager
def _settled() -> Iterator[None]:
    """Within it the garbage collector has no other test's leavings to find, and so repeats itself."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _wrong(item: pytest.Item) -> Iterator[str]:
    """Why the finished test is not within its budget, or off its baseline."""
    from harness.check import budget

    ledger = item.stash[LEDGER]
    yield from budget.exceeded(ledger, budget.limits(item.iter_markers("memory_budget")))
    if item.get_closest_marker("memory_baseline"):
        file, name = baseline_file(item.path, item.nodeid), item.nodeid.partition("::")[2]
        update = item.config.getoption("memory_update")
        yield from budget.off_baseline(ledger, file, name, update, item.config.rootpath)


def baseline_file(path: Path, nodeid: str) -> Path:
    """Where the baseline of a test in `path` is: next to it, by a name that any file system takes."""
    name = nodeid.partition("::")[2]
    plain = re.sub(r"[^A-Za-z0-9_.=-]+", "_", name).strip("_")
    if plain != name or len(plain) > 120:  # another test's name may come to the same
        plain = f"{plain[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return path.parent / "memory_baselines" / path.stem / f"{plain}.json"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what a failed test held; let go of every ledger once its test is over."""
    report = yield
    if LEDGER in item.stash:
        if call.when == "call" and report.failed:
            from harness.check import budget

            ledger, marks = item.stash[LEDGER], [*item.iter_markers("memory_budget")]
            own = call.excinfo is not None and not call.excinfo.errisinstance(pytest.fail.Exception)
            also = budget.exceeded(ledger, budget.limits(marks)) if own else ()
            shown = "\n".join([*also, budget.text_of(ledger, marks, item.config.rootpath)])
            report.sections.append(("memory", shown))
        if call.when == "teardown":
            del item.stash[LEDGER]
    return report
