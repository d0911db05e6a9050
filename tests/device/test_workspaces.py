"""The workspaces of cuBLAS and cublasLt, by card, environment and release."""

import pytest
import torch

from harness.device.workspaces import (
    Workspaces,
    addmm_on_lt,
    lt_workspace_bytes,
    uses_cublas,
    workspace,
    workspace_bytes,
)

LARGE, SMALL = 33_554_432, 8_519_680


@pytest.mark.parametrize(
    ("capability", "release", "size"),
    [
        (8.9, (2, 13), SMALL),
        (8.0, (2, 11), SMALL),
        (9.0, (2, 11), LARGE),
        (9.0, (2, 13), LARGE),
        (10.0, (2, 11), SMALL),
        (10.0, (2, 12), LARGE),
        (12.0, (2, 13), LARGE),
        (11.0, (2, 13), SMALL),
        (11.0, (2, 14), LARGE),
    ],
)
def test_a_card_has_the_workspace_of_its_capability_and_release(
    capability: float, release: tuple[int, int], size: int
) -> None:
    assert workspace_bytes(capability, {}, release) == size


def test_a_configured_workspace_is_the_sum_of_its_pairs_in_kib() -> None:
    assert workspace_bytes(9.0, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}) == 4096 * 1024 * 8
    assert workspace_bytes(9.0, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}) == 131_072
    assert workspace_bytes(9.0, {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}) == SMALL


@pytest.mark.parametrize("text", ["4096:8", "", ":4096", "none"])
def test_a_workspace_that_torch_cannot_read_leaves_the_default_with_a_warning(text: str) -> None:
    with pytest.warns(UserWarning, match="8,519,680"):
        assert workspace_bytes(8.9, {"CUBLAS_WORKSPACE_CONFIG": text}) == SMALL


def test_the_workspace_of_lt_is_one_mebibyte_and_no_more_than_that_of_cublas() -> None:
    assert lt_workspace_bytes(8.9, {}) == 1_048_576
    assert lt_workspace_bytes(8.9, {"CUBLASLT_WORKSPACE_SIZE": "32768"}) == SMALL
    apart = {"CUBLASLT_WORKSPACE_SIZE": "32768", "TORCH_CUBLASLT_UNIFIED_WORKSPACE": "0"}
    assert lt_workspace_bytes(8.9, apart) == LARGE
    assert lt_workspace_bytes(8.9, {"CUBLASLT_WORKSPACE_SIZE": " 512k"}) == 524_288


def test_an_unreadable_size_of_lt_leaves_the_default_and_a_negative_one_is_refused() -> None:
    with pytest.warns(UserWarning, match="1024 KiB"):
        assert lt_workspace_bytes(8.9, {"CUBLASLT_WORKSPACE_SIZE": "big"}) == 1_048_576
    with pytest.raises(ValueError, match="negative"):
        lt_workspace_bytes(8.9, {"CUBLASLT_WORKSPACE_SIZE": "-1", "TORCH_CUBLASLT_UNIFIED_WORKSPACE": "0"})


def test_lt_shares_the_workspace_of_cublas_from_2_12_on_or_where_it_is_told_to() -> None:
    assert not workspace(9.0, {}, (2, 11)).shared
    assert workspace(9.0, {"TORCH_CUBLASLT_UNIFIED_WORKSPACE": "1"}, (2, 11)).shared
    assert workspace(9.0, {}, (2, 12)).shared
    assert not workspace(9.0, {"TORCH_CUBLASLT_UNIFIED_WORKSPACE": "0"}, (2, 13)).shared


def test_each_thread_and_stream_takes_one_workspace_once() -> None:
    own = Workspaces(8.9, {})
    assert own.take(thread=1, stream=0) == (SMALL,)
    assert own.take(thread=1, stream=0) == ()
    assert own.take(thread=1, stream=0, lt=True) == ()
    assert own.take(thread=2, stream=0, lt=True) == (SMALL,)
    assert own.take(thread=1, stream=7) == (SMALL,)
    own.clear()
    assert own.take(thread=1, stream=0) == (SMALL,)


def test_in_2_11_a_call_of_lt_takes_both_workspaces() -> None:
    own = Workspaces(8.9, {}, (2, 11))
    assert own.take(thread=1, stream=0, lt=True) == (SMALL, 1_048_576)
    assert own.take(thread=1, stream=0, lt=True) == ()
    assert own.take(thread=1, stream=0) == ()


def test_matrix_products_take_a_handle_and_other_operators_do_not() -> None:
    assert all(map(uses_cublas, ("mm", "addmm", "bmm", "baddbmm", "addmv", "dot", "_scaled_mm")))
    assert not any(map(uses_cublas, ("add", "convolution", "_scaled_dot_product_flash_attention", "sum")))


def test_a_bias_of_one_row_is_added_on_lt() -> None:
    bias, first, second = (torch.empty(shape, device="meta") for shape in ((8,), (4, 16), (16, 8)))
    assert addmm_on_lt(bias, first, second, 1, {})
    assert addmm_on_lt(bias[None], first, second, 1.0, {})
    assert not addmm_on_lt(bias, first, second, 0.5, {})
    assert not addmm_on_lt(bias.expand(4, 8), first, second, 1, {})
    assert addmm_on_lt(bias.expand(4, 8), first, second, 1, {}, activation=True)
    assert not addmm_on_lt(bias[:1], first, second[:, :1], 1, {})
    assert not addmm_on_lt(bias, first, second, 1, {"DISABLE_ADDMM_CUDA_LT": "1"})
    assert not addmm_on_lt(bias.int(), first.int(), second.int(), 1, {})
