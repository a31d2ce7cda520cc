"""Servers beside lem: where their workers run, what is refused before anything starts, and whose processes count."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base import process
from lem.base.errors import UserError
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import ConfigProblems
from lem.config.load import complete_campaign
from lem.engines.named import find_server_problem
from lem.meters.machine import GpuFacts
from lem.orchestration.compose import IMAGES_NAME, ComposeProject
from lem.orchestration.docker import OVERRIDE_NAME, ContainerError
from lem.orchestration.doctor import FAILED, OK, SKIPPED, Host, examine
from lem.orchestration.executor import ExecutorChoice, campaign_project, choose_executor, docker_executor
from lem.orchestration.plan import Plan, build_plan
from lem.orchestration.preflight import check_supported, foresee
from lem.orchestration.resume import make_rule
from lem.orchestration.served import find_server, service_variable
from lem.results.stopping import Target
from tests.doubles.fake_docker import FakeDocker

ELSEWHERE = "http://192.0.2.1:8000"  # of no machine (RFC 5737)
BASE: dict[str, Any] = {"model": "m", "backend": "server", "decoder": {"preset": "deterministic"}}
COMMAND = {"command": ["python3", "--port", "{port}"]}
SERVICE = {"service": "llama"}
INSIDE = {**COMMAND, **SERVICE}
PUBLISHED = {"target": 8080, "published": "18080", "protocol": "tcp", "host_ip": "127.0.0.1"}


@pytest.fixture(autouse=True)
def here(fake: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.change(services={"llama": {"image": "img", "command": ["--host", "::"], "ports": [PUBLISHED]}})
    monkeypatch.chdir(fake.folder)
    (fake.folder / "docker-compose.yml").write_text("services: {}\n")


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which another process of this user listens."""
    text = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", text], stdin=-1, stdout=-1, start_new_session=True) as child:
        assert child.stdout is not None
        yield int(child.stdout.readline())
        child.kill()


