"""Records and traces that no run leaves, with values that cannot be, drawn by seed, and what tools make of them."""

import contextlib
import copy
import io
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.__main__ import main

Tree = dict[str, Any]

DEEP = 400
"""Levels of a nested value. Python gives up at 1000 calls within each other, so a tool may not take a few for each."""

TEXTS = (
    *(
        "",
        "a",
        "nan",
        "-1",
        "1e999",
        "~",
        "a\nb\r\tc",
        "\x1b[2J\x07\x00",
        "\u202eabc\u2066",
        "\ud800",
        "é" * 300,
    ),
    *(
        "<script>alert(1)</script>",
        "</script><b>&amp;",
        "| a | b |",
        "`a`",
        "[a](javascript:alert(1))",
        "{{ 7 * 7 }}",
    ),
    *(
        "=1+1",
        "../../../../etc/passwd",
        "/etc/passwd",
        "a/b/c/",
        "//",
        "${oc.env:HOME}",
        "kernel",
        "total",
        "rank",
    ),
)
NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 2**20, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 2**100 - 1),
    *(10**400, -(10**400), 0.0, -0.0, 0.5, 5e-324, 1e-30, 1e30, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
)


def hostile(random: Random, value: Any) -> Any:
    """A value in place of `value`: of another type, or that no run has."""
    kind = random.randrange(9)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 6:
        return random.choice(TEXTS)
    if kind == 6:
        return random.choice((None, True, False, [], {}, [value], {"a": value}, [None], [[]], "x" * 100_000))
    if kind == 7:
        return nested(random.choice((list, dict)), DEEP)
    return [copy.deepcopy(value)] * random.choice((2, 300))


def nested(kind: type, levels: int) -> Any:
    """A list in a list, or a dict in a dict."""
    tree: Any = 1
    for _ in range(levels):
        tree = [tree] if kind is list else {"a": tree}
    return tree


def mutated(tree: Tree, random: Random) -> bytes:
    """The record's file with one to three values changed, or with some of its bytes changed."""
    if random.random() < 0.1:
        return _with_bytes_changed(json.dumps(tree, indent=1).encode(), random)
    changed = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = [*_places(changed)]
        names = sorted({re.sub(r"\d+", "*", name) for name, _, _ in places})
        name = random.choice(names)  # each field as likely, however many phases and ranks there are
        _, node, key = random.choice([each for each in places if re.sub(r"\d+", "*", each[0]) == name])
        _change(node, key, random)
    return json.dumps(changed).encode()


def _change(node: Any, key: Any, random: Random) -> None:
    kind = random.randrange(10)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[random.choice(TEXTS)] = node.pop(key)
    elif kind == 1:
        node.insert(key, copy.deepcopy(node[key]))
    else:
        node[key] = hostile(random, node[key])


