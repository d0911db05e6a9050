"""What a rank's training takes by four accounts: the ZeRO paper's, DeepSpeed's, accelerate's, and a rehearsal's.

    python tests/benchmarks/estimates.py > profiles/estimates.md

Prints a page. Every number on it is computed here; small models are also trained for real, on two ranks of this
machine. Takes some minutes. `tests/rehearsal/test_estimates.py` holds the committed page against what is computed anew.
"""

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from transformers import AutoModel, AutoModelForCausalLM

from harness.config.compose import compose
from harness.config.load import load
from harness.config.settings import Zero
from harness.model.loader import model_config
from harness.model.plan import Plan
from harness.record import record_file
from harness.rehearsal.all_ranks import rehearse

MODELS = ("llama2-7b", "llama3-8b", "llama2-70b")
WORLDS = (8, 64)
SMALL = ("tiny", "small")
STAGES = (0, 1, 2, 3)
STEPS = ("ledger.steps=2", "train.steps=2", "train.validate_every=0", "train.export=false")
"""Two steps: Adam's moments are made in the first, so the second is like all that follow."""
LONG = (*STEPS, "train.sequence=4096", "train.micro_batch=1")
SHORT = (*STEPS, "train.sequence=256", "train.micro_batch=4")
BUCKETS = {"the harness's": Zero().reduce_bucket_size, "DeepSpeed's": 500_000_000}
"""Elements of each default."""
ROOT = Path(__file__).parents[2]


class Estimates(NamedTuple):
    """Bytes of a rank by what others compute. None: they give no figure for that stage."""

    paper: int
    deepspeed: int | None
    accelerate: int


class Usage(NamedTuple):
    """Bytes of the rank that holds most, in the second step.

    `states`: all that is alive when backward is over. `stepping`: the most within the optimizer's step. `peak`: the
    most within the whole of it. `allocator`: the highest that the CPU's allocator itself told of, in any step.
    """

    states: int
    stepping: int
    peak: int
    allocator: int | None


def words(model: str, stage: int, more: Sequence[str] = LONG) -> list[str]:
    """Overrides that train `model` with ZeRO's `stage`."""
    decided = ("precision=bf16", "model.attention=sdpa")
    return ["mode=train", f"model={model}", f"zero={stage}", "hardware=cpu", *decided, *more]


