from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker_rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig.leaving_nothing(tmp_path) as rig:
        yield rig
