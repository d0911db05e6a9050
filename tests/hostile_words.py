"""The words of tools, drawn by seed: each command is one that works, with one to three words changed."""

import os
from collections.abc import Mapping
from pathlib import Path
from random import Random

from tests import hostile
from tests.fuzzed import HANG, NUMBERS, WORDS, Hang, bounded

SIZES = (
    "2GiB",
    "1e400GiB",
    "-1KiB",
    "nanMiB",
    "1_0PiB",
    "GiB",
    " ",
    "1 KiB",
    "9" * 400,
    "1%",
    "-1%",
    "nan%",
    "1e400%",
)
LISTS = (
    "1,,2",
    ",",
    ",1",
    "1,",
    "1,1",
    "0,1",
    "-1,1",
    "1,a",
    "1,1e400",
    "[1,2]",
    "1;2",
    "none,none",
    "auto,full",
)
MARKS = (
    "?",
    "",
    "=",
    "*",
    "%s",
    "{}",
    "\udcff",
    "é",
    "\x1b[2J",
    "\n",
    "a\nb",
    "-",
    "--",
    "x" * 300,
    "~",
    "@",
    "-1",
)
OPTIONS = (
    *(
        "--json",
        "--markdown",
        "--bytes",
        "--all",
        "--update",
        "--no-rehearsal",
        "--quick",
        "--fast",
        "-x",
        "--json=1",
    ),
    *(
        "--hardware",
        "--reserve",
        "--html",
        "--baseline",
        "--profiles",
        "--tolerance",
        "--junit",
        "--dtype",
        "-o",
    ),
)

FIT = "fit mode=train model=tiny world.size=2 hardware.memory=1000 zero=2 checkpointing=none train.micro_batch=1"
"""A search that shapes alone decide: nothing fits."""

FIT_KEYS = (
    *(
        "mode",
        "model",
        "world",
        "world.size",
        "hardware",
        "hardware.memory",
        "hardware.allocator",
        "hydra.run.dir",
    ),
    *(
        "zero",
        "zero.offload",
        "pipeline.stages",
        "checkpointing",
        "train.sequence",
        "train.micro_batch",
        "seed",
    ),
    *(
        "train.batch",
        "train.accumulation",
        "ledger",
        "ledger.steps",
        "deepspeed.config",
        "model.path",
        "precision",
    ),
    *(
        "generation.batch",
        "generation.prompt_length",
        "generation.max_new_tokens",
        "generation.prompts",
        "nothing",
    ),
)


def places(home: Path, paths: Mapping[str, Path]) -> tuple[str, ...]:
    """Paths that no tool asks for, and some that it does. What they lack is made in `home`."""
    (home / "empty").mkdir(exist_ok=True)
    (home / "directory" / "record.json").mkdir(parents=True, exist_ok=True)
    (home / "text.txt").write_text("text\n")
    (home / "null.json").write_text("null")
    (home / "bytes").write_bytes(bytes(range(256)))
    if not (home / "pipe").exists():
        os.mkfifo(home / "pipe")
    made = (
        "missing",
        "missing/below",
        "empty",
        "directory",
        "text.txt",
        "text.txt/below",
        "null.json",
        "bytes",
        "pipe",
    )
    runs = [str(path) for path in paths.values()]
    others = [str(path / name) for path in paths.values() for name in ("record.json", "config.yaml", "trace")]
    return (
        *runs,
        *others,
        *(str(home / each) for each in made),
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        ".",
        "/",
        "x" * 300,
    )


def command(random: Random, home: Path, paths: Mapping[str, Path], baseline: Path) -> list[str]:
    """The words of a tool."""
    known = places(home, paths)
    run, other = (str(paths[name]) for name in ("training", "generation"))
    words = random.choice(
        (
            *([FIT.split()] * 2),
            *([["check", run, "--baseline", str(baseline)]] * 2),
            ["check", "--all", "--profiles", str(home / "empty")],
            ["explain", run, "--no-rehearsal"],
            ["compare", run, other],
            ["roofline", run, "--hardware", "h100-sxm"],
            ["traffic", run, other],
            ["links", run, "--network", "aws-efa-p4d", "--step-seconds", "1"],
            ["links", "--nodes", "4", "--gpus", "8"],
            ["contrast", run, other],
            ["batching", other, str(paths["another batch"])],
            ["caching", other, str(paths["no cache"])],
            ["report", run, "-o", str(home / "report")],
        )
    )
    words = [*words]
    for _ in range(random.choice((1, 1, 2, 3))):
        _change(random, words, known)
    return words


def _change(random: Random, words: list[str], known: tuple[str, ...]) -> None:
    place = random.randrange(1, len(words) + 1)
    kind = random.randrange(6)
    if words[0] == "fit" and kind < 4:
        key, values = random.choice(FIT_KEYS), random.choice((NUMBERS, WORDS, LISTS, SIZES, MARKS, known))
        mark = random.choice(("", "", "", "", "+", "++", "~"))
        word = f"{mark}{key}={random.choice(values)}"
    elif kind == 4:
        word = random.choice(words[1:] or [""])  # once more
    elif kind == 5:
        word = random.choice(OPTIONS)
    else:
        word = random.choice(random.choice((NUMBERS, WORDS, LISTS, SIZES, MARKS, known, known)))
    if random.random() < 0.5 or place == len(words):
        words.insert(place, word)
    elif random.random() < 0.2:
        del words[place]
    else:
        words[place] = word


def wrong(words: list[str]) -> str | None:
    """What is wrong with how a command ends: `hostile.wrong`, and that it ends at all."""
    try:
        with bounded(HANG):
            return hostile.wrong(words)
    except Hang as error:
        return str(error)
    except SystemExit as error:
        return f"it exits by itself, with {error.code}"
