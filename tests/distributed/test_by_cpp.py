"""What C++ gives to a process group is never silently missing from the traffic of a ledger that has no log."""

import json
from pathlib import Path

import pytest

from tests.distributed import conftest

TIMES = {"functional": "once", "DistributedDataParallel": "once", "DTensor": "3 times"}


@pytest.mark.parametrize("of_harness", ["", "its own backend"])
def test_what_python_did_not_send_is_said_and_nothing_else(
    of_harness: str, warm: conftest.Warm, tmp_path: Path
) -> None:
    script, out = Path(__file__).with_name("by_cpp.py"), tmp_path / "said.json"
    warm.run([str(script), str(out), of_harness], ranks=2, directory=tmp_path)
    said = json.loads(out.read_text())
    assert len(said) == (10 if of_harness else 11)
    for name, sentences in said.items():
        if name not in TIMES:
            assert not sentences, name
            continue
        assert [sentence.partition(" C++ gave")[0] for sentence in sentences] == [TIMES[name]]
        assert "it is not in the traffic, and only an exact ledger sees it" in sentences[0]
