"""A sweep through the command: what Hydra leaves, what a job is, how it fails and how it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from harness.advice import jobs
from harness.config.settings import Refusal
from harness.record.places import runs_in
from harness.record.record_file import read

ROOT = Path(__file__).parents[2]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RUN = (
    "mode=train",
    "precision=fp32",
    "train.steps=2",
    "train.micro_batch=1",
    "train.sequence=32",
    "train.export=false",
)
REHEARSED = (*RUN, "world=rehearsed", "world.size=2")

Done = subprocess.CompletedProcess[str]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without torchrun's, and with `variables`."""
    kept = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    return {**kept, "PYTHONPATH": str(ROOT), **variables}


def harness(directory: Path, *words: str, **variables: str) -> Done:
    """`python -m harness` with `words`, in `directory`."""
    command = [sys.executable, "-m", "harness", *words]
    return subprocess.run(
        command,
        cwd=directory,
        env=environment(**variables),
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """A sweep of four jobs, of which the second and the last cannot be; and its directory."""
    directory = tmp_path_factory.mktemp("swept")
    done = harness(directory, "-m", *REHEARSED, "zero=0,1", "pipeline.stages=1,8", "hydra.sweep.dir=sweep")
    return done, directory / "sweep"


def test_a_sweep_leaves_what_hydra_leaves_and_a_run_in_each_directory(swept: tuple[Done, Path]) -> None:
    _, directory = swept
    assert {each.name for each in directory.iterdir()} == {"multirun.yaml", "0", "1", "2", "3"}
    for number in ("0", "2"):
        names = {each.name for each in (directory / number).iterdir()}
        assert names >= {".hydra", "config.yaml", "record.json"}
        assert json.loads((directory / number / "record.json").read_text())["status"] == "complete"
    chosen = yaml.safe_load((directory / "2" / ".hydra" / "overrides.yaml").read_text())
    assert {"zero='1'", "pipeline.stages=1"} <= set(chosen)
    assert [read(directory / number)["config"]["zero"]["stage"] for number in ("0", "2")] == [0, 1]


def test_a_job_that_fails_loses_no_other_and_is_named_at_the_end(swept: tuple[Done, Path]) -> None:
    done, directory = swept
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        f"harness: job {number} (zero={stage} pipeline.stages=8): "
        "pipeline.stages=8: the model has 4 layers; use 4 or fewer"
        for number, stage in ((1, 0), (3, 1))
    ]
    assert done.stdout.splitlines()[-1] == "sweep: sweep"
    assert json.loads((directory / "3" / jobs.FAILED).read_text())["code"] == 2


def test_a_sweep_touches_no_note_but_its_own(tmp_path: Path) -> None:
    of_a_job = json.dumps({"job": 7, "overrides": [], "code": 3, "error": "it was long ago"})
    notes = {"program": '{"mine": 1}', "7": of_a_job, "another/0": of_a_job}
    for place, text in notes.items():
        file = tmp_path / place / jobs.FAILED
        file.parent.mkdir(parents=True)
        file.write_text(text)
    for sweep in (".", "another"):
        (tmp_path / sweep / "multirun.yaml").write_text("")
    done = harness(tmp_path, "-m", "train.sequence=1", "hydra.sweep.dir=.")
    assert done.returncode == 2
    named = [line for line in done.stderr.splitlines() if line.startswith("harness: job ")]
    assert [line.partition(": train.sequence=1: ")[0] for line in named] == ["harness: job 0"]
    left = {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob(jobs.FAILED)}
    assert left == {"program", "another/0", "0"}


def test_a_sweep_again_into_its_directory_says_so(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "record.json").write_text("{}")
    done = harness(tmp_path, "-m", "seed=1", "hydra.sweep.dir=.")
    said = f"hydra.sweep.dir=.: {tmp_path}/0 already contains a run's record; name another directory"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"harness: job 0: {said}")


