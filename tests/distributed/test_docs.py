"""The page of a DeepSpeed script, followed on two ranks."""

from pathlib import Path

from harness import record
from tests.pages import blocks, follow


def test_the_deepspeed_page_shows_what_two_ranks_print_and_its_books_close(tmp_path: Path) -> None:
    said = follow("deepspeed", tmp_path)
    (shown,) = blocks("deepspeed", "text")
    assert shown in next(iter(said.values()))
    for stage in (0, 2):
        found = record.read(tmp_path / f"runs/zero-{stage}")
        assert found["world"]["size"] == len(found["ranks"]) == 2
        for rank in found["ranks"]:
            assert rank["allocator"]["unattributed"] == 0
            assert sum(rank["peak"]["categories"].values()) == rank["allocator"]["peak"]
    (compared,) = (printed for line, printed in said.items() if "compare" in line)
    assert "optimizer shrank the most" in compared
