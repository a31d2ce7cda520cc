"""Cycles added until intervals are narrow: when, how many, and how it goes on after an interruption."""

import dataclasses

import pytest

from lem.base.errors import UserError
from lem.config.campaign_config import CampaignDaemonConfig
from lem.orchestration.resume import RunOptions, make_rule, needs_cycle
from lem.orchestration.schedule import Stopped
from lem.results.run import parse_target, read_stopping_rule
from tests.campaign_doubles import ENVIRONMENT, Place, make_campaign
from tests.records import make_record

FOUR, EIGHT = "pytorch-max_output_tokens=4", "pytorch-max_output_tokens=8"

# ±2.1 % with five of them, ±1.6 % with six (t 2.78 and 2.57, over the root of n).
NOISY = [98.3, 101.7, 98.3, 101.7, 100.0, 100.0, 100.0, 100.0]


def _rule(text="ci=2%", max_cycles=None):
    return make_rule(parse_target(text), max_cycles)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    return Place(tmp_path)


def _run(place, campaign, answers=None, *, rule=None, deadline_s=None, resume=None):
    options = RunOptions(until=rule or _rule(), resume=resume)
    return place.runner(campaign, answers, options=options).run(deadline_s=deadline_s)


def _cycles(place):
    return [cycle for _, cycle, _ in place.asked()]


def test_five_cycles_are_run_at_least_and_no_more_where_they_are_enough(place):
    outcome = _run(place, make_campaign(place.folder, execution={"cycles": 2}))
    assert sorted(set(_cycles(place))) == [1, 2, 3, 4, 5]
    assert outcome.stopped is None
    assert outcome.remark == (
        "Top-up: every interval is within ±2 % (output_tok_per_s, 95 % t interval) after 5 cycles"
    )
    assert place.manifest().total_experiments == 10


def test_whole_cycles_are_added_until_every_configuration_is_narrow(place):
    outcome = _run(place, make_campaign(place.folder), {FOUR: list(NOISY)})
    assert place.asked()[10:] == [(FOUR, 6, 1), (EIGHT, 6, 1)]
    manifest = place.manifest()
    assert (manifest.total_experiments, manifest.is_complete) == (12, True)
    assert [entry.order_index for entry in manifest.experiments] == list(range(12))
    assert outcome.remark.endswith("after 6 cycles")
    assert [note["cycles"] for note in manifest.notes] == [6]


def test_the_most_cycles_end_it(place):
    answers = {FOUR: [90.0, 110.0] * 10}
    outcome = _run(place, make_campaign(place.folder), answers, rule=_rule(max_cycles=7))
    assert max(_cycles(place)) == 7
    assert outcome.stopped is None
    assert "7 cycles are the most" in outcome.remark
    assert FOUR in outcome.remark


def test_an_added_cycle_has_the_cycle_gap_before_it(place):
    campaign = make_campaign(place.folder, execution={"cycles": 5, "cycle_gap_seconds": 30})
    _run(place, campaign, {FOUR: list(NOISY)})
    assert [gap["gap"] for gap in place.told("gap")] == ["cycle"] * 5


def test_a_shuffled_campaign_goes_on_in_the_order_a_longer_one_has(place):
    shuffled = {"structure": "shuffled", "cycles": 5}
    _run(place, make_campaign(place.folder, outputs=(4, 8, 16), execution=shuffled), {FOUR: list(NOISY)})
    longer = make_campaign(place.folder, outputs=(4, 8, 16), execution={**shuffled, "cycles": 6})
    order = place.runner(longer).generate_execution_order()
    assert [entry.exp_id for entry in place.manifest().experiments] == [item.exp_id for item in order]


def test_after_the_time_is_up_no_cycle_is_added(place):
    # Ten experiments of ten seconds each: it passes while the last of them runs.
    deadline_s = place.clock.monotonic() + 95
    outcome = _run(place, make_campaign(place.folder), {FOUR: list(NOISY)}, deadline_s=deadline_s)
    assert outcome.stopped is Stopped.DEADLINE
    assert place.manifest().total_experiments == 10


def test_a_resume_keeps_the_cycles_that_were_added_and_ends_as_if_never_interrupted(place):
    campaign = make_campaign(place.folder)
    deadline_s = place.clock.monotonic() + 105  # in the first experiment of the sixth cycle
    first = _run(place, campaign, {FOUR: list(NOISY)}, deadline_s=deadline_s)
    assert first.stopped is Stopped.DEADLINE
    assert place.manifest().total_experiments == 12
    second = _run(place, campaign, {FOUR: [100.0]}, resume=True)
    assert place.asked() == [(EIGHT, 6, 1)]
    assert second.remark.endswith("after 6 cycles")
    assert not any("changed since" in note["text"] for note in place.told("note"))


