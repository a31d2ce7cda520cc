"""What weakens a campaign, found where it is and not where it is not."""

import dataclasses
from pathlib import Path

import pytest

from lem.base.reasons import Reason
from lem.results.check import check_run, position_effect
from lem.results.run import make_run
from lem.results.store import Problem, StoppingRule, Target
from tests.records import make_record, told
from tests.synthetic_campaign import Campaign, Configuration

PYTORCH = Configuration("pytorch", backend="pytorch", energy_per_output_tok_j=0.5, output_tok_per_s=900)
VLLM = Configuration("vllm", energy_per_output_tok_j=0.2)
FINE = Campaign(configurations=(PYTORCH, VLLM), load_sd=0.002, run_sd=0.001, structure="shuffled")


def _check(campaign, **more):
    return check_run(make_run(campaign.records(), **more))


def _found(check):
    return {item.kind: item for item in check}


def _of(campaign, kind, **more):
    """The finding of a kind; fails where there is none."""
    return _found(_check(campaign, **more))[kind]


def _changed(change):
    """The fine campaign with every record changed."""
    return check_run(make_run([change(record) for record in FINE.records()]))


def _gpu(record, **changes):
    return dataclasses.replace(record, gpus=tuple(dataclasses.replace(gpu, **changes) for gpu in record.gpus))


def _section(name, **changes):
    return lambda record: dataclasses.replace(record, **{name: dataclasses.replace(getattr(record, name), **changes)})


def test_in_a_campaign_without_a_fault_nothing_is_found():
    check = _check(FINE)
    assert check == ()
    assert not any(item.is_weak for item in check)


@pytest.mark.parametrize(
    ("kind", "change", "is_weak"),
    [
        ("unsteady", _section("validity", steady=False), True),
        ("warmup", _section("validity", warmup_converged=False), True),
        ("short_window", _section("window", window_s=5.0), False),
        ("short_window", _section("energy", counter_update_period_s=0.5), False),
        ("failed_requests", _section("work", requests_failed=1), False),
        ("gap_too_short", _section("window", gap_end_reason=Reason.of("gap_cap_reached")), False),
        ("foreign_processes", _section("environment", other_gpu_processes=("4711 python",)), True),
        ("crosscheck", _section("energy", energy_crosscheck_ratio=1.06), True),
        ("crosscheck", _section("energy", energy_crosscheck_ratio=0.94), True),
        ("baseline_drift", _section("idle", idle_loaded_power_w=90.0, idle_loaded_post_power_w=95.0), False),
        ("estimate", _section("energy", energy_source="tdp_estimate", cpu_package_energy_j=5.0), True),
        ("integrated_power", _section("energy", energy_source="power_instant_integral"), False),
        ("throttled", lambda record: _gpu(record, throttle_thermal_s=0.5), True),
        ("throttled", lambda record: _gpu(record, event_reasons_mask=0x40), True),
        ("power_capped", lambda record: _gpu(record, throttle_power_s=3.0), False),
        ("shared_loads", _section("validity", engine_load_id="one"), True),
    ],
)
def test_each_fault_of_all_results_is_found_alone_with_what_to_do(kind, change, is_weak):
    check = _changed(change)
    assert [item.kind for item in check] == [kind]
    assert check[0].is_weak == is_weak
    assert check[0].remedy


@pytest.mark.parametrize(
    "change",
    [
        _section("energy", energy_crosscheck_ratio=1.04),
        _section("idle", idle_loaded_power_w=90.0, idle_loaded_post_power_w=93.0),
        lambda record: _gpu(record, event_reasons_mask=0x4),
        lambda record: _gpu(record, throttle_power_s=0.01),
        _section("window", window_s=10.0),
    ],
)
def test_what_is_within_its_bounds_is_not_found(change):
    assert _changed(change) == ()


def test_a_finding_says_how_many_results_it_concerns_and_of_whom():
    records = FINE.records()
    hit = [
        _section("validity", steady=False)(record) if record.identity.config_name == "vllm" and number < 4 else record
        for number, record in enumerate(records)
    ]
    expected = sum(record.validity.steady is False for record in hit)
    (finding,) = check_run(make_run(hit))
    assert finding.configurations == ("vllm",)
    assert f"in {expected} of 5 results" in finding.text


def test_heat_that_made_results_invalid_is_found_and_told_once():
    slowed = dataclasses.replace(VLLM, throttled_cycles=(1, 2))
    kinds = _found(_check(dataclasses.replace(FINE, configurations=(PYTORCH, slowed))))
    assert "2 of 12 results" in kinds["throttled"].text
    assert kinds["unequal_exclusions"].is_weak
    assert "invalid" not in kinds


