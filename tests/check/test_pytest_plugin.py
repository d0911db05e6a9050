"""pytest's plugin through pytest itself: what its marks let through, what they stop with which words, and its flags."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import pytest_plugin, rehearse  # a run in this process must not import them, and torch, anew
from harness.check import budget
from harness.check.marks import Request
from harness.config import hardware_page
from harness.config.compose import groups
from harness.device import outside
from harness.ledger.ledger import Ledger

ROOT = Path(__file__).parents[2]
HEAD = """
import pytest, torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
"""

Outcome = Callable[..., pytest.RunResult]


@pytest.fixture
def outcome(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """What a pytest with the plugin, and no other, says of a file with `tests` in it."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(tests: str, *words: str, apart: bool = False) -> pytest.RunResult:
        pytester.makepyfile(test_it=HEAD + tests)
        start = pytester.runpytest_subprocess if apart else pytester.runpytest_inprocess
        return start("-p", "harness.pytest_plugin", "--strict-markers", *words)

    return run


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    """What a ledger imports late is imported once, here, and not in a run that would drop it again."""
    with Ledger(discover=True, lines=True, allocator=False) as ledger:
        linear = torch.nn.Linear(2, 2)
        linear(torch.ones(2)).sum().backward()
        torch.optim.AdamW(linear.parameters()).step()
    budget.text_of(ledger, Request({}), Path())
    with rehearse("rtx4090") as ledger:
        linear = torch.nn.Linear(2, 2).cuda()
        linear(torch.ones(2, device="cuda")).sum().backward()
    budget.text_of(ledger, Request({}), Path())
    assert pytest_plugin.MARKS


# Budgets


def test_a_budget_that_is_kept_passes_and_says_nothing(outcome: Outcome) -> None:
    result = outcome("""
@pytest.mark.memory_budget(activations="1 MiB", total=2**20)
def test_small():
    torch.ones(1000)
""")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*memory*budget*")


def test_a_budget_that_is_passed_fails_with_the_category_both_figures_and_the_line_that_made_it(
    outcome: Outcome,
) -> None:
    result = outcome("""
@pytest.mark.memory_budget(workspace="1 KiB", total="2 KiB")
def test_large():
    kept = torch.ones(1024)
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*workspace held 4.0 KiB at its peak, 3.0 KiB over its budget of 1.0 KiB",
            "*the test held 4.0 KiB at its peak, 2.0 KiB over its budget of 2.0 KiB",
            "*memory*",
            "*at the peak*its own peak*budget",
            "*workspace * 4.0 KiB * 4.0 KiB * 1.0 KiB",
            "*4.0 KiB*workspace: *ones*test_it.py:9",
        ]
    )


def test_a_budget_is_held_against_a_category_s_own_peak_whenever_that_was(outcome: Outcome) -> None:
    tests = """
@pytest.mark.memory_budget(activations={most})
def test_step():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(64, 256)).sum().backward()
    optimizer.step()
"""
    measured = (
        2 * 64 * 1024 * 4
    )  # what is hidden, before ReLU and after it; the output comes when the first is gone
    outcome(tests.format(most=measured)).assert_outcomes(passed=1)
    outcome(tests.format(most=measured - 1)).assert_outcomes(failed=1)


def test_what_is_saved_for_backward_has_a_budget_of_its_own(outcome: Outcome) -> None:
    tests = """
@pytest.mark.memory_budget(saved={most})
def test_forward():
    x = torch.ones(64, 256)
    net = model(){more}
    with torch.set_grad_enabled({grad}):
        net(x)
"""
    outcome(tests.format(most=0, grad=False, more="")).assert_outcomes(passed=1)
    result = outcome(tests.format(most=0, grad=True, more=""))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*what is saved for backward held * over its budget of 0 B"])


def test_models_and_optimizers_are_named_without_a_word(outcome: Outcome) -> None:
    parameters = 256 * 1024 + 1024 + 1024 * 256 + 256
    outcome(f"""
