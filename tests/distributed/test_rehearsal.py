"""A run and its rehearsal hold the same bytes: every category's peak and end and every phase of it, on every rank;
and do the same work: operations, and bytes read and written.

Every ZeRO stage meets every offload it may have, and every stage both precisions and both counts of accumulation. What
else decides bytes varies by stage, one thing at a time: buckets smaller than a parameter, validation and checkpoints,
eager attention and the end of what is seen, nothing or all kept whole, tied weights and learned positions, layers that
are recomputed, each knob that makes a run fit, a world that divides nothing evenly. Generation has every cache, padded
or not, and layers with a window or a state, on one rank where no second is needed; layers that ranks share; and
requests that enter and leave, as many pages as they need, fewer, or in parts. The exhaustive cells are the rest of the
products.

What an allocator saw (`kernel`, and a peak with it) is no
storage and not compared; a rehearsal has none.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.config.compose import compose
from harness.config.load import load
from harness.model.plan import Plan
from harness.model.resolve import resolve
from harness.rehearsal.all_ranks import rehearse as rehearse_all
from harness.rehearsal.one_rank import rehearse
from harness.rehearsal.representatives import Representative, representatives_of
from tests.chats import chatter, conversations
from tests.distributed.conftest import NARROW, PRECISION, Launch, complete

Words = tuple[str, ...]
RankRecord = dict[str, Any]

TINY = ("hardware=cpu", *NARROW, "model.config.num_hidden_layers=2")
TRAIN = (
    *("mode=train", "train.sequence=32", "train.micro_batch=1", "train.steps=3"),
    *("train.validate_every=0", "train.export=false"),
)
INFER = ("mode=infer", "generation.max_new_tokens=5", "generation.batch=2", "generation.stop_at_eos=false")
GPT2 = (
    "hardware=cpu",
    "model=gpt2",
    *(
        f"model.config.{key}"
        for key in ("n_layer=2", "n_embd=64", "n_head=2", "n_positions=64", "vocab_size=500")
    ),
    *("model.config.bos_token_id=1", "model.config.eos_token_id=1"),
)
UNEVEN = ("model.config.vocab_size=1000", "model.config.intermediate_size=689")
LONGER = "generation.max_new_tokens=12"
"""More than the first and the last that a rehearsal computes."""
PROMPTS = ["a", "longer", "the longest of them", "b", "cd"]

OFFLOADS = {0: ("none",), 1: ("none", "optimizer"), 2: ("none", "optimizer"), 3: ("none", "optimizer", "all")}
STAGES = tuple(OFFLOADS)
ZERO: list[Words] = [("zero=0",), ("zero=1",), ("zero=2",), ("zero=3", "zero.persistence_threshold=1000")]
"""A stage's words: under ZeRO-3 norms alone are kept whole, as by default in a model that is not so narrow."""
NUMBERS = (("precision=bf16", "train.accumulation=2"), ("precision=fp32", "train.accumulation=1"))
PRODUCT = [
    (*TINY, *TRAIN, *ZERO[stage], f"zero.offload={offload}", *numbers)
    for stage in STAGES
    for offload in OFFLOADS[stage]
    for numbers in NUMBERS
]
MATRIX = [
    (*TINY, *TRAIN, *ZERO[stage], f"zero.offload={offload}", *NUMBERS[(stage + index) % 2])
    for stage in STAGES
    for index, offload in enumerate(OFFLOADS[stage])
]
SMALL_BUCKETS = ("zero.reduce_bucket_size=10000", "zero.allgather_bucket_size=10000")
VARIED = (
    (*SMALL_BUCKETS, "precision=fp32", "train.accumulation=2"),
    (
        *("train.steps=2", "train.validate_every=1", "train.validation_batches=2"),
        *("train.save_every=1", "train.export=true"),
    ),
    ("train.steps=4", "train.micro_batch=2", "train.clip=0", "model.attention=eager"),
)
BY_STAGE = [(*TINY, *TRAIN, *ZERO[stage], *words) for stage in STAGES for words in VARIED]
SHARDED_WHOLLY = [
    (*TINY, *TRAIN, "zero=3", "zero.persistence_threshold=0", "zero.prefetch_bucket_size=0"),
    (*TINY, *TRAIN, "zero=3", "zero.persistence_threshold=0", "zero.reduce_bucket_size=10000"),
    (*TINY, *TRAIN, "zero=3", "zero.persistence_threshold=100000000"),
]
UNCLIPPED = "train.clip=0"
"""BF16_Optimizer looks whether to clip, and a rehearsed norm has no value: the work, and no byte held, hangs on it."""
PIPELINED = [
    (*TINY, *TRAIN, "pipeline.stages=2", f"zero={stage}", *words, f"train.accumulation={accumulation}")
    for stage, accumulation, *words in (
        (0, 1, "precision=fp32"),
        (0, 3, "precision=bf16", UNCLIPPED),
        (1, 1, "precision=bf16"),
        (1, 3, "precision=fp32"),
    )
]
VALIDATED = ("train.steps=2", "train.validate_every=1", "train.validation_batches=2")
CHUNKED = [
    (*TINY, *TRAIN, *ZERO[0], "loss=chunked", "precision=bf16", UNCLIPPED, *VALIDATED),
    (*TINY, *TRAIN, *ZERO[1], "loss=chunked", "precision=fp32", "loss.chunk=5"),
    (*TINY, *TRAIN, *ZERO[2], "loss=chunked", "precision=fp32", "train.accumulation=2"),
    (*TINY, *TRAIN, *ZERO[3], "loss=chunked", "precision=bf16", "model.config.tie_word_embeddings=true"),
    (
        *TINY,
        *TRAIN,
        "pipeline.stages=2",
        "loss=chunked",
        "precision=fp32",
        "train.accumulation=2",
        *VALIDATED,
    ),
]
OPTIMIZERS = [
    (*TINY, *TRAIN, *words.split())
    for words in (
        "zero=0 optimizer=adafactor precision=bf16",
        "zero=0 optimizer=muon precision=fp32 train.accumulation=2",
        "zero=1 optimizer=muon precision=bf16 train.clip=0 train.accumulation=2",
        "zero=2 optimizer=muon precision=fp32 train.clip=0",
        *(
            "zero=3 optimizer=muon precision=fp32 train.clip=0 zero.persistence_threshold=0 "
            f"model.config.intermediate_size=177 zero.reduce_bucket_size={size}"
            for size in (150_000, 40_000)  # messages of turn after turn; turns that differ between ranks
        ),
        "zero=1 optimizer=adamw_8bit precision=fp32",
        "zero=2 optimizer=lion precision=bf16",
        "zero=3 optimizer=sgd optimizer.momentum=0.9 precision=bf16",
        "zero=2 optimizer.state=bf16 precision=bf16",
        "zero=3 optimizer.state=bf16 precision=bf16 train.accumulation=2",
    )
]
IN_BACKWARD = [
    (*TINY, *TRAIN, *ZERO[0], UNCLIPPED, "precision=fp32", "train.optimizer_in_backward=true", *words.split())
    for words in (
        "optimizer=adamw train.steps=2 train.validate_every=1 train.save_every=1 train.export=true",
        "optimizer=lion checkpointing=full loss=chunked model.config.tie_word_embeddings=true",
    )
]
FOUR_HEADS = "model.config.num_key_value_heads=4"
"""A token's keys fill a group of 64, which is what fewer bits come in."""
QUANTIZED = ("generation.cache=quantized", "generation.prompts=PROMPTS")
WINDOW = (
    *("model.config.model_type=mistral", "+model.config.sliding_window=16"),
    *("generation.prompts=PROMPTS", "generation.max_new_tokens=16"),
)
MIXED = (
    *("model.config.model_type=gemma3_text", "+model.config.sliding_window=16", "+model.config.head_dim=16"),
    "+model.config.layer_types=[sliding_attention,full_attention]",
    *("generation.prompts=PROMPTS", "generation.max_new_tokens=16"),
)
STATES = (
    *("model.config.model_type=qwen3_next", "+model.config.layer_types=[linear_attention,full_attention]"),
    *("+model.config.num_experts=4", "+model.config.num_experts_per_tok=2"),
    *("+model.config.moe_intermediate_size=32", "+model.config.shared_expert_intermediate_size=32"),
    *("+model.config.linear_num_value_heads=4", "+model.config.linear_num_key_heads=2"),
    *("+model.config.linear_key_head_dim=16", "+model.config.linear_value_head_dim=16"),
    *("generation.prompts=PROMPTS", LONGER),
)
STAGES_OF_4 = ("hardware=cpu", *TRAIN, "pipeline.stages=4", "train.accumulation=5", "precision=bf16")
TWO_BY_TWO = (*TINY, *UNEVEN, *TRAIN, "pipeline.stages=2", "train.accumulation=2")
EVERYTHING = ("train.steps=2", "train.validate_every=1", "train.save_every=1", "train.export=true")
CONTINUED = ("generation.batching=continuous", "generation.cache=paged", "generation.count=7")
ODD = ("model.config.vocab_size=385", "model.config.intermediate_size=689")
SHARED = ("generation.tensor_parallel=2", "generation.prompts=PROMPTS", LONGER)
RELAYED = ("pipeline.stages=2", "generation.prompts=PROMPTS", "generation.batch=3")
TIED = [(*GPT2, *TRAIN, *ZERO[stage]) for stage in STAGES]
MODES = ("checkpointing=selective", "checkpointing=full")
RECOMPUTED = [
    *((*TINY, *TRAIN, f"zero={stage}", MODES[stage % 2]) for stage in (0, 1, 2)),
    *((*GPT2, *TRAIN, "zero=2", "model.attention=eager", mode) for mode in MODES),
    *(
        (*TINY, *TRAIN, "zero=3", "zero.persistence_threshold=0", "+model.config.attention_bias=true", mode)
        for mode in MODES
    ),
    (*TINY, *TRAIN, "pipeline.stages=2", "train.accumulation=4", "checkpointing=full"),
    (*TINY, *TRAIN, "train.validate_every=1", "checkpointing=full", "checkpointing.layers=[1]"),
    (*TINY, *TRAIN, "precision=fp32", "checkpointing=selective", "checkpointing.every=2"),
]
OFFLOADED = [
    (*TINY, *TRAIN, *words, "checkpointing.offload=cpu")
    for words in (
        ("zero=0", "checkpointing=full"),
        ("zero=1", "train.accumulation=2"),
        ("zero=2", "precision=bf16", "checkpointing=full", "checkpointing.layers=[1]"),
        ("zero=3", "zero.persistence_threshold=0", "train.validate_every=1"),
        ("pipeline.stages=2", "train.accumulation=3", "precision=fp32"),
        ("zero=3", "zero.persistence_threshold=0", "checkpointing=full", "precision=bf16"),
        ("pipeline.stages=2", "zero=0", "train.accumulation=3", "checkpointing=full"),
        ("zero=1", "checkpointing=selective"),
        *(
            (*stage, "+model.config.attention_bias=true", "checkpointing=selective", "checkpointing.every=2")
            for stage in (("zero=3", "zero.persistence_threshold=0"), ("pipeline.stages=2", "zero=0"))
        ),
    )
]
"""On a CPU the copies are made too, and lie in the same memory."""
ADAPTED = [
    (*TINY, *TRAIN, *ZERO[0], "adapter=lora"),
    (*TINY, *TRAIN, *ZERO[1], "adapter=lora", "zero.offload=optimizer", "checkpointing=full"),
    (*TINY, *TRAIN, *ZERO[2], "adapter=dora", "precision=bf16", *EVERYTHING),
    (*TINY, *TRAIN, *ZERO[3], "adapter=lora", *EVERYTHING, "adapter.merge=true"),
    (*TINY, *TRAIN, "pipeline.stages=2", "adapter=lora", "train.accumulation=2", *EVERYTHING),
    (*GPT2, *TRAIN, *ZERO[2], "adapter=lora", "adapter.targets=[c_attn]", "adapter.dropout=0.1"),
    (*TINY, *TRAIN, *ZERO[0], "adapter=qlora"),
    (*TINY, *TRAIN, *ZERO[2], "adapter=qlora", "precision=bf16", *EVERYTHING),
    (*GPT2, *TRAIN, *ZERO[1], "adapter=qlora", "zero.offload=optimizer", "checkpointing=full"),
]
GENERATION = [
    *(
        (*TINY, *INFER, f"generation.cache={c}", "generation.prompts=PROMPTS")
        for c in ("dynamic", "static", "none")
    ),
    *((*TINY, *INFER, f"generation.cache={c}", "precision=fp32") for c in ("dynamic", "static", "none")),
    (
        *TINY,
        *INFER,
        "generation.sample=true",
        "generation.top_k=5",
        "generation.top_p=0.9",
        "generation.temperature=0.5",
    ),
    (*TINY, *INFER, "generation.sample=true", "generation.prompts=PROMPTS", "generation.cache=static"),
    (*TINY, *INFER, "model.attention=eager", "generation.prompts=PROMPTS"),
    (*TINY, *INFER, "generation.sample=true", "generation.batch=1"),
    *(
        (*TINY, *INFER, f"generation.cache={c}", "generation.prompts=PROMPTS", LONGER)
        for c in ("dynamic", "static", "none")
    ),
    (*TINY, *INFER, "generation.sample=true", LONGER),
    (*GPT2, *INFER, "generation.prompts=PROMPTS"),
    (*TINY, *INFER, *CONTINUED, "generation.lengths=skewed", LONGER),
    (*TINY, *INFER, *CONTINUED, "generation.pages=9", LONGER, "precision=fp32"),
    (*TINY, *INFER, *CONTINUED, "generation.batch_tokens=20", "model.attention=eager"),
    *((*TINY, *INFER, *SHARED, f"generation.cache={c}") for c in ("dynamic", "static", "none", "quantized")),
    (
        *(*TINY, *INFER, *SHARED, "precision=fp32", "generation.sample=true", "model.attention=eager"),
        "generation.config.no_repeat_ngram_size=3",
    ),
    (*TINY, *INFER, *QUANTIZED),
    (*TINY, *INFER, *QUANTIZED, LONGER, "precision=fp32"),
    (
        *TINY,
        *INFER,
        *QUANTIZED,
        FOUR_HEADS,
        "generation.cache_bits=4",
        "generation.batch=5",
        "generation.max_new_tokens=120",
    ),
    (*TINY, *INFER, *QUANTIZED, FOUR_HEADS, "generation.cache_bits=2", "precision=fp32"),
    *((*TINY, *INFER, *WINDOW, f"generation.cache={c}") for c in ("dynamic", "static")),
    (*TINY, *INFER, *STATES),
    (*TINY, *INFER, *STATES, "generation.cache=static"),
    *((*TINY, *INFER, *MIXED, f"generation.cache={c}") for c in ("dynamic", "static")),
    *((*TINY, *INFER, *RELAYED, f"generation.cache={c}") for c in ("dynamic", "static", "none")),
    (*TINY, *INFER, *RELAYED, "generation.cache=quantized"),
    (*TINY, *INFER, *RELAYED, *WINDOW),
    (
        *(*TINY, *INFER, *RELAYED, "pipeline.groups=1", "generation.sample=true", "precision=fp32"),
        *("generation.config.repetition_penalty=1.2", "generation.config.min_p=0.01"),
    ),
    (*TINY, *INFER, *RELAYED, LONGER),
]
PARALLEL = {"pipeline.stages=2", "generation.tensor_parallel=2"}
PADDED = (
    "data=text",
    "data.path=SHORT",
    "data.packing=false",
    "data.validation=0.2",
    "train.validation_batches=2",
)
CHAT = ("data=chat", "data.path=CHAT", "data.tokenizer=CHATTER")
UNPACKED = [
    (*TINY, *TRAIN, "zero=0", *PADDED, "model.attention=eager"),
    (*TINY, *TRAIN, "zero=1", *CHAT, "train.accumulation=2"),
    (*TINY, *TRAIN, *ZERO[2], *PADDED, "train.accumulation=2", "train.validate_every=1", "train.steps=2"),
    (*TINY, *TRAIN, *ZERO[3], *CHAT, "data.packing=false"),
    (*TINY, *TRAIN, "pipeline.stages=2", "zero=1", *PADDED, "train.accumulation=2", "train.validate_every=1"),
    (*TINY, *TRAIN, "pipeline.stages=2", "zero=0", UNCLIPPED, *CHAT, "train.accumulation=2"),
]
COMBINED = [
    (*TINY, *TRAIN, *words.split(), *data)
    for words, data in (
        ("zero=1 loss=chunked optimizer=adamw_8bit checkpointing=full precision=bf16", ()),
        (f"{' '.join(ZERO[3])} loss=chunked adapter=lora checkpointing=full checkpointing.offload=cpu", ()),
        (
            "zero=2 loss=chunked optimizer=sgd optimizer.state=bf16 precision=bf16 train.accumulation=2",
            PADDED,
        ),
        ("pipeline.stages=2 loss=chunked adapter=dora checkpointing.offload=cpu train.accumulation=2", CHAT),
        ("zero=0 optimizer=muon checkpointing.offload=cpu precision=bf16", PADDED),
        (
            "zero=2 optimizer=lion adapter=lora zero.offload=optimizer precision=fp32",
            (*CHAT, "data.packing=false"),
        ),
        (
            "zero=1 optimizer=muon train.clip=0 adapter=lora loss=chunked checkpointing=selective precision=fp32",
            (),
        ),
    )
]
"""Three and more of what people turn to make it fit, at once."""
KNOBS = [*COMBINED, *CHUNKED, *UNPACKED, *OPTIMIZERS, *OFFLOADED, *ADAPTED]
"""What people turn to make it fit, together and one by one."""

