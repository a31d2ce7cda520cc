"""Interference and holes, judged from scripted readings of the CPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from lem.meters.curve import NotMeasured, Span
from lem.meters.energy import EnergyFindings
from lem.meters.interference import interference_now, shares_in
from lem.meters.samples import CpuUse
from tests.records import codes
from tests.scripted_attempt import Attempt, at, cpu_attempt, gpu_attempt
from tests.unit.meters.test_energy import package

CPUS = 4
OPENED_S, CLOSED_S = 15, 25


def usage(
    *,
    run: float = 2.0,
    wait: float = 0.0,
    foreign: float = 0.0,
    steal: float = 0.0,
    throttled: float = 0.0,
    **known: Any,
) -> tuple[CpuUse, ...]:
    """Readings once a second; each kind of time passes at that rate in the window, and lem's own at 0.01."""
    rows = []
    for second in range(-1, 36):
        inside = min(max(second - OPENED_S, 0), CLOSED_S - OPENED_S)
        used = inside * (run + foreign) + 0.01 * second
        rows.append(
            CpuUse(
                at(second),
                asleep_s=7.0,
                busy_s=100.0 + used,
                idle_s=1000.0 + CPUS * second - used - inside * steal,
                steal_s=inside * steal,
                own_s=inside * run + 0.01 * second,
                run_s=inside * run,
                wait_s=inside * wait,
                throttled_s=inside * throttled,
                stopped_s=0.0,
            )
        )
    return tuple(dataclasses.replace(row, **known) for row in rows)


def measured(rows: Sequence[CpuUse], attempt: Attempt | None = None, **measurement: Any) -> EnergyFindings:
    with_usage = (attempt or gpu_attempt()).with_log(usage=tuple(rows))
    return with_usage.measured(options={"measurement": measurement} if measurement else None)


def test_a_quiet_window_is_valid_without_a_warning() -> None:
    found = measured(usage())
    assert (found.invalid_reasons, found.warnings) == ((), ())
    quiet = found.interference
    assert (quiet.wait_ratio, quiet.wait_by_others_ratio, quiet.foreign_ratio, quiet.steal_ratio) == (0, 0, 0, 0)
    assert (quiet.throttled_s, quiet.stopped_s, quiet.suspended_s) == (0, 0, 0)
    assert not quiet.null_reasons


@pytest.mark.parametrize(
    ("rates", "ratio", "cause"),
    [
        ({"wait": 2.0, "foreign": 2.0}, 0.5, "100% by other programs"),
        # One CPU of four that others use delays each of the two threads in its queue.
        ({"run": 3.0, "wait": 5.0, "foreign": 1.0}, 0.625, "60% by threads of its own, 40% by other programs"),
        ({"throttled": 2.0}, 0.5, "100% by a CPU limit (cgroup)"),
        # A kernel that counts the time under a limit as delay, too: it is the same time.
        ({"wait": 2.0, "throttled": 2.0}, 0.5, "100% by a CPU limit (cgroup)"),
        ({"steal": 2.0}, 0.5, "100% by the hypervisor (steal)"),
    ],
)
def test_an_engine_that_waits_for_a_cpu_is_invalid_with_the_cause(
    rates: dict[str, float], ratio: float, cause: str
) -> None:
    found = measured(usage(**rates))
    assert codes(found.invalid_reasons) == ["engine_waited_too_long"]
    assert found.interference.wait_ratio == pytest.approx(ratio, rel=0.01)
    assert found.invalid_reasons[0].data["causes"] == cause
    assert codes(measured(usage(**rates), max_wait_pct=None).warnings)[0] == "engine_waited"
    assert measured(usage(**rates), max_wait_pct=None).invalid_reasons == ()


