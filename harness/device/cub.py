"""The temporary storage that CUB's device-wide algorithms ask for, in bytes.

From cub/device/dispatch/dispatch_radix_sort.cuh and tuning/tuning_radix_sort.cuh of CCCL 2.8. ATen passes 64-bit counts
(ATen/cuda/cub-RadixSortPairs.cuh). Later releases of CCCL may tune their tiles otherwise, which moves the lookback
buffer, one part in about 60 of the whole, and nothing else.
"""

from harness.device.call import Card, up

_ALIGN = 256
_DIGITS = 256
_SMALL_KEYS = {(1, 8): (384, 18), (2, 8): (512, 23), (1, 0): (512, 19), (2, 0): (512, 19)}
"""Threads and items of keys of 1 and 2 bytes from capability 9.0, by bytes of key and value: sm90_small_key_tuning."""


def aliased(*sizes: int) -> int:
    """Parts of one allocation, each at a multiple of 256: cub::detail::AliasTemporaries."""
    return sum(up(size, _ALIGN) for size in sizes) + _ALIGN - 1


def radix_sort(items: int, key: int, value: int, card: Card, bits: int | None = None) -> int | None:
    """DeviceRadixSort of `items` keys of `key` bytes with values of `value` bytes (0: keys alone), out of place.

    None where the size depends on the kernel's occupancy: keys under 4 bytes before capability 9.0.
    """
    widest = max(key, value, 4)
    if items <= 256 * max(1, 19 * 4 // widest):
        return 1  # one block sorts all in shared memory
    tuning = _one_sweep(key, value, card)
    if tuning is None:
        return None
    threads, nominal = tuning
    per_thread = max(1, nominal * 4 // widest)
    threads = min(threads, up(48 * 1024 // (widest * per_thread), 32))
    tile = threads * per_thread
    portion = ((1 << 28) - 1) // tile * tile
    portions = -(-items // portion)
    passes = -(-(bits or key * 8) // 8)
    spare = items if passes > 1 else 0
    return aliased(
        portions * passes * _DIGITS * 8,
        -(-min(items, portion) // tile) * _DIGITS * 4,
        spare * key,
        spare * value,
        portions * passes * 4,
    )


def _one_sweep(key: int, value: int, card: Card) -> tuple[int, int] | None:
    """Threads and items per thread, for items of 4 bytes, of the kernel that sorts in one sweep per digit."""
    if card.capability < 9:
        return None if key < 4 else (384, 17 if key == 4 and value else 21)
    if key < 4:
        return _SMALL_KEYS.get((key, value))
    if key == 4:
        return 384, (19 if not value else 17 if value < 8 else 29)
    return 384, 30 if value < 8 else 24


def segmented_radix_sort(items: int, key: int, value: int) -> int:
    """DeviceSegmentedRadixSort, out of place: a third buffer of keys and of values."""
    return aliased(items * key, items * value)


def scan_at_most(items: int) -> int:
    """DeviceScan of numbers of up to 8 bytes: a descriptor of up to 16 bytes for each tile, and 32 more.

    Every tuning of cub/device/dispatch/tuning/tuning_scan.cuh from capability 6.0 has tiles of 896 items or more.
    """
    return aliased((-(-items // 896) + 32) * 16)
