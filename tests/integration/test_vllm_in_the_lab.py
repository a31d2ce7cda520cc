"""The tests that need vLLM, run by the lab's Python, which has it: with pytest and its plugins from this one's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.places import Places
from tests.needs import RAN_ELSEWHERE

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("backend", "options", "processes", "architectures", "served")
SUITE = tuple(f"test_vllm_{name}.py" for name in NAMES)
TIMEOUT_S = 1800

# The lab's own packages come first; what it lacks is found in those of this environment.
RUN = "import sys; sys.path += sys.argv.pop(1).split(':'); import pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.needs("environments")
@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("cases", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_the_vllm_backend_holds_on_a_real_vllm(record_property: Callable[[str, object], None], cases: str) -> None:
    python = Places.of().environment("vllm") / "bin/python"
    packages = ":".join(path for path in sys.path if path.endswith("site-packages"))
    # One thread: other tests need the machine too. CI's demands are for the run that started this one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "false"}
    finished = subprocess.run(
        [str(python), "-c", RUN, packages, "-q", "-rpfE", "--tb=short", "-p", "no:logging", "-p", "no:cacheprovider"]
        + ["-m", cases]
        + [str(ROOT / "tests/integration" / name) for name in SUITE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    record_property(RAN_ELSEWHERE, ("the lab's environment of vLLM", _tests_in(finished.stdout)))
    assert finished.returncode == 0, f"{finished.stdout[-20000:]}\n{finished.stderr[-4000:]}"
    assert " passed" in finished.stdout
    assert "NOT RUN" not in finished.stdout


def _tests_in(output: str) -> list[str]:
    """The node ids in the short summary of pytest."""
    return re.findall(r"^(?:PASSED|FAILED|ERROR) (\S+::.+?)(?: - .*)?$", output, re.MULTILINE)
