from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytest

from lem.base.errors import ExitCode, UserError
from lem.base.reasons import Reason
from lem.record import Identity, Record
from lem.results.compare import Anchor, Comparison, Row, compare_configurations, compare_runs, gate_code
from lem.results.comparison import comparison_document, render_text
from lem.results.metrics import parse_metric
from lem.results.run import NO_INTERVAL, Run, make_run
from lem.results.stats import Effect, Verdict, holm, parse_gate
from tests.needs import Late
from tests.synthetic_campaign import Campaign, Configuration

stats: Any = Late("scipy.stats")

ENERGY = parse_metric("energy")
THROUGHPUT = parse_metric("throughput")
GATE = parse_gate("energy=3%")

SLOW = Configuration("pytorch", backend="pytorch", energy_per_output_tok_j=0.5, output_tok_per_s=900)
FAST = Configuration("vllm", energy_per_output_tok_j=0.2, output_tok_per_s=2200)
WIDE = Configuration("vllm-wide", batch_size=64, energy_per_output_tok_j=0.19, output_tok_per_s=2300)
DEMO = Campaign((SLOW, FAST, WIDE), cycle_sd=0.02, has_samples=False)
LATER = "20260801T100000Z-0b0b"


def run_of(campaign: Campaign = DEMO, **changes: Any) -> Run:
    return make_run(dataclasses.replace(campaign, **changes).records())


def compared(run: Run, **options: Any) -> Comparison:
    options = {"metrics": (ENERGY, THROUGHPUT), **options}
    return compare_configurations(run, run.with_results[0], run.with_results[1:], **options)


def row_of(comparison: Comparison, name: str = "vllm", metric: Any = ENERGY) -> Row:
    pair = next(item for item in comparison.pairs if item.other.name == name)
    return next(row for row in pair.rows if row.metric is metric)


def effect_of(comparison: Comparison, name: str = "vllm") -> Effect:
    found = row_of(comparison, name).effect
    assert found is not None
    return found


def anchor_of(comparison: Comparison) -> str | None:
    return comparison.anchor.name if comparison.anchor else None


def later(**changes: Any) -> Run:
    return run_of(**{"run_id": LATER, "day_sd": 0.01, **changes})


def test_configurations_are_paired_within_cycles() -> None:
    run = run_of()
    values = {
        subject.name: [math.log(value) for value in subject.estimate(ENERGY).values] for subject in run.with_results
    }
    expected = stats.ttest_rel(values["vllm"], values["pytorch"])
    effect = effect_of(compared(run))
    assert effect.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    bounds = expected.confidence_interval(0.95)
    assert effect.interval() == pytest.approx((math.exp(bounds.low), math.exp(bounds.high)))
    assert effect.ratio == pytest.approx(0.4, rel=0.03)


def test_only_cycles_of_both_are_pairs() -> None:
    run = run_of(configurations=(SLOW, dataclasses.replace(FAST, failed_cycles=(1, 3))))
    assert effect_of(compared(run)).n_cycles == (3,)
    apart = (dataclasses.replace(SLOW, failed_cycles=(0, 1)), dataclasses.replace(FAST, failed_cycles=(2, 3, 4)))
    row = row_of(compared(run_of(configurations=apart)), "pytorch")
    assert (row.effect, row.reason) == (None, Reason.of("no_common_cycle"))


def test_p_values_are_adjusted_over_all_comparisons() -> None:
    comparison = compared(run_of())
    rows = [row for pair in comparison.pairs for row in pair.rows]
    assert comparison.n_compared == len(rows) == 4
    expected = holm([row.effect.p_value for row in rows if row.effect and row.effect.p_value is not None])
    assert [row.p_adjusted for row in rows] == list(expected)


def test_what_was_not_measured_has_its_reason_and_the_rest_is_compared() -> None:
    comparison = compared(run_of(configurations=(SLOW, dataclasses.replace(FAST, energy_per_output_tok_j=None))))
    assert row_of(comparison).effect is None
    assert row_of(comparison).reason == Reason.of("not_measured", name="vllm", why="no energy meter could be used")
    assert row_of(comparison, metric=THROUGHPUT).is_found
    run = run_of(configurations=(SLOW, FAST))
    shown = compare_configurations(run, run.with_results[0], run.with_results[1:]).metrics
    assert [metric.name for metric in shown] == ["energy_per_output_tok_j", "output_tok_per_s", "e2e_p50_s"]


