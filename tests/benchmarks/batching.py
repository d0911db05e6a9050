"""Continuous batching beside static, on one workload of skewed lengths, in turn in one process. Asserts nothing.

    python tests/benchmarks/batching.py [rounds=5] [model=small] [generation.count=32] [generation.batch=8] [...]

Every round generates all requests both ways, with no ledger; a ratio of tokens a second is taken within a round.
Waits are of requests that all wait from the start, in the round of the median rate.
"""

import platform
import statistics
import sys
from typing import Any

import torch

from harness.config.compose import compose
from harness.config.load import load
from harness.data.prompts import find
from harness.generation import infer
from harness.generation.generation_config import strategy_of
from harness.generation.metrics import Share, largest, performance, unasked
from harness.ledger import Ledger
from harness.model import loader
from harness.model.resolve import resolve
from harness.model.tokenizer import tokenizer_of
from harness.record import record_file
from harness.runtime.world import World

ASKED = {
    "mode": "infer",
    "model": "small",
    "precision": "fp32",
    "generation.lengths": "skewed",
    "generation.count": "32",
    "generation.batch": "8",
    "generation.prompt_length": "256",
    "generation.max_new_tokens": "256",
    "generation.stop_at_eos": "false",
}
KINDS = {
    "static": ("generation.cache=static",),
    "continuous": ("generation.batching=continuous", "generation.cache=paged"),
}


def main(words: list[str]) -> None:
    own = dict(word.split("=", 1) for word in words)
    rounds = int(own.pop("rounds", 5))
    given = [f"{key}={value}" for key, value in {**ASKED, **own}.items()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked_for = {kind: load(compose([*given, *more])) for kind, more in KINDS.items()}
    settings = {kind: resolve(each, device.type).settings for kind, each in asked_for.items()}
    requested = settings["static"]
    dtype = getattr(torch, requested.dtype)
    config = loader.model_config(requested.model)
    built = loader.build(requested.model, config, dtype, device, 0).eval().requires_grad_(False)
    strategy = strategy_of(requested, config)
    prompts = find(requested, tokenizer_of(requested.model, config), strategy.max_new_tokens_after)
    alone = World(0, 1, 0, device)

    def run(kind: str) -> Share:
        off = Ledger(mode="off")
        return infer.share_of(settings[kind], alone, off, built, prompts, strategy, lambda finished: None)

    result = {kind: [run(kind)] for kind in KINDS}  # the first is a warm-up
    same = result["static"][0].tokens == result["continuous"][0].tokens
    for number in range(rounds):
        for kind in [*KINDS][:: 1 if number % 2 else -1]:
            result[kind].append(run(kind))
    machine = record_file.environment()
    packages = ", ".join(f"{package} {machine.packages[package]}" for package in ("torch", "transformers"))
    print(f"{' '.join(given)} rounds={rounds}; {machine.processor}, {machine.threads} threads")
    print(f"python {platform.python_version()}, {packages}; tokens {'are the same' if same else 'differ'}")
    tell({kind: shares[1:] for kind, shares in result.items()})


def tell(result: dict[str, list[Share]]) -> None:
    """A line for each way: rate, ratio, waits, and what was computed or reserved for nobody."""
    print(
        f"{'batching':<12}{'tokens/s':>9}{'ratio':>22}{'first p50':>11}{'p99':>8}{'between p50':>13}{'p99':>8}"
        f"{'unasked':>9}{'KV live of reserved':>21}"
    )
    rates: dict[str, list[float]] = {
        kind: [performance([share], 0).tokens_per_second or 0 for share in shares]
        for kind, shares in result.items()
    }
    for kind, shares in result.items():
        ratios = sorted(mine / other for mine, other in zip(rates[kind], rates["static"], strict=True))
        middle = sorted(shares, key=lambda share: performance([share], 0).tokens_per_second or 0)[
            len(shares) // 2
        ]
        waits: Any = performance([middle], 0).latency.tree()
        first, between = waits["first_token_seconds"], waits["between_tokens_seconds"]
        kv: Any = largest([middle])
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(
            f"{kind:<12}{statistics.median(rates[kind]):>9,.0f}{ratio:>22}{first['p50']:>9.2f} s{first['p99']:>6.2f} s"
            f"{between['p50'] * 1000:>10.1f} ms{between['p99'] * 1000:>5.0f} ms"
            f"{unasked([middle])['unasked_tokens']:>9,}{kv['kv_live'] / kv['kv_reserved']:>20.0%}"
        )


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
