"""Bad weather over campaigns in real containers: it is explained, the others complete, and so does the resume."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import wait_for
from tests.weather.cases import CASES
from tests.weather.rig import WeatherRig
from tests.weather.verdict import format_table, judge_all

pytestmark = [pytest.mark.needs("lab", "gcc"), pytest.mark.timeout(1200)]  # the first waits for all

JOBS = 4

# One for each thing that lem does about weather; `make test-long` runs the others.
IN_EVERY_RUN = {
    "daemon lost in the middle",
    "image missing",
    "container killed",
    "container out of memory",
    "worker falls silent",
    "worker prints garbage",
    "host killed while it generates",
    "Ctrl-C",
    "disk full in the results",
    "GPU lost in a running container",
}


@pytest.fixture(scope="module")
def verdicts(request, tmp_path_factory):
    """The verdict of each weather that was asked for; they run side by side, since most of their time is waiting."""
    asked = {item.callspec.params["name"] for item in request.session.items if "verdicts" in item.fixturenames}
    folder = tmp_path_factory.mktemp("weather")
    found = judge_all([case for case in CASES if case.name in asked], folder, jobs=JOBS)
    print(format_table(found))
    return {verdict.weather: verdict for verdict in found}


@pytest.mark.parametrize(
    "name",
    [pytest.param(case.name, marks=() if case.name in IN_EVERY_RUN else pytest.mark.long) for case in CASES],
)
def test_weather_costs_no_more_than_what_it_struck(verdicts, name):
    verdict = verdicts[name]
    assert verdict.problems == ()
    assert verdict.resumed[0] == verdict.resumed[1] > 0
    assert verdict.left == 0


SCRIPT = """
import sys
from lem.orchestration.container import ContainerManager

manager = ContainerManager(sys.argv[1], project_dir=sys.argv[2])
manager.start_services(["pytorch"])
print(manager.project.name, flush=True)
manager.execute_experiment("pytorch", "e.yaml")
"""

EXPERIMENT = """
model: none
max_output_tokens: 4
gpus: []
warmup: {enabled: false}
measurement: {min_window_sec: 0.01, max_wait_pct: null, max_foreign_pct: null}
prompts: {type: synthetic, input_tokens: 3, sample_size: 2}
"""


def test_a_script_that_is_killed_leaves_nothing_of_the_experiment_that_it_runs(tmp_path):
    with WeatherRig(tmp_path).cleaned() as rig:
        (tmp_path / "e.yaml").write_text(EXPERIMENT, encoding="utf-8")
        reached = rig.shared / "reached"
        rig.be(
            {"at": "generate", "do": "spawn", "own_session": True},
            {"at": "generate", "do": "ignore_term"},
            {"at": "generate", "do": "shell", "command": f"touch {reached}"},
            {"at": "generate", "do": "hold_gil"},
        )
        command = [sys.executable, "-c", SCRIPT, rig.compose_files, str(tmp_path)]
        with subprocess.Popen(command, env=rig.environ(), stdout=subprocess.PIPE, text=True) as script:
            assert script.stdout is not None
            rig.project = script.stdout.readline().strip()
            wait_for(lambda: reached.exists() or None)
            assert len(rig.pids_inside()) > 4
            script.kill()
        assert rig.workers_left(10) == ()
        (container,) = rig.containers()
        assert rig.docker("inspect", "--format", "{{.State.Status}}", container) == "running"