def test_a_resume_without_the_target_runs_what_was_added_and_adds_nothing(place):
    campaign = make_campaign(place.folder, execution={"cycles": 5})
    _run(place, campaign, {FOUR: list(NOISY)}, deadline_s=place.clock.monotonic() + 105)
    place.runner(campaign, options=RunOptions(resume=True)).run()
    assert place.asked() == [(EIGHT, 6, 1)]
    assert place.manifest().is_complete


def test_a_finished_campaign_is_topped_up_when_it_is_resumed_with_a_target(place):
    campaign = make_campaign(place.folder, execution={"cycles": 5})
    place.runner(campaign, {FOUR: list(NOISY)}).run()
    outcome = _run(place, campaign, {FOUR: [100.0]}, resume=True)
    assert place.asked() == [(FOUR, 6, 1), (EIGHT, 6, 1)]
    assert outcome.remark.endswith("after 6 cycles")


def test_another_environment_is_found_out_before_a_finished_campaign_is_topped_up(place):
    campaign = make_campaign(place.folder, execution={"cycles": 5})
    place.runner(campaign, {FOUR: list(NOISY)}).run()
    before = place.manifest()
    options = RunOptions(until=_rule(), resume=True)
    other = {**ENVIRONMENT, "torch": "9.9.9"}
    with pytest.raises(UserError, match="environment"):
        place.runner(campaign, options=options, environment=other).run()
    assert place.manifest().total_experiments == before.total_experiments


def test_a_configuration_that_never_gives_a_result_does_not_keep_it_going(place):
    outcome = _run(place, make_campaign(place.folder), {EIGHT: ["invalid"]})
    assert max(_cycles(place)) == 5
    assert outcome.remark.endswith(f"; without an interval, and left out: {EIGHT} (no valid result)")


def test_cycles_that_share_a_load_never_have_an_interval_and_end_it():
    records = [make_record(cycle=cycle, load_id="one") for cycle in range(5)]
    is_needed, reason = needs_cycle(records, _rule(), 5)
    assert not is_needed
    assert "no cycle is added" in reason
    assert "share an engine load" in reason


def test_the_rule_lies_beside_the_results(place):
    _run(place, make_campaign(place.folder), rule=_rule("ci=3%:e2e_p50_s", 9))
    folder = place.folder / "results" / "demo" / str(place.manifest().run_id)
    assert read_stopping_rule(folder) == _rule("ci=3%:e2e_p50_s", 9)


def test_a_campaign_without_a_target_leaves_no_rule(place):
    place.runner(make_campaign(place.folder)).run()
    folder = place.folder / "results" / "demo" / str(place.manifest().run_id)
    assert read_stopping_rule(folder) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"execution": {"structure": "grouped"}}, "grouped"),
        ({"execution": {"reuse": "campaign"}}, "intervals"),
        ({"execution": {"cycles": 9}}, "over --max-cycles 8"),
        ({"daemon": CampaignDaemonConfig(enabled=True)}, "daemon"),
    ],
)
def test_what_cannot_be_topped_up_is_refused_before_anything_is_written(place, changes, words):
    with pytest.raises(UserError, match=words):
        _run(place, make_campaign(place.folder, **changes), rule=_rule(max_cycles=8))
    assert not (place.folder / "state").exists()


@pytest.mark.parametrize("most", [0, 4, 21])
def test_the_most_cycles_lie_between_five_and_twenty(most):
    with pytest.raises(UserError, match="5 to 20"):
        make_rule(parse_target("ci=2%"), most)


def test_the_widest_are_named_first_and_many_are_counted():
    records = [
        make_record(config_name=f"c{width}", config_hash=f"{width:016x}", cycle=cycle, output_tok_per_s=rate)
        for width in (3, 9, 5, 7)
        for cycle, rate in enumerate([100.0 - width, 100.0 + width] * 3)
    ]
    is_needed, reason = needs_cycle(records, _rule(), 6)
    assert is_needed
    assert reason.endswith("c9 ±11 %, c7 ±8.4 %, c5 ±5.9 % and 1 more")


def test_energy_is_looked_at_where_every_configuration_has_it():
    records = [make_record(cycle=cycle, energy_per_output_tok_j=0.5) for cycle in range(5)]
    assert "energy_per_output_tok_j" in needs_cycle(records, _rule(), 5)[1]
    without = [*records, *(make_record(config_name="b", config_hash="b" * 16, cycle=cycle) for cycle in range(5))]
    assert "output_tok_per_s" in needs_cycle(without, _rule(), 5)[1]


def test_too_few_valid_cycles_are_wide_even_where_they_agree():
    records = [make_record(cycle=cycle, is_valid=cycle < 4) for cycle in range(5)]
    assert needs_cycle(records, _rule(), 5)[0]


@pytest.mark.parametrize("text", ["2%", "ci=2", "ci=0%", "ci=100%", "ci=2%:nothing", "ci=-1%", ""])
def test_a_target_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=repr(text)):
        parse_target(text)


def test_a_target_may_name_its_metric():
    assert dataclasses.astuple(parse_target("ci=0.5%:ttft_p50_s")) == (0.005, "ttft_p50_s")
