import dataclasses
import re
from pathlib import Path

import pytest

from lem.base.reasons import TEXTS, Reason, formats_of
from lem.config.experiment import PROGRAM
from lem.results.check import INTERFERENCE, check_run
from lem.results.run import make_run
from lem.results.store import Problem
from lem.results.trends import Course
from tests.records import make_record, sentences
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
    return check_run(make_run([change(record) for record in FINE.records()]))


def _gpu(record, **changes):
    return dataclasses.replace(record, gpus=tuple(dataclasses.replace(gpu, **changes) for gpu in record.gpus))


def _section(name, **changes):
    return lambda record: dataclasses.replace(record, **{name: dataclasses.replace(getattr(record, name), **changes)})


def _with(*configurations, **changes):
    return dataclasses.replace(FINE, configurations=configurations, **changes)


WAITED = Reason.of("engine_waited_too_long", share=0.4, causes="100% by other programs", limit=20.0)
BARELY = Reason.of("engine_waited", share=0.06, causes="100% by other programs")


def test_interference_comes_first_in_valid_and_invalid_results_and_names_the_worst() -> None:
    first, second, *rest = FINE.records()
    invalid = _section("validity", valid=False, invalid_reasons=(WAITED, Reason.of("no_output")))(first)
    noted = _section("validity", warnings=(BARELY, Reason.of("foreign_cpu", share=0.3)), steady=False)(second)
    check = check_run(make_run([invalid, noted, *rest]))
    assert [item.kind for item in check].index("interference") == 0
    assert sum(item.kind == "interference" for item in check) == 1
    assert check[0].reason == Reason.of("interfered", count=2, total=len(rest) + 2, worst=WAITED)
    assert set(check[0].configurations) == {first.identity.config_name, second.identity.config_name}
    assert check[0].is_weak
    assert "lem doctor" in check[0].remedy
    assert [item.reason.data["why"].code for item in check if item.kind == "invalid"] == ["no_output"]


@pytest.mark.parametrize("code", INTERFERENCE)
def test_each_interference_is_one_finding_and_no_warning_beside_it(code: str) -> None:
    numbers = {name: 3.5 for name in formats_of(TEXTS[code]) if name != "causes"}
    why = Reason.of(code, **numbers, **({"causes": "a reason"} if "causes" in TEXTS[code] else {}))
    check = _changed(_section("validity", warnings=(why,)))
    assert [item.kind for item in check] == ["interference"]
    assert check[0].remedy == INTERFERENCE[code]


REST_ROSE = Reason.of("rest_power_rose", before_w=90.0, after_w=95.0, change_percent=5.6)


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
        ("baseline_drift", _section("validity", warnings=(REST_ROSE,)), False),
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
        lambda record: record,
        _section("energy", energy_crosscheck_ratio=1.04),
        lambda record: _gpu(record, event_reasons_mask=0x4),
        lambda record: _gpu(record, throttle_power_s=0.01),
        _section("window", window_s=10.0),
        _section("validity", warnings=(Reason.of("crosscheck", ratio=1.08),)),  # a check says it already
    ],
)
def test_what_is_within_its_bounds_is_not_found(change):
    assert _changed(change) == ()


SHORT = dataclasses.replace(VLLM, output_tok_ratio=0.7)
NEAR = dataclasses.replace(VLLM, name="vllm64", batch_size=64, energy_per_output_tok_j=0.203)


@pytest.mark.parametrize(
    ("kind", "is_weak", "campaign", "text", "configurations"),
    [
        (
            "invalid", True, _with(PYTORCH, dataclasses.replace(VLLM, invalid_attempts={0: 1, 3: 2})),
            "3 of 12 results are invalid", ("vllm",),
        ),
        (
            "no_valid_result", True,
            _with(PYTORCH, dataclasses.replace(VLLM, invalid_attempts=dict.fromkeys(range(5), 2))),
            "no valid result at all", ("vllm",),
        ),
        ("output_lengths", True, _with(PYTORCH, SHORT, ignore_eos=False), "free and differ: 89.", ("pytorch", "vllm")),
        ("output_lengths", True, _with(PYTORCH, SHORT), "output lengths differ", ("pytorch", "vllm")),
        ("output_lengths", False, dataclasses.replace(FINE, ignore_eos=False), "came out equal", ("pytorch", "vllm")),
        (
            "not_comparable", True, _with(PYTORCH, dataclasses.replace(VLLM, prompts="b" * 64)),
            "not fully comparable with vllm: other prompts", ("pytorch",),
        ),
        ("drift", True, dataclasses.replace(FINE, drift=0.03), "Energy per output token rises by 3", ()),
        ("same_order", False, dataclasses.replace(FINE, structure="interleaved"), "the same in every cycle", ()),
        ("grouped", True, dataclasses.replace(FINE, structure="grouped"), "all ran before", ("vllm",)),
        ("few_cycles", True, dataclasses.replace(FINE, cycles=1), "one cycle has no interval", ("pytorch", "vllm")),
        ("few_cycles", True, dataclasses.replace(FINE, cycles=2), "13 standard errors", ("pytorch", "vllm")),
        ("wide_interval", True, dataclasses.replace(FINE, load_sd=0.08), "is up to ±", ("pytorch", "vllm")),
        ("too_few_cycles", True, _with(VLLM, NEAR, load_sd=0.01, seed=4), "cycles cannot separate", ("vllm", "vllm64")),
        (
            "indistinguishable", False,
            _with(VLLM, dataclasses.replace(NEAR, energy_per_output_tok_j=0.2), load_sd=0.01),
            "cycles cannot separate", None,
        ),
    ],
)  # fmt: skip
def test_what_weakens_a_campaign_is_found(kind, is_weak, campaign, text, configurations):
    finding = _of(campaign, kind)
    assert finding.is_weak == is_weak
    assert text in finding.text
    assert finding.remedy
    assert configurations is None or set(finding.configurations) == set(configurations)


