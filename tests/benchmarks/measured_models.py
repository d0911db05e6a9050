"""Whole models that others measured or worked out: a program for each, or why there is none."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import harness
from harness.config.compose import compose
from harness.config.load import load
from harness.model.plan import Plan
from harness.rehearsal.all_ranks import rehearse

GIB = 2**30


class Model(NamedTuple):
    """A published figure in bytes, the program of its rehearsed counterpart, and what that takes for granted."""

    source: str
    case: str
    published: int
    program: Callable[[], int]
    assumed: str


class Paper(NamedTuple):
    """A model of arXiv 2205.05198, table 3; `interleave` chunks of layers a stage has where there are `stages`."""

    layers: int
    hidden: int
    heads: int
    batch: int
    stages: int = 1
    interleave: int = 1


LENGTH, TENSOR_PARALLEL = 2048, 8
PAPER = {
    "22B": Paper(48, 6144, 64, 4),
    "175B": Paper(96, 12288, 96, 1, 8, 3),
    "530B": Paper(105, 20480, 128, 1, 35, 3),
    "1T": Paper(128, 25600, 160, 1, 64),
}
PUBLISHED = {
    "22B": (59.25, 9.56),
    "175B": (66.84, 12.35),
    "530B": (114.02, 23.08),
    "1T": (131.25, 26.56),
}
"""GiB with tensor parallelism alone, and with sequence parallelism and selective recomputation too."""


class Layer(nn.Module):
    """A GPT layer of one tensor-parallel rank, in the operators whose saved tensors the paper counts."""

    def __init__(self, hidden: int, heads: int, sequence_parallel: bool) -> None:
        super().__init__()
        self.heads, self.width, self.selective = heads, hidden // heads, sequence_parallel
        part = hidden // TENSOR_PARALLEL
        self.first, self.second = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * part), nn.Linear(part, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 4 * part), nn.Linear(4 * part, hidden, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(T, B, H), of which T is this rank's part where sequences are split."""
        states = states + self.dropped(self.out, self.attention(self.gathered(self.qkv, self.first(states))))
        inner = functional.gelu(self.gathered(self.up, self.second(states)))
        return states + self.dropped(self.down, inner)

    def attention(self, projected: Tensor) -> Tensor:
        """From (T, B, 3H/t) to (T, B, H/t), whose middle is computed anew in backward where it is selected."""
        length, batch, _ = projected.shape
        query, key, value = (
            each.reshape(length, batch * self.heads // TENSOR_PARALLEL, self.width).transpose(0, 1)
            for each in projected.chunk(3, dim=-1)
        )
        if self.selective:
            mixed = torch.utils.checkpoint.checkpoint(core, query, key, value, use_reentrant=False)
        else:
            mixed = core(query, key, value)
        return mixed.transpose(0, 1).reshape(length, batch, -1)  # type: ignore[no-any-return]

    def gathered(self, linear: nn.Linear, states: Tensor) -> Tensor:
        """A product with the whole sequence, of which this rank keeps its part for backward."""
        return GatheredLinear.apply(states, linear.weight) if self.selective else linear(states)  # type: ignore

    def dropped(self, linear: nn.Linear, states: Tensor) -> Tensor:
        """A product, this rank's part of the sum over all, and dropout with its mask."""
        product = linear(states)
        if self.selective:
            product = product[: product.shape[0] // TENSOR_PARALLEL].clone()
        return torch.native_dropout(product, 0.1, True)[0]


class GatheredLinear(torch.autograd.Function):
    """Megatron's product in sequence parallelism: it saves its part of the input and gathers it anew in backward."""

    @staticmethod
    def forward(context, part: Tensor, weight: Tensor) -> Tensor:  # type: ignore
        context.save_for_backward(part, weight)
        return torch.cat([part] * TENSOR_PARALLEL) @ weight.t()

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore
        part, weight = context.saved_tensors
        whole = torch.cat([part] * TENSOR_PARALLEL).flatten(0, 1)
        inner = gradient @ weight
        return inner[: part.shape[0]].clone(), gradient.flatten(0, 1).t() @ whole


def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by its scores, (B heads, T, width) each."""
    scores = torch.bmm(query, key.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(torch.native_dropout(scores, 0.1, True)[0], value)


def activations(name: str, sequence_parallel: bool) -> int:
    """Bytes that a rank of the first stage keeps for backward: a layer's more than a layer before it, for all."""
    paper = PAPER[name]
    alive = []
    with harness.rehearse(hardware="a100-80gb"), torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            layers = [Layer(paper.hidden, paper.heads, sequence_parallel) for _ in range(3)]
            length = LENGTH // TENSOR_PARALLEL if sequence_parallel else LENGTH
            states = torch.randn(length, paper.batch, paper.hidden, requires_grad=True)
            for layer in layers:
                states = layer(states)
                alive.append(torch.cuda.memory_allocated())
        finally:
            torch.set_default_dtype(torch.float32)
    extra = (paper.stages - 1) / (paper.stages * paper.interleave) if paper.interleave > 1 else 0
    return round((alive[-1] - alive[-2]) * paper.layers * (1 + extra))


LLAMA_3B = LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
"""Llama-3.2-3B: 3,212,749,824 parameters."""


def llama_steps(batch: int, length: int, fused: bool, clip: bool) -> None:
    """Two steps of AdamW in bfloat16, whose states are in bfloat16 too; gradients live until the next step."""
    with torch.device("cuda"):
        model = LlamaForCausalLM(LLAMA_3B).to(torch.bfloat16)
        tokens = torch.randint(LLAMA_3B.vocab_size, (batch, length))
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused, foreach=not fused)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def torchtune_packed() -> int:
    """The peak of the steps of torchtune's row "packed"."""
    with harness.rehearse(hardware="a100-80gb"):
        llama_steps(2, 4096, fused=True, clip=False)
        return torch.cuda.max_memory_allocated()


def peft_full() -> int:
    """What is reserved at most for PEFT's full fine-tuning, every batch being of the longest sequences."""
    with harness.rehearse(hardware="l40s"):
        llama_steps(4, 768, fused=False, clip=True)
        return torch.cuda.max_memory_reserved()


GPT = (
    "{model_type: gpt2, n_embd: 4096, n_layer: 32, n_head: 32, n_positions: 512, vocab_size: 50000, "
    "tie_word_embeddings: false}"
)
DEEPSPEED = (
    *("mode=train", "world=rehearsed", "world.size=4", "zero=3", "checkpointing=full", "precision=bf16"),
    *(
        "model.attention=sdpa",
        "hardware=h100-sxm",
        "model=gpt2",
        f"model.config={GPT}",
        "train.micro_batch=1",
        "train.sequence=512",
    ),
    *("train.steps=2", "ledger.steps=2", "train.validate_every=0", "train.export=false"),
)


def deepspeed_masters() -> int:
    """What a rank has allocated after a step by this harness's own rehearsal."""
    (rank, *_), _ = rehearse(Plan.of(load(compose(DEEPSPEED))))
    return int(rank.tree()["phases"][-1]["end"])


def paper_cases() -> Iterator[Model]:
    """The figures of arXiv 2205.05198."""
    for name, published in PUBLISHED.items():
        for selective, figure in zip((False, True), published, strict=True):
            yield Model(
                "arXiv 2205.05198, table 3",
                f"activations of {name}, {'TP 8, sequence parallel, selective' if selective else 'TP 8'}",
                round(figure * GIB),
                partial(activations, name, selective),
                "one rank's layer of a GPT in Megatron's operators, the paper's own figure being a formula",
            )


MODELS = (
    *paper_cases(),
    Model(
        "torchtune README",
        "Llama-3.2-3B, packed to 2 x 4,096",
        round(60.0 * GIB),
        torchtune_packed,
        "transformers' LLaMA instead of torchtune's, fused AdamW; PyTorch counts active bytes there, here allocated",
    ),
    Model(
        "PEFT MetaMathQA",
        "Llama-3.2-3B, full fine-tuning, reserved",
        38_868_615_168,
        peft_full,
        "all batches of 4 x 768 tokens, where the data has shorter ones too, and no evaluation",
    ),
    Model(
        "DeepSpeed blogs/core_api_update",
        "6.86B, ZeRO-3, 4 GPUs, fp32 masters, allocated",
        round(25.74 * GIB),
        deepspeed_masters,
        "its GB are GiB (train.py); GPT-2's layers instead of its own; this harness's bucket sizes, as its own are not "
        "published",
    ),
)
"""What a program gives a figure for."""

UNEXPRESSED = {
    "torchtune README, the other rows": (
        "padded batches depend on a dataset's lengths; the rows after packed are compiled, and a rehearsal compiles "
        "nothing"
    ),
    "torchtitan, Llama-3.1-8B and 405B; torchtitan#773, #191": (
        "the harness trains with DeepSpeed's ZeRO and in pipelines, and has neither FSDP nor tensor parallelism there"
    ),
    "PEFT, LoRA": "the harness trains all parameters, and peft is not among its packages",
    "DeepSpeed blogs/core_api_update, bf16 masters": "the harness keeps masters and states in fp32",
    "DeepSpeed blogs/muon-optimizer": (
        "it does not say how long sequences are, nor whether 32 is the batch of a GPU; the harness has AdamW alone"
    ),
    "trl#6858, SkyRL#1751, transformers#48131": "figures of a thread, without all of model, batch and lengths",
}
"""What has no program, and why."""
