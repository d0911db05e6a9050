"""The pytest plugin: memory budgets and baselines of a test's body, and the lines that allocate its memory.

    @pytest.mark.memory_budget(activations="10 MiB", total="64 MiB")
    @pytest.mark.memory_baseline
    def test_a_step_holds_what_it_held(memory_ledger): ...

    @pytest.mark.memory_budget(traffic={"network": "2 GiB"}, per_node=8)
    def test_a_step_sends_no_more_between_nodes(): ...

    @pytest.mark.memory_budget(total="70 GiB", hardware="h100-sxm")
    def test_a_step_fits_a_gpu_that_is_not_there(): ...

torch is imported only when a test uses the plugin. It counts the storages of tensors that the test's own thread makes,
or that an owner names, while the test's body runs. Scratch memory inside kernels is not counted. With `hardware` the
body is rehearsed for that GPU: nothing is computed, and the figures are that GPU's, with what kernels take.
"""

import gc
import hashlib
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from harness.check.marks import Request
    from harness.ledger import Ledger
    from harness.rehearsal.card_ledger import CardLedger

MARKS = {
    "memory_budget": "memory_budget(**bytes): the most it may use, as activations='10 MiB', total='64 MiB', saved=0; "
    "with hardware='h100-sxm' it is rehearsed for that GPU, and must fit; with traffic={'network': '2 GiB'} it may "
    "move no more over a link",
    "memory_baseline": "memory_baseline: the memory of a test must equal, to the byte, the file next to it; with "
    "hardware='h100-sxm' it is rehearsed for that GPU",
}
LEDGER = pytest.StashKey["Ledger"]()
REQUEST: "pytest.StashKey[Request]" = pytest.StashKey()
REFUSED = pytest.StashKey[str]()
ONE_GPU = (
    "a mark's hardware= is a GPU that is not there, and --memory-device=cuda one that is: leave the option out, or "
    "deselect the test"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    group = parser.getgroup("memory", "memory of tests")
    group.addoption(
        "--memory-update", action="store_true", help="write the baselines of tests marked memory_baseline"
    )
    group.addoption(
        "--memory-device", choices=("cpu", "cuda"), help="whose memory; a GPU's where one is in use"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks."""
    for mark in MARKS.values():
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a mark that cannot be read, before any test runs. Raises pytest.UsageError.

    A worker of xdist cannot report that error; there the test itself fails.
    """
    for item in items:
        if marks := [mark for name in MARKS for mark in item.iter_markers(name)]:
            from harness.check.marks import read

            try:
                item.stash[REQUEST] = read(marks)
                if item.stash[REQUEST].hardware and config.getoption("memory_device") == "cuda":
                    raise ValueError(ONE_GPU)
            except ValueError as error:
                if not hasattr(config, "workerinput"):
                    raise pytest.UsageError(f"{item.nodeid}: {error}") from None
                item.stash[REFUSED] = str(error)


@pytest.fixture
def memory_ledger(request: pytest.FixtureRequest) -> "Ledger":
    """An exact Ledger that is open while the test's body runs. It finds the modules that are called and the optimizers
    that step; name other owners with `memory_ledger.own(model=..., cache=...)`."""
    return _ledger(request.node)


def _ledger(item: pytest.Item) -> "Ledger":
    if LEDGER not in item.stash:
        request = item.stash.get(REQUEST, None)
        if request is not None and request.hardware:
            from harness.rehearsal.program import ledger_of

            item.stash[LEDGER] = ledger_of(request.hardware, allocator=request.allocator)
        else:
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
    """Open the ledger around the body. Fail a passing body that is over its budget or off its baseline."""
    if REQUEST in item.stash:
        _ledger(item)
    elif LEDGER not in item.stash:
        return (yield)
    with _existing_garbage_hidden(), _opened(item):
        result = yield
    failures = [*_failures(item)]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return result


@contextmanager
def _opened(item: pytest.Item) -> Iterator[None]:
    """The test's ledger is open in this context, within a rehearsal where a mark has `hardware`."""
    request = item.stash.get(REQUEST, None)
    if request is None or not request.hardware:
        with item.stash[LEDGER]:
            yield
        return
    from harness.rehearsal.from_outside import FromOutside
    from harness.rehearsal.known_values import NeedsValue
    from harness.rehearsal.program import rehearsing

    try:
        with rehearsing(cast("CardLedger", item.stash[LEDGER]), request.assume):
            yield
    except (FromOutside, NeedsValue) as error:  # it names the line; the traceback would be torch's
        raise pytest.fail.Exception(str(error), pytrace=False) from None


@contextmanager
def _existing_garbage_hidden() -> Iterator[None]:
    """Hide other tests' garbage from the collector in this context, so that collections are reproducible."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _failures(item: pytest.Item) -> Iterator[str]:
    """A sentence for each way in which the finished test is over its budget or off its baseline."""
    from harness.check import budget

    ledger, request = item.stash[LEDGER], item.stash.get(REQUEST, None)
    if request is None:
        return
    yield from budget.exceeded(ledger, request)
    if item.get_closest_marker("memory_baseline"):
        file, name = baseline_file(item.path, item.nodeid), item.nodeid.partition("::")[2]
        update, device = item.config.getoption("memory_update"), request.hardware or ledger.device
        yield from budget.off_baseline(ledger, file, name, device, update, item.config.rootpath)


def baseline_file(path: Path, nodeid: str) -> Path:
    """The baseline's file of a test in `path`: next to it, with a name that is valid on any file system."""
    name = nodeid.partition("::")[2]
    stem = re.sub(r"[^A-Za-z0-9_.=-]+", "_", name).strip("_")
    if stem != name or len(stem) > 120:  # two tests' names may become the same
        stem = f"{stem[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return path.parent / "memory_baselines" / path.stem / f"{stem}.json"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the memory of a failed test, and release the ledger after each test."""
    report = yield
    if LEDGER in item.stash:
        if call.when == "call" and report.failed:
            from harness.check import budget, marks

            ledger, request = item.stash[LEDGER], item.stash.get(REQUEST, None) or marks.Request({})
            raised = call.excinfo is not None and not call.excinfo.errisinstance(pytest.fail.Exception)
            overruns = budget.exceeded(ledger, request) if raised else ()
            section = "\n".join([*overruns, budget.text_of(ledger, request, item.config.rootpath)])
            report.sections.append(("memory", section))
        if call.when == "teardown":
            del item.stash[LEDGER]
    return report