def test_a_job_resolves_interpolations_itself(tmp_path: Path) -> None:
    words = ("model=tiny,small", "seed=${nobody}", "hydra.sweep.subdir=${hydra.job.override_dirname}")
    done = harness(tmp_path, "-m", *words, "hydra.sweep.dir=sweep")
    names = {f"model={model},seed=$\\{{nobody\\}}" for model in ("tiny", "small")}  # as Hydra writes them
    assert {each.name for each in (tmp_path / "sweep").iterdir()} == {"multirun.yaml", *names}
    assert done.returncode == 2
    assert "(model=small): seed=${nobody}: Interpolation key 'nobody' not found" in done.stderr


def test_a_config_of_the_user_s_own_may_be_a_sweep(tmp_path: Path) -> None:
    swept = "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\ntrain: {sequence: 1}\n"
    (tmp_path / "mine.yaml").write_text(f"defaults: [config, _self_]\n{swept}")
    done = harness(tmp_path, "-m", "--config-dir=.", "--config-name=mine")
    assert [line.partition(" (")[2] for line in done.stderr.splitlines()[-2:]] == [
        f"seed={seed}): train.sequence=1: to predict a next token takes 2 or more" for seed in (1, 2)
    ]


def test_a_glob_covers_the_options_of_the_user_s_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [tiny]\n")
    done = harness(tmp_path, "-m", "-cd", ".", "model=glob(*in*)", "zero=glob(*)", "pipeline.stages=8")
    jobs_named = [line for line in done.stderr.splitlines() if line.startswith("harness: job ")]
    models_and_stages = [(model, stage) for model in ("mine", "tiny") for stage in range(4)]
    assert [line.partition("(")[2].partition(")")[0] for line in jobs_named] == [
        f"model={model} zero={stage}" for model, stage in models_and_stages
    ]


def test_tools_take_the_directory_of_a_sweep_for_its_runs(swept: tuple[Done, Path]) -> None:
    _, directory = swept
    assert [run.name for run in runs_in(directory)] == ["0", "2"]
    compared = harness(directory, "compare", ".", "--json")
    assert [Path(run["run"]).name for run in json.loads(compared.stdout)["runs"]] == ["0", "2"]
    assert harness(directory, "report", ".", "-o", "page").returncode == 0
    alone = harness(directory.parent, "explain", "sweep")
    assert (alone.returncode, alone.stderr) == (2, "harness: sweep contains 2 runs; name one, as sweep/0\n")


