"""A whole campaign: what it leaves on disk, and what it shows to people, programs, logs and terminals."""

import itertools
import json
import os
import re
from pathlib import Path

import pytest

from lem.meters.requestlog import REQUESTS_FILENAME, read_requests
from lem.record import read_record
from tests.campaign_rig import EIGHT, FOUR, LEM, RUN_TIMEOUT_S, Terminal, campaign_text
from tests.warm import WarmProcess


def test_a_campaign_leaves_a_whole_manifest_whole_results_and_a_table(rig):
    ended = rig.run("--yes", "--structure", "shuffled", "--seed", "7", is_warm=False)
    assert ended.code == 0, ended.err
    rig.assert_no_process_left()
    manifest, records = rig.manifest(), rig.records()
    assert manifest.is_complete
    assert manifest.shuffle_seed == 7
    assert manifest.environment["pytorch.torch"]
    assert [entry.cycle_index for entry in manifest.experiments] == [0, 0, 1, 1]
    for entry, record in zip(manifest.experiments, records, strict=True):
        assert entry.result_path is not None
        assert (rig.folder / entry.result_path).parent.parent.name == entry.exp_id == record.identity.experiment_id
        assert (entry.config_name, entry.config_hash) == (record.identity.config_name, record.identity.config_hash)
        assert record.identity.run_id == manifest.run_id
        assert record.identity.shuffle_seed == 7
        assert record.validity.valid
        assert json.loads((rig.folder / entry.config_path).read_text())["config_name"] == entry.config_name
        assert entry.started_at is not None
        assert entry.completed_at is not None
        assert manifest.created_at <= entry.started_at <= entry.completed_at <= manifest.updated_at
    # Each cycle loads once, whatever order the seed gave.
    loads = [record.validity.engine_load_id for record in records]
    assert loads[0] == loads[1] != loads[2] == loads[3]
    assert [record.validity.engine_reused for record in records] == [False, True, False, True]
    assert "t interval" in ended.out
    assert "Bootstrap interval" in ended.out
    assert "2 configurations" in ended.out
    lines = ended.err.splitlines()
    assert lines[0] == "Generated 2 experiments (0 filtered, 0 warnings)"
    done = [line for line in lines if " ok " in line]
    assert len(done) == 4
    assert re.fullmatch(rf"\d\d:\d\d:\d\d \[4/4\] ok ({FOUR}|{EIGHT}) · cycle 2/2 · .* tok/s · [\d.]+ s", done[-1])
    assert lines[-2] == f"4 completed, 0 failed, 0 left; results in results/demo/{manifest.run_id}"
    assert lines[-1].startswith("next: ")
    assert lines[-1].endswith("-m lem check demo")
    assert "\x1b" not in ended.err + ended.out


def test_every_cycle_draws_arrivals_and_prompts_that_its_configurations_share_and_verify_agrees(rig):
    traffic = "".join(
        f"    traffic_simulation.{name}: [{value}]\n"
        for name, value in {"enabled": "true", "target_qps": 60, "allow_overload": "true"}.items()
    )
    rig.write(campaign_text().replace("    gpus:", f"{traffic}    gpus:").replace("0.01", "0.3"))
    ended = rig.run("--yes")
    assert ended.code == 0, ended.err
    drawn: dict[int, list[list[float]]] = {}
    prompts: dict[int, set[str]] = {}
    for path in map(rig.folder.joinpath, rig.results()):
        cycle = read_record(path).identity.cycle_index
        times = sorted(it.arrived_ns or 0 for it in read_requests(path.parent / REQUESTS_FILENAME).requests)
        drawn.setdefault(cycle, []).append([(two - one) / 1e9 for one, two in itertools.pairwise(times[:10])])
        prompts.setdefault(cycle, set()).add((path.parent / "prompts.jsonl").read_text())
    for first, second in drawn.values():
        assert first == pytest.approx(second, abs=1e-6)
    assert drawn[0][0] != pytest.approx(drawn[1][0], abs=1e-3)
    assert ([len(found) for found in prompts.values()], prompts[0] & prompts[1]) == ([1, 1], set())
    for words in (["verify", "demo"], ["results", "recompute", "demo"]):
        done = rig.lem(*words)
        assert done.code == 0, done.out + done.err


def test_a_sweep_has_a_knee_by_the_service_levels_of_now_without_measuring_again(rig):
    def written(e2e_ms: float) -> None:
        traffic = {"enabled": "true", "allow_overload": "true", "target_qps": "100, 200", "mode": "constant"}
        lines = [f"    traffic_simulation.{name}: [{value}]\n" for name, value in traffic.items()]
        lines += [f"    traffic_simulation.slo: [{{e2e_ms: {e2e_ms}}}]\n"]
        text = campaign_text(outputs=(4,), cycles=1).replace("    gpus:", f"{''.join(lines)}    gpus:")
        rig.write(text.replace("0.01", "0.5"))

    def shown(*words: str) -> str:
        done = rig.lem(*words)
        assert done.code == 0, done.out + done.err
        return str(done.out)

    written(60_000)
    assert rig.run("--yes").code == 0
    before = rig.results()
    (series,) = json.loads(shown("results", "show", "demo", "--json"))["series"]
    assert (series["loads"], series["knee"]["censored_code"]) == ([100, 200], "knee_beyond")
    written(0.000_001)
    resumed = rig.run("--yes", "--resume")
    assert (resumed.code, rig.results()) == (0, before), resumed.err
    assert "< 100" in resumed.out
    (series,) = json.loads(shown("results", "show", "demo", "--json"))["series"]
    assert (series["slo"]["e2e_ms"], series["knee"]["censored_code"]) == (0.000_001, "knee_below")
    (series,) = json.loads(shown("results", "show", "demo", "--json", "--slo", "e2e_ms=60000"))["series"]
    assert (series["knee"]["load"], series["knee"]["at_least"]) == (None, 200)
    shown("report", "demo", "-o", "page.html")
    assert 'id="load-good-target_qps-1"' in (rig.folder / "page.html").read_text()
    shown("verify", "demo")


