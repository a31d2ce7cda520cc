"""Every row of the truth table: what lem reports of scripted meters is true, or null for the cause."""

from __future__ import annotations

import pytest

from tests.bench.truth import ROWS, Result, Row, results

# All rows run at once, for the first test of them.
pytestmark = [pytest.mark.needs("gcc"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def found() -> dict[str, Result]:
    return {result.name: result for result in results()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_figure_is_true_or_null_for_its_cause(row: Row, found: dict[str, Result]) -> None:
    assert found[row.name].verdict(row) == "", found[row.name]
