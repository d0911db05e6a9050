"""PYTORCH_ALLOC_CONF: what its options mean, and that what torch refuses is refused by a sentence."""

import pytest
import torch

from harness.device.allocator_settings import MIB, Settings, parse

GOOD = (
    "",
    "max_split_size_mb:20",
    "max_split_size_mb:128,",
    " expandable_segments:True, max_non_split_rounding_mb : 20",
    "large_segment_size_mb:11,max_split_size_mb:11",
    "garbage_collection_threshold:0.6",
    "roundup_power2_divisions:8",
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
    "roundup_power2_divisions:[1:0]",
    "pinned_use_background_threads:True",
)
BAD = (
    "max_split_size_mb:19",
    "max_split_size_mb:many",
    "max_split_size_mb",
    "max_split_size_mb:",
    "max_non_split_rounding_mb:19",
    "large_segment_size_mb:10",
    "large_segment_size_mb:30,max_split_size_mb:29",
    "garbage_collection_threshold:0",
    "garbage_collection_threshold:1.0",
    "garbage_collection_threshold:often",
    "roundup_power2_divisions:3",
    "roundup_power2_divisions:0",
    "roundup_power2_divisions:[255:1]",
    "roundup_power2_divisions:[256:3]",
    "roundup_power2_divisions:[256:1",
    "expandable_segments:true",
    "pinned_use_background_threads:1",
)
OF_CUDA = (
    "per_process_memory_fraction:1.5",
    "per_process_memory_fraction:-0.1",
    "pinned_num_register_threads:3",
    "pinned_num_register_threads:256",
    "pinned_reserve_segment_size_mb:0",
    "pinned_use_cuda_host_register:yes",
    "max_split_size:128",
)
"""What only the CUDA build of torch refuses."""


has_parser = pytest.mark.skipif(
    not hasattr(torch._C, "_accelerator_getAllocatorSettings"),
    reason="this torch has no call to its own parser",
)


def torch_takes(text: str) -> bool:
    """Whether torch's own parser takes `text`; its CPU build has the options that are common to all devices."""
    before = torch._C._accelerator_getAllocatorSettings()
    try:
        torch._C._accelerator_setAllocatorSettings(text)
    except (RuntimeError, ValueError):
        return False
    finally:
        torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20,expandable_segments:False")
        torch._C._accelerator_setAllocatorSettings(before or "")
    return True


def test_nothing_said_is_the_default() -> None:
    assert parse("") == Settings()


@has_parser
@pytest.mark.parametrize("text", GOOD)
def test_what_torch_takes_is_taken(text: str) -> None:
    assert torch_takes(text)
    parse(text)


@has_parser
@pytest.mark.parametrize("text", BAD)
def test_what_torch_refuses_is_refused_by_a_sentence_with_the_option_and_its_value(text: str) -> None:
    assert not torch_takes(text)
    with pytest.raises(ValueError, match="give ") as refused:
        parse(text)
    assert str(refused.value).startswith(text.rpartition(",")[2])


@pytest.mark.parametrize("text", OF_CUDA)
def test_what_only_cuda_refuses_is_refused_too(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}: "):
        parse(text)


def test_an_unknown_option_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="no such option; it has backend, expandable_segments"):
        parse("max_split:3")


def test_the_other_backend_is_refused_with_the_reason() -> None:
    assert parse("backend:native") == Settings()
    with pytest.raises(ValueError, match="backend:cudaMallocAsync: only the native backend"):
        parse("backend:cudaMallocAsync")


def test_sizes_are_in_bytes() -> None:
    settings = parse("max_split_size_mb:64,max_non_split_rounding_mb:32,large_segment_size_mb:24")
    sizes = (settings.max_split_size, settings.max_non_split_rounding_size, settings.large_segment_size)
    assert sizes == (64 * MIB, 32 * MIB, 24 * MIB)


def test_the_rounding_of_blocks_that_are_not_split_is_a_large_segment_unless_it_is_given() -> None:
    assert parse("large_segment_size_mb:24").max_non_split_rounding_size == 24 * MIB


def test_the_first_pair_of_divisions_counts_below_it_and_the_arrow_above_the_last() -> None:
    """256 MiB is interval 8, counted from 1 MiB; 1024 is interval 10; 512 lies between and is not named."""
    divisions = parse("roundup_power2_divisions:[256:2,1024:4,>:8]").roundup_power2_divisions
    assert divisions == (*[2] * 9, 0, 4, *[8] * 5)


def test_a_boundary_beyond_the_last_interval_is_the_last_interval() -> None:
    """64 GiB is 2**16 MiB; there are intervals 0 to 15."""
    divisions = parse("roundup_power2_divisions:[1:1,65536:8]").roundup_power2_divisions
    assert divisions == (1, *[0] * 14, 8)


def test_options_without_effect_on_the_device_are_named() -> None:
    settings = parse("pinned_num_register_threads:8,expandable_segments:True,release_lock_on_cudamalloc:True")
    assert settings.ignored == ("pinned_num_register_threads", "release_lock_on_cudamalloc")


def test_the_last_of_an_option_counts() -> None:
    assert parse("expandable_segments:True,expandable_segments:False") == Settings()