def test_invalid_results_are_told_by_their_reason():
    invalid = dataclasses.replace(VLLM, invalid_attempts={0: 1, 3: 2})
    kinds = _found(_check(dataclasses.replace(FINE, configurations=(PYTORCH, invalid))))
    assert kinds["invalid"].configurations == ("vllm",)
    assert kinds["unequal_exclusions"].is_weak


def test_one_without_a_valid_result_is_named():
    nothing = dataclasses.replace(VLLM, invalid_attempts=dict.fromkeys(range(5), 2))
    finding = _of(dataclasses.replace(FINE, configurations=(PYTORCH, nothing)), "no_valid_result")
    assert finding.configurations == ("vllm",)


def test_failed_experiments_are_counted():
    assert _of(FINE, "failed", failed={"vllm": 2}).text == "2 experiments without a complete result"


def test_damaged_results_are_named_and_missing_ones_are_none_of_them():
    problems = [Problem(Path(f"r{number}/result.json"), "corrupt", "no JSON") for number in range(5)]
    text = _of(FINE, "damaged", problems=problems).text
    assert "r0/result.json (corrupt)" in text
    assert text.endswith("and 2 more")
    assert _check(FINE, problems=[Problem(Path("r"), "missing", "")]) == ()


def test_no_result_at_all_is_weak():
    check = check_run(make_run([], campaign_name="demo", run_id="run"))
    assert [item.kind for item in check] == ["no_results"]
    assert check[0].is_weak


# --- work


def test_free_lengths_that_differ_are_weak():
    short = dataclasses.replace(VLLM, output_tok_ratio=0.7)
    free = dataclasses.replace(FINE, configurations=(PYTORCH, short), ignore_eos=False)
    finding = _of(free, "output_lengths")
    assert finding.is_weak
    assert "free and differ: 89." in finding.text
    assert "ignore_eos: true" in finding.remedy


def test_free_lengths_that_came_out_alike_are_a_note():
    assert not _of(dataclasses.replace(FINE, ignore_eos=False), "output_lengths").is_weak


def test_bound_lengths_that_differ_are_weak_too():
    short = dataclasses.replace(VLLM, output_tok_ratio=0.7)
    finding = _of(dataclasses.replace(FINE, configurations=(PYTORCH, short)), "output_lengths")
    assert finding.is_weak
    assert "log.txt" in finding.remedy


def test_lengths_that_are_an_axis_of_the_grid_may_differ():
    longer = dataclasses.replace(VLLM, options={"max_output_tokens": 256})
    assert "output_lengths" not in _found(_check(dataclasses.replace(FINE, configurations=(PYTORCH, longer))))


def test_other_prompts_are_not_comparable():
    other = dataclasses.replace(VLLM, prompts="b" * 64)
    finding = _of(dataclasses.replace(FINE, configurations=(PYTORCH, other)), "not_comparable")
    assert finding.is_weak
    assert "other prompts" in finding.text


def test_an_environment_that_changed_under_way_is_weak():
    records = [
        _section("environment", fingerprint="other")(record) if record.identity.cycle_index > 2 else record
        for record in FINE.records()
    ]
    assert _found(check_run(make_run(records)))["environment_changed"].is_weak


def test_baselines_that_differ_between_cycles_are_told():
    records = [
        _section("idle", idle_loaded_power_w=90.0 + 3 * record.identity.cycle_index, idle_loaded_post_power_w=None)(
            record
        )
        if record.identity.config_name == "vllm"
        else record
        for record in FINE.records()
    ]
    finding = _found(check_run(make_run(records)))["baselines_apart"]
    assert finding.configurations == ("vllm",)
    assert "13 %" in finding.text


def test_warnings_of_results_are_passed_on_once_however_their_numbers_differ():
    warned = dataclasses.replace(VLLM, warnings=("3 of 128 prompts were cut",))
    records = dataclasses.replace(FINE, configurations=(PYTORCH, warned)).records()
    records[0] = _section("validity", warnings=told("7 of 128 prompts were cut"))(records[0])
    findings = [item for item in check_run(make_run(records)) if item.kind == "warning"]
    assert len(findings) == 1
    assert not findings[0].is_weak


def test_a_warning_that_a_check_tells_already_is_not_told_again():
    records = [
        _section("validity", warnings=(Reason.of("crosscheck", ratio=1.08),))(record) for record in FINE.records()
    ]
    assert check_run(make_run(records)) == ()