@pytest.fixture
def net():
    return model()

def test_step(net, memory_ledger):
    optimizer = torch.optim.SGD(net.parameters(), lr=1, momentum=0.9)
    net(torch.ones(4, 256)).sum().backward()
    optimizer.step()
    held = {{name: category.peak for name, category in memory_ledger.account().categories.items()}}
    assert held["parameters"] == held["gradients"] == held["optimizer"] == {4 * parameters}
""").assert_outcomes(passed=1)


def test_a_model_that_is_let_go_is_not_kept_alive(outcome: Outcome) -> None:
    one = 4 * (256 * 1024 + 1024 + 1024 * 256 + 256)
    outcome(f"""
@pytest.mark.memory_budget(parameters={one})
def test_one_after_another():
    for _ in range(3):
        net = model()
        net(torch.ones(1, 256))
        del net
""").assert_outcomes(passed=1)


def test_owners_can_be_named(outcome: Outcome) -> None:
    outcome("""
def test_named(memory_ledger):
    net = model()
    memory_ledger.own(model=net)
    assert memory_ledger.categories["parameters"].peak > 2**20
""").assert_outcomes(passed=1)


def test_only_the_body_counts(outcome: Outcome) -> None:
    outcome("""
@pytest.fixture
def large():
    yield torch.ones(2**20)
    torch.ones(2**20)

@pytest.mark.memory_budget(total="1 KiB")
def test_small(large):
    large.numel()
""").assert_outcomes(passed=1)


def test_the_mark_closest_to_the_test_counts_and_others_add_to_it(outcome: Outcome) -> None:
    result = outcome("""
pytestmark = pytest.mark.memory_budget(workspace="1 KiB", total="1 GiB")

@pytest.mark.memory_budget(workspace="1 MiB")
class TestLoose:
    def test_one(self):
        kept = torch.ones(1024)

def test_two():
    kept = torch.ones(1024)
""")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["FAILED test_it.py::test_two*"])


def test_a_test_s_own_failure_is_not_hidden_by_its_budget_which_is_told_beside_it(outcome: Outcome) -> None:
    result = outcome("""
@pytest.mark.memory_budget(total="1 KiB")
def test_wrong():
    kept = torch.ones(1024)
    assert kept.sum() == 7
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *assert tensor(1024.) == 7", "*the test held * over its budget of 1.0 KiB"]
    )


def test_a_test_that_is_skipped_or_expected_to_fail_is_that(outcome: Outcome) -> None:
    outcome("""
@pytest.mark.memory_budget(total=0)
def test_skipped():
    kept = torch.ones(1024)
    pytest.skip()

@pytest.mark.xfail(strict=True)
@pytest.mark.memory_budget(total=0)
def test_expected():
    kept = torch.ones(1024)
""").assert_outcomes(skipped=1, xfailed=1)


