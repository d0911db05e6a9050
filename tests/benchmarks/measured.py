"""What others measured on GPUs, beside a rehearsal of the same program on a machine without one.

    python -m tests.benchmarks.measured > profiles/measured.md

Prints a page: every row of `measured_operators.csv` and of `measured_heldout.csv`, and the whole models of
`measured_models.py`. Takes some minutes. `tests/rehearsal/test_measured.py` holds the committed page against what is
computed anew.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from statistics import median
from textwrap import fill
from typing import NamedTuple

import torch

import harness
from harness.record import record_file
from tests.benchmarks import (
    measured_experts,
    measured_heldout,
    measured_heldout_attention,
    measured_heldout_losses,
    measured_kernels,
    measured_losses,
)
from tests.benchmarks.measured_causes import ASSUMED, CAUSES
from tests.benchmarks.measured_models import MODELS, UNEXPRESSED, Model
from tests.benchmarks.measured_rows import CSV, HARDWARE, HELD_OUT, Measure, Row, read

PROGRAMS: dict[str, Callable[[Row, Measure], int]] = {
    "cross_entropy": measured_losses.cross_entropy,
    "embedding": measured_kernels.embedding,
    "fused_linear_cross_entropy": measured_losses.fused_linear_cross_entropy,
    "fused_linear_jsd": measured_losses.fused_linear_jsd,
    "fused_linear_orpo_loss": measured_losses.fused_linear_orpo_loss,
    "fused_moe": measured_experts.fused_moe,
    "geglu": measured_kernels.gated_mlp,
    "kl_div": measured_losses.kl_div,
    "kto_loss": measured_losses.kto_loss,
    "layer_norm": measured_kernels.layer_norm,
    "megatron_rms_norm": measured_kernels.megatron_rms_norm,
    "relu_squared": measured_kernels.relu_squared,
    "rms_norm": measured_kernels.rms_norm,
    "rope": measured_kernels.rope,
    "softmax": measured_kernels.softmax,
    "swiglu": measured_kernels.gated_mlp,
}
HELD_OUT_PROGRAMS: dict[str, Callable[[Row, Measure], int]] = {
    "distill_cosine_loss": measured_heldout_losses.distill_cosine,
    "distill_jsd_loss": measured_heldout_losses.distill_jsd,
    "fused_add_rms_norm": measured_heldout.fused_add_rms_norm,
    "fused_linear_cpo_loss": measured_heldout_losses.cpo,
    "fused_linear_grpo_loss_sequence": measured_heldout_losses.grpo,
    "fused_linear_grpo_loss_token": measured_heldout_losses.grpo,
    "fused_linear_simpo_loss": measured_heldout_losses.simpo,
    "fused_neighborhood_attention": measured_heldout_attention.neighborhood,
    "group_norm": measured_heldout.group_norm,
    "jsd, 2024": measured_heldout_losses.jsd_of_2024,
    "jsd, 2026": measured_heldout_losses.jsd_of_2026,
    "llama4_rope": measured_heldout.llama4_rope,
    "megatron_cross_entropy, unfused": measured_heldout_losses.megatron_cross_entropy,
    "megatron_rms_norm, megatron": measured_kernels.megatron_rms_norm,
    "megatron_swiglu, megatron": measured_heldout.megatron_swiglu_fused,
    "megatron_swiglu, torch": measured_heldout.megatron_swiglu,
    "multi_token_attention": measured_heldout_attention.multi_token,
    "sparse_multi_token_attention": measured_heldout_attention.sparse_multi_token,
    "sparsemax": measured_heldout.sparsemax,
    "tiled_geglu": measured_kernels.gated_mlp,
    "tiled_geglu, DeepSpeed": measured_heldout.tiled_mlp,
    "tiled_swiglu": measured_kernels.gated_mlp,
    "tiled_swiglu, DeepSpeed": measured_heldout.tiled_mlp,
    "tvd": measured_heldout_losses.tvd,
}
CALLS = 3
"""Of each program; the benchmarks make ten, of which those after the second are like the second."""


class Result(NamedTuple):
    """A row, and the bytes that its rehearsal has at its peak."""

    row: Row
    rehearsed: int

    @property
    def difference(self) -> int:
        """Bytes above the published figure."""
        return self.rehearsed - self.row.published

    @property
    def exact(self) -> bool:
        """Whether the published figure can be these bytes."""
        least, most = self.row.interval
        return least <= self.rehearsed <= most


def rehearse(rows: Sequence[Row]) -> list[Result]:
    """The rows of one benchmark on one GPU, in one process, as they were measured.

    All of it runs once before anything is measured, as the benchmarks measure speed first: threads have their
    workspaces then, and the allocator the blocks of the largest size.
    """
    (hardware,) = {HARDWARE[row.gpu] for row in rows}
    with harness.rehearse(hardware=hardware):
        for row in {row.x_value: row for row in rows}.values():
            program(row)(row._replace(mode="full"), call_once)
        return [Result(row, program(row)(row, median_peak)) for row in rows]


def program(row: Row) -> Callable[[Row, Measure], int]:
    """What a row's script did. Raises KeyError for a kernel without a program."""
    return {**PROGRAMS, **HELD_OUT_PROGRAMS}[row.kernel]


