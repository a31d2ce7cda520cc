"""The same few thousand hostile inputs in every run, and every input that was once a find."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz.running import CASES, SURFACES, cases_of, fuzz, workplace
from tests.fuzz.trial import Find, Outcome, Surface

BY_NAME = {surface.name: surface for surface in SURFACES}
ALL_CASES = [(surface.name, path.name) for surface in SURFACES for path in cases_of(surface)]


@pytest.mark.parametrize("name", BY_NAME)
def test_an_input_is_accepted_or_refused_in_words_that_say_where(name: str) -> None:
    surface = BY_NAME[name]
    with workplace() as folder:
        tally = fuzz(surface, surface.in_suite, folder, None)
    assert {key: (data[:500], text[-2000:]) for key, (data, text) in tally.finds.items()} == {}
    assert tally.total >= surface.in_suite // 2


@pytest.mark.parametrize(("surface", "case"), ALL_CASES)
def test_what_was_a_find_is_none_any_more(surface: str, case: str) -> None:
    data = (CASES / surface / case).read_bytes()
    with workplace() as folder:
        assert BY_NAME[surface].trial(data, folder, is_thorough=True) in Outcome


def test_every_folder_of_cases_belongs_to_a_surface() -> None:
    assert {path.name for path in CASES.iterdir()} <= set(BY_NAME)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(Find("place", "no line"), "place"), (ValueError("x"), "traceback"), (Find("escape", "../x"), "escape")],
)
def test_a_find_is_counted_kept_and_does_not_end_the_search(tmp_path: Path, error: Exception, kind: str) -> None:
    def trial(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
        assert folder == tmp_path
        assert not is_thorough
        if len(data) > 3:
            raise error
        return Outcome.ACCEPTED

    tally = fuzz(Surface("x", lambda: st.binary(max_size=8), trial), 200, tmp_path, 1)
    assert tally.total >= 100
    assert tally.counts[kind] > 10
    assert not tally.is_good
    ((data, text),) = tally.finds.values()
    assert len(data) == 4
    assert str(error) in text
