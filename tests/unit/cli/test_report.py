from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lem.base.measurement import SLOWDOWN_BITS
from lem.cli.report import thin, trace_of
from lem.meters.samples import GpuHeader, GpuSample, Mark, SampleHeader, SampleLog
from lem.results.report import render_report
from lem.results.report.content import Phase, compose
from lem.results.run import make_run
from tests.command_rig import Output, run_lem
from tests.doubles.nvml.traces import Events
from tests.doubles.powercap import Zone
from tests.records import make_record
from tests.scripted_attempt import at, cpu_attempt, gpu_attempt
from tests.synthetic_campaign import Campaign, Configuration, Written

NS = 1_000_000_000


def report(*words: str | Path) -> Output:
    return run_lem("report", *words)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    configurations = (
        Configuration("fast", batch_size=32, throttled_cycles=(1,)),
        Configuration("slow", backend="pytorch", batch_size=8, energy_per_output_tok_j=0.9, failed_cycles=(0,)),
    )
    return Campaign(configurations, cycles=2, window_s=3, requests=32).write(tmp_path)


def attempts(written: Written) -> list[Path]:
    return sorted((written.results_dir / written.campaign / written.run_id).glob("*/attempt-*"))


def test_a_campaign_becomes_one_file_beside_its_runs(written: Written) -> None:
    path = written.results_dir / "demo" / "report.html"
    pages = set()
    for _ in range(2):
        assert report("demo", "--results-dir", written.results_dir) == (0, f"{path}\n", "")
        pages.add(path.read_text(encoding="utf-8"))
    (page,) = pages
    assert page.startswith("<!DOCTYPE html>")
    assert page.count('id="trace-') >= 4


@pytest.mark.parametrize(
    ("words", "shown"),
    [(("other",), "'other'"), (("demo", "-o", "log.txt/x"), "--output"), (("demo", "--json", "-o", "-"), "--json")],
)
def test_an_unknown_campaign_and_a_path_that_cannot_be_written_are_usage_errors(
    written: Written, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], shown: str
) -> None:
    monkeypatch.chdir(attempts(written)[0])
    code, out, err = report(*words, "--results-dir", written.results_dir)
    assert (code, out, shown in err) == (2, "", True)


def test_damage_is_named_and_left_out(written: Written, tmp_path: Path) -> None:
    whole = [path / "result.json" for path in attempts(written) if (path / "result.json").exists()]
    whole[0].write_text('{"schema_version": 1', encoding="utf-8")
    whole[1].write_text(whole[2].read_text(encoding="utf-8"), encoding="utf-8")
    whole[2].unlink()
    path = tmp_path / "page.html"
    code, out, err = report("demo", "--results-dir", written.results_dir, "-o", path, "--json")
    document, page = json.loads(out), path.read_text(encoding="utf-8")
    assert (code, document["path"], document["bytes"]) == (0, str(path), path.stat().st_size)
    assert {problem["kind"] for problem in document["problems"]} == {"corrupt", "foreign", "missing"}
    for kind in ("corrupt", "foreign"):
        assert f"left out: {kind}: " in err
        assert f"<td class=t>{kind}" in page


@pytest.mark.parametrize("content", [b"", b"no gzip", b"\x1f\x8b\x08\x00broken"])
def test_a_sample_log_that_cannot_be_read_is_named(written: Written, content: bytes) -> None:
    logs = [path / "samples.jsonl.gz" for path in attempts(written) if (path / "samples.jsonl.gz").exists()]
    logs[0].write_bytes(content)
    code, page, _ = report("demo", "--results-dir", written.results_dir, "-o", "-")
    assert (code, page.count("Not shown: ")) == (0, 1)
    assert page.count('<svg class="plot" role="img" aria-labelledby="trace-') == len(logs) - 1


def test_of_many_sample_logs_the_faulty_are_drawn_first(tmp_path: Path) -> None:
    configurations = [Configuration(f"c{i}", batch_size=i + 1, throttled_cycles=(0,) * (i == 9)) for i in range(14)]
    written = Campaign(tuple(configurations), cycles=1, window_s=2, requests=8).write(tmp_path)
    _, page, _ = report("demo", "--results-dir", written.results_dir, "-o", "-")
    assert "12 of 15 experiments with a sample log" in page
    assert page.count('<svg class="plot" role="img" aria-labelledby="trace-') == 12
    assert '<figure id="trace-1"><h3>c9, cycle 1 (invalid)' in page


