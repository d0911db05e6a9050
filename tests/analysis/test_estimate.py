"""Estimates of seconds: from efficiencies that are made up so that the answer is known, and from those committed."""

import json
from pathlib import Path

import pytest

from harness.analysis.speed import link_fit
from harness.analysis.speed.efficiency import COMMITTED, Amount, Efficiency, Fit, committed
from harness.analysis.speed.efficiency_fit import Timed, as_json, fit, rows
from harness.analysis.speed.estimate import Estimate, Interval, of_phase, of_step
from harness.record.memory import Work
from harness.record.results import Ceilings

OPERATORS = Path(__file__).parents[2] / "profiles" / "speed" / "operators.csv"
COLLECTIVES = OPERATORS.with_name("collectives.csv")
A100 = Ceilings(source="a100-80gb", bandwidth=2e12, flops=3e14, dtype="bfloat16")
BANDWIDTH, LARGE = 2.039e12, 100e6
"""Of the page of that A100, in B/s; the bytes that a large call moves."""

PRODUCTS = Efficiency(64e9, float("inf"), 0.8, 0.9, 1.25, 9, 3, ("A100",))
STREAMS = Efficiency(16e6, float("inf"), 0.5, 0.8, 1.5, 9, 3, ("A100", "H100"))
FIT = Fit({"matmul": [PRODUCTS], "elementwise": [STREAMS]}, 0.1, 1e-5)

COMPUTING = Work(flops=3 * 10**13, read=10**9, written=10**9, calls=10)
MOVING = Work(flops=0, read=10**11, written=10**11, calls=1000)
"""Each takes 0.1 s at best."""


def why(work: dict[str, Work] | None, ceilings: Ceilings = A100) -> str:
    """Why such a phase has no estimate."""
    estimate = of_phase(work, ceilings, FIT)
    assert estimate.interval is None
    return estimate.why


def test_the_committed_efficiencies_are_those_that_the_rows_give() -> None:
    anew = fit(rows(OPERATORS))._replace(links=link_fit.fit(link_fit.rows(COLLECTIVES)))
    assert as_json(anew) == json.loads(COMMITTED.read_text())
    assert as_json(committed()) == json.loads(COMMITTED.read_text())


def test_each_class_is_at_best_over_its_efficiency_and_the_limits_add_up() -> None:
    interval = of_phase({"matmul": COMPUTING, "elementwise": MOVING}, A100, FIT).interval
    assert interval == pytest.approx((0.125 + 0.2, 0.125 * 0.9 + 0.2 * 0.8, 0.125 * 1.25 + 0.2 * 1.5))


def test_the_efficiency_is_the_median_over_runs_and_the_error_that_of_the_others_on_each() -> None:
    def row(run: str, efficiency: float) -> Timed:
        return Timed(
            run,
            "a100-80gb",
            LARGE / BANDWIDTH / efficiency,
            {"elementwise": Amount(0, LARGE, 1), "matmul": Amount(1, 1, 1)},
        )

    tiny = Timed("d", "a100-80gb", 1e-5, {"elementwise": Amount(0, 100, 1)})
    measured = [row("a", 0.4), row("a", 0.6), row("a", 0.6), row("b", 0.8), row("c", 0.5), tiny]
    ((found,),) = fit(measured).classes.values()
    assert found.share == pytest.approx(0.6)  # of 0.6, 0.8 and 0.5
    assert (found.low, found.high) == pytest.approx((0.55 / 0.8, 0.65 / 0.4))  # b by a and c; a by b and c
    assert (found.rows, found.runs, found.chips) == (5, 3, ("A100",))
    assert fit([row("a", 0.4), row("a", 0.6), tiny]).classes == {}  # nothing was left out


def test_a_little_work_of_a_class_without_rows_counts_with_the_best_and_the_worst_efficiency() -> None:
    little = Work(flops=0, read=10**9, written=0, calls=10)
    with_it = of_phase({"elementwise": MOVING, "lookup": little}, A100, FIT).interval
    assert with_it == pytest.approx((0.2 + 0.0005, 0.16 + 0.0005, 0.3 + 0.005))


SMALL = MOVING.plus(calls=10**6)


@pytest.mark.parametrize(
    ("work", "ceilings", "said"),
    [
        ({"matmul": COMPUTING}, A100.plus(source="b200"), "there are no rows of b200 to go by, only of a100"),
        ({"matmul": COMPUTING}, A100.plus(source="measured"), "no rows of measured to go by"),
        ({"matmul": COMPUTING}, A100.plus(flops=None, dtype="float32"), "no rows of float32 to go by"),
        ({"matmul": COMPUTING}, A100.plus(source="h100-sxm"), "no rows of matmul on h100-sxm"),
        ({"matmul": COMPUTING}, Ceilings(), "the record names no machine"),
        ({"lookup": MOVING}, A100, "no rows of lookup on a100-80gb"),
        (
            {"elementwise": SMALL},
            A100,
            "its elementwise operators are too small for the rows: 200,000 a call",
        ),
        (None, A100, "does not say which operators did its work"),
    ],
)
def test_outside_of_the_rows_there_is_none(
    work: dict[str, Work] | None, ceilings: Ceilings, said: str
) -> None:
    assert said in why(work, ceilings)


def test_a_phase_that_waits_for_its_launches_has_none() -> None:
    product = COMPUTING.plus(flops=64 * 10**9, calls=1)
    many = Work(flops=0, read=100, written=100, calls=10**5)
    assert "to launch them takes longer" in why({"matmul": product, "elementwise": many})


def test_a_step_of_several_ranks_has_an_estimate_only_with_what_they_send() -> None:
    phases = [Estimate(Interval(2.0, 1.0, 4.0)), Estimate(Interval(1.0, 1.0, 1.0))]
    assert of_step(phases, 1, None).interval == (3.0, 2.0, 5.0)
    assert of_step(phases, 8, None) == (None, "what 8 ranks send each other is not in it")
    assert of_step(phases, 8, Estimate(Interval(0.5, 0.1, 1.0))).interval == (3.5, 2.1, 6.0)
    assert of_step(phases, 8, Estimate(None, "y")) == (None, "y")
    assert of_step([*phases, Estimate(None, "x")], 1, None) == (None, "a phase has none")
