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


def play(folder: Path, variables: dict[str, Any], tasks: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """A play on this machine."""
    document = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": variables, "tasks": tasks}
    (folder / "play.yml").write_text(yaml.safe_dump([document]), encoding="utf-8")
    command = [str(PLAYBOOK), str(folder / "play.yml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)


@needs_ansible
@pytest.mark.parametrize(("text", "options"), [(None, {}), ("", {}), (" \n", {}), ('{"debug": true}', {"debug": True})])
def test_options_of_docker_are_read_also_where_there_are_none(
    tmp_path: Path, text: str | None, options: dict[str, Any]
) -> None:
    """`text` is what daemon.json holds; None is no such file."""
    (block,) = load(ROOT / "roles" / "lem_docker" / "tasks" / "main.yml")
    (merging,) = (task for task in block["block"] if "lem_docker_present" in task.get("vars", {}))
    found = {} if text is None else {"content": base64.b64encode(text.encode()).decode()}
    copy = {"content": "{{ lem_docker_present | to_json }}", "dest": str(tmp_path / "read"), "mode": "0600"}
    variables = {**merging["vars"], "lem_docker_daemon_json": found, "lem_docker_daemon_options": {}}
    ended = play(tmp_path, variables, [{"ansible.builtin.copy": copy}])
    assert ended.returncode == 0, ended.stdout
    assert json.loads((tmp_path / "read").read_text()) == options


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


@needs_ansible
@pytest.mark.parametrize(
    ("place", "good", "bad"),
    [
        (_NAME, ["demo", "0-a_b"], ["demo\n", "demo\n[Service]", "x demo", "-demo", "../demo", "demo\x1b", ""]),
        (_TOLERANCE, ["5%", "2.5%", ".5%", "+1e9%"], ["5%\n", "5", "x5%", "5; rm%", "..%", "5%5%", "5%\n--x %", "."]),
        (
            _RUNNING,
            [{"stdout": ""}, {"stdout": _UNITS.format("a", "inactive") + "x lem-campaign@b.service loaded active x"}],
            [{"stdout": _UNITS.format("a", "inactive") + _UNITS.format("b", "active")}],
        ),
    ],
)
def test_a_check_of_a_role_takes_the_whole_value_and_nothing_beside_it(
    tmp_path: Path, place: tuple[str, str, str], good: list[Any], bad: list[Any]
) -> None:
    path, name, variable = place
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
    answers = ["{{ answer_" + str(number) + " is failed }}" for number in range(len(tasks))]
    copy = {"content": "{{ answers | to_json }}", "dest": str(tmp_path / "answers"), "mode": "0600"}
    ended = play(tmp_path, {}, [*tasks, {"ansible.builtin.copy": copy, "vars": {"answers": answers}}])
    assert ended.returncode == 0, ended.stdout
    assert json.loads((tmp_path / "answers").read_text()) == [False] * len(good) + [True] * len(bad)


@needs_ansible
@pytest.mark.parametrize(
    ("state", "outcome"), [("active", "still running"), ("inactive", "ended"), ("failed", "failed: ActiveState=failed")]
)
def test_the_state_of_a_unit_is_read_from_its_own_line(tmp_path: Path, state: str, outcome: str) -> None:
    """The text of the status, in which campaigns write names, is beside it."""
    poll = assertion("roles/lem_campaign/tasks/poll.yml", "Poll the campaign")
    record = assertion("roles/lem_campaign/tasks/wait.yml", "Record how it ended")
    lines = [f"ActiveState={state}", "StatusText=[1/2] ActiveState=failed ActiveState=inactive"]
    variables = {
        "lem_campaign_seen": {"stdout": "\n".join(lines), "stdout_lines": lines},
        "lem_campaign_deadline": 4e9,
        "answers": [record["ansible.builtin.set_fact"]["lem_campaign_outcome"], "{{ (" + poll["until"] + ") | bool }}"],
    }
    copy = {"content": "{{ answers | to_json }}", "dest": str(tmp_path / "answers"), "mode": "0600"}
    ended = play(tmp_path, variables, [{"ansible.builtin.copy": copy}])
    assert ended.returncode == 0, ended.stdout
    found, is_over = json.loads((tmp_path / "answers").read_text())
    assert found.startswith(outcome)
    assert str(is_over) == str(state != "active")
