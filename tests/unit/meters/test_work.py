from __future__ import annotations

import dataclasses
import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lem.config.experiment import ExperimentConfig
from lem.meters.requestlog import Request, RequestLog, RequestLogError, read_requests, write_requests
from lem.meters.work import describe_work, distribute, latency_of, load_warnings, percentile, unfit_reasons
from tests.records import codes

MS = 1_000_000


def times(
    *, arrived: int | None, started: int, tokens: Sequence[int], prompt: int = 0, finished: int | None = None
) -> Request:
    """A request with times in milliseconds."""
    stamps = tuple(token * MS for token in tokens)
    arrived_ns, end_ns = None if arrived is None else arrived * MS, stamps[-1] if finished is None else finished * MS
    return Request(prompt, 3, len(stamps), 0, arrived_ns, started * MS, end_ns, stamps)


def untimed(output_tok: int, finished: int = 100) -> Request:
    return Request(0, 3, output_tok, 0, 0, 0, finished * MS)


def means(*requests: Request) -> dict[str, float | None]:
    latency = latency_of(requests)
    sections = {name: getattr(latency, name) for name in ("ttft_s", "tpot_s", "icl_s", "e2e_s", "queue_s")}
    return {name: None if found is None else found.mean for name, found in sections.items()}


def window_of(mode: str, arrivals: Sequence[int], lengths: Sequence[int] = (10,)) -> RequestLog:
    """A window of 1,000 ms whose requests bring a token every millisecond from their arrival on."""
    requests = tuple(
        times(arrived=at, started=at, tokens=range(at + 1, at + 1 + lengths[place % len(lengths)]))
        for place, at in enumerate(arrivals)
    )
    return RequestLog(mode, 0, 1000 * MS, 1, requests)


def test_counting_noise_of_poisson_traffic_does_not_make_a_window_unsteady() -> None:
    early, late = range(0, 480, 10), range(500, 980, 20)  # 48 requests against 24: 2.8 standard deviations
    found = window_of("poisson", [*early, *late])
    assert found.steady_tolerance == pytest.approx(3.2905 * math.sqrt(72 * 10**2) / 360)
    assert found.steady.value is True
    assert window_of("poisson", [*early, *range(500, 980, 40)]).steady.value is False  # 48 against 12: 4.6
    assert window_of("constant", [*early, *late]).steady_tolerance == pytest.approx(3.2905 * math.sqrt(2) * 10 / 360)
    assert window_of("constant", [*early, *late]).steady.value is False


def test_burstier_arrivals_allow_larger_differences_between_halves_and_larger_queues() -> None:
    log = window_of("poisson", [*range(0, 480, 10), *range(500, 980, 20)], lengths=(5, 15))
    bursty = dataclasses.replace(log, burstiness=0.25)
    spread, count = 72 * 5**2, 72 * 10**2  # of lengths, and of the number of arrivals
    assert log.steady_tolerance == pytest.approx(3.2905 * math.sqrt(spread + count) / 360)
    assert bursty.steady_tolerance == pytest.approx(3.2905 * math.sqrt(spread + 4 * count) / 360)
    queue = dataclasses.replace(served(10, 7.5, seconds=20), traffic_mode="poisson")
    assert codes((*unfit_reasons(queue, allows_overload=False), *load_warnings(queue))) == [
        "queue_grew",
        "load_too_high",
    ]
    calm = dataclasses.replace(queue, burstiness=0.25)
    assert (unfit_reasons(calm, allows_overload=False), load_warnings(calm)) == ((), ())


def test_under_regular_arrivals_only_lengths_are_noise() -> None:
    found = window_of("constant", [*range(0, 480, 10), *range(500, 980, 10)], lengths=(5, 15))
    assert found.steady_tolerance == pytest.approx(3.2905 * math.sqrt(96 * 5**2 + 2 * 10**2) / 480)
    assert found.steady.value is True
    assert window_of("poisson", [1200]).steady_tolerance == 0.02


