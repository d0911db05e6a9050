"""Rates, latencies and waste of a run come from what each batch took, and nothing is counted that was not timed."""

from harness.generation.metrics import Share, Timing, largest, latency, performance, unasked
from harness.model.kv_cache import KvBytes


def test_rates_add_up_over_ranks_and_leave_out_batches_that_an_exact_ledger_slowed() -> None:
    slow, fast = Timing(2, 20, 12, 10.0, 10.0), Timing(2, 20, 12, 1.0, 2.0)
    two_ranks = [Share(timings=[slow, fast]), Share(timings=[slow, fast]), Share()]
    assert performance(two_ranks, exact=1).tree() == {
        "tokens_per_second": 2 * 12 / 3,
        "prefill_tokens_per_second": 2 * 20 / 1,
        "decode_tokens_per_second": 2 * 10 / 2,
        "time_to_first_token_seconds": 1.0,
        "generation_seconds": 23.0,
        "compile_seconds": None,
        "latency": {"first_token_seconds": None, "between_tokens_seconds": None},
    }
    assert performance([Share(timings=[slow])], exact=1).tokens_per_second == 12 / 20


def test_the_largest_cache_is_the_one_told() -> None:
    small, large = KvBytes(10, 8, 6, 2), KvBytes(20, 18, 16, 9)
    assert largest([Share(kv=[small, large]), Share(kv=[small]), Share()]) == {
        "kv_bytes_per_token_measured": 2,
        "kv_reserved": 20,
        "kv_filled": 18,
        "kv_live": 16,
        "kv_positions": 9,
        "kv_pinned": 0,
        "kv_state": 0,
        "kv_host": 0,
    }


def test_latency_counts_from_when_the_first_batch_began() -> None:
    first = Timing(2, 2, 3, 1.0, 1.0, began=10.0, timestamps=[[11.0, 12.0], [11.0]])
    second = Timing(1, 1, 2, 1.0, 3.0, began=12.0, timestamps=[[13.0, 16.0]])
    actual = latency([[first, second]]).tree()
    assert actual["first_token_seconds"] == {"p50": 1.0, "p95": 2.8, "p99": 2.96}
    assert actual["between_tokens_seconds"] == {"p50": 2.0, "p95": 2.9, "p99": 2.98}
    assert latency([[second]]).tree()["first_token_seconds"] == {"p50": 1.0, "p95": 1.0, "p99": 1.0}


def test_latency_of_replicas_is_of_all_their_requests() -> None:
    one = [Timing(1, 1, 1, 1.0, 0.0, began=10.0, timestamps=[[11.0]])]
    other = [Timing(1, 1, 1, 3.0, 0.0, began=10.0, timestamps=[[13.0]])]
    assert latency([one, other]).tree()["first_token_seconds"] == {"p50": 2.0, "p95": 2.9, "p99": 2.98}


def test_tokens_nobody_asked_for_are_those_computed_after_ends_and_padding() -> None:
    shares = [Share(timings=[Timing(2, 5, 9, 1.0, 1.0, computed=16, padding=3)]), Share()]
    assert unasked(shares) == {"unasked_tokens": 7, "padding_tokens": 3}
