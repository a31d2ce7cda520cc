from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest

from lem.base import measurement as names
from lem.base.measurement import Measured
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.meters.attempt import AttemptLog, Baselines, without_still_counters
from lem.meters.curve import NotMeasured, Span
from lem.meters.energy import EnergyFindings, efficiency_of, measure
from lem.meters.external import ExternalReadings
from lem.meters.machine import GpuSettings
from lem.meters.samples import CpuUse, GpuHeader, GpuSample, GpuSecond, LimitSeen, Mark, MeterError, ProcessesSeen
from lem.record import Energy, Gpu, Idle, Work, carbon_of
from tests.doubles.nvml.traces import Counter, Events, GpuProcess, Level, Sensor
from tests.doubles.powercap import Zone
from tests.records import codes
from tests.scripted_attempt import (
    BARE_W,
    IDLE_W,
    LEVELS,
    LOAD_W,
    LOADING_W,
    PREFILL_W,
    Attempt,
    at,
    config,
    cpu_attempt,
    gpu_attempt,
    span,
)

WINDOW_J = 10 * LOAD_W
LOST = Reason.of("verbatim", text="lost")
STEADY_MARKS = (Mark(names.WINDOW, at(16), at(24)),)


def package(number: int = 0, *, name: str = "package", max_uj: int = 262_143_328_850, begins_uj: int = 0) -> Zone:
    """40 W at rest, 140 W in the window."""
    powers = ((0, 40.0), (at(15), 140.0), (at(25), 40.0))
    label = f"{name}-{number}" if name == "package" else name
    return Zone(f"intel-rapl:{number}", label, powers, max_uj=max_uj, begins_uj=begins_uj, begins_ns=at(-2))


# Gross and net


def test_the_energy_of_a_closed_window_is_that_of_the_work_alone() -> None:
    found = gpu_attempt().measured()
    assert found.energy.gpu_energy_j == pytest.approx(WINDOW_J, rel=0.002)
    assert found.energy.primary_j.value == found.energy.gpu_energy_j
    assert (found.energy.energy_source, found.energy.energy_scope) == ("nvml_counter", "gpu")
    assert found.energy.counter_update_period_s == pytest.approx(0.1, rel=0.01)
    assert (found.invalid_reasons, found.warnings) == ((), ())


def test_net_is_gross_less_the_loaded_idle_by_the_same_meter() -> None:
    energy = gpu_attempt().measured().energy
    assert energy.gpu_energy_j is not None
    assert energy.gpu_energy_net_j == pytest.approx(energy.gpu_energy_j - 10 * IDLE_W, rel=0.003)
    without = gpu_attempt().without(names.IDLE_LOADED).measured().energy
    assert without.gpu_energy_j == pytest.approx(WINDOW_J, rel=0.002)
    assert without.gpu_energy_net_j is None
    assert without.null_reasons["gpu_energy_net_j"].code == "rest_not_measured"


def test_load_and_warmup_have_energies_of_their_own() -> None:
    energy = gpu_attempt().measured().energy
    assert energy.load_energy_j == pytest.approx(3 * LOADING_W, rel=0.03)
    assert energy.warmup_energy_j == pytest.approx(2 * LOAD_W, rel=0.03)
    neither = gpu_attempt().without(names.LOAD, names.WARMUP).measured().energy
    assert neither.null_reasons["load_energy_j"].code == "nothing_loaded"
    assert neither.null_reasons["warmup_energy_j"].code == "no_warmup"


def assert_nulls_have_reasons(found: EnergyFindings) -> None:
    sections: tuple[Energy | Idle | Gpu, ...] = (found.energy, found.idle, *found.gpus)
    for section in sections:
        fields = [item.name for item in dataclasses.fields(section) if item.name != "null_reasons"]
        assert set(section.null_reasons) == {name for name in fields if getattr(section, name) is None}
        assert all(section.null_reasons.values())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_sampler_missed_every_null_has_a_reason_and_nothing_breaks(seed: int) -> None:
    chance = random.Random(seed)
    attempt = gpu_attempt(2, has_prefill=True, zones=(package(),)) if seed % 2 else cpu_attempt(package())

    def thinned(rows: Sequence[Any]) -> tuple[Any, ...]:
        lost = chance.choice((0.0, 0.0, 0.01, 0.5, 1.0))
        from_ns = at(chance.uniform(-1, 60))
        until_ns = from_ns + chance.randrange(10**10)
        return tuple(row for row in rows if chance.random() >= lost and not from_ns <= row.at_ns <= until_ns)

    rows = {name: thinned(getattr(attempt.log, name)) for name in ("counters", "samples", "rapl", "processes")}
    marks = tuple(
        dataclasses.replace(mark, closed_ns=chance.choice((mark.closed_ns, mark.closed_ns, mark.opened_ns)))
        for mark in attempt.marks
        if chance.random() > 0.1
    )
    found = (
        dataclasses.replace(attempt, marks=marks)
        .with_log(**rows)
        .measured(is_steady_mode=chance.random() < 0.3, own_pids=chance.choice((None, {1})))
    )
    assert_nulls_have_reasons(found)
    assert (found.energy.primary_j.value is None) == (found.energy.primary_j.null_reason is not None)


# Several GPUs


def test_several_gpus_are_summed() -> None:
    found = gpu_attempt(2).measured()
    assert found.energy.gpu_energy_j == pytest.approx(2 * WINDOW_J, rel=0.002)
    assert [gpu.energy_j for gpu in found.gpus] == [pytest.approx(WINDOW_J, rel=0.002)] * 2


def test_the_sum_is_null_as_soon_as_one_was_not_read() -> None:
    attempt = gpu_attempt(2)
    counters = tuple(row for row in attempt.log.counters if row.gpu == 0)
    errors = (MeterError(at(1), "gpu1.counter", "GPU is lost"),)
    found = attempt.with_log(counters=counters, errors=errors).measured()
    assert found.energy.gpu_energy_j is None
    assert found.gpus[0].energy_j == pytest.approx(WINDOW_J, rel=0.002)
    assert found.gpus[1].energy_j is None
    assert found.energy.null_reasons["gpu_energy_j"].data["error"] == "GPU is lost"


