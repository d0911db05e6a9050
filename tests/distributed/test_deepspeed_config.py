"""A run from DeepSpeed's config file: its rehearsal has its bytes, and the file that it leaves makes the same run."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.rehearsal.one_rank import rehearse
from tests.distributed.conftest import Launch, Warm, complete
from tests.distributed.test_rehearsal import TINY, TRAIN, differences, phases_of, plan_of

ZERO = "zero_optimization"
BASE = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": "auto"}
OFFLOADED = {"device": "cpu", "pin_memory": False}
SMALL = {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 2000}
LIMITED = {"stage3_max_live_parameters": 20_000, "stage3_max_reuse_distance": 1000, "sub_group_size": 20_000}
SCHEDULE = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.05},
    },
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 1, "total_num_steps": 3}},
}
FILES: dict[str, dict[str, Any]] = {
    "three": {"bf16": {"enabled": True}, ZERO: {"stage": 3, "reduce_bucket_size": 1e4, **SMALL}, **SCHEDULE},
    "two": {"bf16": {"enabled": True}, ZERO: {"stage": 2, "reduce_bucket_size": 1e4, "overlap_comm": True}},
    "offload": {ZERO: {"stage": 3, "offload_optimizer": OFFLOADED, "offload_param": OFFLOADED, **LIMITED}},
    "robin": {
        "bf16": {"enabled": True},
        "communication_data_type": "fp32",
        ZERO: {
            "stage": 2,
            "offload_optimizer": OFFLOADED,
            **dict.fromkeys(("round_robin_gradients", "parameter_alignment"), True),
            **dict.fromkeys(("contiguous_gradients", "allgather_partitions"), False),
        },
    },
    "fetched": {
        ZERO: {
            "stage": 3,
            **dict.fromkeys(("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"), True),
            "stage3_model_persistence_threshold": 500,
            "memory_efficient_linear": False,
        }
    },
    "stages": {
        "pipeline": {"stages": 2, "partition": "parameters"},
        ZERO: {"stage": 1},
        "gradient_clipping": 0,
    },
}
EXHAUSTIVE = {"robin", "fetched"}
cases = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in EXHAUSTIVE)) for name in FILES]
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of FILES."""
    directory = tmp_path_factory.mktemp("files")
    for name, tree in FILES.items():
        (directory / f"{name}.json").write_text(json.dumps({**BASE, **tree}))
    return directory


def words_of(file: Path, name: str) -> tuple[str, ...]:
    """The words of a run from a file; the precision that `launch` types first yields to the last."""
    words = [word for word in (*TINY, *TRAIN) if not word.startswith("train.micro_batch")]
    precision = "bf16" if "bf16" in FILES[name] else "fp32"
    return (*words, f"precision={precision}", f"deepspeed.config={file}")


@cases
def test_its_rehearsal_has_the_bytes_of_the_run(launch: Launch, files: Path, name: str) -> None:
    words = words_of(files / f"{name}.json", name)
    real = complete(launch(*words))
    plan = plan_of(words, 2, files)
    for rank in (0, 1):
        rehearsed, _ = rehearse(plan, rank)
        assert differences(real["ranks"][rank], rehearsed.tree()) == []
        assert rehearsed.peak.bytes == max(each["peak"] for each in phases_of(real["ranks"][rank]).values())


@cases
def test_the_file_that_a_run_leaves_makes_the_same_run(launch: Launch, files: Path, name: str) -> None:
    first = launch(*words_of(files / f"{name}.json", name))
    second = launch(*words_of(first / "deepspeed.json", name))
    ours, theirs = complete(first), complete(second)
    assert ours["config"] == theirs["config"]
    assert ours["training"]["losses"] == theirs["training"]["losses"]
    for one, other in zip(ours["ranks"], theirs["ranks"], strict=True):
        assert one["categories"] == other["categories"]
        assert phases_of(one) == phases_of(other)
    assert (first / "deepspeed.json").read_bytes() == (second / "deepspeed.json").read_bytes()


OWN_SCRIPT = """
import sys

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile this for a minute
deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Linear(8, 8)
engine, optimizer, _, schedule = deepspeed.initialize(model=model, config=sys.argv[1])
for _ in range(engine.gradient_accumulation_steps()):
    engine.backward(engine(torch.ones(1, 8, dtype=next(engine.parameters()).dtype)).sum())
    engine.step()
if engine.global_rank == 0:
    print(f"STEPPED {engine.global_steps} {engine.zero_optimization_stage()} {type(schedule).__name__}")
"""


@pytest.mark.parametrize(("name", "stepped"), [("three", "1 3 WarmupCosineLR"), ("two", "1 2 NoneType")])
def test_deepspeed_itself_takes_the_file_that_a_run_leaves(
    launch: Launch, warm: Warm, files: Path, tmp_path: Path, name: str, stepped: str
) -> None:
    left = launch(*words_of(files / f"{name}.json", name)) / "deepspeed.json"
    (tmp_path / "own.py").write_text(OWN_SCRIPT)
    said = warm.run([str(tmp_path / "own.py"), str(left)], directory=tmp_path)
    assert f"STEPPED {stepped}" in said
