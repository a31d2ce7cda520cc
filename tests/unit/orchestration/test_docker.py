"""What the Docker client is asked beside compose."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem.orchestration.docker import Docker, parse_version
from tests.doubles.fake_docker import FakeDocker


@pytest.mark.parametrize(
    ("container", "at_s", "expected"),
    [("mine", 150.0, True), ("mine", 99.0, False), ("mine", 201.0, False), ("another", 150.0, False)],
)
def test_a_container_was_out_of_memory_when_it_was_told_so_in_that_time(
    tmp_path: Path, container: str, at_s: float, expected: bool
) -> None:
    fake = FakeDocker.install(tmp_path / "docker", out_of_memory=[(container, at_s)])
    assert Docker(fake.environ()).was_out_of_memory("mine", 100.0, 200.0) is expected


def test_an_engine_that_is_gone_knows_of_no_want_of_memory(tmp_path: Path) -> None:
    fake = FakeDocker.install(tmp_path / "docker", out_of_memory=[("mine", 150.0)], daemon="down")
    assert Docker(fake.environ()).was_out_of_memory("mine", 100.0, 200.0) is False


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("2.17.0\n", (2, 17, 0)),
        ("v2.17.2-desktop.1", (2, 17, 2)),
        ("2.26.1-4\n", (2, 26, 1)),
        ("Docker Compose version v2.39.4", (2, 39, 4)),
        ("5.0.1", (5, 0, 1)),
        ("dev", None),
    ],
)
def test_versions_are_read_in_every_form(text: str, version: tuple[int, ...] | None) -> None:
    assert parse_version(text) == version