def test_a_counter_that_is_lost_in_the_window_says_why() -> None:
    attempt = gpu_attempt()
    rows = {
        name: tuple(row for row in getattr(attempt.log, name) if row.at_ns < at(20)) for name in ("counters", "samples")
    }
    errors = (MeterError(at(20), "gpu0.counter", "GPU is lost"),)
    found = attempt.with_log(counters=rows["counters"], errors=errors).measured()
    assert str(found.energy.primary_j.null_reason).endswith("s too early (GPU is lost)")
    assert found.warnings == (Reason.of("meter_failed", meter="counter of GPU 0", error="GPU is lost"),)
    # What is read first of a GPU that is gone says so; its counter is then not asked any more.
    gone = (MeterError(at(20), "gpu0.power", "gone"), MeterError(at(21), "gpu0.handle", "GPU is lost"))
    found = attempt.with_log(counters=rows["counters"], errors=gone).measured()
    assert str(found.energy.primary_j.null_reason).endswith("s too early (GPU is lost)")
    ended = attempt.with_log(**rows).measured()
    assert str(ended.energy.primary_j.null_reason).endswith("s too early; the sampler had ended, or hung")


def test_a_gpu_the_sampler_does_not_see_stands_in_the_record() -> None:
    attempt = gpu_attempt()
    sources = dataclasses.replace(
        attempt.sources(), gpus=(), gpu_method=None, primary=None, missing_uuids=("GPU-9",), reasons={
            **attempt.sources().reasons, "gpu": LOST, "primary": LOST},
    )  # fmt: skip
    found = measure(AttemptLog(attempt.log, attempt.marks, sources), window_repeats=1)
    assert [gpu.uuid for gpu in found.gpus] == ["GPU-9"]
    assert found.gpus[0].null_reasons["energy_j"] == LOST
    assert found.energy.primary_j.null_reason == LOST


# What a GPU was like


def test_the_section_of_a_gpu() -> None:
    settings = GpuSettings(700.0, 1.98e9, 1.98e9, True, 5, 16, 16, 18, 0, 650.0)
    attempt = gpu_attempt(sm_clocks_mhz=((0.0, 1000), (20.0, 2000)), temp_c=55).with_gpu_header(settings=settings)
    (gpu,) = attempt.measured().gpus
    assert gpu.power_mean_w == pytest.approx(LOAD_W, rel=0.002)
    assert gpu.power_max_w == pytest.approx(LOAD_W)
    assert gpu.power_limit_w == 700.0
    assert gpu.sm_clock_mean_hz == pytest.approx(1.5e9, rel=0.01)
    assert (gpu.temp_start_c, gpu.temp_end_c, gpu.temp_max_c) == (55.0, 55.0, 55.0)
    assert (gpu.throttle_power_s, gpu.throttle_thermal_s, gpu.event_reasons_mask) == (0.0, 0.0, 0)
    assert (gpu.persistence_mode, gpu.mig_mode, gpu.mem_peak_b) == (True, False, 1000)
    assert gpu.null_reasons == {}


def test_a_mean_counts_each_sample_for_the_time_it_stands_for() -> None:
    attempt = gpu_attempt(sm_clocks_mhz=((0.0, 1000), (20.0, 2000)))
    rows = [row for row in attempt.log.samples if row.at_ns < at(20) or row.at_ns % 300_000_000 < 100_000_000]
    (gpu,) = attempt.with_log(samples=tuple(rows)).measured().gpus
    assert gpu.sm_clock_mean_hz == pytest.approx(1.5e9, rel=0.02)


def test_what_a_driver_does_not_tell_is_null() -> None:
    attempt = gpu_attempt().with_gpu_header(power_limit_w=None, mig_mode=None)
    rows = tuple(dataclasses.replace(row, util_ratio=None, event_mask=None) for row in attempt.log.samples)
    (gpu,) = attempt.with_log(samples=rows).measured().gpus
    assert gpu.energy_j is not None
    for field in ("power_limit_w", "mig_mode", "util_mean_ratio", "event_reasons_mask", "throttle_power_s"):
        assert getattr(gpu, field) is None
        assert gpu.null_reasons[field] == Reason.of("not_reported")


# Clock events


@pytest.mark.parametrize(
    ("bit", "name"),
    [
        (0x8, "hardware slowdown"),
        (0x20, "software thermal slowdown"),
        (0x40, "hardware thermal slowdown"),
        (0x80, "hardware power brake"),
    ],
)
def test_a_slowdown_in_the_window_makes_it_invalid(bit: int, name: str) -> None:
    found = gpu_attempt(events=(Events(18.0, 19.0, bit),)).measured()
    (reason,) = found.invalid_reasons
    assert (reason.code, reason.data["name"], reason.data["bit"]) == ("slowdown", name, bit)
    assert found.energy.gpu_energy_j is not None
    (gpu,) = found.gpus
    assert gpu.event_reasons_mask == bit
    assert gpu.throttle_thermal_s == pytest.approx(1.0 if bit in (0x20, 0x40) else 0.0, abs=0.11)


def test_clock_events_that_leave_the_window_valid() -> None:
    before_and_after, cap = (Events(12.0, 14.9, 0x40), Events(25.1, 30.0, 0x8)), Events(16.0, 20.0, 0x4)
    found = gpu_attempt(events=(*before_and_after, cap)).measured()
    assert (found.invalid_reasons, found.warnings) == ((), ())
    assert found.gpus[0].event_reasons_mask == 0x4
    assert found.gpus[0].throttle_power_s == pytest.approx(4.0, abs=0.11)


