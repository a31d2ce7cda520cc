"""Rules by which cycles are added, and the levels that their tests leave."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from lem.results.stopping import StoppingRule, Target, levels, next_stage, parse_target, spent

PLANNED = StoppingRule(Target(0.02, kind="ratio"), 5, 20)


def test_five_equal_steps_have_the_published_boundaries_of_pocock_spending() -> None:
    """Lan and DeMets 1983, as computed by ldbounds 2.0 (R): two-sided, 0.05."""
    found = [NormalDist().inv_cdf(1 - level / 2) for level in levels((0.2, 0.4, 0.6, 0.8, 1.0), 0.05)]
    assert found == pytest.approx([2.4380, 2.4268, 2.4101, 2.3966, 2.3859], abs=2e-4)


def test_one_test_of_everything_has_the_whole_level_and_no_step_more_than_its_share() -> None:
    assert levels((1.0,), 0.05) == pytest.approx((0.05,), rel=1e-6)
    assert spent(0.25, 0.05) == pytest.approx(0.05 * math.log(1 + (math.e - 1) / 4))
    fractions = tuple(cycles / 20 for cycles in range(5, 21))
    found = levels(fractions, 0.05)
    assert found[0] == pytest.approx(spent(0.25, 0.05), rel=1e-6)
    assert all(level < 0.015 for level in found[1:])
    assert sum(found) > 0.05, "tests of the same cycles err together"


def test_the_level_is_that_of_the_last_test_and_an_eighth_after_cycles_without_a_plan() -> None:
    assert StoppingRule(None, 5, 20).alpha == pytest.approx(0.05)
    assert StoppingRule(None, 5, 20, added=(5, 8)).alpha == pytest.approx(0.05 / 64)
    looked = StoppingRule(PLANNED.target, 5, 20, looks=(5, 6))
    assert looked.alpha == pytest.approx(levels((0.25, 0.3), 0.05)[-1])
    assert looked.share == pytest.approx(looked.alpha / 0.05)
    assert StoppingRule(None, 5, 20, added=tuple(range(1, 90))).alpha > 0


@pytest.mark.parametrize(
    ("earlier", "rule", "before", "after", "looks", "added"),
    [
        (None, None, 5, 8, (), (5,)),  # more cycles by hand
        (StoppingRule(None, 5, 20, added=(5,)), None, 8, 11, (), (5, 8)),
        (StoppingRule(None, 5, 20, added=(5,)), None, 8, 8, (), (5,)),  # resumed, not prolonged
        (StoppingRule(None, 5, 20, added=(5,)), None, 5, 8, (), (5,)),  # interrupted before its manifest was written
        (None, PLANNED, 0, 5, (), ()),  # planned from the start
        (None, PLANNED, 5, 5, (), (5,)),  # after results of a fixed number
        (StoppingRule(PLANNED.target, 5, 20, looks=(5, 6)), PLANNED, 6, 6, (5, 6), ()),  # resumed
        (StoppingRule(PLANNED.target, 5, 9, looks=(5, 6)), PLANNED, 6, 6, (), (6,)),  # with a larger maximum
        (StoppingRule(PLANNED.target, 5, 20, looks=(5, 6)), None, 6, 8, (), (6,)),
        (StoppingRule(PLANNED.target, 5, 20, looks=(5, 6)), None, 6, 6, (5, 6), ()),
    ],
)
def test_tests_before_are_kept_and_cycles_without_a_plan_are_counted(
    earlier: StoppingRule | None,
    rule: StoppingRule | None,
    before: int,
    after: int,
    looks: tuple[int, ...],
    added: tuple[int, ...],
) -> None:
    found = next_stage(earlier, rule, before, after)
    assert found is not None
    assert (found.looks, found.added) == (looks, added)
    assert found.target == (rule or found).target


def test_a_fixed_number_of_cycles_has_no_rule() -> None:
    assert next_stage(None, None, 0, 5) is next_stage(None, None, 5, 5) is None


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("ci=2%", Target(0.02, None, "ratio")),
        ("ci=0.5%:ttft", Target(0.005, "ttft_p50_s", "ratio")),
        ("each=1%:output_tok_per_s", Target(0.01, "output_tok_per_s", "each")),
        ("energy=3%", Target(0.03, "energy_per_output_tok_j", "gate")),
    ],
)
def test_a_target_is_a_width_of_ratios_or_of_each_interval_or_a_gate(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text", ["2%", "ci=2", "ci=0%", "ci=100%", "ci=2%:nothing", "ci=-1%", "", "ci=", "joules=3%", "output_tok=3%"]
)
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=repr(text)):
        parse_target(text)
