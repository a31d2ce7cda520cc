"""What the tests of orchestration share: a scripted `docker` command, and a campaign without processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaign_doubles import Place
from tests.doubles.fake_docker import FakeDocker


@pytest.fixture
def fake(tmp_path: Path) -> FakeDocker:
    return FakeDocker.install(tmp_path / "docker")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    return Place(tmp_path)
