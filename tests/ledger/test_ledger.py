"""The ledger around plain PyTorch, with no harness: the books close, names are right, and nothing changes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from harness import Ledger
from harness.ledger import CATEGORIES, CpuAllocator

BYTES = {torch.float32: 4, torch.bfloat16: 2}


def small_model(dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=128,
    )
    return LlamaForCausalLM(config).to(dtype)


def train(model: LlamaForCausalLM, steps: int = 2, adapt: Callable[..., None] | None = None) -> list[float]:
    """A loop as anyone would write it; its losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if adapt:
        adapt(model=model, optimizer=optimizer)
    losses = []
    for step in range(steps):
        tokens = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_categories_and_kernel_are_the_allocators_own_peak(dtype: torch.dtype) -> None:
    with Ledger() as ledger:
        model = small_model(dtype)
        ledger.own(model=model)
        train(model, adapt=ledger.own)
    assert ledger.allocator.source == "cpu-events"
    assert ledger.allocator.unattributed == 0
    assert ledger.allocator.peak == ledger.peak.bytes == sum(filter(None, ledger.peak.categories.values()))
    assert set(ledger.peak.categories) == {*CATEGORIES, "kernel"}


def test_the_ledger_changes_neither_losses_nor_the_allocators_peak() -> None:
    train(small_model(), steps=1)  # whatever torch makes once and keeps, it has now made
    allocator = CpuAllocator()
    assert allocator.start()
    alone = train(small_model())
    events = allocator.stop()
    assert events is not None
    total = peak = 0
    for event in events:
        total += event.delta
        peak = max(peak, total)
    with Ledger() as ledger:
        watched = train(small_model())
    assert watched == alone
    assert ledger.allocator.peak == peak


def test_bytes_behind_the_ledgers_back_are_unattributed_and_never_hidden() -> None:
    with Ledger() as ledger:
        hidden = torch.UntypedStorage(123_457)
        torch.ones(10)
    assert hidden.nbytes() == ledger.allocator.unattributed == 123_457
    assert ledger.allocator.peak == ledger.peak.bytes + 123_457


def test_what_a_collective_keeps_until_it_is_waited_for_is_kernel() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=torch._C._distributed_c10d.HashStore())
    try:
        values = torch.ones(1000)
        with Ledger() as ledger:
            parts = collectives.reduce_scatter_tensor(values, "sum", 0, [0])
            doubled = values * 2
            parts = collectives.wait_tensor(parts)
    finally:
        dist.destroy_process_group()
    assert ledger.allocator.unattributed == 0
    assert ledger.allocator.peak == ledger.peak.bytes
    assert (ledger.peak.categories["kernel"] or 0) >= values.nbytes
    assert ledger.peak.bytes >= values.nbytes + parts.nbytes + doubled.nbytes


def test_a_number_that_autograd_keeps_is_kernel_for_as_long_as_it_lives() -> None:
    values = torch.ones(100, requires_grad=True)
    with Ledger() as ledger:
        doubled = values * 2
    assert ledger.allocator.unattributed == 0
    assert ledger.allocator.peak == ledger.peak.bytes > doubled.nbytes


def test_scratch_inside_a_kernel_is_kernel() -> None:
    values = torch.arange(100_000).flip(0)
    with Ledger() as ledger:
        values.sort()
    assert ledger.allocator.unattributed == 0
    assert (ledger.peak.categories["kernel"] or 0) > 0


def test_memory_of_another_allocator_is_foreign() -> None:
    array = np.zeros(1000, dtype=np.float32)
    with Ledger() as ledger:
        tensor = torch.from_numpy(array)
        ledger.claim("inputs", "array", tensor)
        torch.ones(10)
    assert ledger.allocator.externally_owned == ledger.categories["inputs"].peak == 4000
    assert ledger.allocator.peak == ledger.peak.bytes == 40


def test_a_mapped_file_is_foreign_and_not_the_allocators(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000), "b": torch.ones(500)}, tmp_path / "weights.safetensors")
    with Ledger() as ledger:
        measured = load_file(tmp_path / "weights.safetensors")
        for name, tensor in measured.items():
            ledger.claim("parameters", name, tensor)
        copies = {name: tensor.clone() for name, tensor in measured.items()}
    assert ledger.allocator.unattributed == 0
    assert ledger.allocator.peak == ledger.peak.bytes == sum(tensor.nbytes for tensor in copies.values())
    assert ledger.allocator.externally_owned == 6000


