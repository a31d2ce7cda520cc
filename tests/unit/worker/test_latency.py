from __future__ import annotations

import pytest

from lem.worker.window import RequestTimes, distribute, latency_of, percentile

MS = 1_000_000


def times(*, arrived: int | None, started: int, tokens: list[int], finished: int | None = None) -> RequestTimes:
    """A request with times in milliseconds."""
    return RequestTimes(
        arrived_ns=None if arrived is None else arrived * MS,
        started_ns=started * MS,
        finished_ns=(tokens[-1] if finished is None else finished) * MS,
        output_tok=len(tokens),
        token_times_ns=tuple(token * MS for token in tokens),
    )


def test_percentile_interpolates_between_closest_ranks() -> None:
    values = [10.0, 20.0, 30.0, 40.0]
    assert percentile(values, 0.0) == 10.0
    assert percentile(values, 0.5) == 25.0
    assert percentile(values, 0.9) == pytest.approx(37.0)
    assert percentile(values, 1.0) == 40.0
    assert percentile([7.0], 0.99) == 7.0


def test_no_values_have_no_distribution() -> None:
    assert distribute([]) is None


@pytest.mark.parametrize(
    ("n", "has_p90", "has_p95", "has_p99"),
    [(1, False, False, False), (9, False, False, False), (10, True, False, False), (19, True, False, False),
     (20, True, True, False), (99, True, True, False), (100, True, True, True)],
)  # fmt: skip
def test_a_percentile_needs_enough_values(n: int, has_p90: bool, has_p95: bool, has_p99: bool) -> None:
    found = distribute([float(value) for value in range(n)])
    assert found is not None
    assert found.n == n
    assert found.mean == pytest.approx((n - 1) / 2)
    assert found.p50 == pytest.approx((n - 1) / 2)
    assert [found.p90 is not None, found.p95 is not None, found.p99 is not None] == [has_p90, has_p95, has_p99]


def test_order_of_values_does_not_matter() -> None:
    assert distribute([3.0, 1.0, 2.0]) == distribute([1.0, 2.0, 3.0])


def test_latency_counts_from_the_arrival_not_from_the_start() -> None:
    latency = latency_of([times(arrived=100, started=150, tokens=[160, 170, 190])])
    assert latency.queue_s is not None
    assert latency.ttft_s is not None
    assert latency.e2e_s is not None
    assert latency.tpot_s is not None
    assert latency.itl_s is not None
    assert latency.queue_s.mean == pytest.approx(0.050)
    assert latency.ttft_s.mean == pytest.approx(0.060)
    assert latency.e2e_s.mean == pytest.approx(0.090)
    assert latency.tpot_s.mean == pytest.approx((0.090 - 0.060) / 2)
    assert latency.itl_s.mean == pytest.approx(0.015)
    assert latency.itl_s.n == 2
    assert latency.null_reasons == {}


def test_in_a_closed_batch_latency_counts_from_the_start_and_nothing_queues() -> None:
    latency = latency_of([times(arrived=None, started=100, tokens=[130, 140])])
    assert latency.ttft_s is not None
    assert latency.e2e_s is not None
    assert latency.ttft_s.mean == pytest.approx(0.030)
    assert latency.e2e_s.mean == pytest.approx(0.040)
    assert latency.queue_s is None
    assert "closed batch" in latency.null_reasons["queue_s"]


def test_token_times_that_were_not_observed_are_null_and_not_spread_evenly() -> None:
    latency = latency_of([RequestTimes(None, 0, 100 * MS, output_tok=10)])
    assert (latency.ttft_s, latency.tpot_s, latency.itl_s) == (None, None, None)
    assert all("streaming" in latency.null_reasons[name] for name in ("ttft_s", "tpot_s", "itl_s"))
    assert latency.e2e_s is not None


def test_one_request_without_token_times_voids_them_for_all() -> None:
    timed = times(arrived=0, started=0, tokens=[10, 20])
    untimed = RequestTimes(0, 0, 30 * MS, output_tok=2)
    latency = latency_of([timed, untimed])
    assert latency.ttft_s is None
    assert latency.itl_s is None
    assert latency.e2e_s is not None
    assert latency.e2e_s.n == 2


def test_a_single_token_has_a_ttft_and_nothing_between_tokens() -> None:
    latency = latency_of([times(arrived=0, started=0, tokens=[10])])
    assert latency.ttft_s is not None
    assert latency.tpot_s is None
    assert latency.itl_s is None
    assert "more than one" in latency.null_reasons["tpot_s"]


def test_a_request_without_output_counts_end_to_end_only() -> None:
    empty = RequestTimes(0, 0, 5 * MS, output_tok=0, token_times_ns=())
    latency = latency_of([times(arrived=0, started=0, tokens=[10, 20]), empty])
    assert latency.ttft_s is not None
    assert latency.e2e_s is not None
    assert latency.ttft_s.n == 1
    assert latency.e2e_s.n == 2


def test_only_requests_without_output_say_so() -> None:
    latency = latency_of([RequestTimes(0, 0, 5 * MS, output_tok=0)])
    assert latency.null_reasons["ttft_s"] == "no request has an output token"


def test_no_completed_request_is_null_with_that_reason() -> None:
    latency = latency_of([])
    assert set(latency.null_reasons) == {"ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s"}
    assert set(latency.null_reasons.values()) == {"no request was completed in the window"}
