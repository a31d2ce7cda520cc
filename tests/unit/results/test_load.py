from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from lem.base.reasons import Reason
from lem.record import Record
from lem.results.aggregation import run_document
from lem.results.load import Knee, Series, find_series, knee_notes, knee_tables, span_text
from lem.results.run import make_run
from tests.records import make_record, under_load

GOOD, BAD, UNKNOWN = 100, 80, None  # of 100 requests
_GREW = (Reason.of("queue_grew", before=1, after=50),)


def record_at(load: float, cycle: int, good: int | None, *, name: str = "a", **options: Any) -> Record:
    record = make_record(config_name=f"{name}{load}", cycle=cycle, n_requests=100, order=int(load))
    return under_load(record, load, good, **options)


def invalid(record: Record, *reasons: Reason) -> Record:
    return dataclasses.replace(
        record, validity=dataclasses.replace(record.validity, valid=False, invalid_reasons=reasons)
    )


def records_of(cycles: Sequence[Mapping[float, int | None]], **options: Any) -> Iterator[Record]:
    for cycle, goods in enumerate(cycles):
        yield from (record_at(load, cycle, good, **options) for load, good in goods.items())


def only_series(records: Iterator[Record] | Sequence[Record]) -> Series:
    (series,) = find_series(make_run(records).with_results)
    return series


def loads_of(series: Series) -> tuple[float, ...]:
    return tuple(load for load, _ in series.levels)


def knee_of(*cycles: Mapping[float, int | None]) -> Knee:
    knee = only_series(records_of(cycles)).knee
    assert knee is not None
    return knee


def test_the_knee_is_the_median_over_cycles_of_the_highest_load_that_keeps_the_slo() -> None:
    usual: Mapping[float, int | None] = {1: GOOD, 2: GOOD, 4: BAD, 8: BAD}
    early: Mapping[float, int | None] = {1: GOOD, 2: BAD, 4: GOOD, 8: BAD}
    knee = knee_of(usual, early, usual)
    assert [*knee.brackets] == [(2, 4), (1, 2), (2, 4)], "a load above one that breaks the SLO does not count"
    assert (knee.load, knee.interval) == (2, (1, 4))
    assert knee.censored is None
    assert knee.coverage == pytest.approx(0.75)
    assert (knee.text, span_text(knee.interval)) == ("2", "1 – 4")
    assert knee_of(usual, early).load == 1, "of two the lower one, since nothing was measured in between"


def test_a_knee_beyond_or_below_every_load_is_no_number() -> None:
    beyond, below = knee_of({1: GOOD, 2: GOOD}, {1: GOOD, 2: GOOD}), knee_of({1: BAD, 2: BAD}, {1: BAD, 2: GOOD})
    assert beyond.censored is not None
    assert (beyond.censored.code, beyond.censored.data, beyond.text) == ("knee_beyond", {"load": 2}, "≥ 2")
    assert beyond.load is None
    assert (beyond.interval, span_text(beyond.interval)) == ((2, math.inf), "≥ 2")
    assert below.censored is not None
    assert (below.censored.code, below.censored.data, below.load, below.text) == (
        "knee_below",
        {"load": 1},
        None,
        "< 1",
    )
    assert (below.interval, span_text(below.interval)) == ((0, 1), "< 1")
    between = knee_of({1: GOOD, 2: BAD}, {1: BAD, 2: BAD}, {1: GOOD, 2: GOOD})
    assert (between.load, between.interval, span_text(between.interval)) == (1, (0, math.inf), "–")


@pytest.mark.parametrize(("n", "rank", "coverage"), [(2, 1, 0.5), (5, 1, 0.9375), (6, 1, 0.96875), (9, 2, 0.9609375)])
def test_the_interval_covers_95_percent_where_the_cycles_allow_it(n: int, rank: int, coverage: float) -> None:
    knee = Knee(tuple((float(low), low + 1.0) for low in range(1, n + 1)))
    assert knee.coverage == pytest.approx(coverage)
    assert knee.interval == (rank, n + 2 - rank)


def test_cycles_that_are_no_replicates_have_a_knee_without_an_interval() -> None:
    one = knee_of({1: GOOD, 2: BAD})
    assert (one.load, one.interval, span_text(one.interval), one.coverage) == (1, None, "–", None)
    shared = [
        dataclasses.replace(item, validity=dataclasses.replace(item.validity, engine_load_id="the same"))
        for item in records_of([{1: GOOD, 2: BAD}] * 3)
    ]
    knee = only_series(shared).knee
    assert knee is not None
    assert (knee.load, knee.interval) == (1, None)


