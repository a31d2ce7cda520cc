from __future__ import annotations

import pytest

from lem.results.report.plot import (
    Markup,
    Scale,
    fitting_scale,
    join,
    number_text,
    tag,
    tick_text,
)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (tag("p", "<b>&\"'", title='"><i>'), '<p title="&quot;&gt;&lt;i&gt;">&lt;b&gt;&amp;&quot;&#x27;</p>'),
        (tag("p", tag("b", "x"), "<"), "<p><b>x</b>&lt;</p>"),
        (tag("p", "a\x00b\u202ec\ud800"), "<p>a�b�c�</p>"),
        (tag("i", class_="x", aria_label="y", title=None), '<i class="x" aria-label="y"></i>'),
        (join(["a", Markup("<br>")], "&"), "a&<br>"),
        (" ".join(map(number_text, (1.0, -0.04, 1.26, 100.0, -2.5))), "1 0 1.3 100 -2.5"),
        (" ".join(map(tick_text, (0.30000000000000004, 1000.0, 2e6, 0.0))), "0.3 1000 2000000 0"),
    ],
)
def test_text_is_escaped_and_numbers_are_short(found: str, expected: str) -> None:
    assert found == expected


def test_a_scale_runs_from_begin_to_end_and_keeps_what_is_outside_at_its_ends() -> None:
    assert [Scale(10, 20, 0, 100)(value) for value in (10, 15, 20, 5, 99)] == [0, 50, 100, 0, 100]
    assert Scale(1, 100, 0, 100, is_log=True)(10) == pytest.approx(50)


def test_ticks_between_positions_are_whole() -> None:
    assert [tick for last in range(3, 60) for tick in Scale(0, last, 0, 100).ticks(5) if tick % 1] == []


@pytest.mark.parametrize("values", [[1, 20], [1e-9, 1e9]])
def test_values_far_apart_get_a_logarithmic_scale(values: list[float]) -> None:
    assert fitting_scale(values, 0, 100).is_log
    assert not fitting_scale(values, 0, 100, is_from_zero=True).is_log


@pytest.mark.parametrize(
    "values", [[5.0], [0.0, 0.0], [1, 7], [0, 20], [1, 20], [-3, 4], [0.001, 900], [1e-9, 1e9], [2.0, 2.0000001]]
)
def test_ticks_are_few_and_on_the_scale(values: list[float]) -> None:
    scale = fitting_scale(values, 0, 100)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(scale.low - 1e-9 <= tick <= scale.high * (1 + 1e-9) + 1e-9 for tick in ticks)
    assert list(ticks) == sorted(set(ticks))
    assert all(0 < scale(value) < 100 for value in values)
