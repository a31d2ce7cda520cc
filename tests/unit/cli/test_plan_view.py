import dataclasses
from collections import Counter

import pytest

from lem.cli.campaign import Job, PlannedPower, expected_document, render_findings, render_plan
from lem.orchestration.dispatch import LocalExecutor
from lem.orchestration.executor import ExecutorChoice
from lem.orchestration.grid import GridValidationIssue
from lem.orchestration.plan import ExpectedDurations, build_plan
from lem.results.stats import parse_gates
from tests.campaign_doubles import make_campaign
from tests.command_rig import on_terminal
from tests.records import make_record


@pytest.fixture
def campaign(tmp_path):
    return make_campaign(tmp_path, execution={"config_gap_seconds": 60, "cycle_gap_seconds": 300})


def _left_out(*reasons):
    return tuple(GridValidationIssue(f"c{index}", reason) for index, reason in enumerate(reasons))


def _durations(campaign, known=2, gap_s=None):
    """30 s of measuring and 10 s of loading for as many configurations as are known."""
    found = build_plan(campaign).configurations[:known]
    return ExpectedDurations({it.config_hash: 30.0 for it in found}, {it.engine_key: 10.0 for it in found}, gap_s)


def _render(campaign, durations=None, place="local, python3 (requested)"):
    choice = ExecutorChoice("local", LocalExecutor, lambda: place)
    plan = build_plan(campaign)
    return render_plan(Job(campaign, plan, choice), durations or ExpectedDurations(), PlannedPower.of(plan, []))