EACH_CHANGE = {
    *COMBINED,
    CHUNKED[4],
    *(UNPACKED[number] for number in (2, 4)),
    *(OPTIMIZERS[number] for number in (0, 5, 10)),
    OFFLOADED[3],
    *(ADAPTED[number] for number in (3, 7)),
}
"""Those of `KNOBS` that are not exhaustive: each knob, and each stage of ZeRO with some of them."""

CELLS: dict[int, list[Words]] = {
    1: [*IN_BACKWARD, *(words for words in GENERATION if not PARALLEL & {*words})],
    2: [
        *(*MATRIX, *BY_STAGE, *SHARDED_WHOLLY, *TIED, *PIPELINED, *RECOMPUTED, *KNOBS),
        *(words for words in GENERATION if PARALLEL & {*words}),
        *GENERATION[:3],  # replicas, of which one has more prompts
    ],
    4: [
        (*STAGES_OF_4, "zero=0", UNCLIPPED, "model.config.num_hidden_layers=7", "pipeline.split=[1,2,2,2]"),
        (*STAGES_OF_4, "zero=1", "model.config.tie_word_embeddings=true", *EVERYTHING),
        (*TWO_BY_TWO, "zero=1"),
        (*TWO_BY_TWO, "zero=1", "zero.offload=optimizer", "precision=fp32"),
        (*TWO_BY_TWO, "zero=0", UNCLIPPED, *EVERYTHING),
        (*TINY, *INFER, *RELAYED, "pipeline.groups=3"),
        (*TINY, *INFER, *SHARED, *UNEVEN),
        (*TINY, *INFER, *SHARED, "pipeline.stages=2", *ODD, "generation.cache=static"),
        (*TINY, *INFER, *SHARED, "model.config.tie_word_embeddings=true", *ODD),
        ("hardware=cpu", *INFER, *RELAYED, "pipeline.stages=4", LONGER),
        ("hardware=cpu", *INFER, *RELAYED, "pipeline.stages=4", "generation.stop_at_eos=true"),
        (*TINY, *INFER, "pipeline.stages=2", "generation.prompt=[x]", "generation.max_new_tokens=1"),
    ],
    3: [(*TINY, *UNEVEN, *TRAIN, *ZERO[stage], "train.accumulation=2") for stage in STAGES]
    + [(*TINY, *UNEVEN, *TRAIN, "zero=3", "zero.offload=all", "zero.persistence_threshold=0")]
    + [
        (
            *TINY,
            *UNEVEN,
            *TRAIN,
            "zero=3",
            "zero.persistence_threshold=0",
            "train.steps=2",
            "train.export=true",
        )
    ]
    + [(*TINY, *UNEVEN, *TRAIN, *SMALL_BUCKETS, "zero=1", "train.sequence=64")]
    + [(*TINY, *INFER, "generation.prompts=PROMPTS")],
}

