"""What torchrun is told of a failure."""

import json
from pathlib import Path

import pytest

from harness.runtime import launcher


def test_a_rank_that_tells_of_another_is_not_the_first_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = []
    for of_another in (False, True):
        file = tmp_path / f"{of_another}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        launcher.report("it failed", of_another)
        message = json.loads(file.read_text())["message"]
        assert message["message"] == "harness: it failed"
        seconds.append(int(message["extraInfo"]["timestamp"]))
    own, another = seconds
    assert (
        another >= own + 2
    )  # torchrun compares whole seconds, and takes the lowest rank where they are equal