@pytest.mark.parametrize(("fraction", "value"), [(0.0, 10.0), (0.5, 25.0), (0.9, 37.0), (1.0, 40.0)])
def test_percentile_interpolates_between_closest_ranks(fraction: float, value: float) -> None:
    assert percentile([10.0, 20.0, 30.0, 40.0], fraction) == pytest.approx(value)
    assert percentile([7.0], fraction) == 7.0


@pytest.mark.parametrize(("n", "known"), [(1, 0), (9, 0), (10, 1), (99, 1), (100, 2), (499, 2), (500, 3)])
def test_a_percentile_needs_enough_prompts(n: int, known: int) -> None:
    found = distribute([(value, value * 1e9) for value in reversed(range(n))])
    assert found is not None
    assert (found.n, found.n_prompts) == (n, n)
    assert found.mean == found.p50 == pytest.approx((n - 1) / 2)
    assert [item is not None for item in (found.p90, found.p95, found.p99)] == [place < known for place in range(3)]


def test_repeats_of_a_prompt_count_once_towards_a_percentile() -> None:
    found = distribute([(value % 32, value * 1e9) for value in range(3200)])
    assert found is not None
    assert (found.n, found.n_prompts, found.p95) == (3200, 32, None)
    assert found.p90 == pytest.approx(2879.1)
    assert found.null_reasons["p95"].data == {"needed": 100, "n": 32}


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([times(arrived=100, started=150, tokens=[160, 170, 190])], (0.060, 0.015, 0.015, 0.090, 0.050)),
        ([times(arrived=None, started=100, tokens=[130, 140])], (0.030, 0.010, 0.010, 0.040, None)),
        ([untimed(10)], (None, None, None, 0.100, 0.0)),
        ([times(arrived=0, started=0, tokens=[10, 20]), untimed(2, 30)], (None, None, None, 0.025, 0.0)),
        ([times(arrived=0, started=0, tokens=[10])], (0.010, None, None, 0.010, 0.0)),
        ([times(arrived=0, started=0, tokens=[10, 20]), untimed(0, 5)], (0.010, 0.010, 0.010, 0.0125, 0.0)),
        ([untimed(0)], (None, None, None, 0.100, 0.0)),
        ([], (None, None, None, None, None)),
    ],
    ids=["open loop", "closed batch", "untimed", "one untimed", "one token", "one without output", "no output", "none"],
)
def test_latency_counts_from_the_arrival_and_holds_only_what_was_observed(
    requests: list[Request], expected: tuple[float | None, ...]
) -> None:
    found = means(*requests)
    assert list(found.values()) == [value if value is None else pytest.approx(value) for value in expected]
    reasons = latency_of(requests).null_reasons
    assert reasons.keys() == {"itl_s", *(name for name, value in found.items() if value is None)}


def test_reasons_tell_missing_times_from_missing_tokens_and_missing_requests() -> None:
    found = [latency_of(item).null_reasons["ttft_s"] for item in ([untimed(10)], [untimed(0)], [])]
    assert found[0].code == "tokens_not_observed"
    assert len(set(found)) == 3


def test_tokens_of_one_step_are_one_chunk_and_no_time_is_divided_among_them() -> None:
    three_a_step = times(arrived=None, started=0, tokens=[10, 40, 40, 40, 70, 70, 70, 100])
    latency = latency_of([three_a_step])
    assert latency.icl_s is not None
    assert (latency.icl_s.p50, latency.icl_s.mean, latency.icl_s.n) == pytest.approx((0.030, 0.030, 3))
    assert latency.tpot_s is not None
    assert latency.tpot_s.mean == pytest.approx(0.090 / 7)
    assert (latency.itl_s, latency.null_reasons["itl_s"].code) == (None, "itl_replaced")
    at_once = latency_of([times(arrived=None, started=0, tokens=[10, 10, 10])])
    assert (at_once.icl_s, at_once.null_reasons["icl_s"].code) == (None, "no_second_step")


def config(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "any", **options})


def traffic(*requests: Request, mode: str = "poisson", opened: int = 0, closed: int = 1000) -> RequestLog:
    return RequestLog(mode, opened * MS, closed * MS, max((it.prompt for it in requests), default=0) + 1, requests)


