"""The scripts that start a run on several nodes, with this machine for each of the nodes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness.record import record_file
from tests.distributed.conftest import NARROW, PRECISION, QUICK, RATED, ROOT, Launch, complete

SMALL = (PRECISION, "hardware=cpu", "mode=train", *QUICK, *NARROW, "zero=2")
"""On two ranks of one node or on one of each of two."""

INTERPRETER = Path(sys.executable).parent
Node = Callable[..., "subprocess.Popen[str]"]


def environment(**variables: str) -> dict[str, str]:
    """An active environment that has torch, which the scripts take as it is; with `variables`."""
    path = f"{INTERPRETER}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables}


def typed(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a script says to words that it should refuse at once."""
    return subprocess.run(
        [ROOT / "launch" / script, *words],
        env=environment(**variables),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


def port(lowest: int = 0, highest: int = 0) -> int:
    """A free one."""
    for number in range(lowest, highest + 1):
        with socket.socket() as trial:
            try:
                trial.bind(("", number))
            except OSError:
                continue
            return int(trial.getsockname()[1])
    raise OSError("no port is free")


@pytest.fixture
def node() -> Iterator[Node]:
    """A function that starts `launch/nodes` with words, and leaves nothing of them behind."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, stdout: int, rendezvous: int) -> subprocess.Popen[str]:
        around = environment(NODES="2", RENDEZVOUS=f"localhost:{rendezvous}", RANKS="1")
        started.append(
            subprocess.Popen(
                [ROOT / "launch/nodes", *words],
                env=around,
                text=True,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for each in started:
        kill(each)


def kill(process: "subprocess.Popen[str]") -> None:
    """As a machine that loses its power: the launcher, and the ranks that it has in groups of their own."""
    if process.poll() is None:
        ranks = psutil.Process(process.pid).children(recursive=True)
        for each in (psutil.Process(process.pid), *ranks):
            each.send_signal(signal.SIGKILL)
        process.wait(timeout=10)


def rank_of(process: "subprocess.Popen[str]") -> str:
    """The rank of a node that has one."""
    around = (child.environ() for child in psutil.Process(process.pid).children())
    return next(str(variables["RANK"]) for variables in around if "RANK" in variables)


@pytest.mark.exhaustive
def test_two_nodes_of_one_rank_are_one_node_of_two_to_the_byte(
    node: Node, launch: Launch, tmp_path: Path
) -> None:
    words, meet = (*SMALL, f"hydra.run.dir={tmp_path}/out"), port()
    nodes = [node(*words, stdout=subprocess.PIPE, rendezvous=meet) for _ in range(2)]
    said = [each.communicate(timeout=200)[0] for each in nodes]
    assert [each.returncode for each in nodes] == [0, 0], said
    assert sum("record: " in each for each in said) == 1  # rank 0 speaks, on whichever node it is
    across, within = complete(tmp_path / "out"), complete(launch(*SMALL))
    assert across["world"]["size"] == len(across["ranks"]) == 2
    assert across["ranks"] == within["ranks"]
    assert across["training"]["losses"] == within["training"]["losses"]


@pytest.mark.parametrize("victim", ["0", pytest.param("1", marks=pytest.mark.exhaustive)])
def test_a_node_that_dies_takes_the_other_down_and_its_rank_is_the_one_named(
    node: Node, tmp_path: Path, victim: str
) -> None:
    words = (
        *SMALL,
        "train.steps=100000",
        "train.sequence=16",
        "ledger.steps=1",
        f"hydra.run.dir={tmp_path}/out",
    )
    reads, writes = os.pipe()
    meet = port()
    nodes = [node(*words, stdout=writes, rendezvous=meet) for _ in range(2)]
    os.close(writes)
    with os.fdopen(reads) as lines:
        assert any("parameters, " in line for line in lines)
        dying, living = sorted(nodes, key=rank_of, reverse=victim == "1")
        kill(dying)
        rest = lines.read()
    assert living.wait(timeout=30) != 0
    failed = record_file.read(tmp_path / "out")
    assert (failed["status"], failed["failure"]["rank"]) == ("failed", int(victim)), rest
    assert f"harness: rank {victim} failed" in rest


NO_MODE = "mode=trian"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "launch/nodes: NODES=: say how many nodes there are, as NODES=2"),
        ({"NODES": "two"}, "launch/nodes: NODES=two: say how many nodes there are, as NODES=2"),
        ({"NODES": "2"}, "launch/nodes: RENDEZVOUS=: say where the nodes meet, "),
        ({"NODES": "2", "RENDEZVOUS": "here"}, "launch/nodes: RENDEZVOUS=here: say where the nodes meet, "),
        (
            {"NODES": "2", "RENDEZVOUS": "here:1", "RANKS": "0"},
            "launch/nodes: RANKS=0: say how many ranks a node has, ",
        ),
        pytest.param(
            {"NODES": "2", "RENDEZVOUS": "here:1", "CUDA_VISIBLE_DEVICES": ""},
            "launch/nodes: torch sees no GPU here; without one, say how many ranks a node has, as RANKS=2",
            id="no GPU",
        ),
        pytest.param(
            {"NODES": "2", "RENDEZVOUS": "here:1", "RANKS": "1"},
            "harness: mode=trian: should be 'train' or 'infer'",
            id="no mode",
        ),
    ],
)
def test_what_a_node_cannot_start_is_one_sentence(variables: dict[str, str], said: str) -> None:
    result = typed("nodes", NO_MODE, **variables)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ([], {}, "launch/slurm: this is no Slurm job; submit one, "),
        (
            ["hydra.run.dir=mine"],
            {"SLURM_JOB_ID": "7"},
            "launch/slurm: hydra.run.dir=mine: a requeued run needs another directory, ",
        ),
        (
            [],
            {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/"},
            "launch/slurm: / is no checkout of the repository; ",
        ),
    ],
)
def test_what_is_no_job_of_slurm_s_is_one_sentence(
    words: list[str], variables: dict[str, str], said: str
) -> None:
    result = typed("slurm", *words, **variables)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


# Slurm itself is not here. These stand in for two of its programs, as their manuals have them: `scontrol show
# hostnames` writes the hosts of a list one a line, and `scontrol requeue` takes a job; `srun` runs a command once on
# each of them, here as processes of this machine, and with --kill-on-bad-exit ends the others when one fails. They
# exercise launch/slurm, not Slurm.
SCONTROL = """\
[ "$1" != requeue ] || { echo "$*" >>"$ASKED"; exit; }
[ "$*" = "show hostnames $SLURM_JOB_NODELIST" ] || exit 1
echo "$SLURM_JOB_NODELIST" | tr , '\\n'
"""
SRUN = """\
while [ "${1#--}" != "$1" ]; do echo "$1" >>"$ASKED"; shift; done
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & done
wait -n && wait -n || { code=$?; kill %1 %2 2>/dev/null; exit "$code"; }
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that starts `launch/slurm` as sbatch would: a copy of it, elsewhere, with a job's variables."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (programs / name).chmod(0o755)
    checkout = tmp_path / "checkout"  # its outputs/ is this test's own
    checkout.mkdir()
    for each in ("launch", "harness", "conf", "pyproject.toml", "constraints.txt"):
        (checkout / each).symlink_to(ROOT / each)
    script = tmp_path / "slurm_script"
    script.write_bytes((ROOT / "launch/slurm").read_bytes())
    script.chmod(0o755)

    def start(*words: str, job: int, restarts: int, end: float = 1e10) -> subprocess.CompletedProcess[str]:
        around = environment(
            SLURM_JOB_ID=str(job),
            SLURM_RESTART_COUNT=str(restarts),
            SLURM_JOB_END_TIME=f"{end:.0f}",
            SLURM_SUBMIT_DIR=str(checkout),
            SLURM_JOB_NODELIST="localhost,localhost",
            SLURM_JOB_NUM_NODES="2",
            RANKS="1",
            ASKED=str(tmp_path / "asked"),
        )
        around["PATH"] = f"{programs}{os.pathsep}{around['PATH']}"
        return subprocess.run(
            [script, *words],
            env=around,
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=200,
            check=False,
        )

    return start


def test_a_requeued_job_of_slurm_goes_on_from_what_its_first_start_left(
    slurm: Callable[..., subprocess.CompletedProcess[str]], launch: Launch, tmp_path: Path
) -> None:
    job, words = port(20000, 29999), (*SMALL, "train.save_every=1", "train.schedule=constant")
    first = slurm(*words, "train.steps=2", job=job, restarts=0)
    assert first.returncode == 0, first.stderr[-3000:]
    requested = set((tmp_path / "asked").read_text().split())
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= requested
    requeued = slurm(*words, job=job, restarts=2)  # its second start left nothing
    assert requeued.returncode == 0, requeued.stderr[-3000:]
    assert "resuming after step 2" in requeued.stdout
    outputs = tmp_path / f"checkout/outputs/slurm-{job}"
    starts = [complete(outputs / number) for number in ("0", "2")]
    assert starts[0]["config"]["train"]["save_on_term"] is True
    assert [len(start["ranks"]) for start in starts] == [2, 2]
    assert [len(start["training"]["losses"]) for start in starts] == [2, 1]
    # two nodes of one rank are one node of two, to the byte
    within = complete(launch(*words, "train.steps=2"))
    assert first.stdout.count("record: ") == 1  # rank 0 speaks
    links = [
        {row.pop("link") for rank in record["ranks"] for row in rank["traffic"] if row["ranks"] > 1}
        for record in (starts[0], within)
    ]
    assert links == [{"network"}, {"host-memory"}]
    assert starts[0]["ranks"] == within["ranks"]
    assert starts[0]["training"]["losses"] == within["training"]["losses"]


@pytest.mark.parametrize("left", [100, 10_000])
def test_a_job_of_slurm_that_has_saved_is_queued_again_if_its_time_is_over(
    slurm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, left: int
) -> None:
    saves = 'cd outputs/slurm-7/0 && echo \'{"rank": null, "sentence": "saved", "code": 75}\' >failure.json; exit 1'
    (tmp_path / "bin/srun").write_text(f"#!/usr/bin/env bash\nmkdir -p outputs/slurm-7/0\n{saves}\n")
    result = slurm(*SMALL, job=7, restarts=0, end=time.time() + left)
    assert result.returncode == 1, result.stderr
    asked = tmp_path / "asked"
    assert (asked.read_text() == "requeue 7\n") if left == 100 else not asked.exists()


def test_a_wrong_request_is_refused_before_any_node_of_slurm_s_is_asked(
    slurm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = slurm(NO_MODE, job=1, restarts=0)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "harness: mode=trian: should be 'train' or 'infer'\n"
    assert not (tmp_path / "asked").exists()


def supervised(
    directory: Path, *words: str, program: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """What `launch/supervised` says, with another program for it to supervise."""
    return subprocess.run(
        [ROOT / "launch/supervised", directory, *words],
        env=environment(RANKS="2", PROGRAM=program, **variables),
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )


def test_a_supervised_run_is_started_again_and_ends_as_if_it_had_never_failed(
    tmp_path: Path, launch: Launch
) -> None:
    words = (*SMALL, "train.save_every=1", "train.export=true")
    home = tmp_path / "run"
    faulty = f"{ROOT}/tests/distributed/faulty.py kill backward 2 1"
    done = supervised(home, *words, *RATED, program=faulty, ONCE=str(tmp_path / "once"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "launch/supervised: start 1, from step-00000002" in done.stderr
    assert f"launch/supervised: complete after 2 starts: {home}/1/record.json" in done.stderr
    assert record_file.read(home / "0")["failure"]["rank"] == 1
    within = launch(*words)
    weights = "checkpoint/model.safetensors"
    assert (home / "1" / weights).read_bytes() == (within / weights).read_bytes()
    assert complete(home / "1")["training"]["losses"] == complete(within)["training"]["losses"][2:]


def test_a_supervised_run_that_gets_no_further_is_given_up(tmp_path: Path) -> None:
    home, program = tmp_path / "run", tmp_path / "fails.py"
    program.write_text(
        "import pathlib, sys\n"
        "run = pathlib.Path(sys.argv[-1].partition('=')[2])\n"
        "run.mkdir(parents=True, exist_ok=True)\n"
        "(run / 'record.json').touch()\n"
        "sys.exit(3)\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = supervised(home, *SMALL, program=str(program), GIVE_UP="2", TMPDIR=str(temporary))
    assert done.returncode == 3
    assert not [*temporary.iterdir()]
    assert done.stderr.splitlines()[-1] == (
        f"launch/supervised: no newer checkpoint in 2 starts; the last one: {home}/1/record.json"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mode=train",), "mode=train: name a directory first"),
        (
            ("{tmp}/new", "mode=train", "train.resume=x"),
            "train.resume=x: each start has a directory of its own",
        ),
        (("{tmp}", "mode=train"), "{tmp}: it is there already; name another directory"),
    ],
)
def test_what_cannot_be_supervised_is_one_sentence(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = typed("supervised", *(word.format(tmp=tmp_path) for word in words))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"launch/supervised: {said.format(tmp=tmp_path)}")
    assert result.stderr.count("\n") == 1
