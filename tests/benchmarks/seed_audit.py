"""What the text that this project grew from says of memory and compute, beside what the harness computes.

    python tests/benchmarks/seed_audit.py > profiles/seed-audit.md

Prints a page. Its figures come from rehearsals of LLaMA-2-70B, as the text takes it to be (64 heads of keys and values)
and as it is (8): from the ledger's bytes, from the operations and bytes counted in the operators that ran, and from
what ranks sent. Takes some minutes. `tests/rehearsal/test_seed_audit.py` holds the committed page against what is
computed anew.
"""

import platform
from collections.abc import Callable, Sequence
from functools import cache
from textwrap import fill
from typing import Any, NamedTuple

from harness.analysis.moves import transfers
from harness.analysis.moves.links_model import flow
from harness.analysis.moves.links_model import turn as link_turn
from harness.analysis.sweeps.batch import crossing
from harness.config.compose import compose
from harness.config.load import load
from harness.data.workload import lengths
from harness.model.plan import Plan
from harness.record import record_file
from harness.record.memory import Rank
from harness.rehearsal import one_rank
from harness.rehearsal.all_ranks import rehearse

GIB, LAYERS, HIDDEN, TOKENS = 2**30, 80, 8192, 4096
PARAMETERS = 68_976_648_192
"""Of the real model, which the test counts."""
ASSUMED, REAL = 64, 8
"""Heads of keys and values: as the text takes LLaMA-2-70B to have, and as it has."""


class Example(NamedTuple):
    """A worked example: what is said, a row for each figure (what, said, two that were computed), and what comes of it.

    `columns` are those two: for the model that is assumed and for the real one, where nothing else is said.
    """

    title: str
    said: str
    rows: list[Sequence[str]]
    verdict: str
    because: str
    columns: tuple[str, str] = ("the model it assumes", "the real model")


class Seen(NamedTuple):
    """A rehearsal: its largest KV cache in bytes, and work by phase: FLOPs, bytes read and written."""

    kv: int
    work: dict[str, tuple[int, int, int]]


AROUND = ("world=rehearsed", "hardware=cpu", "precision=bf16", "model.attention=sdpa")


@cache
def seen(*words: str) -> Seen:
    """What a rehearsal of these sees on its one rank."""
    requested = (*AROUND, "world.size=1", "ledger.steps=1", *words)
    ranks, done = rehearse(Plan.of(load(compose(requested))))
    work: dict[str, tuple[int, int, int]] = {}
    for phase in ranks[0].phases:
        if phase.flops is not None:
            before = work.get(phase.phase, (0, 0, 0))
            figures = phase.flops, phase.read or 0, phase.written or 0
            work[phase.phase] = tuple(map(sum, zip(before, figures, strict=True)))  # type: ignore[assignment]
    kv = done.inference.kv_reserved if done.inference else 0
    return Seen(kv or 0, work)


def generated(
    heads: int, prompt: int, new: int = 2, batch: int = 1, kind: str = "static", layers: int = LAYERS
) -> Seen:
    """LLaMA-2-70B with so many heads of keys and values, or a cut of it, generating `new` tokens after `prompt`."""
    requested = {
        "batch": batch,
        "count": batch,
        "prompt_length": prompt,
        "max_new_tokens": new,
        "cache": kind,
    }
    shape = {"num_key_value_heads": heads, "num_hidden_layers": layers, "max_position_embeddings": 2 * TOKENS}
    return seen(
        *("mode=infer", "model=llama2-70b", "generation.stop_at_eos=false"),
        *(f"generation.{key}={value}" for key, value in requested.items()),
        *(f"model.config.{key}={value}" for key, value in shape.items()),
    )


def kv(heads: int, batch: int) -> int:
    """Bytes of the cache of `batch` sequences of 4,096 tokens, without the 8 bytes a layer of its own counter."""
    return generated(heads, TOKENS - 1, batch=batch).kv - 8 * LAYERS


def forward(heads: int, tokens: int) -> int:
    """FLOPs of one forward over a sequence of so many tokens, of which the last's logits are wanted."""
    return generated(heads, tokens, new=1).work["prefill"][0]