def test_twice_the_throughput_at_equal_joules_per_token_is_no_more_energy() -> None:
    quick = dataclasses.replace(FAST, name="quick", batch_size=48, output_tok_per_s=2 * FAST.output_tok_per_s)
    run = run_of(configurations=(FAST, quick), cycles=8, load_sd=0.002, window_s=10)
    for name in ("energy_per_output_tok_j", "energy_per_total_tok_j", "energy_per_request_j"):
        gate = parse_gate(f"{name}=3%")
        row = row_of(compared(run, metrics=(), gates=(gate,)), "quick", gate.metric)
        assert row.judgement is not None
        assert row.judgement.verdict is Verdict.WITHIN


def test_every_other_metric_has_a_ratio_on_request_and_no_part_in_the_verdicts() -> None:
    short, whole = (compared(run_of(), is_whole=is_whole) for is_whole in (False, True))
    assert whole.metrics == short.metrics
    assert whole.n_compared == short.n_compared
    assert [row_of(whole, metric=it) for it in short.metrics] == [row_of(short, metric=it) for it in short.metrics]
    further = row_of(whole, metric=parse_metric("gpu_energy_net_per_request_j"))
    assert further.effect is not None
    assert further.effect.interval() is not None
    assert (further.p_adjusted, further.reason) == (None, Reason.of("not_asked"))
    shown = {row.metric.name for row in whole.pairs[0].rows}
    assert {"e2e_mean_s", "requests_per_s"} <= shown
    assert not shown & {"gpu_energy_j", "output_tok", "dram_energy_per_request_j"}  # absolute, or not measured


@pytest.mark.parametrize(
    ("values", "code", "pairs"), [((0.0, 4.0, 5.0, 4.0, 5.0), "ratios_dropped", (4,)), ((0.0,) * 5, "no_ratio", None)]
)
def test_a_cycle_with_a_zero_has_no_ratio_and_the_others_keep_theirs(
    values: tuple[float, ...], code: str, pairs: tuple[int, ...] | None
) -> None:
    records = []
    for record in run_of(configurations=(SLOW, FAST)).records:
        good = values[record.identity.cycle_index] if record.identity.config_name == "vllm" else 2.0
        rates = dataclasses.replace(record.throughput, good_requests_per_s=good)
        records.append(dataclasses.replace(record, throughput=rates))
    gate = parse_gate("goodput=3%")
    row = row_of(compared(make_run(records), metrics=(), gates=(gate,)), "vllm", gate.metric)
    assert row.reason is not None
    assert row.judgement is not None
    assert (row.reason.code, row.effect and row.effect.n_cycles) == (code, pairs)
    assert (row.p_adjusted, row.judgement.verdict) == (None, Verdict.INCONCLUSIVE)  # what is left is a selection
    if row.effect is not None:
        assert row.effect.ratio == pytest.approx(math.sqrt(20) / 2)
        assert row.reason.data["cycles"] == "cycle 1"


def with_fast(**changes: Any) -> dict[str, Any]:
    return {"configurations": (SLOW, dataclasses.replace(FAST, **changes), WIDE)}


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        (with_fast(invalid_attempts={2: 2}), "unequal_exclusions", "1 of vllm (another process used the GPU"),
        (with_fast(failed_cycles=(4,)), "unequal_exclusions", "no result"),
        (with_fast(prompts="b" * 64), "other_prompts", "aaaaaaaa against synthetic bbbbbbbb"),
        (with_fast(output_tok_ratio=0.8), "other_output_lengths", "other output lengths"),
        ({"is_reused": True}, NO_INTERVAL.code, "cycles share an engine load"),
        ({"cycles": 1}, "one_cycle", "one cycle has no interval"),
        ({"structure": "grouped"}, "blocks", "all ran before those of another"),
    ],
)
def test_what_forbids_a_verdict_is_its_reason(changes: dict[str, Any], code: str, text: str) -> None:
    campaign = dataclasses.replace(DEMO, **changes)
    failed = {item.name: len(item.failed_cycles) for item in campaign.configurations if item.failed_cycles}
    comparison = compared(make_run(campaign.records(), failed), gates=(GATE,))
    row = row_of(comparison)
    assert row.effect is not None
    assert row.reason is not None
    assert row.judgement is not None
    assert (row.reason.code, text in row.reason.text) == (code, True)
    assert (row.p_adjusted, row.judgement.verdict) == (None, Verdict.INCONCLUSIVE)
    assert row_of(comparison, "vllm-wide").is_found == ("configurations" in changes)
    assert gate_code(comparison) is ExitCode.INCONCLUSIVE