def estimates(model: str, stage: int, world: int) -> Estimates:
    """The others' figures for `model` in bf16 with Adam, ZeRO's `stage`, and `world` ranks, eight to a node."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    count, layer, fp32_bytes = sizes(model)
    node = {"num_gpus_per_node": min(8, world), "num_nodes": max(1, world // 8), "cpu_offload": False}
    deepspeed = None
    if stage == 2:
        _, deepspeed = stage_1_and_2.estimate_zero2_model_states_mem_needs(count, **node)
    if stage == 3:
        _, deepspeed, _ = stage3.estimate_zero3_model_states_mem_needs(count, layer, **node)
    accelerate = max(estimate_training_usage(fp32_bytes, "float16").values())
    return Estimates(paper(count, stage, world), deepspeed, accelerate)


def paper(count: int, stage: int, world: int) -> int:
    """arXiv 1910.02054: 2 bytes a parameter, 2 a gradient, 12 of optimizer; each stage splits one more of them."""
    parameters, gradients, optimizer = 2 * count, 2 * count, 12 * count
    whole = parameters * (stage < 3) + gradients * (stage < 2) + optimizer * (stage < 1)
    return whole + (parameters + gradients + optimizer - whole) // world


@cache
def sizes(model: str) -> tuple[int, int, int]:
    """Parameters of `model`, those of its largest layer, and the bytes in fp32 of what accelerate builds of it."""
    from deepspeed.runtime.zero import stage3

    config = model_config(load(compose(words(model, 0, STEPS))).model)
    with init_empty_weights():
        trained = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        seen = AutoModel.from_config(config, dtype=torch.float32)  # as its create_empty_model does
    _, layer = stage3.model_to_params(trained)
    return trained.num_parameters(), layer, calculate_maximum_sizes(seen)[0]


def rehearsed(model: str, stage: int, world: int, more: Sequence[str] = LONG) -> Usage:
    """What a rehearsal sees of the rank that holds most."""
    requested = ["world=rehearsed", f"world.size={world}", *words(model, stage, more)]
    return highest_usage([rank.tree() for rank in rehearse(Plan.of(load(compose(requested))))[0]])


def real(model: str, stage: int, world: int = 2) -> Usage:
    """What a run on `world` ranks of this machine sees."""
    with tempfile.TemporaryDirectory() as directory:
        run = [f"--nproc-per-node={world}", "-m", "harness", *words(model, stage, SHORT)]
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", *run, f"hydra.run.dir={directory}/run"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=600,
        )  # fmt: skip
        return highest_usage(record_file.read(Path(directory) / "run")["ranks"])


def highest_usage(ranks: Sequence[dict[str, Any]]) -> Usage:
    """From the ranks of a record: of each figure the highest."""

    def most(field: str, *phases: str) -> int:
        return max(
            int(phase[field])
            for rank in ranks
            for phase in rank["phases"]
            if phase["step"] == 1 and phase["phase"] in phases
        )

    reported = [rank["allocator"]["peak"] for rank in ranks]
    return Usage(
        most("end", "backward"),
        most("peak", "step"),
        most("peak", "data", "forward", "backward", "step"),
        None if None in reported else max(reported),
    )


def row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def heading(*names: str) -> str:
    """The first lines of a table."""
    return f"{row(*names)}\n{row(*('---' for _ in names))}"


def gigabytes(count: int | None) -> str:
    """Bytes in GB of 10^9."""
    return "-" if count is None else f"{count / 1e9:,.2f}"


def exact(count: int | None) -> str:
    """Bytes."""
    return "-" if count is None else f"{count:,}"


def large(model: str, world: int, stage: int) -> str:
    """A row of the large models."""
    others, actual = estimates(model, stage, world), rehearsed(model, stage, world)
    return row(model, world, stage, *map(gigabytes, (*others, actual.states, actual.stepping, actual.peak)))


def small(model: str, stage: int) -> str:
    """A row of the small models, on two ranks."""
    others, fake, true = estimates(model, stage, 2), rehearsed(model, stage, 2, SHORT), real(model, stage)
    figures = (*others, fake.states, true.states, fake.peak, true.peak, true.allocator)
    return row(model, stage, *map(exact, figures))


def bucket(name: str) -> str:
    """A row of LLaMA-2-70B under ZeRO-3 on 64 ranks, by whose reduce bucket it has."""
    actual = rehearsed("llama2-70b", 3, 64, (*LONG, f"zero.reduce_bucket_size={BUCKETS[name]}"))
    others = estimates("llama2-70b", 3, 64)
    return row(f"{name}, {BUCKETS[name]:,}", *map(gigabytes, (others.paper, actual.states, others.deepspeed)))


PAGE = """\
# Estimates, rehearsals and runs

Made by `python tests/benchmarks/estimates.py > profiles/estimates.md`,
and checked by `tests/rehearsal/test_estimates.py`.
{processor}, python {python}, {packages}.

Four accounts of the memory of one rank in training: bf16 parameters and gradients, AdamW in fp32.

- **paper**: the formula of the ZeRO paper (arXiv 1910.02054): 2 bytes a parameter, 2 for its gradient, 12 for the
  optimizer.
- **DeepSpeed**: its own `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs`,
  without offload. It has none for the stages 0 and 1.
- **accelerate**: what `accelerate estimate-memory` prints as "Training using Adam" for float16. It knows no ranks.
- **states**, **stepping**, **peak**: what a rehearsal sees in the second step, of the rank that holds most. States
  are all that is alive when backward is over: what the others estimate. Stepping is the most within the optimizer's
  step, and peak the most within the whole step, with activations.