def _places(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each value in `node`: its path, and the container and key that it is at."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if path or key != "schema":
                yield f"{path}.{key}", node, key
                yield from _places(value, f"{path}.{key}")


def _with_bytes_changed(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    if random.random() < 0.3:
        return bytes(changed[: random.randrange(len(changed))])
    for _ in range(random.choice((1, 1, 4, 64))):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def mutated_trace(file: Path, random: Random) -> bytes:
    """The file of a trace with a column changed, dropped, or of another type, or with some of its bytes changed."""
    if random.random() < 0.2:
        return _with_bytes_changed(file.read_bytes(), random)
    with pq.ParquetFile(file) as parquet:
        table = parquet.read()
    for _ in range(random.choice((1, 1, 2))):
        table = _with_column_changed(table, random)
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd")
    return bytes(stream.getvalue())


def _with_column_changed(table: pa.Table, random: Random) -> pa.Table:
    index = random.randrange(table.num_columns)
    name, kind = table.column_names[index], random.randrange(8)
    if kind == 0:
        return table.drop_columns([name])
    if kind == 1:
        return table.append_column(name, table.column(index))
    if kind == 2 or not table.num_rows:
        return table.slice(random.randrange(table.num_rows + 1), random.choice((0, 1, 5, table.num_rows)))
    column, values = table.column(index), table.column(index).to_pylist()
    for _ in range(random.choice((1, 3, len(values)))):
        values[random.randrange(len(values))] = _cell(column.type, random)
    if kind == 3:
        array = pa.array([None if each is None else str(each).encode() for each in values], pa.binary())
    elif kind == 4:
        array = pa.array([None] * len(values))
    else:
        array = pa.array(values, column.type)
    return table.set_column(index, name, array)


def _cell(kind: pa.DataType, random: Random) -> Any:
    if random.random() < 0.3:
        return None
    if pa.types.is_string(kind):
        return random.choice(
            [text for text in TEXTS if text.isascii() or text.isprintable()] + ["x" * 100_000]
        )
    if not pa.types.is_integer(kind):
        return None
    most = 2 ** (kind.bit_width - 1)
    return random.choice((0, 1, -1, most - 1, -most, random.randrange(most)))


FORMS = ("--perfetto", "--tensorboard", "--chakra", "--csv", "--parquet", "--markdown")


def commands(run: Path, others: Sequence[Path], baseline: Path, output: Path) -> list[list[str]]:
    """Every tool that reads a record, with `run` among `others`."""
    beside = [str(run), *map(str, others)]
    return [
        ["compare", *beside],
        ["compare", *beside, "--json"],
        ["compare", *reversed(beside), "--markdown"],
        ["contrast", *beside],
        ["contrast", *beside, "--json"],
        ["batching", *beside],
        ["batching", *beside, "--json"],
        ["caching", *beside],
        ["caching", *beside, "--json"],
        ["roofline", str(run)],
        ["roofline", str(run), "--json", "--hardware", "h100-sxm"],
        ["traffic", str(run)],
        ["traffic", *beside, "--json"],
        ["links", str(run)],
        ["links", str(run), "--json", "--step-seconds", "1", "--network", "aws-efa-p4d"],
        ["explain", str(run), "--no-rehearsal"],
        ["explain", str(run), "--no-rehearsal", "--json"],
        ["check", str(run), "--baseline", str(baseline)],
        ["check", str(run), "--baseline", str(baseline), "--json"],
        ["report", str(run), "-o", str(output)],
        ["report", *beside, "-o", str(output), *FORMS],
    ]


def wrong(command: Sequence[str]) -> str | None:
    """Carry out `command`; what is wrong with how it ends. None: it ends with 0, or with 2 and one printable sentence.

    `check` and `fit` may also end with 1. What is printed has no control characters, and its JSON is JSON.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command)
    except Exception as error:
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [each for each in traceback.extract_tb(error.__traceback__) if "/harness/" in each.filename][
            -1
        ]
        return f"{type(error).__name__}: {str(error)[:200]} at {ours.filename}:{ours.lineno} ({last.name})"
    said = err.getvalue()
    if code == 2 and not re.fullmatch(r"harness: [^\n]{1,600}\n", said):
        return f"no sentence: {said[:200]!r}"
    if code not in ((0, 1, 2) if command[0] in ("check", "fit") else (0, 2)):
        return f"it ends with {code}: {said[:300]!r}"
    if not "".join((said + out.getvalue()).split("\n")).isprintable():
        return "it prints control characters"
    if code != 2 and "--json" in command:
        try:
            json.loads(out.getvalue(), parse_constant=_no_number)
        except ValueError as error:
            return f"its JSON is none: {error}"
    return None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


SHAPE = "model=tiny model.config.num_hidden_layers=2 precision=fp32 world=rehearsed"
TRAIN = f"mode=train train.steps=2 train.sequence=32 train.validate_every=0 {SHAPE}"
INFER = f"mode=infer generation.count=2 generation.prompt_length=8 generation.max_new_tokens=4 {SHAPE}"

RUNS = {
    "training": f"{TRAIN} zero=2 world.size=2 hardware=cpu",
    "generation": f"{INFER} generation.batch=2 world.size=1 hardware=cpu",
    "rehearsal": f"{TRAIN} train.accumulation=2 pipeline.stages=2 zero=1 world.size=4 hardware=rtx4090",
    "another batch": f"{INFER} generation.batch=1 world.size=1 hardware=cpu",
    "no cache": f"{INFER} generation.batch=2 generation.cache=none world.size=1 hardware=cpu",
}
MUTATED = ("training", "generation", "rehearsal")
"""The runs whose records are mutated; the others are only beside them."""

MEASURED: Tree = {
    "failure": {
        "rank": 0,
        "stage": 0,
        "where": {"step": 1, "phase": "forward", "micro_batch": 0},
        "error": "it failed",
    },
    "performance": {
        "startup_seconds": 3.5,
        "tokens_per_second": 1000.0,
        "step_seconds": 0.25,
        "steps_timed": 2,
        "prefill_tokens_per_second": 500.0,
        "decode_tokens_per_second": 50.0,
        "time_to_first_token_seconds": 0.125,
        "generation_seconds": 1.5,
        "latency": {"between_tokens_seconds": {"p50": 0.01, "p95": 0.02, "p99": 0.03}},
        "forwards": 4,
        "phases": [
            {"phase": name, "seconds": 0.125, "steps": 2, "rank": 0}
            for name in ("forward", "backward", "step", "prefill", "decode")
        ],
    },
    "ceilings": {"source": "measured", "bandwidth": 1e10, "flops": 1e11, "dtype": "float32"},
}
"""What a run measures and a rehearsal does not."""

LOSSES = {"losses": [2.5, 1.5], "validation": [{"step": 2, "loss": 2.0}], "optimizer": "AdamW"}


def rehearse(home: Path) -> dict[str, Path]:
    """The runs, rehearsed; what the first two lack of a run is added to their records."""
    paths = {name: home / name for name in RUNS}
    for name, words in RUNS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*words.split(), f"hydra.run.dir={paths[name]}"]) == 0
    for name in ("training", "generation", "another batch", "no cache"):
        file = paths[name] / "record.json"
        tree = json.loads(file.read_text())
        tree["world"]["kind"] = "torchrun"
        tree |= MEASURED | ({"training": LOSSES} if name == "training" else {})
        file.write_text(json.dumps(tree))
    return paths


def carried_out(paths: dict[str, Path], name: str, number: int) -> Iterator[tuple[str, str | None, float]]:
    """Carry out every tool on a mutated record of the run `name`, or on a mutated "trace"; `number` is the seed.

    Yields each tool's name, what is wrong with how it ends, and its seconds of processor time.
    """
    random = Random(f"{name} {number}")
    of = random.choice(MUTATED) if name == "trace" else name
    run = paths[of].with_name("mutated")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(paths[of], run)
    if name == "trace":
        file = random.choice(sorted((run / "trace").iterdir()))
        file.write_bytes(mutated_trace(file, random))
    else:
        (run / "record.json").write_bytes(mutated(json.loads((run / "record.json").read_text()), random))
    baseline = run.with_name(f"{of}.json")
    if not baseline.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["check", str(paths[of]), "--baseline", str(baseline), "--update"]) == 0
    others = [paths["another batch"]] if of == "generation" else [paths["training"]]
    for command in commands(run, others, baseline, run.with_name("report")):
        if name == "trace" and command[0] != "report":
            continue
        if command[0] == "caching" and of == "generation":
            command = ["caching", str(run), str(paths["no cache"]), *command[3:]]
        start = time.process_time()
        reason = wrong(command)
        yield (
            " ".join(word for word in command if not word.startswith("/")),
            reason,
            time.process_time() - start,
        )