@pytest.mark.parametrize(("slow", "fast"), [({}, {2: 1}), ({1: 1}, {2: 1, 3: 1}), ({1: 2}, {3: 2})])
def test_attempts_with_a_valid_rerun_and_equal_shares_of_lost_cycles_allow_a_verdict(
    slow: dict[int, int], fast: dict[int, int]
) -> None:
    attempts = (dataclasses.replace(SLOW, invalid_attempts=slow), dataclasses.replace(FAST, invalid_attempts=fast))
    row = row_of(compared(run_of(configurations=attempts), gates=(GATE,)))
    assert (row.is_found, row.reason) == (True, None)
    assert row.judgement is not None
    assert row.judgement.verdict is Verdict.BETTER
    assert row.all_attempts_ratio is not None


def test_gates_are_judged_and_end_with_their_codes() -> None:
    same = dataclasses.replace(FAST, name="same", batch_size=33)
    worse = dataclasses.replace(FAST, name="worse", batch_size=34, energy_per_output_tok_j=0.23)
    run = run_of(configurations=(FAST, same, worse), cycles=8, load_sd=0.003)
    comparison = compared(run, metrics=(), gates=(GATE,))
    verdicts = [row.judgement.verdict for pair in comparison.pairs for row in pair.rows if row.judgement]
    assert verdicts == [Verdict.WITHIN, Verdict.WORSE]
    assert gate_code(comparison, is_lenient=True) is ExitCode.REGRESSION
    fine = compare_configurations(run, run.with_results[0], run.with_results[1:2], gates=(GATE,))
    assert gate_code(fine) is ExitCode.OK
    near = dataclasses.replace(FAST, name="near", batch_size=33, energy_per_output_tok_j=0.206)
    undecided = compared(run_of(configurations=(FAST, near)), gates=(GATE,))
    assert gate_code(undecided, is_lenient=True) is ExitCode.OK
    assert gate_code(undecided) is ExitCode.INCONCLUSIVE


def test_a_gate_on_what_was_not_measured_is_an_error_unless_a_regression_was_found() -> None:
    run = run_of(configurations=(FAST, dataclasses.replace(SLOW, energy_per_output_tok_j=None)))
    only = compared(run, metrics=(), gates=(GATE,))
    assert gate_code(only) is gate_code(only, is_lenient=True) is ExitCode.USAGE
    both = compared(run, metrics=(), gates=(GATE, parse_gate("throughput=3%")))
    assert gate_code(both) is ExitCode.REGRESSION
    empty = run_of(configurations=(FAST, dataclasses.replace(SLOW, invalid_attempts=dict.fromkeys(range(5), 2))))
    row = row_of(compared(empty, gates=(GATE,)), "pytorch")
    assert (row.effect, row.reason) == (None, Reason.of("never_valid", name="pytorch", why="no valid result"))
    assert gate_code(compared(empty, gates=(GATE,))) is ExitCode.INCONCLUSIVE


def test_a_configuration_without_any_result_is_missing() -> None:
    run = make_run(dataclasses.replace(DEMO, configurations=(SLOW, FAST)).records(), {"gone": 5})
    comparison = compared(run, gates=(GATE,))
    assert comparison.missing == (f"no results: gone in {DEMO.run_id} (5 failed)",)
    assert gate_code(comparison) is ExitCode.INCONCLUSIVE


def test_records_in_any_order_and_twice_compare_the_same() -> None:
    records = DEMO.records()
    twice, once = (compared(make_run(found)).pairs for found in (reversed([*records, *records]), records))
    assert [pair.rows for pair in twice] == [pair.rows for pair in once]


def test_a_configuration_that_was_added_after_the_others_gets_no_verdict_against_them() -> None:
    early, late = run_of(configurations=(SLOW, FAST)), run_of(configurations=(WIDE,))
    days = [_dated(early.records, "2026-07-14"), _dated(late.records, "2026-07-15")]
    comparison = compared(make_run([*days[0], *days[1]]))
    assert row_of(comparison, "vllm-wide").reason == Reason.of("blocks")
    assert row_of(comparison).is_found


def _dated(records: Iterable[Record], day: str) -> list[Record]:
    def moved(found: Identity) -> Identity:
        return dataclasses.replace(found, start_utc=day + found.start_utc[10:])

    return [dataclasses.replace(item, identity=moved(item.identity)) for item in records]


@pytest.mark.parametrize(("structure", "is_same"), [("interleaved", True), ("balanced", False), ("shuffled", False)])
def test_an_order_that_is_the_same_in_every_cycle_gets_a_verdict_and_is_named(structure: str, is_same: bool) -> None:
    comparison = compared(run_of(structure=structure))
    assert row_of(comparison).is_found
    assert ("The order is the same in every cycle" in render_text(comparison)) is is_same
    assert comparison_document(comparison)["is_same_order"] is is_same


