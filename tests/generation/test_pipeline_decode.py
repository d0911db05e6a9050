"""How a batch is cut into groups, and how the figures of stages and replicas come together."""

import pytest

from harness.config.layout import Layout
from harness.generation import infer
from harness.generation.infer import cut
from harness.generation.metrics import Share, Timing, idleness, of_replicas
from harness.model.kv_cache import KvBytes, of_groups, of_stages
from harness.record.results import Idleness, Inference, Performance


@pytest.mark.parametrize("groups", range(1, 9))
@pytest.mark.parametrize("prompts", range(1, 8))
def test_groups_are_even_none_is_empty_and_no_prompt_is_lost(prompts: int, groups: int) -> None:
    numbers = range(3, 3 + 2 * prompts, 2)
    result = cut(numbers, groups)
    assert [number for group in result for number in group] == list(numbers)
    assert len(result) == min(groups, prompts)
    assert max(map(len, result)) - min(map(len, result)) <= 1
    assert min(map(len, result)) > 0


def test_caches_of_groups_have_more_positions_and_those_of_stages_more_bytes_in_each() -> None:
    first, second = KvBytes(120, 80, 60, 4), KvBytes(60, 40, 30, 2)
    assert of_groups([first, second]) == KvBytes(180, 120, 90, 6)
    assert of_groups([first, second]).per_token == first.per_token == second.per_token == 20
    assert of_stages([first, first]) == KvBytes(240, 160, 120, 4)
    assert of_stages([first, first]).per_token == 40


def test_a_replicas_tokens_and_times_are_its_last_stages_and_its_cache_all_of_them() -> None:
    small, large = KvBytes(10, 8, 6, 2), KvBytes(30, 24, 18, 2)
    early, late = Timing(1, 4, 3, 1.0, 2.0, 0.5), Timing(1, 4, 3, 1.5, 2.0, 0.5)
    unknown, known = Share({0: [0, 0, 0]}, [early], [small]), Share({0: [7, 8, 9]}, [late], [large])
    both = of_replicas([unknown, Share(), known, Share()], Layout(4, 2))
    assert both == [Share({0: [7, 8, 9]}, [late], [KvBytes(40, 32, 24, 2)]), Share()]


def test_idle_is_what_a_stage_waited_of_all_its_replicas_seconds() -> None:
    slowed = Timing(2, 20, 12, 100.0, 100.0, 150.0)
    first = [slowed, Timing(2, 20, 12, 1.0, 3.0, 1.0)]
    last = [slowed, Timing(2, 20, 12, 2.0, 2.0, 3.0)]
    without = Share()
    assert idleness([Share(timings=first), without, Share(timings=last), without], Layout(4, 2), exact=1) == [
        Idleness(stage=0, busy_seconds=3.0, idle=0.25),
        Idleness(stage=1, busy_seconds=1.0, idle=0.75),
    ]
    two = [Share(timings=[Timing(1, 9, 9, 1.0, 1.0, waited)]) for waited in (0.5, 1.5)]
    assert idleness(two, Layout(2), exact=0) == [Idleness(stage=0, busy_seconds=1.0, idle=0.5)]


def test_idleness_is_told_where_there_are_stages() -> None:
    speed = Performance(tokens_per_second=10.0, time_to_first_token_seconds=0.5)
    inference = Inference(new_tokens=3, kv_bytes_per_token=1024, cache="dynamic")
    lines: list[str] = []
    infer._tell(lines.append, [], [], inference, speed)
    assert "idle" not in lines[-1]
    stages = [Idleness(stage=0, busy_seconds=1.0, idle=0.306), Idleness(stage=1, busy_seconds=1.0, idle=0.0)]
    infer._tell(lines.append, [], [], inference, speed.plus(stages=stages))
    assert lines[-1] == "stage 0 idle 31%, stage 1 idle 0%"
