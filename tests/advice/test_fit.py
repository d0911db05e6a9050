"""`harness fit`: every verdict is a rehearsal's, nothing that fits is passed over, and the last line is what to run."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.advice.fit.answer import Answer
from harness.advice.fit.cheapest import MOST_NEAR
from harness.advice.fit.climb import HIGHEST, Climb
from harness.advice.fit.combination import Combination, Trial
from harness.advice.fit.data import data
from harness.advice.fit.leanest import leanest
from harness.advice.fit.ranking import BY, BY_FORMULA, RECOMPUTED, cost, sent
from harness.advice.fit.request import REHEARSED, Request
from harness.advice.fit.text import text
from harness.advice.fit.worlds import Worlds, smallest
from harness.analysis.moves import transfers
from harness.analysis.moves.links_model import flow
from harness.config import compose
from harness.config.load import load
from harness.config.settings import Refusal
from harness.device.outside import budget
from harness.record.memory import Transfer
from harness.rehearsal import decisive, moments
from harness.rehearsal.bounds import by_few_layers
from harness.rehearsal.pool import Worst, worst
from harness.tables import parse_size, size

ROOT = Path(__file__).parents[2]
DECIDED = ["precision=bf16", "model.attention=sdpa"]
"""What their `auto` comes to on a CPU with units for it: the limits below are of its bytes."""
SMALL = [
    *DECIDED,
    "mode=train",
    "model=tiny",
    "world.size=2",
    "train.sequence=32",
    "model.config.num_hidden_layers=1",
]


def climbed(limit: int, exactly: bool = False, rungs: tuple[int, ...] = ()) -> tuple[list[int], int]:
    """What a climb asks for where all up to `limit` fits, and the highest that it finds."""
    return searched(Climb(rungs, exactly), limit)


def searched(climb: Climb, limit: int) -> tuple[list[int], int]:
    """What `climb` asks for where all up to `limit` fits, and the highest that it finds."""
    requested = []
    while (wanted := climb.wants()) is not None:
        requested.append(wanted)
        climb.learn(wanted, wanted <= limit)
    return requested, climb.fits


def test_a_climb_doubles_until_something_does_not_fit() -> None:
    assert climbed(5) == ([1, 2, 4, 8], 4)
    assert climbed(0) == ([1], 0)
    assert climbed(10**9)[1] == HIGHEST


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 6, 7, 11, 100, 1023])
def test_an_exact_climb_finds_the_highest_of_all(limit: int) -> None:
    requested, highest = climbed(limit, exactly=True)
    assert highest == limit
    assert len(requested) <= 2 * HIGHEST.bit_length()


def test_given_rungs_are_climbed_in_order_and_no_further_than_needed() -> None:
    assert climbed(3, rungs=(1, 2, 3, 6, 12)) == ([1, 2, 3, 6], 3)


@pytest.mark.parametrize("exactly", [False, True])
@pytest.mark.parametrize("guessed", [1, 2, 3, 5, 8, 100, 2000])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 7, 8, 100, 1024])
def test_a_climb_finds_the_highest_whatever_is_likely(limit: int, guessed: int, exactly: bool) -> None:
    requested, highest = searched(Climb((), exactly, lambda value: value <= guessed), limit)
    assert highest == (limit if exactly else climbed(limit)[1])
    assert len(set(requested)) == len(requested) <= 2 * HIGHEST.bit_length()


@pytest.mark.parametrize("limit", [5, 8, 100])
def test_a_climb_that_knows_what_is_likely_tries_it_and_the_next(limit: int) -> None:
    assert searched(Climb((), True, lambda value: value <= limit), limit) == ([limit, limit + 1], limit)


def test_a_climb_tries_nothing_that_is_needless() -> None:
    climb = Climb()
    climb.needless = 4
    assert searched(climb, 3) == ([8], 0)
    climb.needless = 1
    assert searched(climb, 3) == ([2, 4], 2)


def test_below_a_value_that_is_refused_others_are_tried() -> None:
    climb = Climb((), False, lambda value: value <= 16)
    assert climb.wants() == 16
    climb.refuse(16)
    assert searched(climb, 8) == ([8], 8)


def test_pruning_gives_what_trying_everything_gives(capsys: pytest.CaptureFixture[str]) -> None:
    few = [*SMALL, "model.config.num_hidden_layers=2"]
    limit = 33_100_000  # what ZeRO-3 comes to with four sequences lies around it
    words = [*few, f"hardware.memory={limit}", "zero=0,3", "train.micro_batch=1,4"]
    assert main(["fit", *words, "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    verdicts = {tuple(trial["words"]): trial for trial in actual["trials"]}
    for zero, mode, micro_batch in product((0, 3), RECOMPUTED, (1, 4)):
        words = [
            f"zero={zero}",
            "zero.offload=none",
            "pipeline.stages=1",
            f"checkpointing={mode}",
            f"train.micro_batch={micro_batch}",
        ]
        settings = load(compose.compose([*few, *words, "world=rehearsed", "ledger.steps=2"]))
        itself = worst(settings)
        trial = verdicts.get(tuple(words))
        if trial is None:
            less = [f"checkpointing={each}" for each in RECOMPUTED[: RECOMPUTED.index(mode)]]
            instead = [verdicts.get((*words[:3], each, words[4])) for each in less]
            assert itself.bytes > limit or any(actual and actual["fits"] for actual in instead)
        else:
            assert (trial["peak"], trial["rank"]) == (itself.bytes, itself.rank)
            assert trial["fits"] == (itself.bytes <= limit)
    assert 0 < len(verdicts) < 12
    assert len({trial["fits"] for trial in actual["trials"]}) == 2


def test_the_last_line_is_a_command_that_the_harness_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SMALL, "hardware.memory=50000000", "train.batch=8", "zero=2"]) == 0
    reported = capsys.readouterr().out.rstrip().splitlines()
    start, _, words = reported[-1].partition(" -m harness ")
    assert start == "torchrun --standalone --nproc-per-node 2"
    settings = load(compose.compose(shlex.split(words)))
    assert (settings.zero.stage, settings.model.name) == (2, "tiny")
    assert settings.train.micro_batch * settings.train.accumulation * 2 == 8
    assert any(line.startswith("  zero=2") for line in reported)


def test_the_largest_batch_in_inference_is_the_largest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*DECIDED, "mode=infer", "model=tiny", "world.size=1", "generation.prompt_length=32"]
    given = [*words, "generation.max_new_tokens=16", "hardware.memory=8000000"]
    assert main(["fit", *given, "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    batch = int(actual["ranked"][0][-1].partition("=")[2])
    for tried, fits in ((batch, True), (batch + 1, False)):
        more = [f"generation.batch={tried}", f"generation.count={tried}", "world=rehearsed"]
        settings = load(compose.compose([*given, *more]))
        assert (worst(settings).bytes <= 8_000_000) == fits


def test_offload_is_tried_only_where_nothing_else_fits(capsys: pytest.CaptureFixture[str]) -> None:
    # on a GPU the optimizer's 17.7 MiB a rank are what does not fit
    deep = [*SMALL, "model.config.num_hidden_layers=4"]
    gpu = [*deep, "hardware=h100-sxm", "zero=2", "checkpointing=none", "train.micro_batch=1", "--json"]
    assert main(["fit", *gpu, f"hardware.memory={112 * 2**20}"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert [trial["fits"] for trial in actual["trials"]] == [False, True]
    assert "zero.offload=optimizer" in actual["command"]
    assert main(["fit", *gpu, "hardware.memory=150000000"]) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 1


def test_nothing_that_fits_is_said_with_the_nearest_miss(capsys: pytest.CaptureFixture[str]) -> None:
    few = [*SMALL, "zero.offload=none"]
    assert main(["fit", *few, "hardware.memory=1000000", "zero=2"]) == 1
    reported = capsys.readouterr().out.rstrip().splitlines()
    assert reported[-1].startswith("nothing fits; zero=2 train.micro_batch=1 comes nearest")


def test_what_shapes_rule_out_is_not_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mode=train", "model=llama3-405b", "world.size=8", "hardware=h100-sxm", "zero.offload=none"]
    assert main(["fit", *words, "zero=2,3", "--json"]) == 1
    trials = json.loads(capsys.readouterr().out)["trials"]
    n = 405_853_388_800
    assert {trial["at_least"] for trial in trials} == {2 * n + 12 * n // 8, 2 * n // 8 + 12 * n // 8}
    assert {(trial["peak"], trial["fits"]) for trial in trials} == {(None, False)}


def test_what_a_smaller_batch_rules_out_is_not_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "zero=3", "checkpointing=none", "hardware.memory=33100000"]
    assert main(["fit", *words, "--json"]) == 0
    *fitting, above = json.loads(capsys.readouterr().out)["trials"]
    assert all(trial["fits"] for trial in fitting)
    batch = int(above["words"][-1].partition("=")[2])
    itself = load(
        compose.compose([*words, f"train.micro_batch={batch}", "world=rehearsed", "ledger.steps=2"])
    )
    assert (above["peak"], above["left"], above["fits"]) == (None, None, False)
    assert 33_100_000 < above["at_least"] <= worst(itself).bytes


def trial(request: Request, words: list[str], measured: int, failure: str = "") -> Trial:
    rehearsed = Worst(measured, 0, {"activations": measured}, failure)
    return Trial(1, tuple(words), request.first, rehearsed, request.memory - measured)


def answer(request: Request, *trials: Trial) -> Answer:
    combinations = []
    for each in trials:
        combinations.append(Combination(each.overrides, (), False, request.room))
        combinations[-1].add(each)
    return Answer(request, combinations)


def test_what_could_not_be_rehearsed_is_told_apart_from_what_does_not_fit() -> None:
    request = Request([*SMALL, "hardware.memory=1000000"])
    large = trial(request, ["zero=1", "train.micro_batch=4"], 1_048_576 + 1_000_000)
    broken = [
        trial(request, [f"zero={zero}", "train.micro_batch=1"], 0, "RuntimeError: no such kernel")
        for zero in (0, 2)
    ]
    refused = trial(request, ["zero=3", "train.micro_batch=1"], 0, "Refusal: zero=3: it has none; use 2")
    reported = text(answer(request, large, *broken, refused)).splitlines()
    parts = reported.index("could not be rehearsed, because RuntimeError: no such kernel")
    assert reported[parts + 1 : parts + 3] == ["  zero=0 train.micro_batch=1", "  zero=2 train.micro_batch=1"]
    assert reported[parts + 3 : parts + 5] == [
        "could not be rehearsed, because zero=3: it has none; use 2",
        "  zero=3 train.micro_batch=1",
    ]
    assert reported.index("does not fit") < parts
    assert reported[-1] == (
        "nothing that could be rehearsed fits; zero=1 train.micro_batch=4 comes nearest, 1.0 MiB too much"
    )
    assert any(line.startswith("1 configs rehearsed; ") for line in reported)
    actual: Any = data(answer(request, large, *broken))
    assert [each["peak"] for each in actual["trials"]] == [2_048_576, None, None]

    nothing = text(answer(request, *broken)).splitlines()
    assert nothing[-1] == "none of the 2 configs could be rehearsed: whether one fits is not known"
    assert "does not fit" not in nothing
    small = trial(request, ["zero=1"], 1000)
    codes = [
        answer(request, *each).code
        for each in ([large, *broken], broken, [*broken, refused], [*broken, small])
    ]
    assert codes == [1, 3, 3, 0]


def test_a_climb_ends_where_a_rehearsal_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mode=infer", "model=tiny", "model.config.model_type=mamba", "world.size=1"]
    assert main(["fit", *words, "hardware.memory=50000000"]) == 2
    reported = capsys.readouterr()
    assert reported.err.startswith("harness: generation.cache=dynamic: mamba keeps a state of another kind; ")
    assert (reported.err.count("\n"), reported.out) == (1, "")


def test_a_model_without_sdpa_is_searched_and_what_was_decided_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu = [
        "hardware=h100-sxm",
        "zero=1",
        "checkpointing=none",
        "train.micro_batch=1",
    ]
    words = [*SMALL[len(DECIDED) :], "model.config.model_type=bloom", *gpu]
    assert main(["fit", *words]) == 0
    reported = capsys.readouterr().out.splitlines()
    assert "precision=bf16: a GPU has units for it" in reported
    assert "model.attention=eager: transformers has no sdpa for bloom" in reported
    assert "model.attention" not in reported[-1]  # as it was typed


def test_what_is_kept_free_is_not_given_away(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *SMALL,
        "hardware.memory=50000000",
        "zero=2",
        "checkpointing=none",
        "train.micro_batch=1",
        "--json",
    ]
    assert main(["fit", *words, "--reserve", "6MiB"]) == 0
    kept = json.loads(capsys.readouterr().out)
    main(["fit", *words])
    whole = json.loads(capsys.readouterr().out)
    assert whole["trials"][0]["left"] - kept["trials"][0]["left"] == 6 * 2**20


FRAGMENTED = [
    *SMALL[:-2],
    "train.sequence=64",
    "model.config.num_hidden_layers=2",
    "hardware=h100-sxm",
    "zero=2",
    "checkpointing=full",
    "train.micro_batch=8",
]


def test_what_only_fragmentation_keeps_from_fitting_is_said_with_what_would_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*FRAGMENTED, "zero.offload=none", f"hardware.memory={114 * 2**20}"]
    assert main(["fit", *words, "--json"]) == 1
    (actual,) = json.loads(capsys.readouterr().out)["trials"]
    assert actual["allocated"] <= 114 * 2**20 < actual["reserved"]
    assert (actual["fragmented"], actual["would_fit_with"][0]) == (True, "expandable_segments:True")
    assert main(["fit", *words]) == 1
    reported = capsys.readouterr().out.splitlines()
    assert any("what is reserved does not" in line for line in reported)
    assert any(
        line.endswith("would fit with PYTORCH_ALLOC_CONF=expandable_segments:True") for line in reported
    )
    assert main(["fit", *words, f"hardware.allocator={actual['would_fit_with'][0]}", "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    assert command.startswith("PYTORCH_ALLOC_CONF=expandable_segments:True torchrun ")
    assert "hardware.allocator" not in command


def test_what_is_kept_free_is_not_there_for_the_allocator(capsys: pytest.CaptureFixture[str]) -> None:
    """Near its limit the allocator releases what it has cached: what it reserves depends on the limit."""
    trials = []
    for kept in (0, 8):
        words = [*FRAGMENTED, f"hardware.memory={(118 + kept) * 2**20}", "--reserve", f"{kept}MiB"]
        assert main(["fit", *words, "--json"]) == 0
        trials.append(json.loads(capsys.readouterr().out)["trials"])
    assert trials[0] == trials[1]
    assert main(["fit", *FRAGMENTED, f"hardware.memory={126 * 2**20}", "--json"]) == 0
    (more,) = json.loads(capsys.readouterr().out)["trials"]
    assert more["left"] > trials[0][0]["left"]


def test_what_is_allocated_and_does_not_fit_is_not_blamed_on_fragmentation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*FRAGMENTED, "zero.offload=none", f"hardware.memory={60 * 2**20}"]
    assert main(["fit", *words]) == 1
    reported = capsys.readouterr().out
    assert "does not fit: what is allocated is too much" in reported
    assert "PYTORCH_ALLOC_CONF" not in reported


def test_the_budget_is_what_torch_sees_less_what_is_known_to_lie_outside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*SMALL, "hardware=a100-80gb", "zero=2", "checkpointing=none", "train.micro_batch=1"]
    expected = budget(load(compose.compose(["hardware=a100-80gb"])).hardware, 2)
    assert expected is not None
    assert main(["fit", *words, "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual["memory"] == expected.bytes < actual["budget"]["total"]
    assert actual["trials"][0]["left"] == expected.bytes - actual["trials"][0]["reserved"]
    subtracted = [actual["budget"][name] for name in ("context", "nccl")]
    assert sum(each["bytes"] for each in subtracted) == actual["budget"]["total"] - actual["memory"]
    assert all(each["source"].startswith("https://") for each in subtracted)

    assert main(["fit", *words]) == 0
    reported = capsys.readouterr().out.splitlines()
    assert expected.sentence() in reported
    assert reported[2].startswith(f"fits {size(expected.bytes)} a device")


def test_what_is_not_known_is_null_and_a_memory_that_is_typed_is_the_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*SMALL, "hardware=h100-sxm", "zero=2", "checkpointing=none", "train.micro_batch=1", "--json"]
    assert main(["fit", *words]) == 0
    actual = json.loads(capsys.readouterr().out)["budget"]
    assert (actual["source"], actual["context"], actual["nccl"]) == ("torch", None, None)
    assert "not known here and not subtracted; --reserve is for it" in actual["sentence"]
    assert main(["fit", *words, "hardware.memory=80000000000"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert (actual["memory"], actual["budget"]["source"]) == (80_000_000_000, "hardware.memory")


def test_less_sent_is_cheaper_and_a_larger_micro_batch_makes_it_less() -> None:
    def of(*words: str) -> tuple[float, ...]:
        return cost(load(compose.compose(["mode=train", *words])))

    assert of("zero=1", "train.accumulation=2") < of("zero=2", "train.accumulation=2")
    assert of("zero=2") < of("zero=3")
    assert of("zero=3", "train.micro_batch=8") < of("zero=2", "train.micro_batch=4")
    assert of("zero=3", "train.micro_batch=1") < of("zero=1", "train.micro_batch=8", "zero.offload=optimizer")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "world.size=null: world=rehearsed needs world.size="),
        ("world.size=2", "hardware.memory=null: fit must know the memory of a device"),
        ("hardware=h100-sxm", "world.size=null: world=rehearsed needs world.size="),
        ("world.size=2 hardware=h100-sxm zero=1,7", "zero=7: no such option; one of 0, 1, 2, 3"),
        (
            "world.size=2 hardware=h100-sxm train.steps=1,2",
            "train.steps=1,2: give one value; lists may be given",
        ),
        (
            "world.size=2 hardware=h100-sxm train.micro_batch=1,x",
            "train.micro_batch=x: should be whole numbers",
        ),
        (
            "world.size=2 hardware=h100-sxm zero=0 zero.offload=optimizer",
            "zero.offload=optimizer: zero=0 shards",
        ),
        ("world.size=2 hardware=h100-sxm checkpointing=none,fully", "checkpointing=fully: no such option"),
        ("world.size=2 hardware=h100-sxm foo=1", "foo=1: no such key"),
        ("world.size=2 hardware=h100-sxm train.batch=7", "train.batch=7: "),
        (
            "mode=infer world.size=1 hardware=h100-sxm generation.prompts=a.txt",
            "generation.prompts=...: fit needs",
        ),
        ("mode=fly", "mode=fly: no such mode; one of train, infer"),
        ("world.size=2 bar", "fit: bar: neither key=value nor an option"),
        ("world.size=2 --reserve 3furlongs", "--reserve=3furlongs: not a size"),
        ("world.size=2 hardware=h200x", "hardware=h200x: no such option; one of a100-40gb"),
        ("world.size=2 hardware.memory=-5", "hardware.memory=-5: should be greater than or equal to 1"),
        (
            "world.size=2 hardware.memory=1048576 --reserve 1MiB",
            "fit: nothing is left for a config: 1.0 MiB a device: hardware.memory, and nothing is subtracted; "
            "--reserve keeps 1.0 MiB",
        ),
        (
            "world.size=2 hardware=a100-80gb hardware.memory_torch=1048576",
            "fit: nothing is left for a config: -1,022.3 MiB a device: 1.0 MiB that torch sees, less 479.3 MiB",
        ),
    ],
)
def test_bad_input_is_one_sentence(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *words.split()]) == 2
    reported = capsys.readouterr()
    assert reported.err.startswith(f"harness: {sentence}")
    assert (reported.err.count("\n"), reported.out) == (1, "")


def test_sizes_are_read_as_they_are_written() -> None:
    assert [parse_size(text) for text in ("0", "500", "2GiB", "1.5 KiB")] == [0, 500, 2**31, 1536]
    with pytest.raises(ValueError, match="not a size"):
        parse_size("-1GiB")


def test_a_value_that_is_possible_somewhere_is_not_refused() -> None:
    offloaded = [*SMALL, "hardware.memory=50000000", "zero=0,2", "zero.offload=none,optimizer"]
    combinations = Request([*offloaded, "checkpointing=none"]).combinations()
    assert ("zero=0", "zero.offload=optimizer", "checkpointing=none") not in combinations
    assert len(combinations) == 3
    with pytest.raises(Refusal, match="zero=0 shards nothing"):
        Request([*SMALL, "hardware.memory=50000000", "zero=0", "zero.offload=optimizer"]).combinations()


def test_stages_are_an_axis_that_is_ranked_by_how_long_they_wait(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *(word for word in SMALL if not word.startswith("world.size=")),
        *(
            "world.size=4",
            "model.config.num_hidden_layers=4",
            "hardware.memory=200000000",
            "zero=1,2",
            "checkpointing=none",
            "pipeline.stages=1,2,4",
        ),
        *("train.micro_batch=1", "train.batch=16"),
    ]
    assert main(["fit", *words, "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    reported = [dict(word.partition("=")[::2] for word in words) for words in actual["ranked"]]
    ranked = [(each["zero"], each["pipeline.stages"], each["train.accumulation"]) for each in reported]
    assert ranked == [
        ("1", "1", "4"),
        ("2", "1", "4"),
        ("1", "2", "8"),
        ("1", "4", "16"),
    ]  # ZeRO-2 has no stages


@pytest.mark.parametrize("words", ["zero=2", "zero=1 pipeline.stages=2", "zero=3 world.per_node=1"])
def test_what_a_rank_sends_for_a_sequence_is_what_a_rehearsal_of_all_micro_batches_counts(words: str) -> None:
    given = [*SMALL, *words.split(), "model.config.num_hidden_layers=2", "train.accumulation=5"]
    settings = load(compose.compose([*given, "world=rehearsed", "ledger.steps=2", "train.micro_batch=2"]))
    few, all_of_them = worst(decisive(settings)), worst(settings)
    moved = [transfers.of_last(rows or (), "train", [1]) for rows in all_of_them.traffic]
    links = [
        [
            flow(row for row in rows if row.link != "storage" and (row.link == "network") is far)
            for rows in moved
        ]
        for far in (True, False)
    ]
    far, near = ([each.busier / 10 for each in flows if each] for flows in links)
    assert sent(Trial(2, (), settings, few, 0)) == max(zip(far, near, strict=True))
    assert max(far + near) > 0


def test_configs_are_ranked_by_counted_bytes_and_by_formula_only_where_none_were_counted() -> None:
    request = Request([*SMALL, "hardware.memory=1000000", "zero=1,2", "checkpointing=none"])
    place = {
        "step": 1,
        "phase": "step",
        "micro_batch": 0,
        "operation": "all-reduce",
        "group": "0,1",
        "ranks": 2,
    }

    def counted(zero: int, network: int, nvlink: int) -> Trial:
        words = request.with_value(
            (f"zero={zero}", "zero.offload=none", "pipeline.stages=1", "checkpointing=none"), 1
        )
        figures = {"network": network, "nvlink": nvlink}
        rows = [Transfer(**place, link=k, calls=1, bytes=n, by_ring=n) for k, n in figures.items()]  # type: ignore[arg-type]
        found = Worst(1000, 0, {"activations": 1000}, traffic=(tuple(rows),))
        return Trial(1, words, request.settings(words), found, 999_000)

    far, near = counted(1, 20, 10), counted(2, 10, 1000)
    ranked = answer(request, far, near)
    assert ranked.fitting == [near, far]
    assert BY["train"] in text(ranked)
    assert [each["sent"] for each in data(ranked)["trials"]] == [  # type: ignore[attr-defined]
        {"between_nodes": 20.0, "within_node": 10.0},
        {"between_nodes": 10.0, "within_node": 1000.0},
    ]
    uncounted = near._replace(worst=near.worst._replace(traffic=(None,)))
    ranked = answer(request, far, uncounted)
    assert ranked.fitting == [far, uncounted]
    assert BY_FORMULA in text(ranked)


def test_more_micro_batches_than_decide_a_peak_add_their_losses_and_no_more() -> None:
    shallow = [*SMALL, "model.config.num_hidden_layers=2"]
    words = [*shallow, "ledger.steps=2", "world=rehearsed", "train.accumulation=7", "train.steps=2"]
    for stages, zero in ((1, 2), (1, 3), (2, 1)):
        many = load(compose.compose([*words, f"zero={zero}", f"pipeline.stages={stages}", "world.size=2"]))
        few = decisive(many)
        assert few.train.accumulation == few.train.validation_batches == stages + 1
        apart = worst(many).bytes - worst(few).bytes
        assert apart in (0, 4 * (7 - few.train.accumulation))


def test_an_interrupt_ends_the_search_with_what_is_known_by_then(tmp_path: Path) -> None:
    words = [
        *(word for word in SMALL if "layers" not in word and "world" not in word),
        *("world.size=4", "model.config.num_hidden_layers=12"),
        "hardware.memory=120000000",  # with ZeRO-0 the optimizer alone is more
        "zero=0,3",
        "checkpointing=none",
    ]
    search = subprocess.Popen(
        [sys.executable, "-m", "harness", "fit", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    )
    assert search.stderr
    assert any(line.startswith("first answer, expected from a few layers: zero=3") for line in search.stderr)
    search.send_signal(signal.SIGINT)
    out, err = search.communicate(timeout=60)
    assert search.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted: 1 configs are known, and others were still to come" in out.splitlines()
    assert re.search(r"zero=0 train.micro_batch=1 .*at least optimizer .*: not rehearsed", out)


@pytest.mark.parametrize("limit", [1, 2, 3, 8, 9, 16, 17, 24, 72, 97, 4096, 4097])
def test_the_smallest_world_is_a_power_of_two_or_a_number_of_whole_nodes(limit: int) -> None:
    """The candidates up to a node are powers of two, then multiples of 8; each world is asked for once."""
    asked: list[int] = []

    def fits(world: int) -> bool:
        asked.append(world)
        return world >= limit

    candidates = [1, 2, 4, *range(8, 4097, 8)]
    expected = next((world for world in candidates if world >= limit), None)
    assert smallest(fits, (2**power for power in range(13)), 8) == expected
    assert len(set(asked)) == len(asked) <= 26


def test_of_the_listed_worlds_the_smallest_that_fits_is_taken() -> None:
    assert smallest(lambda world: world >= 5, [2, 6, 12], 0) == 6
    assert smallest(lambda world: False, [2, 6, 12], 0) is None


def test_a_question_mark_is_every_value_the_default_first() -> None:
    request = Request([*SMALL, "checkpointing=?", "zero=?", "pipeline.stages=?", "train.micro_batch=?"])
    assert request.axes["checkpointing"] == "none,full,selective"
    assert request.axes["zero"] == "1,0,2,3"
    assert request.axes["pipeline.stages"] == "1,2,4,8,16"
    assert request.axes["train.micro_batch"] == ""
    assert all("pipeline.stages=1" in each for each in request.combinations())
    assert set(request.impossible) == {f"pipeline.stages={stages}" for stages in (2, 4, 8, 16)}


@pytest.mark.parametrize("word", ["train.sequence=?", "seed=?", "hardware.memory=?"])
def test_a_question_mark_that_stands_for_no_list_is_refused(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *SMALL, "hardware.memory=1e9", word]) == 2
    error = capsys.readouterr().err
    assert word.removesuffix("=?") in error
    assert "list" in error or "checkpointing" in error


def test_the_smallest_world_is_given_with_those_that_are_too_small(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word for word in SMALL if not word.startswith("world.size")]
    words += ["zero=3", "checkpointing=full", "hardware.memory=18e6", "world.size=?"]
    assert main(["fit", *words, "train.micro_batch=1", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    tried = {each["size"]: each["fits"] for each in actual["worlds"]}
    assert actual["world_size"] == min(world for world, fits in tried.items() if fits)
    assert not any(tried[world] for world in tried if world < actual["world_size"])
    alone = [*words[:-1], "train.micro_batch=1", "--json"]
    for world, fits in tried.items():
        assert main(["fit", *alone, f"world.size={world}"]) == (0 if fits else 1)
    capsys.readouterr()


def test_worlds_are_multiples_of_what_divides_them() -> None:
    stages = Worlds(["pipeline.stages=3", "world.size=?"], 0, "?")
    assert [*stages._candidates(0)][:5] == [3, 6, 12, 24, 48]
    assert smallest(lambda world: world >= 60, stages._candidates(0), stages.step) == 72
    nodes = Worlds(["world.per_node=6"], 0, "?")
    assert [*nodes._candidates(0)][:6] == [1, 2, 4, 6, 12, 24]
    assert smallest(lambda world: world >= 14, nodes._candidates(0), nodes.step) == 18


def test_a_config_that_is_refused_with_the_resolved_precision_is_not_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In bf16, which a GPU's `auto` is, a stage's weights are flat, and adafactor would be another optimizer."""
    words = [word for word in SMALL if not word.startswith(("precision", "model.config"))]
    words += ["zero=0", "pipeline.stages=2", "checkpointing=none", "train.micro_batch=1", "hardware=h100-sxm"]
    assert main(["fit", *words, "optimizer=adafactor,adamw", "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert ["optimizer=adamw" in trial["words"] for trial in trials] == [True]
    assert main(["fit", *words, "optimizer=adafactor"]) == 2


def test_leaner_is_what_differs_only_in_values_that_need_less() -> None:
    def combination(words: str) -> Combination:
        return Combination(tuple(words.split()), [], False, 0)

    every = [
        combination(f"zero={zero} checkpointing={mode} loss={loss} optimizer.state={state}")
        for zero, mode, loss, state in product((1, 3), RECOMPUTED, ("full", "chunked"), ("fp32", "bf16"))
    ]
    best = [f"zero={zero} checkpointing=full loss={loss}" for zero in (1, 3) for loss in ("full", "chunked")]
    assert [" ".join(each.overrides) for each in leanest(every)] == [
        f"{one} optimizer.state=bf16" for one in best
    ]
    lengths = [
        combination(f"train.sequence={length} optimizer={kind}")
        for length in (512, 64)
        for kind in ("adamw", "muon", "sgd")
    ]
    assert [each.overrides[1] for each in leanest(lengths)] == ["optimizer=muon", "optimizer=sgd"]


LEANER_PAIRS = [
    ("checkpointing=full", "checkpointing=selective"),
    ("optimizer=adamw_8bit", "optimizer=adamw"),
    ("adapter=lora", "adapter=none"),
    ("adapter=lora", "adapter=dora"),
    ("zero=2 zero.offload=optimizer", "zero=2"),
]
MORE_PAIRS = [
    ("checkpointing=full", "checkpointing=none"),
    ("checkpointing.offload=cpu", "checkpointing.offload=none"),
    ("optimizer=sgd", "optimizer=lion"),
    ("optimizer=lion", "optimizer=adamw"),
    ("optimizer.state=bf16", "optimizer.state=fp32"),
    ("adapter=qlora zero=2", "adapter=lora zero=2"),
    ("train.sequence=64", "train.sequence=128"),
]


@pytest.mark.parametrize(
    ("less", "more"),
    [*LEANER_PAIRS, *(pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in MORE_PAIRS)],
)
def test_what_is_leaner_is_expected_to_need_no_more(less: str, more: str) -> None:
    """Of a model with many layers on 8 GPUs."""
    deep = [*DECIDED, "model=llama3-8b", "hardware=h100-sxm", "world.size=8", "zero=1"]
    expected = []
    for words in (less, more):
        request = Request([*deep, *words.split(), "train.micro_batch=1"])
        settings = request.rehearsed(request.settings(request.with_value(request.combinations()[0], 1)))
        expected.append(sum(moments.estimate(by_few_layers(settings), 1, 1).values()))
    assert 0 < expected[0] <= expected[1]


def test_a_world_that_a_few_layers_take_for_too_small_is_rehearsed_before_a_larger_one_is_the_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On 8 ranks 16 layers need 26.2 GB under ZeRO-1, and a few layers let expect 29.4 GB."""
    large = ["model=llama3-8b", "model.config.num_hidden_layers=16", "hardware=cpu", "hardware.memory=28e9"]
    words = [*DECIDED, *large, "zero=1", "checkpointing=none", "train.micro_batch=1", "world.size=8,16"]
    assert main(["fit", *words, "--json"]) == 0
    captured = capsys.readouterr()
    actual = json.loads(captured.out)
    assert "world.size=8: nothing is expected to fit" in captured.err
    assert actual["world_size"] == 8
    assert [each["fits"] for each in actual["worlds"]] == [True, True]
    (trial,) = actual["trials"]
    assert trial["peak"] < 28e9


@pytest.mark.parametrize("length", ["null", "3e1"])
def test_a_length_that_is_no_plain_number_is_taken_as_in_one_world(
    length: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "mode=infer",
        *DECIDED,
        "model=tiny",
        "hardware=cpu",
        "hardware.memory=1e9",
        "generation.batch=1",
    ]
    assert main(["fit", *words, "world.size=1,2", f"generation.max_new_tokens={length}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 1


def test_a_combination_that_is_refused_does_not_make_a_world_of_estimates_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A T4 has no units for bf16, and DeepSpeed no bf16 states beside fp32; shapes rule nothing out."""
    deep = ["model=tiny", "model.config.num_hidden_layers=18", "train.sequence=32", "hardware=t4"]
    words = [*deep, "zero=3", "checkpointing=none", "optimizer.state=?", "train.micro_batch=1"]
    assert main(["fit", *words, "world.size=2,4", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual["resolved"]["precision"]
    assert actual["world_size"] == 2


def test_every_axis_may_be_open_and_few_configs_are_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model with many layers; what is said to fit is what its own rehearsal says."""
    deep = [*DECIDED, "model=tiny", "model.config.num_hidden_layers=24", "train.sequence=32", "hardware=cpu"]
    axes = ["zero", "checkpointing", "checkpointing.offload", "loss", "optimizer.state"]
    words = [*deep, *(f"{axis}=?" for axis in axes), "train.micro_batch=1", "hardware.memory=80e6"]
    assert main(["fit", *words, "world.size=?", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    fitting = [trial for trial in actual["trials"] if trial["fits"]]
    assert [trial["words"] for trial in fitting] == actual["ranked"]
    assert 1 <= len(fitting) <= MOST_NEAR
    assert actual["not_tried"]
    world = actual["world_size"]
    assert not any(each["fits"] for each in actual["worlds"] if each["size"] < world)
    itself = worst(load(compose.compose([*deep, *fitting[0]["words"], *REHEARSED, f"world.size={world}"])))
    assert itself.bytes == fitting[0]["peak"] <= 80e6
