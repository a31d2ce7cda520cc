"""What is wrong after a weather is found, and the table shows it."""

from __future__ import annotations

import json

import pytest

from tests.campaign_rig import Ended
from tests.weather.cases import CASES
from tests.weather.verdict import Case, Verdict, find_wrongs, format_table, what_it_said

NAMES = [f"pytorch-max_output_tokens={outputs}" for outputs in (4, 8, 16)]
RETRIED = Case("retried", lambda _rig: Ended(0, "", ""), "it died", 0, "completed")
FAILED = Case("failed", lambda _rig: Ended(1, "", ""), "it died", 1, "failed")
STOPPED = Case("stopped", lambda _rig: Ended(1, "", ""), "it died", 1, "pending", stops=True)
NOT_BEGUN = Case("not begun", lambda _rig: Ended(2, "", ""), "it died", 2, None)


def _statuses(text):
    return dict(zip(NAMES, text.split(), strict=True))


@pytest.mark.parametrize(
    ("case", "ended", "statuses"),
    [
        (RETRIED, Ended(0, "", ""), _statuses("completed completed completed")),
        (FAILED, Ended(1, "", ""), _statuses("completed failed completed")),
        (STOPPED, Ended(1, "", ""), _statuses("completed pending pending")),
        (NOT_BEGUN, Ended(2, "", ""), None),
    ],
)
def test_what_is_as_it_should_be_has_no_wrongs(case, ended, statuses):
    assert list(find_wrongs(case, ended, statuses)) == []


@pytest.mark.parametrize(
    ("case", "ended", "statuses", "text"),
    [
        (RETRIED, Ended(1, "", ""), _statuses("completed completed completed"), "exit code 1 where 0 is due"),
        (RETRIED, Ended(0, "", "Traceback"), _statuses("completed completed completed"), "a traceback"),
        (RETRIED, Ended(0, "", ""), _statuses("completed failed completed"), "the experiment struck is failed"),
        (FAILED, Ended(1, "", ""), _statuses("completed failed pending"), "others suffered"),
        (STOPPED, Ended(1, "", ""), None, "it did not begin"),
        (NOT_BEGUN, Ended(2, "", ""), _statuses("pending pending pending"), "it began"),
    ],
)
def test_what_is_not_is_told(case, ended, statuses, text):
    assert [text in wrong for wrong in find_wrongs(case, ended, statuses)] == [True]


@pytest.mark.parametrize(
    ("out", "err", "said"),
    [
        ({"event": "experiment_retried", "reason": "it died of cold"}, "", "it died of cold"),
        ({"event": "experiment_failed", "error": "it died of cold"}, "", "it died of cold"),
        ({"event": "experiment_completed", "invalid_reasons": ["it died of cold"]}, "", "it died of cold"),
        ({"event": "note", "text": "it died of cold"}, "", "it died of cold"),
        ({"event": "summary", "text": "it died of cold"}, "", None),
        ({"event": "note", "text": "all is well"}, "warm\nerror: it died\n", "error: it died"),
    ],
)
def test_the_explanation_is_found_where_a_person_reads_it(out, err, said):
    assert what_it_said(RETRIED, Ended(0, json.dumps(out), err)) == said


def test_the_table_marks_what_went_wrong():
    good = Verdict("sun", "nothing", 0, (2, 2), (3, 3), 0)
    bad = Verdict("rain", "it is wet and " * 20, 1, (0, 0), (2, 3), 1, ("left: 77",))
    header, first, second = format_table([good, bad]).splitlines()
    assert header.split() == ["weather", "lem", "said", "exit", "others", "resumed", "left"]
    assert first.split() == ["sun", "nothing", "0", "2/2", "3/3", "0"]
    assert second.startswith("rain !")
    assert second.split()[-4:] == ["1", "-", "2/3", "1"]
    assert len(second) < 120


def test_every_weather_has_a_name_of_its_own():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) > 20