def test_the_ledger_is_let_go_with_its_test(outcome: Outcome) -> None:
    outcome("""
import gc
from harness.ledger.ledger import Ledger

def alive():
    gc.collect()
    return sum(isinstance(each, Ledger) for each in gc.get_objects())

before = None

def test_count():
    global before
    before = alive()

@pytest.mark.memory_budget(total="1 GiB")
def test_one(memory_ledger):
    torch.ones(5)

def test_none():
    assert alive() == before
""").assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        (
            "activation='1 MiB'",
            "memory_budget(activation='1 MiB'): no such category; one of parameters, gathered, ",
        ),
        (
            "total='lots'",
            "memory_budget(total='lots'): not a size; give bytes, or a number with one of KiB, MiB",
        ),
        ("total='-1'", "memory_budget(total='-1'): not a size"),
        ("total=True", "memory_budget(total=True): not a size; give bytes, or a text as '10 MiB'"),
        ("total=1.5", "memory_budget(total=1.5): not a size"),
        ("'1 MiB'", "memory_budget: give each limit a name, as memory_budget(activations='10 MiB')"),
        ("", "memory_budget: give each limit a name"),
        ("hardware='gpu'", "hardware=gpu: no page of a GPU has that name; one of a100-40gb, "),
        ("hardware='cpu', total=1", "hardware=cpu: no page of a GPU has that name"),
        ("hardware=['t4']", "hardware=['t4']: give the name of a page, as 'h100-sxm'"),
        ("hardware='t4', totl=1", "memory_budget(totl=1): no such category; one of "),
        ("hardware='t4', reserved='x'", "memory_budget(reserved='x'): not a size"),
        ("reserved=1", "reserved=1 is of a rehearsal for a GPU: give hardware= too"),
        ("kernel=1", "kernel=1 is of a rehearsal for a GPU: give hardware= too"),
        ("total=1, assume=1.0", "assume=1.0 is of a rehearsal for a GPU: give hardware= too"),
        ("hardware='t4', assume='1'", "assume='1': give a number, which is taken for every unknown value"),
        ("hardware='t4', allocator=1", "allocator=1: give a text, as 'expandable_segments:True'"),
        ("traffic='1 MiB'", "memory_budget(traffic='1 MiB'): give limits by link, as {'network': '2 GiB'}"),
        ("traffic={}", "memory_budget(traffic={}): give limits by link"),
        (
            "traffic={'ether': 1}",
            "memory_budget(traffic={'ether': 1}): ether: no such link; one of host-memory",
        ),
        ("traffic={'storage': 1}", "*: storage: what a test reads and writes is not counted; one of"),
        ("traffic={'pcie': 'x'}", "memory_budget(traffic={'pcie': 'x'}): not a size"),
        ("traffic={'all': True}", "memory_budget(traffic={'all': True}): not a size"),
        ("traffic={'all': -1}", "memory_budget(traffic={'all': -1}): not a size"),
        ("traffic={'all': 1}, per_node=0", "memory_budget(per_node=0): give how many ranks are on a node"),
        (
            "traffic={'all': 1}, per_node='8'",
            "memory_budget(per_node='8'): give how many ranks are on a node",
        ),
        ("per_node=8", "memory_budget(per_node=8): it says which link is crossed: give traffic= too"),
        (
            "hardware='t4', allocator='expandable_segments:yes'",
            "allocator='expandable_segments:yes': expandable_segments:yes: give True or False",
        ),
    ],
)
def test_a_mark_that_cannot_be_read_is_a_usage_error(outcome: Outcome, mark: str, said: str) -> None:
    result = outcome(f"""
@pytest.mark.memory_budget({mark})
def test_it():
    pass
""")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: test_it.py::test_it: {said.replace('[', '[[]')}*"])


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ("memory_baseline('t4')", "memory_baseline: give each option a name, as memory_baseline(hardware="),
        ("memory_baseline(total=1)", "memory_baseline(total=1): no such option; one of hardware, allocator"),
        ("memory_baseline(allocator='')", "allocator='' is of a rehearsal for a GPU: give hardware= too"),
        (
            "memory_baseline(hardware='t4')\n@pytest.mark.memory_budget(hardware='l4')",
            "memory_budget(hardware='l4') and memory_baseline(hardware='t4'): a test runs once; give both",
        ),
    ],
)
def test_a_baseline_s_mark_that_cannot_be_read_is_a_usage_error_too(
    outcome: Outcome, marks: str, said: str
) -> None:
    result = outcome(f"@pytest.mark.{marks}\ndef test_it(): pass\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: test_it.py::test_it: {said}*"])


# A GPU that is not there