FEWER_TOKENS_OR_ANOTHER_CACHE = {
    *((f"generation.cache={c}", "generation.prompts=PROMPTS") for c in ("static", "none")),
    *((f"generation.cache={c}", "precision=fp32") for c in ("static", "none")),
    (*SHARED, "generation.cache=none"),
    (*QUANTIZED, LONGER, "precision=fp32"),
    (*QUANTIZED, FOUR_HEADS, "generation.cache_bits=2", "precision=fp32"),
    *((*RELAYED, f"generation.cache={c}") for c in ("dynamic", "none")),
}

EXHAUSTIVE = {
    *PRODUCT,
    *(TIED[stage] for stage in (0, 2)),
    *(RECOMPUTED[number] for number in (0, 2, 4, 5)),
    *(words for words in KNOBS if words not in EACH_CHANGE),
    *(CELLS[3][stage] for stage in (0, 2)),
    *(CELLS[4][number] for number in (2, 8, 10)),
    *(words for words in GENERATION if words[len(TINY) + len(INFER) :] in FEWER_TOKENS_OR_ANOTHER_CACHE),
    *(words for index, words in enumerate(BY_STAGE) if index % 4 not in (0, 3)),
    *(
        words
        for words in GENERATION
        if "generation.sample=true" in words and "pipeline.stages=2" not in words
    ),
} - {*MATRIX}