def test_failures_count_in_the_window_as_other_requests_do() -> None:
    def failed(error: str, arrived: int, finished: int | None) -> Request:
        end_ns = None if finished is None else finished * MS
        return Request(0, 3, arrived_ns=arrived * MS, started_ns=arrived * MS, finished_ns=end_ns, error=error)

    log = traffic(
        times(arrived=150, started=150, tokens=[160]),
        failed("refused in the ramp", 50, None),
        failed("broke off in the ramp", 40, 60),
        failed("refused", 200, None),
        failed("broke off", 90, 300),
        failed("hung since", 400, None),
        failed("broke off after it", 900, 1100),
        failed("refused after it", 1100, None),
        opened=100,
    )
    assert log.failures == ("broke off", "refused", "hung since")


# Steps of the engine

SPECULATIVE = {"pytorch": {"assisted_generation": {"num_tokens": 3}}}


def steps(*tokens: int) -> Request:
    """A request whose steps brought that many tokens, 10 ms each."""
    return times(arrived=0, started=0, tokens=[10 * number for number, tok in enumerate(tokens, 1) for _ in range(tok)])


@pytest.mark.parametrize(
    ("requests", "options", "per_step", "accepted"),
    [
        # 4 of 4, 1 of 4, then a step with three tokens to go, of which two came, and one
        ([steps(1, 4, 1, 2, 1)], SPECULATIVE, 2.0, 3 / 6),
        ([steps(1, 1, 1, 1)], {}, 1.0, "nothing_drafted"),
        ([steps(4, 4, 4)], SPECULATIVE, 4.0, 3 / 3),
        ([steps(1, 2)], SPECULATIVE, 2.0, "answers_too_short"),
        ([steps(1, 5, 4)], SPECULATIVE, 4.5, "steps_merged"),
        ([steps(1, 2)], {"pytorch": {"assisted_generation": {"model": "draft"}}}, 2.0, "drafts_vary"),
        ([steps(3)], {}, "no_second_step", "nothing_drafted"),
        ([untimed(4)], SPECULATIVE, "tokens_not_observed", "tokens_not_observed"),
    ],
)
def test_tokens_per_step_and_accepted_drafts_follow_from_the_times_of_tokens(
    requests: list[Request], options: dict[str, Any], per_step: float | str, accepted: float | str
) -> None:
    found = describe_work(traffic(*requests), config(**options)).throughput
    for name, expected in (("tok_per_step", per_step), ("draft_accepted_ratio", accepted)):
        value = getattr(found, name)
        assert (found.null_reasons[name].code if value is None else value) == (
            expected if isinstance(expected, str) else pytest.approx(expected)
        )


# Goodput


def slo(**limits: float) -> ExperimentConfig:
    return config(traffic_simulation={"enabled": True, "slo": limits})


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft_ms": 50}, 2),
        ({"tpot_ms": 10}, 2),
        ({"e2e_ms": 100}, 3),
        ({"ttft_ms": 50, "tpot_ms": 10}, 1),
        ({"ttft_ms": 50, "tpot_ms": 10, "e2e_ms": 29}, 0),
    ],
)
def test_a_good_request_meets_every_given_limit(limits: dict[str, float], good: int) -> None:
    fast = times(arrived=0, started=0, tokens=[10, 20, 30])
    late = times(arrived=100, started=160, tokens=[160, 170])  # TTFT 60 ms
    slow = times(arrived=200, started=200, tokens=[210, 290])  # TPOT 80 ms
    failed = dataclasses.replace(fast, error="no")
    silent = times(arrived=500, started=500, tokens=[], finished=700)
    outside = times(arrived=990, started=990, tokens=[995, 1005])
    found = describe_work(traffic(fast, late, slow, failed, silent, outside), slo(**limits))
    assert found.work["requests_good"].value == good
    assert found.throughput.good_requests_per_s == pytest.approx(good)  # in a second
    assert found.throughput.good_requests_ratio == pytest.approx(good / 5)
    assert (found.work["requests_ok"], found.work["requests_failed"]) == (4, 1)


