"""A rehearsal in one process: what it replaces, what it knows, which ranks it stands for, and what it leaves behind."""

import inspect
import math
import random
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.__main__ import main
from harness.config.compose import compose
from harness.config.load import load
from harness.ledger import Ledger
from harness.ledger.cuda_allocator import BLOCK
from harness.ledger.patch import DoesNotFit, Patch
from harness.ledger.traffic import READ
from harness.model.plan import Plan
from harness.record import record_file
from harness.rehearsal import UNVERIFIED, one_rank, shims, zero_shims
from harness.rehearsal.fake_mode import Fakes
from harness.rehearsal.known_values import UNKNOWN, KnownValues
from harness.rehearsal.one_rank import rehearse
from harness.rehearsal.representatives import representatives_of
from harness.rehearsal.shims import ONCE_A_RANK, shimmed
from harness.training import engine, pipeline_engine

TINY = ("hardware=cpu", "precision=bf16", "model.attention=sdpa", "model.config.num_hidden_layers=2")
TRAIN = (
    "mode=train",
    "train.steps=2",
    "train.sequence=32",
    "train.micro_batch=1",
    "train.validate_every=0",
    "train.export=false",
)
UNEVEN = ("model.config.vocab_size=1000", "model.config.intermediate_size=689")


def plan(*words: str, size: int = 2) -> Plan:
    """The plan of a small rehearsed run."""
    return Plan.of(load(compose([*TINY, *TRAIN, *words, "world=rehearsed", f"world.size={size}"])))


# -- which ranks are rehearsed, and for whom ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "words",
    [
        ("zero=1",),
        ("zero=2", "zero.reduce_bucket_size=100000"),
        ("zero=1", "zero.reduce_bucket_size=100000", "train.sequence=64"),
        ("zero=2", "precision=fp32", "train.accumulation=2"),
        (
            "zero=2",
            "zero.offload=optimizer",
            "zero.reduce_bucket_size=100000",
            "model.config.vocab_size=3000",
        ),
        ("zero=1", "train.export=true", "train.steps=1", *UNEVEN),
    ],
    ids=",".join,
)
def test_every_rank_is_stood_for_or_bounded_by_one_that_peaks_no_lower(
    size: int, words: tuple[str, ...]
) -> None:
    requested = plan(*words, size=size)
    books = [rehearse(requested, rank)[0].tree() for rank in range(size)]
    named = [
        rank for each in representatives_of(requested) for rank in (*each.equivalent_ranks, *each.bounds)
    ]
    assert sorted(named) == list(range(size))
    for each in representatives_of(requested):
        assert each.rank in each.equivalent_ranks
        for rank in each.equivalent_ranks:
            assert {**books[rank], "rank": 0, "stands_for": []} == {
                **books[each.rank],
                "rank": 0,
                "stands_for": [],
            }
        for rank in each.bounds:
            assert books[rank]["peak"]["bytes"] <= books[each.rank]["peak"]["bytes"]


@pytest.mark.parametrize("words", [("zero=0",), ("zero=3", *UNEVEN)], ids=",".join)
def test_ranks_that_one_stands_for_hold_what_it_holds(words: tuple[str, ...]) -> None:
    requested = plan(*words, size=5)
    (alone,) = representatives_of(requested)
    assert alone.equivalent_ranks == tuple(range(5))
    first = rehearse(requested, 0)[0].tree()
    for rank in (1, 4):
        other = rehearse(requested, rank)[0].tree()
        for books in (first, other):
            for phase in books["phases"]:  # the last partition is padded, and less is copied into it
                phase |= {"read": None, "written": None, "work": None}
        assert [other[key] for key in ("peak", "categories", "phases")] == [
            first[key] for key in ("peak", "categories", "phases")
        ]


def test_rank_0_is_rehearsed_by_itself_where_it_alone_exports() -> None:
    for zero in (0, 1, 2, 3):
        requested = plan(f"zero={zero}", "train.export=true", size=4)
        assert next(each for each in representatives_of(requested) if each.rank == 0).equivalent_ranks == (0,)
    lead, other = (rehearse(plan("zero=3", "train.export=true"), rank)[0].tree() for rank in (0, 1))
    whole = [
        {phase["phase"]: phase["peak"] for phase in each["phases"]}["checkpoint"] for each in (lead, other)
    ]
    assert whole[0] > whole[1]