def test_without_samples_the_counter_counts_and_nobody_knows_of_clock_events() -> None:
    unwatched = {"timeseries": {"enabled": False}}
    found = gpu_attempt().with_log(samples=()).measured(options=unwatched)
    assert found.energy.gpu_energy_j == pytest.approx(WINDOW_J, rel=0.002)
    assert found.gpus[0].null_reasons["temp_max_c"].code == "gpus_unwatched"
    assert "clocks_unwatched" in codes(found.warnings)
    without_counter = gpu_attempt(counter=None).measured(options=unwatched).energy
    assert without_counter.null_reasons["gpu_energy_j"].code == "power_not_sampled"


# Settings of the GPU


@pytest.mark.parametrize(
    ("limits", "wanted_w", "reasons"),
    [
        ([(1, 250.0)], 250.0, []),
        ([(1, 250.4)], 250.0, []),  # boards may round
        ([(1, 700.0), (3, 250.0)], 250.0, []),  # set before the window
        ([(1, 250.0), (27, 700.0)], 250.0, []),  # and restored after it
        ([(1, 250.0), (20, 300.0)], 250.0, [("limit_changed", 250.0, 300.0)]),
        ([(1, 700.0), (20, 300.0)], None, [("limit_changed", 700.0, 300.0)]),
        ([(1, 700.0), (20, 300.0), (21, 700.0)], None, [("limit_changed", 700.0, 300.0)]),
        ([(1, 250.0), (26, 300.0)], 250.0, [("limit_changed", 250.0, 300.0)]),  # seen by the first look after it
        ([(1, 700.0)], 250.0, [("limit_not_kept", 250.0, 700.0)]),
        ([(1, 700.0)], None, []),
        ([], 250.0, []),  # a driver that does not tell
    ],
)
def test_a_power_limit_that_is_not_the_wanted_one_makes_the_window_invalid(
    limits: Sequence[tuple[float, float]], wanted_w: float | None, reasons: Sequence[tuple[str, float, float]]
) -> None:
    attempt = gpu_attempt().with_log(limits=tuple(LimitSeen(0, at(second), limit_w) for second, limit_w in limits))
    found = attempt.measured(options={"gpu": {"power_limit_w": wanted_w}}).invalid_reasons
    assert [(it.code, *[value for name, value in it.data.items() if name != "uuid"]) for it in found] == reasons


@pytest.mark.parametrize(("clock_mhz", "is_kept"), [(1980, True), (1950, True), (1935, False), (1005, False)])
def test_a_clock_above_the_locked_one_makes_the_window_invalid(clock_mhz: int, is_kept: bool) -> None:
    found = gpu_attempt().measured(options={"gpu": {"lock_clock_mhz": clock_mhz}}).invalid_reasons
    assert codes(found) == ([] if is_kept else ["clock_not_locked"])


# Other programs


def test_a_process_that_appears_in_the_window_makes_it_invalid() -> None:
    own = GpuProcess(100)
    found = gpu_attempt(processes=(own, GpuProcess(4711, from_s=17.0, to_s=19.0))).measured()
    (reason,) = found.invalid_reasons
    assert (reason.code, reason.data["pids"]) == ("foreign_process", "4711")


def test_a_process_that_is_there_all_along_is_foreign_once_the_own_ones_are_known() -> None:
    attempt = gpu_attempt(processes=(GpuProcess(100), GpuProcess(4711)))
    assert attempt.measured().invalid_reasons == ()
    assert attempt.measured(own_pids={100, 4711}).invalid_reasons == ()
    assert attempt.measured(own_pids={100}).invalid_reasons[0].data["pids"] == "4711"
    gone = gpu_attempt(processes=(GpuProcess(100), GpuProcess(4711, to_s=13.0), GpuProcess(4712, from_s=26.0)))
    assert gone.measured(own_pids={100}).invalid_reasons == ()
    again = (ProcessesSeen(0, at(1), (100,)), ProcessesSeen(0, at(20), (100,)))
    assert attempt.with_log(processes=again).measured().invalid_reasons == ()


# Resets, limits, MIG, scope


AT_REST_FROM_14_S = tuple(Level(level.at_s, 0.0 if level.at_s >= 14 else level.target_w) for level in LEVELS)


@pytest.mark.parametrize(
    ("attempt", "code"),
    [
        (gpu_attempt().without(names.WINDOW), "no_window_mark"),
        (gpu_attempt(counter=Counter(phase_s=0.037, resets_s=(20.0,))), "counter_reset"),
        (gpu_attempt(levels=AT_REST_FROM_14_S), "read_early"),
        (gpu_attempt(gaps=[(23.0, 27.0)]), "edge_not_read"),
    ],
    ids=["no mark", "reset", "standing still", "slept over an edge"],
)
def test_an_energy_that_cannot_be_known_is_null_with_its_reason(attempt: Attempt, code: str) -> None:
    energy = attempt.measured().energy
    assert (energy.gpu_energy_j, energy.primary_j.value, energy.energy_source) == (None, None, None)
    assert energy.primary_j.null_reason is not None
    assert (energy.primary_j.null_reason.code, energy.null_reasons["gpu_energy_j"].code) == (code, code)


def test_energy_beyond_the_power_limit_is_null_with_the_sum() -> None:
    found = gpu_attempt().with_gpu_header(power_limit_w=200.0).measured()
    assert found.gpus[0].energy_j is None
    assert "1.2 x 200 W x 10.000 s" in found.energy.null_reasons["gpu_energy_j"].text
    assert found.gpus[0].power_mean_w == pytest.approx(LOAD_W, rel=0.02)
    assert gpu_attempt().with_gpu_header(power_limit_w=251.0).measured().energy.primary_j.value is not None


def test_the_energy_of_a_module_is_named_and_not_held_to_the_gpus_limit() -> None:
    found = gpu_attempt(scope="module").with_gpu_header(power_limit_w=200.0).measured()
    assert found.energy.energy_scope == "module"
    assert found.energy.gpu_energy_j == pytest.approx(WINDOW_J, rel=0.002)
    assert Reason.of("energy_of_module") in found.warnings


# Counter and power


