"""Requests drawn by seed from the fields' own types and edges, and how each of them ends."""

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from random import Random
from types import FrameType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from harness.config.compose import compose, groups
from harness.config.load import checked, load, resolved, typed
from harness.config.refusal import Refusal
from harness.config.rules import check_world
from harness.config.settings import Settings, described_fields

HANG = 60
"""Seconds after which a request counts as one that never ends."""

NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "64", "1000", "2147483648", "9007199254740991", "9007199254740992"),
    *(
        "1000000000000000000000",
        "-9223372036854775809",
        "0.5",
        "-0.5",
        "1e-320",
        "1e30",
        "1e400",
        "nan",
        "inf",
        "-inf",
    ),
)
WORDS = (
    *(
        "null",
        "true",
        "false",
        "text",
        "''",
        "' '",
        "a/b",
        "../..",
        "/nowhere",
        "~nobody",
        "[]",
        "[1,2]",
        "[-1]",
    ),
    *("[0,0]", "[a,b]", "[[1]]", "{}", "{a:1}", "1,2", "'\x1b[2J'", "'\u202eabc'", "é", "x" * 3000),
    *(
        "[" * 40 + "]" * 40,
        "{a:" * 40 + "1" + "}" * 40,
        "${seed}",
        "${nothing}",
        "???",
        "auto",
        "none",
        "0x10",
        "1_000",
    ),
)
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "head_dim",
        "hidden_act",
        "model_type",
    ),
    *("rope_parameters", "rope_parameters.rope_theta", "rope_parameters.rope_type", "tie_word_embeddings"),
    *("attention_dropout", "attention_bias", "initializer_range", "eos_token_id", "pad_token_id", "nothing"),
    *(
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "sliding_window",
        "layer_types",
        "pretraining_tp",
    ),
    *("quantization_config", "quantization_config.quant_method", "torch_dtype", "is_decoder", "mlp_bias"),
)
"""Keys of a model's config, some of which only other models have."""

STRATEGY = (
    *(
        "min_new_tokens",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "num_beams",
        "eos_token_id",
        "bad_words_ids",
    ),
    *(
        "temperature",
        "top_k",
        "typical_p",
        "forced_eos_token_id",
        "suppress_tokens",
        "cache_implementation",
        "nothing",
    ),
)
"""Keys of a generation config."""

OPTIONS = (
    "zero_optimization.overlap_comm",
    "zero_optimization",
    "bf16.enabled",
    "gradient_clipping",
    "nothing.at.all",
)
"""Keys of DeepSpeed's config."""

MODELS = ("llama", "qwen3", "mixtral", "gpt2", "qwen3_moe", "mamba", "bert", "t5", "gemma3_text", "nothing")


def request(random: Random) -> list[str]:
    """The words of a request to rehearse: a small one that works, with one to three keys changed."""
    mode, size = random.choice(("train", "infer")), random.choice((1, 1, 2, 4))
    words = {
        "mode": mode,
        "model": "tiny",
        "model.config.num_hidden_layers": "2",
        "world": "rehearsed",
        "world.size": str(size),
        "hardware": random.choice(("cpu", "cpu", "rtx4090")),
        "precision": "fp32",
        "train.steps": "2",
        "train.sequence": "32",
    }
    if mode == "infer":
        words |= {"generation.max_new_tokens": "4", "generation.prompt_length": "8", "generation.count": "2"}
    for _ in range(random.choice((1, 1, 2, 3))):
        words |= dict([_drawn(random)])
    return [f"{key}={value}" for key, value in words.items()]


def _drawn(random: Random) -> tuple[str, str]:
    """A key and a value for it: one of its choices, or an edge of its type or of another."""
    kind = random.randrange(10)
    if kind < 3:
        key = f"model.config.{random.choice(SHAPE)}"
        if key.endswith("model_type"):
            return key, random.choice(MODELS)
        return (f"++{key}" if random.random() < 0.7 else key), random.choice(
            NUMBERS if random.random() < 0.8 else WORDS
        )
    if kind == 3:
        key = random.choice(
            [f"generation.config.{each}" for each in STRATEGY]
            + [f"deepspeed.options.{each}" for each in OPTIONS]
        )
        return key, random.choice(NUMBERS + WORDS)
    if kind == 4:
        key = random.choice([*groups()])
        return key, random.choice([*groups()[key], *WORDS])
    fields = {
        key: field
        for key, field in described_fields().items()
        if key
        not in ("model.path", "data.path", "deepspeed.config", "generation.prompts", "generation.workload")
    }
    key = random.choice([*fields])
    choices = fields[key].choices
    if choices and random.random() < 0.7:
        return key, random.choice(choices)
    return key, random.choice(NUMBERS if random.random() < 0.7 else WORDS)


class Hang(BaseException):
    """A request did not end. It is no Exception, which the code under test may catch."""


@contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """Raise Hang where what is within never ends."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Hang(f"it did not end in {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(words: list[str], whole: bool = True, small: bool = True) -> str | None:
    """The sentence with which a request is refused; None where it is planned, and rehearsed where it is `small`.

    Hydra takes most of the time. With `whole=False` the values are put into a config that it has composed before.
    Raises whatever else ends the request.
    """
    from harness.model.resolve import resolve
    from harness.rehearsal.all_ranks import rehearsed

    with bounded(HANG):
        try:
            settings = load(compose(words)) if whole else checked(typed(_tree(words)))
            if settings.world.kind == "rehearsed":
                assert settings.world.size is not None
                check_world(settings, settings.world.size)
                settings = resolve(settings).settings
                if small and is_small(settings):
                    rehearsed(settings, words, parallel=False)
        except Refusal as refusal:
            return str(refusal)
    return None


def _tree(words: list[str]) -> dict[str, Any]:
    """What Hydra composes of `words`, with the values that are not of groups set afterwards. Raises Refusal."""
    of_groups = tuple(word for word in words if word.partition("=")[0] in ("mode", *groups()))
    tree = copy.deepcopy(_composed(of_groups))
    for word in words:
        if word in of_groups:
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            return resolved(compose(words))
        if override.is_sweep_override():
            return resolved(compose(words))
        *path, name = override.key_or_group.split(".")
        node = tree
        for each in path:
            if not isinstance(node.get(each), dict):
                node[each] = {}
            node = node[each]
        value: Any = override.value()
        node[name] = getattr(value, "text", value)  # what is in quotes has a class of its own
    return tree


@cache
def _composed(words: tuple[str, ...]) -> dict[str, Any]:
    return resolved(compose(words))


def is_small(settings: Settings) -> bool:
    """Whether a rehearsal takes a second or two."""
    shape, train, generation = settings.model.config, settings.train, settings.generation
    new = generation.max_new_tokens or 64
    return (
        settings.model.name == "tiny"
        and all(value <= 2**20 for value in shape.values() if isinstance(value, int))
        and shape.get("num_hidden_layers", 0) <= 4
        and (settings.world.size or 0) <= 8
        and train.accumulation * train.steps * train.micro_batch * train.sequence <= 4096
        and train.validation_batches <= 8
        and new * generation.count * generation.prompt_length <= 10_000
    )