def test_ranks_that_share_layers_are_alike_but_for_what_cannot_be_cut_evenly() -> None:
    shared = ("mode=infer", "generation.tensor_parallel=2", "generation.max_new_tokens=2")
    assert [each.equivalent_ranks for each in representatives_of(plan(*shared, size=4))] == [(0, 1, 2, 3)]
    uneven = plan(*shared, *UNEVEN, size=4)
    assert [each.equivalent_ranks for each in representatives_of(uneven)] == [(0, 2), (1, 3)]
    measured = [rehearse(uneven, rank)[0].categories["parameters"].end or 0 for rank in range(4)]
    assert (
        measured[0] == measured[2] == measured[1] + 3 * 2 * 256 * 2
    )  # of three matrices of two layers, a row in bf16
    assert measured[1] == measured[3]


def test_a_gpu_that_shares_layers_holds_its_part_alone() -> None:
    words = ("mode=infer", "model=llama3-8b", "hardware=h100-sxm", "model.config.num_hidden_layers=2")
    alone, shared = (
        rehearse(plan(*words, f"generation.tensor_parallel={ranks}"), 0)[0].tree() for ranks in (1, 2)
    )
    norms = 5 * 4096 * 2
    (setup,) = [phase for phase in shared["phases"] if phase["phase"] == "setup"]
    whole = alone["categories"]["parameters"]["end"]
    assert abs(shared["categories"]["parameters"]["end"] - (whole + norms) // 2) <= BLOCK
    assert setup["peak"] == setup["end"]
    assert shared["categories"]["kv_cache"]["end"] * 2 == alone["categories"]["kv_cache"]["end"]


def test_what_a_validation_reads_is_read_in_it() -> None:
    words = ("train.steps=1", "train.validate_every=1", "train.validation_batches=2")
    for stages in (1, 2):
        rehearsed = rehearse(plan(*words, f"pipeline.stages={stages}"), 0)[0].tree()
        read = [
            (row["phase"], row["micro_batch"], row["bytes"])
            for row in rehearsed["traffic"]
            if row["operation"] == READ and row["phase"] != "setup"
        ]
        batch = 4 * 32
        assert read == [("data", 0, batch), ("validate", 0, batch), ("validate", 1, batch)]


def test_a_gpu_generates_by_pages_on_a_stream_of_its_own() -> None:
    words = (
        *("mode=infer", "model.config.num_hidden_layers=1", "precision=fp32", "generation.count=2"),
        *("generation.batching=continuous", "generation.cache=paged", "generation.max_new_tokens=2"),
    )
    gpu, cpu = (
        rehearse(plan(*words, f"hardware={name}", size=1), 0)[0].tree() for name in ("h100-sxm", "cpu")
    )
    assert gpu["categories"]["kv_cache"] == cpu["categories"]["kv_cache"]
    assert gpu["categories"]["kv_cache"]["peak"] > 0
    assert gpu["allocator"]["reserved"] > gpu["peak"]["bytes"]


def test_ranks_with_prompts_of_other_lengths_are_rehearsed_apart(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["a", "a", "a longer one", "a"] * 2))
    requested = plan("mode=infer", f"generation.prompts={file}", "generation.max_new_tokens=2", size=4)
    assert [each.equivalent_ranks for each in representatives_of(requested)] == [(0, 1, 3), (2,)]
    books = [rehearse(requested, rank)[0].categories for rank in range(4)]
    assert books[0] == books[1] == books[3] != books[2]


# -- what works once for every rank, done for one ----------------------------------------------------------------------


def without(reason: str) -> tuple[Patch, ...]:
    return tuple(shim for shim in shims.SHIMS if shim.reason != reason)