def config(**server: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({**BASE, "server": server})


def campaign(*servers: dict[str, Any], more: dict[str, Any] | None = None, **options: Any) -> CampaignConfig:
    listed = [{**BASE, "server": server, **options} for server in servers]
    return CampaignConfig.from_dict({"campaign_name": "Demo", "experiments": listed, **(more or {})})


def plan_of(found: CampaignConfig) -> Plan:
    return build_plan(found, complete_campaign(found).listed)


def choose(fake: FakeDocker, found: CampaignConfig, wish: str = "auto") -> ExecutorChoice:
    return choose_executor(wish, found, plan_of(found), environ=fake.environ())


@pytest.mark.parametrize(
    ("server", "place", "container", "executor"),
    [
        (COMMAND, "server:", None, "local"),
        ({"url": ELSEWHERE}, "server:", None, "local"),
        (SERVICE, "server:llama", "llama", "docker"),
        (INSIDE, "llama", "llama", "docker"),
    ],
)
def test_the_form_of_a_server_decides_where_its_worker_runs(
    fake: FakeDocker, server: dict[str, Any], place: str, container: str | None, executor: str
) -> None:
    found = campaign(server)
    (item,) = plan_of(found).configurations
    assert (item.place, item.container) == (place, container)
    choice = choose(fake, found)
    assert choice.name == executor
    assert ("llama" in choice.describe()) == (container is not None)


def test_a_server_in_another_image_is_another_place_and_its_container_gets_that_image(fake: FakeDocker) -> None:
    fake.change(images=["img", "reg/two:2"], services={"llama": {"image": "img", "ports": [PUBLISHED]}})
    found = campaign(SERVICE, image="reg/two:2")
    (item,) = plan_of(found).configurations
    assert (item.place, item.container) == ("server:llama@reg/two:2", "llama")
    project, _ = prepared(fake, found)
    compose = project.prepare(["llama@reg/two:2"])
    assert compose.images == {"llama@reg/two:2": "sha256:reg/two:2"}
    variable = service_variable(compose, "llama@reg/two:2", project.mark, fake.environ())
    assert json.loads(json.loads(variable)["command"][-1])["image"] == "reg/two:2"


def test_a_server_keeps_the_image_of_its_compose_file_where_another_comes_first(fake: FakeDocker) -> None:
    fake.change(images=["img", "reg/two:2"], services={"llama": {"image": "img", "ports": [PUBLISHED]}})
    project, _ = prepared(fake, campaign(SERVICE, image="reg/two:2"))
    compose = project.prepare(["llama@reg/two:2", "llama"])
    assert compose.images == {"llama@reg/two:2": "sha256:reg/two:2", "llama": "sha256:img"}
    written = (project.state_folder / IMAGES_NAME).read_text().partition("\n")[2]
    assert json.loads(written) == {"services": {}}


@pytest.mark.parametrize("server", [COMMAND, {"url": ELSEWHERE}])
def test_an_image_is_refused_where_the_server_runs_in_no_container(server: dict[str, Any]) -> None:
    with pytest.raises(ConfigProblems) as caught:
        ExperimentConfig.from_dict({**BASE, "image": "img", "server": server})
    assert [(problem.path, problem.reason and problem.reason.code) for problem in caught.value.problems] == [
        (("image",), "image_unused")
    ]


def test_a_server_that_runs_already_is_never_loaded() -> None:
    order = {"execution": {"cycles": 2, "structure": "interleaved"}}
    assert plan_of(campaign({"url": ELSEWHERE}, COMMAND, more=order)).loads() == [False, True, False, True]


@pytest.mark.parametrize(
    ("server", "more", "executor", "words"),
    [
        (SERVICE, {}, "local", "requires containers"),
        (INSIDE, {}, "local", "requires containers"),
        ({"url": ELSEWHERE}, {"execution": {"reuse": "none"}}, "local", "execution.reuse: none"),
        ({"url": ELSEWHERE}, {"cold_start": {"force_cold_start": True}}, "local", "cold_start"),
        (COMMAND, {"cold_start": {"restart_container": True}}, "local", "restart_container"),
        (COMMAND, {"experiments": [{"model": "m", "image": "img"}]}, "local", "image: img requires containers"),
    ],
)
def test_what_a_form_cannot_have_is_refused(
    server: dict[str, Any], more: dict[str, Any], executor: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check_supported(plan_of(campaign(server, more=more)), executor)


def test_cycles_are_not_added_for_intervals_that_a_shared_load_does_not_have() -> None:
    rule = make_rule(Target(0.02), None)
    check_supported(plan_of(campaign(COMMAND)), "local", rule)
    with pytest.raises(UserError, match="--until"):
        check_supported(plan_of(campaign({"url": ELSEWHERE})), "local", rule)


def test_containers_are_refused_where_no_experiment_needs_one(fake: FakeDocker) -> None:
    with pytest.raises(UserError, match="no experiment runs in a container"):
        choose(fake, campaign(COMMAND), "docker")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (campaign(SERVICE, INSIDE), "a server itself, and to run a command"),
        (
            CampaignConfig.from_dict(
                {
                    "campaign_name": "d",
                    "experiments": [{**BASE, "server": SERVICE, "gpus": [gpu]} for gpu in ("0", "1")],
                }
            ),
            "other GPUs",
        ),
    ],
)
def test_one_container_cannot_be_two_things(tmp_path: Path, found: CampaignConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        docker_executor(found, plan_of(found), campaign_project(found, tmp_path, {}), ())


def prepared(fake: FakeDocker, found: CampaignConfig) -> tuple[ComposeProject, dict[str, Any]]:
    """The project, and what lem adds to its one service."""
    gpus = (GpuFacts(0, "GPU-0aaa", "Test", 1, (9, 0)),)
    environ = fake.environ(LEM_CACHE_DIR=str(fake.folder / "cache"))
    project = docker_executor(found, plan_of(found), campaign_project(found, fake.folder, environ), gpus).project
    project.prepare(["llama"])
    text = (project.state_folder / OVERRIDE_NAME).read_text().partition("\n")[2].replace("!override ", "")
    return project, json.loads(text)["services"]["llama"]


def test_a_service_that_is_the_server_keeps_its_command_and_is_not_restarted_unseen(fake: FakeDocker) -> None:
    project, override = prepared(fake, campaign(SERVICE))
    assert override["labels"] == {"lem.mark": project.mark}
    assert override["restart"] == "no"
    assert not override.keys() & {"user", "entrypoint", "command", "working_dir", "environment"}
    (device,) = override["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["GPU-0aaa"]


def test_a_server_sees_the_paths_of_its_options_and_not_those_of_its_command(fake: FakeDocker, tmp_path: Path) -> None:
    for name in ("weights", "program"):
        (tmp_path / name).mkdir()
    command = [str(tmp_path / "program"), "--port", "{port}"]
    server = {**SERVICE, "command": command, "options": {"lora": str(tmp_path / "weights")}, "ready_path": "/etc"}
    _, override = prepared(fake, campaign(server))
    targets = {volume["target"] for volume in override["volumes"]}
    assert str(tmp_path / "weights") in targets
    assert not targets & {str(tmp_path / "program"), "/etc"}


def test_a_service_that_runs_a_command_waits_for_it(fake: FakeDocker) -> None:
    _, override = prepared(fake, campaign(INSIDE))
    assert override["entrypoint"] == ["sleep"]
    assert "labels" not in override


@pytest.mark.parametrize(
    ("ports", "url"),
    [
        ([PUBLISHED], "http://127.0.0.1:18080"),
        ([{**PUBLISHED, "host_ip": ""}], "http://127.0.0.1:18080"),
        ([{**PUBLISHED, "host_ip": "::1"}], "http://[::1]:18080"),
        ([{**PUBLISHED, "protocol": "udp"}, {**PUBLISHED, "published": "8"}], "http://127.0.0.1:8"),
        ([{**PUBLISHED, "published": ""}], None),
        ([{**PUBLISHED, "published": "8000-8010"}], None),
        (None, None),
    ],
)
def test_a_server_is_reached_at_its_first_fixed_port(fake: FakeDocker, ports: Any, url: str | None) -> None:
    fake.change(services={"llama": {"image": "img", "ports": ports}})
    if url is None:
        with pytest.raises(ContainerError, match="llama publishes no port"):
            prepared(fake, campaign(SERVICE))
        return
    project, _ = prepared(fake, campaign(SERVICE))
    variable = service_variable(project.prepare(["llama"]), "llama", project.mark, fake.environ())
    assert json.loads(variable)["url"] == url


def test_the_command_of_a_service_holds_no_variable_of_this_user(fake: FakeDocker) -> None:
    project, _ = prepared(fake, campaign(SERVICE))
    compose = project.prepare(["llama"])
    *_, spec = json.loads(service_variable(compose, "llama", project.mark, {**compose.env, "LEM_UID": "x"}))["command"]
    assert json.loads(spec)["env"] == {"LEM_UID": str(os.getuid())}
    assert json.loads(spec)["command"] == ["--host", "::"]


def test_the_processes_that_listen_are_found(port: int) -> None:
    (found,) = process.find_listeners(port)
    assert found == process.identify(found.pid)
    assert found.pid != os.getpid()
    pids, why_not = find_server(config(url=f"http://127.0.0.1:{port}"), os.environ)
    assert (pids, why_not) == ((found.pid,), None)


def test_an_own_address_of_this_machine_is_here() -> None:
    assert all(map(process.is_here, ("127.0.0.1", "localhost", socket.gethostname())))
    assert not any(map(process.is_here, ("192.0.2.1", "no-such-host.invalid")))


def test_a_server_elsewhere_or_unseen_has_no_processes_here_and_the_reason() -> None:
    assert find_server(config(**COMMAND), os.environ) == ((), None)
    pids, why_not = find_server(config(url=ELSEWHERE), os.environ)
    assert (pids, why_not) == ((), "the server runs on another machine (192.0.2.1)")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        number = closed.getsockname()[1]
    pids, why_not = find_server(config(url=f"http://localhost:{number}"), os.environ)
    assert (pids, why_not) == ((), f"no process that listens on port {number} is visible to this user")


def test_a_server_that_is_not_there_is_found_out_before_the_first_cycle(fake: FakeDocker, port: int) -> None:
    assert find_server_problem(config(url=f"http://127.0.0.1:{port}")) is None
    assert find_server_problem(config(**COMMAND)) is None
    assert find_server_problem(config(**SERVICE)) is None
    missing = {"command": ["no-such-server", "{port}"]}
    with socket.create_server(("127.0.0.1", 0)) as closed:
        silent = {"url": f"http://127.0.0.1:{closed.getsockname()[1]}"}
    for server, words in ((missing, "no-such-server: no such program"), (silent, "does not answer")):
        problem = find_server_problem(config(**server))
        assert problem is not None
        assert problem.is_permanent
        assert words in problem.message
        (foreseen,) = foresee(plan_of(campaign(server)), "local", sys.executable)
        assert words in foreseen.message


def look(fake: FakeDocker, *servers: dict[str, Any]) -> tuple[str, str]:
    environ, items = fake.environ(), plan_of(campaign(*servers)).configurations if servers else ()
    services = tuple(filter(None, dict.fromkeys(item.container for item in items)))
    host = Host(fake.folder, backends=services, environ=environ, experiments=items)
    finding = examine(host, ("servers",)).findings["servers"]
    return finding.status, finding.message


def test_the_doctor_knows_each_form(fake: FakeDocker, port: int) -> None:
    assert look(fake)[0] == SKIPPED
    assert look(fake, COMMAND, {"url": f"http://127.0.0.1:{port}"}, SERVICE)[0] == OK
    assert look(fake, {"command": ["no-such-server", "{port}"]})[0] == FAILED
    fake.change(services={"llama": {"image": "img"}})
    assert look(fake, SERVICE) == (FAILED, "service llama publishes no port under a fixed number")
    assert look(fake, INSIDE)[0] == OK
