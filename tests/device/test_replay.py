"""Replays: where the peaks are, where memory is out, and which settings would help."""

import pytest
import torch

from harness.device.allocator_settings import MIB, Settings, parse
from harness.device.replay import Moment, Step, advise, allocations, replay, steps_of
from harness.ledger import Ledger
from harness.ledger.events import Event, Storage, Where

WHERE = Where(0, "forward", 0)


def life(*sizes: int) -> list[Step]:
    """A birth of each size in MiB under that key, or its death if it is negative."""
    return [(abs(size), size * MIB, 0) for size in sizes]


def test_each_peak_is_at_its_own_step() -> None:
    """5 takes a part of the 40 that is free; 34, beside 40, needs a segment though 30 is free."""
    result = replay(life(30, 40, -40, 5, -30), Settings())
    assert result.most_allocated == Moment(1, 70 * MIB, 70 * MIB, 70 * MIB, 0, 2)
    assert result.most_reserved == Moment(1, 70 * MIB, 70 * MIB, 70 * MIB, 0, 2)
    assert result.end == Moment(4, 5 * MIB, 70 * MIB, 5 * MIB, 35 * MIB, 2)
    later = replay(life(30, 40, -30, 34), Settings())
    assert (later.most_allocated.index, later.most_allocated.slack) == (3, 30 * MIB)
    assert later.most_reserved == Moment(3, 74 * MIB, 104 * MIB, 74 * MIB, 0, 3)
    assert replay(life(30, -30, 30), Settings()).most_allocated.index == 0
    apart = replay(life(30, -30, 40, -40, 34, 26), Settings())
    assert (apart.most_reserved.index, apart.most_allocated.index) == (2, 5)


def test_what_is_free_in_split_segments_is_known_at_the_peak() -> None:
    result = replay(life(5, 6, -5, 30), Settings())
    assert result.most_reserved == Moment(3, 36 * MIB, 50 * MIB, 36 * MIB, 14 * MIB, 2)


def test_nothing_at_all_reserves_nothing() -> None:
    result = replay([], Settings())
    assert (result.most_reserved, result.end, result.fits) == (Moment(), Moment(), True)


def test_a_replay_stops_where_memory_is_out() -> None:
    """A program stops there too: the 10 that would fit is not looked at."""
    result = replay(life(30, 40, 10), Settings(), limit=60 * MIB)
    assert result.out_of_memory is not None
    assert (result.out_of_memory.segment, result.out_of_memory.free) == (40 * MIB, 30 * MIB)
    assert (result.end.index, result.end.allocated) == (0, 30 * MIB)
    assert (result.fits, result.retries) == (False, 1)


@pytest.mark.parametrize(("wait", "reserved"), [([], 60), ([(None, 0, 1)], 30)])
def test_a_step_of_no_bytes_is_a_use_on_a_stream_or_a_wait_for_it(wait: list[Step], reserved: int) -> None:
    steps = [*life(30), (30, 0, 1), *life(-30), *wait, ("again", 30 * MIB, 0)]
    assert replay(steps, Settings()).end.reserved == reserved * MIB


def test_the_ledger_s_events_are_steps_and_marks_of_phases_are_not() -> None:
    storage = Storage(3 * MIB, 0, 1, WHERE, "", "aten.mm", "activations")
    marks = [Event(0, 0, None, WHERE, ""), Event(2, 0, storage, WHERE, "", saved=True)]
    born, died = Event(1, 3 * MIB, storage, WHERE, ""), Event(3, -3 * MIB, storage, WHERE, "")
    known = allocations([marks[0], born, marks[1], died])
    assert known == [born, died]
    result = replay(steps_of(known), Settings())
    assert known[result.most_allocated.index] is born
    assert (result.most_allocated.allocated, result.end.allocated) == (3 * MIB, 0)


def test_a_program_under_a_ledger_can_be_replayed() -> None:
    """40 MiB have a segment of their own; 5 are a part of 20, of which 12 then takes what is left, as 40 is larger."""
    with Ledger(device="cpu") as ledger:
        first = torch.empty(40 * MIB, dtype=torch.uint8)
        second = torch.empty(5 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(12 * MIB, dtype=torch.uint8)
    assert second.nbytes + third.nbytes == 17 * MIB
    result = replay(steps_of(allocations(ledger.events)), Settings())
    assert (result.most_allocated.allocated, ledger.peak.bytes) == (45 * MIB, 45 * MIB)
    assert (result.most_reserved.reserved, result.end.segments) == (60 * MIB, 2)


def growing() -> list[Step]:
    """Each size is freed before the next, larger one, which its segment is too small for."""
    return life(*(size for number in range(5) for size in (30 + 2 * number, -30 - 2 * number)))


def test_the_best_advice_comes_first() -> None:
    """30, 32, .. 38 have 170 MiB in segments of their own, and 40, two pages, in one that grows."""
    best = advise(growing(), Settings())[0]
    assert (best.change, best.fits) == ("expandable_segments:True", True)
    assert (best.reserved, best.saved) == (40 * MIB, 130 * MIB)


def test_what_fits_stands_before_what_does_not() -> None:
    """Of 60 MiB, 28 are free in parts of 18 and 10; 28 fits only where the parts are one."""
    steps: list[Step] = [*life(30, -30, 12), *life(30, -30, 20), *life(28)]
    first, *others = advise(steps, Settings(), limit=60 * MIB)
    assert (first.change, first.fits, first.reserved) == ("expandable_segments:True", True, 60 * MIB)
    assert (first.saved, first.retries) == (28 * MIB, 0)
    unsplit = next(each for each in others if each.change == "max_split_size_mb:64")
    assert (unsplit.fits, unsplit.reserved, unsplit.saved) == (False, 88 * MIB, 0)


def test_what_would_change_nothing_is_no_advice() -> None:
    changes = {
        each.change for each in advise(growing(), parse("expandable_segments:True,max_split_size_mb:128"))
    }
    assert changes.isdisjoint({"expandable_segments:True", "max_split_size_mb:128"})
    assert not any("garbage" in change for change in changes)
    limited = parse("per_process_memory_fraction:0.9,large_segment_size_mb:100")
    changes = {each.change for each in advise(growing(), limited, capacity=1000 * MIB)}
    assert "garbage_collection_threshold:0.8" in changes
    assert "max_split_size_mb:64" not in changes
