"""`lem experiment`: one experiment here and now, by real processes with the trivial engine."""

import json
import signal
import sys
from pathlib import Path

import pytest

from lem.base.units import format_energy
from lem.record import decode_record
from tests.campaign_rig import LEM, CampaignRig, Running

EXPERIMENT = """\
model: none
max_output_tokens: 4
gpus: []
warmup: {enabled: false}
measurement: {min_window_sec: 0.01, max_wait_pct: null, max_foreign_pct: null}
prompts: {type: synthetic, input_tokens: 3, sample_size: 2}
"""


@pytest.fixture
def rig(tmp_path):
    with CampaignRig(tmp_path, EXPERIMENT).cleaned() as rig:
        yield rig


def _start(rig, *words, rules=(), **environ):
    return Running([*LEM, "experiment", "c.yaml", *words], rig.folder, rig.environ(rules, **environ), is_warm=True)


def _run(rig, *words, rules=(), **environ):
    return _start(rig, *words, rules=rules, **environ).wait()


def test_an_experiment_shows_its_result_and_where_it_lies(rig):
    ended = _run(rig, "--yes", "-o", "out")
    assert ended.code == 0, ended.err
    rig.assert_no_process_left()
    assert "c · cycle 1 · attempt 1\n" in ended.out
    assert "valid       yes\n" in ended.out
    path = rig.folder / ended.out.splitlines()[-1]
    assert path.match("out/c/*/*/attempt-1/result.json")
    assert decode_record(json.loads(path.read_text())).work.output_tok
    assert sorted(item.name for item in rig.folder.iterdir() if item.is_dir()) == ["out"]


def test_an_experiment_without_a_file_is_measured_and_suggests_the_next_command(rig):
    options = ("warmup.enabled=false", "measurement.min_window_sec=0.01", "measurement.max_wait_pct=null", "gpus=[]")
    more = ("measurement.max_foreign_pct=null", "prompts={type: synthetic, input_tokens: 3, sample_size: 2}")
    words = ["--model", "none", "--set", "max_output_tokens=4", "-o", "out"]
    words += [word for option in (*options, *more) for word in ("--set", option)]
    ended = rig.lem("experiment", *words)
    assert ended.code == 0, ended.err
    path = rig.folder / ended.out.splitlines()[-1]
    assert path.match("out/none/*/*/attempt-1/result.json")
    assert decode_record(json.loads(path.read_text())).work.output_tok
    assert ended.err.splitlines()[-1].endswith("-m lem check none --results-dir out")


def test_the_energy_of_an_experiment_on_the_cpu_is_shown_as_it_is_in_its_record(rig):
    # A window of 3 s, since the load of the CPU is read once a second.
    words = ("--set", "measurement.energy=tdp_estimate", "--set", "measurement.cpu_tdp_w=200")
    ended = _run(rig, "-q", "-o", "out", "--set", "measurement.min_window_sec=3", *words)
    assert ended.code == 0, ended.err
    path = rig.folder / ended.out.splitlines()[-1]
    energy_j = decode_record(json.loads(path.read_text())).energy.primary_j
    assert energy_j.value is not None, energy_j.null_reason
    assert (energy_j.source, energy_j.scope) == ("tdp_estimate", "cpu_package")
    (line,) = (text for text in ended.out.splitlines() if text.startswith("energy"))
    assert line.split(maxsplit=1)[1].startswith(f"{format_energy(energy_j.value)} (an estimate)")


def test_several_cycles_are_a_table_and_their_records_one_document(rig):
    shown, told = (_run(rig, "--cycles", "2", *words, "-q") for words in ((), ("--json",)))
    assert (shown.code, told.code) == (0, 0)
    assert "1 configuration · 2 cycles" in shown.out
    document = json.loads(told.out)
    records = [decode_record(item["record"]) for item in document["results"]]
    assert [record.identity.cycle_index for record in records] == [0, 1]
    assert {record.identity.run_id for record in records} == {document["run_id"]}
    assert records[0].validity.engine_load_id != records[1].validity.engine_load_id
    assert document["errors"] == []


def test_a_failed_experiment_says_why_and_gives_1(rig):
    rules = [{"at": "load", "do": "fail", "kind": "model", "permanent": True}]
    ended = _run(rig, "--json", rules=rules)
    assert ended.code == 1
    assert json.loads(ended.out)["errors"] == ["as scripted"]
    assert "failed c · cycle 1/1: as scripted" in ended.err


@pytest.mark.parametrize("is_json", [False, True])
def test_a_full_disk_is_told_and_what_was_measured_is_shown(rig, is_json):
    fault = {
        "journal": str(rig.folder / "journal"),
        "process": "host",
        "event": "lem.write",
        "nth": 8,
        "action": "enospc",
    }
    words = ["--json"] if is_json else []
    ended = _run(rig, "--cycles", "2", "-q", *words, LEMTEST_FAULT=json.dumps(fault))
    assert ended.code == 1
    assert "no space left on device" in ended.err
    assert "--resume" not in ended.err, "an experiment has nothing to resume"
    if is_json:
        document = json.loads(ended.out)
        assert (len(document["results"]), len(document["errors"])) == (1, 1)
    else:
        assert "c · cycle 1 · attempt 1\n" in ended.out


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_leaves_no_process(rig, signum, code):
    running = _start(rig, rules=[{"at": "generate", "do": "hang"}])
    running.wait_for_text("measuring")
    running.send(signum)
    assert running.wait().code == code
    rig.assert_no_process_left()


def test_a_dry_run_shows_the_experiment_and_writes_nothing(rig):
    text, told = (_run(rig, "--dry-run", "--preset", "quick-test", *words) for words in ((), ("--json",)))
    assert (text.code, told.code) == (0, 0)
    document = json.loads(told.out)
    assert (document["name"], document["cycles"], document["results_dir"]) == ("c", 1, "results/c")
    assert Path(document["python"]).samefile(sys.executable)
    assert document["config"]["max_output_tokens"] == 4, "the file wins over the preset"
    assert document["config"]["max_input_tokens"] == 64
    assert '"max_input_tokens": 64' in text.out
    assert [item.name for item in rig.folder.iterdir() if item.is_dir()] == []


@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_an_image_is_refused_without_a_container_also_by_a_dry_run(rig, words):
    ended = _run(rig, *words, "--set", "image=engine:1")
    assert (ended.code, ended.out) == (2, "")
    assert "image: engine:1 requires containers" in ended.err
    assert [item.name for item in rig.folder.iterdir() if item.is_dir()] == []
