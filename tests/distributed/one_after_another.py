"""The product, or a script, under torchrun, for each job that the tests' store gives: forks of processes that have
imported it once. A job of fewer ranks takes the first of them. How each rank's run ended goes back to the store."""

import json
import os
import runpy
import sys
import traceback
from datetime import timedelta
from importlib import import_module
from itertools import count
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from harness.__main__ import main
from harness.config.compose import compose
from harness.runtime.imports import import_deepspeed

SLOW = (
    *(
        "harness.run",
        "harness.training.train",
        "harness.generation.infer",
        "harness.data.text",
        "harness.analysis.summary",
        "harness.generation.cache_check",
    ),
    *(
        "harness.training.pipeline_engine",
        "harness.generation.pipeline_decode",
        "harness.model.tensor_parallel",
        "transformers.models.llama.modeling_llama",
    ),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx"),
    "torch._dynamo.repro.after_dynamo",
)
"""What a run imports as it goes, DeepSpeed's and torch's among them."""
WORDS = [
    "mode=train",
    "zero=2",
    "zero.offload=none",
    "precision=fp32",
    "train.steps=3",
    "hardware.bandwidth=1e10",
    "pipeline.split=[1,2]",
    "model.config.num_hidden_layers=2",
    "+model.config.sliding_window=40",
]
"""Some of every kind."""
import_deepspeed()
for slow in SLOW:
    import_module(slow)
import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 - it is asked for once
compose(WORDS)  # Hydra looks for its plugins once, and its parser learns


def script(directory: str, path: str, *words: str) -> int:
    """The exit code of the script at `path` with `words`, run in `directory`."""
    os.chdir(directory)
    sys.argv = [path, *words]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:  # a fork skips Python's shutdown
        return int(ended.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


rank, address = int(os.environ["RANK"]), os.environ["MASTER_ADDR"]
tests = TCPStore("localhost", int(sys.argv[1]), is_master=False, timeout=timedelta(hours=2))
for number in count():
    job = json.loads(tests.get(f"{number}/job"))
    if job is None:
        break
    if rank >= job["ranks"]:
        continue
    if rank == 0:  # each run meets at a store of its own, as under a torchrun of its own
        own = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        tests.set(f"{number}/port", str(own.port))
    os.environ["MASTER_PORT"] = tests.get(f"{number}/port").decode()
    child = os.fork()
    if child == 0:
        # each run has a directory of its own in which its ranks know each other, as under a torchrun of its own
        own_file = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / f"job-{number}/{rank}/error.json"
        own_file.parent.mkdir(parents=True)
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(own_file)
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(job["ranks"])
        code = script(job["directory"], *job["words"]) if job["directory"] else main(job["words"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    tests.set(f"{number}/exit/{rank}", str(os.waitstatus_to_exitcode(status)))
