"""A step of a layer with sequence parallelism, by torch's own styles, under a ledger: what it moves, as JSON on rank 0.

The plan is that of torchtitan's Llama: norms, and what lies between the products, have half of the sequence on each of
two ranks. Its figures were published in torchtitan#1369.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AutoConfig, AutoModelForCausalLM

from harness.ledger import Ledger

BATCH, TOKENS, WIDTH = 8, 2048, 256


def main(out: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = AutoConfig.for_model("llama", **shape, num_attention_heads=4, num_key_value_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    attention = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)},
        desired_input_kwarg_layouts={"hidden_states": Replicate()},
    )
    columns = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel())
    columns |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel())
    rows = dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel(output_layouts=Shard(1)))
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), SequenceParallel())
    layer = {"self_attn": attention, "mlp": whole, **columns, **rows, **norms}
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=Shard(1)),
            **{f"model.layers.0.{name}": style for name, style in layer.items()},
        },
    )
    tokens = torch.randint(64, (BATCH, TOKENS))
    with Ledger(model=model, device="cpu") as ledger:
        with ledger.phase("forward"):
            hidden = model.model(input_ids=tokens, use_cache=False, position_ids=torch.arange(TOKENS)[None])
            loss = model.lm_head(hidden.last_hidden_state).float().logsumexp(-1).mean()
        with ledger.phase("backward"):
            loss.backward()
        with ledger.phase("step"):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert isinstance(norm, DTensor)
            norm.full_tensor()
    moved: Counter[tuple[str, str, int]] = Counter()
    for where, amounts in ledger.traffic.amounts().items():
        for transfer, (calls, nbytes) in amounts.items():
            moved[where.phase, transfer.operation, nbytes // calls] += calls
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps({"moved": [[*key, calls] for key, calls in sorted(moved.items())]}))
    dist.destroy_process_group()


main(sys.argv[1])
