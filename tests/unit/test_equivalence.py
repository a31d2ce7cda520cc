"""The equivalence harness: what it masks, what it finds, and which differences are meant to be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence import driver
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


# Masks


def test_live_values_are_masked_by_the_name_of_their_field() -> None:
    masked = mask_values(dict(flatten(RECORD)), is_live=True)
    assert masked["$.identity.lem_version"] == "<str>"
    assert masked["$.energy.gpu_energy_j"] == "<float>"
    assert masked["$.identity.cycle_index"] == 1
    assert masked["$.validity.valid"] is True


def test_what_was_configured_is_never_masked() -> None:
    masked = mask_values(dict(flatten(RECORD)), is_live=True)
    assert masked["$.requested.measurement.cpu_tdp_w"] == 65
    assert masked["$.requested.measurement.min_window_s"] == 2.5


def test_recorded_values_are_not_masked() -> None:
    assert mask_values(dict(flatten(RECORD)), is_live=False) == dict(flatten(RECORD))
    assert mask_text(TABLE, is_live=False) == TABLE


def test_a_measured_value_that_is_gone_shows_through_the_mask() -> None:
    found = differences(document(), document(energy__gpu_energy_j=None), "file r.json", is_live=True)
    assert [item.where for item in found] == ["$.energy.gpu_energy_j"]
    assert differences(document(), document(energy__gpu_energy_j=3.5), "file r.json", is_live=True) == []


def test_times_and_runs_in_live_texts_are_masked_and_names_are_not() -> None:
    old = "14:02:58 [1/2] ok a-batch=4 · 24.20 tok/s · 5.3 s in run1\n"
    new = "09:11:03 [1/2] ok a-batch=4 · 7.01 tok/s · 25.8 s in run1\n"
    assert mask_text(old, is_live=True) == mask_text(new, is_live=True)
    assert mask_text(old, is_live=True) != mask_text(new.replace("batch=4", "batch=8"), is_live=True)


def test_the_time_at_which_a_warning_was_told_is_masked_and_other_times_are_not() -> None:
    assert mask_text("14:20:37 warning: x\n", is_live=False) == mask_text("14:25:48 warning: x\n", is_live=False)
    assert mask_text("begins at 22:00:00\n", is_live=False) == "begins at 22:00:00\n"


def test_versions_are_masked_wherever_lem_names_its_own() -> None:
    assert mask_text("lem 0.1.0\n", is_live=False) == mask_text("lem 0.2.0\n", is_live=False)
    assert mask_text("vllm 0.1.0", is_live=False) == "vllm 0.1.0"


# What is found


@pytest.mark.parametrize("ignore_text", [False, True])
def test_one_changed_digit_of_a_table_is_found(ignore_text: bool) -> None:
    assert len(differences(TABLE, TABLE.replace("0.2051", "0.2052"), ignore_text=ignore_text)) == 1
    assert len(differences(TABLE, TABLE.replace("±0.3", "±0.4"), ignore_text=ignore_text)) == 1


@pytest.mark.parametrize("ignore_text", [False, True])
def test_one_changed_number_of_a_document_is_found_at_its_path(ignore_text: bool) -> None:
    (found,) = differences(document(), document(energy__gpu_energy_j=1674.3), ignore_text=ignore_text)
    assert (found.where, found.old, found.new) == ("$.energy.gpu_energy_j", "1674.2", "1674.3")
    (found,) = differences(document(), document(energy__more=1), ignore_text=ignore_text)
    assert (found.where, found.old) == ("$.energy.more", ABSENT)


def test_true_is_not_one() -> None:
    assert len(differences(document(), document(validity__valid=1))) == 1


def test_words_differ_unless_they_are_ignored() -> None:
    old, new = "error: an integer is due, got 'x' (1 to 20)\n", "error: expected an integer, got 'x' (1 to 20)\n"
    assert len(differences(old, new, "stderr")) == 1
    assert differences(old, new, "stderr", ignore_text=True) == []
    assert len(differences(old, new.replace("20", "21"), "stderr", ignore_text=True)) == 1
    reworded = document(energy__load_energy_j_null_reason="no engine was loaded here")
    assert len(differences(document(), reworded)) == 1
    assert differences(document(), reworded, ignore_text=True) == []


def test_a_warning_that_is_a_key_is_words_too() -> None:
    old, new = ({"warnings": {text: 2}} for text in ("the load is 3 % in doubt", "load uncertain by 3 %"))
    assert len(differences(json.dumps(old), json.dumps(new))) == 2
    assert differences(json.dumps(old), json.dumps(new), ignore_text=True) == []
    new["warnings"] = {"load uncertain by 3 %": 1}
    assert len(differences(json.dumps(old), json.dumps(new), ignore_text=True)) == 1


def test_a_code_of_one_word_counts_where_words_are_ignored() -> None:
    assert len(differences(document(), document(identity__host="elsewhere"), ignore_text=True)) == 1


def test_yaml_is_compared_by_its_meaning_where_words_are_ignored() -> None:
    old, new = "model: gpt2  # default\ncycles: [1, 2]\n", "model: gpt2          # e.yaml:1\ncycles:\n- 1\n- 2\n"
    assert differences(old, new, ignore_text=True) == []
    assert [item.where for item in differences(old, new.replace("- 2", "- 3"), ignore_text=True)] == ["$.cycles[1]"]


def test_figures_of_a_page_count_where_words_are_ignored() -> None:
    page = "<!DOCTYPE html><p>Energy 0.25 J</p><svg><path d='M 1 2'/></svg>"
    assert differences(page, page.replace("Energy", "It took"), ignore_text=True) == []
    assert len(differences(page, page.replace("0.25", "0.26"), ignore_text=True)) == 1
    assert len(differences(page, page.replace("1 2", "1 3"), ignore_text=True)) == 1


def test_another_layout_of_the_same_document_is_a_difference_of_its_own() -> None:
    compact = json.dumps(RECORD)
    assert [item.where for item in differences(document(), compact)] == ["formatting"]
    assert differences(document(), compact, ignore_text=True) == []


def test_exit_codes_and_files_count() -> None:
    old = {"code": 0, "out": "", "err": "", "files": {"report.html": "x\n"}}
    new = {"code": 1, "out": "", "err": "", "files": {}}
    found = compare_outcomes("static/x: lem x", old, new, is_live=False, ignore_text=True)
    assert [(item.part, item.old, item.new) for item in found[:1]] == [("exit code", "0", "1")]
    assert [item.part for item in found[1:]] == ["file report.html"]


def test_a_message_where_there_was_none_counts_whatever_it_says() -> None:
    assert len(differences("", "warning: take care\n", "stderr", ignore_text=True)) == 1


def test_options_of_a_help_text_count_and_its_words_do_not() -> None:
    old = "usage: lem x [--json]\n\n  --json  one document\n"
    assert differences(old, old.replace("one document", "a single document"), ignore_text=True) == []
    assert len(differences(old, old.replace("--json", "--jsn"), ignore_text=True)) == 1


# Intended differences

WORDS = Difference("static/x: lem status", "stderr", "line 3", "hint: is due\n", "hint: expected\n")
VALUE = Difference("recorded/x: lem compare a", "stdout", "$.rows[0].n", "3", "4")
ENTRY = Intended("plain English", case="lem status", part="stderr", where="^hint:")


def test_an_intended_difference_is_counted_and_any_other_is_unexpected() -> None:
    verdict = judge([WORDS, VALUE], [ENTRY], ["static"])
    assert (verdict.intended, verdict.unexpected, verdict.stale) == (1, [VALUE], [])
    assert not verdict.is_equivalent


def test_every_line_that_differs_must_be_meant() -> None:
    more = Difference(WORDS.case, WORDS.part, WORDS.where, WORDS.old, f"{WORDS.new}0.26 J\n")
    assert judge([more], [ENTRY], []).unexpected == [more]


def test_an_entry_is_for_its_suite_command_and_part() -> None:
    others = [
        Difference(WORDS.case.replace("static", "live"), "stderr", WORDS.where, WORDS.old, WORDS.new),
        Difference(WORDS.case.replace("status", "check"), "stderr", WORDS.where, WORDS.old, WORDS.new),
        Difference(WORDS.case, "stdout", WORDS.where, WORDS.old, WORDS.new),
    ]
    assert judge(others, [ENTRY], []).unexpected == others


def test_an_entry_that_matches_nothing_is_stale_once_its_suite_ran() -> None:
    assert judge([], [ENTRY], ["static"]).stale == [ENTRY]
    assert judge([], [ENTRY], ["recorded"]).is_equivalent


# The driver


def test_a_step_is_what_it_wrote_and_what_it_changed(tmp_path: Path) -> None:
    package = tmp_path / "zip" / "lem"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import os, sys\n"
        "def run():\n"
        "    print(sys.argv[1:], os.getcwd())\n"
        "    sys.stderr.write(open('in.txt').read())\n"
        "    open('out.txt', 'w').write('new')\n"
        "    return 3\n"
    )
    scene = {"name": "x", "files": {"in.txt": "given"}, "steps": [["a"], ["b"]]}
    (tmp_path / "scenes").write_text(json.dumps(scene) + "\n")
    command = [tmp_path / "zip", tmp_path / "scenes", tmp_path / "outcomes", tmp_path / "root"]
    driver_program = Path(driver.__file__)
    subprocess.run([sys.executable, str(driver_program), *map(str, command)], check=True)
    name, (first, second) = json.loads((tmp_path / "outcomes").read_text())
    assert name == "x"
    assert first == {
        "code": 3,
        "out": f"['a'] {driver.PLACEHOLDER}/scene\n",
        "err": "given",
        "files": {"out.txt": "new"},
    }
    assert (second["out"], second["files"]) == (f"['b'] {driver.PLACEHOLDER}/scene\n", {})


def test_intended_numbers_match_all_that_differ_and_no_others() -> None:
    (found,) = differences("2 spells of 7 in 1 run\n", "1 spell of 7 in a run\n", ignore_text=True)
    entry = Intended("merged", "lem x", r"-2 \+1 -1")
    assert entry.matches(found)
    (other,) = differences("2 spells of 7 in 1 run\n", "1 spell of 8 in a run\n", ignore_text=True)
    assert not entry.matches(other)
