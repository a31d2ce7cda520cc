"""The plan as it is shown before a run."""

import dataclasses

import pytest

from lem.cli.campaign import expected_document, render_findings, render_plan
from lem.cli.campaign_run import Job
from lem.orchestration.dispatch import LocalExecutor
from lem.orchestration.executor import ExecutorChoice
from lem.orchestration.grid import GridValidationIssue
from lem.orchestration.plan import ExpectedDurations, build_plan
from tests.campaign_doubles import make_campaign


@pytest.fixture
def campaign(tmp_path):
    return make_campaign(tmp_path, execution={"config_gap_seconds": 60, "cycle_gap_seconds": 300})


def _issues(*reasons, severity="warning"):
    return tuple(GridValidationIssue(f"c{index}", reason, severity) for index, reason in enumerate(reasons))


def _job(campaign, place="python3"):
    return Job(
        campaign, build_plan(campaign), ExecutorChoice("local", LocalExecutor, lambda: f"local, {place} (requested)")
    )


def _render(campaign, measured=None, loads=None, gap=None, place="python3"):
    job = _job(campaign, place)
    plan = job.plan
    prices = ExpectedDurations(
        dict.fromkeys((item.config_hash for item in plan.configurations), measured) if measured else {},
        dict.fromkeys((item.engine_key for item in plan.configurations), loads) if loads else {},
        gap,
    )
    return render_plan(job, prices)


def test_findings_are_the_counts_and_each_reason_once(campaign):
    plan = dataclasses.replace(
        build_plan(campaign),
        filtered=_issues("needs float16", "needs float16", "no model", severity="error"),
        warnings=_issues("static cache"),
        total_generated=5,
    )
    assert render_findings(plan).splitlines() == [
        "Generated 5 experiments (3 filtered, 1 warnings)",
        "filtered: needs float16 × 2",
        "filtered: no model",
        "warning: static cache",
    ]


def test_many_reasons_are_cut_short(campaign):
    plan = dataclasses.replace(build_plan(campaign), warnings=_issues(*(f"reason {n}" for n in range(14))))
    lines = render_findings(plan).splitlines()
    assert len(lines) == 1 + 10 + 1
    assert lines[-1] == "warning: and 4 more reasons"


def test_labels_are_coloured_where_colour_is_wanted(campaign):
    plan = dataclasses.replace(build_plan(campaign), warnings=_issues("static cache"))
    assert "\x1b[33mwarning:\x1b[0m static cache" in render_findings(plan, is_colour=True)
    assert "\x1b" not in render_findings(plan)


def test_the_plan_shows_order_loads_and_gaps(campaign):
    lines = _render(campaign).splitlines()
    assert lines[:4] == [
        "campaign:      demo (fe01ce2a)",
        "experiments:   2 configurations × 2 cycles = 4",
        "order:         interleaved",
        "engine loads:  2 (reuse: cycle)",
    ]
    assert [line.split()[1:] for line in lines[-4:]] == [
        ["1", "pytorch", "load", "–"],
        ["1", "pytorch", "reuse", "1m", "00s"],
        ["2", "pytorch", "load", "5m", "00s"],
        ["2", "pytorch", "reuse", "1m", "00s"],
    ]


def test_the_time_is_unknown_before_anything_ran(campaign):
    assert "expected time: unknown before the first run; gaps at most 7m 00s" in _render(campaign)


def test_without_gaps_none_are_mentioned(tmp_path):
    assert "unknown before the first run; no gaps" in _render(make_campaign(tmp_path))


def test_the_time_comes_from_earlier_results(campaign):
    text = " ".join(_render(campaign, measured=30.0, loads=10.0).split())
    assert "about 9m 20s (measuring 2m 00s, loading 20.0 s, gaps at most 7m 00s)" in text


def test_gaps_are_priced_as_they_were_before(campaign):
    text = " ".join(_render(campaign, measured=30.0, loads=10.0, gap=15.0).split())
    assert "about 3m 05s (measuring 2m 00s, loading 20.0 s, gaps 45.0 s, at most 7m 00s)" in text


def test_the_expected_time_is_a_document_too(campaign):
    plan = build_plan(campaign)
    assert expected_document(plan, ExpectedDurations(gap_s=15.0)) == {
        "total": None,
        "measuring": None,
        "loading": None,
        "gaps": 45.0,
        "gaps_at_most": 420.0,
        "is_complete": False,
    }


def test_a_time_that_is_partly_guessed_says_so(campaign):
    plan = build_plan(campaign)
    first = plan.configurations[0]
    text = render_plan(_job(campaign), ExpectedDurations({first.config_hash: 30.0}, {first.engine_key: 10.0}))
    assert "partly estimated from other configurations" in " ".join(text.split())


def test_a_long_order_is_cut_short(tmp_path):
    lines = _render(make_campaign(tmp_path, outputs=range(1, 41), execution={"cycles": 3})).splitlines()
    assert lines[-1] == "and 90 more"
    assert len(lines) < 60


def test_long_places_are_wrapped_and_every_line_fits(campaign):
    lines = _render(campaign, place="/a/rather/long/path" * 3 + " and a reason that is long, too").splitlines()
    wrapped = lines.index(next(line for line in lines if line.startswith("runs on:")))
    assert lines[wrapped + 1].startswith(" " * 15)
    assert max(len(line) for line in lines if not line.startswith("results in:")) <= 80
