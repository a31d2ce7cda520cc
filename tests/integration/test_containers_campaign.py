"""Campaigns in real containers, with the trivial engine in them: what they leave, and that they leave nothing else."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from pathlib import Path

import pytest

from lem.meters.samples import PART_FILENAME, PartReader
from tests.campaign_rig import EIGHT, FOUR
from tests.container_rig import ContainerRig, container_campaign, docker
from tests.doubles.fault_injector import VARIABLE, Fault
from tests.processes import wait_for
from tests.records import codes
from tests.webhook import SECRET, serving_webhook

pytestmark = [pytest.mark.needs("lab"), pytest.mark.timeout(600)]


@pytest.fixture
def rig(tmp_path):
    with ContainerRig(tmp_path).cleaned() as rig:
        yield rig


def _found(path: Path) -> bool | None:
    return path.exists() or None


def test_two_backends_take_turns_in_containers_of_their_own(rig):
    rig.write(container_campaign(backends=("pytorch", "vllm"), cycles=2, structure="shuffled"))
    ended = rig.run("--yes", "--json")
    assert ended.code == 0, ended.err
    assert rig.statuses() == ["completed"] * 8
    entries = rig.manifest().experiments
    assert {entry.container for entry in entries} == {"pytorch", "vllm"}
    assert all(entry.container == entry.backend for entry in entries)
    image = docker("image", "inspect", "--format", "{{.Id}}", "lem-lab-base").strip()
    for record in rig.records():
        assert (record.environment.executor, record.environment.image) == ("docker", image)
        assert (record.interference.stopped_s, record.interference.suspended_s) == (0.0, 0.0)
        assert record.interference.foreign_ratio is not None
    assert rig.containers(is_all=True) == {}
    rig.assert_nothing_inside()
    rig.assert_no_process_left()


def test_a_container_that_is_paused_in_the_window_makes_the_result_invalid_and_it_is_measured_again(rig):
    # On the CPU the sampler runs on the host, which finds the engine by its number in the container.
    rig.write(container_campaign(cycles=1, outputs=(4,)).replace("    prompts:", "    gpus: [[]]\n    prompts:"))
    rules = [{"at": "generate", "do": "sleep", "seconds": 5.0, "once": "/tmp/slept"}]
    running = rig.start("--yes", "--json", rules=rules)
    running.wait_for_event("phase", phase="window")
    (container,) = rig.containers().values()
    docker("pause", container)
    wait_for(lambda: _has_seen_a_stop(rig.folder) or None)
    docker("unpause", container)
    ended = running.wait()
    assert ended.code == 0, ended.err
    first, second = rig.records()
    assert codes(first.validity.invalid_reasons) == ["engine_stopped"]
    assert second.validity.valid, second.validity.invalid_reasons


def _has_seen_a_stop(folder: Path) -> bool:
    (path,) = folder.rglob(PART_FILENAME)
    return any(row.stopped_s for row in PartReader(path).read().usage)


def test_results_belong_to_the_caller_and_secrets_are_nowhere(rig):
    planted = ("hf_planted_token", SECRET)
    with serving_webhook() as webhook:
        # By name it would stand in no file at all; written out it must not go further than the user's own file.
        rig.write(container_campaign(more=f"notification: {{webhook_url: '{webhook.url}'}}\n"))
        options = ("--yes", "--json", "-vv")
        # Of a fork, no command line is seen.
        rules = [{"at": "generate", "do": "hang"}]
        running = rig.start(*options, HF_TOKEN=planted[0], rules=rules, is_warm=False)
        running.wait_for_event("phase", phase="window")
        commands = command_lines()
        configured = docker("inspect", *rig.containers().values())
        running.send(15)
        stopped = running.wait()
        assert stopped.code == 143
        ended = rig.run(*options, "--resume", HF_TOKEN=planted[0])
        assert ended.code == 0, ended.err
        path, _kind, message = webhook.next()
        assert SECRET in path
    assert any("worker" in line for line in commands), "the container's processes are looked at too"
    for secret in planted:
        assert not [line for line in commands if secret in line]
        assert secret not in configured
        assert secret not in stopped.out + stopped.err + ended.out + ended.err + json.dumps(message)
        for path in rig.folder.rglob("*"):
            if path.is_file() and path.name != "c.yaml":
                assert secret.encode() not in path.read_bytes(), path
    for path in rig.folder.rglob("*"):
        assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid()), path


def command_lines():
    """What every process of this machine was started with; those in containers are among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_a_model_that_is_a_folder_is_seen_by_the_path_it_has_here(rig, tmp_path):
    model = rig.folder / "a model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    seen = rig.folder / "results" / "seen"
    rules = [{"at": "load", "do": "shell", "command": f"cat 'a model/config.json' '{model}/config.json' > '{seen}'"}]
    rig.write(container_campaign(outputs=(4,)).replace("model: none", "model: a model"))
    ended = rig.run("--yes", rules=rules)
    assert ended.code == 0, ended.err
    assert seen.read_text() == "{}{}"