ON_CARD = """
def step():
    net = model().to("cuda")
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        net(torch.ones(64, 256, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.fixture(scope="module")
def step_on_card() -> dict[str, int]:
    """What `step` takes on an RTX 4090, in bytes."""
    names: dict[str, Any] = {}
    exec(HEAD + ON_CARD, names)
    with rehearse("rtx4090") as ledger:
        names["step"]()
    allocated, reserved = ledger.peak.allocated, ledger.peak.reserved
    kernel = ledger.categories["kernel"].peak
    assert 0 < (kernel or 0) < (allocated or 0) < (reserved or 0)
    return {"total": allocated or 0, "reserved": reserved or 0, "kernel": kernel or 0}


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("total", "the test held"),
        ("reserved", "PyTorch's allocator reserved"),
        ("kernel", "kernel held"),
    ],
)
def test_a_gpu_s_budget_is_kept_to_the_byte_where_no_gpu_is(
    outcome: Outcome, step_on_card: dict[str, int], name: str, subject: str
) -> None:
    tests = f"""{ON_CARD}
@pytest.mark.memory_budget(hardware="rtx4090", {name}={{most}})
def test_step():
    step()
"""
    outcome(tests.format(most=step_on_card[name])).assert_outcomes(passed=1)
    result = outcome(tests.format(most=step_on_card[name] - 1))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            f"{subject} * at its peak, 1 B over its budget of *",
            "rtx4090, rehearsed, at most in step 0, *",
            "*optimizer: state[[]0].exp_avg * test_it.py:*",
        ]
    )


def test_hardware_alone_asks_that_everything_fits(outcome: Outcome) -> None:
    result = outcome("""
@pytest.mark.parametrize("card", [pytest.param(name, marks=pytest.mark.memory_budget(hardware=name))
                                  for name in ("t4", "h200")])
def test_forward(card):
    net = torch.nn.Linear(10**5, 10**5, device="cuda")
    net(torch.ones(1, 10**5, device="cuda"))
""")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "the test does not fit into t4: empty finds no room for 37.3 GiB in step 0, idle; PyTorch may reserve "
            "14.8 GiB, and the test needs 37.3 GiB"
        ]
    )


def test_every_page_of_a_gpu_says_what_fits() -> None:
    pages = [hardware_page.gpu(name) for name in groups()["hardware"] if name not in ("auto", "cpu")]
    assert pages
    assert all(outside.budget(page, 1) for page in pages)


def test_the_body_alone_is_rehearsed_and_torch_means_the_card(outcome: Outcome) -> None:
    outcome("""
@pytest.fixture
def real():
    kept = torch.ones(3)
    yield kept
    assert kept.sum() == 3 and not torch.cuda.is_available()

@pytest.mark.memory_budget(hardware="rtx4090", allocator="expandable_segments:True")
def test_one(real, memory_ledger):
    kept = torch.ones(2**20, device="cuda")
    assert torch.cuda.get_device_name() == memory_ledger.memory.page.name
    assert torch.cuda.max_memory_allocated() == memory_ledger.peak.allocated == 2**22
    assert memory_ledger.memory.settings == "expandable_segments:True"
    assert memory_ledger.fits and memory_ledger.exhausted is None

def test_real(real, memory_ledger):
    assert memory_ledger.device == "cpu" and real.sum() == 3
""").assert_outcomes(passed=2)


def test_a_value_that_is_not_known_is_refused_by_its_line_and_can_be_assumed(outcome: Outcome) -> None:
    tests = """
@pytest.mark.memory_budget(hardware="rtx4090"{more})
def test_log():
    loss = torch.ones(3, device="cuda").sum()
    assert loss.item() == 2.5
"""
    outcome(tests.format(more=", assume=2.5")).assert_outcomes(passed=1)
    result = outcome(tests.format(more=""))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*test_it.py:10: a value of a tensor is read, * as assume=1.0 *"])
    result.stdout.no_fnmatch_line("*_python_dispatch*")
    result.stdout.no_fnmatch_line("*During handling*")


def test_a_model_from_a_fixture_is_moved_or_refused_and_is_afterwards_as_before(outcome: Outcome) -> None:
    result = outcome("""
@pytest.fixture(scope="module")
def net():
    return model()

@pytest.mark.memory_budget(hardware="rtx4090", parameters=2105344)
def test_moved(net):
    net.to("cuda")(torch.ones(4, 256, device="cuda")).sum().backward()

@pytest.mark.memory_budget(hardware="rtx4090")
def test_as_it_is(net):
    net(torch.ones(4, 256)).sum().backward()

