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


@pytest.mark.skipif(
    not PLAYBOOK.exists(),
    reason="ansible-core is not installed in this environment (make test installs it on Python 3.11 and later)",
)
@pytest.mark.parametrize(("text", "options"), [(None, {}), ("", {}), (" \n", {}), ('{"debug": true}', {"debug": True})])
def test_options_of_docker_are_read_also_where_there_are_none(
    tmp_path: Path, text: str | None, options: dict[str, Any]
) -> None:
    """`text` is what daemon.json holds; None is no such file."""
    (block,) = load(ROOT / "roles" / "lem_docker" / "tasks" / "main.yml")
    (merging,) = (task for task in block["block"] if "lem_docker_present" in task.get("vars", {}))
    found = {} if text is None else {"content": base64.b64encode(text.encode()).decode()}
    copy = {"content": "{{ lem_docker_present | to_json }}", "dest": str(tmp_path / "read"), "mode": "0600"}
    play = {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "vars": {**merging["vars"], "lem_docker_daemon_json": found, "lem_docker_daemon_options": {}},
        "tasks": [{"ansible.builtin.copy": copy}],
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]), encoding="utf-8")
    ended = subprocess.run(
        [str(PLAYBOOK), str(tmp_path / "play.yml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stdout
    assert json.loads((tmp_path / "read").read_text()) == options