@pytest.mark.parametrize(
    ("more", "options", "containers"),
    [("cold_start: {restart_container: true}\n", (), 2), ("", ("--force-cold-start",), 1)],
)
def test_each_experiment_of_a_cold_start_loads_anew(rig, more, options, containers):
    rig.write(container_campaign(more=more))
    hosts = rig.folder / "results" / "hosts"
    rules = [{"at": "load", "do": "shell", "command": f"cat /etc/hostname >> '{hosts}'"}]
    ended = rig.run("--yes", *options, rules=rules)
    assert ended.code == 0, ended.err
    loaded_in = hosts.read_text().split()
    assert (len(loaded_in), len(set(loaded_in))) == (2, containers)
    assert not any(record.validity.engine_reused for record in rig.records())


def test_two_campaigns_on_one_project_exclude_each_other(rig, tmp_path):
    running = rig.start("--yes", "--json", rules=[{"at": "generate", "do": "hang"}])
    running.wait_for_event("phase", phase="window")
    other = tmp_path / "elsewhere"
    other.mkdir()
    rival = ContainerRig(other)
    ended = rival.run("--yes", LEM_LOCK_DIR=str(rig.folder / "locks"))
    assert ended.code == 5
    assert "compose project lem-demo is locked by pid" in ended.err
    assert list(rig.containers()) == ["pytorch"], "the containers of the first one are left alone"
    running.send(15)
    assert running.wait().code == 143


def test_the_plan_says_where_it_would_run_and_writes_nothing(rig):
    before = rig.tree()
    ended = rig.run("--dry-run")
    assert ended.code == 0, ended.err
    text = " ".join(ended.out.split())
    assert "docker, services pytorch of" in text
    assert "lem-lab-base (pytorch)" in text
    assert rig.tree() == before
    assert rig.containers(is_all=True) == {}


def once(rig, rule, name):
    """The rule, for the first time alone; the file that says so lies where the container can write."""
    (rig.folder / "results").mkdir(exist_ok=True)
    return {**rule, "once": str(rig.folder / "results" / name)}


def test_a_resume_with_nothing_left_to_run_takes_down_what_a_killed_run_left(rig):
    journal = rig.folder / "journal"
    # The last of two experiments is measured, and its host dies before it writes that down.
    fault = Fault(str(journal), "host", "lem.transition", 4, "kill")
    rig.run("--yes", **{VARIABLE: fault.to_json()})
    assert rig.containers(is_all=True)
    resumed = rig.run("--resume")
    assert resumed.code == 0, resumed.err
    assert rig.statuses() == ["completed", "completed"]
    assert rig.containers(is_all=True) == {}


def test_restarts_that_are_used_up_stop_the_campaign_with_the_rest_pending(rig):
    rig.write(container_campaign(outputs=(4, 8, 12), more="health_check: {max_restarts: 1}\n"))
    hang = {"at": "generate", "do": "hang"}
    rules = [once(rig, {**hang, "when": {"max_output_tokens": value}}, str(value)) for value in (4, 8)]
    running = rig.start("--yes", "--json", rules=rules)
    for name in (FOUR, EIGHT):
        started = running.wait_for_event("experiment_started", config_name=name)
        running.wait_for_event("phase", phase="window", exp_id=started["exp_id"])
        mark = rig.folder / "results" / name.rpartition("=")[2]
        wait_for(functools.partial(_found, mark))  # else the next attempt hangs, for the first time
        docker("kill", rig.containers()["pytorch"])
    ended = running.wait()
    assert ended.code == 1
    assert "is still unhealthy after 1 restart: " in ended.err
    assert rig.statuses() == ["completed", "pending", "pending"]
    assert rig.run("--yes", "--resume").code == 0
    assert set(rig.statuses()) == {"completed"}
