"""A sweep: Hydra's sweeper and launcher decide what runs and where, and each job is a command in its own process."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from harness.config import compose, hydra_keys
from harness.config.command_line import Command
from harness.config.settings import Refusal
from harness.record.places import FILE as RECORD
from harness.record.places import NUMBER, SWEEP
from harness.record.record_file import read
from harness.record.schema import parse
from harness.runtime import tracebacks
from harness.runtime.files import put
from harness.tables import size

FAILED = "failed.json"
"""In the directory of a job that failed: its number, what the sweep chose for it, its exit code and the sentence."""

NOTE = {"job", "overrides", "code", "error"}
"""Its keys."""

OUTPUT = "output.txt"
"""In the directory of a job that ran beside others in one terminal: what it printed."""

GRACE = 10
"""Seconds that an interrupted job has, to end the ranks that it started."""


class JobFailed(Exception):
    """A job of a sweep ended with an exit code other than 0."""


def sweep(command: Command) -> int:
    """Run the sweep that `command` describes. The exit code is the worst of its jobs'.

    Raises Refusal for a sweep that cannot begin.
    """
    _refuse_among_ranks()
    node = compose.hydra_node(command)
    tasks = node.launcher.get("tasks_per_node", 1)
    if tasks != 1:
        remedy = "torchrun starts the ranks of a node, from one task; leave it out, and give world.size="
        raise Refusal("hydra.launcher.tasks_per_node", tasks, remedy)
    directory = _directory(node)
    pinned = f"hydra.sweep.dir={QuotedString(str(directory), Quote.single).with_quotes()}"
    for file, _ in _notes(directory):  # of an earlier sweep
        file.unlink()
    code = 0
    try:
        compose.through_hydra(command, job, [pinned])
    except JobFailed:
        pass  # its note says more
    except KeyboardInterrupt:
        _cancel(directory, node.launcher)
        raise
    except (Refusal, SystemExit):
        raise
    except Exception as error:  # a launcher's or a sweeper's own
        print(f"harness: the sweep ended early: {tracebacks.sentence(error)}", file=sys.stderr)
        code = 3
    finally:
        _end_workers()
    notes = sorted((note for _, note in _notes(directory)), key=lambda note: note["job"])
    for note in notes:
        print(f"harness: {_called(note['job'], note['overrides'])}: {note['error']}", file=sys.stderr)
    print(f"sweep: {directory}")
    worst: int = max([code, *(note["code"] for note in notes)])
    return worst


def _directory(node: Any) -> Path:
    """The directory of the sweep, which is there then. Raises Refusal where it cannot be."""
    key, named = "hydra.sweep.dir", str(node.sweep.dir)
    if not named.strip():
        raise Refusal(key, named, "is empty; give it a value, or leave it out")
    directory = Path(named).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(key, named, f"it cannot be written: {error.strerror}") from error
    return directory


def _notes(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The notes of the sweep in `directory`. A file of that name may also be another sweep's, or another program's."""
    for file in directory.rglob(FAILED):
        if next((each for each in file.parents if (each / SWEEP).exists()), None) != directory:
            continue
        with suppress(OSError, ValueError):
            note = json.loads(file.read_text())
            if isinstance(note, dict) and note.keys() == NOTE:
                yield file, note


def job(cfg: DictConfig) -> int | None:
    """Run one job, in Hydra's directory for it. Returns the bytes at the peak of the worst rank; None: not measured.

    Raises JobFailed where its exit code is not 0.
    """
    node = HydraConfig.get()
    directory = Path(node.runtime.output_dir)
    swept = _swept(node)
    shared = node.runtime.choices.get("hydra/launcher") == "joblib"
    try:
        if (directory / RECORD).exists():
            remedy = f"{directory} already contains a run's record; name another directory"
            raise Refusal("hydra.sweep.dir", node.sweep.dir, remedy)
        command = [*_start(cfg, node), *_words(node, directory)]
        with open(directory / OUTPUT if shared else os.devnull, "w") as output:
            code, sentence = _ended(command, _environment(node, shared), output if shared else None)
    except Refusal as refusal:
        code, sentence = 2, str(refusal)
    if code:
        note = {"job": node.job.num, "overrides": swept, "code": code, "error": sentence}
        put(directory / FAILED, json.dumps(note, indent=1) + "\n")
        raise JobFailed(f"job {node.job.num}: {sentence}")
    peak = parse(read(directory), str(directory)).worst.peak.bytes
    if shared:
        print(f"{_called(node.job.num, swept)}: {size(peak)} at the peak, {directory}", flush=True)
    return peak


def _called(number: int, chosen: Sequence[str]) -> str:
    """A job's number, with what its sweep chose for it."""
    return f"job {number} ({' '.join(chosen)})" if chosen else f"job {number}"


def _swept(node: Any) -> list[str]:
    """The overrides of a job that its sweep chose; with quotes only where they are needed."""
    file, parse_all = Path(node.sweep.dir) / SWEEP, OverridesParser.create().parse_overrides
    typed = parse_all(_lines(OmegaConf.load(file).hydra.overrides.task)) if file.exists() else []
    sweeps = {override.get_key_element(): override.is_sweep_override() for override in typed}
    chosen = [
        each for each in parse_all(_lines(node.overrides.task)) if sweeps.get(each.get_key_element(), True)
    ]
    return [re.sub(r"'([\w.-]+)'", r"\1", str(each.input_line)) for each in chosen]