@pytest.mark.parametrize(
    ("wait", "foreign", "invalid", "warnings"),
    [
        (0.08, 0.08, [], []),  # 4 %
        (0.16, 0.16, [], ["engine_waited", "foreign_cpu"]),  # 7 %
        (0.49, 0.49, [], ["engine_waited", "foreign_cpu"]),  # 19.7 %
        (0.52, 0.52, ["engine_waited_too_long"], ["foreign_cpu"]),  # 20.6 %
    ],
)
def test_from_5_percent_on_it_is_a_warning_and_above_20_invalid(
    wait: float, foreign: float, invalid: list[str], warnings: list[str]
) -> None:
    found = measured(usage(wait=wait, foreign=foreign))
    assert (codes(found.invalid_reasons), codes(found.warnings)) == (invalid, warnings)


def test_threads_that_wait_for_each_other_are_a_warning() -> None:
    found = measured(usage(run=4.0, wait=4.0))
    assert (found.invalid_reasons, codes(found.warnings)) == ((), ["threads_compete"])
    assert found.interference.wait_ratio == pytest.approx(0.5)
    assert found.interference.wait_by_others_ratio == 0.0


def test_an_engine_that_hardly_uses_the_cpu_is_not_judged_by_a_moment_of_waiting() -> None:
    found = measured(usage(run=0.005, wait=0.015, foreign=0.015))  # on a GPU: three quarters of nothing
    assert (found.interference.wait_ratio, found.interference.foreign_ratio) == (0.0, 0.0)
    assert (found.invalid_reasons, found.warnings) == ((), ())


@pytest.mark.parametrize(("foreign", "energy_j"), [(0.2, 1400.0), (0.52, None)])
def test_energy_of_the_cpu_is_null_where_others_used_a_fifth_of_it(foreign: float, energy_j: float | None) -> None:
    found = measured(usage(foreign=foreign), cpu_attempt(package()))
    assert codes(found.warnings)[0] == "foreign_cpu"
    assert found.invalid_reasons == ()
    if energy_j is None:
        assert found.energy.cpu_package_energy_j is None
        assert found.energy.why_none("cpu_package_energy_j").code == "foreign_cpu_energy"
        assert found.energy.primary_j.value is None
        again = measured(usage(foreign=foreign), cpu_attempt(package()), max_foreign_pct=None)
        assert again.energy.cpu_package_energy_j == pytest.approx(1400.0, rel=0.01)
    else:
        assert found.energy.cpu_package_energy_j == pytest.approx(energy_j, rel=0.01)


def test_others_on_the_cpu_leave_the_energy_of_a_gpu_alone() -> None:
    found = measured(usage(foreign=0.6), gpu_attempt(zones=[package()]))
    assert found.energy.gpu_energy_j == pytest.approx(3000.0, rel=0.01)
    assert found.energy.why_none("cpu_package_energy_j").code == "foreign_cpu_energy"


# Holes


def later(rows: Sequence[CpuUse], second: float, **more_s: float) -> tuple[CpuUse, ...]:
    """The readings with counters that are this much higher from a second on."""
    return tuple(
        dataclasses.replace(row, **{name: getattr(row, name) + add_s for name, add_s in more_s.items()})
        if row.at_ns >= at(second)
        else row
        for row in rows
    )


@pytest.mark.parametrize(
    ("second", "invalid"), [(14, []), (15.5, ["engine_stopped"]), (20, ["engine_stopped"]), (27, [])]
)
def test_an_engine_that_was_stopped_in_the_window_makes_it_invalid(second: float, invalid: list[str]) -> None:
    assert codes(measured(later(usage(), second, stopped_s=0.25)).invalid_reasons) == invalid


@pytest.mark.parametrize(
    ("second", "invalid"), [(14, []), (20, ["host_suspended"]), (24.5, ["host_suspended"]), (27, [])]
)
def test_a_machine_that_was_suspended_in_the_window_makes_it_invalid(second: float, invalid: list[str]) -> None:
    found = measured(later(usage(), second, asleep_s=30.0))
    assert codes(found.invalid_reasons) == invalid
    assert found.interference.suspended_s == (30.0 if invalid else 0.0)


