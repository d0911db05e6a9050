"""A run of one rank has the same bytes each time.

gloo's thread lets go late in a world of one too: of 14 runs of ZeRO-3 beside other work one had another peak in its
set-up, and of 30 whose ledger settles none.
"""

import os
import subprocess
import sys
from pathlib import Path

RUN = """
import sys
from harness import run
from harness.__main__ import main

class Seen(run.Ledger):
    def __init__(self, **given):
        print("settles:", given["settle_collectives"])
        super().__init__(**given)

run.Ledger = Seen
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_of_one_rank_settles(tmp_path: Path) -> None:
    words = (
        "mode=infer",
        "hardware=cpu",
        "generation.count=1",
        "generation.max_new_tokens=1",
        "precision=fp32",
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN,
            *words,
            "model.config.num_hidden_layers=1",
            f"hydra.run.dir={tmp_path}/out",
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
        capture_output=True,
        check=True,
    )
    assert "settles: True" in done.stdout
