"""Composite operators on a fake card: the operators that CUDA would run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness.device.call import Card
from harness.device.kernels import attention, installed, rms_norm_outputs

ADA = Card(8.9, 128)


class Names(TorchDispatchMode):
    """The operators that run, with the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: dict[str, list[tuple[int, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        each = out if isinstance(out, tuple) else (out,)
        name = func._schema.name.removeprefix("aten::")
        self.ran.setdefault(name, [tuple(one.shape) for one in each if isinstance(one, torch.Tensor)])
        return out


@contextmanager
def card(which: Card = ADA) -> Iterator[Names]:
    """A fake card without gradients, which a build of torch without CUDA cannot record."""
    with FakeTensorMode(), torch.no_grad(), installed(which), Names() as names:
        yield names


def on_card(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def ran(run: Callable[[], Any], which: Card = ADA) -> dict[str, list[tuple[int, ...]]]:
    with card(which) as names:
        run()
    return names.ran


def test_rms_norm_is_one_operator_with_a_statistic_for_each_row() -> None:
    names = ran(lambda: torch.rms_norm(on_card(4, 16, 64), (64,), on_card(64), 1e-6))
    assert names["_fused_rms_norm"] == [(4, 16, 64), (4, 16, 1)]
    assert "pow" not in names
    assert "mean" not in names


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_rms_norm_of_another_type_than_its_weight_is_taken_apart() -> None:
    names = ran(lambda: torch.rms_norm(on_card(4, 64), (64,), on_card(64, dtype=torch.float32), 1e-6))
    assert "_fused_rms_norm" not in names
    assert "rsqrt" in names


def test_the_statistic_is_in_single_precision_and_the_output_contiguous() -> None:
    x = torch.empty(64, 16, dtype=torch.bfloat16, device="meta").t()
    out, statistic = rms_norm_outputs(x, [64], None, None)
    assert (out.dtype, out.stride()) == (torch.bfloat16, (64, 1))
    assert (statistic.dtype, tuple(statistic.shape)) == (torch.float32, (16, 1))


def test_dropout_keeps_a_boolean_mask_by_itself() -> None:
    assert "native_dropout" in ran(lambda: F.dropout(on_card(4, 16), 0.1))


def test_attention_runs_the_kernel_that_the_card_would() -> None:
    def attend(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        q = on_card(2, 8, 128, 64, dtype=dtype)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    assert "_scaled_dot_product_flash_attention" in ran(attend)
    assert "_scaled_dot_product_efficient_attention" in ran(lambda: attend(torch.float32))
    assert "_scaled_dot_product_cudnn_attention" in ran(attend, Card(9.0, 132))
    assert "bmm" in ran(lambda: attend(torch.float64))


def test_flash_keeps_heads_that_are_shared_and_pads_features_to_a_multiple_of_8() -> None:
    def attend() -> torch.Tensor:
        q, k = on_card(2, 8, 128, 60), on_card(2, 2, 128, 60)
        out = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        assert out.shape == (2, 8, 128, 60)
        return out

    names = ran(attend)
    assert names["constant_pad_nd"] == [(2, 8, 128, 64)]
    assert names["_scaled_dot_product_flash_attention"][:2] == [(2, 8, 128, 64), (2, 8, 128)]
    assert "repeat_interleave" not in names


def test_a_boolean_mask_becomes_one_to_add_in_the_queries_type() -> None:
    def attend() -> torch.Tensor:
        q = on_card(2, 8, 128, 64)
        return F.scaled_dot_product_attention(q, q, q, on_card(2, 1, 128, 128, dtype=torch.bool))

    names = ran(attend)
    assert names["where"] == [(2, 1, 128, 128)]
    assert names["expand"] == [(2, 8, 128, 128)]
    assert "constant_pad_nd" not in names


def test_a_mask_whose_rows_are_not_at_multiples_of_8_is_padded() -> None:
    def attend() -> torch.Tensor:
        q, k = on_card(2, 8, 128, 64), on_card(2, 8, 100, 64)
        return F.scaled_dot_product_attention(q, k, k, on_card(128, 100))

    assert ran(attend)["constant_pad_nd"] == [(128, 104)]


def test_an_empty_attention_is_zeros() -> None:
    q = torch.empty(2, 8, 0, 64, device="meta")
    assert attention(q, q, q, card=ADA).shape == (2, 8, 0, 64)


def test_the_log_of_sums_is_kept_only_for_a_backward() -> None:
    q = torch.empty(2, 8, 100, 64, device="meta", requires_grad=True)
    with Names() as names:
        attention(q, q, q, card=ADA).sum().backward()
        with torch.no_grad():
            attention(q, q, q, card=ADA)
    assert names.ran["_scaled_dot_product_efficient_attention"][1] == (2, 8, 128)
    assert names.ran["_scaled_dot_product_efficient_attention_backward"] == 3 * [(2, 8, 100, 64)]


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "_fused_rms_norm"])
def test_nothing_stays_installed(name: str) -> None:
    before = torch._C._dispatch_dump(f"aten::{name}")
    with installed(ADA):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA")
        assert torch._C._dispatch_dump(f"aten::{name}") != before
    assert torch._C._dispatch_dump(f"aten::{name}") == before
