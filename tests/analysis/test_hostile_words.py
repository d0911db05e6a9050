"""Words that no tool asks for, drawn by seed: every command ends, and what it cannot do it says in one sentence."""

import shutil
from pathlib import Path
from random import Random

import pytest

from harness.__main__ import main
from tests import hostile_words

COUNT = 60
"""Commands. `python -m tests.benchmarks.hostile_words` draws 1,000."""


def test_a_command_of_hostile_words_is_carried_out_or_refused_by_a_sentence(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some commands write
    paths = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in runs.items()}
    baseline = tmp_path / "baseline.json"
    assert main(["check", str(paths["training"]), "--baseline", str(baseline), "--update"]) == 0
    commands = [hostile_words.command(Random(number), tmp_path, paths, baseline) for number in range(COUNT)]
    assert len({words[0] for words in commands}) > 7
    assert [(words, reason) for words in commands if (reason := hostile_words.wrong(words))] == []


@pytest.mark.parametrize("tool", ["explain", "check"])
def test_a_file_that_never_ends_is_not_read(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["/dev/zero"] if tool == "explain" else ["--baseline", "/dev/zero"]
    assert main([tool, *words]) == 2
    assert capsys.readouterr().err == "harness: /dev/zero cannot be read: it is no regular file\n"


def test_a_long_word_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "x" * 3000]) == 2
    assert len(capsys.readouterr().err) < 500