@pytest.mark.parametrize(
    ("kind", "campaign"),
    [
        ("output_lengths", _with(PYTORCH, dataclasses.replace(VLLM, options={"max_output_tokens": 256}))),
        ("drift", dataclasses.replace(FINE, drift=0.005)),
        ("drift", _with(PYTORCH, cycles=3, load_sd=0.02, seed=3)),  # by chance
        ("too_few_cycles", _with(VLLM, dataclasses.replace(NEAR, energy_per_output_tok_j=0.2), load_sd=0.01)),
    ],
)
def test_what_weakens_nothing_is_not_found(kind, campaign):
    assert kind not in _found(_check(campaign))


def test_heat_that_made_results_invalid_is_found_and_told_once():
    slowed = dataclasses.replace(VLLM, throttled_cycles=(1, 2))
    kinds = _found(_check(dataclasses.replace(FINE, configurations=(PYTORCH, slowed))))
    assert "2 of 12 results" in kinds["throttled"].text
    assert kinds.keys().isdisjoint({"invalid", "unequal_exclusions"})


def test_failed_experiments_are_counted():
    assert _of(FINE, "failed", failed={"vllm": 2}).text == "2 experiments without a complete result"


def test_damaged_results_are_named_and_missing_ones_are_none_of_them():
    problems = [Problem(Path(f"r{number}/result.json"), "corrupt", "no JSON") for number in range(5)]
    text = _of(FINE, "damaged", problems=problems).text
    assert "r0/result.json (corrupt)" in text
    assert text.endswith("and 2 more")
    assert _check(FINE, problems=[Problem(Path("r"), "missing", "")]) == ()


def test_what_to_do_about_runs_of_a_program_names_no_option_of_campaigns():
    def of_program(cycle):
        record = make_record(cycle=cycle)
        window = dataclasses.replace(record.window, window_s=1.0, traffic_mode=PROGRAM)
        validity = dataclasses.replace(
            record.validity,
            steady=False,
            warnings=(Reason.of("rest_power_rose", before_w=1.0, after_w=2.0, change_percent=100.0),),
        )
        identity = dataclasses.replace(record.identity, backend=PROGRAM)
        return dataclasses.replace(record, identity=identity, window=window, validity=validity)

    found = check_run(make_run([of_program(0), of_program(1)], problems=[Problem(Path("r.json"), "corrupt", "torn")]))
    assert {"damaged", "short_window", "baseline_drift", "few_cycles"} <= {item.kind for item in found}
    for item in found:
        assert not re.search(r"execution\.|measurement\.|warmup\.|--fresh|--cycles|campaign|manifest", item.remedy), (
            item
        )


def test_no_result_at_all_is_weak():
    (finding,) = check_run(make_run([], campaign_name="demo", run_id="run"))
    assert (finding.kind, finding.is_weak) == ("no_results", True)


def test_an_environment_that_changed_under_way_is_weak():
    records = [
        _section("environment", fingerprint="other")(record) if record.identity.cycle_index > 2 else record
        for record in FINE.records()
    ]
    assert _found(check_run(make_run(records)))["environment_changed"].is_weak


def test_baselines_that_differ_between_cycles_are_sentences():
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
    records[0] = _section("validity", warnings=sentences("7 of 128 prompts were cut"))(records[0])
    findings = [item for item in check_run(make_run(records)) if item.kind == "warning"]
    assert len(findings) == 1
    assert not findings[0].is_weak


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
    effect = Course(run, run.primary_metric).position_effect
    assert effect is not None
    assert effect.ci_lower is not None
    assert effect.ci_upper is not None
    assert effect.ci_lower < 1.01**3 - 1 < effect.ci_upper
    assert _found(check_run(run))["order_effect"].is_weak
    # In the same order places cannot be separated from configurations.
    same = make_run(dataclasses.replace(FINE, structure="interleaved").records())
    assert Course(same, same.primary_metric).position_effect is None


def test_two_experiments_of_a_cycle_with_one_number_have_places_of_their_own():
    records = _warmer_places(dataclasses.replace(FINE, configurations=FOUR, cycles=8), 0.01)

    def numbered(number_of):
        return make_run([_section("identity", order_index=number_of(it.identity))(it) for it in records])

    def tied(identity):
        return identity.order_index - (identity.order_index % len(FOUR) == 1)

    run = numbered(tied)
    given = [item.config_hash for item in run.with_results]
    apart = numbered(lambda identity: len(FOUR) * tied(identity) + given.index(identity.config_hash))
    effect, expected = (Course(it, it.primary_metric).position_effect for it in (run, apart))
    assert effect is not None
    assert expected is not None
    assert effect.change == pytest.approx(expected.change, rel=1e-9)


def test_without_energy_the_throughput_is_looked_at():
    records = [make_record(cycle=cycle, output_tok_per_s=100.0 + cycle) for cycle in range(5)]
    assert make_run(records).primary_metric.name == "output_tok_per_s"


def test_cycles_that_replayed_their_arrivals_are_named():
    poisson = [_section("window", traffic_mode="poisson")(record) for record in FINE.records()]
    finding = _found(check_run(make_run(poisson)))["replayed"]
    assert (finding.is_weak, finding.configurations) == (True, ("vllm", "pytorch"))
    drawn = [
        _section("work", prompt_source={**item.work.prompt_source, "draw": item.identity.cycle_index})(item)
        for item in poisson
    ]
    assert "replayed" not in _found(check_run(make_run(drawn)))