def cells(*counts: int, keeps: Callable[[Words], bool] = lambda words: True) -> list[Any]:
    """The cells of so many ranks that `keeps` keeps, as pytest's parameters."""
    return [
        pytest.param((ranks, words), marks=[pytest.mark.exhaustive] if words in EXHAUSTIVE else [])
        for ranks in counts
        for words in CELLS[ranks]
        if keeps(words)
    ]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of PROMPTS, whose lengths differ within a batch."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    (file.parent / "SHORT").mkdir()
    for number in range(40):
        (file.parent / "SHORT" / f"{number}.txt").write_text("a" * (4 + number % 20))
    (file.parent / "CHAT").write_text(conversations(200))
    chatter().save_pretrained(file.parent / "CHATTER")
    return file


@pytest.fixture(scope="module")
def run(launch: Launch, prompts: Path) -> Callable[[int, Words], RankRecord]:
    """A function of a number of ranks and words to the record of that run."""
    return lambda ranks, words: complete(launch(*_placed(words, prompts), ranks=ranks))


def _placed(words: Words, prompts: Path) -> list[str]:
    files = {"PROMPTS": prompts, **{name: prompts.parent / name for name in ("SHORT", "CHAT", "CHATTER")}}
    parts = [word.partition("=") for word in words]
    return [f"{key}{sign}{files.get(value, value)}" for key, sign, value in parts]