# --- the campaign as a whole


def test_a_drift_is_found_with_its_size():
    finding = _of(dataclasses.replace(FINE, drift=0.03), "drift")
    assert finding.is_weak
    assert "Energy per output token rises by 3" in finding.text


def test_a_drift_that_chance_could_make_is_a_note():
    noisy = dataclasses.replace(FINE, configurations=(PYTORCH,), cycles=3, load_sd=0.02, seed=3)
    finding = _of(noisy, "drift")
    assert not finding.is_weak
    assert "chance" in finding.text


def test_less_than_one_percent_of_drift_is_not_found():
    assert "drift" not in _found(_check(dataclasses.replace(FINE, drift=0.005)))


def test_the_same_order_in_every_cycle_is_a_note_and_blocks_are_weak():
    assert not _of(dataclasses.replace(FINE, structure="interleaved"), "same_order").is_weak
    assert _of(dataclasses.replace(FINE, structure="grouped"), "grouped").is_weak


def _warmer_places(campaign, a_place):
    """The records of a campaign in which each place of a cycle costs more energy than the one before it."""
    n = len(campaign.configurations)
    out = []
    for record in campaign.records():
        place = record.identity.order_index % n
        joules = record.efficiency.energy_per_output_tok_j * (1 + a_place) ** place
        out.append(_section("efficiency", energy_per_output_tok_j=joules)(record))
    return out


FOUR = tuple(dataclasses.replace(VLLM, name=f"c{size}", batch_size=size) for size in (8, 16, 32, 64))


def test_what_the_place_within_a_cycle_costs_is_found_in_a_shuffled_campaign():
    campaign = dataclasses.replace(FINE, configurations=FOUR, cycles=8)
    run = make_run(_warmer_places(campaign, 0.01))
    effect = position_effect(run, run.primary_metric)
    assert effect is not None
    assert effect.ci_lower is not None
    assert effect.ci_upper is not None
    assert effect.ci_lower < 1.01**3 - 1 < effect.ci_upper
    assert effect.is_significant
    assert _found(check_run(make_run(_warmer_places(campaign, 0.01))))["order_effect"].is_weak


def test_in_the_same_order_places_cannot_be_told_from_configurations():
    run = make_run(dataclasses.replace(FINE, structure="interleaved").records())
    assert position_effect(run, run.primary_metric) is None


@pytest.mark.parametrize(("cycles", "words"), [(1, "one cycle has no interval"), (2, "13 standard errors")])
def test_fewer_than_three_cycles_are_weak(cycles, words):
    finding = _of(dataclasses.replace(FINE, cycles=cycles), "few_cycles")
    assert finding.is_weak
    assert words in finding.text


def test_a_wide_interval_is_weak():
    wide = dataclasses.replace(FINE, load_sd=0.08)
    assert _of(wide, "wide_interval").is_weak


def test_a_difference_that_some_more_cycles_would_tell_is_weak_and_says_how_many():
    close = dataclasses.replace(VLLM, name="vllm64", batch_size=64, energy_per_output_tok_j=0.203)
    campaign = dataclasses.replace(FINE, configurations=(VLLM, close), load_sd=0.01, seed=4)
    finding = _of(campaign, "too_few_cycles")
    assert finding.is_weak
    assert finding.configurations == ("vllm", "vllm64")
    assert "--resume --cycles" in finding.remedy


def test_a_difference_that_no_campaign_would_tell_is_a_note():
    same = dataclasses.replace(VLLM, name="vllm64", batch_size=64)
    campaign = dataclasses.replace(FINE, configurations=(VLLM, same), load_sd=0.01)
    kinds = _found(_check(campaign))
    assert not kinds["indistinguishable"].is_weak
    assert "too_few_cycles" not in kinds


def test_without_energy_the_throughput_is_looked_at():
    records = [make_record(cycle=cycle, output_tok_per_s=100.0 + cycle) for cycle in range(5)]
    assert make_run(records).primary_metric.name == "output_tok_per_s"


def test_added_cycles_are_told():
    finding = _of(FINE, "stopping", stopping=StoppingRule(Target(0.02), 5, 20))
    assert not finding.is_weak
    assert "do not account" in finding.text


def test_weak_findings_come_first():
    campaign = dataclasses.replace(FINE, drift=0.03, structure="interleaved")
    weak = [item.is_weak for item in _check(campaign)]
    assert weak == sorted(weak, reverse=True)
    assert len(set(weak)) == 2