@pytest.mark.parametrize(("from_s", "to_s", "invalid"), [(17, 19, []), (16, 21, ["engine_starved"])])
def test_an_engine_that_was_ready_and_got_no_cpu_for_seconds_makes_the_window_invalid(
    from_s: int, to_s: int, invalid: list[str]
) -> None:
    rows, lost_s = [], 0.0
    for before, row in zip([usage()[0], *usage()], usage(), strict=False):
        if at(from_s) < row.at_ns <= at(to_s):
            lost_s += (row.run_s or 0.0) - (before.run_s or 0.0)
        # The kernel counts the delay once the thread runs again.
        waited_s = to_s - from_s if row.at_ns > at(to_s) else 0.0
        rows.append(dataclasses.replace(row, run_s=(row.run_s or 0.0) - lost_s, wait_s=waited_s))
    assert codes(measured(rows, max_wait_pct=None).invalid_reasons) == invalid


def test_an_engine_that_waits_for_its_gpu_or_for_requests_is_no_hole() -> None:
    assert measured(usage(run=0.0)).invalid_reasons == ()


@pytest.mark.parametrize(
    ("gap", "invalid"),
    [
        ((19.0, 19.9), []),
        ((19.0, 21.5), ["sampler_starved"]),
        ((24.0, 26.5), ["sampler_starved"]),
        ((13.0, 15.5), ["sampler_starved"]),
        ((11.0, 14.5), []),
    ],
)
def test_a_sampler_that_stood_still_in_the_window_or_at_its_edge_makes_it_invalid(
    gap: tuple[float, float], invalid: list[str]
) -> None:
    assert codes(gpu_attempt(gaps=[gap]).measured().invalid_reasons) == invalid


@pytest.mark.parametrize(
    ("missing", "invalid"), [((21, 22), []), ((21, 24), ["sampler_starved"]), ((24, 28), ["sampler_starved"])]
)
def test_a_sampler_of_the_cpu_may_miss_two_of_its_seconds(missing: tuple[int, int], invalid: list[str]) -> None:
    attempt, (from_s, to_s) = cpu_attempt(package()), missing
    log = attempt.log
    kept = {
        name: tuple(row for row in rows if not at(from_s) <= row.at_ns <= at(to_s))
        for name, rows in (("rapl", log.rapl), ("loads", log.loads), ("usage", usage()))
    }
    assert codes(attempt.with_log(**kept).measured().invalid_reasons) == invalid


# What is not known


def test_an_engine_that_is_not_visible_is_absent_with_the_reason() -> None:
    unseen: dict[str, Any] = dict.fromkeys(("own_s", "run_s", "wait_s", "throttled_s", "stopped_s"))
    found = measured(usage(foreign=2.0, **unseen)).interference
    assert found.wait_ratio is found.foreign_ratio is found.stopped_s is None
    assert {why.code for why in found.null_reasons.values()} == {"engine_not_watched"}
    assert found.suspended_s == 0.0


def test_a_kernel_that_does_not_count_waiting_is_the_reason() -> None:
    found = measured(usage(foreign=2.0, run_s=None, wait_s=None)).interference
    assert found.why_none("wait_ratio").code == "threads_not_read"
    assert found.foreign_ratio == pytest.approx(0.5, rel=0.01)


def test_a_log_of_an_older_version_has_no_figures_and_no_findings() -> None:
    found = gpu_attempt().measured()
    assert found.interference.why_none("wait_ratio").code == "usage_not_read"
    assert found.interference.sampler_pause_max_s is not None
    assert (found.invalid_reasons, found.warnings) == ((), ())


def test_a_single_reading_does_not_say_that_nothing_was_used() -> None:
    (row,) = [row for row in usage() if row.at_ns == at(20)]
    with pytest.raises(NotMeasured) as caught:
        shares_in([row], Span(at(19), at(21)))
    assert caught.value.reason.code == "usage_not_read"


def test_the_live_line_gets_what_the_last_two_readings_show() -> None:
    rows = usage(wait=1.0, foreign=1.0)
    now = interference_now([row for row in rows if at(18) <= row.at_ns <= at(19)])
    assert now == {"wait_pct": pytest.approx(33.3, rel=0.01), "foreign_pct": pytest.approx(33.3, rel=0.01)}
    assert interference_now(rows[:1]) == {"wait_pct": None, "foreign_pct": None}
