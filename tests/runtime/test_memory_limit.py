"""What a machine has not the memory for is refused, by the key that asks for it."""

from math import inf
from typing import Any

import psutil
import pytest
import torch

from harness.config.settings import Refusal, Settings
from harness.model.loader import loading
from harness.runtime.memory_limit import NotFree, allocations, bytes_wanted, check_parameters, shortage

CPU = torch.device("cpu")
LARGER = 2 * psutil.virtual_memory().total


def settings(**given: Any) -> Settings:
    return Settings(**given)


@pytest.mark.parametrize(
    ("mode", "given", "key"),
    [
        ("infer", {"generation": {"max_new_tokens": 2**30}}, "generation.max_new_tokens"),
        ("infer", {"generation": {"batch": 2**20, "prompt_length": 128}}, "generation.batch"),
        ("infer", {"generation": {"pages": 2**30}}, "generation.pages"),
        ("train", {"train": {"sequence": 2**30, "micro_batch": 8}}, "train.sequence"),
        ("train", {"model": {"config": {"intermediate_size": 2**40}}}, "model.config.intermediate_size"),
        ("train", {"model": {"name": "mine"}}, "model"),
    ],
)
def test_a_tensor_larger_than_the_machine_is_a_wrong_request(
    mode: str, given: dict[str, Any], key: str
) -> None:
    with pytest.raises(Refusal) as refused, allocations(settings(mode=mode, **given), CPU):
        torch.empty(LARGER, dtype=torch.uint8)
    assert refused.value.key == key
    assert f"it needs a tensor of {LARGER / 2**30:,.1f} GiB" in str(refused.value)


@pytest.mark.parametrize("error", [RuntimeError("you tried to allocate 4096 bytes"), RuntimeError("other")])
def test_a_failure_of_another_kind_stays_one(error: RuntimeError) -> None:
    with pytest.raises(RuntimeError) as raised, allocations(settings(mode="train"), CPU):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("says", "bytes_"),
    [
        (
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 102400064512 bytes. Error",
            102400064512,
        ),
        ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of", 20 * 2**30),
        ("Storage size calculation overflowed with sizes=[1099511627776, 1099511627776]", inf),
        ("numel: integer multiplication overflow", inf),
        ("expected all tensors to be on the same device", None),
    ],
)
def test_how_large_the_allocation_was_that_failed(says: str, bytes_: float | None) -> None:
    assert bytes_wanted(RuntimeError(says)) == bytes_


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"vocab_size": 10**12, "hidden_size": 64}, "model.config.vocab_size=1000000000000"),
        ({}, "model=mine"),
    ],
)
def test_parameters_larger_than_the_machine_are_refused_by_the_size_that_asks(
    config: dict[str, int], key: str
) -> None:
    model = settings(mode="train", model={"name": "mine", "config": config}).model
    with pytest.raises(
        Refusal, match=f"^{key}: its parameters are .* GiB in bfloat16, and the cpu has .* GiB"
    ):
        check_parameters(model, LARGER, torch.bfloat16, CPU)


def test_parameters_that_others_leave_no_room_for_are_no_wrong_request() -> None:
    memory = psutil.virtual_memory()
    between = (memory.available + memory.total) // 2
    with pytest.raises(NotFree, match=r"^model=mine: its parameters are .* GiB in bfloat16, and .* are free"):
        check_parameters(settings(mode="train", model={"name": "mine"}).model, between, torch.bfloat16, CPU)


@pytest.mark.parametrize(
    ("error", "asked", "device"),
    [
        (RuntimeError("DefaultCPUAllocator: you tried to allocate 4096 bytes."), 4096, "cpu"),
        (MemoryError(), None, "cpu"),
        (RuntimeError("Storage size calculation overflowed"), None, "cpu"),
    ],
)
def test_an_allocation_that_failed_is_a_shortage(
    error: BaseException, asked: int | None, device: str
) -> None:
    actual = shortage(error)
    assert actual
    assert (actual.asked, actual.device) == (asked, device)
    assert 0 <= actual.free <= actual.total
    assert actual.sentence().startswith(
        f"out of memory: {'more' if asked is None else '4.0 KiB'} was asked for"
    )
    assert shortage(RuntimeError("out of luck")) is None


def test_a_tensor_of_more_bytes_than_can_be_counted_is_refused_too() -> None:
    asking = settings(mode="infer", generation={"pages": 2**31 - 1})
    for size in ((2**53 - 1) * 2**20, (2**40, 2**40)):
        with pytest.raises(Refusal, match="more bytes than 64 bits can count"), allocations(asking, CPU):
            torch.zeros(size)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("you tried to allocate 4096 bytes"), NotFree("model=mine: it has")]
)
def test_memory_that_runs_out_while_a_checkpoint_is_read_is_no_wrong_request(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, loading("mine"):
        raise error
    assert raised.value is error