def make_log(masks: tuple[int, ...] = ()) -> tuple[SampleLog, list[Mark]]:
    """Ten seconds at ten readings a second, idle then window; masks from the first reading of the window on."""
    events = (0,) * 50 + masks + (0,) * (50 - len(masks))
    samples = tuple(
        GpuSample(0, NS + i * NS // 10, power_w=300.0 if i >= 50 else 60.0, temp_c=40.0 + i / 10, event_mask=mask)
        for i, mask in enumerate(events)
    )
    header = SampleHeader(NS, "2026-07-14T10:00:00.000Z", "lab1", 100, (GpuHeader(0, "GPU-1", "H200", "575"),))
    return SampleLog(header, samples=samples), [Mark("window", 6 * NS, 11 * NS), Mark("idle_loaded", NS, 6 * NS)]


def test_phases_come_in_order_with_their_power_and_temperature() -> None:
    log, marks = make_log()
    assert trace_of(log, marks).phases == (
        Phase("idle_loaded", 0.0, 5.0, 60.0, 60.0, 40.0, 44.9, 0.0),
        Phase("window", 5.0, 10.0, 300.0, 300.0, 45.0, 49.9, 0.0),
    )
    guard = Mark("guard_before", 6 * NS, 6 * NS + NS // 5)  # of two readings
    assert trace_of(log, [guard]).phases == (Phase("guard_before", 0.0, 0.2, 300.0, 300.0, 45.0, 45.1, 0.0),)


@pytest.mark.parametrize(("bit", "reason"), SLOWDOWN_BITS.items())
def test_a_slowdown_has_the_name_that_the_record_gives_it(bit: int, reason: str) -> None:
    (slowdown,) = trace_of(*make_log((bit,) * 10)).slowdowns
    assert (slowdown.reason, slowdown.is_fault) == (reason, True)
    assert slowdown.end_s - slowdown.begin_s == pytest.approx(1.0)  # from reading to reading


@pytest.mark.parametrize(
    ("events", "throttled_s", "lengths_s"),
    [
        # Two bits at once, and a third that begins later and outlasts them.
        ((Events(15.0, 20.0, 0x40 | 0x8), Events(18.0, 22.0, 0x80)), 7.0, [5.0, 5.0, 4.0]),
        ((Events(15.0, 25.0, 0x40 | 0x20),), 10.0, [10.0, 10.0]),  # the whole window
        ((Events(16.0, 24.0, 0x4),), 0.0, [8.0]),  # the power limit is no fault
    ],
)
def test_slowdowns_at_the_same_time_are_counted_once(
    events: tuple[Events, ...], throttled_s: float, lengths_s: list[float]
) -> None:
    found = gpu_attempt(events=events)
    trace = trace_of(found.log, found.marks)
    (window,) = (phase for phase in trace.phases if phase.name == "window")
    assert window.throttled_s == pytest.approx(throttled_s, abs=0.2)
    assert sum(end_s - begin_s for begin_s, end_s in trace.slowed_s) == pytest.approx(throttled_s, abs=0.2)
    assert [item.end_s - item.begin_s for item in trace.slowdowns] == pytest.approx(lengths_s, abs=0.2)
    page = render_report(dataclasses.replace(compose(make_run([make_record()])), traces=((make_record(), trace),)))
    assert ("; not throttled" in page) == (throttled_s == 0)


@pytest.mark.parametrize("indices", [(1, 0), (2, 3), (0, 1)])
def test_a_curve_is_labelled_with_the_index_that_nvml_gives_its_gpu(indices: tuple[int, int]) -> None:
    attempt = gpu_attempt(2)
    for place, index in enumerate(indices):
        attempt = attempt.with_gpu_header(place, index=index, name=f"Card {index}")
    trace = trace_of(attempt.log, attempt.marks)
    for lines in (trace.power, trace.temperature):
        assert [series.label for series in lines] == [f"GPU {index} Card {index}" for index in indices]
    unseen = attempt.with_gpu_header(index=None, name="unknown")  # by NVML
    assert trace_of(unseen.log, unseen.marks).power[0].label == f"{attempt.uuids[0]} unknown"


def test_a_package_that_may_have_wrapped_twice_has_no_power_as_it_has_no_energy() -> None:
    attempt = cpu_attempt(Zone("intel-rapl:0", "package-0", ((0, 90.0),), max_uj=4_000_000_000, begins_ns=at(-2)))
    rows = tuple(row for row in attempt.log.rapl if not at(16) < row.at_ns < at(21))
    holed = attempt.with_log(rapl=rows)
    assert holed.measured().energy.cpu_package_energy_j is None
    after_gap_s = (at(21) - min(mark.opened_ns for mark in attempt.marks)) / NS
    for found, has_power in ((attempt, True), (holed, False)):
        (series,) = trace_of(found.log, found.marks).power
        points = [point for point in series.points if point]
        assert [power_w for _, power_w in points] == pytest.approx([90] * len(points), rel=0.01)
        assert any(abs(time_s - after_gap_s) < 0.6 for time_s, _ in points) == has_power


def test_a_log_without_readings_is_an_empty_trace() -> None:
    header = SampleHeader(NS, "2026-07-14T10:00:00.000Z", "lab1", 100, gpu_error="no GPU")
    trace = trace_of(SampleLog(header), [])
    assert (trace.power, trace.temperature, trace.phases) == ((), (), ())
    report = compose(make_run([make_record()]))
    page = render_report(dataclasses.replace(report, traces=((make_record(), trace),), n_logs=1))
    assert 'id="traces"' not in page
    assert 'id="trace"' in page.partition('<section id="absent"')[2]


def test_thinning_keeps_peaks_lows_and_holes() -> None:
    points = [(float(index), {500: 9.0, 700: 0.0}.get(index, 1.0)) for index in range(1000)]
    thinned = thin(points, 50, hole_s=3)
    assert len(thinned) <= 100
    assert {(500.0, 9.0), (700.0, 0.0)} <= set(thinned)
    assert None not in thinned
    assert thin([*points[:300], *points[400:]], 50, hole_s=3).count(None) == 1
    assert thin([], 50, hole_s=3) == ()
    assert thin([(1.0, 2.0)], 50, hole_s=3) == ((1.0, 2.0),)