def test_goodput_without_limits_or_without_the_times_it_needs_is_absent() -> None:
    for log, chosen, code in (
        (traffic(untimed(2)), slo(), "no_slo"),
        (traffic(untimed(2)), slo(ttft_ms=1), "tokens_not_observed"),
    ):
        found = describe_work(log, chosen)
        assert found.work["requests_good"].null_reason.code == code
        reasons = found.throughput.null_reasons
        assert {reasons[name].code for name in ("good_requests_per_s", "good_requests_ratio")} == {code}
    assert describe_work(traffic(untimed(2)), slo(e2e_ms=100)).work["requests_good"].value == 1


# Requests at once


def test_requests_in_flight_are_those_in_the_engine_within_the_window() -> None:
    log = traffic(
        times(arrived=0, started=0, tokens=[500]),
        times(arrived=0, started=250, tokens=[500]),
        times(arrived=0, started=500, tokens=[1500]),
        Request(0, 3, arrived_ns=0, started_ns=900 * MS, error="gave no answer"),
        Request(0, 3, arrived_ns=0),  # waits
    )
    window = describe_work(log, config()).window
    # 1 for 250 ms, 2 for 250 ms, 1 for 400 ms, 2 for 100 ms
    assert (window["in_flight_mean"], window["in_flight_peak"]) == pytest.approx((1.35, 2))
    assert window["fill_drain_ratio"] == pytest.approx(0.65)


def test_a_batch_that_fills_and_drains_in_every_pass_says_so() -> None:
    batch = [Request(number, 3, 1, 0, None, 0, (number + 1) * 100 * MS, None) for number in range(10)]
    log = RequestLog("closed_batch", 0, 1000 * MS, 10, tuple(batch), ((0, 1000 * MS),))
    window = describe_work(log, config()).window
    assert (window["in_flight_mean"], window["in_flight_peak"]) == pytest.approx((5.5, 10))
    assert window["fill_drain_ratio"] == pytest.approx(0.8), "10 at once for 100 ms, 9 for another"


# Fitness


def served(
    rate: float, capacity: float, batch: int = 1, seconds: int = 60, lengths: Sequence[int] = (1,)
) -> RequestLog:
    """Constant arrivals a second at an engine that completes so many a second, in batches."""
    arrivals = [round(number * 1000 / rate) for number in range(int(rate * seconds))]
    requests, free, index = [], 0.0, 0
    while index < len(arrivals):
        start = max(free, arrivals[index])
        members = [at for at in arrivals[index : index + batch] if at <= start]
        free = start + 1000 * batch / capacity
        tok = lengths[index % len(lengths)]
        requests += [times(arrived=at, started=round(start), tokens=[round(free)] * tok) for at in members]
        index += len(members)
    return traffic(*requests, mode="constant", opened=5000, closed=seconds * 1000)


@pytest.mark.parametrize(
    ("log", "is_grown"),
    [
        (served(10, 20), False),
        (served(10, 10.2), False),
        (served(10, 7), True),
        (served(10, 9.3), True),  # less than a tenth too much
        (served(10, 9.3, lengths=(1, 9)), False),  # of which the lengths of answers may be the cause
        (served(10, 9.3, lengths=(1, 9), seconds=600), True),
        (dataclasses.replace(served(10, 9.3), traffic_mode="poisson"), False),
        (dataclasses.replace(served(10, 9.3), traffic_mode="poisson", burstiness=100), True),
        (dataclasses.replace(served(10, 9.3, seconds=1000), traffic_mode="poisson"), True),
        (served(100, 50), True),
        (served(8, 8.5, batch=64), False),  # batches of 7.5 s, between which requests pile up
        (served(16, 8, batch=64), True),
        (served(2, 4, batch=100, seconds=30), False),  # one turn of 25 s
        (dataclasses.replace(served(10, 7), traffic_mode="closed"), False),
    ],
)
def test_a_queue_that_grows_throughout_the_window_is_unfit_unless_it_is_wanted(log: RequestLog, is_grown: bool) -> None:
    assert codes(unfit_reasons(log, allows_overload=False)) == ["queue_grew"] * is_grown
    assert unfit_reasons(log, allows_overload=True) == ()
    assert not is_grown or codes(load_warnings(log)) == ["load_too_high"]


