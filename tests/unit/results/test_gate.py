"""Gates: what they say of an effect, alone and among others, and how many cycles they ask for."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from lem.base.errors import UserError
from lem.base.reasons import Reason
from lem.results.metrics import parse_metric
from lem.results.stats import Effect, Gate, Verdict, cycles_to_settle, judge, paired_effect, parse_gate

ENERGY = parse_gate("energy=3%")
THROUGHPUT = parse_gate("throughput=3%")


BLOCKED = Reason.of("other_cards", before="one", after="another")


def effect(percent: float, error_percent: float = 0.3, n: int = 5) -> Effect:
    return Effect(math.log1p(percent / 100), error_percent / 100, n - 1, (n,))


def verdict_of(gate: Gate, found: Effect) -> Verdict:
    return judge([(gate, found, None)])[0].verdict


@pytest.mark.parametrize(
    ("percent", "error", "verdict"),
    [
        (10, 0.5, Verdict.WORSE),
        (-10, 0.5, Verdict.BETTER),
        (0.5, 0.5, Verdict.WITHIN),
        (-1, 0.5, Verdict.WITHIN),
        (3, 0.5, Verdict.INCONCLUSIVE),
        (4, 0.5, Verdict.INCONCLUSIVE),
        (0, 2.0, Verdict.INCONCLUSIVE),
    ],
)
def test_more_energy_is_worse_beyond_the_threshold(percent: float, error: float, verdict: Verdict) -> None:
    assert verdict_of(ENERGY, effect(percent, error)) is verdict


def test_more_throughput_is_better() -> None:
    assert verdict_of(THROUGHPUT, effect(10)) is Verdict.BETTER
    assert verdict_of(THROUGHPUT, effect(-10)) is Verdict.WORSE


def test_the_threshold_is_as_far_to_both_sides() -> None:
    slower, faster = effect(100 / 1.05 - 100), effect(5)
    assert verdict_of(THROUGHPUT, slower) is Verdict.WORSE
    assert verdict_of(ENERGY, faster) is Verdict.WORSE
    assert ENERGY.bound == pytest.approx(math.log(1.03))


def test_the_verdict_is_that_of_the_whole_t_interval() -> None:
    """Random effects: SciPy's interval lies on one side, or it does not."""
    rng = random.Random(5)
    for _ in range(300):
        above = [math.exp(rng.gauss(0.03, 0.02)) for _ in range(4)]
        found = paired_effect(above, [1.0] * 4)
        low, high = stats.ttest_1samp([math.log(value) for value in above], 0).confidence_interval(0.95)
        bound = ENERGY.bound
        expected = (
            Verdict.WORSE
            if low > bound
            else Verdict.BETTER
            if high < -bound
            else Verdict.WITHIN
            if -bound < low and high < bound
            else Verdict.INCONCLUSIVE
        )
        assert verdict_of(ENERGY, found) is expected


def test_among_many_the_same_effect_needs_more() -> None:
    sure = effect(5, 0.6)
    assert verdict_of(ENERGY, sure) is Verdict.WORSE
    others = [(ENERGY, effect(3, 1.0), None)] * 9
    assert judge([(ENERGY, sure, None), *others])[0].verdict is Verdict.INCONCLUSIVE


def test_the_most_certain_verdict_makes_room_for_the_next() -> None:
    """Holm: two of three tests stand at 0.05/3 and 0.05/2."""
    first, second = effect(20, 0.3), effect(4.8, 0.5)
    verdicts = [item.verdict for item in judge([(ENERGY, second, None), (ENERGY, first, None)])]
    assert verdicts == [Verdict.WORSE, Verdict.WORSE]


def test_what_stands_against_a_verdict_is_its_reason_and_takes_no_room_from_others() -> None:
    sure = effect(5, 0.6)
    blocked = [(ENERGY, effect(50, 0.1), BLOCKED)] * 9
    judged = judge([(ENERGY, sure, None), *blocked])
    assert judged[0].verdict is Verdict.WORSE
    assert {(item.verdict, item.reason, item.further_cycles) for item in judged[1:]} == {
        (Verdict.INCONCLUSIVE, BLOCKED, None)
    }


def test_without_an_error_there_is_no_verdict() -> None:
    one = Effect(1.0, None, None, (1,))
    (judged,) = judge([(ENERGY, one, None)])
    assert (judged.verdict, judged.further_cycles) == (Verdict.INCONCLUSIVE, None)
    assert judged.reason == Reason.of("one_cycle")
    assert judge([(ENERGY, None, BLOCKED)])[0].reason == BLOCKED
    assert judge([]) == ()


def test_the_further_cycles_are_those_that_settle_it() -> None:
    """With as many the interval lies on one side; with one fewer it does not."""
    found = effect(1.5, 1.0, n=5)
    more = cycles_to_settle(found, ENERGY.bound)
    assert more is not None
    spread = 0.01 * math.sqrt(5)
    distance = ENERGY.bound - found.log_ratio

    def half(n: int) -> float:
        return float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)

    assert half(5 + more) < distance <= half(5 + more - 1)


def test_an_effect_at_the_threshold_is_settled_by_no_number_of_cycles() -> None:
    assert cycles_to_settle(effect(3), ENERGY.bound) is None
    assert cycles_to_settle(Effect(0.0, None, None, (1,)), ENERGY.bound) is None


def test_an_inconclusive_verdict_says_how_many_cycles_more() -> None:
    (judged,) = judge([(ENERGY, effect(1.5, 1.0), None)])
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert judged.further_cycles == cycles_to_settle(effect(1.5, 1.0), ENERGY.bound)


@pytest.mark.parametrize(
    ("text", "name", "threshold"),
    [
        ("energy=3%", "energy_per_output_tok_j", 0.03),
        ("energy_per_output_tok_j=0.5%", "energy_per_output_tok_j", 0.005),
        (" throughput=2.5 % ", "output_tok_per_s", 0.025),
        ("ttft_p95_s=10%", "ttft_p95_s", 0.1),
        ("ttft=10%", "ttft_p50_s", 0.1),
    ],
)
def test_gates_are_read(text: str, name: str, threshold: float) -> None:
    gate = parse_gate(text)
    assert gate.metric.name == name
    assert gate.threshold == pytest.approx(threshold)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("energy", "METRIC=PERCENT%"),
        ("energy=3", "add the % sign"),
        ("energy=0%", "more than 0%"),
        ("energy=-3%", "expected a percentage"),
        ("energy=101%", "at most 100%"),
        ("=3%", "METRIC=PERCENT%"),
        ("joules=3%", "no metric 'joules'"),
        ("output_tok=3%", "neither better"),
    ],
)
def test_what_is_no_gate_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_gate(text)


def test_a_metric_that_was_meant_is_suggested() -> None:
    with pytest.raises(UserError, match=r"did you mean 'output_tok_per_s'\?"):
        parse_metric("output_tok_per_sec")


def test_a_metric_without_a_better_side_can_be_compared() -> None:
    assert parse_metric("output_tok").is_higher_better is None
