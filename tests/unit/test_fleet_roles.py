"""Roles tell what they take: each default is in the argument specs, each option has a default or is required."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def options(role: str) -> dict[str, dict[str, Any]]:
    """Every option of every entry point."""
    specs = load(ROOT / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"]
    return {name: option for spec in specs.values() for name, option in spec["options"].items()}


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_argument_specs_name_the_same_variables(role: str) -> None:
    defaults = load(ROOT / "roles" / role / "defaults" / "main.yml")
    specified = options(role)
    assert set(defaults) == {name for name, option in specified.items() if not option.get("required")}
    assert all(name.startswith(f"{role}_") for name in specified)


@pytest.mark.parametrize("role", ROLES)
def test_defaults_that_are_plain_values_are_the_ones_that_the_specs_tell(role: str) -> None:
    defaults, specified = load(ROOT / "roles" / role / "defaults" / "main.yml"), options(role)
    told = {name: option["default"] for name, option in specified.items() if "default" in option}
    plain = {name: value for name, value in defaults.items() if "{{" not in str(value) and name in told}
    assert plain == {name: told[name] for name in plain}


@pytest.mark.parametrize("role", ROLES)
def test_defaults_are_documented_where_they_stand(role: str) -> None:
    text = (ROOT / "roles" / role / "defaults" / "main.yml").read_text(encoding="utf-8")
    for block in re.split(r"\n\s*\n", text.removeprefix("---\n")):
        assert block.strip().startswith("#"), block


def test_every_entry_point_has_its_tasks_and_is_specified() -> None:
    for role in ROLES:
        specs = load(ROOT / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"]
        assert all((ROOT / "roles" / role / "tasks" / f"{name}.yml").is_file() for name in specs)


def test_only_what_ansible_core_brings_is_called() -> None:
    playbooks = [*(ROOT / "playbooks").rglob("*.yml"), *(ROOT / "roles").rglob("*.yml")]
    called = {
        name
        for path in playbooks
        for name in re.findall(r"^\s*(?:- )?(\w+\.\w+\.\w+):", path.read_text(), re.MULTILINE)
    }
    assert called
    assert {name for name in called if not name.startswith("ansible.builtin.")} == set()


needs_ansible = pytest.mark.skipif(
    not PLAYBOOK.exists(),
    reason="ansible-core is not installed in this environment (make test installs it on Python 3.11 and later)",
)


Play = tuple[dict[str, Any], list[dict[str, Any]]]


def play(folder: Path, *plays: Play) -> list[Any]:
    """Plays on this machine, each with its variables and tasks, and the `answer` that each ends with."""
    here = {"hosts": "localhost", "connection": "local", "gather_facts": False}
    documents = []
    for number, (variables, tasks) in enumerate(plays):
        copy = {"content": "{{ answer | to_json }}", "dest": str(folder / f"answer-{number}"), "mode": "0600"}
        documents.append({**here, "vars": variables, "tasks": [*tasks, {"ansible.builtin.copy": copy}]})
    (folder / "play.yml").write_text(yaml.safe_dump(documents), encoding="utf-8")
    command = [str(PLAYBOOK), str(folder / "play.yml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)
    assert ended.returncode == 0, ended.stdout
    return [json.loads((folder / f"answer-{number}").read_text()) for number in range(len(plays))]


# What daemon.json holds (None: there is no such file), and the options that are read from it.
DAEMON: dict[str | None, dict[str, Any]] = {None: {}, "": {}, " \n": {}, '{"debug": true}': {"debug": True}}


@needs_ansible
def test_options_of_docker_are_read_also_where_there_are_none(tmp_path: Path) -> None:
    (block,) = load(ROOT / "roles" / "lem_docker" / "tasks" / "main.yml")
    (merging,) = (task for task in block["block"] if "lem_docker_present" in task.get("vars", {}))
    plays: list[Play] = []
    for text in DAEMON:
        found = {} if text is None else {"content": base64.b64encode(text.encode()).decode()}
        given = {"lem_docker_daemon_json": found, "lem_docker_daemon_options": {}}
        plays.append(({**merging["vars"], **given, "answer": "{{ lem_docker_present }}"}, []))
    assert dict(zip(DAEMON, play(tmp_path, *plays), strict=True)) == DAEMON


def assertion(path: str, name: str) -> Any:
    """The task of that name in a file, which may hold plays or tasks."""
    items = load(ROOT / path)
    tasks = [task for item in items for task in item.get("tasks", [item])]
    (found,) = (task for task in tasks if task.get("name") == name)
    return found


_UNITS = "lem-campaign@{}.service loaded {} dead lem campaign a\n"
_NAME = ("roles/lem_campaign/tasks/main.yml", "Check that the name is valid for a unit", "lem_campaign_name")
_TOLERANCE = (
    "playbooks/run_campaign.yml",
    "Check that the anchor tolerance is a percentage",
    "lem_fleet_anchor_tolerance",
)
_RUNNING = ("playbooks/uninstall.yml", "Check that no campaign is running", "lem_uninstall_units")


# Of each check: values that it takes, and values that it refuses.
CHECKS: dict[tuple[str, str, str], tuple[list[Any], list[Any]]] = {
    _NAME: (["demo", "0-a_b"], ["demo\n", "demo\n[Service]", "x demo", "-demo", "../demo", "demo\x1b", ""]),
    _TOLERANCE: (
        ["5%", "2.5%", ".5%", "+1e9%"],
        ["5%\n", "5", "x5%", "5; rm%", "..%", "5%5%", "5%\n--x %", "."],
    ),
    _RUNNING: (
        [{"stdout": ""}, {"stdout": _UNITS.format("a", "inactive") + "x lem-campaign@b.service loaded active x"}],
        [{"stdout": _UNITS.format("a", "inactive") + _UNITS.format("b", "active")}],
    ),
}


@needs_ansible
def test_a_check_of_a_role_takes_the_whole_value_and_nothing_beside_it(tmp_path: Path) -> None:
    plays: list[Play] = []
    for (path, name, variable), (good, bad) in CHECKS.items():
        task = assertion(path, name)
        module = {**task["ansible.builtin.assert"], "fail_msg": "refused"}
        tasks: list[dict[str, Any]] = [
            {
                "name": f"value {number}",
                "ansible.builtin.assert": module,
                "vars": {**task.get("vars", {}), variable: value},
                "register": f"answer_{number}",
                "ignore_errors": True,
            }
            for number, value in enumerate([*good, *bad])
        ]
        answer = ["{{ answer_" + str(number) + " is failed }}" for number in range(len(tasks))]
        plays.append(({"answer": answer}, tasks))
    for found, (place, (good, bad)) in zip(play(tmp_path, *plays), CHECKS.items(), strict=True):
        assert found == [False] * len(good) + [True] * len(bad), place


OUTCOMES = {"active": "still running", "inactive": "ended", "failed": "failed: ActiveState=failed"}


@needs_ansible
def test_the_state_of_a_unit_is_read_from_its_own_line(tmp_path: Path) -> None:
    """The text of the status, in which campaigns write names, is beside it."""
    poll = assertion("roles/lem_campaign/tasks/poll.yml", "Poll the campaign")
    record = assertion("roles/lem_campaign/tasks/wait.yml", "Record how it ended")
    outcome = record["ansible.builtin.set_fact"]["lem_campaign_outcome"]
    plays: list[Play] = []
    for state in OUTCOMES:
        lines = [f"ActiveState={state}", "StatusText=[1/2] ActiveState=failed ActiveState=inactive"]
        seen = {"stdout": "\n".join(lines), "stdout_lines": lines}
        answer = [outcome, "{{ (" + poll["until"] + ") | bool }}"]
        plays.append(({"lem_campaign_seen": seen, "lem_campaign_deadline": 4e9, "answer": answer}, []))
    for (found, is_over), (state, expected) in zip(play(tmp_path, *plays), OUTCOMES.items(), strict=True):
        assert found.startswith(expected)
        assert str(is_over) == str(state != "active")


@needs_ansible
@pytest.mark.parametrize("playbook", ["run_campaign", "schedule_campaign", "site"])
def test_a_limit_without_the_controller_is_refused_before_a_host_is_reached(tmp_path: Path, playbook: str) -> None:
    (tmp_path / "hosts.yml").write_text("all: {hosts: {gpu1: {ansible_host: 192.0.2.1}}}\n")
    inventory = ["-i", str(ROOT / "inventory"), "-i", str(tmp_path / "hosts.yml")]
    command = [str(PLAYBOOK), *inventory, "--limit", "gpu1", str(ROOT / "playbooks" / f"{playbook}.yml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "add localhost, such as --limit gpu1,localhost" in ended.stdout
    assert re.search(r"gpu1 +: ok=0 +changed=0 +unreachable=0 +failed=1", ended.stdout)