def test_findings_are_the_counts_and_each_reason_once_and_many_are_cut_short(campaign):
    plan = dataclasses.replace(
        build_plan(campaign),
        filtered=_left_out("needs float16", "needs float16", "no model"),
        warnings=Counter(f"reason {number}" for number in range(14)),
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
    assert "and 10 more" in lines
    assert lines[-4].startswith("cycle 2: order 40 39 38")
    assert len(lines) < 60


@pytest.mark.parametrize(
    ("execution", "shown"),
    [
        ({"cycles": 1}, []),
        ({"cycles": 3}, ["cycle 2: order 3 2 1", "cycle 3: order 2 3 1"]),
        (
            {"cycles": 4, "structure": "interleaved", "cycle_gap_seconds": 300},
            ["cycles 2 to 4: the same order, after a gap of at most 5m 00s"],
        ),
        (
            {"cycles": 2, "structure": "interleaved", "reuse": "campaign"},
            ["cycle 2: the same order, 0 engine loads"],
        ),
        ({"cycles": 2, "structure": "grouped"}, ["2 cycles: each experiment runs in all of them before the next one."]),
    ],
)
def test_the_plan_shows_one_cycle_and_how_the_others_differ(tmp_path, execution, shown):
    gaps = {"config_gap_seconds": 0, "cycle_gap_seconds": 0}
    lines = _render(make_campaign(tmp_path, outputs=(4, 8, 16), execution={**gaps, **execution})).splitlines()
    first = lines.index("") + 1
    assert lines[first].split() == ["cycle", "1", "backend", "engine", "gap", "before"]
    assert [line.split()[:2] for line in lines[first + 1 : first + 4]] == [
        [str(number), f"pytorch-max_output_tokens={tokens}"] for number, tokens in ((1, 4), (2, 8), (3, 16))
    ]
    assert lines[first + 4 :] == shown


def test_the_plan_numbers_configurations_as_the_results_do(tmp_path):
    campaign = make_campaign(tmp_path, outputs=(4, 8, 16, 32, 64), execution={"cycles": 2, "structure": "shuffled"})
    lines = _render(campaign).splitlines()
    first = lines.index("") + 2
    named = dict(reversed(line.split()[:2]) for line in lines[first : first + 5])
    assert [*named] != sorted(named, key=lambda name: int(name.partition("=")[2]))
    assert named == {f"pytorch-max_output_tokens={tokens}": str(n) for n, tokens in enumerate((4, 8, 16, 32, 64), 1)}


def test_the_plan_is_as_wide_as_the_screen(campaign):
    plan = build_plan(campaign)
    job = Job(campaign, plan, ExecutorChoice("local", LocalExecutor, lambda: "local, " + "a long reason " * 12))
    for width in (60, 80, 100):
        lines = render_plan(job, ExpectedDurations(), PlannedPower.of(plan, []), None, width).splitlines()
        widths = [len(line) for line in lines if not line.startswith("results in:")]  # a path, which is not cut
        assert width - 14 < max(widths) <= width


def _power(campaign, rates=(), gates=()):
    """By earlier results of the first two configurations, where the second one's throughput varies like this."""
    plan = build_plan(campaign)
    first, second = plan.configurations[:2]
    records = [
        make_record(config_name=item.config_name, config_hash=item.config_hash, cycle=cycle, output_tok_per_s=rate)
        for cycle, varying in enumerate(rates)
        for item, rate in ((first, 100.0), (second, varying))
    ]
    return PlannedPower.of(plan, records, parse_gates(gates))


def _cycles(campaign, cycles, **execution):
    return dataclasses.replace(campaign, execution=dataclasses.replace(campaign.execution, cycles=cycles, **execution))


def test_what_a_plan_can_detect_is_assumed_before_there_are_results(campaign):
    power = _power(_cycles(campaign, 5))
    assert power.n_comparisons == 2
    facts = power.facts()
    assert facts == {
        "detects": (
            "1.5 % in energy and throughput, with 80 % power in each of 2 comparisons (Holm); alone 1.2 %, for which 2 "
            "leave 63 % power"
        ),
        "cycles needed": "8 for 1 %, 4 for 2 %, 4 for 3 %, 3 for 5 %",
        "spread": "0.71 % in energy and throughput (assumed: runs 0.5 %)",
    }
    document = power.document()
    assert [item["metric"] for item in document["metrics"]] == ["energy_per_output_tok_j", "output_tok_per_s"]
    assert [item["pairs"] for item in document["metrics"]] == [0, 0]


def test_what_a_plan_can_detect_comes_from_earlier_results_and_names_their_run(campaign):
    power = _power(_cycles(campaign, 5), rates=(150, 152, 149))
    assert [item.metric.name for item in power.metrics] == ["output_tok_per_s"]
    assert power.facts()["spread"] == "1 % in throughput (from 2 pairs of cycles of run 20260714T100000Z-3fa1)"


@pytest.mark.parametrize(
    ("changes", "outputs", "code"),
    [
        ({"cycles": 1}, (4, 8), "one_cycle"),
        ({"reuse": "campaign"}, (4, 8), "no_interval"),
        ({"structure": "grouped"}, (4, 8), "blocks"),
        ({}, (4,), "nothing_to_compare"),
    ],
)
def test_a_plan_that_can_detect_nothing_says_why(tmp_path, changes, outputs, code):
    plan = build_plan(make_campaign(tmp_path, outputs=outputs, execution=changes))
    power = PlannedPower.of(plan, [])
    assert power.reason is not None
    assert power.reason.code == code
    assert power.facts() == {"detects": f"no difference: {power.reason}"}
    assert power.document()["reason"] == power.reason.text


def test_gates_take_the_place_of_the_usual_differences(campaign):
    power = _power(campaign, gates=["energy=3%", "ttft=10%"])
    document = power.document()["metrics"]
    assert [(item["metric"], item["gate"]) for item in document] == [
        ("energy_per_output_tok_j", 0.03),
        ("ttft_p50_s", 0.1),
    ]
    needed = [item["cycles_needed"][0]["cycles"] for item in document]
    assert power.facts()["cycles needed"] == (
        f"{needed[0]} for gate energy=3%, {needed[1]} for gate ttft=10%, if the configurations are equal"
    )