def test_without_a_counter_power_is_integrated_and_says_so() -> None:
    attempt = gpu_attempt(counter=None)
    marks = [mark for mark in attempt.marks if mark.name not in (names.GUARD_BEFORE, names.GUARD_AFTER)]
    marks += [Mark(names.GUARD_BEFORE, at(14.5), at(15)), Mark(names.GUARD_AFTER, at(25), at(25.5))]
    found = dataclasses.replace(attempt, marks=tuple(marks)).measured()
    assert found.energy.energy_source == "power_instant_integral"
    assert found.energy.primary_j.value == pytest.approx(WINDOW_J, rel=0.01)
    assert found.energy.energy_crosscheck_ratio is None
    assert found.energy.counter_update_period_s is None


def test_power_that_was_hardly_sampled_in_the_window_is_not_integrated() -> None:
    attempt = gpu_attempt(counter=None)
    rare = attempt.with_log(samples=attempt.log.samples[::20])
    reason = rare.measured(options={"timeseries": {"sample_interval_ms": 2000}}).energy.null_reasons["gpu_energy_j"]
    assert (reason.code, reason.data["seen"], reason.data["window_s"]) == ("read_too_rarely", 6, 10.0)


def test_rest_and_load_are_sampled_as_the_baseline_says() -> None:
    attempt = gpu_attempt(counter=None)
    loaded_ns = span(names.LOAD)[1]
    attempt = attempt.with_log(
        samples=tuple(row for place, row in enumerate(attempt.log.samples) if place % 10 == 0 or row.at_ns > loaded_ns)
    )
    found = attempt.measured(options={"baseline": {"sample_interval_ms": 1000}})
    assert found.energy.load_energy_j is not None
    assert found.idle.idle_bare_power_w == pytest.approx(BARE_W, rel=0.1)
    assert attempt.measured().energy.null_reasons["load_energy_j"].code == "power_hole"


@pytest.mark.parametrize(("gain", "is_told"), [(1.03, False), (1.07, True), (0.93, True)])
def test_counter_and_power_more_than_five_percent_apart_are_a_warning(gain: float, is_told: bool) -> None:
    found = gpu_attempt(instant=Sensor(gain=gain)).measured()
    assert found.energy.energy_crosscheck_ratio == pytest.approx(gain, abs=0.01)
    assert ("crosscheck" in codes(found.warnings)) == is_told
    assert found.invalid_reasons == ()


def test_a_sensor_that_averages_over_a_second_is_no_reason_for_a_warning() -> None:
    found = gpu_attempt(instant=None).measured()
    assert found.energy.energy_crosscheck_ratio == pytest.approx(1.0, abs=0.01)
    assert found.warnings == ()


def test_a_hole_voids_the_crosscheck_and_not_the_counter() -> None:
    found = gpu_attempt(gaps=[(18.0, 19.5)]).measured()
    assert found.energy.gpu_energy_j == pytest.approx(WINDOW_J, rel=0.002)
    assert found.energy.energy_crosscheck_ratio is None
    assert found.energy.null_reasons["energy_crosscheck_ratio"].data["gap_s"] == 1.6
    assert found.energy.sample_gap_max_s == pytest.approx(1.6)
    assert Reason.of("samples_missing", gap_s=1.6, periods=3, period_s=0.1) in found.warnings


def test_a_counter_that_slept_a_little_at_an_edge_is_a_warning() -> None:
    found = dataclasses.replace(gpu_attempt(gaps=[(15.9, 16.25)]), marks=STEADY_MARKS).measured(is_steady_mode=True)
    assert found.energy.gpu_energy_j == pytest.approx(8 * LOAD_W, rel=0.01)
    assert "edge_unread" in codes(found.warnings)


def test_a_guard_shorter_than_the_lag_of_the_power_sensor_is_a_warning() -> None:
    assert "guard_short" in codes(gpu_attempt(counter=None).measured().warnings)
    assert "guard_short" not in codes(gpu_attempt().measured().warnings)


def test_an_end_that_looks_otherwise_from_inside_than_from_outside_is_a_warning() -> None:
    levels = sorted((*LEVELS, Level(24.35, IDLE_W)), key=lambda level: level.at_s)
    attempt = gpu_attempt(levels=levels, counter=Counter(period_s=1.0, phase_s=0.3))
    guards = (Mark(names.GUARD_BEFORE, at(14), at(15)), Mark(names.GUARD_AFTER, at(25), at(27)))
    marks = attempt.without(names.GUARD_BEFORE, names.GUARD_AFTER).marks + guards
    found = dataclasses.replace(attempt, marks=marks).measured()
    assert "edge_doubtful" in codes(found.warnings)
    assert found.energy.primary_j.value == pytest.approx(WINDOW_J - 0.65 * (LOAD_W - IDLE_W), rel=0.01)


def test_a_warning_names_the_gpu_by_the_index_of_nvml_and_not_by_its_place() -> None:
    attempt = gpu_attempt(2).with_gpu_header(0, index=3).with_gpu_header(1, index=None)
    meters = ("gpu0.power", "gpu1.power", "gpu10.power", "rapl.package-0")
    errors = (
        MeterError(at(1), "gpu0.power", "early"),
        *(MeterError(at(20), meter, "Unknown Error") for meter in meters),
    )
    found = attempt.with_log(errors=errors).measured()
    names = ("power of GPU 3", f"power of {attempt.uuids[1]}", "gpu10.power", "rapl.package-0")
    assert found.warnings == tuple(Reason.of("meter_failed", meter=name, error="Unknown Error") for name in names)


# Power at rest


def test_power_at_rest_is_read_where_it_is_marked() -> None:
    idle = gpu_attempt().measured(baselines=Baselines(1.0, 1.0, 900.0)).idle
    assert idle.idle_bare_power_w == pytest.approx(BARE_W, rel=0.01)
    assert idle.idle_loaded_power_w == pytest.approx(IDLE_W, rel=0.01)
    assert idle.idle_loaded_post_power_w == pytest.approx(IDLE_W, rel=0.01)
    assert idle.baseline_age_s == 0.0


