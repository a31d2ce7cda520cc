"""Student t, Holm, effects, gates and trends, against SciPy and closed forms."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.base.reasons import Reason
from lem.results.stats import (
    Effect,
    Gate,
    Verdict,
    anchored_effect,
    cycles_to_settle,
    holm,
    judge,
    paired_effect,
    parse_gate,
    stdev,
)
from lem.results.student import (
    POWER,
    cycles_needed,
    power_of,
    smallest_difference,
    student_t_cdf,
    student_t_quantile,
)
from lem.results.trends import Drift, change_of, is_chance, trend_of
from tests.needs import Late

np: Any = Late("numpy")
stats: Any = Late("scipy.stats")


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03], (0.03, 0.06, 0.06)),
        ([0.04, 0.01, 0.03], (0.06, 0.03, 0.06)),
        ([0.9, 0.8, 0.001, 0.02], (1.0, 1.0, 0.004, 0.06)),
        ([0.2], (0.2,)),
        ([], ()),
    ],
)
def test_holm_adjusts_step_by_step_in_the_order_given(p_values: list[float], adjusted: tuple[float, ...]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda value=value: holm([0.5, value]), "p value") for value in (-0.1, 1.1, math.nan)),
        *((lambda df=df: student_t_cdf(1.0, df), "degrees of freedom") for df in (0, -1)),
        *((lambda p=p: student_t_quantile(p, 3), "probability") for p in (0.0, 1.0, math.nan)),
        (lambda: paired_effect([1.0], [1.0, 2.0]), "expected pairs"),
        (lambda: paired_effect([], []), "at least one pair"),
        (lambda: paired_effect([0.0], [1.0]), "positive"),
        (lambda: paired_effect([math.inf], [1.0]), "finite"),
    ],
)
def test_what_has_no_meaning_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def noisy(rng: random.Random, n: int, log_mean: float, sd: float) -> list[float]:
    return [math.exp(rng.gauss(log_mean, sd)) for _ in range(n)]


def test_one_pair_has_a_ratio_and_nothing_else() -> None:
    effect = paired_effect([2.0], [1.0])
    assert effect.ratio == pytest.approx(2.0)
    assert (effect.interval(), effect.p_value, effect.p_above(0), effect.p_below(0)) == (None, None, None, None)


EXTREMES = (5e-324, 1e-308, 1e-10, 1.0, 1e150, 1e308)


@pytest.mark.parametrize("above", EXTREMES)
@pytest.mark.parametrize("below", EXTREMES)
def test_extreme_values_have_an_effect_on_logs_and_an_interval_if_floats_can_hold_it(
    above: float, below: float
) -> None:
    effect = paired_effect([above, 2 * above if above < 1 else above / 2], [below, below])
    centre = (math.log(above) + math.log(2 * above if above < 1 else above / 2)) / 2 - math.log(below)
    assert effect.log_ratio == pytest.approx(centre, abs=1e-9)
    assert math.isfinite(effect.ratio)
    interval = effect.interval()
    assert (interval is None) == (not effect.is_representable())
    assert interval is None or all(map(math.isfinite, interval))
    assert effect.p_value is not None
    assert 0 <= effect.p_value <= 1


def test_pairs_that_never_differ_are_equal_for_sure() -> None:
    effect = paired_effect([5.0, 6.0], [5.0, 6.0])
    assert (effect.ratio, effect.p_value, effect.interval()) == (1.0, 1.0, (1.0, 1.0))
    assert effect.p_below(0.01) == 0.0
    assert effect.p_above(0.01) == 1.0


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_paired_effects_are_those_of_scipy(n: int) -> None:
    rng = random.Random(n)
    for _ in range(20):
        above, below = noisy(rng, n, 0.01, 0.02), noisy(rng, n, 0.0, 0.02)
        logs = [list(map(math.log, side)) for side in (above, below)]
        found = paired_effect(above, below)
        expected = stats.ttest_rel(*logs)
        bounds = expected.confidence_interval(0.95)
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.interval(0.95) == pytest.approx((math.exp(bounds.low), math.exp(bounds.high)), rel=1e-9)
        shifted = [value - 0.03 for value in logs[0]]
        above_bound = stats.ttest_rel(shifted, logs[1], alternative="greater")
        assert found.p_above(0.03) == pytest.approx(above_bound.pvalue, rel=1e-9)


@pytest.mark.parametrize(("n_now", "n_before"), [(2, 2), (3, 5), (10, 4)])
def test_anchored_effects_are_those_of_scipys_welch_test(n_now: int, n_before: int) -> None:
    rng = random.Random(n_now)
    for _ in range(20):
        now, before = noisy(rng, n_now, 0.03, 0.02), noisy(rng, n_before, 0.0, 0.01)
        found = anchored_effect(paired_effect(now, [1.0] * n_now), paired_effect(before, [1.0] * n_before))
        expected = stats.ttest_ind(list(map(math.log, now)), list(map(math.log, before)), equal_var=False)
        bounds = expected.confidence_interval(0.95)
        assert found.df == pytest.approx(expected.df, rel=1e-9)
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.interval(0.95) == pytest.approx((math.exp(bounds.low), math.exp(bounds.high)), rel=1e-9)


def test_an_anchored_effect_has_no_error_where_a_side_has_none_and_is_certain_of_constant_ratios() -> None:
    one, several = paired_effect([2.0], [1.0]), paired_effect([2.0, 2.1], [1.0, 1.0])
    found = anchored_effect(several, one)
    assert (found.std_error, found.df, found.n_cycles) == (None, None, (1, 2))
    same = paired_effect([2.0, 2.0], [1.0, 1.0])
    assert anchored_effect(same, same) == Effect(0.0, 0.0, 2, (2, 2))


@pytest.mark.parametrize("df", [1, 2, 2.7, 4, 9, 30, 1000])
def test_students_t_is_that_of_scipy(df: float) -> None:
    for t in (-1e6, -40.0, -3.1, -0.2, 0.0, 0.4, 2.2, 12.0):
        assert student_t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-9)
    assert (student_t_cdf(-math.inf, df), student_t_cdf(math.inf, df)) == (0.0, 1.0)
    for probability in (1e-9, 0.001, 0.025, 0.3, 0.9, 0.975, 0.9999):
        assert student_t_quantile(probability, df) == pytest.approx(stats.t.ppf(probability, df), rel=1e-8)


ENERGY, THROUGHPUT = parse_gate("energy=3%"), parse_gate("throughput=3%")
BLOCKED = Reason.of("other_cards", before="one", after="another")


def effect(percent: float, error_percent: float = 0.3, n: int = 5) -> Effect:
    return Effect(math.log1p(percent / 100), error_percent / 100, n - 1, (n,))


def verdict_of(gate: Gate, found: Effect) -> Verdict:
    return judge([(gate, found, None)])[0].verdict


@pytest.mark.parametrize(
    ("gate", "percent", "error", "verdict"),
    [
        (ENERGY, 10, 0.5, Verdict.WORSE),
        (ENERGY, -10, 0.5, Verdict.BETTER),
        (ENERGY, 0.5, 0.5, Verdict.WITHIN),
        (ENERGY, -1, 0.5, Verdict.WITHIN),
        (ENERGY, 3, 0.5, Verdict.INCONCLUSIVE),
        (ENERGY, 4, 0.5, Verdict.INCONCLUSIVE),
        (ENERGY, 0, 2.0, Verdict.INCONCLUSIVE),
        (THROUGHPUT, 10, 0.3, Verdict.BETTER),
        (THROUGHPUT, -10, 0.3, Verdict.WORSE),
    ],
)
def test_a_verdict_is_on_one_side_of_the_threshold(gate: Gate, percent: float, error: float, verdict: Verdict) -> None:
    assert verdict_of(gate, effect(percent, error)) is verdict


def test_among_many_the_same_effect_needs_more_unless_they_cannot_have_a_verdict() -> None:
    sure = effect(5, 0.6)
    others = [(ENERGY, effect(3, 1.0), None)] * 9
    assert judge([(ENERGY, sure, None), *others])[0].verdict is Verdict.INCONCLUSIVE
    blocked = [(ENERGY, effect(50, 0.1), BLOCKED)] * 9
    first, *rest = judge([(ENERGY, sure, None), *blocked])
    assert first.verdict is Verdict.WORSE
    assert {(item.verdict, item.reason, item.further_cycles) for item in rest} == {
        (Verdict.INCONCLUSIVE, BLOCKED, None)
    }


def test_the_most_certain_verdict_makes_room_for_the_next() -> None:
    first, second = effect(20, 0.3), effect(4.8, 0.5)
    verdicts = [item.verdict for item in judge([(ENERGY, second, None), (ENERGY, first, None)])]
    assert verdicts == [Verdict.WORSE, Verdict.WORSE]


def test_without_an_error_there_is_no_verdict() -> None:
    one = Effect(1.0, None, None, (1,))
    (judged,) = judge([(ENERGY, one, None)])
    assert (judged.verdict, judged.further_cycles) == (Verdict.INCONCLUSIVE, None)
    assert judged.reason == Reason.of("one_cycle")
    assert judge([(ENERGY, None, BLOCKED)])[0].reason == BLOCKED
    assert judge([]) == ()


@pytest.mark.parametrize("df", [1, 1.2, 1.5, 2, 4, 9, 30, 1000])
@pytest.mark.parametrize("confidence", [0.95, 0.995])
def test_power_is_that_of_scipys_noncentral_t(df: float, confidence: float) -> None:
    for noncentrality in (0.0, 0.5, 2.0, 4.0, 15.0, 200.0):
        expected = stats.nct.sf(stats.t.ppf((1 + confidence) / 2, df), df, noncentrality)
        assert power_of(0.01 * noncentrality, 0.01, df, confidence) == pytest.approx(expected, abs=1e-6)
    assert (power_of(0.01, 0.0, df, confidence), power_of(0.0, 0.0, df, confidence)) == (1.0, 0.0)


@pytest.mark.parametrize(("size", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (2.0, 5)])
def test_the_cycles_for_a_difference_are_those_of_g_power(size: float, n: int) -> None:
    """G*Power 3.1, t tests, matched pairs, two tails, α = 0.05, power 0.8, by effect size dz."""
    assert cycles_needed([size], 1.0, 0.95) == n
    assert smallest_difference(n, 1.0, 0.95) <= size < smallest_difference(n - 1, 1.0, 0.95)


def test_the_smallest_difference_is_found_with_the_power_stated() -> None:
    for cycles, confidence in ((2, 0.95), (5, 0.95), (5, 0.99), (40, 0.95)):
        least = smallest_difference(cycles, 0.02, confidence)
        power = power_of(least, 0.02 / math.sqrt(cycles), cycles - 1, confidence)
        assert power == pytest.approx(POWER, abs=1e-3)
    assert smallest_difference(5, 0.0, 0.95) == 0.0


def test_a_gate_of_equal_configurations_is_decided_as_often_as_stated() -> None:
    """Simulated: the interval lies within both bounds in at least 80 % of campaigns of as many cycles."""
    n = cycles_needed([0.03, 0.03], 0.02, 0.95)
    assert n is not None
    draws = np.random.default_rng(1).normal(0.0, 0.02, (20_000, n))
    half = stats.t.ppf(0.975, n - 1) * draws.std(axis=1, ddof=1) / math.sqrt(n)
    assert 0.8 <= np.mean(np.abs(draws.mean(axis=1)) + half < 0.03) < 0.9


def test_the_further_cycles_are_those_that_settle_it() -> None:
    found = effect(1.5, 1.0, n=5)
    more = cycles_to_settle(found, ENERGY.bound)
    assert more is not None
    spread = 0.01 * math.sqrt(5)

    def missed(n: int) -> float:
        critical, error = stats.t.ppf(0.975, n - 1), spread / math.sqrt(n)
        distances = (ENERGY.bound - found.log_ratio, ENERGY.bound + found.log_ratio)
        return float(sum(stats.nct.cdf(critical, n - 1, distance / error) for distance in distances))

    assert missed(5 + more) <= 1 - POWER < missed(5 + more - 1)


def test_an_effect_at_the_threshold_is_settled_by_no_number_of_cycles() -> None:
    assert cycles_to_settle(effect(3), ENERGY.bound) is None
    assert cycles_to_settle(Effect(0.0, None, None, (1,)), ENERGY.bound) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("energy", "METRIC=PERCENT%"),
        ("=3%", "METRIC=PERCENT%"),
        ("energy=3", "add the % sign"),
        ("energy=0%", "more than 0%"),
        ("energy=-3%", "expected a percentage"),
        ("energy=101%", "at most 100%"),
        ("joules=3%", "unknown metric 'joules'"),
        ("output_tok_per_request=3%", "no better direction"),
        ("gpu_energy_j=3%", "shown but not compared"),
    ],
)
def test_what_is_no_gate_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_gate(text)


Observation = tuple[str, int, float]
LEVELS = {"a": 1.0, "b": 20.0, "c": 300.0}


def drift_of(found: list[Observation]) -> Drift | None:
    places = [place for _, place, _ in found]
    length = max(places, default=0) - min(places, default=0)
    return trend_of(places, [math.log(value) for *_, value in found], [name for name, *_ in found], length=length)


def observations(drift: float, noise_sd: float, seed: int, cycles: int = 5) -> list[Observation]:
    """Interleaved cycles of three configurations; the log of the value rises by `drift` from first to last."""
    noise = random.Random(seed)
    places = [(cycle * len(LEVELS) + index, name) for cycle in range(cycles) for index, name in enumerate(LEVELS)]
    last = len(places) - 1
    return [
        (name, order, LEVELS[name] * math.exp(drift * order / last + noise.gauss(0, noise_sd)))
        for order, name in places
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_a_drift_is_that_of_least_squares_with_a_level_for_each_configuration(seed: int) -> None:
    found = observations(0.02, 0.01, seed)
    names = sorted(LEVELS)
    design = np.array([[float(place), *(float(name == own) for own in names)] for name, place, _ in found])
    logs = np.log([value for *_, value in found])
    slope = np.linalg.lstsq(design, logs, rcond=None)[0][0]
    residuals = logs - design @ np.linalg.lstsq(design, logs, rcond=None)[0]
    freedom = len(found) - len(names) - 1
    error = math.sqrt(residuals @ residuals / freedom * np.linalg.inv(design.T @ design)[0, 0])
    half = stats.t.ppf(0.975, freedom) * error
    drift, length = drift_of(found), len(found) - 1
    assert drift is not None
    assert drift.change == pytest.approx(math.expm1(length * slope))
    assert drift.ci_lower == pytest.approx(math.expm1(length * (slope - half)))
    assert drift.ci_upper == pytest.approx(math.expm1(length * (slope + half)))
    assert drift.is_significant == (abs(slope) > half)


def test_a_drift_needs_two_values_of_a_configuration_and_three_for_an_interval() -> None:
    assert drift_of([("a", 0, 1.0), ("b", 1, 2.0)]) is None
    assert drift_of([]) is None
    drift = drift_of([("a", 0, 1.0), ("a", 1, 1.05)])
    assert drift is not None
    assert (drift.ci_lower, drift.is_found, drift.is_significant) == (None, False, False)
    assert drift.change == pytest.approx(0.05)


@pytest.mark.parametrize("total", [1, 51, 52, 400])
def test_events_are_chance_while_their_binomial_tail_is_above_five_percent(total: int) -> None:
    for count in range(4):
        assert is_chance(count, total, 0.001) is bool(stats.binom.sf(count - 1, total, 0.001) > 0.05)


def test_a_change_beyond_all_measure_is_no_overflow() -> None:
    assert change_of(1e6) > 1e300
    assert change_of(-1e6) == -1.0
    assert change_of(0.0) == 0.0


def test_a_standard_deviation_is_the_exact_one_rounded_once() -> None:
    generator = random.Random(3)
    for n in (2, 3, 5, 30):
        for scale in (1e-300, 1e-9, 1.0, 3e150):
            values = [scale * (1 + generator.gauss(0, 0.01)) for _ in range(n)]
            exact = statistics.variance(map(Fraction, values))
            low, high = (Fraction(math.nextafter(stdev(values), to)) for to in (0.0, math.inf))
            found = Fraction(stdev(values))
            assert ((low + found) / 2) ** 2 <= exact <= ((high + found) / 2) ** 2
    assert stdev([0.1, 0.1, 0.1]) == 0.0
    assert stdev([-1.0, 1.0]) == math.sqrt(2)
    assert repr(stdev([1e300, 2e300])) == repr(statistics.stdev([1e300, 2e300]))  # a float, also where it is whole