def test_a_load_counts_as_broken_if_its_queue_grew_or_too_many_requests_failed() -> None:
    failed = record_at(4, 0, 97)
    failed = under_load(dataclasses.replace(failed, work=dataclasses.replace(failed.work, requests_failed=2)), 4, 97)
    refused = Reason.of("requests_failed", failed=2, total=102, first="503")
    too_high = Reason.of("load_too_high", arrived=200, finished=100)
    kept = [record_at(1, 0, GOOD), record_at(2, 0, GOOD)]
    grown = invalid(record_at(4, 0, GOOD), *_GREW)
    wanted = record_at(4, 0, GOOD)  # by allow_overload
    wanted = dataclasses.replace(wanted, validity=dataclasses.replace(wanted.validity, warnings=(too_high,)))
    for broken in (grown, invalid(failed, refused), invalid(failed, *_GREW, refused), wanted):
        assert only_series([*kept, broken]).knee == Knee(((2, 4),))
    other = (invalid(record_at(4, 0, BAD), Reason.of("verbatim", text="throttled")), record_at(4, 0, UNKNOWN))
    for unknown in (*other, invalid(failed, refused, Reason.of("verbatim", text="throttled"))):
        assert only_series([*kept, unknown]).knee == Knee(((2, math.inf),)), "it shows nothing about the load"


def test_requests_without_observed_times_have_no_knee() -> None:
    assert only_series(records_of([{1: UNKNOWN, 2: UNKNOWN}])).knee is None
    assert only_series(records_of([{1: GOOD, 2: GOOD}], slo={})).knee is None
    several = [*records_of([{1: GOOD}]), *records_of([{2: GOOD}], slo={"ttft_ms": 100})]
    assert only_series(several).slo is None


def test_the_share_that_a_load_needs_is_an_option() -> None:
    lenient = only_series(records_of([{1: GOOD, 2: BAD, 4: 79}], slo={"ttft_ms": 200, "attainment_pct": 80}))
    assert lenient.knee == Knee(((2, 4),))
    (table,) = knee_tables([lenient])
    assert table.title == "Knee: highest target_qps (requests/s) at which 80 % of requests have TTFT ≤ 200 ms"
    assert [column.cells for column in table.columns] == [("2",), ("–",), ("–",), ("1",), ("2",), ("–",)]


def test_a_load_at_which_nothing_is_completed_breaks_the_slo_where_a_lower_one_keeps_it() -> None:
    stuck = invalid(record_at(4, 0, UNKNOWN), Reason.of("none_completed", arrived=240))
    assert only_series([record_at(1, 0, GOOD), record_at(2, 0, GOOD), stuck]).knee == Knee(((2, 4),))
    assert only_series([record_at(1, 0, BAD), stuck]).knee == Knee(((0, 1),))
    alone = [invalid(record_at(load, 0, UNKNOWN), Reason.of("none_completed", arrived=9)) for load in (1, 2)]
    assert only_series(alone).knee is None, "the window may be too short for any load"
    assert only_series([stuck, record_at(8, 0, GOOD)]).knee == Knee(((8, math.inf),))


def test_a_load_of_which_exactly_the_share_is_good_keeps_the_slo() -> None:
    def at(load: float, good: int) -> Record:
        record = make_record(config_name=f"a{load}", n_requests=1000, order=int(load))
        return under_load(record, load, good, slo={"ttft_ms": 200, "attainment_pct": 99.9})

    refused = Reason.of("requests_failed", failed=20, total=1000, first="503")
    series = only_series([at(1, 999), invalid(at(2, 999), refused), at(4, 998)])
    assert series.knee == Knee(((1, 4),)), "an invalid one that keeps it shows nothing"


@pytest.mark.parametrize(("attainment_pct", "is_told"), [(99.0, False), (99.5, True), (100.0, False)])
def test_windows_of_too_few_requests_for_the_share_are_named(attainment_pct: float, is_told: bool) -> None:
    slo = {"ttft_ms": 200, "attainment_pct": attainment_pct}
    notes = [*knee_notes([only_series(records_of([{1: GOOD, 2: BAD}], slo=slo))])]
    assert [note for note in notes if "100 requests: with fewer than 200" in note] == notes[1:]
    assert len(notes) == 1 + is_told


def test_without_any_valid_window_nothing_is_said_of_their_lengths() -> None:
    series = only_series([invalid(record_at(load, 0, GOOD), *_GREW) for load in (1, 2)])
    assert not [note for note in knee_notes([series]) if note.startswith("Windows")]


