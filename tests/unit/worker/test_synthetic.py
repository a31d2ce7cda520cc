from __future__ import annotations

import hashlib
import statistics

import pytest

from lem.config.experiment import SyntheticPrompts
from lem.worker.prompts import BUNDLED, generate, shuffled


def plan(length: int, output: int | None, size: int, seed: int, distribution: str = "fixed") -> SyntheticPrompts:
    return SyntheticPrompts(
        input_tokens=length, output_tokens=output, sample_size=size, seed=seed, distribution=distribution
    )


def lengths(distribution: str, length: int = 200, size: int = 2000) -> list[int]:
    return [item.input_tokens or 0 for item in generate(plan(length, None, size, 5, distribution))]


def test_fixed_lengths_are_all_the_chosen_one() -> None:
    assert set(lengths("fixed", size=20)) == {200}


def test_uniform_lengths_span_half_to_one_and_a_half_times_the_chosen_one() -> None:
    found = lengths("uniform")
    assert (min(found), max(found)) == (100, 300)
    assert statistics.fmean(found) == pytest.approx(200, rel=0.02)


def test_lognormal_lengths_have_the_chosen_mean_and_a_long_tail() -> None:
    found = lengths("lognormal")
    assert statistics.fmean(found) == pytest.approx(200, rel=0.04)
    assert statistics.median(found) < statistics.fmean(found)
    assert max(found) <= 800


@pytest.mark.parametrize("distribution", ["fixed", "uniform", "lognormal"])
def test_a_length_of_one_stays_at_least_one(distribution: str) -> None:
    assert min(lengths(distribution, length=1, size=200)) >= 1


def test_output_lengths_are_drawn_where_chosen() -> None:
    assert {item.output_tokens for item in generate(plan(8, 32, 5, 1))} == {32}
    assert {item.output_tokens for item in generate(plan(8, None, 5, 1))} == {None}


def test_texts_have_more_words_than_the_length_in_tokens() -> None:
    assert all(len(item.prompt.split()) > (item.input_tokens or 0) for item in generate(BUNDLED))


def test_no_two_prompts_are_alike_nor_begin_alike() -> None:
    texts = [item.prompt for item in generate(plan(4, None, 300, 1))]
    assert len({text.split()[0] for text in texts}) == 300


def test_same_seed_same_prompts_another_seed_others() -> None:
    chosen = plan(16, None, 8, 1, "lognormal")
    assert generate(chosen) == generate(chosen)
    assert generate(chosen) != generate(plan(16, None, 8, 2, "lognormal"))


def test_bundled_set_never_changes() -> None:
    """Its hash is part of every campaign that gave no prompts: another one would make old results incomparable."""
    text = "\n".join(f"{item.input_tokens} {item.prompt}" for item in generate(BUNDLED))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "2c69b04f5636b590f9631642481173298127de2f77c2d946ea481dba6f966cb9"
    )


def test_shuffle_is_a_permutation_that_depends_on_the_seed_alone() -> None:
    items = list(range(100))
    assert sorted(shuffled(items, 1)) == items
    assert shuffled(items, 1) == shuffled(items, 1)
    assert shuffled(items, 1) != shuffled(items, 2)
    assert shuffled([], 1) == []


def test_every_permutation_is_as_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        order = tuple(shuffled((1, 2, 3), seed))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(count == pytest.approx(1000, abs=130) for count in counts.values())
