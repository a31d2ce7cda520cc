"""What is wrong after a weather is found, and the table shows it."""

from __future__ import annotations

import pytest

from tests.campaign_rig import Ended
from tests.weather.verdict import Case, find_wrongs

NAMES = [f"pytorch-max_output_tokens={outputs}" for outputs in (4, 8, 16)]
RETRIED = Case("retried", lambda _rig: Ended(0, "", ""), "it died", 0, "completed")
FAILED = Case("failed", lambda _rig: Ended(1, "", ""), "it died", 1, "failed")
STOPPED = Case("stopped", lambda _rig: Ended(1, "", ""), "it died", 1, "pending", stops=True)
NOT_BEGUN = Case("not begun", lambda _rig: Ended(2, "", ""), "it died", 2, None)


def _statuses(text):
    return dict(zip(NAMES, text.split(), strict=True))


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
