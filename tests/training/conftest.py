"""Training runs in this process, one after another in a world of one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from harness.config.compose import compose
from harness.config.load import load
from harness.ledger import Ledger
from harness.ledger.patch import patched
from harness.model.plan import Plan
from harness.record.record_file import Output
from harness.record.results import Results
from harness.rehearsal.shims import process_world
from harness.runtime.world import World, connected
from harness.training.train import run

SHORT = (
    *("mode=train", "precision=fp32", "train.steps=3", "train.sequence=16", "train.micro_batch=1"),
    *("train.validate_every=0", "train.export=false", "model.attention=sdpa"),
)
WORDS = (
    *SHORT,
    *("model.config.hidden_size=64", "model.config.intermediate_size=96", "model.config.num_hidden_layers=2"),
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A world of one, which DeepSpeed forgets at its end."""
    with patched(*process_world()), connected("cpu", 60) as joined:
        yield joined


def train(world: World, directory: Path, *words: str) -> tuple[Results, str]:
    """The results of a short training run, and what it says."""
    stored = any(word.startswith("model.path=") for word in words)  # it has its own shape
    settings = load(compose([*(SHORT if stored else WORDS), *words]))
    said: list[str] = []
    out = Output(directory, said.append, Results(), lambda: None)
    ledger = Ledger(mode="exact", steps=3, settle_collectives=True)
    try:
        with ledger:
            run(Plan.of(settings), world, ledger, out)
    except FloatingPointError as error:
        said.append(f"{ledger.where.phase} {ledger.where.step}: {error}")
    return out.results, "\n".join(said)


TEXT = "It is a text to be learned from, with some other words. " * 90


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, without a tokenizer: bytes are its tokens."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=384, num_key_value_heads=2, initializer_range=0.2, eos_token_id=1, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    (directory / "text.txt").write_text(TEXT)
    return directory


Trained = Callable[..., tuple[Results, Path]]


@pytest.fixture(scope="module")
def trained(world: World, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A function of words to the results and the directory of a run on the base; the same ones run once."""
    runs: dict[tuple[str, ...], tuple[Results, Path]] = {}

    def run(*words: str) -> tuple[Results, Path]:
        if words not in runs:
            directory = tmp_path_factory.mktemp("run")
            runs[words] = train(world, directory, *of(base), *words)[0], directory
        return runs[words]

    return run


def of(base: Path) -> tuple[str, ...]:
    return f"model.path={base}", "data=text", f"data.path={base}/text.txt"
