"""How fast the harness generates beside transformers' own `generate`, in turn in one process. Asserts nothing.

    python tests/benchmarks/generation.py [rounds=9] [batches=1,4,16] [model=small] [precision=bf16] [...]

Both get one model, one cache, one batch of prompts and greedy choice, with no ledger; every round runs each kind once,
and a ratio of tokens a second is taken within a round against transformers with the same cache. `compiled` is held
against its static cache, uncompiled. The time from the first prompt to the last token counts, and compiling before that
does not.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from harness.config.compose import compose
from harness.config.load import Settings, load
from harness.config.settings import NEW_TOKENS
from harness.generation.batch import Requests
from harness.generation.compiled_decode import Compiled
from harness.generation.decode import generate
from harness.ledger import Ledger
from harness.model import loader
from harness.model.resolve import resolve
from harness.record import record_file

OFF = Ledger(mode="off")
AGAINST = {
    "eager dynamic": "transformers dynamic",
    "eager static": "transformers static",
    "compiled": "transformers static",
}


def main(words: list[str]) -> None:
    own = dict(word.split("=", 1) for word in words)
    rounds, batches = (
        int(own.pop("rounds", 9)),
        [int(size) for size in own.pop("batches", "1,4,16").split(",")],
    )
    given = [f"{key}={value}" for key, value in {"mode": "infer", "model": "small", **own}.items()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = resolve(load(compose(given)), device.type).settings
    dtype = getattr(torch, settings.dtype)
    config = loader.model_config(settings.model)
    built = loader.build(settings.model, config, dtype, device, 0).eval().requires_grad_(False)
    machine = record_file.environment()
    name = torch.cuda.get_device_name() if device.type == "cuda" else machine.processor
    packages = ", ".join(f"{package} {machine.packages[package]}" for package in ("torch", "transformers"))
    print(f"{' '.join(given)} rounds={rounds}; {name}, {machine.threads} threads")
    print(f"python {platform.python_version()}, {packages}")
    print(f"{'batch':<7}{'kind':<22}{'tokens/s':>10}{'against transformers':>24}   lowest to highest")
    for batch in batches:
        kinds, compile_seconds = _kinds(built, settings, batch)
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        names = list(kinds)
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                began = time.perf_counter()
                kinds[name]()
                seconds[name].append(time.perf_counter() - began)
        tell(seconds, batch, batch * _new(settings))
        print(f"{batch:<7}compiled in {compile_seconds:.1f} s")


def _kinds(built: Any, settings: Settings, batch: int) -> tuple[dict[str, Callable[[], object]], float]:
    """What is timed, each of it run once and found to give the same tokens; and the seconds of compiling."""
    length, new = settings.generation.prompt_length, _new(settings)
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(3, built.config.vocab_size, (batch, length), generator=generator)
    given = prompts.to(built.device)
    compiled = Compiled(built, length + new - 1, OFF)
    fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "disable_compile": True}

    def theirs(cache: str) -> list[list[int]]:
        result = built.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new,
            cache_implementation=cache,
            **fixed,
        )
        return result[:, length:].tolist()  # type: ignore[no-any-return]

    def ours(cache: str | Compiled) -> list[list[int]]:
        requests = Requests(prompts.tolist(), [new] * batch)
        return generate(built, requests, cache=cache, ledger=OFF).tokens

    compile_seconds = compiled.prepare(batch)[1]
    kinds: dict[str, Callable[[], object]] = {
        "transformers dynamic": lambda: theirs("dynamic"),
        "transformers static": lambda: theirs("static"),
        "eager dynamic": lambda: ours("dynamic"),
        "eager static": lambda: ours("static"),
        "compiled": lambda: ours(compiled),
    }
    for mine, other in AGAINST.items():
        same = kinds[mine]() == kinds[other]()
        if not same:
            print(f"{batch:<7}{mine}: some tokens differ from those of {other}, by rounding")
    return kinds, compile_seconds


def _new(settings: Settings) -> int:
    return settings.generation.max_new_tokens or NEW_TOKENS


def tell(seconds: dict[str, list[float]], batch: int, tokens: int) -> None:
    """A line for each kind: its median rate, and its median ratio to transformers'."""
    for kind, own in seconds.items():
        line = f"{batch:<7}{kind:<22}{tokens / statistics.median(own):>10,.0f}"
        if kind in AGAINST:
            pairs = zip(own, seconds[AGAINST[kind]], strict=True)
            ratios = sorted(other / mine for mine, other in pairs)
            line += f"{statistics.median(ratios):>23.2f}x   {ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(line)


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