def _lines(overrides: Any) -> list[str]:
    """Overrides as they were typed: the job resolves their interpolations, and Hydra may not be able to here."""
    lines: Any = OmegaConf.to_container(overrides, resolve=False)
    return list(lines)


def _refuse_among_ranks() -> None:
    """Refuse to sweep in one of several ranks: each of them would start every job."""
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        if name in os.environ and (name == "RANK" or os.environ[name] != "1"):
            remedy = (
                "this is one of several ranks, and each would start all jobs; leave torchrun and srun out, "
            )
            raise Refusal("--multirun", "", f"{remedy}a job with world.size=N starts N ranks itself")


def _start(cfg: DictConfig, node: Any) -> list[str]:
    """What starts a job: Python for one process, torchrun for a world of several ranks. Raises Refusal."""
    harness = ["-m", "harness"]
    ranks = OmegaConf.select(cfg, "world.size") or 1
    if OmegaConf.select(cfg, "world.kind") == "rehearsed" or ranks == 1:
        return [sys.executable, *harness]
    nodes = int(OmegaConf.select(node, "launcher.nodes") or 1)
    if not isinstance(ranks, int) or ranks % nodes:
        raise Refusal("world.size", ranks, f"hydra.launcher.nodes={nodes} must divide it evenly")
    meeting = ["--standalone"] if nodes == 1 else list(_meeting(nodes))
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meeting,
        f"--nproc-per-node={ranks // nodes}",
        *harness,
    ]


def _meeting(nodes: int) -> Iterator[str]:
    """How torchrun's launchers on the nodes of a Slurm job find each other."""
    import submitit

    place = submitit.JobEnvironment()
    number = os.environ["SLURM_JOB_ID"]
    yield from (f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-id={number}")
    yield f"--rdzv-endpoint={place.hostnames[0]}:{20000 + int(number) % 10000}"


def _words(node: Any, directory: Path) -> list[str]:
    """The words of a job's command: where its configs are, its overrides, its number and its directory."""
    places = {
        source.provider: source.path for source in node.runtime.config_sources if source.schema == "file"
    }
    words = [f"--config-name={node.job.config_name}"] if node.job.config_name != "config" else []
    for flag, provider in {"--config-path": "main", "--config-dir": "command-line"}.items():
        if places.get(provider, str(compose.directory())) != str(compose.directory()):
            words.append(f"{flag}={places[provider]}")
    for line in (*_lines(node.overrides.hydra), *_lines(node.overrides.task)):
        override = OverridesParser.create().parse_override(line)
        value: Any = override.value()
        key = override.get_key_element()
        if override.is_hydra_override() and not hydra_keys.of_a_job(override.key_or_group):
            continue
        text = (
            type(value) is str and "\\" in line
        )  # an escape is Hydra's grammar, and text is taken as it is typed
        words.append(f"{key}={QuotedString(value, Quote.single).with_quotes()}" if text else line)
    return [
        *words,
        "hydra.mode=RUN",  # a config of the user's own may say MULTIRUN
        f"{NUMBER}{node.job.num}",
        f"hydra.job.id={node.job.id}",
        f"hydra.run.dir={directory}",
    ]


def _environment(node: Any, shared: bool) -> Mapping[str, str]:
    """The environment of a job; of those that joblib runs at once, each has its part of the cores."""
    if not shared:
        return os.environ
    from joblib import cpu_count, effective_n_jobs

    at_once = effective_n_jobs(node.launcher.n_jobs)
    return {**os.environ, "LOKY_MAX_CPU_COUNT": str(max(1, cpu_count() // at_once))}


def _ended(command: Sequence[str], environment: Mapping[str, str], output: IO[Any] | None) -> tuple[int, str]:
    """Run `command` to its end: its exit code, and the sentence with which it failed."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "error.json"  # where torchrun, and a rank without it, leave what failed
        variables = {**environment, "TORCHELASTIC_ERROR_FILE": str(file)}
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT if output else None
        )
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        return _reported(code, file)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a job that was interrupted. A terminal interrupts its ranks too, and they end by themselves."""
    for signal in (None, process.terminate):
        if signal:
            signal()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return
    process.kill()


def _reported(code: int, file: Path) -> tuple[int, str]:
    """The exit code of the rank that failed first, and its sentence; torchrun's own exit code is always 1."""
    if code == 0 or not file.exists():
        return code if code in (0, 2) else 3, f"it ended with exit code {code}"
    message = json.loads(file.read_text())["message"]
    if isinstance(message, str):
        return 3, message
    return int(message.get("errorCode") or code), str(message["message"]).removeprefix("harness: ")


def _end_workers() -> None:
    """End joblib's processes, which otherwise wait for more work after this process has ended."""
    if "joblib" in sys.modules:
        from joblib.externals.loky import get_reusable_executor

        executor = get_reusable_executor(reuse=True)
        getattr(executor, "terminate", executor.shutdown)(kill_workers=True)  # joblib's own has a folder too
        del executor
        gc.collect()  # Python warns of the semaphores of one that is not collected


def _cancel(directory: Path, launcher: DictConfig) -> None:
    """Cancel the jobs that wait in Slurm for a sweep that was interrupted."""
    if "SlurmLauncher" in launcher.get("_target_", "") and shutil.which("scancel"):
        numbers = {each.name.partition("_")[0] for each in (directory / ".submitit").glob("[0-9]*")}
        if numbers:
            subprocess.run(["scancel", *sorted(numbers)], check=False)
