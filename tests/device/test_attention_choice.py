"""Which attention kernel a card runs: each rule of sdp_utils.cpp, by a call that only this rule turns away."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.device.attention_choice import Attention, choose_backend, prefers_cudnn
from harness.device.call import Card

ADA, AMPERE, HOPPER, TURING, BLACKWELL = (Card(each) for each in (8.9, 8.0, 9.0, 7.5, 12.0))


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def call(
    *,
    heads: int = 8,
    key_heads: int = 8,
    length: int = 64,
    keys: int = 64,
    features: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    grad: bool = False,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Attention:
    query = tensor(2, heads, length, features, dtype=dtype, grad=grad)
    key, value = (tensor(2, key_heads, keys, features, dtype=dtype, grad=grad) for _ in range(2))
    return Attention(query, key, value, mask, dropout, causal, heads != key_heads)


@pytest.mark.parametrize("card", [ADA, AMPERE, BLACKWELL])
def test_half_precision_without_a_mask_is_flash(card: Card) -> None:
    assert choose_backend(call(causal=True), card) == "flash"


def test_hopper_prefers_cudnn_from_9_15_1_on() -> None:
    assert choose_backend(call(), HOPPER) == "cudnn"
    assert choose_backend(call(), HOPPER._replace(cudnn=91002)) == "flash"


def test_only_datacentre_cards_prefer_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    preferring = {each for each in (7.5, 8.0, 8.9, 9.0, 10.0, 10.3, 11.0, 12.0) if prefers_cudnn(Card(each))}
    assert preferring == {9.0, 10.0, 10.3}
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert choose_backend(call(), HOPPER) == "flash"


def test_a_mask_or_single_precision_is_the_efficient_kernel() -> None:
    mask = tensor(64, 64, dtype=torch.bool)
    assert choose_backend(call(mask=mask), ADA) == "efficient"
    assert choose_backend(call(dtype=torch.float32), ADA) == "efficient"
    assert choose_backend(call(dtype=torch.float64), ADA) == "math"


def test_before_ampere_half_precision_is_the_efficient_kernel_and_bf16_is_math() -> None:
    assert choose_backend(call(dtype=torch.float16), TURING) == "efficient"
    assert choose_backend(call(), TURING) == "math"


def test_shared_heads_are_for_flash_and_cudnn_alone() -> None:
    shared = call(key_heads=2)
    assert choose_backend(shared, ADA) == "flash"
    assert choose_backend(shared._replace(mask=tensor(64, 64, dtype=torch.bool)), ADA) == "math"
    assert choose_backend(shared._replace(shares_heads=False), ADA) == "math"
    assert choose_backend(call(key_heads=3), ADA) == "math"


@pytest.mark.parametrize(
    ("features", "dropout", "grad", "backend"),
    [
        (256, 0.0, True, "flash"),
        (256, 0.1, True, "efficient"),
        (256, 0.1, False, "flash"),
        (200, 0.0, True, "efficient"),
        (200, 0.0, False, "flash"),
        (192, 0.1, True, "flash"),
        (264, 0.0, False, "efficient"),
    ],
)
def test_wide_heads_train_with_flash_only_where_shared_memory_is_large(
    features: int, dropout: float, grad: bool, backend: str
) -> None:
    wide = call(features=features, dropout=dropout, grad=grad)
    assert choose_backend(wide, ADA) == backend
    assert choose_backend(wide, BLACKWELL) == backend
    assert choose_backend(wide, AMPERE) == ("flash" if features <= 256 else "efficient")


def test_without_gradients_enabled_nothing_is_trained() -> None:
    with torch.no_grad():
        assert choose_backend(call(features=200, grad=True), ADA) == "flash"


def test_causal_attention_of_other_lengths_is_not_flash() -> None:
    assert choose_backend(call(length=1, causal=True), ADA) == "efficient"
    assert choose_backend(call(length=1), ADA) == "flash"


def test_flash_pads_features_and_the_efficient_kernel_wants_them_aligned() -> None:
    mask = tensor(64, 64, dtype=torch.bool)
    assert choose_backend(call(features=60), ADA) == "flash"
    assert choose_backend(call(features=60, mask=mask), ADA) == "math"
    assert choose_backend(call(features=60, dtype=torch.float32), ADA) == "efficient"
    assert choose_backend(call(features=62, dtype=torch.float32), ADA) == "math"


def test_features_that_are_not_contiguous_are_math() -> None:
    turned = tensor(2, 8, 64, 64).transpose(-1, -2)
    assert choose_backend(Attention(turned, turned, turned), ADA) == "math"


def test_other_shapes_than_four_axes_are_math() -> None:
    flat = tensor(8, 64, 64)
    assert choose_backend(Attention(flat, flat, flat), ADA) == "math"


@pytest.mark.parametrize(
    "given",
    [
        call(features=136),
        call(features=60),
        call(keys=1),
        call(length=1, dropout=0.125),
        call(dropout=0.1),
    ],
    ids=["wide", "unaligned", "one key", "one query with dropout", "a dropout that is no 16th"],
)
def test_what_cudnn_cannot_do_is_flash(given: Attention) -> None:
    assert choose_backend(given, HOPPER) == "flash"


def test_nothing_to_attend_to_and_other_batches_are_math() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert choose_backend(call(length=0, dtype=dtype), ADA) == "math"
        other = tensor(1, 8, 64, 64, dtype=dtype)
        assert choose_backend(call(dtype=dtype)._replace(key=other, value=other), ADA) == "math"


def test_cudnn_is_passed_over_where_results_must_repeat() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_backend(call(), HOPPER) == "flash"
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert choose_backend(call(), HOPPER) == "cudnn"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_mask_for_cudnn_spans_each_axis_or_has_one_row_there() -> None:
    fits, other = (tensor(*shape, dtype=torch.bool) for shape in ((2, 1, 64, 64), (2, 64, 64)))
    assert choose_backend(call(mask=fits), HOPPER) == "cudnn"
    assert choose_backend(call(mask=other), HOPPER) == "efficient"


def test_the_user_s_choice_is_honoured() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert choose_backend(call(), HOPPER) == "math"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        assert choose_backend(call(), ADA) == "efficient"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        choose_backend(call(dtype=torch.float32), ADA)