def test_a_gradient_is_a_gradient_from_its_birth_though_it_is_claimed_later() -> None:
    with Ledger() as ledger:
        weight = torch.ones(1000, requires_grad=True)
        optimizer = torch.optim.SGD([weight])
        (weight * 2).sum().backward()
        ledger.own(optimizer=optimizer)
    assert ledger.categories["gradients"].peak == 4000
    backward = next(phase for phase in ledger.phases if phase.categories["gradients"])
    assert backward.categories["gradients"] == 4000


def test_adams_moments_come_with_the_first_step() -> None:
    model = small_model()
    size = sum(p.numel() for p in model.parameters()) * 4
    count = len(list(model.parameters()))
    with Ledger() as ledger:
        train(model, adapt=ledger.own)
    ends = {(p.where.step, p.where.phase): p.categories["optimizer"] for p in ledger.phases}
    assert ends[0, "backward"] == 0
    assert (
        ends[1, "forward"] == 2 * size + 4 * count
    )  # two moments, and a step count of 4 bytes for each parameter


def test_phases_are_read_off_the_loop() -> None:
    model = small_model()
    with Ledger(model=model) as ledger:
        optimizer = torch.optim.SGD(model.parameters())
        ledger.own(optimizer=optimizer)
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        for _ in range(2):
            for _ in range(2):
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
    seen = [(p.where.step, p.where.phase, p.where.micro_batch) for p in ledger.phases]
    for step in (0, 1):
        for micro_batch in (0, 1):
            assert (step, "forward", micro_batch) in seen
            assert (step, "backward", micro_batch) in seen
        assert (step, "step", 1) in seen


def test_named_phases_are_taken_as_named() -> None:
    with Ledger() as ledger, ledger.phase("prefill", step=3, micro_batch=1):
        kept = torch.ones(10)
    phase = next(p for p in ledger.phases if p.where.phase == "prefill")
    assert (phase.where.step, phase.where.micro_batch) == (3, 1)
    assert (phase.peak, phase.end) == (kept.nbytes, kept.nbytes)


def test_the_module_that_made_the_peak_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4000))
    with Ledger(model=model) as ledger, torch.no_grad():
        model(torch.ones(2, 4))
    assert (ledger.peak.module, ledger.peak.where.phase) == ("1", "forward")


def test_inference_saves_nothing_and_training_does() -> None:
    model, tokens = small_model(), torch.zeros(1, 16, dtype=torch.int64)
    with Ledger(model=model) as trained:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    with Ledger(model=model) as inferred, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    assert loss.requires_grad
    assert max(phase.saved or 0 for phase in trained.phases) > 0
    assert max(phase.saved or 0 for phase in inferred.phases) == 0
    assert (inferred.categories["activations"].peak or 0) > 0


def test_recomputed_activations_are_activations_inside_backward() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.ReLU(), torch.nn.Linear(256, 16))
    inputs = torch.ones(512, 16, requires_grad=True)
    peaks, ends = {}, {}

    def recomputed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"none": block, "full": recomputed}
    for name, forward in forwards.items():
        with Ledger(model=block) as ledger:
            forward(inputs).sum().backward()
        backward = next(p for p in ledger.phases if p.where.phase == "backward")
        peaks[name] = backward.categories["activations"]
        ends[name] = next(p for p in ledger.phases if p.where.phase == "forward").end
        assert ledger.allocator.unattributed == 0
        block.zero_grad(set_to_none=True)
    assert (ends["full"] or 0) < (ends["none"] or 0)
    assert (peaks["full"] or 0) > 512 * 256 * 4


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dynamic_cache_holds_what_the_formula_says(kv_heads: int, dtype: torch.dtype) -> None:
    model = small_model(dtype, kv_heads)
    cache = DynamicCache()
    with Ledger(model=model, cache=cache) as ledger, torch.no_grad():
        model(input_ids=torch.zeros(3, 20, dtype=torch.int64), past_key_values=cache, use_cache=True)
    layers, head_size = 2, 16
    assert ledger.categories["kv_cache"].end == 2 * layers * kv_heads * head_size * 20 * 3 * BYTES[dtype]
    assert ledger.allocator.unattributed == 0