def test_each_engine_process_of_a_cold_campaign_is_a_new_one_in_a_new_worker(rig):
    rig.write(campaign_text(cycles=1))
    rules = [{"at": "load", "do": "shell", "command": "echo $PPID >> pids"}]
    ended = rig.run("--yes", "-v", "--force-cold-start", rules=rules)
    assert ended.code == 0, ended.err
    assert len(set((rig.folder / "pids").read_text().split())) == 2
    assert len({record.validity.engine_load_id for record in rig.records()}) == 2
    # -v shows each command that is run; the one for the look at the environment serves the first experiment.
    assert len(re.findall(r"(?m)\$ .*launch\.py worker$", ended.err)) == 2


def test_quiet_shows_the_summary_alone_and_logs_the_rest(rig):
    rig.write(campaign_text(cycles=1))
    ended = rig.run("--yes", "-q")
    assert ended.code == 0
    assert ended.err.splitlines() == [f"2 completed, 0 failed, 0 left; results in results/demo/{rig.manifest().run_id}"]
    assert "Single cycle: use --cycles 3+ for confidence intervals" in ended.out
    log = (rig.folder / ".state" / "demo" / "lem.log").read_text()
    assert "Generated 2 experiments (0 filtered, 0 warnings)" in log
    assert re.search(
        rf"^\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO lem\.campaign: \[1/2\] ok {FOUR} · cycle 1/1", log, re.MULTILINE
    )
    assert "2 completed, 0 failed, 0 left" in log


def test_a_reader_of_the_events_that_goes_away_does_not_end_the_campaign(rig):
    rig.write(campaign_text(cycles=1))
    reader, writer = os.pipe()
    with open(rig.folder / "stderr", "wb") as err:
        outputs = [Path(f"/proc/{os.getpid()}/fd/{descriptor}") for descriptor in (writer, err.fileno())]
        process = WarmProcess(rig.command("--yes", "--json")[len(LEM) :], rig.folder, rig.environ(), outputs)
    os.close(writer)
    first = os.read(reader, 10)
    os.close(reader)
    assert process.wait(120) == 0
    assert first.startswith(b'{"event"')
    assert rig.statuses() == ["completed", "completed"]


def test_a_terminal_that_goes_away_does_not_end_a_campaign_that_ignores_hangups(rig):
    rig.write(campaign_text(cycles=1, config_gap_seconds=0.2))
    command = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *rig.command("--yes", "--no-color")]
    terminal = Terminal(command, rig.folder, rig.environ())
    terminal.read_until("cycle 1/1")
    assert "\x1b[3" not in terminal.shown  # no colour
    assert terminal.close() == 0
    assert rig.statuses() == ["completed", "completed"]


@pytest.mark.parametrize("options", [["--json"], []])
def test_results_that_cannot_be_shown_are_kept_and_that_is_said(rig, options):
    rig.write(campaign_text(outputs=(4,), cycles=1))
    (rig.folder / "stderr").touch()
    outputs = (Path("/dev/full"), rig.folder / "stderr")
    command = rig.command("--yes", *options)
    assert WarmProcess(command[len(LEM) :], rig.folder, rig.environ(), outputs).wait(RUN_TIMEOUT_S) == 0
    assert "no more output on stdout: No space left on device" in (rig.folder / "stderr").read_text()
    assert rig.statuses() == ["completed"]


def _screens(shown):
    """What stood on the live line, one after the other, without colours."""
    plain = re.sub(r"\x1b\[\d*m", "", shown)
    return [part.split("\r\n")[-1] for part in plain.split("\r\x1b[2K")[1:]]


def test_on_a_terminal_there_is_one_live_line_below_the_lines_that_stay(rig):
    rig.write(campaign_text(cycles=1, config_gap_seconds=0.2))
    terminal = rig.terminal("--yes")
    assert terminal.wait() == 0, terminal.shown
    live = _screens(terminal.shown)
    assert live[0] == f"[0/2] {FOUR} · pytorch · cycle 1/1 · starting"
    assert max(map(len, live)) <= 79
    assert any("measuring" in line for line in live)
    assert any(re.fullmatch(r"\[1/2\] gap, at most 0\.2 s · ends at .*", line) for line in live)
    assert any(re.search(r"cycle 1/1 · .* · ends at \d\d:\d\d", line) for line in live)
    shown = terminal.shown
    assert f"\x1b[32mok\x1b[0m {EIGHT} · cycle 1/1" in shown
    assert "\x1b[" not in re.sub(r"\x1b\[(2K|\d*m)", "", shown)
    # Nothing of the live line is left before the table and the last words.
    assert shown.index("Single cycle") > shown.rindex("\r\x1b[2K")
    *_, last, following = shown.rstrip().splitlines()
    assert last.endswith(f"results in results/demo/{rig.manifest().run_id}")
    assert following.startswith("next: ")
