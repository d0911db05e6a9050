"""Scratch inside CUDA's operators: each formula against one example that is worked out by hand here."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from harness.device import cub
from harness.device.call import Card, Moment
from harness.device.operators import SCRATCH, scratch
from harness.device.reduction import axes, staging
from harness.device.scratch_attention import splits
from harness.quantization import nf4

HOPPER, ADA, AMPERE = Card(9.0, 132), Card(8.9, 128), Card(8.0, 108)
aten = torch.ops.aten
bf16, int64, fp32 = torch.bfloat16, torch.int64, torch.float32


def of(*shape: int, dtype: torch.dtype = fp32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def moments(func: OpOverload, *args: Any, card: Card = HOPPER, **kwargs: Any) -> Any:
    return scratch(func, args, kwargs, func(*args, **kwargs), card)


def blocks(func: OpOverload, *args: Any, card: Card = HOPPER, **kwargs: Any) -> Any:
    """The blocks of an operator that has one moment, with its outputs."""
    (only,) = moments(func, *args, card=card, **kwargs)
    assert only.outputs
    return only.blocks


PAGE = Path(__file__).parents[2] / "profiles" / "measured.md"


def test_every_operator_of_the_table_is_one_of_aten_and_names_its_source() -> None:
    measured = re.findall(r"(?m)^### (\w+)$", PAGE.read_text())
    for name, entry in SCRATCH.items():
        of_aten = hasattr(aten, name)
        assert of_aten or name == "gemm_4bit", name
        assert entry.does
        assert entry.source.startswith("aten/src/ATen/" if of_aten else "bitsandbytes/")
        assert entry.row in ("unverified", *measured), name


def test_a_packed_weight_is_unpacked_for_many_rows() -> None:
    nf4.import_library()
    with FakeTensorMode():
        packed, scales = torch.empty(64 * 256 // 2, 1, dtype=torch.uint8), torch.empty(1)
        codes, table = torch.empty(256, dtype=torch.uint8), torch.empty(256)
        nested = {"absmax_8bit": codes, "absmax_code": table, "absmax_offset": torch.empty(())}
        for rows, expected in ((1537, (Moment((1024, 1024, 2 * 64 * 256)),)), (1536, None)):
            args = (torch.empty(rows, 256, dtype=torch.bfloat16), packed, [64, 256], scales, 64, "nf4")
            product = torch.ops.bitsandbytes.gemm_4bit.default
            assert scratch(product, args, nested, product(*args, **nested), HOPPER) == expected


def test_an_operator_outside_the_table_has_none() -> None:
    assert moments(aten.add.Tensor, of(4), of(4)) == ()


def test_a_size_that_depends_on_values_is_unknown() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        places = aten.nonzero.default(torch.empty(4))
        assert scratch(aten.mm.default, (places.float(), places.float().t()), {}, places, HOPPER) is None
        assert scratch(aten.add.Tensor, (places, places), {}, places, HOPPER) == ()


def test_cub_sorts_out_of_place_with_a_spare_buffer_and_counts_of_256_digits() -> None:
    # 8 passes x 256 digits x 8 bytes; 2 tiles of 12 x 384 items x 1 KiB; keys and values; 8 x 4 bytes; alignment
    assert cub.radix_sort(8192, 8, 8, HOPPER) == 16384 + 2048 + 65536 + 65536 + 256 + 255
    # 4 passes; 33 tiles of 8 x 384; 400,000 and 800,000 bytes at multiples of 256
    assert cub.radix_sort(100_000, 4, 8, ADA) == 8192 + 33792 + 400_128 + 800_000 + 256 + 255
    assert cub.radix_sort(2304, 8, 8, HOPPER) == 1
    assert cub.radix_sort(2305, 8, 8, HOPPER) != 1
    assert cub.radix_sort(100_000, 2, 8, ADA) is None
    # keys alone: 18 tiles of 15 x 384 items
    assert cub.radix_sort(100_000, 8, 0, HOPPER) == 16_384 + 18 * 1024 + 800_000 + 0 + 256 + 255
    # one pass needs no spare buffers: 1 x 2 KiB, 2 tiles, a counter
    assert cub.radix_sort(8192, 8, 8, HOPPER, bits=8) == 2048 + 2048 + 0 + 0 + 256 + 255


def test_a_scan_keeps_a_descriptor_of_16_bytes_for_each_tile() -> None:
    assert cub.scan_at_most(8960) == up_to_256((10 + 32) * 16) + 255


def up_to_256(size: int) -> int:
    return (size + 255) // 256 * 256


def test_the_gradient_of_an_embedding_sorts_and_sums_in_fp32() -> None:
    grad, indices = of(2, 4096, 1024, dtype=bf16), of(2, 4096, dtype=int64)
    sort, sums = moments(aten.embedding_dense_backward.default, grad, indices, 32000, -1, False)
    column = 8192 * 8
    assert sort == Moment((column, column, column, 150_015), outputs=False)
    partial = 8192 // 10 + 8192
    assert sums.blocks == (
        *(column, column),
        *(column, 8, 8192 * 8, 8192 * 8, 8, partial * 8),
        partial * 1024 * 4,
    )
    assert partial * 1024 * 4 == 36_909_056


def test_a_small_vocabulary_bounds_the_partial_sums_and_frequencies_add_a_column() -> None:
    grad, indices = of(8192, 64), of(8192, dtype=int64)
    _, sums = moments(aten.embedding_dense_backward.default, grad, indices, 100, -1, True)
    assert sums.blocks == (65536, 65536, 65536, 65536, 8, 800, 800, 8, 919 * 8, 919 * 64 * 4)


def test_up_to_3072_indices_need_none() -> None:
    assert (
        moments(aten.embedding_dense_backward.default, of(3072, 64), of(3072, dtype=int64), 100, -1, False)
        == ()
    )
    turned = of(64, 3072).t()
    assert blocks(aten.embedding_dense_backward.default, turned, of(3072, dtype=int64), 100, -1, False) == (
        3072 * 64 * 4,
    )


def test_short_rows_are_sorted_in_place_with_one_row_of_indices() -> None:
    assert blocks(aten.sort.default, of(10, 4096)) == (4096 * 8,)


def test_long_rows_are_sorted_one_by_one_all_at_once_or_by_segments() -> None:
    assert blocks(aten.sort.default, of(1, 100_000), card=ADA) == (800_000, 1_242_623)
    # 27 tiles of 8 x 384 items
    at_once = 8192 + 27_648 + 327_680 + 655_360 + 256 + 255
    assert blocks(aten.sort.default, of(10, 8192), card=ADA) == (655_360, 655_360, 327_680, at_once)
    assert blocks(aten.sort.default, of(127, 8192))[:2] == 2 * (127 * 8192 * 8,)
    count = 256 * 8192
    assert blocks(aten.sort.default, of(256, 8192)) == (count * 8, count * 4 + count * 8 + 255)
    assert moments(aten.sort.default, of(10, 8192, dtype=bf16), card=ADA) is None


def test_rows_that_are_not_the_last_axis_are_copied_first_and_their_results_back() -> None:
    own = blocks(aten.sort.default, of(8192, 10), 0, card=ADA)
    assert own[:3] == (327_680, 327_680, 655_360)
    assert own[3:] == blocks(aten.sort.default, of(10, 8192), card=ADA)


def test_topk_of_a_long_row_counts_256_digits_for_each_of_its_blocks() -> None:
    tiles = 126  # of 4 x 256 elements of 128,256
    assert blocks(aten.topk.default, of(1, 128_256), 50) == (
        *(4, 8, 8),
        *(tiles * 512, 1024, tiles * 4, tiles * 4),
        up_to_256(33 * 16) + 255,
    )
    assert moments(aten.topk.default, of(64, 512), 8) == ()
    assert moments(aten.topk.default, of(1, 128_256), 5000) is None
    assert moments(aten.topk.default, of(1, 128_256), 50, card=Card(9.0)) is None


def test_accumulating_into_indices_sorts_them() -> None:
    indices, values = [of(10_000, dtype=int64)], of(10_000, 64)
    sort = 4096 + 3072 + 2 * up_to_256(80_000) + 256 + 255  # 16 bits of 50,000 rows: 2 passes; 3 tiles
    target = of(50_000, 64)
    assert blocks(aten.index_put.default, target, indices, values, True) == (*(4 * (80_000,)), sort)
    assert moments(aten.index_put.default, target, indices, values) == ()
    broadcast = blocks(aten.index_put.default, target, indices, of(1), True)
    assert broadcast == (10_000 * 64 * 4, *(4 * (80_000,)), sort)
    assert moments(aten.index_put_.default, of(8), [of(8, dtype=torch.bool)], of(8), True) is None


def test_drawing_keeps_noise_or_three_copies_of_the_distribution() -> None:
    assert blocks(aten.multinomial.default, of(4, 1000), 1) == (16_000,)
    assert blocks(aten.multinomial.default, of(4, 1000), 5, True) == (16_000, 16_000, 16_000)
    assert blocks(aten.multinomial.default, of(4, 1000), 5) == (16_000, 4 * 5 * 4)


def test_only_a_single_row_is_scanned_with_cub() -> None:
    assert blocks(aten.cumsum.default, of(1, 8960, dtype=int64), -1) == (up_to_256(42 * 16) + 255,)
    assert moments(aten.cumsum.default, of(2, 4096, dtype=int64), -1) == ()
    assert blocks(aten.cumsum.default, of(2, 4096, dtype=torch.bool), -1) == (65_536,)


def test_the_gradient_of_a_norm_is_summed_in_parts_over_many_rows_of_few_features() -> None:
    x, rows, weight = of(100_000, 64), of(100_000, 1), of(64)
    layer = (aten.native_layer_norm_backward.default, x, x, [64], rows, rows, weight, weight)
    parts = 3125  # of 32 rows
    table = parts * 64 * 4
    staged = (4 * 64 * 25 * 16 * 4, 4)  # 25 blocks share 64 outputs; 16 lanes of 4
    assert blocks(*layer, [True, True, True]) == (table, table, 256, *staged)
    assert moments(*layer, [True, False, False]) == ()
    rms = (aten._fused_rms_norm_backward.default, x, x, [64], rows, weight)
    assert blocks(*rms, [True, True]) == (table, 256, *staged)
    few = of(65_536, 64)
    assert moments(rms[0], few, few, [64], of(65_536, 1), weight, [True, True]) == ()
    wide = of(100_000, 4096)
    assert (
        moments(aten._fused_rms_norm_backward.default, wide, wide, [4096], rows, of(4096), [True, True]) == ()
    )


def test_a_norm_copies_what_is_not_contiguous() -> None:
    turned = of(64, 32).t()
    assert blocks(aten.native_layer_norm.default, turned, [64], of(64), of(64), 1e-5) == (32 * 64 * 4,)


def test_a_group_norm_keeps_statistics_of_channels_and_groups() -> None:
    x, statistics = of(2, 64, 16, 16), of(2, 8)
    weight = of(64)
    channel, group = 2 * 64 * 4, 2 * 8 * 4
    assert blocks(aten.native_group_norm.default, x, weight, weight, 2, 64, 256, 8, 1e-5) == 2 * (channel,)
    backward = (
        aten.native_group_norm_backward.default,
        *(x, x, statistics, statistics, weight, 2, 64, 256, 8),
    )
    assert blocks(*backward, [True, True, True]) == (channel, channel, group, group, channel)
    assert blocks(*backward, [False, True, True]) == (channel, channel)


def test_a_softmax_of_masked_rows_marks_what_is_masked() -> None:
    assert blocks(aten._safe_softmax.default, of(2, 8, 64, 64), -1) == (65_536, 1024, 4)


def test_the_log_of_sums_keeps_the_exponentials() -> None:
    assert blocks(aten.logsumexp.default, of(4, 1000, dtype=bf16), [-1]) == (8000, 8)


def test_a_sum_over_rows_is_staged_for_every_lane_of_every_block() -> None:
    # 4 outputs a lane, 32 lanes, 4 rows a block: 32 blocks of columns, 132 x 16 // 32 = 66 blocks a column
    staged = (4 * 4096 * 66 * 32 * 4, 4 * 32)
    assert blocks(aten.sum.dim_IntList, of(16_384, 4096, dtype=bf16), [0]) == staged
    assert blocks(aten.sum.dim_IntList, of(8, 2048, 4096, dtype=bf16), [0, 1]) == staged
    assert staged[0] == 138_412_032
    assert moments(aten.sum.dim_IntList, of(4096, 4096), [1]) == ()


def test_a_matrix_that_starts_at_an_odd_element_is_summed_one_column_a_lane() -> None:
    odd = of(16_384 * 4096 + 1, dtype=bf16)[1:].view(16_384, 4096)
    # 32 lanes, 16 rows a block: 128 blocks of columns, 132 x 4 // 128 = 5 blocks a column
    assert blocks(aten.sum.dim_IntList, odd, [0]) == (4 * 4096 * 5 * 32, 4 * 128)


def test_a_sum_of_all_is_staged_once_for_each_of_its_blocks() -> None:
    # 512 threads: 195,313 values each, at most 256: 763 blocks
    assert blocks(aten.sum.default, of(10**8)) == (763 * 4, 4)
    assert blocks(aten.linalg_vector_norm.default, of(10**8)) == (763 * 4, 4)


def test_a_mean_is_staged_like_a_sum_and_the_largest_in_the_input_s_own_type() -> None:
    x = of(16_384, 4096, dtype=bf16)
    (staged, semaphores) = blocks(aten.sum.dim_IntList, x, [0])
    assert blocks(aten.mean.dim, x, [0]) == (staged, semaphores)
    assert blocks(aten.amax.default, x, [0]) == (staged // 2, semaphores)


def test_a_softmax_s_backward_multiplies_first() -> None:
    backward = aten._softmax_backward_data.default
    assert blocks(backward, of(32, 64), of(32, 64), -1, fp32) == (32 * 64 * 4,)


def test_a_softmax_copies_what_is_not_contiguous() -> None:
    turned, straight = of(64, 32).t(), of(32, 64)
    assert blocks(aten._softmax.default, turned, -1, False) == (32 * 64 * 4,)
    assert moments(aten._log_softmax.default, straight, -1, False) == ()
    backward = aten._log_softmax_backward_data.default
    assert blocks(backward, turned, straight, -1, fp32) == (32 * 64 * 4,)


def test_a_mask_is_copied_to_integers_before_it_is_summed() -> None:
    assert blocks(aten.sum.default, of(2, 8192, dtype=torch.bool)) == (2 * 8192 * 8,)


def test_the_place_of_the_largest_is_staged_as_a_pair() -> None:
    # 8 rows of 64 lanes by 8: 297 values a thread; 19 blocks a row of 16 each
    assert blocks(aten.argmax.default, of(8, 151_936), -1) == (16 * 8 * 19, 4 * 8)
    assert moments(aten.argmax.default, of(8, 128_256), -1) == ()


def test_a_reduction_over_2_gib_or_on_an_unknown_card_is_unknown() -> None:
    assert moments(aten.sum.default, of(2**30 + 1, dtype=bf16)) is None
    assert moments(aten.sum.default, of(10**8), card=Card(9.0)) is None


def test_axes_that_both_tensors_step_through_are_joined() -> None:
    joined = axes((8, 2048, 4096), (2048 * 4096, 4096, 1), (0, 1))
    assert [(each.size, each.stride) for each in joined] == [(16_384, 4096), (4096, 1)]
    apart = axes((8, 2048, 4096), (2048 * 4096, 4096, 1), (1,))
    assert [(each.size, each.stride) for each in apart] == [(2048, 4096), (4096, 1), (8, 2048 * 4096)]
    assert staging(axes((4, 1), (1, 1), (1,)), element=4, accumulated=4, card=HOPPER) == ()


def test_the_norms_of_a_list_have_a_partial_one_for_each_chunk() -> None:
    tensors = [of(200_000), of(10)]
    assert scratch(aten._foreach_norm.Scalar, (tensors,), {}, tensors, HOPPER) == (Moment((2 * 4 * 4,)),)


def test_a_histogram_reads_the_least_and_the_largest() -> None:
    assert scratch(aten.histc.default, (of(100),), {}, of(100), HOPPER) == (Moment((4, 4)),)


def test_factors_that_blas_cannot_read_are_copied() -> None:
    wide = of(64, 128)
    every_other = wide[:, ::2]
    assert blocks(aten.mm.default, every_other, of(64, 32)) == (64 * 64 * 4,)
    assert moments(aten.mm.default, wide[:, :64], of(32, 64).t()) == ()
    assert moments(aten.addmm.default, of(32), of(1, 64), of(64, 32)) == ()
    assert blocks(aten.bmm.default, of(1, 4, 8).expand(3, 4, 8)[:, :, ::2], of(3, 4, 8)) == (3 * 4 * 4 * 4,)


def heads(batch: int, number: int, length: int, features: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    """A tensor as a projection gives it: heads beside features in memory."""
    return of(batch, length, number, features, dtype=dtype).transpose(1, 2)


def test_flash_attention_splits_the_keys_of_few_queries() -> None:
    query, key = heads(1, 32, 1, 128), heads(1, 8, 2048, 128)
    row = 16 * 8 * 4 * 4  # 16 parts, 8 heads of 4 queries each
    flash = aten._scaled_dot_product_flash_attention.default
    assert blocks(flash, query, key, key) == (32 * 128 * 2, row, row * 128)
    long = heads(2, 32, 2048, 128)
    assert moments(flash, long, long, long, 0.0, True) == ()
    assert moments(flash, query, key, key, card=Card(9.0)) is None


def test_the_keys_are_split_into_the_fewest_parts_of_good_occupancy() -> None:
    assert splits(212, 16, HOPPER) == 1  # 0.8 of 264 slots
    assert splits(8, 16, HOPPER) == 16
    assert splits(48, 64, Card(8.0, 54)) == 2  # 96 of 108 slots: above 85%


def test_the_backward_of_flash_attention_sums_in_fp32() -> None:
    query, key = heads(2, 32, 2000, 128), heads(2, 8, 2000, 128)
    rows = 2 * 32 * 2048
    backward = aten._scaled_dot_product_flash_attention_backward.default
    rest = (of(2, 32, 2000), None, None, 2000, 2000, 0.0, True, of(2), of(2))
    expanded = 2 * 2000 * 32 * 128 * 2
    assert blocks(backward, query, query, key, key, query, *rest) == (
        *(rows * 4, rows * 128 * 4),
        *(expanded, expanded),
    )
    turned = of(2, 32, 2000, 128, dtype=bf16)
    assert blocks(backward, turned, query, query, query, query, *rest) == (
        *(turned.numel() * 2,),
        *(rows * 4, rows * 128 * 4),
    )


def test_deterministic_flash_attention_keeps_several_gradients_of_the_queries() -> None:
    query = heads(1, 8, 128, 64)
    rest = (of(1, 8, 128), None, None, 128, 128, 0.0, True, of(2), of(2))
    torch.use_deterministic_algorithms(True)
    try:
        own = blocks(
            aten._scaled_dot_product_flash_attention_backward.default, *(5 * (query,)), *rest, card=ADA
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert own == (8 * 128 * 4, 16 * 8 * 128 * 64 * 4)  # 128 multiprocessors over 8 heads


def test_efficient_attention_accumulates_wide_values_in_fp32() -> None:
    efficient = aten._scaled_dot_product_efficient_attention.default
    wide = heads(2, 8, 64, 256)
    assert blocks(efficient, wide, wide, wide, None, True) == (2 * 64 * 8 * 256 * 4,)
    narrow = heads(2, 8, 64, 128)
    assert moments(efficient, narrow, narrow, narrow, None, True) == ()


def efficient_backward(features: int, dtype: torch.dtype, card: Card) -> Any:
    query = heads(2, 8, 100, features, dtype)
    rest = (of(2, 8, 128), of(), of(), 0.0, [True, True, True, False])
    backward = aten._scaled_dot_product_efficient_attention_backward.default
    return moments(backward, query, query, query, query, None, query, *rest, card=card)


def test_the_backward_of_efficient_attention_stages_the_gradient_of_the_queries() -> None:
    delta = 2 * 8 * 100 * 4
    workspace = 16 * 2 * (64 * 64 + 4) * 4  # 2 tiles of queries
    assert efficient_backward(64, bf16, ADA) == (Moment((delta, workspace)),)
    product = 2 * 100 * 8 * 64 * 4
    assert efficient_backward(64, fp32, ADA) == (
        Moment((product, delta, delta)),
        Moment((delta, workspace)),
    )
    assert efficient_backward(128, bf16, AMPERE) == (Moment((delta, 16 * (128 * 128 + 4) * 4)),)
    assert efficient_backward(96, bf16, ADA) == (Moment((delta, 16 * 2 * (128 * 64 + 4) * 4)),)
    assert efficient_backward(128, bf16, ADA) is None
    assert efficient_backward(128, fp32, ADA) is None
    assert efficient_backward(256, fp32, AMPERE)[1].blocks == (delta, 16 * 4 * (128 * 64 + 4) * 4)
    assert efficient_backward(256, bf16, AMPERE) is None


@pytest.mark.parametrize(
    "name", ["convolution", "_scaled_dot_product_cudnn_attention", "nonzero", "_grouped_mm"]
)
def test_what_only_a_library_or_the_values_know_is_unknown(name: str) -> None:
    func = getattr(aten, name).default
    assert scratch(func, (), {}, None, HOPPER) is None


@pytest.mark.parametrize("name", ["_fused_adamw_", "scatter_add", "nll_loss_forward", "native_dropout"])
def test_what_allocates_nothing_has_no_moment(name: str) -> None:
    func = getattr(aten, name).default
    assert scratch(func, (), {}, None, HOPPER) == ()


def test_a_sum_over_more_than_2_gib_is_of_two_halves() -> None:
    # 2**29 numbers each: 512 threads with 256 values each, 4,096 blocks
    assert staging(axes((2**30,), (1,), (0,)), element=4, accumulated=4, card=HOPPER) == (4096 * 4, 4)
    assert staging(axes((2**31,), (1,), (0,)), element=2, accumulated=4, card=HOPPER) is None