def test_a_baseline_from_before_stands_where_nothing_is_marked() -> None:
    attempt = gpu_attempt(2).without(names.IDLE_BARE, names.IDLE_LOADED)
    found = attempt.measured(baselines=Baselines(bare_power_w=121.0, loaded_power_w=141.0, age_s=900.0))
    assert found.energy.gpu_energy_j is not None
    assert found.idle.idle_bare_power_w == 121.0
    assert (found.idle.idle_loaded_power_w, found.idle.baseline_age_s) == (141.0, 900.0)
    assert found.energy.gpu_energy_net_j == pytest.approx(found.energy.gpu_energy_j - 1405, rel=1e-4)


@pytest.mark.parametrize(
    ("after_w", "told"),
    [(IDLE_W * 1.14, []), (IDLE_W * 1.19, ["rest_power_rose"]), (IDLE_W * 0.8, ["rest_power_fell"])],
)
def test_power_at_rest_that_moved_by_five_percent_of_the_net_power_is_a_warning(
    after_w: float, told: list[str]
) -> None:
    found = gpu_attempt(levels=(*LEVELS, Level(29.0, after_w))).measured()  # net, about 230 W
    assert [code for code in codes(found.warnings) if code.startswith("rest_power")] == told
    assert found.energy.gpu_energy_net_j == pytest.approx(10 * (LOAD_W - (IDLE_W + after_w) / 2), rel=0.01)


def resting(shift: float, load_w: float, *, seen_after: bool = True) -> EnergyFindings:
    """A window that opens at 72 W at rest, which moves by a share of it in the middle of the window."""
    rest_w, moved_w = 72.0, 72.0 * (1 + shift)
    levels = (
        *(Level(0.0, BARE_W), Level(4.0, LOADING_W), Level(7.0, rest_w), Level(12.0, load_w), Level(14.0, rest_w)),
        *(Level(15.0, load_w), Level(20.0, load_w + moved_w - rest_w), Level(25.0, moved_w)),
    )
    attempt = gpu_attempt(levels=levels)
    return (attempt if seen_after else attempt.without(names.IDLE_POST)).measured()


def test_power_at_rest_that_drifts_evenly_leaves_net_energy_right() -> None:
    for load_w in (152.0, 300.0):
        for shift in (-0.05, 0.05):
            net_j = resting(shift, load_w).energy.gpu_energy_net_j
            assert net_j == pytest.approx(10 * (load_w - 72), rel=0.01)


@pytest.mark.parametrize("shift", [-0.055, 0.055])
def test_net_energy_that_is_small_beside_what_power_at_rest_moved_is_null(shift: float) -> None:
    # At 87 W over 72 W at rest, 5 % more or less of these make net energy 19 % too low or 32 % too high.
    found = resting(shift, 87.0)
    assert found.energy.gpu_energy_net_j is None
    assert found.energy.null_reasons["gpu_energy_net_j"].code == "net_shifted"
    assert found.energy.null_reasons["net_uncertainty_j"].code == "net_shifted"
    assert found.energy.energy_uncertainty_j is not None
    assert codes(found.warnings) == ["rest_power_rose" if shift > 0 else "rest_power_fell"]


@pytest.mark.parametrize("moved", [-0.02, 0.02, 0.04])
@pytest.mark.parametrize("in_window", [0.0, 1.0])
def test_the_uncertainty_of_net_energy_covers_power_at_rest_that_moved(moved: float, in_window: float) -> None:
    """All of it before or after the window."""
    load_w, rest_w = 102.0, 72.0
    levels = (
        *(Level(0.0, BARE_W), Level(4.0, LOADING_W), Level(7.0, rest_w)),
        *(Level(15.0, load_w), Level(25.0, rest_w), Level(29.0, rest_w * (1 + moved))),
    )
    energy = gpu_attempt(levels=levels).measured().energy
    true_j = 10 * (load_w - rest_w * (1 + in_window * moved))  # what 102 W contain at rest is not seen
    assert energy.gpu_energy_net_j is not None
    assert energy.net_uncertainty_j is not None
    assert energy.net_uncertainty_budget_j is not None
    error_j = abs(energy.gpu_energy_net_j - true_j)
    assert error_j > 5
    assert error_j < 3**0.5 * energy.net_uncertainty_budget_j["idle_shift"] + 2
    assert energy.net_uncertainty_j == pytest.approx(
        sum(part_j**2 for part_j in energy.net_uncertainty_budget_j.values()) ** 0.5
    )
    assert energy.net_uncertainty_budget_j["sensor"] == pytest.approx(0.05 * energy.gpu_energy_net_j / 3**0.5)


def test_power_at_rest_that_was_not_read_again_is_taken_to_move_by_five_percent() -> None:
    found = resting(0.0, 87.0, seen_after=False)
    assert found.energy.gpu_energy_net_j == pytest.approx(150, rel=0.02)
    assert (found.energy.net_uncertainty_budget_j or {})["idle_shift"] == pytest.approx(36 / 3**0.5, rel=0.01)
    assert codes(found.warnings) == ["rest_unchecked"]
    assert found.warnings[0].data["share"] == pytest.approx(0.24, rel=0.02)
    assert resting(0.0, 300.0, seen_after=False).warnings == ()


def test_power_at_rest_is_the_sum_over_gpus() -> None:
    attempt = gpu_attempt(2)
    resting = AttemptLog(attempt.log, (), attempt.sources())
    assert resting.rest_power_w(Span(at(8), at(11))) == pytest.approx(2 * IDLE_W, rel=0.01)
    with pytest.raises(NotMeasured):
        resting.rest_power_w(Span(at(30), at(99)))


# Steadiness


def rising(watts_at_the_end: float) -> tuple[Level, ...]:
    return tuple(sorted((*LEVELS, Level(20.0, watts_at_the_end)), key=lambda level: level.at_s))


