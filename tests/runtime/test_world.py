"""A process's place in the world: alone without torchrun, and on a device that is there."""

import os

import pytest
import torch
import torch.distributed as dist

from harness.config.settings import Refusal
from harness.runtime.world import connected


def test_a_world_of_one_opens_no_port_and_leaves_nothing() -> None:
    with connected("cpu", 10) as world:
        assert (world.rank, world.size, world.leads) == (0, 1, True)
        assert world.gather(5) == [5]
        assert world.broadcast("x") == "x"
        assert world.mean(2.5) == 2.5
        assert dist.get_world_size() == 1
        assert "MASTER_PORT" not in os.environ
    assert not dist.is_initialized()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a machine with a GPU has the device that is refused here"
)
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with (
        pytest.raises(
            Refusal, match=r"hardware.device=cuda: torch sees no GPU here; use hardware.device=cpu"
        ),
        connected("cuda", 10),
    ):
        pass
    assert not dist.is_initialized()