def projections(heads: int, tokens: int = 1) -> int:
    """FLOPs that make keys and values, of all layers: what fewer heads save tells what all of them take."""
    apart = forward(ASSUMED, 128) - forward(REAL, 128)
    return apart * heads // (ASSUMED - REAL) * tokens // 128


def step(context: int, batch: int = 1) -> tuple[int, int, int]:
    """FLOPs, bytes read and bytes written of one decoding step of the real model with a cache that is full "
    "after it."""
    return generated(REAL, context - 1, batch=batch).work["decode"]


def peaks(*words: str) -> dict[str, int]:
    """Each category's own peak in a rehearsal of one rank."""
    ranks, _ = rehearse(Plan.of(load(compose([*AROUND, "world.size=1", "ledger.steps=2", *words]))))
    return {name: peak or 0 for name, peak in ranks[0].highest.items()}


def kept(stages: int, layers: int) -> int:
    """Bytes that the first of so many stages keeps for backward at most, in a pipeline of 8 micro-batches."""
    words = (
        *(
            "mode=train",
            "model=tiny",
            f"model.config.num_hidden_layers={layers}",
            f"pipeline.stages={stages}",
        ),
        *(
            "train.accumulation=8",
            "train.sequence=128",
            "train.steps=1",
            "train.validate_every=0",
            "train.export=false",
        ),
        *(*AROUND, f"world.size={stages}", "ledger.steps=1"),
    )
    forwards = one_rank.rehearse(Plan.of(load(compose(words))), 0)[0].forwards
    assert forwards is not None
    return forwards.bytes


def hardware(name: str) -> Any:
    """A page of `conf/hardware`."""
    return load(compose([f"hardware={name}"])).hardware


def network(name: str) -> Any:
    """A page of `conf/network`."""
    return load(compose([f"network={name}"])).network


def balance(name: str) -> float:
    """Dense bf16 FLOPs for each byte from memory."""
    page = hardware(name)
    return float(page.flops_bf16 / page.bandwidth)


def training() -> Example:
    long = (
        "train.sequence=4096",
        "train.micro_batch=1",
        "train.validate_every=0",
        "train.export=false",
        "zero=2",
    )
    requested = {"batch": 1, "count": 1, "prompt_length": 4032, "max_new_tokens": 64, "stop_at_eos": "false"}
    infer = peaks(
        "mode=infer", "model=llama2-7b", *(f"generation.{key}={value}" for key, value in requested.items())
    )
    train = peaks("mode=train", "model=llama2-7b", "train.steps=2", *long)
    kept = {
        "parameters": "both",
        "gradients": "training",
        "optimizer": "training",
        "activations": "training: the most",
        "kv_cache": "generating",
    }
    activations, optimizer = (
        train["activations"] / train["parameters"],
        train["optimizer"] / train["parameters"],
    )
    return Example(
        "Training keeps gradients, optimizer state and activations",
        "besides parameters, training stores gradients, optimizer state and the activations of every layer, "
        "which take more "
        "than the parameters; generating has a KV cache. Here LLaMA-2-7B in bf16 on one device with one "
        "sequence of 4,096 "
        "tokens, each category's own peak in GiB:",
        [(name, said, gib(infer[name]), gib(train[name])) for name, said in kept.items()],
        "Right in kind",
        f"At one such sequence the activations are {activations:.1f} times the parameters, and they grow with "
        f"the batch: they are "
        f"more or less as one chooses. What no batch changes is the optimizer's state, {optimizer:.1f} times "
        f"the parameters. "
        "Gradients are there in bf16 and, for the optimizer, in fp32. Generating makes activations too, and "
        "lets each go.",
        ("generating", "training"),
    )


