import dataclasses

import pytest

from lem.cli.campaign import expected_document, render_findings, render_plan
from lem.cli.campaign_run import Job
from lem.orchestration.dispatch import LocalExecutor
from lem.orchestration.executor import ExecutorChoice
from lem.orchestration.grid import GridValidationIssue
from lem.orchestration.plan import ExpectedDurations, build_plan
from tests.campaign_doubles import make_campaign
from tests.command_rig import on_terminal


@pytest.fixture
def campaign(tmp_path):
    return make_campaign(tmp_path, execution={"config_gap_seconds": 60, "cycle_gap_seconds": 300})


def _issues(*reasons, severity="warning"):
    return tuple(GridValidationIssue(f"c{index}", reason, severity) for index, reason in enumerate(reasons))


def _durations(campaign, known=2, gap_s=None):
    """30 s of measuring and 10 s of loading for as many configurations as are known."""
    found = build_plan(campaign).configurations[:known]
    return ExpectedDurations({it.config_hash: 30.0 for it in found}, {it.engine_key: 10.0 for it in found}, gap_s)


def _render(campaign, durations=None, place="local, python3 (requested)"):
    choice = ExecutorChoice("local", LocalExecutor, lambda: place)
    return render_plan(Job(campaign, build_plan(campaign), choice), durations or ExpectedDurations())


def test_findings_are_the_counts_and_each_reason_once_and_many_are_cut_short(campaign):
    plan = dataclasses.replace(
        build_plan(campaign),
        filtered=_issues("needs float16", "needs float16", "no model", severity="error"),
        warnings=_issues(*(f"reason {number}" for number in range(14))),
        total_generated=5,
    )
    lines = render_findings(plan).splitlines()
    assert lines[:3] == [
        "Generated 5 experiments (3 filtered, 14 warnings)",
        "filtered: needs float16 × 2",
        "filtered: no model",
    ]
    assert lines[3:] == [*(f"warning: reason {number}" for number in range(10)), "warning: and 4 more reasons"]
    assert "\x1b[33mwarning:\x1b[0m reason 1" in on_terminal(render_findings(plan, is_colour=True))


@pytest.mark.parametrize(
    ("known", "gap_s", "shown"),
    [
        (0, None, "expected time: unknown before the first run; gaps at most 7m 00s"),
        (2, None, "about 9m 20s (measuring 2m 00s, loading 20.0 s, gaps at most 7m 00s)"),
        (2, 15.0, "about 3m 05s (measuring 2m 00s, loading 20.0 s, gaps 45.0 s, at most 7m 00s)"),
        (1, None, "partly estimated from other configurations"),
    ],
)
def test_the_time_comes_from_earlier_results(campaign, known, gap_s, shown):
    assert shown in " ".join(_render(campaign, _durations(campaign, known, gap_s)).split())


def test_the_expected_time_is_a_document_too(campaign):
    document = expected_document(build_plan(campaign), ExpectedDurations(gap_s=15.0))
    times = {"total": None, "measuring": None, "loading": None, "gaps": 45.0, "gaps_at_most": 420.0}
    assert document == {**times, "is_complete": False}


def test_a_long_order_is_cut_short(tmp_path):
    lines = _render(make_campaign(tmp_path, outputs=range(1, 41), execution={"cycles": 3})).splitlines()
    assert lines[-1] == "and 90 more"
    assert len(lines) < 60
