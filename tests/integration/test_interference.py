"""Faults in the window of a real campaign that stop its engine or its sampler: it is invalid, and measured again."""

from __future__ import annotations

from typing import Any

import pytest

from lem.record import Record, read_record
from tests.campaign_rig import CampaignRig, campaign_text
from tests.records import codes

# While it works, `sh` is a child of the engine process, which is stopped with its threads.
STOP_ENGINE = "(sleep 1.5; kill -CONT $PPID) & kill -STOP $PPID"
# The sampler is known by the path of its log.
STOP_SAMPLER = 'sampler=$(pgrep -f -- "--output $PWD") && kill -STOP $sampler && sleep 4.5; kill -CONT $sampler'


def attempts(rig: CampaignRig) -> list[Record]:
    (entry,) = rig.manifest().experiments
    return [read_record(rig.folder / str(attempt.result_path)) for attempt in entry.attempts]


@pytest.mark.parametrize(("command", "code"), [(STOP_ENGINE, "engine_stopped"), (STOP_SAMPLER, "sampler_starved")])
def test_a_window_with_a_hole_is_invalid_and_measured_again(rig: CampaignRig, command: str, code: str) -> None:
    rig.write(campaign_text(outputs=(4,), cycles=1))
    rule: dict[str, Any] = {"at": "generate", "do": "shell", "command": command, "once": str(rig.folder / "stopped")}
    ended = rig.run("--yes", rules=[rule], is_warm=False)
    assert ended.code == 0, ended.err
    first, second = attempts(rig)
    assert codes(first.validity.invalid_reasons) == [code]
    assert second.validity.valid, second.validity.invalid_reasons
    assert first.validity.invalid_reasons[0].text in ended.err  # why it is measured again
    rig.assert_no_process_left()


def test_an_engine_that_does_nothing_for_seconds_is_no_hole(rig: CampaignRig) -> None:
    rig.write(campaign_text(outputs=(4,), cycles=1))
    ended = rig.run("--yes", rules=[{"at": "generate", "do": "sleep", "seconds": 4.0}])
    assert ended.code == 0, ended.err
    (record,) = attempts(rig)
    assert record.window.window_s >= 4.0
    assert (record.validity.valid, record.interference.stopped_s) == (True, 0.0)
    assert record.interference.suspended_s == 0.0
    assert record.machine.load_1min is not None
