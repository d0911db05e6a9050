"""The work of what others timed on GPUs, and the efficiencies that follow from it.

    python -m tests.benchmarks.speed count      # the work of each row of profiles/speed/operators.csv, by a rehearsal
    python -m tests.benchmarks.speed fit        # harness/analysis/speed/efficiency.json, from these rows
    python -m tests.benchmarks.speed steps      # profiles/speed/steps.md: whole steps, estimated and published

`profiles/speed/README.md` says where the rows are from. `tests/analysis/test_estimate.py` fits them anew.
"""

import csv
import json
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import harness
from harness.analysis.speed import efficiency_fit, link_fit
from harness.ledger import Ledger, Work
from tests.benchmarks import measured_kernels
from tests.benchmarks.measured import program
from tests.benchmarks.measured_rows import CUDA, Measure, Row

OPERATORS = Path(__file__).parents[2] / "profiles" / "speed" / "operators.csv"
COLLECTIVES = OPERATORS.with_name("collectives.csv")
FIELDS = ("source", "path", "commit", "gpu", "kernel", "mode", "x", "shape", "seconds", "date", "work")


def count() -> None:
    """Write the work of each row, on the card of its GPU, into `OPERATORS`."""
    with OPERATORS.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for _, group in groupby(lines, key=lambda line: (line["kernel"], line["gpu"])):
        for line in group:
            by_class = work_of(line).by_class
            line["work"] = json.dumps(
                {name: [part.flops, part.read + part.written, part.calls] for name, part in by_class.items()}
            )
    with OPERATORS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def work_of(line: dict[str, str]) -> Work:
    """The work of the call that a row timed."""
    counted: list[Work] = []
    with harness.rehearse(hardware=efficiency_fit.PAGES[line["gpu"]], lines=False) as ledger:

        def measure(call: Callable[[], object]) -> int:
            before = whole(ledger)
            call()
            counted.append(Work(late - early for early, late in zip(before, whole(ledger), strict=True)))
            return 0

        row = row_of(line)
        PROGRAMS.get(row.kernel, lambda row, measure: program(row)(row, measure))(row, measure)
    return counted[-1]


def whole(ledger: Ledger) -> Work:
    """All that `ledger` has counted."""
    return Work(sum(figures) for figures in zip(Work(), *ledger.work().values(), strict=True))


def row_of(line: dict[str, str]) -> Row:
    """The row as those whose peaks were measured, whose programs are the same."""
    shape = json.loads(line["shape"])
    return Row(
        line["kernel"],
        "",
        line["mode"],
        line["x"],
        shape[line["x"]] if line["x"] else 0,
        0.0,
        shape,
        line["gpu"],
        line["date"],
        "",
    )


def in_pass(row: Row, measure: Measure, forward: Callable[[], torch.Tensor]) -> int:
    """Of the one pass of `row`."""
    if row.mode == "forward":
        return measure(forward)
    output = forward()
    gradient = torch.ones_like(output)
    return measure(lambda: output.backward(gradient))


def matmul(row: Row, measure: Measure) -> int:
    """A product of matrices, or as many as `b` says."""
    batch, rows, columns, inner = (row.size(name) for name in ("b", "m", "n", "k"))
    left = torch.randn(batch, rows, inner, dtype=row.dtype, device=CUDA)
    right = torch.randn(batch, inner, columns, dtype=row.dtype, device=CUDA)
    return measure(lambda: left @ right)


def attention(row: Row, measure: Measure) -> int:
    """Causal attention of heads that share keys and values, by the kernel that torch chooses on this card."""
    batch, length, width = (row.size(name) for name in ("batch", "length", "width"))
    query, key, value = (
        torch.randn(batch, heads, length, width, dtype=row.dtype, device=CUDA, requires_grad=True)
        for heads in (row.size("heads"), row.size("kv_heads"), row.size("kv_heads"))
    )
    return in_pass(
        row,
        measure,
        lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
    )


def norm(layer: type[nn.LayerNorm] | type[nn.RMSNorm]) -> Callable[[Row, Measure], int]:
    """One pass of a norm of rows."""

    def run(row: Row, measure: Measure) -> int:
        made = layer(row.size("width"), dtype=row.dtype, device=CUDA)
        states = torch.randn(
            row.size("rows"), row.size("width"), dtype=row.dtype, device=CUDA, requires_grad=True
        )
        return in_pass(row, measure, lambda: made(states))

    return run


def of_matrix(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Row, Measure], int]:
    """Forward and backward of `function` on a matrix (M, N)."""

    def run(row: Row, measure: Measure) -> int:
        states = torch.randn(row.size("M"), row.size("N"), dtype=row.dtype, device=CUDA, requires_grad=True)
        gradient = torch.ones_like(states)
        return measure(lambda: function(states).backward(gradient))

    return run


PROGRAMS: dict[str, Callable[[Row, Measure], int]] = {
    "attention": attention,
    "embedding": measured_kernels.embedding_alone,
    "layer_norm layer": norm(nn.LayerNorm),
    "matmul": matmul,
    "relu_squared": of_matrix(lambda states: torch.square(functional.relu(states))),
    "rms_norm layer": norm(nn.RMSNorm),
    "softmax": of_matrix(lambda states: states.softmax(-1)),
}
"""What a row ran, where it is not among those whose peaks were measured."""


def fit() -> None:
    """Write the efficiencies that the rows give."""
    classes = efficiency_fit.fit(efficiency_fit.rows(OPERATORS))
    efficiency_fit.write(classes._replace(links=link_fit.fit(link_fit.rows(COLLECTIVES))))


def steps() -> None:
    """Write the page of whole steps."""
    from tests.benchmarks import speed_steps  # it imports this module

    page = speed_steps.page(speed_steps.steps())
    speed_steps.STEPS.with_suffix(".md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    {"count": count, "fit": fit, "steps": steps}[sys.argv[1]]()