def test_a_series_is_what_differs_only_in_its_load() -> None:
    open_loop = [record_at(load, 0, GOOD, name=f"{b}-", burstiness=b) for b in (1.0, 0.5) for load in (4, 1)]
    closed = [record_at(load, 0, GOOD, name="closed", mode="closed") for load in (1, 2)]
    alone = [record_at(1, 0, GOOD, name="alone", mode="constant"), make_record(config_name="batch")]
    found = find_series(make_run([*open_loop, *closed, *alone]).with_results)
    assert sorted((item.option, loads_of(item), item.unit) for item in found) == [
        ("concurrency", (1, 2), "requests"),
        ("target_qps", (1, 4), "requests/s"),
        ("target_qps", (1, 4), "requests/s"),
    ]
    assert len({item.label for item in found}) == 3
    assert all("0.5" in item.label for item in found if item.levels[0][1].name.startswith("0.5"))


def test_machines_that_measured_the_same_have_series_of_their_own() -> None:
    def on(host: str, loads: Sequence[float], place: str = "") -> Iterator[Record]:
        for item in (record_at(load, 0, GOOD) for load in loads):
            name = f"{item.identity.config_name}{place}"
            identity = dataclasses.replace(item.identity, host=host, config_name=name)
            yield dataclasses.replace(item, identity=identity)

    # As `labels_of` names them: only n1 has come to the last load.
    both = [*on("n1", (1, 2), " @ n1"), *on("n1", (4,)), *on("n2", (1, 2), " @ n2")]
    found = find_series(make_run(both).with_results)
    assert [(item.label, loads_of(item)) for item in found] == [("machine=n1", (1, 2, 4)), ("machine=n2", (1, 2))]
    (table,) = knee_tables(found)
    assert table.names == ("machine=n1", "machine=n2")
    assert [item.label for item in find_series(make_run([*on("n1", (1, 2)), *on("n2", (4,))]).with_results)] == [""]


def test_a_load_that_is_left_at_its_default_is_a_load_and_an_unknown_one_is_none() -> None:
    records = [record_at(load, 0, GOOD) for load in (1, 2, 4)]
    without = {**records[0].requested["traffic_simulation"]}
    del without["target_qps"]
    records[0] = dataclasses.replace(records[0], requested={**records[0].requested, "traffic_simulation": without})
    assert loads_of(only_series(records)) == (1, 2, 4)
    later = under_load(records[2], "${QPS}", GOOD)  # type: ignore[arg-type]
    assert loads_of(only_series([*records[:2], later])) == (1, 2)


def test_series_and_knees_are_in_the_document_of_a_run() -> None:
    document = json.loads(json.dumps(run_document(make_run(records_of([{1: GOOD, 2: GOOD, 4: BAD}] * 3)))))
    (series,) = document["series"]
    assert (series["loads"], series["numbers"], series["slo"]) == (
        [1, 2, 4],
        [1, 2, 3],
        {"ttft_ms": 200, "attainment_pct": 99},
    )
    knee = series["knee"]
    assert (knee["load"], knee["number"], knee["ci_lower"], knee["ci_upper"], knee["least_coverage"]) == (
        2,
        2,
        2,
        4,
        0.75,
    )
    assert knee["cycles"] == [{"kept": 2, "broken": 4}] * 3
    assert (knee["at_least"], knee["below"]) == (None, None)
    beyond = run_document(make_run(records_of([{1: GOOD, 2: GOOD}] * 2)))["series"][0]["knee"]
    assert (beyond["censored_code"], beyond["ci_lower"], beyond["ci_upper"]) == ("knee_beyond", 2, None)
    below = run_document(make_run(records_of([{1: BAD, 2: BAD}] * 2)))["series"][0]["knee"]
    fields = ("load", "number", "at_least", "below")
    assert [tuple(it[name] for name in fields) for it in (beyond, below)] == [
        (None, None, 2, None),
        (None, None, None, 1),
    ]
    assert run_document(make_run([make_record()]))["series"] == []


def test_the_interval_contains_the_median_knee_as_often_as_it_says() -> None:
    """Of all equally likely orders of the cycles' knees around their median."""
    for n in (2, 3, 5):
        hits = [
            (interval := Knee(tuple((4.0, 8.0) if above else (1.0, 2.0) for above in signs)).interval) is not None
            and interval[0] <= 3 < interval[1]
            for signs in itertools.product((False, True), repeat=n)
        ]
        assert sum(hits) / len(hits) == pytest.approx(1 - 2 ** (1 - n))
