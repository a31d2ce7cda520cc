"""The equivalence harness: what it masks, what it finds, and which differences are meant to be."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.equivalence.comparing import ABSENT, Difference, Intended, compare_contents, compare_outcomes, judge
from tests.equivalence.masks import mask_text, mask_values
from tests.equivalence.reading import flatten

TABLE = "configuration  J/token   95 %\nvllm           0.2051   ±0.3 %\n"
RECORD: dict[str, Any] = {
    "identity": {"run_id": "20261129T141256Z-63ae", "host": "lab", "cycle_index": 1, "lem_version": "0.1.0"},
    "energy": {"gpu_energy_j": 1674.2, "load_energy_j": None, "load_energy_j_null_reason": "nothing was loaded here"},
    "requested": {"measurement": {"cpu_tdp_w": 65, "min_window_s": 2.5}},
    "validity": {"valid": True},
}


def differences(old: Any, new: Any, part: str = "stdout", *, is_live: bool = False, ignore_text: bool = False):
    return compare_contents("static/x: lem x", part, old, new, is_live=is_live, ignore_text=ignore_text)


def document(**changes: Any) -> str:
    record = json.loads(json.dumps(RECORD))
    for path, value in changes.items():
        section, _, key = path.partition("__")
        record[section][key] = value
    return json.dumps(record, indent=2)


def one(old: Any, new: Any, **more: Any) -> str:
    """Where the only difference is."""
    (where,) = (item.where for item in differences(old, new, **more))
    return str(where)


def test_live_values_are_masked_by_the_name_of_their_field_and_options_are_not() -> None:
    flat = dict(flatten(RECORD))
    masked = mask_values(flat, is_live=True)
    assert masked["$.identity.lem_version"] == "<str>"
    assert masked["$.energy.gpu_energy_j"] == "<float>"
    unmasked = "identity.cycle_index validity.valid requested.measurement.cpu_tdp_w requested.measurement.min_window_s"
    assert all(masked[f"$.{name}"] == flat[f"$.{name}"] for name in unmasked.split())
    assert mask_values(flat, is_live=False) == flat
    assert mask_text(TABLE, is_live=False) == TABLE


@pytest.mark.parametrize(
    ("is_live", "text", "same", "other"),
    [
        (True, "14:02:58 [1/2] ok b=4 · 24.2 tok/s in run1\n", "09:11:03 [1/2] ok b=4 · 7.0 tok/s in run1\n", "b=8"),
        (False, "14:20:37 warning: b=4\n", "14:25:48 warning: b=4\n", "b=8"),
        (False, "lem 0.1.0 b=4\n", "lem 0.2.0 b=4\n", "b=8"),
        (False, "from 22:00:00, vllm 0.1.0 b=4\n", "from 22:00:00, vllm 0.1.0 b=4\n", "b=8"),
    ],
)
def test_texts_are_masked_for_times_and_versions_of_lem_alone(is_live: bool, text: str, same: str, other: str) -> None:
    assert mask_text(text, is_live=is_live) == mask_text(same, is_live=is_live)
    assert mask_text(text, is_live=is_live) != mask_text(same.replace("b=4", other), is_live=is_live)
    assert mask_text("vllm 0.1.0 at 22:00:00", is_live=False) == "vllm 0.1.0 at 22:00:00"


def test_a_measured_value_that_is_gone_shows_through_the_mask() -> None:
    gone = document(energy__gpu_energy_j=None)
    assert one(document(), gone, part="file r.json", is_live=True) == "$.energy.gpu_energy_j"
    assert differences(document(), document(energy__gpu_energy_j=3.5), "file r.json", is_live=True) == []


@pytest.mark.parametrize("ignore_text", [False, True])
def test_every_changed_number_is_found(ignore_text: bool) -> None:
    place = "numbers" if ignore_text else "line 2"
    assert one(TABLE, TABLE.replace("0.2051", "0.2052"), ignore_text=ignore_text) == place
    (found,) = differences(document(), document(energy__gpu_energy_j=1674.3), ignore_text=ignore_text)
    assert (found.where, found.old, found.new) == ("$.energy.gpu_energy_j", "1674.2", "1674.3")
    (found,) = differences(document(), document(energy__more=1), ignore_text=ignore_text)
    assert (found.where, found.old) == ("$.energy.more", ABSENT)
    assert one(document(), document(validity__valid=1), ignore_text=ignore_text) == "$.validity.valid"
    assert one(document(), document(identity__host="elsewhere"), ignore_text=ignore_text) == "$.identity.host"
    place = "is empty" if ignore_text else "line 1"
    assert one("", "warning: take care\n", part="stderr", ignore_text=ignore_text) == place


PAGE = "<!DOCTYPE html><p>Energy 0.25 J</p><svg><path d='M 1 2'/></svg>"
HELP = "usage: lem x [--json]\n\n  --json  one document\n"


@pytest.mark.parametrize(
    ("old", "reworded", "changed"),
    [
        ("an integer is due (1 to 20)\n", "expected an integer (1 to 20)\n", ("20", "21")),
        (document(), document(energy__load_energy_j_null_reason="no engine was loaded here"), ("1674.2", "1674.3")),
        ('{"warnings": {"the load is 3 % in doubt": 2}}', '{"warnings": {"load uncertain by 3 %": 2}}', (": 2", ": 1")),
        (PAGE, PAGE.replace("Energy", "It took"), ("0.25", "0.26")),
        (PAGE, PAGE.replace("Energy", "It took"), ("1 2", "1 3")),
        (HELP, HELP.replace("one document", "a single document"), ("--json", "--jsn")),
        ("n: [1, 2]  # default\n", "n:      # e.yaml:1\n- 1\n- 2\n", ("- 2", "- 3")),
        (document(), json.dumps(RECORD), ("1674.2", "1674.3")),
    ],
)
def test_words_and_layout_can_be_ignored_and_what_they_hold_is_not(
    old: str, reworded: str, changed: tuple[str, str]
) -> None:
    assert differences(old, reworded)
    assert differences(old, reworded, ignore_text=True) == []
    assert len(differences(old, reworded.replace(*changed), ignore_text=True)) == 1


def test_exit_codes_and_files_count() -> None:
    old = {"code": 0, "out": "", "err": "", "files": {"report.html": "x\n"}}
    new = {"code": 1, "out": "", "err": "", "files": {}}
    found = compare_outcomes("static/x: lem x", old, new, is_live=False, ignore_text=True)
    assert [(item.part, item.old, item.new) for item in found[:1]] == [("exit code", "0", "1")]
    assert [item.part for item in found[1:]] == ["file report.html"]


WORDS = Difference("static/x: lem status", "stderr", "line 3", "hint: is due\n", "hint: expected\n")
ENTRY = Intended("plain English", case="lem status", part="stderr", where="^hint:")


@pytest.mark.parametrize(
    "change",
    [
        {"new": f"{WORDS.new}0.26 J\n"},  # every line that differs must be meant
        {"case": "live/x: lem status"},
        {"case": "static/x: lem check"},
        {"part": "stdout"},
    ],
)
def test_an_intended_difference_is_counted_and_any_other_is_unexpected(change: dict[str, str]) -> None:
    other = replace(WORDS, **change)
    verdict = judge([WORDS, other], [ENTRY], ["static"])
    assert (verdict.intended, verdict.unexpected, verdict.stale) == (1, [other], [])
    assert not verdict.is_equivalent


def test_an_entry_that_matches_nothing_is_stale_once_its_suite_ran() -> None:
    assert judge([], [ENTRY], ["static"]).stale == [ENTRY]
    assert judge([], [ENTRY], ["recorded"]).is_equivalent


def test_intended_numbers_match_all_that_differ_and_no_others() -> None:
    entry = Intended("merged", "lem x", r"-2 \+1 -1")
    old = "2 spells of 7 in 1 run\n"
    assert [entry.matches(item) for item in differences(old, "1 spell of 7 in a run\n", ignore_text=True)] == [True]
    assert [entry.matches(item) for item in differences(old, "1 spell of 8 in a run\n", ignore_text=True)] == [False]
