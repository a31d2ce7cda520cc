"""Roles tell what they take: each default is in the argument specs, each option has a default or is required."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
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
