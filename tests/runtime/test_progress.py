"""How far a run is and how long it will take: said once, early, and then now and then."""

import pytest

from harness import tables
from harness.runtime.progress import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds on the clock, which a test sets."""
    now = [100.0]
    monkeypatch.setattr("harness.runtime.progress.time.monotonic", lambda: now[0])
    return now


def course(clock: list[float], total: int, seconds: float, silent: bool = False, done: int = 0) -> list[str]:
    """What is said over so many steps that take so many seconds each, the first ten times as long."""
    said: list[str] = []
    with Pace(total, "step", said.append, silent, done) as steps:
        for step in range(done, total):
            clock[0] += seconds * (10 if step == done else 1)
            steps.advance(1, "loss 1")
    return said


def test_after_a_second_and_a_warm_up_it_says_how_long_all_takes(clock: list[float]) -> None:
    said = course(clock, 240, 0.5)
    assert said[0] == "240 steps: about 118 s"  # 237 of them are left
    assert said[1:] == [
        *(f"step {24 * part}/240  loss 1  about {120 - 12 * part} s left" for part in range(1, 10)),
        "step 240/240  loss 1",
    ]


def test_slow_steps_are_foretold_after_the_second_and_each_half_minute_has_a_line(clock: list[float]) -> None:
    said = course(clock, 240, 7.0)
    assert said[0] == "240 steps: about 28 min"
    assert said[1] == "step 6/240  loss 1  about 27 min left"
    assert len(said) > 40


def test_what_is_soon_over_is_not_foretold(clock: list[float]) -> None:
    assert course(clock, 10, 0.4) == [f"step {step}/10  loss 1" for step in range(2, 11)]


def test_a_resumed_run_counts_from_where_it_is(clock: list[float]) -> None:
    said = course(clock, 100, 2.0, done=50)
    assert said[0] == "100 steps: about 96 s"
    assert said[1] == "step 60/100  loss 1  about 80 s left"


def test_other_ranks_and_rehearsals_say_nothing(clock: list[float]) -> None:
    assert course(clock, 100, 2.0, silent=True) == []


def test_where_nobody_knows_how_many_there_will_be_it_only_counts(clock: list[float]) -> None:
    said: list[str] = []
    with Pace(None, "rehearsal", said.append) as rehearsals:
        for _ in range(10):
            clock[0] += 12
            rehearsals.advance()
    assert said == ["rehearsal 4", "rehearsal 7", "rehearsal 10"]


def test_what_nobody_needed_counts_too_and_what_acts_is_counted(clock: list[float]) -> None:
    said: list[str] = []
    with Pace(100, "token", said.append, silent=False) as tokens:
        act = tokens.counting(lambda one, other: one + other, 4)
        assert [act(1, 2) for _ in range(5)] == [3] * 5
        assert tokens.done == 20
        tokens.up_to(50)
        tokens.up_to(40)
        assert tokens.done == 50
        tokens.advance(1000)
        assert tokens.done == 100


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (38.4, "38 s"),
        (119, "119 s"),
        (120, "2 min"),
        (1680, "28 min"),
        (7200, "2 h"),
        (1e6, "278 h"),
    ],
)
def test_a_duration_is_a_small_whole_number(seconds: float, said: str) -> None:
    assert tables.duration(seconds) == said