def plan_of(words: Words, size: int, prompts: Path) -> Plan:
    """The plan of a rehearsal of `words` on `size` ranks."""
    requested = [PRECISION, *_placed(words, prompts), "world=rehearsed", f"world.size={size}"]
    return resolve(load(compose(requested)))


def phases_of(rank: RankRecord, steps: int = 3) -> dict[tuple[int, str, int], RankRecord]:
    """The phases of the first steps by place: a rehearsal reads no text, and may first enter them in another order."""
    phases = {(phase["step"], phase["phase"], phase["micro_batch"]): phase for phase in rank["phases"]}
    return {place: phase for place, phase in phases.items() if place[0] < steps}


def phase_memory(rank: RankRecord) -> dict[tuple[int, str, int], RankRecord]:
    """What `phases_of` says but for the bytes moved: of an uneven shard the last rank copies no padding."""
    moved = ("read", "written", "work")
    return {
        place: {key: figure for key, figure in phase.items() if key not in moved}
        for place, phase in phases_of(rank).items()
    }


def traffic_of(rank: RankRecord, steps: int = 3) -> list[RankRecord]:
    """What moves in the first steps, in the order of places."""
    rows = [each for each in rank["traffic"] if each["step"] < steps]
    return sorted(
        rows, key=lambda row: [row[key] for key in ("step", "phase", "micro_batch", "operation", "group")]
    )


