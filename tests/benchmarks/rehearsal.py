"""How long a rehearsal takes, what it takes for itself, and how both grow with the world. Asserts nothing.

    python tests/benchmarks/rehearsal.py [rounds=5]
    python tests/benchmarks/rehearsal.py [rounds=5] vs=DIR    beside another checkout, for the large models alone

Every measurement is a fresh process that rehearses one rank, the highest of those that must be. Rounds go through all
cases in turn; a ratio is taken within a round, and medians are printed with the lowest and highest. `seconds` is by the
clock; all else is in the process's own processor seconds, which what else the machine does disturbs less: it has one
thread, and on an idle machine both are the same. Operators are timed in one more process, as that takes time itself.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LARGE = (("llama2-7b", 3, 64), ("llama2-70b", 3, 64), ("llama3-405b", 3, 64))
WORLDS = (64, 512, 4_096, 16_384)
GROWING = tuple(product(("tiny", "llama2-7b"), (1, 2, 3), WORLDS))
SHAPE = ("train.micro_batch=1", "ledger.steps=2", "train.export=false")
PARTS = ("import", "model", "set-up", "step 0", "step 1", "rest")

Case = tuple[str, int, int]


def main(requested: list[str]) -> None:
    rounds = next((int(word.removeprefix("rounds=")) for word in requested if word.startswith("rounds=")), 5)
    for word in requested:
        if word.startswith("vs="):
            tell_ratios(Path(word.removeprefix("vs=")).expanduser().resolve(), rounds)
            return
    taken: dict[Case, list[dict[str, Any]]] = {case: [] for case in dict.fromkeys((*LARGE, *GROWING))}
    for _ in range(rounds):
        for case in taken:
            taken[case].append(measured(case))
    tell_machine()
    print(
        f"one rank of 64, 4,096 tokens, two steps: medians of {rounds} fresh processes, and the most memory of any\n"
    )
    tell_large(taken)
    for case in LARGE:
        tell_operators(case, measured(case, "operators"))
    print(
        "\ngrowth with the world: processor seconds as ratios to 64 ranks within a round, median (lowest to highest)\n"
    )
    tell_growth(taken)


def tell_machine() -> None:
    """The command, the machine, and the packages."""
    from harness.record import record_file

    machine = record_file.environment()
    print(f"$ python tests/benchmarks/rehearsal.py {' '.join(sys.argv[1:])}".rstrip())
    busy = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{machine.processor}, {os.cpu_count()} cores, one thread; other work ran beside it: load {busy}")
    print(f"python {platform.python_version()}, {json.dumps(machine.packages)}\n")


def tell_ratios(other: Path, rounds: int) -> None:
    """Processor seconds of each large model that another checkout has too, here and there, in turn."""
    tell_machine()
    print(f"{'model':<14}{'here':>8}{'there':>8}{'here/there':>12}  lowest to highest")
    for case in (case for case in LARGE if (other / "conf/model" / f"{case[0]}.yaml").exists()):
        pairs = [(measured(case), measured(case, root=other)) for _ in range(rounds)]
        here, there = ([each[side]["processor"] for each in pairs] for side in (0, 1))
        ratios = sorted(mine / its for mine, its in zip(here, there, strict=True))
        medians = (statistics.median(each) for each in (here, there, ratios))
        print(
            f"{case[0]:<14}{next(medians):>8.1f}{next(medians):>8.1f}{next(medians):>12.2f}"
            f"  {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )


def measured(case: Case, *more: str, root: Path = ROOT) -> dict[str, Any]:
    """What a fresh process says of itself, with the code of the checkout `root`."""
    words = [str(root / "tests/benchmarks/rehearsal.py"), "one", *map(str, case), *more]
    done = subprocess.run(
        [sys.executable, *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    actual: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return actual


def one(name: str, stage: str, size: str, *more: str) -> None:
    """Rehearse, and print what it took: seconds by part, bytes, and the operators if `more` asks for them."""
    began, clock = time.perf_counter(), time.process_time
    start = clock()
    from harness.runtime.imports import without_collection

    with without_collection():
        from harness.config.compose import compose
        from harness.config.load import load
        from harness.model import loader
        from harness.model.plan import Plan
        from harness.rehearsal.fake_mode import Fakes
        from harness.rehearsal.one_rank import rehearse
        from harness.rehearsal.representatives import representatives_of
        from harness.training import engine

    parts = dict.fromkeys(PARTS, 0.0)
    parts["import"] = clock() - start
    sequence = 1_024 if name == "tiny" else 4_096
    shape = (f"model={name}", f"zero={stage}", f"world.size={size}", f"train.sequence={sequence}", *SHAPE)
    decided = ("precision=bf16", "model.attention=sdpa")
    plan = Plan.of(load(compose(["mode=train", "world=rehearsed", *decided, *shape])))
    rank = representatives_of(plan)[-1].rank

    def timed(owner: Any, attribute: str, part: Callable[..., str]) -> None:
        original = getattr(owner, attribute)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return original(*args, **kwargs)
            finally:
                parts[part(*args)] += clock() - start

        setattr(owner, attribute, stand_in)

    operators: dict[str, list[float]] = {}
    if more:
        count_operators(Fakes, operators)
    timed(loader, "build", lambda *_: "model")
    timed(engine.Engine, "__init__", lambda *_: "set-up")
    timed(engine.Engine, "train_step", lambda _engine, _batches, step, *_: f"step {step}")
    rehearse(plan, rank)
    seconds, processor = time.perf_counter() - began, clock()
    parts["rest"] = processor - sum(parts.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    actual = {
        "seconds": seconds,
        "processor": processor,
        "parts": parts,
        "bytes": peak,
        "operators": operators,
    }
    print(json.dumps(actual), flush=True)
    os._exit(0)  # as the harness does: what Python's end takes is no part of a run


def count_operators(fakes: Any, operators: dict[str, list[float]]) -> None:
    """Keep of each operator how often it was dispatched, and the seconds."""

    def timed(original: Any) -> Any:
        def stand_in(self: Any, func: Any, *rest: Any) -> Any:
            start = time.process_time()
            out = original(self, func, *rest)
            if out is not NotImplemented:
                known = operators.setdefault(str(func), [0, 0.0])
                known[0] += 1
                known[1] += time.process_time() - start
            return out

        return stand_in

    fakes.shortcut, fakes._result = timed(fakes.shortcut), timed(fakes._result)


def tell_large(taken: dict[Case, list[dict[str, Any]]]) -> None:
    """A line for each of the large models, with where the time goes."""
    print(
        f"{'model':<12}{'ZeRO':>5}{'seconds':>9}  lowest to highest{'processor':>11}{'GB':>6}  of it", end=""
    )
    print(*(f"{part:>8}" for part in PARTS))
    for case in LARGE:
        clock = sorted(each["seconds"] for each in taken[case])
        memory = max(each["bytes"] for each in taken[case]) / 1e9
        processor = statistics.median(each["processor"] for each in taken[case])
        parts = [statistics.median(each["parts"][part] for each in taken[case]) for part in PARTS]
        print(
            f"{case[0]:<12}{case[1]:>5}{statistics.median(clock):>9.1f}{clock[0]:>8.1f} to {clock[-1]:<7.1f}"
            f"{processor:>11.1f}{memory:>6.2f}       ",
            *(f"{part:>8.1f}" for part in parts),
        )


def tell_operators(case: Case, actual: dict[str, Any]) -> None:
    """The operators that took most, and their share of the whole."""
    operators, seconds = actual["operators"], actual["processor"]
    count, inside = (sum(each[index] for each in operators.values()) for index in (0, 1))
    print(
        f"\n{case[0]}: {count:,} operators dispatched, {inside / seconds:.0%} of {seconds:.1f} s with their timing"
    )
    for name, (times, took) in sorted(operators.items(), key=lambda pair: -pair[1][1])[:8]:
        print(f"  {name:<34}{times:>8,}{took / seconds:>7.1%}{took / times * 1e6:>8.0f} us each")


def tell_growth(taken: dict[Case, list[dict[str, Any]]]) -> None:
    """A line for each model and stage, with a ratio for each world."""
    print(f"{'model':<12}{'ZeRO':>5}{'at 64, s':>15}", *(f"{f'{size:,}':>22}" for size in WORLDS[1:]))
    for name, stage in dict.fromkeys(case[:2] for case in GROWING):
        base = [each["processor"] for each in taken[name, stage, WORLDS[0]]]
        line = f"{name:<12}{stage:>5}{statistics.median(base):>15.1f}"
        for size in WORLDS[1:]:
            own = [each["processor"] for each in taken[name, stage, size]]
            ratios = sorted(mine / first for mine, first in zip(own, base, strict=True))
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            line += f" {spread:>22}"
        print(line)


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["one"] else main(sys.argv[1:])