@pytest.mark.parametrize(("second_half_w", "change"), [(LOAD_W * 1.015, 0.0149), (LOAD_W * 0.97, -0.0305)])
def test_the_change_of_power_is_that_between_the_halves(second_half_w: float, change: float) -> None:
    attempt = dataclasses.replace(gpu_attempt(levels=rising(second_half_w)), marks=STEADY_MARKS)
    assert attempt.measured(is_steady_mode=True).power_change == pytest.approx(change, rel=0.02)


def test_halves_of_a_closed_window_are_whole_passes() -> None:
    attempt = gpu_attempt(levels=rising(LOAD_W * 1.2))
    assert attempt.measured(window_repeats=2).power_change == pytest.approx(0.2 / 1.1, rel=0.05)
    # Three passes: the middle one, in which power rose, belongs to neither half; the outer ones still differ.
    assert attempt.measured(window_repeats=3).power_change == pytest.approx(0.2 / 1.1, rel=0.05)
    assert attempt.measured(window_repeats=1).power_change is None
    assert gpu_attempt(counter=Counter(period_s=1.0)).measured().power_change is None  # too coarse


def test_rapl_read_once_a_second_is_enough_to_compare_halves() -> None:
    attempt = dataclasses.replace(cpu_attempt(package()), marks=(Mark(names.WINDOW, at(15.5), at(24.5)),))
    assert attempt.measured(is_steady_mode=True).power_change == pytest.approx(0.0, abs=0.01)


# Prefill and decode


def test_prefill_is_differenced_from_the_whole() -> None:
    energy = gpu_attempt(has_prefill=True).measured(window_repeats=4).energy
    assert energy.gpu_energy_j is not None
    assert energy.prefill_energy_j is not None
    assert energy.prefill_energy_j == pytest.approx(4 * PREFILL_W, rel=0.02)
    assert energy.decode_energy_j == pytest.approx(energy.gpu_energy_j - energy.prefill_energy_j)
    assert energy.phase_method is not None
    assert "1 pass of prefill alone" in energy.phase_method
    attempt = gpu_attempt(has_prefill=True).without(names.PREFILL)
    halves = (Mark(names.PREFILL, at(27), at(27.5)), Mark(names.PREFILL, at(27.5), at(28)))
    twice = dataclasses.replace(attempt, marks=attempt.marks + halves).measured(window_repeats=4).energy
    assert twice.prefill_energy_j == pytest.approx(2 * PREFILL_W, rel=0.02)


def phases_null_reason(attempt: Attempt, **arguments: Any) -> Reason:
    energy = attempt.measured(**arguments).energy
    assert (energy.prefill_energy_j, energy.decode_energy_j, energy.phase_method) == (None, None, None)
    reasons = {energy.null_reasons[name] for name in ("prefill_energy_j", "decode_energy_j", "phase_method")}
    (reason,) = reasons
    return reason


def test_phases_are_null_with_a_reason_where_they_cannot_be_told() -> None:
    assert phases_null_reason(gpu_attempt()).code == "phases_off"
    attempt = gpu_attempt(has_prefill=True)
    assert phases_null_reason(attempt, is_steady_mode=True).code == "phases_overlap"
    assert phases_null_reason(attempt, window_repeats=9).code == "prefill_not_part"


@pytest.mark.parametrize(("from_s", "what"), [(17.0, "window"), (27.0, "window of prefill alone")])
def test_phases_need_both_windows_valid(from_s: float, what: str) -> None:
    attempt = gpu_attempt(has_prefill=True, events=(Events(from_s, from_s + 0.5, 0x40),))
    assert phases_null_reason(attempt).data["span"] == what


# CPU


def test_on_a_cpu_packages_and_memory_are_summed() -> None:
    found = cpu_attempt(package(0), package(1), package(2, name="dram"), package(3, name="psys")).measured()
    assert found.energy.cpu_package_energy_j == pytest.approx(2800, rel=0.001)
    assert found.energy.dram_energy_j == pytest.approx(1400, rel=0.001)
    assert found.energy.primary_j.value == pytest.approx(4200, rel=0.001)
    assert (found.energy.energy_source, found.energy.energy_scope) == ("rapl", "cpu_package")
    assert found.idle.idle_loaded_power_w == pytest.approx(120, rel=0.01)
    assert found.gpus == ()
    assert found.energy.null_reasons["gpu_energy_j"].code == "on_cpu"


def test_packages_that_were_not_all_read_are_not_summed() -> None:
    attempt = cpu_attempt(package(0), package(1))
    rows = tuple(row for row in attempt.log.rapl if row.zone == 0)
    errors = (MeterError(at(1), "rapl.package-1", "Permission denied"),)
    found = attempt.with_log(rapl=rows, errors=errors).measured()
    assert found.energy.cpu_package_energy_j is None
    assert found.energy.null_reasons["cpu_package_energy_j"].data["error"] == "Permission denied"


def test_an_estimate_is_labelled() -> None:
    # Of 4 CPUs the engine has 3.2 in the window, and another program 0.4 all the time.
    own_s = [0.1 * second + 3.1 * min(10, max(0, second - 15)) for second in range(-1, 35)]
    rows = [
        CpuUse(at(second), 0.0, own + 0.4 * second, 3.6 * second - own, 0.0, own if second >= 5 else None)
        for second, own in enumerate(own_s, start=-1)
    ]
    options = {"measurement": {"energy": "tdp_estimate", "cpu_tdp_w": 200}}
    attempt = cpu_attempt().with_log(usage=tuple(rows))
    found = attempt.measured(options=options)
    assert found.energy.primary_j.value == pytest.approx(1600, rel=0.01)
    assert found.idle.idle_loaded_power_w == pytest.approx(5)
    assert found.energy.energy_source == "tdp_estimate"
    assert Reason.of("energy_estimated") in found.warnings


# The user's own meter


def plug(power_w: float, begin_s: float = 0.0, end_s: float = 34.0) -> ExternalReadings:
    origin_utc_s = 1767225600.0 + 1.0  # 2026-01-01, when the double's log begins, a second before the script
    times = [origin_utc_s + begin_s + place / 10 for place in range(round(10 * (end_s - begin_s)) + 1)]
    return ExternalReadings("plug.csv", tuple(times), (power_w,) * len(times))


