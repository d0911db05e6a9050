"""What a terminal shows while the command runs: how far it is, the time left, and the peak or the place."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def shown(*words: str) -> list[str]:
    """Every state of the terminal's lines while `python -m harness` runs with `words`."""
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # 40 lines of 160
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *words],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    written = b""
    while True:
        try:
            written += os.read(outside, 2**16)
        except OSError:  # the process has closed its end
            break
    os.close(outside)
    assert process.wait() == 0, written.decode()
    return re.split(r"[\r\n]+", written.decode())


def test_a_run_shows_the_time_left_and_the_peak_so_far(tmp_path: Path) -> None:
    words = ("mode=train", "hardware=cpu", "precision=fp32", "train.steps=6", "train.sequence=64")
    quick = ("train.export=false", "train.validate_every=0", "hardware.bandwidth=1e10")
    lines = shown(*words, *quick, f"hydra.run.dir={tmp_path}/run")
    bars = [line for line in lines if "/6 [" in line]
    assert re.search(r" 0/6 \[00:00<\?", bars[0])
    assert any(
        re.search(r"[1-5]/6 \[\d\d:\d\d<\d\d:\d\d, .*loss \d.* tokens/s  peak \d+\.\d MiB", line)
        for line in bars
    )


def test_generation_shows_the_time_left_and_the_peak_so_far(tmp_path: Path) -> None:
    words = (
        "mode=infer",
        "hardware=cpu",
        "precision=fp32",
        "generation.count=4",
        "generation.max_new_tokens=40",
    )
    lines = shown(*words, "hardware.bandwidth=1e10", f"hydra.run.dir={tmp_path}/run")
    assert any(re.search(r"\d+/160 \[\d\d:\d\d<\d\d:\d\d, .*peak \d+\.\d MiB", line) for line in lines)


def test_a_rehearsal_shows_which_role_is_at_which_layer_out_of_a_total_that_it_has_from_the_start(
    tmp_path: Path,
) -> None:
    words = ("mode=train", "model=llama2-7b", "zero=0", "pipeline.stages=2", "ledger.steps=2")
    world = ("world=rehearsed", "world.size=2", "hardware=h100-sxm", f"hydra.run.dir={tmp_path}/run")
    bars = [line for line in shown(*words, *world) if "layer/s" in line or "s/layer" in line]
    layers = 2 * 2 * 32  # steps, forward and backward, layers
    assert re.search(rf" 0/{layers} \[00:00<\?", bars[0])
    assert all(f"/{layers} [" in line for line in bars)
    far = rf"[1-9]\d*/{layers} \[\d\d:\d\d<\d\d:\d\d, .*, "
    place = r"(forward|backward) of layer \d+, step [12]/2, rank \d \(stage \d of 2, layers \d+ to \d+\)"
    assert any(re.search(far + place, line) for line in bars)
    for role in ("rank 0 (stage 0 of 2, layers 0 to 15)", "rank 1 (stage 1 of 2, layers 16 to 31)"):
        assert any(role in line for line in bars)


def test_a_search_shows_how_many_configs_are_done_out_of_a_total_that_it_has_from_the_start() -> None:
    words = (
        "mode=train",
        "model=tiny",
        "precision=bf16",
        "world.size=2",
        "hardware.memory=50000000",
        "zero=2,3",
    )
    bars = [
        line for line in shown("fit", *words, "checkpointing=none", "train.micro_batch=1,2") if "/2 [" in line
    ]
    assert re.search(r" 0/2 \[00:00<\?", bars[0])
