"""Where memory runs out, a run says what was asked for, what was free, and what was allocated then."""

import json
import re
import subprocess
import sys
from pathlib import Path

from harness.record import record_file
from harness.tables import size
from tests.distributed.conftest import PRECISION, ROOT, Warm

FAULTY = str(Path(__file__).with_name("faulty.py"))
TRAINING = (
    "hardware=cpu",
    PRECISION,
    "mode=train",
    "model=tiny",
    "train.steps=2",
    "train.sequence=512",
    "train.micro_batch=8",
    "train.validate_every=0",
)


def test_out_of_memory_in_a_step_has_the_categories_of_that_moment(warm: Warm, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    words = [FAULTY, "memory", "forward", "1", "0", *TRAINING, f"hydra.run.dir={directory}"]
    said = warm.run(words, ranks=1, code=3, directory=ROOT)
    failure = record_file.read(directory)["failure"]
    shortage = failure["shortage"]
    assert (failure["rank"], failure["where"]["step"], failure["where"]["phase"]) == (0, 1, "forward")
    assert shortage["asked"] > shortage["free"] >= 0
    sentence = (
        f"out of memory: {size(shortage['asked'])} was asked for, and {size(shortage['free'])} of the cpu's"
    )
    assert failure["error"].startswith(sentence)
    assert f"harness: rank 0 failed in step 1, forward of micro-batch 0: {sentence}" in said
    assert "Traceback" not in said
    for name in ("parameters", "optimizer", "activations"):
        assert shortage["categories"][name] > 0
        assert re.search(rf"^  {name} +{re.escape(size(shortage['categories'][name]))} ", said, re.MULTILINE)
    assert f"python -m harness explain {directory}" in said

    explained = subprocess.run(
        [sys.executable, "-m", "harness", "explain", str(directory), "--no-rehearsal", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    sentences = [each["sentence"] for each in json.loads(explained.stdout)]
    assert any(sentence in each for each in sentences)
    total = size(sum(filter(None, shortage["categories"].values())))
    assert any(each.startswith(f"Allocated then: {total}, of it ") for each in sentences)
