"""profiles/speed: a sample of its rows is counted anew, and a step of its page is estimated anew."""

import csv
import json
from itertools import groupby
from pathlib import Path

import pytest

from tests.benchmarks import speed, speed_steps
from tests.pages import installed_as_pinned

PAGE = Path(__file__).parents[2] / "profiles" / "speed" / "steps.md"
with speed.OPERATORS.open(encoding="utf-8", newline="") as file:
    LINES = list(csv.DictReader(file))
FIRST = [
    next(group) for _, group in groupby(LINES, key=lambda line: (line["kernel"], line["gpu"], line["mode"]))
]
"""The first row of each kernel on each GPU."""

as_pinned = pytest.mark.skipif(
    not installed_as_pinned("torch", "transformers"),
    reason="the work is counted with the versions in constraints.txt, and others are installed here",
)


@as_pinned
@pytest.mark.filterwarnings("ignore:not known and in no figure")
@pytest.mark.parametrize("line", [line for line in FIRST if line["source"] != "linkedin/Liger-Kernel"][::3])
def test_the_work_of_a_row_is_what_a_rehearsal_counts(line: dict[str, str]) -> None:
    by_class = speed.work_of(line).by_class
    actual = {name: [part.flops, part.read + part.written, part.calls] for name, part in by_class.items()}
    assert actual == json.loads(line["work"])


@as_pinned
@pytest.mark.filterwarnings("ignore:not known and in no figure")
@pytest.mark.exhaustive
@pytest.mark.parametrize("line", FIRST)
def test_the_work_of_every_kernel_is_what_a_rehearsal_counts(line: dict[str, str]) -> None:
    test_the_work_of_a_row_is_what_a_rehearsal_counts(line)


@as_pinned
@pytest.mark.filterwarnings("ignore:not known and in no figure")
def test_the_page_has_what_is_estimated_of_a_step() -> None:
    step, lines = speed_steps.steps()[0], PAGE.read_text().splitlines()
    (anew,) = [line for line in speed_steps.page([step]) if line.startswith(f"| {step.note}")]
    assert anew in lines


def test_the_page_has_every_step() -> None:
    assert len([line for line in PAGE.read_text().splitlines() if line.startswith("| ")]) == 2 + len(
        speed_steps.steps()
    )