def test_afterwards(net):
    assert net(torch.zeros(4, 256)).sum().item() != 0
    assert all(each.device.type == "cpu" and each.grad is None for each in net.parameters())
""")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["*test_it.py:*: a tensor of shape (1024, 256) is from before the rehearsal, *"]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_what_no_rule_knows_is_named_and_only_the_kernels_budget_needs_it(outcome: Outcome) -> None:
    tests = """
@pytest.mark.memory_budget(hardware="rtx4090", {name}="1 GiB")
def test_images():
    torch.nn.Conv2d(3, 4, 3, device="cuda")(torch.ones(1, 3, 8, 8, device="cuda"))
"""
    passed = outcome(tests.format(name="total"))
    passed.assert_outcomes(passed=1, warnings=1)
    passed.stdout.fnmatch_lines(["*NotSeen: not known and in no figure: what kernels of convolution take *"])
    failed = outcome(tests.format(name="kernel"))
    failed.assert_outcomes(failed=1, warnings=1)
    failed.stdout.fnmatch_lines(["memory_budget(kernel='1.0 GiB') cannot be judged: not known *convolution*"])


def test_a_real_gpu_is_not_asked_for_beside_one_that_is_not_there(outcome: Outcome) -> None:
    tests = "@pytest.mark.memory_budget(hardware='t4')\ndef test_one(): torch.ones(1)\n"
    outcome(tests, "--memory-device", "cpu").assert_outcomes(passed=1)
    result = outcome(tests, "--memory-device", "cuda")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: test_it.py::test_one: a mark's hardware= is a GPU that is not there*"]
    )


def test_a_gpu_s_baseline_has_what_is_reserved_and_is_of_that_gpu(
    outcome: Outcome, pytester: pytest.Pytester
) -> None:
    tests = f"""{ON_CARD}
@pytest.mark.memory_budget(total="1 GiB")
@pytest.mark.memory_baseline({{options}})
def test_step():
    step()
"""
    card = "hardware='rtx4090', allocator=''"
    outcome(tests.format(options=card), "--memory-update").assert_outcomes(passed=1)
    outcome(tests.format(options=card)).assert_outcomes(passed=1)
    file = pytester.path / "memory_baselines" / "test_it" / "test_step.json"
    kept = json.loads(file.read_text())
    assert kept["device"] == "rtx4090"
    assert kept["ranks"][0]["reserved"] > 0

    on_cpu = "@pytest.mark.memory_baseline\ndef test_step(): torch.ones(3)"
    for other_tests, device in ((tests.format(options="hardware='t4'"), "t4"), (on_cpu, "cpu")):
        other = outcome(other_tests)
        other.assert_outcomes(failed=1)
        other.stdout.fnmatch_lines(
            [f"*test_step.json: it is a baseline of rtx4090, and the test has the memory of {device}; *"]
        )

    file.write_text(json.dumps({**kept, "made_by": {**kept["made_by"], "torch": "2.0.0"}}))
    otherwise = outcome(tests.format(options="hardware='rtx4090', allocator='large_segment_size_mb:64'"))
    otherwise.assert_outcomes(failed=1)
    otherwise.stdout.fnmatch_lines(["*reserved, peak*", "*torch *, the baseline's 2.0.0*"])


# What is moved

OF_16_RANKS = """
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("fake", rank=0, world_size=16, store=FakeStore())
    yield
    dist.destroy_process_group()

@pytest.mark.memory_budget({mark})
def test_it():
    with torch.no_grad():
        dist.all_reduce(torch.ones(1024))
        dist.all_gather_into_tensor(torch.empty(64), torch.ones(4))