def stages() -> Example:
    cut, added = [kept(stages, 8) for stages in (2, 4)], [kept(stages, 2 * stages) for stages in (2, 4)]
    return Example(
        "More pipeline stages keep more activations",
        "stages must keep what their forwards made until the backward, and more stages keep more; generation "
        "keeps nothing. "
        "Here the MiB that the first stage keeps at most, of 8 micro-batches:",
        [
            (f"{number} stages", "more with each", mib(one), mib(two))
            for number, one, two in zip((2, 4), cut, added, strict=True)
        ],
        "Half right",
        "A stage keeps one forward for each stage from it on. With two layers in every stage the first keeps "
        "more with every "
        "stage that is added; but one model cut into more stages has fewer layers in each, and its first keeps "
        "as much as "
        "before. What a pipeline does not do is save that memory, as it does the parameters'. Generation keeps "
        "nothing, as "
        "it says: `launch/pipeline-contrast` shows both with 1 to 16 stages.",
        ("8 layers in all", "2 layers a stage"),
    )


def cache_bytes() -> Example:
    return Example(
        "The KV cache of LLaMA-2-70B at 4,096 tokens",
        "for a batch of 4, keys and values of 80 layers x 8,192 x 4,096 tokens x 8 x 2 bytes are 80 GB. In GiB:",
        [
            (f"batch {batch}", said, gib(kv(ASSUMED, batch)), gib(kv(REAL, batch)))
            for batch, said in ((4, "80"), (8, "80, by its product"))
        ],
        "Wrong twice",
        "Its product has an 8 where it says 4: 80 GiB are a batch of 8. And the model has 8 heads of keys and "
        "values for its 64 "
        "of queries: a token takes 320 KiB, not 2,560, and a batch of 8 takes 10 GiB.",
    )


