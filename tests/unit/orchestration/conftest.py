"""A scripted `docker` command for what drives containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doubles.fake_docker import FakeDocker


@pytest.fixture
def fake(tmp_path: Path) -> FakeDocker:
    return FakeDocker.install(tmp_path / "docker")