def test_a_static_cache_is_reserved_whole() -> None:
    model = small_model()
    cache = StaticCache(config=model.config, max_cache_len=50)
    with Ledger(model=model, cache=cache) as ledger, torch.no_grad():
        model(input_ids=torch.zeros(3, 20, dtype=torch.int64), past_key_values=cache, use_cache=True)
    keys_and_values = 2 * 2 * 2 * 16 * 50 * 3 * 4
    counters = sum(
        v.nbytes for layer in cache.layers for v in vars(layer).values() if isinstance(v, torch.Tensor)
    )
    assert ledger.categories["kv_cache"].end == counters >= keys_and_values


def test_a_resized_storage_is_counted_at_its_new_size() -> None:
    with Ledger() as ledger:
        tensor = torch.ones(10)
        tensor.resize_(1000)
    assert ledger.allocator.unattributed == 0
    assert ledger.phases[-1].end == 4000


def test_two_runs_give_the_same_books() -> None:
    def account() -> object:
        with Ledger() as ledger:
            model = small_model()
            ledger.own(model=model)
            losses = train(model, adapt=ledger.own)
        return losses, ledger.account()

    account()
    assert account() == account()


def test_phases_mode_sums_owners_and_measures_no_peak() -> None:
    model = small_model()
    with Ledger(model=model, mode="phases") as ledger, ledger.phase("forward"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    (phase,) = ledger.phases
    assert phase.categories["parameters"] == size
    assert phase.categories["activations"] is phase.peak is ledger.allocator.peak is None
    with pytest.raises(LookupError, match="mode='phases' measures no peak"):
        ledger.peak  # noqa: B018


def test_an_exact_ledger_goes_on_as_phases_after_its_steps() -> None:
    with Ledger(steps=1) as ledger:
        for step in range(2):
            with ledger.phase("forward", step):
                torch.ones(100)
    assert [(p.where.step, p.peak) for p in ledger.phases if p.where.phase == "forward"] == [
        (0, 400),
        (1, None),
    ]
    assert ledger.peak.bytes == 400


def test_phases_mode_says_a_phase_again_only_when_it_holds_something_else() -> None:
    model = small_model()
    with Ledger(mode="phases") as ledger:
        for step in range(4):
            with ledger.phase("forward", step):
                if step == 2:
                    ledger.own(model=model)
    assert [phase.where.step for phase in ledger.phases] == [0, 2]


def test_a_ledger_that_is_off_accepts_everything_and_measures_nothing() -> None:
    with Ledger(mode="off") as ledger, ledger.phase("forward"):
        ledger.claim("inputs", "tokens", torch.ones(1))
        ledger.own(model=small_model(), cache=DynamicCache())
    assert ledger.phases == []
    assert ledger.allocator.peak is None


def test_beside_somebody_elses_profiler_the_allocator_is_not_measured() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), Ledger() as ledger:
        torch.ones(10)
    accounting = ledger.allocator
    assert (accounting.source, accounting.peak, accounting.unattributed) == (None, None, None)
    assert ledger.peak.bytes == 40
    assert ledger.peak.categories["kernel"] is None


def test_no_hook_stays_behind_even_after_an_error() -> None:
    model = small_model()
    with pytest.raises(RuntimeError, match="inside"), Ledger(model=model):
        raise RuntimeError("inside")
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with Ledger() as after:
        torch.ones(1)
    assert after.allocator.source == "cpu-events"


@pytest.mark.parametrize("bad", ["Exact", "", "all"])
def test_an_unknown_mode_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="exact, phases, off"):
        Ledger(mode=bad)


def test_an_unknown_category_is_refused() -> None:
    with Ledger() as ledger, pytest.raises(ValueError, match=r"category='weights'.*parameters"):
        ledger.claim("weights", "w", torch.ones(1))


def test_the_holdings_of_the_peak_add_up_and_say_whose_they_are() -> None:
    with Ledger() as ledger:
        model = small_model()
        ledger.own(model=model)
        train(model, adapt=ledger.own)
    kernel = ledger.peak.categories["kernel"] or 0
    assert sum(holding.bytes for holding in ledger.peak.holdings) + kernel == ledger.peak.bytes
    names = {(holding.category, holding.name) for holding in ledger.peak.holdings}
    assert ("parameters", "model.embed_tokens.weight") in names
    assert any(category == "activations" and "mlp" in name for category, name in names)


def test_what_the_data_phase_makes_is_inputs_though_nobody_claims_it() -> None:
    with Ledger() as ledger, ledger.phase("data"):
        kept = torch.zeros(100)
    assert ledger.categories["inputs"].end == kept.nbytes