def cache_operations() -> Example:
    again = forward(REAL, TOKENS)
    return Example(
        "Operations that the cache saves",
        "4 x 8,192 x 8,192 for a token's keys and values in a layer, so 640 T for a batch of 8 with 4,096 tokens.",
        [
            (
                "a token and layer, M",
                "268",
                *(mega(projections(heads) // LAYERS) for heads in (ASSUMED, REAL)),
            ),
            (
                "batch 8, 4,096 tokens, T",
                "640",
                *(tera(8 * projections(heads, TOKENS)) for heads in (ASSUMED, REAL)),
            ),
            (
                "with all else that is computed again, T",
                "more",
                *(tera(8 * forward(h, TOKENS)) for h in (ASSUMED, REAL)),
            ),
        ],
        "Right in powers of 1024, for every head",
        f"640 x 2^40 are 704 T. With 8 heads of keys and values it is an eighth. But keys and values are the "
        f"least of it: without "
        f"a cache all hidden states of the tokens before are computed again, {tera(again)} TFLOP a sequence for "
        f"the last token "
        "with attention. That more is saved it says itself.",
    )


def per_byte() -> Example:
    alone = [8 * projections(heads, TOKENS) / kv(heads, 8) for heads in (ASSUMED, REAL)]
    whole = [8 * forward(heads, TOKENS) / kv(heads, 8) for heads in (ASSUMED, REAL)]
    return Example(
        "Operations saved for each byte of cache",
        "16 K for each byte that is stored.",
        [
            ("keys and values alone", "16 K", *(f"{each:,.0f}" for each in alone)),
            ("all that is computed again", "more", *(f"{each:,.0f}" for each in whole)),
        ],
        "Wrong by 2",
        "By its own figures 640 x 2^40 for 80 x 2^30 bytes are 8,192 a byte; 16,384 are for an element of two. "
        "The number of heads "
        "does not matter, for both grow with it; with all that is computed again, fewer heads make each byte "
        "worth more.",
    )


def reads() -> Example:
    elements, rate = TOKENS * LAYERS * 2 * HIDDEN * HIDDEN, hardware("h100-sxm").bandwidth
    heads = (1, ASSUMED // REAL)
    return Example(
        "Reading the weights of keys and values again",
        "without a cache the last of 4,096 tokens reads those weights for each token before it: 40 trillion "
        "reads of 2 bytes, on "
        "an H100 several tens of seconds.",
        [
            ("elements, 2^40", "40", *(f"{elements / part / 2**40:.0f}" for part in heads)),
            (
                "seconds, read for each token",
                "tens",
                *(f"{2 * elements / part / rate:.1f}" for part in heads),
            ),
            (
                "milliseconds, read once",
                "",
                *(f"{2000 * elements / TOKENS / part / rate:.1f}" for part in heads),
            ),
        ],
        "Wrong by the number of tokens",
        "One matrix product takes all tokens at once and reads a weight once. What is left is the time to "
        "compute, and it does "
        "grow with the square of the length, as the section ends.",
    )


def operations() -> Example:
    twice = 2 * PARAMETERS
    short, long = step(128)[0], step(TOKENS)[0]
    return Example(
        "Operations of a generated token",
        "about 2 for each parameter. In GFLOP:",
        [
            (f"at {context:,} tokens of context", f"{twice / 1e9:,.0f}", "", f"{flops / 1e9:,.0f}")
            for context, flops in ((128, short), (TOKENS, long))
        ],
        "Right",
        f"It is {short / twice:.1%} of that at a short context, for the embedding is looked up and not "
        f"multiplied, and "
        f"{long / twice:.1%} at 4,096 tokens, for attention adds to it.",
    )


def bandwidth() -> Example:
    cases = ((128, 1), (TOKENS, 1), (TOKENS, 32))
    moved = {case: sum(step(*case)[1:]) for case in cases}
    return Example(
        "Bytes that a generated token moves",
        "at least 2 for each parameter; the rest is left out. In GB for a step of the batch:",
        [
            (
                f"batch {batch}, {context:,} tokens of context",
                f"{2 * PARAMETERS / 1e9:,.0f}",
                "",
                f"{moved[context, batch] / 1e9:,.0f}",
            )
            for context, batch in cases
        ],
        "Right while the batch and the context are small",
        "Parameters are read once for a whole batch, and every sequence's cache for itself: what is left out "
        "grows with both. "
        "These are the bytes of all operators' tensors, the most that can move.",
    )


def ratio() -> Example:
    prompt, token = generated(REAL, 128).work["prefill"], step(128)
    return Example(
        "Operations for each byte with one sequence of 128 tokens",
        "each parameter that is loaded meets 128 multiplications and additions: a ratio of 128.",
        [
            ("reading the prompt", "128", "", f"{prompt[0] / sum(prompt[1:]):.0f}"),
            ("generating a token after it", "128", "", f"{token[0] / sum(token[1:]):.1f}"),
        ],
        "Right for the prompt, wrong for what is generated",
        "A prompt's 128 tokens meet a parameter that is read once. A generated token is alone: 2 operations for "
        "a parameter's 2 "
        "bytes, 1 for each byte, whatever the context. Only other sequences change that.",
    )


def ratios() -> Example:
    turns = [turning(context, balance("h100-sxm")) for context in (128, TOKENS)]
    return Example(
        "Operations for each byte that a device can do",
        "330 / 1 for an RTX 4090 and 1979 / 3.35 for an H100: with fewer tokens in the context memory is the "
        "bottleneck.",
        [
            ("RTX 4090", "330", "", f"{balance('rtx4090'):.0f}"),
            ("H100 SXM", "590", "", f"{balance('h100-sxm'):.0f}"),
            *(
                (f"H100: sequences of {c:,} tokens that turn it", "", "", _batch(t))
                for c, t in zip((128, TOKENS), turns, strict=True)
            ),
        ],
        "Wrong by 2, and of something else",
        "1,979 TFLOP/s is an H100's rate for sparse matrices, the dense one is 989.5; a 4090 has 330 only where "
        "it accumulates in "
        "fp16, and 165.2 in fp32. And the context turns nothing: what does is the number of tokens that meet a "
        "parameter while it "
        "is read, of a prompt or of a batch. A sequence's own cache is read for it alone, so with long contexts "
        "no batch is "
        "large enough.",
    )


def _batch(turn: float) -> str:
    return "none" if turn == float("inf") else f"{turn:,.0f}"


def turning(context: int, balance: float) -> float:
    """The batch from which the real model's step at `context` is compute-bound; infinite where none is."""
    (f1, *m1), (f2, *m2) = step(context, 1), step(context, 32)
    return crossing((1, f1, sum(m1)), (32, f2, sum(m2)), balance)


def waiting() -> Example:
    batch, longest = 32, 512
    requested = lengths("skewed", batch, longest, (0, 1))
    idle = 1 - sum(requested) / (batch * max(requested))
    return Example(
        "Sequences that end early wait for the others",
        f"a batch puts out one token of each sequence in a round, and so some computation is wasted. Here "
        f"{batch} requests with "
        f"log-uniform lengths to {longest} tokens:",
        [("computed and asked for by nobody", "some", "", f"{idle:.0%}")],
        "Right",
        "And it can be most of it. With `generation.batching=continuous` those that have ended leave, and "
        "others enter.",
    )


def prompts() -> Example:
    one = {heads: kv(heads, 1) for heads in (ASSUMED, REAL)}
    measured = 2 * PARAMETERS
    return Example(
        "When the cache outgrows the parameters",
        "a prompt takes 5 GB of it; 32 take 160 GB, more than the parameters' 140 GB. In GiB:",
        [
            ("a sequence of 4,096 tokens", "5", *(f"{each / GIB:.2f}" for each in one.values())),
            ("32 of them", "160", *(gib(32 * each) for each in one.values())),
            ("parameters", "140", gib(measured), gib(measured)),
            (
                "sequences that take more than those",
                "29",
                *(f"{measured // each + 1}" for each in one.values()),
            ),
        ],
        "Wrong, and it does happen",
        "By its own product a sequence takes 10 GiB and 13 are enough. With 8 heads of keys and values it takes "
        "1.25 GiB, 32 take "
        "40, and it is 103 that take more.",
    )


@cache
def moving(*words: str) -> Rank:
    """What a rehearsal of the first rank on nodes of 8 H100s counts."""
    around = (
        "world=rehearsed",
        "hardware=h100-sxm",
        "world.per_node=8",
        "precision=bf16",
        "model.attention=sdpa",
    )
    return one_rank.rehearse(Plan.of(load(compose([*around, *words]))), 0)[0]


def on_link(rank: Rank, link: str, *phases: str) -> float:
    """Bytes of the busier direction of a link in the last step, or in a decoding step."""
    traffic = rank.traffic or ()
    rows = transfers.of_last(
        traffic, "train" if "step" in phases else "infer", [each.step for each in traffic]
    )
    found = flow(each for each in rows if each.link == link and each.phase in phases)
    assert found is not None
    return found.busier / (transfers.decoding_steps(rank) or 1 if phases == ("decode",) else 1)


def trained(zero: int) -> Rank:
    """LLaMA-2-7B, a sequence of 4,096 tokens a rank, on two nodes."""
    words = ("train.sequence=4096", "train.micro_batch=1", "train.validate_every=0", "train.export=false")
    steps = ("train.steps=2", "ledger.steps=2", "world.size=16")
    return moving("mode=train", "model=llama2-7b", f"zero={zero}", *words, *steps)


def answered(batch: int, context: int, *words: str) -> Rank:
    """The real LLaMA-2-70B, generating a token for each of so many sequences with so many tokens of context."""
    replicas = 2 if words == SHARED else 1
    requested = {"batch": batch, "count": batch * replicas, "prompt_length": context - 1, "max_new_tokens": 2}
    options = [f"generation.{key}={value}" for key, value in requested.items()]
    return moving(
        *("mode=infer", "model=llama2-70b", f"model.config.max_position_embeddings={2 * TOKENS}"),
        *("generation.stop_at_eos=false", "ledger.steps=1", *options, *words),
    )


SHARED = ("generation.tensor_parallel=8", "generation.cache=static", "world.size=16")
STAGED = ("generation.tensor_parallel=8", "generation.cache=static", "pipeline.stages=2", "world.size=16")
OFFLOADED = ("generation.cache=offloaded", "world.size=1")
STEP = ("data", "forward", "backward", "step")


def training_links() -> Example:
    ranks = [trained(zero) for zero in (1, 3)]
    data, node = ([on_link(rank, link, *STEP) for rank in ranks] for link in ("storage", "network"))
    copied = [on_link(rank, "pcie", *STEP) for rank in ranks]
    rate = network("infiniband-ndr400").of_node
    return Example(
        "What training moves, and over which link",
        "training data comes from storage through the host to the GPU, and there is so much of it that the link from "
        "host to GPU needs high bandwidth, by optical transceivers. Here LLaMA-2-7B on two nodes of 8 H100s, a "
        "sequence of 4,096 tokens a rank, and what a step moves:",
        [
            ("a rank from storage, KiB", "a lot", *(f"{each / 1024:,.1f}" for each in data)),
            ("a rank from or to its host, KiB", "a lot", *(f"{each / 1024:,.1f}" for each in copied)),
            ("a node to the other, GiB", "", *(f"{each / GIB:,.1f}" for each in node)),
            ("  at best with 8 ports of 400 Gb/s, ms", "", *(f"{1000 * each / rate:,.0f}" for each in node)),
        ],
        "Right that it needs bandwidth, wrong of what moves",
        f"The data are the least of it: a node sends {node[0] / (8 * data[0]):,.0f} times as many bytes as its ranks "
        "read. What moves are gradients and parameters, from GPU to GPU, and the transceivers are in the network "
        "between nodes; a host and its GPUs are in one box, joined by PCIe. A ring leaves a node once, so a node sends "
        "what one of its ranks does.",
        ("ZeRO-1", "ZeRO-3"),
    )


def inference_links() -> Example:
    shared, staged, offloaded = (
        [answered(batch, context, *words) for batch in (1, 32)]
        for context, words in ((128, SHARED), (128, STAGED), (TOKENS, OFFLOADED))
    )
    prompt = [on_link(rank, "pcie", "prefill") for rank in shared]
    inside = [on_link(rank, "nvlink", "decode") for rank in shared]
    apart, between = ([on_link(rank, "network", "decode") for rank in ranks] for ranks in (shared, staged))
    moved = [on_link(rank, "pcie", "decode") for rank in offloaded]
    bytes_alone = 1e6 * inside[0] / hardware("h100-sxm").between
    return Example(
        "What inference moves, and over which link",
        "input goes from storage to the GPU and results back to the host or the user, and needs low latency and high "
        "throughput, by optical transceivers. Here LLaMA-2-70B on H100s, and what a rank moves for a token of each "
        "sequence, in KiB:",
        [
            ("from the host, all 127 tokens of a prompt", "", *map(kib, prompt)),
            ("8 GPUs share each layer: to the next of them", "", *map(kib, inside)),
            ("2 such replicas on two nodes: to the other node", "", *map(kib, apart)),
            ("2 such stages on two nodes: to the other node", "", *map(kib, between)),
            ("the cache of 4,096 tokens is offloaded: from the host", "", *map(kib, moved)),
        ],
        "Right that latency matters, wrong of where",
        f"A prompt is a few KiB, and replicas send each other nothing. What waits for a link is each layer that GPUs "
        f"share: for one sequence {calls(shared[0])} all-reduces, one after another, whose bytes take "
        f"{bytes_alone:.0f} us on NVLink at best, so it is their latency that counts. Stages send one hidden state a "
        "token. Only an offloaded cache moves much, over PCIe.",
        ("1 sequence", "32 sequences"),
    )


def link_bound() -> Example:
    contexts, card, port = (128, TOKENS), hardware("h100-sxm"), network("infiniband-ndr400")
    late = port.latency * calls(answered(1, 128, *SHARED))
    links = {
        "8 GPUs on NVLink, 450 GB/s": ("nvlink", SHARED, contexts, card.between, 0.0),
        "8 GPUs, each with a port of 400 Gb/s": ("nvlink", SHARED, contexts, port.bandwidth, 0.0),
        "  and 2.7 us of latency a call": ("nvlink", SHARED, contexts, port.bandwidth, late),
        "offloaded cache on PCIe, 64 GB/s": ("pcie", OFFLOADED, (TOKENS,), card.to_host, 0.0),
    }
    rows: list[Sequence[str]] = [
        (name, "", *(_batch(_turn(link, words, each, *rates)) if each in known else "" for each in contexts))
        for name, (link, words, known, *rates) in links.items()
    ]
    return Example(
        "From which batch a link, and not memory, bounds decoding",
        "that transceivers speed up inference; no figure. Here the sequences in a batch of LLaMA-2-70B from which a "
        "link takes longer than an H100's memory:",
        rows,
        "It depends on the link",
        "A step of B sequences takes (W + B k) / memory, where W are a rank's weights and k what a sequence moves in "
        "memory, and B w / link, where w is what it moves on the link. So the link bounds from W / memory / "
        "(w / link - k / memory) sequences on, and never where k / memory is more than w / link. Both are counted, at "
        "batches of 1 and 32. On NVLink memory bounds any batch; over a network with a port for each GPU the link does "
        "in the end, later with long contexts, whose caches are read from memory.",
        ("128 tokens of context", "4,096 tokens"),
    )


def _turn(link: str, words: Sequence[str], context: int, rate: float, waiting: float) -> float:
    ranks = {batch: answered(batch, context, *words) for batch in (1, 32)}
    one, other = ((batch, on_link(rank, link, "decode"), in_memory(rank)) for batch, rank in ranks.items())
    return link_turn(one, other, rate, hardware("h100-sxm").bandwidth, waiting)


def in_memory(rank: Rank) -> float:
    """Bytes that a decoding step reads and writes."""
    return sum(each.moved or 0 for each in rank.phases if each.phase == "decode") / (
        transfers.decoding_steps(rank) or 1
    )


def calls(rank: Rank) -> int:
    """All-reduces of a decoding step."""
    return sum(
        each.calls for each in rank.traffic or () if (each.phase, each.operation) == ("decode", "all-reduce")
    )


Computed = Callable[[], Example]
EXAMPLES: tuple[Computed, ...] = (
    *(training, stages, cache_bytes, cache_operations, per_byte, reads),
    *(operations, bandwidth, ratio, ratios, waiting, prompts),
    *(training_links, inference_links, link_bound),
)
"""In the text's order."""


def gib(count: int) -> str:
    return f"{count / GIB:,.1f}"


def kib(count: float) -> str:
    return f"{count / 1024:,.1f}"


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def tera(count: int) -> str:
    return f"{count / 1e12:,.0f}"


def mega(count: int) -> str:
    return f"{count / 1e6:,.0f}"


def section_of(example: Example, number: int) -> str:
    """An example as a part of the page."""
    lines = [f"## {number}. {example.title}", "", fill(f"It says: {example.said}", 120), ""]
    lines += [f"| | it says | {' | '.join(example.columns)} |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} |" for row in example.rows]
    return "\n".join([*lines, "", fill(f"**{example.verdict}.** {example.because}", 120), ""])


PAGE = """# The seed, audited

Made by `python tests/benchmarks/seed_audit.py > profiles/seed-audit.md`,
and checked by `tests/rehearsal/test_seed_audit.py`.
Python {python}, torch {torch}, transformers {transformers}, deepspeed {deepspeed}.

The text that this project grew from ("What is the difference between GPU inference and training?", NADDOD) works
through LLaMA-2-70B. Here is each of its examples, its figure, and what a rehearsal computes: for the model that it
assumes, in which each of 64 heads has keys and values of its own, and for the real one, which has 8 for all of them.
"""


def page() -> str:
    """All of it."""
    packages = record_file.environment().packages
    names = ("torch", "transformers", "deepspeed")
    head = PAGE.format(python=platform.python_version(), **{name: packages[name] for name in names})
    return "\n".join([head, *(section_of(example(), number) for number, example in enumerate(EXAMPLES, 1))])


if __name__ == "__main__":
    print(page().rstrip())