def test_joblib_runs_rehearsals_beside_each_other_and_keeps_what_each_prints(tmp_path: Path) -> None:
    words = ("zero=range(1,3)", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep")
    done = harness(tmp_path, "-m", *REHEARSED, *words)
    assert done.returncode == 0, done.stderr
    for number, stage in ((0, 1), (1, 2)):
        record = read(tmp_path / "sweep" / str(number))
        assert record["config"]["zero"]["stage"] == stage
        assert "record:" in (tmp_path / "sweep" / str(number) / jobs.OUTPUT).read_text()
        assert f"job {number} (zero={stage}): " in done.stdout
    assert "leaked" not in done.stderr


def test_a_job_of_two_ranks_goes_through_torchrun_and_submitit(tmp_path: Path) -> None:
    words = (
        "world.size=2",
        "seed='${hydra:job.num}'",
        "hydra/launcher=submitit_local",
        "hydra.sweep.dir=sweep",
    )
    done = harness(tmp_path, "-m", *RUN, "train.steps=1,0", "ledger=phases", *words)
    assert done.returncode == 2, done.stderr
    record = read(tmp_path / "sweep" / "0")
    assert (record["status"], record["world"]["kind"], record["world"]["size"]) == ("complete", "torchrun", 2)
    assert (record["config"]["seed"], record["config"]["train"]["steps"]) == (0, 1)
    failed = json.loads((tmp_path / "sweep" / "1" / jobs.FAILED).read_text())
    assert failed["error"] == "train.steps=0: should be greater than or equal to 1"
    assert failed["code"] == 2


SBATCH = """#!/usr/bin/env bash
# Runs each job of an array at once, as Slurm would, and keeps the script
cp "${@: -1}" "$SCRIPT"
echo "Submitted batch job 4321"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$SCRIPT")
(for ((task = 0; task <= ${last:-0}; task++)); do
    export SLURM_JOB_ID=$((4321 + task)) SLURM_ARRAY_JOB_ID=4321 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NUM_NODES=1
    export SLURM_JOB_NODELIST=here SLURM_NTASKS=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
    bash "$SCRIPT"
done) > /dev/null 2> "$SCRIPT.log" < /dev/null &
"""
SRUN = """#!/usr/bin/env bash
echo "$@" >> "$SCRIPT.srun"
while [ "$1" != "$PYTHON" ]; do shift; done
exec "$@"
"""


def test_slurm_gets_an_array_with_one_task_on_a_node_for_each_job(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    for name, text in {
        "sbatch": SBATCH,
        "srun": SRUN,
        "sacct": "#!/bin/sh\n",
        "scancel": "#!/bin/sh\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    words = ("world.size=8", "hydra/launcher=submitit_slurm", "hydra.sweep.dir=sweep")
    slurm = (
        "hydra.launcher.gpus_per_node=8",
        "hydra.launcher.partition=gpus",
        "hydra.launcher.timeout_min=90",
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = str(tmp_path / "script")
    done = harness(
        tmp_path,
        "-m",
        *RUN,
        "train.steps=0,-1",
        *words,
        *slurm,
        PATH=path,
        SCRIPT=script,
        PYTHON=sys.executable,
    )
    lines = (tmp_path / "script").read_text().splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")}
    assert asked >= {
        "nodes=1",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "partition=gpus",
        "time=90",
        "job-name=harness",
    }
    assert any(each.startswith("array=0-1") for each in asked)
    (started, _) = (tmp_path / "script.srun").read_text().splitlines()
    assert (
        started.endswith(f"-u -m submitit.core._submit {tmp_path}/sweep/.submitit/%j")
        or "submitit" in started
    )
    assert done.returncode == 2, done.stderr
    sentences = [f"harness: job {job} (train.steps={-job}): train.steps={-job}: should be " for job in (0, 1)]
    for line, sentence in zip(done.stderr.splitlines()[-2:], sentences, strict=True):
        assert line.startswith(sentence)


def test_the_nodes_of_a_slurm_job_share_one_world(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[3-4]",
        "SLURM_NTASKS": "2",
        "SUBMITIT_EXECUTOR": "slurm",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cfg = OmegaConf.create({"world": {"kind": "torchrun", "size": 16}})
    started = jobs._start(cfg, OmegaConf.create({"launcher": {"nodes": 2}}))
    assert started[1:] == [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-id=77",
        "--rdzv-endpoint=node3:20077",
        "--nproc-per-node=8",
        "-m",
        "harness",
    ]
    with pytest.raises(Refusal, match=r"world\.size=16: hydra\.launcher\.nodes=3 must divide it evenly"):
        jobs._start(cfg, OmegaConf.create({"launcher": {"nodes": 3}}))


SWEEPER = '''
import json
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


@dataclass
class Conf:
    _target_: str = "hydra_plugins.halves.Halves"


ConfigStore.instance().store(group="hydra/sweeper", name="halves", node=Conf, provider="halves")


class Halves(Sweeper):
    """Halves the micro-batch until the peak is below a limit."""

    def setup(self, *, hydra_context, task_function, config):
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        found, job = {}, 0
        for size in (8, 4, 2):
            (done,) = self.launcher.launch([[*arguments, f"train.micro_batch={size}"]], initial_job_idx=job)
            found[size], job = done.return_value, job + 1
            if found[8] > found[size]:
                break
        Path(self.config.hydra.sweep.dir, "found.json").write_text(json.dumps(found))
'''


def test_a_sweeper_gets_the_bytes_at_the_peak_of_each_job(tmp_path: Path) -> None:
    plugin = tmp_path / "hydra_plugins" / "halves.py"
    plugin.parent.mkdir()
    plugin.write_text(SWEEPER)
    words = (*RUN, "train.sequence=512", "world=rehearsed", "world.size=1")
    done = harness(
        tmp_path,
        *("-m", "hydra/sweeper=halves", "hydra.sweep.dir=sweep", *words),
        PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sweep" / "found.json").read_text())
    peaks = [
        max(rank["peak"]["bytes"] for rank in read(tmp_path / "sweep" / job)["ranks"]) for job in ("0", "1")
    ]
    assert list(found.items()) == [("8", peaks[0]), ("4", peaks[1])]
    assert peaks[1] < peaks[0]


def test_an_interrupt_ends_the_sweep_and_every_rank_of_its_job(tmp_path: Path) -> None:
    words = ("world.size=2", "train.steps=100000", "zero=0,1")
    sweep = subprocess.Popen(
        [sys.executable, "-m", "harness", "-m", *RUN, *words],
        cwd=tmp_path,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    )
    assert sweep.stdout is not None
    assert any(line.startswith("tiny: ") for line in sweep.stdout)  # both ranks are at work
    os.killpg(sweep.pid, signal.SIGINT)
    assert sweep.wait(120) == 130
    sweep.stdout.read()  # ends when no process is left that could write
    assert [each.name for each in tmp_path.glob("multirun/*/*/[0-9]")] == ["0"]


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (
            ("zero=1,2",),
            {"RANK": "0"},
            "--multirun: this is one of several ranks, and each would start all jobs;",
        ),
        (("zero=1,2",), {"SLURM_STEP_NUM_TASKS": "4"}, "--multirun: this is one of several ranks"),
        (("zero=1,7",), {}, "zero=7: no such option; one of 0, 1, 2, 3"),
        (("train.stepz=1,2",), {}, "train.stepz=1,2: no such key; did you mean train.steps?"),
        (("hydra/launcher=none",), {}, "hydra/launcher=none: no such option; one of basic"),
        (("hydra.job.chdir=true",), {}, "hydra.job.chdir=true: relative paths are read from where "),
        (
            ("hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"),
            {},
            "hydra.launcher.tasks_per_node=2: torchrun starts the ranks of a node",
        ),
        (("hydra.sweep.dir=a,b",), {}, "hydra.sweep.dir=a,b: "),
        (("hydra.sweep.dir=",), {}, "hydra.sweep.dir=: is empty"),
        (
            ("hydra.sweep.dir=/dev/null/a",),
            {},
            "hydra.sweep.dir=/dev/null/a: it cannot be written: Not a dir",
        ),
        (("hydra.run.dir=a",), {}, "hydra.run.dir=a: it has an effect in a single run; a sweep has "),
    ],
)
def test_a_sweep_that_cannot_begin_is_one_sentence(
    tmp_path: Path, words: tuple[str, ...], variables: dict[str, str], said: str
) -> None:
    done = harness(tmp_path, "-m", *words, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"harness: {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("launcher", ["joblib", "submitit_slurm"])
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(tmp_path: Path, launcher: str) -> None:
    words = ("-m", f"hydra/launcher={launcher}")
    absent = "import sys; sys.modules['hydra_plugins'] = None"
    code = f"{absent}; from harness.__main__ import main; sys.exit(main({words}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    extra = launcher.partition("_")[0]
    said = f"hydra-{extra}-launcher is not installed; install it with pip install 'harness[{extra}]'"
    assert (done.returncode, done.stderr) == (2, f"harness: hydra/launcher={launcher}: {said}\n")


def test_the_values_of_a_sweep_may_be_paths_of_home(tmp_path: Path) -> None:
    words = ("data=text", "data.path=~/a.txt,~/b.txt", "hydra.sweep.dir=~/sweep")
    done = harness(tmp_path, "-m", *RUN, *words, HOME=str(tmp_path))
    assert done.stderr.splitlines()[-2:] == [
        f"harness: job {job} (data.path='~/{name}.txt'): data.path={tmp_path}/{name}.txt: no such file; give a file, "
        "a directory or a quoted glob that exists"
        for job, name in enumerate("ab")
    ]
    assert (tmp_path / "sweep" / "multirun.yaml").is_file()