def test_prompts_are_compared_within_cycles_since_each_cycle_draws_its_own() -> None:
    records = [_with_prompts(item, item.identity.cycle_index) for item in run_of().records]
    few = [item for item in records if (item.identity.config_name, item.identity.cycle_index) != ("vllm", 2)]
    assert row_of(compared(make_run(few))).effect is not None
    assert not [pair for pair in compared(make_run(few)).pairs if pair.obstacles]
    other = [_with_prompts(item, 9) if item is records[1] else item for item in records]
    obstacles = [found for pair in compared(make_run(other)).pairs for found in pair.obstacles]
    assert {found.reason.code for found in obstacles} == {"other_prompts"}


def _with_prompts(record: Record, number: int) -> Record:
    source = {**record.work.prompt_source, "sha256": str(number) * 64, "draw": number}
    return dataclasses.replace(record, work=dataclasses.replace(record.work, prompt_source=source))


# -- two runs


def test_runs_are_compared_over_the_first_unchanged_configuration() -> None:
    changed = dataclasses.replace(FAST, energy_per_output_tok_j=0.22)
    comparison = compare_runs(run_of(), later(configurations=(SLOW, changed, WIDE)))
    assert anchor_of(comparison) == "pytorch"
    assert effect_of(comparison).ratio == pytest.approx(1.1, rel=0.02)
    assert row_of(comparison).is_found
    assert not row_of(comparison, "vllm-wide").is_found


HOT = tuple(
    dataclasses.replace(item, energy_per_output_tok_j=1.1 * (item.energy_per_output_tok_j or 0))
    for item in (SLOW, FAST)
)


@pytest.mark.parametrize(
    ("before", "after", "anchor", "code"),
    [
        ((FAST,), (dataclasses.replace(FAST, options={"max_input_tokens": 100}),), "", "no_anchor"),
        ((FAST,), (FAST,), "vllm", "own_anchor"),
        ((SLOW, FAST), HOT, "pytorch", "anchor_moved"),
        ((SLOW, FAST), (dataclasses.replace(SLOW, invalid_attempts={0: 2}), FAST), "pytorch", "unequal_exclusions"),
    ],
)
def test_what_forbids_a_verdict_on_two_runs_is_its_reason(
    before: tuple[Configuration, ...], after: tuple[Configuration, ...], anchor: str, code: str
) -> None:
    runs = run_of(configurations=before), later(configurations=after)
    comparison = compare_runs(*runs, metrics=(ENERGY,), gates=(GATE,))
    row = row_of(comparison)
    assert row.reason is not None
    assert row.judgement is not None
    assert (anchor_of(comparison), row.reason.code, row.p_adjusted) == (anchor, code, None)
    assert (row.judgement.verdict, row.judgement.reason) == (Verdict.INCONCLUSIVE, row.reason)
    assert row.raw_ratio == pytest.approx(1.1 if after is HOT else 1, rel=0.05)
    if after is HOT:
        assert row_of(compare_runs(*runs, metrics=(ENERGY,), anchor=Anchor(tolerance=0.2))).reason is None


def test_an_anchor_whose_engine_changed_is_none_unless_it_is_named() -> None:
    versions = {"python": "3.11.7", "torch": "2.14.0"}
    updated = [
        dataclasses.replace(record, environment=dataclasses.replace(record.environment, versions=versions))
        for record in later().records
    ]
    before, after = run_of(), make_run(updated)
    assert anchor_of(compare_runs(before, after)) == ""
    assert anchor_of(compare_runs(before, after, anchor=Anchor("pytorch"))) == "pytorch"
    with pytest.raises(UserError, match="no configuration 'none' is the same in both runs"):
        compare_runs(before, after, anchor=Anchor("none"))


def test_configurations_without_a_counterpart_are_named_and_the_only_ones_left_are_one_pair() -> None:
    new, newer = Configuration("new", batch_size=7), Configuration("newer", batch_size=8)
    comparison = compare_runs(run_of(), later(configurations=(SLOW, FAST, new, newer)))
    assert comparison.missing == (f"only in {DEMO.run_id}: vllm-wide", f"only in {LATER}: new, newer")
    comparison = compare_runs(run_of(configurations=(SLOW, FAST)), later(configurations=(SLOW, new)))
    assert [(pair.baseline.name, pair.other.name) for pair in comparison.pairs] == [("vllm", "new")]
    assert comparison.missing == ()