def processes(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each benchmark, whose modes and sizes ran one after another."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.kernel, row.gpu, row.x_name, str(row.config)), []).append(row)
    return list(grouped.values())


def call_once(call: Callable[[], object]) -> int:
    """No figure: what `call` does is of use to what is measured after it."""
    call()
    return 0


def median_peak(call: Callable[[], object]) -> int:
    """The median of the bytes at the peak of several calls."""
    peaks = []
    for _ in range(CALLS):
        torch.cuda.reset_peak_memory_stats()
        call()
        peaks.append(torch.cuda.max_memory_allocated())
    return int(median(peaks))


def cells(*values: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(str(value) for value in values)} |"


def heading(*names: str) -> str:
    """The first lines of a table."""
    return f"{cells(*names)}\n{cells(*('---' for _ in names))}"


def case(row: Row) -> tuple[str, str, str]:
    """What tells a row from the others of its kernel: mode and size, settings, hardware."""
    settings = (
        f"{name} {str(value).removeprefix('torch.')}"
        for name, value in row.config.items()
        if value is not None and name not in ("mode", "sweep_dim")
    )
    return f"{row.mode}, {row.x_name} {row.x_value}", ", ".join(settings), HARDWARE[row.gpu]


def line(result: Result) -> str:
    """A result as a line of its kernel's table."""
    row, (least, most) = result.row, result.row.interval
    difference = "exact" if result.exact else f"{result.difference:+,}"
    figures = (f"{row.published:,}", f"{(most - least) // 2}", f"{result.rehearsed:,}", difference)
    return cells(*case(row), *figures)


def kernel_section(kernel: str, results: Sequence[Result]) -> str:
    """A kernel's table, what its program assumes, and why what is not exact is not. Raises KeyError for no cause."""
    table = [heading(*COLUMNS), *map(line, results)]
    first = results[0].row
    said = [f"Measured {first.date}, liger-kernel {first.version}, {first.provider}."]
    if kernel in ASSUMED:
        said.append(f"Assumed: {ASSUMED[kernel]}")
    if not all(result.exact for result in results):
        said.append(f"Not exact: {CAUSES[kernel]}")
    return "\n\n".join([f"### {kernel}", *(fill(text, 120) for text in said), "\n".join(table)])


def summary_line(kernel: str, results: Sequence[Result]) -> str:
    """A kernel's line in the summary."""
    missed = [each for each in results if not each.exact]
    worst = max(missed, key=lambda each: abs(each.difference) / each.row.published, default=None)
    largest = f"{worst.difference:+,}, {worst.difference / worst.row.published:+.2%}" if worst else "-"
    return cells(kernel, len(results), len(results) - len(missed), largest)


def by_kernel(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The results of each kernel, by its name."""
    for kernel, group in groupby(
        sorted(results, key=lambda each: each.row.kernel), lambda each: each.row.kernel
    ):
        yield kernel, list(group)


def totals(results: Sequence[Result]) -> str:
    """The sentence over the summary."""
    exact = [result for result in results if result.exact]
    assumed = sum(result.row.kernel in ASSUMED for result in exact)
    rows = f"{len(exact)} of {len(results)} rows are exact"
    if not assumed:
        return f"{rows}."
    return (
        f"{rows}; {assumed} of these are of a kernel whose program assumes something that only the rows say."
    )


def model_line(model: Model, rehearsed: int) -> str:
    """A whole model as a line of the table."""
    difference = (rehearsed - model.published) / model.published
    figures = (f"{model.published:,}", f"{rehearsed:,}", f"{difference:+.2%}")
    return cells(model.source, model.case, *figures, model.assumed)


def unexpressed() -> str:
    """What has no program, as a list."""
    return "\n".join(
        fill(f"- **{source}**: {why}.", 120, subsequent_indent="  ") for source, why in UNEXPRESSED.items()
    )


COLUMNS = ("case", "settings", "hardware", "published", "+-", "rehearsed", "difference")
MODEL_COLUMNS = ("source", "case", "published", "rehearsed", "difference", "assumed")
SUMMARY = ("kernel", "rows", "exact", "largest difference")

PAGE = """\
# Measured on GPUs, rehearsed without one

Made by `python -m tests.benchmarks.measured > profiles/measured.md`,
and checked by `tests/rehearsal/test_measured.py`.
{processor}, python {python}, {packages}.

## Operators and losses

Peaks in bytes: what Liger-Kernel's benchmarks measured of plain PyTorch and transformers, not of its own kernels
(github.com/linkedin/Liger-Kernel, `benchmark/data/all_benchmark_data.csv`, commit ead96b6), beside a rehearsal of
what their scripts did at that time. They print `max_memory_allocated()` in MiB as float32, so that a published figure
may be +- some bytes; exact is a rehearsal within those. PyTorch was older then: 2.4 or later.

No figure here is fitted to a row. A rule comes from PyTorch's source or NVIDIA's documentation.

{totals}

{summary}

{sections}

## Rows that were tried after the rules were made

Of the same file: nobody had looked at these while the rules were written, and no rule was changed after them.
Megatron compiles its SwiGLU, of which each direction is taken as one kernel with no memory but its result. Without a
program here are 16 rows of embeddings under `torch.compile`, and 6 of Megatron's fused cross entropy, which is
compiled.

{held_out_totals}

{held_out_summary}

{held_out_sections}

## Whole models

Bytes; published figures are rounded to a hundredth of a GiB, or a tenth.

{models}

Without a program here:

{unexpressed}
"""


def summary(results: Sequence[Result]) -> str:
    """A line for each kernel."""
    return "\n".join([heading(*SUMMARY), *(summary_line(*each) for each in by_kernel(results))])


def sections(results: Sequence[Result]) -> str:
    """A table for each kernel."""
    return "\n\n".join(kernel_section(*each) for each in by_kernel(results))


def main() -> None:
    machine = record_file.environment()
    results, held_out = (
        [result for rows in processes(read(path)) for result in rehearse(rows)] for path in (CSV, HELD_OUT)
    )
    print(
        PAGE.format(
            processor=machine.processor,
            python=platform.python_version(),
            packages=", ".join(f"{name} {machine.packages[name]}" for name in ("torch", "transformers")),
            totals=totals(results),
            summary=summary(results),
            sections=sections(results),
            held_out_totals=totals(held_out),
            held_out_summary=summary(held_out),
            held_out_sections=sections(held_out),
            models="\n".join(
                [heading(*MODEL_COLUMNS), *(model_line(each, each.program()) for each in MODELS)]
            ),
            unexpressed=unexpressed(),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