@pytest.mark.parametrize(
    ("size", "ranks"), [(3, (0, 1, 2)), pytest.param(8, (0, 3, 7), marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize(
    "words",
    [
        ("zero=1",),
        ("zero=2", "zero.reduce_bucket_size=100000", "train.accumulation=2", *UNEVEN),
        (
            "zero=3",
            "zero.persistence_threshold=0",
            "hardware=h100-sxm",
            *UNEVEN,
        ),  # on CPU gloo's copy is counted too
    ],
    ids=lambda words: words[0],
)
def test_doing_it_for_one_rank_changes_no_byte(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], size: int, ranks: tuple[int, ...]
) -> None:
    requested = plan(*words, size=size)
    quick = [rehearse(requested, rank)[0].tree() for rank in ranks]
    monkeypatch.setattr(shims, "SHIMS", without(ONCE_A_RANK))
    whole = [rehearse(requested, rank)[0].tree() for rank in ranks]
    for key in ("peak", "categories", "phases"):
        assert [each[key] for each in quick] == [each[key] for each in whole]


class Partitions:
    """The bookkeeping of a ZeRO-1 or 2 optimizer with one group of parameters, before it is filled."""

    def __init__(self, sizes: list[int], paddings: list[int], count: int) -> None:
        self.parameters = [torch.empty(size, device="meta") for size in sizes]
        self.names = {id(parameter): place for place, parameter in enumerate(self.parameters)}
        self.round_robin_bit16_padding = [paddings]
        self.partition_size = [math.ceil((sum(sizes) + sum(paddings)) / count)]
        self.param_to_partition_ids: dict[int, dict[int, list[int]]] = {0: {}}
        self.total_grads_in_partition: dict[int, dict[int, int]] = {0: {}}
        nothing = SimpleNamespace(of=lambda: {0: {part: {} for part in range(count)}}).of
        self.is_grad_computed = nothing()
        self.grad_partition_insertion_offset = nothing()
        self.grad_start_offset = nothing()

    def get_param_id(self, parameter: torch.Tensor) -> int:
        return self.names[id(parameter)]


@pytest.mark.parametrize("seed", range(20))
def test_parameters_are_placed_in_partitions_as_deepspeed_places_them(seed: int) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Theirs

    draw = random.Random(seed)
    sizes = [draw.choice([1, 2, 7, 64, 1000]) for _ in range(draw.randint(1, 12))]
    paddings, count = [draw.choice([0, 0, 3]) for _ in sizes], draw.randint(1, 9)
    place, first = Theirs.initialize_gradient_partition, Theirs.get_first_param_index
    theirs, ours = Partitions(sizes, paddings, count), Partitions(sizes, paddings, count)
    for part in range(count):
        place(theirs, 0, theirs.parameters, part)
        zero_shims.initialize_gradient_partition(place)(ours, 0, ours.parameters, part)
    for name in (
        "param_to_partition_ids",
        "total_grads_in_partition",
        "is_grad_computed",
        "grad_partition_insertion_offset",
        "grad_start_offset",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert theirs.param_to_partition_ids[0]
    for part in range(count):
        assert zero_shims.get_first_param_index(first)(ours, 0, ours.parameters, part) == first(
            theirs, 0, theirs.parameters, part
        )


class Counted(Ledger):
    """A ledger whose operators can be counted after a rehearsal that made it."""

    made: "list[Counted]" = []  # noqa: RUF012

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Counted.made.append(self)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan, int], int]:
    """A function of settings and a rank to the number of operators that its rehearsal dispatched."""
    monkeypatch.setattr(one_rank, "Ledger", Counted)
    monkeypatch.setattr(Counted, "made", [])

    def count(requested: Plan, rank: int) -> int:
        rehearse(requested, rank)
        return len(Counted.made.pop()._log.operators)

    return count


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_larger_world_takes_no_more_operators(operators: Callable[[Plan, int], int], zero: int) -> None:
    words = (f"zero={zero}", "zero.persistence_threshold=0")
    small = operators(plan(*words, size=64), 1)
    assert small > 500
    large = operators(plan(*words, size=4096), 1)
    assert abs(large - small) <= 16  # its share may begin or end in another parameter


@pytest.mark.parametrize("zero", [2, 3])
def test_a_deeper_model_is_not_walked_through_once_for_each_transfer(
    zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = torch.nn.Module.named_parameters, 0

    def named_parameters(self: torch.nn.Module, *args: Any, **options: Any) -> Iterator[Any]:
        nonlocal seen
        ours = f"{Path('harness', 'ledger')}" in sys._getframe(1).f_code.co_filename
        for each in original(self, *args, **options):
            seen += ours  # DeepSpeed's own walks are not ours to change
            yield each

    monkeypatch.setattr(torch.nn.Module, "named_parameters", named_parameters)
    numbers = []
    for layers in (2, 4, 6):
        seen = 0
        words = (f"zero={zero}", "zero.persistence_threshold=0", f"model.config.num_hidden_layers={layers}")
        requested = load(compose([*TINY[:-1], *TRAIN, *words, "world=rehearsed", "world.size=2"]))
        rehearse(Plan.of(requested), 0)
        numbers.append(seen)
    few, more, most = numbers
    assert most - more == more - few  # two layers more are as many parameters more, however deep the model is


# -- shims: each fits, or says so; all of them are put back ------------------------------------------------------------


def test_every_shim_finds_its_place() -> None:
    before = places()
    with shimmed(gpu=True):
        assert all(now is not before[key] for key, now in places().items())
    assert places() == before


def places() -> dict[str, Any]:
    """What is where a shim goes: in the owner itself, None where it inherits it."""
    return {shim.name: vars(shim.place()).get(shim.attribute) for shim in (*shims.SHIMS, *shims.GPU_SHIMS)}


def takes_nothing(original: Any) -> Any:
    def stand_in() -> None: ...

    return stand_in


@pytest.mark.parametrize(
    ("owner", "attribute", "said"),
    [
        ("torch.nn.Module", "_gone", "it is not there"),
        ("torch.nn.Module", "_apply", r"it takes \('self', 'fn', 'recurse'\), not \(\)"),
        ("torch.nn.NoSuchModule", "_apply", "it is not there"),
    ],
    ids=["missing", "other arguments", "no owner"],
)
def test_a_shim_that_does_not_fit_is_named_and_leaves_nothing_replaced(
    monkeypatch: pytest.MonkeyPatch, owner: str, attribute: str, said: str
) -> None:
    before, wrong = places(), Patch(owner, attribute, "of a reason", ("2.13",), takes_nothing)
    monkeypatch.setattr(shims, "SHIMS", (*shims.SHIMS, wrong))
    with pytest.raises(
        DoesNotFit, match=rf"{owner}.{attribute} is replaced because of a reason; in torch 2\.\S+ {said}"
    ):
        rehearse(plan(), 0)
    monkeypatch.undo()
    assert places() == before


@pytest.mark.parametrize(
    ("room", "attribute", "words"),
    [
        (engine, "deepspeed_shm_comm", ("zero=1",)),
        (pipeline_engine, "_INSTRUCTION_MAP", ("pipeline.stages=2",)),
        (pipeline_engine, "get_tied_weights_and_groups", ("pipeline.stages=2",)),
    ],
)
def test_a_patch_of_the_engine_that_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, room: Any, attribute: str, words: tuple[str, ...]
) -> None:
    (name,) = (name for name in room.PATCHES if name.endswith(attribute))
    gone = replace(room.PATCHES[name], attribute="_gone", optional=False)
    monkeypatch.setitem(room.PATCHES, name, gone)
    before = places()
    with pytest.raises(
        DoesNotFit, match=f"_gone is replaced because {room.PATCHES[name].reason}; in deepspeed"
    ):
        rehearse(plan(*words), 0)
    assert places() == before


def callables() -> dict[tuple[str, str], Any]:
    """Every function and class of the libraries that a rehearsal touches, and of their classes that it may patch."""
    actual: dict[tuple[str, str], Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("torch", "deepspeed", "transformers", "accelerate"):
            actual |= {(name, key): each for key, each in list(vars(module).items()) if _patched(each)}
    classes = {each for each in actual.values() if inspect.isclass(each)}
    for each in classes:
        if issubclass(each, (torch.nn.Module, torch.Tensor)) or each.__module__.startswith("deepspeed"):
            name = f"{each.__module__}.{each.__qualname__}"
            actual |= {(name, key): value for key, value in vars(each).items() if _patched(value)}
    return actual


def _patched(value: Any) -> bool:
    return inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, property)


def state() -> dict[str, Any]:
    """What else of the process a rehearsal must leave alone."""
    import os

    from deepspeed.utils import groups

    return {
        "environment": dict(os.environ),
        "initialized": dist.is_initialized(),
        "cuda": torch.cuda.is_initialized(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "modes": torch._C._len_torch_dispatch_stack(),
        "hook": sys.excepthook,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "groups": {name: each for name, each in vars(groups).items() if not callable(each)},
    }


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which a rehearsal raises in the middle of its first backward."""

    def put() -> None:
        import deepspeed

        def fails(self: Any, *args: Any, **options: Any) -> None:
            raise ArithmeticError("out of luck")

        monkeypatch.setattr(deepspeed.DeepSpeedEngine, "backward", fails)

    return put


@pytest.mark.parametrize("fails", [False, True], ids=["done", "raised"])
@pytest.mark.parametrize(
    "words", [("zero=2",), ("zero=3",), ("zero=1", "hardware=h100-sxm"), ("pipeline.stages=2",)], ids=",".join
)
def test_all_is_as_it_was_after_a_rehearsal(
    broken: Callable[[], None], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], fails: bool
) -> None:
    rehearse(plan(*words), 0)  # what is imported once and kept is now imported
    if fails:
        broken()
    before, around = callables(), state()
    if fails:
        with pytest.raises(ArithmeticError, match="out of luck") as caught:
            rehearse(plan(*words), 1)
        assert caught.value.rehearsed == (1, (0, "backward", 0))  # type: ignore[attr-defined]
    else:
        rehearse(plan(*words), 1)
    after = callables()
    assert [key for key in before if after.get(key) is not before[key]] == []
    assert state() == around
    x = torch.arange(6.0).reshape(2, 3).requires_grad_()
    layer = torch.nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(1.0)
    layer(x).sum().backward()
    assert layer(x).flatten().tolist() == [7.0, 25.0]
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0] * 3] * 2
    assert type(layer.double().weight.data) is torch.Tensor


def test_no_socket_is_opened_and_no_gpu_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    for words in (("zero=3",), ("zero=2", "hardware=h100-sxm")):
        assert rehearse(plan(*words, size=1000), 999)[0].tree()["peak"]["bytes"] > 0


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def values() -> Iterator[KnownValues]:
    """Fake tensors whose values may be known, in a fake group of two."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with Fakes() as fakes:
            yield fakes.values
    finally:
        dist.destroy_process_group()


def test_positions_and_masks_are_known(values: KnownValues) -> None:
    mask = torch.ones(2, 5, dtype=torch.int64)
    assert bool(mask.all())
    mask[1, :2] = 0
    assert not bool(mask.all())
    assert int(mask.sum()) == 8
    positions = (mask.cumsum(dim=-1) - 1).clamp_(min=0)
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert torch.arange(7)[2:5].tolist() == [2, 3, 4]
    assert torch.tensor([3, 5]).max().item() == 5
    assert torch.equal(positions, positions.clone())
    assert not torch.equal(positions, positions + 1)


def test_a_write_through_a_view_is_a_write_to_what_it_views(values: KnownValues) -> None:
    whole = torch.zeros(3, 4, dtype=torch.int64)
    whole[1].add_(7)
    whole.view(-1)[-1] = 9
    assert whole.tolist() == [[0, 0, 0, 0], [7, 7, 7, 7], [0, 0, 0, 9]]


def test_what_a_model_chose_is_unknown(values: KnownValues) -> None:
    logits = torch.randn(2, 8)
    chosen = logits.argmax(dim=-1)
    assert values.value(chosen) is None
    assert chosen.tolist() == [UNKNOWN[False]] * 2
    assert (logits.sum().item(), (logits > 0).all().item()) == (UNKNOWN[True], False)
    assert values.value(torch.randint(1, 9, (4,))) is None


def test_an_unknown_that_is_written_makes_every_alias_unknown(values: KnownValues) -> None:
    tokens = torch.full((2, 6), 5)
    row, column, apart = tokens[0], tokens[:, 3], tokens.clone()
    assert row.tolist() == [5] * 6
    column.copy_(torch.randn(2, 8).argmax(dim=-1))
    for each in (tokens, row, column, tokens[1:]):
        assert values.value(each) is None
    assert apart.tolist() == [[5] * 6] * 2


def test_a_collective_forgets_what_it_was_given(values: KnownValues) -> None:
    sent, kept = torch.tensor([3, 4]), torch.tensor([5])
    view = sent[1:]
    dist.all_reduce(sent)
    assert values.value(sent) is values.value(view) is None
    assert kept.tolist() == [5]


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


REHEARSED = (*TINY, *TRAIN, "world=rehearsed")


@pytest.mark.parametrize("words", [("zero=2",), ("zero=3",), ("mode=infer",)], ids=",".join)
def test_a_rehearsal_leaves_a_record_of_what_it_measured_and_nulls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    sizes = ("world.size=4", "generation.max_new_tokens=3", f"hydra.run.dir={tmp_path}/out")
    assert main([*REHEARSED, *words, *sizes]) == 0
    left = record_file.read(tmp_path / "out")
    assert (left["status"], left["world"]["kind"], left["world"]["size"]) == ("complete", "rehearsed", 4)
    assert left["world"]["verified"] is None
    stood_for = [rank for each in left["ranks"] for rank in (*each["stands_for"], *each["bounds"])]
    assert sorted(stood_for) == [0, 1, 2, 3]
    for each in left["ranks"]:
        assert each["peak"]["bytes"] == sum(filter(None, each["peak"]["categories"].values())) > 0
        assert each["peak"]["categories"]["kernel"] is None
        assert set(each["allocator"].values()) == {None}
    assert left.get("performance") is None
    assert left.get("training", {}).get("losses", []) == left.get("training", {}).get("validation", []) == []
    engine = {"deepspeed.json"} if left["mode"] == "train" else set()
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        *("record.json", "config.yaml", "trace"),
        *engine,
    }
    assert {int(each.stem.partition("-")[2]) for each in (tmp_path / "out" / "trace").iterdir()} == {
        each["rank"] for each in left["ranks"]
    }
    assert str(tmp_path / "out/record.json") in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refusal of `words` is."""
    assert main(list(words)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "world.size=null: world=rehearsed needs world.size=, the ranks to rehearse"),
        (
            ("world.size=4", "ledger=off"),
            "ledger=off: a rehearsal measures with the exact ledger; use ledger=exact",
        ),
        (
            ("world.size=4", "ledger=phases"),
            "ledger=phases: a rehearsal measures with the exact ledger; use ledger=exact",
        ),
        (
            ("world.size=4", "train.resume=."),
            "train.resume=.: a rehearsal begins with the first step; leave it out",
        ),
    ],
    ids=lambda value: value.partition("=")[0] if isinstance(value, str) else None,
)
def test_what_cannot_be_rehearsed_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    assert refused(capsys, *REHEARSED, *words, f"hydra.run.dir={tmp_path}/out") == f"harness: {said}\n"
    assert not (tmp_path / "out").exists()


def test_a_batch_that_does_not_fit_is_refused_as_in_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("world.size=4", "train.batch=6")
    said = refused(capsys, *REHEARSED, *words)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert said == refused(capsys, *TINY, *TRAIN, *words)
    assert said.startswith("harness: train.batch=6: ")


def test_a_rehearsal_under_torchrun_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    said = refused(capsys, *REHEARSED, "world.size=4", f"hydra.run.dir={tmp_path}/out")
    assert said == "harness: world=rehearsed: one process rehearses any world; start it without torchrun\n"
    assert not (tmp_path / "out").exists()


def test_a_refusal_in_a_rehearsed_rank_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shape = ("world.size=2", "model.config.vocab_size=100")  # fewer than there are bytes
    said = refused(capsys, *REHEARSED, "zero=3", *shape, f"hydra.run.dir={tmp_path}/out")
    assert said.startswith("harness: model=tiny: the tokenizer has ")
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_for_a_gpu_is_unverified_and_in_its_allocators_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = ("hardware=h100-sxm", "world.size=8", "zero=3", f"hydra.run.dir={tmp_path}/out")
    assert main([*REHEARSED, *gpu]) == 0
    assert UNVERIFIED in capsys.readouterr().out
    left = record_file.read(tmp_path / "out")
    assert (left["world"]["device"], left["world"]["device_name"]) == ("cuda", "h100-sxm")
    assert left["world"]["verified"] == UNVERIFIED == "not verified on this hardware"
    assert left["world"]["memory"] == 81_089 * 2**20  # what torch sees on it, and not the vendor's 80 GB
    (books,) = left["ranks"]
    holdings = books["peak"]["holdings"]  # parameters have parts of a block that they share
    sizes = [holding["bytes"] for holding in holdings if holding["category"] != "parameters"]
    sizes += [sum(holding["bytes"] for holding in holdings)]
    sizes += [size for category in books["categories"].values() for size in category.values()]
    sizes += [phase[key] for phase in books["phases"] for key in ("peak", "end", "saved")]
    assert BLOCK == 512
    assert sum(sizes) > 0
    assert [size for size in sizes if size % BLOCK] == []


@pytest.mark.parametrize(
    ("stage", "offload", "accumulation"),
    [
        *((1, "optimizer", 1), (2, "optimizer", 2), (3, "optimizer", 1), (3, "all", 2)),
        *(
            pytest.param(*others, marks=pytest.mark.exhaustive)
            for others in ((1, "optimizer", 2), (2, "optimizer", 1), (3, "optimizer", 2), (3, "all", 1))
        ),
    ],
)
def test_what_is_offloaded_is_on_the_host_and_not_on_the_gpu(
    stage: int, offload: str, accumulation: int
) -> None:
    words = (f"zero={stage}", f"train.accumulation={accumulation}", "hardware=h100-sxm")
    kept, _ = rehearse(plan(*words), 0)
    record, _ = rehearse(plan(*words, f"zero.offload={offload}"), 0)
    assert kept.categories["optimizer"].end
    assert record.categories["optimizer"].end == 0
    persistent = "zero.persistence_threshold=0"  # or small parameters stay, offloaded or not
    whole, _ = rehearse(plan(*words, f"zero.offload={offload}", persistent), 0)
    on_gpu = whole.categories["parameters"].end
    buffers = 512 * 2  # rotary frequencies, which nothing shards
    assert (on_gpu == buffers) == (offload == "all")


@pytest.mark.parametrize(
    "words",
    [
        ("zero=1",),
        ("zero=3", "zero.persistence_threshold=0"),
        ("zero=1", "checkpointing=full"),
        ("zero=1", "checkpointing=selective"),
        ("zero=0", "pipeline.stages=2", "train.accumulation=3"),
    ],
    ids=",".join,
)
def test_activations_of_a_gpu_wait_on_the_host_and_are_copied_there_once(words: tuple[str, ...]) -> None:
    words = (*words, "hardware=h100-sxm", "train.sequence=128")
    kept, _ = rehearse(plan(*words), 0)
    record, _ = rehearse(plan(*words, "checkpointing.offload=cpu"), 0)
    assert kept.on_host is None
    assert record.on_host is not None
    assert record.on_host.pinned is not None
    assert record.on_host.activations <= record.on_host.pinned < 2 * record.on_host.activations
    for name in ("parameters", "gathered", "gradients", "optimizer", "inputs"):
        assert record.categories[name] == kept.categories[name]
    before, after = (each.categories["activations"].peak or 0 for each in (kept, record))
    assert after < before
    assert kept.forwards is not None
    assert record.forwards is not None
    assert record.forwards.alive == kept.forwards.alive == (2 if "pipeline.stages=2" in words else 1)
    moved = {
        (row.phase, row.operation): row.bytes
        for row in record.traffic or ()
        if row.step == 0 and row.micro_batch == 0 and row.link == "pcie"
    }
    there, back = moved["forward", "device-to-host"], moved["backward", "host-to-device"]
    assert there * record.forwards.alive == record.on_host.activations == sum(record.forwards.stashes)
    assert back >= there  # each operator that keeps a tensor gets it back for itself


def test_no_device_holds_a_zero_3_model_whole() -> None:
    words = ("zero=3", "hardware=h100-sxm", "model=small", "zero.reduce_bucket_size=100000")
    record, done = rehearse(plan(*words, size=64), 0)
    setup = next(phase for phase in record.tree()["phases"] if phase["phase"] == "setup")
    assert setup["peak"] < 2 * done.tree()["model"]["parameters"]  # bytes of all of them in bf16
