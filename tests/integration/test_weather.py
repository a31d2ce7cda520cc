"""Bad weather over campaigns in real containers: it is explained, the others complete, and so does the resume."""

from __future__ import annotations

import pytest

from tests.weather.cases import CASES
from tests.weather.driver import judge_all
from tests.weather.verdict import format_table

pytestmark = [pytest.mark.needs("lab", "gcc"), pytest.mark.timeout(600)]

JOBS = 3


@pytest.fixture(scope="module")
def verdicts(request, tmp_path_factory):
    """The verdict of each weather that was asked for; they run side by side, since most of their time is waiting."""
    asked = {item.callspec.params["name"] for item in request.session.items if "verdicts" in item.fixturenames}
    folder = tmp_path_factory.mktemp("weather")
    found = judge_all([case for case in CASES if case.name in asked], folder, jobs=JOBS)
    print(format_table(found))
    return {verdict.weather: verdict for verdict in found}


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_weather_costs_no_more_than_what_it_struck(verdicts, name):
    verdict = verdicts[name]
    assert verdict.problems == ()
    assert verdict.resumed[0] == verdict.resumed[1] > 0
    assert verdict.left == 0
