"""Whole steps whose seconds others published, beside what is estimated of them.

    python -m tests.benchmarks.speed steps      # profiles/speed/steps.md, from profiles/speed/steps.csv

Each is rehearsed: by the harness, or as the loop that was timed. None of these rows is in the fit.
"""

import csv
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import harness
from harness.analysis.speed.estimate import Estimate, of_phase
from harness.analysis.speed.roofline import against
from harness.config import hardware_page
from harness.config.compose import compose
from harness.config.load import load
from harness.record.ceilings import of_page
from harness.record.memory import Work as Recorded
from harness.rehearsal.all_ranks import rehearsed
from harness.tables import seconds as text_of
from tests.benchmarks.measured_rows import CUDA
from tests.benchmarks.speed import whole

STEPS = Path(__file__).parents[2] / "profiles" / "speed" / "steps.csv"

LLAMA_1B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    attn_implementation="sdpa",
)


class Step(NamedTuple):
    """A published step: on which card, by which program, and its seconds."""

    gpu: str
    page: str
    ranks: int
    program: str
    request: str
    seconds: float
    note: str


def steps() -> list[Step]:
    """Those of the file."""
    with STEPS.open(encoding="utf-8", newline="") as file:
        return [
            Step(
                line["gpu"],
                line["page"],
                int(line["ranks"]),
                line["program"],
                line["request"],
                float(line["seconds"]),
                line["note"],
            )
            for line in csv.DictReader(file)
        ]


def estimated(step: Step) -> Estimate:
    """What is estimated of the step."""
    return of_loop(step) if step.program == "loop" else of_run(step)


def of_run(step: Step) -> Estimate:
    """Of a run of the harness."""
    words = [f"hardware={step.page}", "world=rehearsed", *step.request.split()]
    words += [] if "mode=infer" in words else ["mode=train", "train.steps=2", "train.validate_every=0"]
    record = rehearsed(load(compose(words)), words, parallel=False)
    *phases, whole = (each.estimate for each in against(Path("it"), record, step.page).phases)
    return next((each for each in phases if each.interval is None), whole)


def of_loop(step: Step) -> Estimate:
    """Of a loop of forward, cross-entropy, backward and SGD around transformers' Llama, given embeddings."""
    given = dict(word.split("=") for word in step.request.split())
    batch, length = int(given["batch"]), int(given["length"])
    kernel = getattr(SDPBackend, given["kernel"])
    with harness.rehearse(hardware=step.page, lines=False) as ledger, sdpa_kernel([kernel]):
        model = LlamaForCausalLM(LLAMA_1B).to(CUDA, torch.bfloat16).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        states = torch.randn(batch, length, model.config.hidden_size, dtype=torch.bfloat16, device=CUDA)
        mask = torch.ones(batch, length, dtype=torch.int64, device=CUDA)
        target = torch.zeros(batch * length, dtype=torch.int64, device=CUDA)
        for _ in range(2):
            before = whole(ledger)
            logits = model(inputs_embeds=states, attention_mask=mask).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, model.config.vocab_size), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        work = type(before)(late - early for early, late in zip(before, whole(ledger), strict=True))
    by_class = {name: Recorded(**part._asdict()) for name, part in work.by_class.items()}
    ceilings = of_page(hardware_page.named(step.page), "bfloat16")
    assert ceilings is not None
    return of_phase(by_class, ceilings)


REASONS = {
    "Llama 3.2 1B, SGD": "the clock was locked below the one that the page's peak rate is for",
    "Llama 3.1 8B, FSDP": "the card has 2.4 TB/s and 500 W, the page 3.35 TB/s and 700 W; torchtitan chooses what to "
    "recompute otherwise",
    "FSDP": "MPT has ALiBi and fused norms, and its weights in float32 under autocast; this is GPT-2 of the same "
    "width, whose norms are torch's",
}
"""What differs between a published step and the one that is estimated, by the end of its note."""


def page(committed: Sequence[Step]) -> Iterator[str]:
    """The page, line by line."""
    yield "# Whole steps: estimated and published"
    yield ""
    yield "By `python -m tests.benchmarks.speed steps`. No row here is in the fit. Sources: [steps.csv](steps.csv)."
    yield f"Rehearsed with torch {torch.__version__.partition('+')[0]} on Python {platform.python_version()}."
    sent = "with what they send each other by NVLink: hidden as far as it can be, or not at all."
    yield f"*1: several ranks of a node, {sent}"
    yield ""
    yield "| what | card | step | published | estimated | between | published / estimated | within |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    notes: dict[str, None] = {}
    inside = outside = refused = 0
    for step in committed:
        estimate = estimated(step)
        interval, mark = estimate.interval, " *1" if step.ranks > 1 else ""
        cells = [step.note + mark, step.gpu, short(step), text_of(step.seconds)]
        if interval is None:
            refused += 1
            cells += ["-", "-", "-", estimate.why]
        else:
            held = interval.low <= step.seconds <= interval.high
            inside, outside = inside + held, outside + (not held)
            ratio = f"{step.seconds / interval.seconds:.2f}"
            between = f"{text_of(interval.low)} to {text_of(interval.high)}"
            cells += [text_of(interval.seconds), between, ratio, "yes" if held else "no"]
            kind = "MPT" if step.note.startswith("MPT") else step.note
            reason = next((why for end, why in REASONS.items() if step.note.endswith(end)), "*unexplained*")
            notes[f"- {kind}: {reason}."] = None
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"{inside} within, {outside} not, {refused} refused. What differs; how much each takes is *unexplained*:"
    yield ""
    yield from notes


def short(step: Step) -> str:
    """What of the request tells the rows apart."""
    words = [word for word in step.request.split() if not word.startswith(("++", "model=", "world"))]
    return ", ".join(word.rpartition(".")[2] for word in words)