def differences(real: RankRecord, rehearsed: RankRecord) -> list[tuple[Any, ...]]:
    """Where the two books differ: the place, the figure, the run's bytes and the rehearsal's."""
    actual: list[tuple[Any, ...]] = [
        (name, figure, bytes_, rehearsed["categories"][name][figure])
        for name, category in real["categories"].items()
        for figure, bytes_ in category.items()
        if rehearsed["categories"][name][figure] != bytes_
    ]
    ours, theirs = phases_of(real), phases_of(rehearsed)
    for place in ours.keys() | theirs.keys():
        left, right = ours.get(place), theirs.get(place)
        if left is None or right is None:
            actual.append((place, "is there", left is not None, right is not None))
        else:
            actual += [(place, key, left[key], right[key]) for key in left if left[key] != right[key]]
    sent, assumed = traffic_of(real), traffic_of(rehearsed)
    actual += [
        ("traffic", row, row in sent, row in assumed)
        for row in [*sent, *assumed]
        if (row in sent) != (row in assumed)
    ]
    return actual


def each_rank(actual: list[Representative]) -> Iterator[tuple[int, list[int]]]:
    """Every rank that stands for others, with those; and by itself each whose peak another one bounds."""
    for representative in actual:
        yield (
            representative.rank,
            [rank for rank in representative.equivalent_ranks if rank != representative.rank],
        )
        yield from ((rank, []) for rank in representative.bounds)


