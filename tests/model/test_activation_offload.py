"""Activations that wait on the host: the same gradients, no parameter among them, one copy of the same memory."""

from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

from harness import Ledger
from harness.config.load import Checkpointing, Refusal
from harness.model import activation_checkpointing
from harness.model.activation_offload import ActivationOffload, apply
from tests.model.test_activation_checkpointing import backward, built_model, gradients

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize(
    ("kind", "attention", "dtype"),
    [
        ("llama", "sdpa", torch.bfloat16),
        ("gpt2", "eager", torch.float32),  # its dropout is 0.1, its q, k and v are parts of one tensor
        ("mixtral", "sdpa", torch.float32),
    ],
)
def test_gradients_are_bit_for_bit_those_without(
    kind: str, attention: str, dtype: torch.dtype, mode: Any
) -> None:
    depth = {"n_layer" if kind == "gpt2" else "num_hidden_layers": 2}
    plain, offloaded = (built_model(kind, attention, dtype, **depth) for _ in range(2))
    requested = Checkpointing(mode, offload="cpu")
    with Ledger(model=offloaded) as ledger:
        hooks = apply(offloaded, requested, CPU, ledger)
        activation_checkpointing.apply(offloaded, requested, offload=hooks)
        assert backward(offloaded) == backward(plain)
        assert ledger.on_host.bytes == 0  # nothing outlives the backward
    expected = gradients(plain)
    assert set(gradients(offloaded)) == set(expected)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(offloaded).items())
    assert ledger.allocator.unattributed == 0
    most = ledger.on_host.most
    assert most is not None
    assert (most.bytes > 0, most.pinned, most.where.phase) == (True, None, "forward")


@pytest.mark.parametrize("calls", [list, lambda saved: dict(enumerate(saved))])  # up to torch 2.12, and since
def test_what_selective_checkpointing_saved_is_packed_wherever_torch_keeps_it(calls: Any) -> None:
    ledger, tensor = Ledger(), torch.randn(3, 4)
    storage = {"mm": calls([checkpoint._VersionWrapper(tensor), checkpoint._VersionWrapper(7)])}
    activation_checkpointing._pack(storage, ActivationOffload(CPU, ledger), WeakSet())
    packed, number = storage["mm"][0], storage["mm"][1]
    assert isinstance(packed, activation_checkpointing.Packed)
    assert ledger.on_host.bytes == tensor.nbytes
    assert torch.equal(packed.get_val(False), tensor)
    assert number.get_val(False) == 7


def test_a_forward_without_gradients_puts_nothing_there() -> None:
    model, ledger = built_model("llama"), Ledger()
    apply(model, Checkpointing(offload="cpu"), CPU, ledger)
    with ledger, torch.no_grad():
        model(input_ids=torch.arange(8)[None], use_cache=False)
    assert ledger.on_host.most is None


def test_a_forward_that_fails_leaves_no_hooks() -> None:
    model, ledger = built_model("llama"), Ledger()
    apply(model, Checkpointing(offload="cpu"), CPU, ledger)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 8), 10**6), use_cache=False)
    before, weight = ledger.on_host.most, nn.Parameter(torch.ones(10**6))
    (weight.exp() * 2).sum().backward()
    assert ledger.on_host.most == before


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = built_model("llama")
    model.config.num_hidden_layers = 99
    with pytest.raises(
        Refusal, match=r"checkpointing\.offload=cpu: its 99 layers .* use checkpointing.offload=none"
    ):
        apply(model, Checkpointing(offload="cpu"), CPU, Ledger())


def test_parameters_and_tensors_of_another_device_stay() -> None:
    hooks = ActivationOffload(CPU, Ledger())
    weight = nn.Parameter(torch.ones(3, 4))
    for tensor in (weight, weight.t(), weight[1:], torch.empty(3, device="meta")):
        assert hooks.pack_hook(tensor) is tensor
        assert hooks.unpack_hook(tensor) is tensor


def test_tensors_in_the_same_memory_have_one_copy_until_it_changes() -> None:
    ledger = Ledger()
    hooks, tensor = ActivationOffload(CPU, ledger), torch.randn(4, 6)
    packed = [hooks.pack_hook(each) for each in (tensor, tensor.t(), tensor.view(24), tensor.detach())]
    assert ledger.on_host.bytes == tensor.nbytes
    before = tensor.clone()
    tensor.mul_(2)
    changed = hooks.pack_hook(tensor)
    assert ledger.on_host.bytes == 2 * tensor.nbytes
    assert torch.equal(hooks.unpack_hook(packed[1]), before.t())
    assert torch.equal(hooks.unpack_hook(changed), tensor)
    del packed, changed
    assert ledger.on_host.bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_every_layout_comes_back_with_its_values(dtype: torch.dtype) -> None:
    ledger = Ledger()
    hooks, whole = ActivationOffload(CPU, ledger), (torch.randn(2, 3, 8) * 3).to(dtype)
    dense = (whole, whole.transpose(0, 1), whole.permute(2, 0, 1), whole[1], whole[0, :, 0][:1])
    repeated, overlapping = whole[:1].expand(5, 3, 8), whole.as_strided((3, 4), (2, 1))
    sliced = (whole[..., 2:5], whole[:, ::2], whole[..., :4].expand(7, 2, 3, 4), overlapping)
    for tensor in (*dense, repeated, *sliced):
        packed = hooks.pack_hook(tensor)
        back = hooks.unpack_hook(packed)
        assert torch.equal(back, tensor)
        assert back.stride() == tensor.stride()
        if tensor is not overlapping:
            repeats = tensor.size(0) if not tensor.stride(0) else 1
            assert ledger.on_host.bytes == tensor.nbytes // repeats
        del packed, back
        assert ledger.on_host.bytes == 0