## Public models

One sequence of 4,096 tokens a rank, buckets of {zero.reduce_bucket_size:,} elements. GB of 10^9 bytes.

{large}

## One line of it with two buckets

LLaMA-2-70B, ZeRO-3, 64 ranks, GB.

{buckets}

## Beside real runs

Two ranks of this machine, 4 sequences of 256 tokens each, in bytes. The allocator's own peak is the highest of any
step. It counts what kernels take for themselves too, which no rehearsal sees, and differs from processor to
processor.

{small}

{verdict}

## Why they differ

- **Buckets.** The paper and DeepSpeed count none. ZeRO-3 keeps its bucket for good, ZeRO-1 and 2 make theirs in
  backward. A small model's bucket can outweigh all else.
- **Whole gradients.** Under ZeRO-1 and 2 a rank keeps the gradients of all parameters that its partition touches,
  each of them whole. That is most of what states exceed the paper's ZeRO-2 by.
- **ZeRO-1 as ZeRO-2.** The paper's ZeRO-1 keeps every gradient. At one micro-batch a step DeepSpeed's drops those
  that other ranks own as soon as they are sent, so that states are the same for both.
- **fp32 gradients.** They are there within the optimizer's step alone, with what AdamW makes for itself and drops.
  DeepSpeed's estimators count the gradients always, 18 bytes a parameter; the paper does not. See the difference
  between states and stepping.
- **Lazy moments.** Adam's moments, 8 of the 12 bytes, are made in the first step. An engine that has just been made
  holds that much less than any of these figures.
- **What is gathered.** DeepSpeed's ZeRO-3 figure adds 4 bytes for each parameter of the largest layer. When
  backward is over nothing is gathered but the parameters too small to be split.
  Here those have less than {zero.persistence_threshold:,} elements.
- **Padding.** Partitions are rounded up so that they divide evenly. That is why rehearsals are bytes above the
  formulas.
- **Activations.** None of the three counts them. Under ZeRO-1 to 3 they make most of the difference between states
  and peak; under ZeRO-0 the fp32 gradients do.
- **Ranks.** accelerate counts on one device, and prints the largest of parameters, gradients and optimizer, not their
  sum. It builds the model without its output layer.
"""


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints what it finds where it is not told
    machine = record_file.environment()
    order = ("torch", "deepspeed", "transformers", "accelerate")
    rows = [small(model, stage) for model in SMALL for stage in STAGES]
    pairs = [[cell.strip() for cell in line.split("|")[6:10]] for line in rows]
    same = all(states == real_states and peak == real_peak for states, real_states, peak, real_peak in pairs)
    print(
        PAGE.format(
            zero=Zero(),
            processor=machine.processor,
            python=platform.python_version(),
            packages=", ".join(f"{name} {machine.packages[name]}" for name in order),
            large="\n".join([heading(*LARGE), *(large(*each) for each in cases())]),
            buckets="\n".join([heading("bucket", "paper", "states", "DeepSpeed"), *map(bucket, BUCKETS)]),
            small="\n".join([heading(*SMALLER), *rows]),
            verdict=f"Rehearsed and real are {'equal to the byte in every row' if same else 'NOT equal'}.",
        ),
        end="",
    )


def cases() -> Iterator[tuple[str, int, int]]:
    """Each large model, world and stage."""
    return product(MODELS, WORLDS, STAGES)


LARGE = ("model", "ranks", "ZeRO", "paper", "DeepSpeed", "accelerate", "states", "stepping", "peak")
SMALLER = (
    *("model", "ZeRO", "paper", "DeepSpeed", "accelerate", "states, rehearsed", "states, real"),
    *("peak, rehearsed", "peak, real", "allocator"),
)

if __name__ == "__main__":
    main()