"""


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("traffic={'network': 4352}, per_node=8", ""),
        ("traffic={'network': 0, 'host-memory': 4352}, per_node=16", ""),
        (
            "traffic={'network': '1 KiB'}, per_node=8",
            "the test moved 4.2 KiB over network, 3.2 KiB over its budget of 1.0 KiB; most by all-reduce in",
        ),
        (
            "traffic={'all': 4351}",
            "the test moved 4.2 KiB over all links, 1 B over its budget of 4.2 KiB; most",
        ),
        (
            "traffic={'network': 4351}",
            "*cannot be judged: which link 4.2 KiB cross is not known; per_node= says how many ranks are on a node",
        ),
        ("traffic={'network': 4352}", ""),
    ],
)
def test_what_ranks_send_each_other_has_a_budget_by_link(outcome: Outcome, mark: str, said: str) -> None:
    result = outcome(OF_16_RANKS.replace("{mark}", mark))
    result.assert_outcomes(failed=bool(said), passed=not said)
    if said:
        result.stdout.fnmatch_lines([f"{said.replace('[', '[[]')}*"])


def test_a_world_of_one_moves_nothing(outcome: Outcome) -> None:
    result = outcome("""
import torch.distributed as dist

@pytest.fixture(autouse=True)
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()

@pytest.mark.memory_budget(traffic={"all": 0})
def test_kept():
    dist.all_reduce(torch.ones(1024))
""")
    result.assert_outcomes(passed=1)


def test_copies_to_a_gpu_that_is_not_there_have_a_budget(outcome: Outcome) -> None:
    result = outcome("""
pytestmark = pytest.mark.memory_budget(hardware="rtx4090", traffic={"all": "1 MiB"})

@pytest.mark.memory_budget(traffic={"pcie": 4096})
def test_kept():
    torch.ones(1024).cuda()

@pytest.mark.memory_budget(traffic={"pcie": 4095})
def test_passed():
    torch.ones(1024).cuda()

@pytest.mark.memory_budget(traffic={"pcie": "1 GiB"})
def test_passed_by_all():
    torch.ones(2**20).cuda()
""")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "the test moved 4.0 KiB over pcie, 1 B over its budget of 4.0 KiB; most by host-to-device in *",
            "the test moved 4.0 MiB over all links, 3.0 MiB over its budget of 1.0 MiB; *",
        ]
    )


# Baselines

STEP = """
@pytest.mark.memory_baseline
@pytest.mark.parametrize("rows", [{rows}], ids=["a b"])
def test_step(rows):
    net = model()
    net(torch.ones(rows, 256)).sum().backward()
"""


def test_a_baseline_is_asked_for_made_held_and_missed_by_a_row(
    outcome: Outcome, pytester: pytest.Pytester
) -> None:
    missing = outcome(STEP.format(rows=4))
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(
        [
            "memory_baselines/test_it/test_step_a_b-*.json: there is no baseline; run with --memory-update to make it"
        ]
    )
    outcome(STEP.format(rows=4), "--memory-update").assert_outcomes(passed=1)
    (file,) = (pytester.path / "memory_baselines" / "test_it").iterdir()
    output = file.read_text()
    assert json.loads(output)["model"]["name"] == "test_step[a b]"
    for _ in range(2):
        outcome(STEP.format(rows=4)).assert_outcomes(passed=1)
    grown = outcome(STEP.format(rows=5))
    grown.assert_outcomes(failed=1)
    grown.stdout.fnmatch_lines(
        [
            "*NO * rank 0: *",
            "*activations, peak*",
            "*--memory-update makes it the baseline",
            "*memory*",
        ]
    )
    assert file.read_text() == output
    outcome(STEP.format(rows=5), "--memory-update").assert_outcomes(passed=1)
    assert file.read_text() != output


def test_a_tolerance_in_the_file_counts_and_an_update_keeps_it(
    outcome: Outcome, pytester: pytest.Pytester
) -> None:
    tests = """
@pytest.mark.memory_baseline
def test_one():
    kept = torch.ones({})
