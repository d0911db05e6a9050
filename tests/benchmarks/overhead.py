"""What the ledger and the harness cost, as ratios of interleaved steps in one process. Asserts nothing.

    torchrun --standalone --nproc-per-node 2 tests/benchmarks/overhead.py [rounds=7] [kinds=phases] [model=small] [...]

Every round runs one step of each kind, in turn; a ratio is taken within a round, and its median is printed with the
lowest and highest. `kinds` are those beside `off`, all by default. Steps are compared in processor seconds of the first
rank, which other work on the machine changes little; tokens a second are by the clock. `off` is the harness's own step
with no ledger; `bare` is DeepSpeed's three calls with nothing around them; `floor` is the harness's step within a mode
and hooks that do nothing, below which no ledger of operators can be. torch's MemTracker gets a step of its own model,
as it cannot see a second forward of the same one.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import psutil
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from harness.config.compose import compose
from harness.config.load import load
from harness.data.batch import Batch
from harness.ledger import Ledger
from harness.model import loader
from harness.model.resolve import resolve
from harness.record import record_file
from harness.runtime.world import connected
from harness.training.engine import Engine


def main(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words if word.startswith(("rounds=", "kinds=")))
    rounds = int(given.get("rounds", "7"))
    own = [word for word in words if not word.startswith(("rounds=", "kinds="))]
    with connected("auto", 600) as world:
        settings = world.broadcast(
            resolve(load(compose(["model=small", "zero=2", *own])), world.device.type).settings
        )
        train, dtype = settings.train, getattr(torch, settings.dtype)
        config = loader.model_config(settings.model)
        built = loader.build(settings.model, config, dtype, torch.device("cpu"), 0)
        engine = Engine(settings, world, Ledger(mode="off"), built)
        generator = torch.Generator().manual_seed(world.rank)
        tokens = torch.randint(0, config.vocab_size, (train.micro_batch, train.sequence), generator=generator)
        tokens = tokens.to(world.device)

        def harness_step(ledger: Ledger) -> None:
            engine.ledger = ledger
            engine.train_step(repeat(Batch(tokens)), 0)

        def bare_step() -> None:
            for _ in range(train.accumulation):
                loss = engine.deepspeed(input_ids=tokens, labels=tokens, use_cache=False).loss
                engine.deepspeed.backward(loss)
                engine.deepspeed.step()
                loss.item()

        def with_ledger(mode: str) -> Callable[[], None]:
            def step() -> None:
                settle = world.size > 1 and world.device.type == "cpu"
                with Ledger(mode=mode, settle_collectives=settle) as ledger:
                    ledger.own(model=built, engine=engine.deepspeed)
                    began = time.process_time()
                    harness_step(ledger)
                    inside.append(time.process_time() - began)

            return step

        inside: list[float] = []  # the step alone, without making the account after it
        kinds: dict[str, Callable[[], None]] = {
            "off": lambda: harness_step(Ledger(mode="off")),
            "bare": bare_step,
            "phases": with_ledger("phases"),
            "exact": with_ledger("exact"),
            "floor": _within(_floor, lambda: harness_step(Ledger(mode="off"))),
            "profiler": _within(_profiler, bare_step),
            "MemTracker": _within(lambda: MemTracker(), bare_step),
        }
        if "kinds" in given:
            kinds = {name: kinds[name] for name in ("off", *given["kinds"].split(","))}
        startup = time.time() - psutil.Process().create_time()
        bare_step()
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        by_clock: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(rounds):
            order = [*kinds][number % len(kinds) :] + [*kinds][
                : number % len(kinds)
            ]  # each is first as often
            for name, step in ((name, kinds[name]) for name in order):
                world.barrier()
                inside.clear()
                began, clock = time.process_time(), time.perf_counter()
                try:
                    step()
                except NotImplementedError as error:  # MemTracker, at a second forward
                    seconds[name].append(float("nan"))
                    print(f"{name}: {error}", file=sys.stderr)
                    continue
                seconds[name].append(inside[0] if inside else time.process_time() - began)
                by_clock[name].append(time.perf_counter() - clock)
        if world.leads:
            tell(seconds, settings.model.name, world.size, words)
            tokens_a_step = train.micro_batch * train.accumulation * train.sequence * world.size
            rates = {
                name: tokens_a_step / statistics.median(by_clock[name])
                for name in ("off", "bare")
                if name in kinds
            }
            print(f"tokens/s: {', '.join(f'{name} {rate:,.0f}' for name, rate in rates.items())}")
            print(f"from the process's start to its first step: {startup:.1f} s")


def tell(seconds: dict[str, list[float]], name: str, ranks: int, words: list[str]) -> None:
    machine = record_file.environment()
    print(f"{name}, {ranks} ranks, {' '.join(words)}; {machine.processor}, {machine.threads} threads a rank")
    print(f"python {platform.python_version()}, {json.dumps(machine.packages)}")
    print(f"{'kind':<12}{'median step':>14}{'against off':>14}   lowest to highest")
    for kind, own in seconds.items():
        ratios = sorted(mine / off for mine, off in zip(own, seconds["off"], strict=True) if mine == mine)
        if not ratios:
            print(f"{kind:<12}{'did not run':>14}")
            continue
        print(
            f"{kind:<12}{statistics.median(own) * 1000:>11.1f} ms{statistics.median(ratios):>14.3f}"
            f"   {ratios[0]:.3f} to {ratios[-1]:.3f}"
        )


class _Nothing(TorchDispatchMode):
    """A mode that only passes each operator on."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs) if kwargs else func(*args)


@contextmanager
def _floor() -> Iterator[None]:
    handles = [
        register_module_forward_pre_hook(lambda *_: None),
        register_module_forward_hook(lambda *_: None, always_call=True),
    ]
    with _Nothing(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        yield
    for handle in handles:
        handle.remove()


def _within(context: Callable[[], object], step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with context():  # type: ignore[attr-defined]
            step()

    return run


@contextmanager
def _profiler() -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True):
        yield


if __name__ == "__main__":
    main(sys.argv[1:])