def test_the_users_own_meter_counts_where_nothing_else_does() -> None:
    options = {"measurement": {"external_csv": "plug.csv"}}
    beside = gpu_attempt().measured(options=options, external=plug(500)).energy
    assert beside.external_energy_j == pytest.approx(5000)
    assert beside.energy_source == "nvml_counter"
    found = cpu_attempt().measured(options=options, external=plug(500))
    assert found.energy.primary_j.value == pytest.approx(5000)
    assert found.energy.energy_scope == "machine"
    missing = cpu_attempt().measured(options=options, external=plug(500, begin_s=18))
    assert missing.energy.primary_j.value is None
    assert missing.energy.primary_j.null_reason is not None
    assert missing.energy.primary_j.null_reason.code == "external_short"


def test_a_sensor_that_contains_the_packages_is_not_added_to_them_and_its_own_samples_are_looked_at() -> None:
    sensor = GpuHeader(
        None, "board", "board", "power_meter", energy_scope="machine", power_source="average", meter="hwmon"
    )
    samples = tuple(GpuSample(0, at(place / 10), power_w=450.0) for place in range(350))
    attempt = cpu_attempt(package()).with_header(sensors=(sensor,)).with_log(samples=samples)
    options = {"measurement": {"energy": "hwmon", "external_csv": "plug.csv"}}
    found = attempt.measured(options=options, external=plug(500)).energy
    assert found.cpu_package_energy_j == pytest.approx(1400, rel=0.01)
    assert found.sensor_energy_j == pytest.approx(4500)
    assert (found.energy_source, found.primary_j.value) == ("hwmon_sensor", found.sensor_energy_j)
    assert found.external_energy_j == pytest.approx(5000)
    assert found.sample_gap_max_s == pytest.approx(0.1)


# Quotients


def work(**changes: Any) -> Work:
    return Work(**{"requests_ok": 10, "requests_failed": 0, "input_tok": 500, "output_tok": 1500, "padding_tok": 0,
                   "token_source": "engine_ids", "prompt_source": {}, **changes})  # fmt: skip


def test_energy_per_unit_of_work() -> None:
    found = efficiency_of(Measured(3000.0), work(requests_good=6))
    assert (found.energy_per_output_tok_j, found.energy_per_total_tok_j) == (2.0, 1.5)
    assert (found.energy_per_request_j, found.output_tok_per_j) == (300.0, 0.5)
    assert found.energy_per_good_request_j == 500.0
    assert found.null_reasons == {}


def test_a_zero_denominator_is_null() -> None:
    found = efficiency_of(Measured(3000.0), work(requests_ok=0, input_tok=0, output_tok=0))
    assert found.energy_per_output_tok_j is None
    assert found.energy_per_total_tok_j is None
    assert found.energy_per_request_j is None
    assert found.null_reasons["energy_per_output_tok_j"] == Reason.of("no_work", what="output tokens")
    assert found.output_tok_per_j == 0.0
    none_good = efficiency_of(Measured(3000.0), work(requests_good=0))
    assert none_good.null_reasons == {"energy_per_good_request_j": Reason.of("no_work", what="good requests")}
    without = efficiency_of(Measured(None, LOST), work())
    assert (set(without.null_reasons.values()), len(without.null_reasons)) == ({LOST}, 5)


def carbon(primary_j: float | None, **measurement: float) -> Any:
    loaded: ExperimentConfig = config(measurement=measurement)
    return carbon_of(Measured(primary_j, None if primary_j is not None else LOST), loaded.measurement)


def test_carbon_and_cost_follow_from_the_users_figures() -> None:
    found = carbon(7.2e6, grid_g_per_kwh=300, pue=1.5, price_per_kwh=0.2)
    assert found.co2e_g == pytest.approx(2 * 1.5 * 300)
    assert found.cost == pytest.approx(2 * 1.5 * 0.2)
    assert found.null_reasons == {}


def test_nothing_is_assumed_about_grid_site_or_price() -> None:
    assert carbon(7.2e6, pue=1.5, price_per_kwh=0.2).null_reasons == {
        "grid_g_per_kwh": Reason.of("option_not_given", option="measurement.grid_g_per_kwh"),
        "co2e_g": Reason.of("option_not_given", option="measurement.grid_g_per_kwh"),
    }
    without_site = carbon(7.2e6, grid_g_per_kwh=300)
    assert without_site.co2e_g is None
    assert without_site.null_reasons["co2e_g"].code == "pue_not_given"
    assert carbon(None, grid_g_per_kwh=300, pue=1.5).null_reasons["co2e_g"] == LOST


def test_a_sampler_that_paused_does_not_make_a_counter_stand_still() -> None:
    attempt = gpu_attempt(gaps=[(16.0, 21.0)])
    assert without_still_counters(attempt.log, Span(at(15.0), at(25.0))) == attempt.log


def test_a_counter_that_stands_still_at_the_end_of_the_window_is_not_used() -> None:
    attempt = gpu_attempt()
    frozen = attempt.with_log(counters=tuple(row for row in attempt.log.counters if row.at_ns < at(20.0)))
    settled = dataclasses.replace(frozen, log=without_still_counters(frozen.log, Span(at(15.0), at(25.0))))
    found = settled.measured()
    assert found.energy.energy_source == "power_instant_integral"
    assert found.energy.gpu_energy_j == pytest.approx(3000, rel=0.01)
    assert "counter_frozen" in [warning.code for warning in found.warnings]


@pytest.mark.parametrize(("average_w", "code"), [(300.0, None), (330.0, "power_disputed"), (None, None)])
def test_sampled_power_that_means_over_a_second_dispute_is_null(average_w: float | None, code: str | None) -> None:
    attempt = gpu_attempt(counter=None)
    seconds = tuple(GpuSecond(0, at(second), average_w=average_w) for second in range(35)) if average_w else ()
    found = attempt.with_log(seconds=seconds).measured().energy
    reason = found.null_reasons.get("gpu_energy_j")
    assert (reason and reason.code) == code


