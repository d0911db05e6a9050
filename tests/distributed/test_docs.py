"""The page of a DeepSpeed script, followed on two ranks."""

from pathlib import Path

import pytest

from harness.record import record_file
from tests.distributed.conftest import Warm
from tests.pages import TORCHRUN, blocks, code, commands, follow, inside


def run(line: str, warm: Warm, directory: Path) -> str:
    """What `line`, which starts a script on two ranks, prints where the warm ones run it."""
    return warm.run(line.removeprefix(TORCHRUN).split(), directory=directory)


def test_the_deepspeed_page_shows_what_two_ranks_print_and_its_books_close(
    warm: Warm, tmp_path: Path
) -> None:
    first = commands("deepspeed")[0]
    assert first.startswith(TORCHRUN)

    def each(line: str, directory: Path) -> str:
        again = line.startswith(TORCHRUN) and line != first  # one is typed: the words are right
        return run(line, warm, directory) if again else inside(line, directory)

    said = follow("deepspeed", tmp_path, each)
    (shown,) = blocks("deepspeed", "text")
    assert shown in next(iter(said.values()))
    for stage in (0, 2):
        actual = record_file.read(tmp_path / f"runs/zero-{stage}")
        assert actual["world"]["size"] == len(actual["ranks"]) == 2
        for rank in actual["ranks"]:
            assert rank["allocator"]["unattributed"] == 0
            assert sum(rank["peak"]["categories"].values()) == rank["allocator"]["peak"]
    (compared,) = (printed for line, printed in said.items() if "compare" in line)
    assert "optimizer shrank the most" in compared


@pytest.mark.parametrize("page", ["trainer", "accelerate"])
def test_the_code_of_a_page_is_the_same_on_two_ranks(page: str, warm: Warm, tmp_path: Path) -> None:
    said = run(code(page, tmp_path), warm, tmp_path)
    assert "rank 0 of 2" in said
    actual = record_file.read(tmp_path / "runs" / page)
    assert (actual["world"]["size"], [rank["rank"] for rank in actual["ranks"]]) == (2, [0, 1])
    for rank in actual["ranks"]:
        assert rank["allocator"]["unattributed"] == 0
