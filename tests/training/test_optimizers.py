"""Each optimizer's step is that of its library, and all of its state is in a checkpoint."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from harness.config.compose import compose
from harness.config.load import load
from harness.data import token_batches
from harness.ledger.owners import optimizer_claims
from harness.model import loader
from harness.model.plan import Plan
from harness.model.tokenizer import tokenizer_of
from harness.runtime.imports import import_bitsandbytes, import_deepspeed
from harness.runtime.world import World
from tests.training.conftest import WORDS, train

Parameters = Iterator[tuple[str, nn.Parameter]]

BARE = ("zero=0", "train.clip=0", "train.schedule=constant", "train.learning_rate=0.01")


def muon(named: Parameters) -> torch.optim.Optimizer:
    import_deepspeed()
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    halves: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        halves[parameter.dim() == 2 and "embed" not in name and "lm_head" not in name].append(parameter)
    own = {"momentum": 0.95, "ns_method": "standard"}
    adamw = {"betas": (0.9, 0.999), "eps": 1e-8}
    groups = [
        {"params": halves[use], "use_muon": use, "lr": 0.01, "weight_decay": 0.1, **(own if use else adamw)}
        for use in (True, False)
    ]
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)
    return optimizer


def by_bitsandbytes(name: str, **options: Any) -> Callable[[Parameters], torch.optim.Optimizer]:
    def make(named: Parameters) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(import_bitsandbytes().optim, name)(
            [each for _, each in named], lr=0.01, weight_decay=0.1, **options
        )
        return optimizer

    return make


def by_torch(
    kind: type[torch.optim.Optimizer], **options: Any
) -> Callable[[Parameters], torch.optim.Optimizer]:
    values: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "foreach": False, **options}
    return lambda named: kind([each for _, each in named], **values)


KINDS: dict[str, tuple[Callable[[Parameters], torch.optim.Optimizer], set[str]]] = {
    "optimizer=adamw": (by_torch(torch.optim.AdamW), {"step", "exp_avg", "exp_avg_sq"}),
    "optimizer=adamw_8bit": (
        by_bitsandbytes("AdamW8bit"),
        {"step", "state1", "state2", "absmax1", "absmax2"},
    ),
    "optimizer=adafactor": (by_torch(torch.optim.Adafactor), {"step", "row_var", "col_var", "variance"}),
    "optimizer=muon": (muon, {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}),
    "optimizer=sgd optimizer.momentum=0.9": (by_torch(torch.optim.SGD, momentum=0.9), {"momentum_buffer"}),
    "optimizer=lion train.betas=[0.9,0.99]": (by_bitsandbytes("Lion"), {"step", "state1"}),
}
"""For each optimizer, how its user makes it, and the names of its states."""


def losses_of_a_plain_loop(
    world: World, make: Callable[[Parameters], torch.optim.Optimizer], words: tuple[str, ...]
) -> list[float]:
    settings = load(compose([*WORDS, *words]))
    plan = Plan.of(settings)
    tokenizer = tokenizer_of(settings.model, plan.config, settings.data.tokenizer)
    corpus = token_batches.corpus(settings.data, tokenizer, settings.train.sequence, world, True)
    device = torch.device("cpu")
    model = loader.build(settings.model, plan.config, torch.float32, device, settings.seed, True, None, None)
    optimizer = make(model.named_parameters())
    losses = []
    batches = token_batches.loader(corpus.train, settings.train.micro_batch, world, settings.seed)
    for _, batch in zip(range(settings.train.steps), batches, strict=False):
        loss = model(**batch.arguments, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_library_s_own_and_a_resumed_run_goes_on_bitwise(
    world: World, kind: str, tmp_path: Path
) -> None:
    make, states = KINDS[kind]
    words = (*BARE, *kind.split())
    results, _ = train(world, tmp_path, *words, "train.save_every=1", "train.keep=3")
    assert results.training is not None
    losses = results.training.losses
    # one rank without ZeRO, in fp32: DeepSpeed steps this optimizer with these gradients, so every bit is the same
    assert losses == losses_of_a_plain_loop(world, make, words)
    last = tmp_path / "state/step-00000003/rank-00000.safetensors"
    whole = load_file(last)
    assert {name.rpartition("/")[2] for name in whole if name.startswith("optimizer/")} == states
    shutil.rmtree(last.parent)
    resumed, _ = train(world, tmp_path / "again", *words, "train.save_every=1", f"train.resume={tmp_path}")
    assert resumed.training is not None
    assert resumed.training.losses == losses[2:]
    again = load_file(tmp_path / "again" / last.relative_to(tmp_path))
    assert again.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name


def test_states_are_claimed_by_what_they_are_whatever_their_library_calls_them() -> None:
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = import_bitsandbytes().optim.AdamW8bit([weight], lr=0.01)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    claims = {
        name: tensor.nbytes
        for category, name, tensor in optimizer_claims(optimizer)
        if category == "optimizer"
    }
    codes, scales, table = 64 * 64, 64 * 64 // 256 * 4, 256 * 4
    assert claims == {
        "state[0].exp_avg": codes,
        "state[0].exp_avg.absmax": scales,
        "state[0].exp_avg.qmap": table,
        "state[0].exp_avg_sq": codes,
        "state[0].exp_avg_sq.absmax": scales,
        "state[0].exp_avg_sq.qmap": table,
    }
