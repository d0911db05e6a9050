"""The steps of training after those that were rehearsed: they are what recording more of them gives."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import pytest

from harness.config.compose import compose
from harness.config.load import Settings, load
from harness.device.allocator_settings import MIB
from harness.device.caching_allocator import CachingAllocator, OutOfMemory
from harness.device.replay import Step, follow, replay
from harness.ledger.events import Storage, Where
from harness.model.resolve import resolve
from harness.rehearsal.card_memory import CardMemory
from harness.rehearsal.later_steps import Later
from harness.rehearsal.one_rank import rehearse

BORN = count()


def step_of(number: int, seed: int, before: dict[str, Storage]) -> tuple[list[Step], dict[str, Storage]]:
    """A step of training that leaves some storages to the next, which frees them; and those that it leaves."""
    dice, alive, steps = random.Random(seed), dict[str, Storage](), list[Step]()

    def free(name: str, storages: dict[str, Storage]) -> None:
        storage = storages.pop(name)
        steps.append((storage, -storage.nbytes, 0))

    left = {str(each) for each in range(12) if dice.random() < 0.3}
    ends = {name: dice.randrange(12) for name in left}
    for each in range(12):
        for name in [name for name, end in ends.items() if end == each and name in before]:
            free(name, before)
        storage = Storage(
            dice.choice([3, 12, 14, 21, 30]) * MIB,
            0,
            next(BORN),
            Where(number, "forward", 0),
            "layer",
            str(each),
            "",
        )
        alive[str(each)] = storage
        steps.append((storage, storage.nbytes, 0))
        for name in [*alive]:
            if name not in left and dice.random() < 0.5:
                free(name, alive)
    for name in [name for name in alive if name not in left]:
        free(name, alive)
    return steps, alive


def course(seed: int, number: int) -> list[list[Step]]:
    """So many alike steps of training."""
    steps, left = [], dict[str, Storage]()
    for each in range(number):
        step, left = step_of(each, seed, dict(left))
        steps.append(step)
    return steps


def test_what_follows_is_what_the_allocator_does_with_more_steps() -> None:
    exhausted = 0
    for seed in range(400):
        steps = course(seed, 10)
        known = [step for each in steps[:3] for step in each]
        most = replay(known, CachingAllocator().settings)
        slack = most.most_reserved.reserved - most.most_allocated.allocated
        limit = most.most_allocated.allocated + int(slack * random.Random(seed).random())
        allocator = CachingAllocator(limit=limit)
        try:
            for step in known:
                follow(allocator, step)
        except OutOfMemory:  # it does not fit from the beginning
            continue
        later = Later(steps[2], 2)
        assert later.repeats
        later.follow(allocator, 7)
        whole = replay([step for each in steps for step in each], CachingAllocator().settings, limit)
        assert (later.exhausted is None) is whole.fits
        if later.exhausted is not None:
            exhausted += 1
            number, place = divmod(whole.end.index + 1 - len(steps[0]), len(steps[1]))
            assert later.exhausted.where.step == 1 + number
            assert later.exhausted.nbytes == steps[1][place][1]
            assert later.reserved > limit
            assert len(later.followed) == (later.exhausted.where.step - 2) * len(steps[1])
        else:
            assert later.reserved == max(after(steps, limit))
    assert exhausted > 3


def after(steps: Sequence[Sequence[Step]], limit: int) -> Iterator[int]:
    """What is reserved at each moment after the third of `steps`."""
    allocator = CachingAllocator(limit=limit)
    for number, each in enumerate(steps):
        for step in each:
            follow(allocator, step)
            if number > 2:
                yield allocator.reserved


def test_a_step_that_leaves_more_than_it_frees_does_not_repeat() -> None:
    steps, _ = step_of(2, 1, {})
    assert not Later(steps, 2).repeats


LLAMA = [
    *("model=llama3-8b", "model.config.num_hidden_layers=2", "hardware=h100-sxm", "precision=bf16"),
    *("world=rehearsed", "world.size=2", "train.micro_batch=3", "train.sequence=512"),
]


@pytest.mark.parametrize("words", [["zero=1"], ["zero=3"]])
def test_what_follows_the_steps_of_a_rehearsal_is_what_more_recorded_steps_have(words: list[str]) -> None:
    settings = load(compose([*LLAMA, *words]))
    roomy = memory_of(settings)
    assert roomy.later is not None
    assert roomy.later.reserved == roomy.peak_reserved
    slack = roomy.peak_reserved - roomy.peak_allocated
    limits = (roomy.peak_allocated + slack * part // 20 for part in range(20))
    tight = next(limit for limit in limits if replay(roomy.steps, roomy.allocator.settings, limit).fits)
    hardware = replace(settings.hardware, memory_torch=tight)
    three, six = (
        memory_of(replace(settings, hardware=hardware, ledger=replace(settings.ledger, steps=recorded)))
        for recorded in (3, 6)
    )
    assert three.reservation().retries
    assert three.later is not None
    assert six.later is not None
    assert three.exhausted is None
    assert six.exhausted is None
    reserved = {max(memory.peak_reserved, memory.later.reserved) for memory in (three, six) if memory.later}
    assert len(reserved) == 1
    assert three.peak_allocated == six.peak_allocated
    last = replace(settings, hardware=hardware, train=replace(settings.train, steps=3))
    assert memory_of(last).reservation() == three.reservation()  # its figures are those of the recorded steps


@pytest.mark.parametrize(
    "words",
    [
        ["zero=0"],
        ["zero=2", "train.accumulation=2"],
        ["zero=1", "pipeline.stages=2"],
        ["zero=3", "adapter=lora"],
    ],
)
def test_a_step_of_training_repeats(words: list[str]) -> None:
    """A stage frees something before its first phase."""
    later = memory_of(load(compose([*LLAMA, *words]))).later
    assert later is not None
    assert later.followed


def test_only_steps_that_follow_and_only_those_without_a_validation_are_followed() -> None:
    words = [*LLAMA, "zero=1", "train.micro_batch=1"]
    assert memory_of(load(compose([*words, "train.steps=3"]))).later is None
    assert memory_of(load(compose([*words, "train.validate_every=3"]))).later is None
    assert memory_of(load(compose([*words, "train.validate_every=4"]))).later is not None


def memory_of(settings: Settings) -> CardMemory:
    """The memory of the last rank's GPU at the end."""
    memories: list[CardMemory] = []
    rehearse(resolve(settings), (settings.world.size or 1) - 1, learn=memories.append)
    return memories[0]