def test_without_any_completed_request_a_window_is_unfit_however_much_was_asked() -> None:
    log = traffic(*(times(arrived=10 * number, started=0, tokens=[2000]) for number in range(1, 92)))
    (reason,) = unfit_reasons(log, allows_overload=True)
    assert (reason.code, reason.data) == ("none_completed", {"arrived": 91})
    failed = traffic(dataclasses.replace(untimed(0), error="no"))
    assert unfit_reasons(failed, allows_overload=False) == (), "the failures are a reason by themselves"


# The file


def everything() -> RequestLog:
    return traffic(
        times(arrived=-5, started=3, tokens=[10, 40, 40, 70]),
        dataclasses.replace(untimed(0), error="key sekret refused"),
        Request(0, 3, arrived_ns=900 * MS),
    )


def test_a_log_of_an_earlier_lem_has_no_burstiness(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl.gz"
    write_requests(path, dataclasses.replace(everything(), burstiness=0.5), lambda text: text)
    assert read_requests(path).burstiness == 0.5
    text = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(gzip.compress(text.replace(',"burstiness":0.5', "").encode()))
    assert read_requests(path) == everything()
    path.write_bytes(gzip.compress(text.replace(":0.5", ":0.0").encode()))
    with pytest.raises(RequestLogError, match="impossible window"):
        read_requests(path)


def test_a_log_is_read_as_it_was_written_and_its_errors_are_redacted(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl.gz"
    write_requests(path, everything(), lambda text: text)
    assert read_requests(path) == everything()
    first = path.read_bytes()
    write_requests(path, everything(), lambda text: text)
    assert path.read_bytes() == first, "equal logs give equal bytes"
    write_requests(path, everything(), lambda text: text.replace("sekret", "***"))
    assert read_requests(path).failures == ("key *** refused",)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [],
        lambda lines: lines[1:],
        lambda lines: [lines[0].replace('"schema_version":1', '"schema_version":2'), *lines[1:]],
        lambda lines: [lines[0].replace("poisson", "closed_batch"), *lines[1:]],
        lambda lines: [lines[0].replace('"closed_ns":1000000000', '"closed_ns":-7'), *lines[1:]],
        lambda lines: [lines[0].replace('"prompts":1', '"prompts":0'), *lines[1:]],
        lambda lines: [lines[0], lines[1].replace("[7000000,", "[7000000,5,")],
        lambda lines: [lines[0], lines[1].replace("[7000000,", "[true,")],
        lambda lines: [lines[0], lines[1].replace("[7000000,", "[1e400,")],
        lambda lines: [lines[0], lines[1].replace("[7000000,", f"[{10**30},")],
        lambda lines: [lines[0], lines[1].replace('"input_tok":3', '"input_tok":-3')],
        lambda lines: [lines[0], lines[1].replace('"started_ns":3000000', '"started_ns":null')],
        lambda lines: [lines[0], lines[1].replace('"prompt":0', '"prompt":1')],
        lambda lines: [lines[0], "[" * 100_000],
        lambda lines: [lines[0], "[]"],
    ],
)
def test_a_damaged_log_is_refused(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "requests.jsonl.gz"
    write_requests(path, everything(), lambda text: text)
    lines = damage(gzip.decompress(path.read_bytes()).decode().splitlines())
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    with pytest.raises(RequestLogError):
        read_requests(path)


def test_a_log_that_is_cut_off_or_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl.gz"
    write_requests(path, everything(), lambda text: text)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RequestLogError):
            read_requests(path)
    path.write_bytes(gzip.compress(bytes(4_000_000)))
    with pytest.raises(RequestLogError):
        read_requests(path, most_b=1_000_000)