def name(cell: tuple[int, Words]) -> str:
    """A cell by what is its own."""
    ranks, words = cell
    common = {*TINY, *GPT2, *TRAIN, *INFER} - {"model=gpt2", "mode=train", "mode=infer"}
    own = [word.replace("model.config.", "").replace("=", ":") for word in words if word not in common]
    return ",".join([f"{ranks}-ranks", *own])


@pytest.mark.parametrize("cell", cells(*CELLS), ids=name)
def test_a_rehearsal_holds_the_bytes_of_the_run(
    run: Callable[[int, Words], RankRecord], prompts: Path, cell: tuple[int, Words]
) -> None:
    ranks, words = cell
    real, plan = run(ranks, words), plan_of(words, ranks, prompts)
    assert [rank_record["rank"] for rank_record in real["ranks"]] == list(range(ranks))
    for rank, alike in each_rank(representatives_of(plan)):
        rank_record = real["ranks"][rank]
        rehearsed, done = rehearse(plan, rank)
        assert differences(rank_record, rehearsed.tree()) == []
        assert rehearsed.tree()["on_host"] == rank_record["on_host"]
        assert rehearsed.peak.bytes == max(phase["peak"] for phase in phases_of(rank_record).values())
        assert done.tree()["model"] == real["model"]
        for other in alike:
            assert real["ranks"][other]["categories"] == rank_record["categories"]
            assert phase_memory(real["ranks"][other]) == phase_memory(rank_record)


@pytest.mark.parametrize("cell", cells(2, keeps=lambda words: words in CHUNKED), ids=name)
def test_the_books_of_a_loss_in_chunks_close(
    run: Callable[[int, Words], RankRecord], cell: tuple[int, Words]
) -> None:
    for rank in run(*cell)["ranks"]:
        assert rank["allocator"]["unattributed"] == 0
        assert sum(rank["peak"]["categories"].values()) == rank["allocator"]["peak"]


@pytest.mark.parametrize("cell", cells(3, 4), ids=name)
def test_a_rank_peaks_no_lower_than_those_it_bounds(
    run: Callable[[int, Words], RankRecord], prompts: Path, cell: tuple[int, Words]
) -> None:
    ranks, words = cell
    real = run(ranks, words)["ranks"]
    peaks = [max(phase["peak"] for phase in phases_of(rank_record).values()) for rank_record in real]
    actual = representatives_of(plan_of(words, ranks, prompts))
    assert sorted(
        rank
        for representative in actual
        for rank in {*representative.equivalent_ranks, *representative.bounds}
    ) == list(range(ranks))
    for representative in actual:
        assert all(peaks[rank] <= peaks[representative.rank] for rank in representative.bounds)


@pytest.mark.parametrize(
    "cell",
    cells(*CELLS, keeps=lambda words: {*RELAYED} <= {*words} or {*CONTINUED} <= {*words}),
    ids=name,
)
def test_a_rehearsal_says_of_the_kv_cache_what_the_run_says(
    run: Callable[[int, Words], RankRecord], prompts: Path, cell: tuple[int, Words]
) -> None:
    ranks, words = cell
    result = {"new_tokens", "unasked_tokens", "padding_tokens"}
    real = {key: figure for key, figure in run(ranks, words)["inference"].items() if key not in result}
    assert rehearse_all(plan_of(words, ranks, prompts), parallel=False)[1].tree()["inference"] == real