"""
    outcome(tests.format(1000), "--memory-update").assert_outcomes(passed=1)
    file = pytester.path / "memory_baselines" / "test_it" / "test_one.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tolerance": {"workspace": "1%"}}))
    outcome(tests.format(1010)).assert_outcomes(passed=1)
    outcome(tests.format(1011)).assert_outcomes(failed=1)
    outcome(tests.format(1011), "--memory-update").assert_outcomes(passed=1)
    assert json.loads(file.read_text())["tolerance"] == {"workspace": "1%"}


@pytest.mark.parametrize("text", ["{", '{"schema": "harness.baseline/2"}'])
def test_a_baseline_that_cannot_be_read_fails_with_its_sentence(
    outcome: Outcome, pytester: pytest.Pytester, text: str
) -> None:
    file = pytester.path / "memory_baselines" / "test_it" / "test_one.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    result = outcome("@pytest.mark.memory_baseline\ndef test_one(): torch.ones(3)\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*test_one.json *"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_body_that_holds_nothing_has_a_baseline_too(outcome: Outcome) -> None:
    tests = "@pytest.mark.memory_baseline\ndef test_one(): pass\n"
    outcome(tests, "--memory-update").assert_outcomes(passed=1)
    outcome(tests).assert_outcomes(passed=1)


def test_files_names_are_tame_and_of_one_test_each() -> None:
    here = Path("/tests/test_it.py")

    def name(nodeid: str) -> str:
        file = pytest_plugin.baseline_file(here, f"tests/test_it.py::{nodeid}")
        assert file.parent == Path("/tests/memory_baselines/test_it")
        return file.name

    assert name("test_a[bf16-2]").startswith("test_a_bf16-2-")
    assert name("test_a") == "test_a.json"
    assert name("test[../../etc]").count("/") == 0
    assert name("test[a b]") != name("test[a/b]")
    assert len(name(f"test[{'x' * 400}]")) < 140


# Beside others


def test_it_works_in_the_processes_of_xdist(outcome: Outcome, pytester: pytest.Pytester) -> None:
    tests = """
@pytest.mark.memory_baseline
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_step(rows):
    model()(torch.ones(rows, 256)).sum().backward()

@pytest.mark.memory_budget(total="1 KiB")
def test_large():
    kept = torch.ones(1024)

@pytest.mark.memory_budget(totl="1 KiB")
def test_wrong():
    pass

@pytest.mark.memory_budget(hardware="gpu")
def test_unknown():
    pass
"""
    result = outcome(tests, "-p", "xdist", "-n", "2", "--memory-update", apart=True)
    result.assert_outcomes(passed=3, failed=1, errors=2)
    result.stdout.fnmatch_lines(["memory_budget(totl='1 KiB'): no such category; one of *"])
    result.stdout.fnmatch_lines(["hardware=gpu: no page of a GPU has that name; one of *"])
    result.stdout.fnmatch_lines(["*over its budget of 1.0 KiB", "*workspace: *ones*test_it.py:*"])
    assert len([*(pytester.path / "memory_baselines" / "test_it").iterdir()]) == 3
    outcome(tests.partition("@pytest.mark.memory_budget(total")[0]).assert_outcomes(passed=3)


def test_without_a_mark_or_the_fixture_nothing_is_imported(
    outcome: Outcome, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(
        test_plain="""
import sys

def test_nothing():
    heavy = {"torch", "pydantic", "harness.check.budget", "harness.ledger.ledger"}
    assert not heavy & set(sys.modules)
"""
    )
    result = pytester.runpytest_subprocess("-p", "harness.pytest_plugin", "--strict-markers", "test_plain.py")
    result.assert_outcomes(passed=1)
    marks = pytester.runpytest_subprocess("-p", "harness.pytest_plugin", "--markers").stdout
    marks.fnmatch_lines(["@pytest.mark.memory_budget(*", "@pytest.mark.memory_baseline*"])


def test_a_device_is_what_is_said(outcome: Outcome) -> None:
    tests = "def test_one(memory_ledger): assert memory_ledger.device == 'cpu'\n"
    outcome(tests, "--memory-device", "cpu").assert_outcomes(passed=1)
    result = outcome(tests, "--memory-device", "tpu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