def test_one_partial_sensor_alone_is_not_believed() -> None:
    found = gpu_attempt(counter=None).with_gpu_header(average_source="none").measured().energy
    assert found.null_reasons["gpu_energy_j"].code == "power_unconfirmed"


@pytest.mark.parametrize(
    ("uuid_limits_w", "most_w"), [((115.0, 400.0), 400.0), ((0.0, None), None), ((None, 0.0), None)]
)
def test_the_highest_limit_in_force_is_the_limit(
    uuid_limits_w: tuple[float | None, float | None], most_w: float | None
) -> None:
    before_w, within_w = uuid_limits_w
    attempt = gpu_attempt().with_gpu_header(power_limit_w=before_w)
    found = attempt.with_log(seconds=(GpuSecond(0, at(17.0), limit_w=within_w),)).measured()
    assert (found.gpus[0].power_limit_w, found.energy.gpu_energy_j is not None) == (most_w, True)


@pytest.mark.parametrize(
    ("slowed_s", "inside_s"),
    [
        ((0.0, 0.0, 0.02, 0.02), 0.02),  # wholly within the window
        ((0.0, 0.3, 0.3, 0.3), None),  # may have been before it
        ((0.0, 0.8, 0.8, 0.8), 0.3),  # more than fits before it
        ((0.0, 0.0, 0.0, 0.5), None),  # may have been after it
    ],
)
def test_slowdowns_that_were_counted_make_a_window_invalid(slowed_s: tuple[float, ...], inside_s: float | None) -> None:
    times = (14.5, 15.5, 24.5, 25.5)
    seconds = tuple(GpuSecond(0, at(time_s), slowed_s=value) for time_s, value in zip(times, slowed_s, strict=True))
    reasons = gpu_attempt().with_log(seconds=seconds).measured().invalid_reasons
    found = [reason.data["slowed_s"] for reason in reasons if reason.code == "slowdown_counted"]
    assert found == ([] if inside_s is None else [pytest.approx(inside_s)])


# Lag and uncertainty


@pytest.mark.parametrize("period_s", [0.02, 0.1])
@pytest.mark.parametrize("lag_s", [0.0, 0.05, 0.1, 0.2])
def test_the_lag_of_a_counter_is_estimated_and_covers_its_bias(lag_s: float, period_s: float) -> None:
    counter = Counter(period_s=period_s, phase_s=0.037, lag_s=lag_s)
    found = gpu_attempt(counter=counter).measured().energy
    assert found.counter_lag_s == pytest.approx(lag_s, abs=0.002)
    assert found.gpu_energy_j is not None
    assert found.uncertainty_budget_j is not None
    bias_j = abs(found.gpu_energy_j - WINDOW_J)
    assert bias_j < 3**0.5 * found.uncertainty_budget_j["lag"] + 3 * found.uncertainty_budget_j["edges"] + 1
    assert found.uncertainty_budget_j["lag"] == pytest.approx(lag_s * (LOAD_W - IDLE_W) / 3**0.5, abs=0.8)


def test_load_that_begins_slowly_is_not_taken_for_lag() -> None:
    levels = [level if level.at_s != 15.0 else Level(15.0, LOAD_W, 0.25) for level in LEVELS]
    found = gpu_attempt(levels=levels).measured().energy
    assert found.null_reasons["counter_lag_s"].code == "lag_unseen"
    assert found.uncertainty_budget_j is not None
    assert found.uncertainty_budget_j["lag"] == pytest.approx(0.1 * (LOAD_W - IDLE_W) / 3**0.5, rel=0.05)


def test_a_probed_lag_replaces_the_bound_where_the_window_does_not_show_it() -> None:
    levels = [level if level.at_s != 15.0 else Level(15.0, LOAD_W, 0.25) for level in LEVELS]
    attempt = gpu_attempt(levels=levels).with_gpu_header(counter_lag_s=0.06)
    found = attempt.measured().energy
    assert found.counter_lag_s == 0.06
    assert found.uncertainty_budget_j is not None
    assert found.uncertainty_budget_j["lag"] == pytest.approx(0.06 * (LOAD_W - IDLE_W) / 3**0.5, rel=0.05)


def test_the_uncertainty_is_the_root_of_the_squares_of_its_causes() -> None:
    found = gpu_attempt(instant=Sensor(gain=1.1)).measured().energy
    budget_j = found.uncertainty_budget_j
    assert budget_j is not None
    assert set(budget_j) == {"edges", "closing", "sensor", "lag", "crosscheck"}
    assert budget_j["sensor"] == pytest.approx(0.05 * WINDOW_J / 3**0.5, rel=0.01)
    assert budget_j["crosscheck"] == pytest.approx(0.1 * WINDOW_J / 3**0.5, rel=0.05)
    assert found.energy_uncertainty_j == pytest.approx(sum(part_j**2 for part_j in budget_j.values()) ** 0.5)


def test_the_uncertainty_of_a_meter_without_a_known_accuracy_is_unknown() -> None:
    found = cpu_attempt(package(0)).measured().energy
    assert found.null_reasons["energy_uncertainty_j"].code == "accuracy_unknown"
    steady = (
        gpu_attempt().without(*(mark for mark in (names.GUARD_BEFORE, names.GUARD_AFTER))).measured(is_steady_mode=True)
    )
    assert steady.energy.null_reasons["counter_lag_s"].code == "lag_under_load"
    assert "lag" not in (steady.energy.uncertainty_budget_j or {})


def test_the_shortest_slowdown_that_is_seen_is_stated_unless_the_driver_counts_them() -> None:
    (gpu,) = gpu_attempt(gaps=[(17.0, 17.35)]).measured().gpus
    assert gpu.slowdown_min_s == pytest.approx(0.4, abs=0.06)
    (counted,) = gpu_attempt().with_gpu_header(counts_slowdowns=True).measured().gpus
    assert counted.null_reasons["slowdown_min_s"].code == "slowdowns_counted"
