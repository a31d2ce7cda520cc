"""Which compose files are used, and what lem adds to them, as the engine's client is told it."""

from __future__ import annotations

import getpass
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from lem.base.variables import COMPOSE_VARIABLES
from lem.config.experiment import ExperimentConfig
from lem.orchestration.compose import (
    CONTAINER_HOME,
    PACKAGED,
    ComposeProject,
    FileNames,
    Mount,
    compose_variables,
    find_compose_files,
    local_mounts,
    packaged_compose_file,
    without_nested,
)
from lem.orchestration.docker import ContainerError
from tests.doubles.fake_docker import FakeDocker

ROOT = Path(__file__).resolve().parents[3]

# What lem sets itself, whatever a person set.
SET_BY_LEM = {"LEM_PYZ_DIR", "LEM_RESULTS_DIR", "LEM_UID", "LEM_GID", "LEM_GPU_IDS", "LEM_HOST_MEMORY"}


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("services: {}\n")


def found(folder: Path, named: FileNames = None, **environ: str) -> list[str]:
    return [str(path).removeprefix(f"{folder}/") for path in find_compose_files(named, folder, environ)]


def test_the_file_named_comes_first_then_the_environment_then_the_usual_places(tmp_path: Path) -> None:
    assert found(tmp_path) == [str(PACKAGED)]
    write(tmp_path, "docker/docker-compose.yml")
    assert found(tmp_path) == ["docker/docker-compose.yml"]
    write(tmp_path, "docker-compose.yml", "a.yml", "b.yml")
    assert found(tmp_path) == ["docker-compose.yml"]
    assert found(tmp_path, COMPOSE_FILE="a.yml:b.yml") == ["a.yml", "b.yml"]
    assert found(tmp_path, COMPOSE_FILE="a.yml;b.yml", COMPOSE_PATH_SEPARATOR=";") == ["a.yml", "b.yml"]
    assert found(tmp_path, "b.yml", COMPOSE_FILE="a.yml") == ["b.yml"]
    assert found(tmp_path, "b.yml:a.yml") == ["b.yml", "a.yml"]
    write(tmp_path, "a:b.yml")
    assert found(tmp_path, "a:b.yml") == ["a:b.yml"], "a file of that name comes first"
    assert found(tmp_path, ("b.yml", Path("a.yml")), COMPOSE_FILE="no.yml") == ["b.yml", "a.yml"]


@pytest.mark.parametrize(
    ("present", "used"),
    [
        ("docker-compose.yml docker-compose.override.yml", "docker-compose.yml docker-compose.override.yml"),
        ("compose.yaml compose.override.yaml", "compose.yaml compose.override.yaml"),
        ("docker-compose.yaml docker-compose.override.yaml", "docker-compose.yaml docker-compose.override.yaml"),
        # The first of Compose's names counts, and the names of a file and of its override are independent.
        ("docker-compose.yaml docker-compose.yml compose.yml compose.yaml", "compose.yaml"),
        (
            "compose.yaml compose.override.yml compose.override.yaml docker-compose.override.yml",
            "compose.yaml compose.override.yml",
        ),
        ("compose.yml docker-compose.override.yml", "compose.yml docker-compose.override.yml"),
        # lem's own places: a folder called docker, and the packaged file.
        ("docker/compose.yaml docker/compose.override.yaml", "docker/compose.yaml docker/compose.override.yaml"),
        ("docker/docker-compose.yml compose.override.yml", "docker/docker-compose.yml compose.override.yml"),
        ("docker-compose.override.yml", f"{PACKAGED} docker-compose.override.yml"),
        # A parent of the folder, as for any command of Compose; an override alone belongs to no file of a parent.
        ("../compose.yaml ../compose.override.yaml", "../compose.yaml ../compose.override.yaml"),
        ("../compose.yaml docker/docker-compose.yml", "docker/docker-compose.yml"),
        ("../../docker-compose.yml", "../../docker-compose.yml"),
    ],
)
def test_files_are_found_as_compose_finds_them(tmp_path: Path, present: str, used: str) -> None:
    folder = tmp_path / "one" / "two"
    folder.mkdir(parents=True)
    write(folder, *present.split())
    expected = [name if name == str(PACKAGED) else os.path.normpath(folder / name) for name in used.split()]
    assert list(map(str, find_compose_files(None, folder, {}))) == expected


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("COMPOSE_FILE=a.yml:b.yml\nOTHER=1\n", {}, {"COMPOSE_FILE": "a.yml:b.yml"}),
        ("export COMPOSE_PROFILES = 'gpu,x'\n", {}, {"COMPOSE_PROFILES": "gpu,x"}),
        ('COMPOSE_PROJECT_NAME="mine" # a comment\n', {}, {"COMPOSE_PROJECT_NAME": "mine"}),
        ("# COMPOSE_FILE=a.yml\n", {}, {}),
        ("COMPOSE_FILE=a.yml\n", {"COMPOSE_FILE": "b.yml"}, {"COMPOSE_FILE": "b.yml"}),
        ("COMPOSE_FILE=$A\n", {"COMPOSE_FILE": "b.yml"}, {"COMPOSE_FILE": "b.yml"}),
        ("COMPOSE_FILE=a.yml\n", {"COMPOSE_DISABLE_ENV_FILE": "true"}, {}),
    ],
)
def test_variables_of_compose_are_also_read_from_its_env_file(
    tmp_path: Path, text: str, environ: dict[str, str], expected: dict[str, str]
) -> None:
    (tmp_path / ".env").write_text(text)
    assert compose_variables(None, None, tmp_path, environ) == {**environ, **expected}


def test_another_env_file_replaces_the_usual_one(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("COMPOSE_PROFILES=usual\n")
    (tmp_path / "sub").mkdir()
    write(tmp_path, "sub/c.yml")
    for name in ("named", "sub/.env", "listed"):
        (tmp_path / name).write_text(f"COMPOSE_PROFILES={name}\n")
    for named, env_file, environ, profile in (
        (None, tmp_path / "named", {}, "named"),
        (None, tmp_path / "missing", {}, None),
        (None, None, {"COMPOSE_ENV_FILES": "listed"}, "listed"),
        ("sub/c.yml", None, {}, "sub/.env"),
    ):
        found = compose_variables(named, env_file, tmp_path, environ)
        assert found.get("COMPOSE_PROFILES") == profile


@pytest.mark.parametrize("name", ["Mine", "../../tmp/x", "-a", "a b"])
def test_an_invalid_name_of_a_project_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ContainerError, match="COMPOSE_PROJECT_NAME") as caught:
        compose_variables(None, None, tmp_path, {"COMPOSE_PROJECT_NAME": name})
    assert caught.value.kind == "project"


def test_a_variable_in_a_value_of_the_env_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("COMPOSE_FILE=${HOME}/c.yml\n")
    with pytest.raises(ContainerError, match="COMPOSE_FILE") as caught:
        compose_variables(None, None, tmp_path, {})
    assert "export COMPOSE_FILE" in caught.value.hint


@pytest.mark.parametrize(("named", "environ"), [("no.yml", {}), (None, {"COMPOSE_FILE": "no.yml"})])
def test_a_file_named_that_is_not_there_is_told(tmp_path: Path, named: str | None, environ: dict[str, str]) -> None:
    with pytest.raises(ContainerError, match=r"no\.yml") as caught:
        find_compose_files(named, tmp_path, environ)
    assert caught.value.kind == "compose_file"


def test_every_variable_of_the_compose_files_is_known_to_the_command_line() -> None:
    texts = [path.read_text() for path in (ROOT / "docker").glob("*.yml")]
    used = {name for text in texts for name in re.findall(r"\$\{(LEM_\w+)", text)}
    assert used == COMPOSE_VARIABLES | SET_BY_LEM


# What lem adds


def project(fake: FakeDocker, folder: Path, environ: dict[str, str] | None = None, **more: Any) -> ComposeProject:
    variables = fake.environ(**{"LEM_CACHE_DIR": str(folder / "cache"), **(environ or {})})
    return ComposeProject(
        name="lem-demo",
        files=find_compose_files(None, folder, {}),
        state_folder=folder / "state",
        working_dir=folder,
        results_dir=folder / "results",
        environ=variables,
        **more,
    )


def test_the_variables_of_the_compose_file_are_set(fake: FakeDocker, tmp_path: Path) -> None:
    gpus_of = {"vllm": ("GPU-2",), "pytorch": ("GPU-1",)}
    env = project(fake, tmp_path, {"HF_HOME": str(tmp_path / "hf")}, gpus_of=gpus_of).prepare(["vllm"]).env
    assert env["LEM_GPU_IDS"] == "GPU-1,GPU-2"
    assert env["LEM_UID"] == str(os.getuid())
    assert env["LEM_HOST_MEMORY"] == str(95 * 10**9)
    assert env["LEM_RESULTS_DIR"] == str(tmp_path / "results")
    assert Path(env["LEM_PYZ_DIR"], "lem.pyz").is_file()
    assert env["LEM_MODEL_CACHE"] == str(tmp_path / "hf")
    assert (tmp_path / "hf").is_dir(), "the engine would not make it, or make it root's"
    found = project(fake, tmp_path, {"LEM_MODEL_CACHE": "/m", "HF_HOME": "/h"}).existing()
    assert found.env["LEM_MODEL_CACHE"] == "/m"


def test_the_packaged_file_is_used_from_the_state_folder(fake: FakeDocker, tmp_path: Path) -> None:
    compose = project(fake, tmp_path).prepare(["vllm"])
    assert compose.files == (tmp_path / "state" / "docker-compose.yml", tmp_path / "state" / "docker-compose.lem.yml")
    assert compose.files[0].read_text() == packaged_compose_file()
    assert compose.folder == tmp_path, "relative paths are relative to the user's folder"


def test_an_override_alone_extends_the_packaged_file(fake: FakeDocker, tmp_path: Path) -> None:
    write(tmp_path, "compose.override.yaml")
    compose = project(fake, tmp_path).prepare(["vllm"])
    assert compose.files[:2] == (tmp_path / "state" / "docker-compose.yml", tmp_path / "compose.override.yaml")
    assert compose.folder == tmp_path


def test_the_profiles_of_a_service_are_enabled_as_if_a_command_named_it(fake: FakeDocker, tmp_path: Path) -> None:
    other = {"image": "img", "profiles": ["x"]}
    fake.change(services={"vllm": {"image": "img", "profiles": ["gpu", "fast"]}, "other": other})
    assert list(project(fake, tmp_path).described(["vllm"])) == ["vllm"]
    for before, after in (("", "gpu,fast"), ("mine", "mine,gpu,fast"), ("gpu", "gpu")):
        compose = project(fake, tmp_path, {"COMPOSE_PROFILES": before}).prepare(["vllm"])
        assert compose.env["COMPOSE_PROFILES"] == after
    with pytest.raises(ContainerError, match="has no service pytorch; it has vllm, other"):
        project(fake, tmp_path).prepare(["pytorch"])


def test_a_project_with_containers_that_are_not_lem_s_is_refused(fake: FakeDocker, tmp_path: Path) -> None:
    fake.change(others=["mine-1 /a/compose.yaml,/s/docker-compose.lem.yml", "web-1 /a/compose.yaml", "old-1 "])
    with pytest.raises(ContainerError, match="lem-demo has containers that lem did not start: web-1, old-1") as caught:
        project(fake, tmp_path).prepare(["vllm"])
    assert (caught.value.kind, "COMPOSE_PROJECT_NAME" in caught.value.hint) == ("project", True)


@pytest.mark.parametrize(("version", "tag"), [("2.24.4", "!override "), ("2.17.0", "")])
def test_volumes_that_the_user_s_own_project_has_are_used(
    fake: FakeDocker, tmp_path: Path, version: str, tag: str
) -> None:
    fake.change(compose=version, volumes=["user_hub"], declared={"hub": {}, "new": None, "theirs": {"external": True}})
    text = override(fake, tmp_path)
    assert f'"hub": {tag}{{' in text
    volumes = json.loads(text.partition("\n")[2].replace("!override ", ""))["volumes"]
    assert volumes == {"hub": {"name": "user_hub", "external": True}}


def test_a_folder_after_which_no_project_can_be_named_has_no_volumes(fake: FakeDocker, tmp_path: Path) -> None:
    fake.change(unnamed=True, volumes=["user_hub"], declared={"hub": {}})
    assert json.loads(override(fake, tmp_path).partition("\n")[2].replace("!override ", ""))["volumes"] == {}


@pytest.mark.parametrize(
    ("options", "user", "mode"),
    [
        (["name=seccomp,profile=default"], f"{os.getuid()}:{os.getgid()}", None),
        (["name=seccomp,profile=builtin", "name=rootless", "name=cgroupns"], "0:0", None),
        (["name=userns"], f"{os.getuid()}:{os.getgid()}", "host"),
        (None, f"{os.getuid()}:{os.getgid()}", None),
    ],
)
def test_results_belong_to_the_user_under_every_kind_of_engine(
    fake: FakeDocker, tmp_path: Path, options: list[str] | None, user: str, mode: str | None
) -> None:
    fake.change(security=options)
    compose = project(fake, tmp_path).prepare(["vllm"])
    service = as_service(compose.files[-1].read_text())
    assert (service["user"], service.get("userns_mode")) == (user, mode)
    assert f"{compose.env['LEM_UID']}:{compose.env['LEM_GID']}" == user


@pytest.mark.parametrize(
    ("service", "is_replaced"),
    [
        ({}, True),
        ({"command": ["--model", "a"]}, True),
        ({"entrypoint": [], "command": ["serve"]}, True),
        ({"entrypoint": ["sleep", "infinity"]}, False),
        ({"entrypoint": ["/start.sh"], "command": None}, False),
        ({"command": ["sh", "-c", "pip install x && sleep infinity"]}, False),
        ({"command": ["tail", "-f", "/dev/null"]}, False),
    ],
)
def test_a_service_that_would_run_a_server_waits_instead(
    fake: FakeDocker, tmp_path: Path, caplog: pytest.LogCaptureFixture, service: dict[str, Any], is_replaced: bool
) -> None:
    fake.change(services={"vllm": {"image": "img", **service}})
    found = as_service(override(fake, tmp_path))
    assert (found.get("entrypoint"), found.get("command")) == (
        (["sleep"], ["infinity"]) if is_replaced else (None, None)
    )
    assert ("not the service's command" in caplog.text) is is_replaced


def test_an_engine_that_cannot_limit_memory_is_reported(
    fake: FakeDocker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project(fake, tmp_path).prepare(["vllm"])
    assert "limit memory" not in caplog.text
    fake.change(limits_memory=False)
    project(fake, tmp_path).prepare(["vllm"])
    assert "limit memory" in caplog.text


def test_project_name_and_env_file_are_passed_on(fake: FakeDocker, tmp_path: Path) -> None:
    write(tmp_path, "docker-compose.yml")
    (tmp_path / "my.env").write_text("")
    project(fake, tmp_path, env_file=tmp_path / "my.env").prepare(["vllm"])
    words = next(call for call in fake.calls() if "config" in call)
    assert words[:3] == ["compose", "--project-name", "lem-demo"]
    assert words[words.index("--env-file") + 1] == str(tmp_path / "my.env")
    assert "--project-directory" not in words


def override(fake: FakeDocker, folder: Path, environ: dict[str, str] | None = None, **more: Any) -> str:
    return project(fake, folder, environ, **more).prepare(["vllm"]).files[-1].read_text()


def as_service(text: str) -> dict[str, Any]:
    """The service in an override without its comment and its tag, which JSON does not have."""
    plain = re.sub("!(override|reset) ", "", text.partition("\n")[2])
    document: dict[str, Any] = json.loads(plain)["services"]["vllm"]
    return document


NVIDIA = {"driver": "nvidia", "capabilities": ["gpu"]}
ONE, TWO = {"vllm": ("GPU-1",)}, {"vllm": ("GPU-1", "GPU-2")}


@pytest.mark.parametrize(
    ("version", "gpus_of", "tag", "devices"),
    [
        ("2.24.4", TWO, "!override", [{**NVIDIA, "device_ids": ["GPU-1", "GPU-2"]}]),
        ("5.0.0", ONE, "!override", [{**NVIDIA, "device_ids": ["GPU-1"]}]),
        ("5.0.0", {"vllm": ()}, "!reset", None),
        ("5.0.0", {}, "", None),
        # An older version cannot replace a list; there only LEM_GPU_IDS counts.
        ("2.24.3", ONE, "", None),
    ],
)
def test_known_gpus_replace_those_of_the_file(
    fake: FakeDocker,
    tmp_path: Path,
    version: str,
    gpus_of: dict[str, tuple[str, ...]],
    tag: str,
    devices: list[Any] | None,
) -> None:
    fake.change(compose=version)
    text = override(fake, tmp_path, gpus_of=gpus_of)
    assert re.findall(r'"devices": (\S+)', text) == [tag] * bool(tag)
    reserved = as_service(text).get("deploy", {}).get("resources", {}).get("reservations", {})
    assert reserved.get("devices") == devices


def test_a_dollar_sign_in_a_path_is_no_variable(fake: FakeDocker, tmp_path: Path) -> None:
    text = override(fake, tmp_path, mounts=(Mount(Path("/a$b"), "/a$b"),))
    assert '"/a$$b"' in text
    assert not re.search(r"[^$]\$[^$]", text)


def test_the_override_adds_folders_user_and_environment(fake: FakeDocker, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    environ = {"LEM_DATASETS_DIR": str(tmp_path / "sets"), "HF_TOKEN": "hf_planted"}
    text = override(fake, tmp_path, environ, mounts=(Mount.in_place(tmp_path),))
    assert "planted" not in text
    service = as_service(text)
    assert service["user"] == f"{os.getuid()}:{os.getgid()}"
    assert service["environment"] == {
        "HOME": CONTAINER_HOME,
        "USER": getpass.getuser(),
        "LOGNAME": getpass.getuser(),
        "LEM_DATASETS_DIR": str(tmp_path / "sets"),
    }
    assert service["working_dir"] == str(tmp_path)
    assert service["pull_policy"] == "never"
    assert {item["target"]: item["read_only"] for item in service["volumes"]} == {
        "/opt/lem": True,
        str(tmp_path): True,
        str(tmp_path / "results"): False,
    }
    assert (tmp_path / "results").is_dir()


# Mounts


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def experiment(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "gpt2", **options})


def targets(*configs: ExperimentConfig) -> dict[str, bool]:
    return {mount.target: mount.is_read_only for mount in local_mounts(configs)}


def test_every_path_that_an_experiment_names_is_mounted(here: Path) -> None:
    for name in ("model", "tokenizer", "adapter", "draft", "lists"):
        (here / name).mkdir()
    (here / "template.jinja").write_text("")
    found = targets(
        experiment(
            model={"name": "model", "tokenizer": "tokenizer", "adapter": "adapter"},
            backend="vllm",
            vllm={
                "speculative": {"model": "draft", "num_tokens": 2},
                "extra": {"chat_template": str(here / "template.jinja"), "paths": [{"one": "lists"}]},
            },
        )
    )
    names = ("model", "tokenizer", "adapter", "draft", "lists", "template.jinja")
    assert found == {str(here / name): True for name in names}


def test_a_folder_that_is_written_to_is_made_and_writable(here: Path) -> None:
    found = targets(experiment(backend="tensorrt", tensorrt={"engine_cache_dir": "engines"}))
    assert found == {str(here / "engines"): False}
    assert (here / "engines").is_dir()


def test_a_path_in_the_home_folder_is_where_home_is_inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "models" / "m").mkdir(parents=True)
    assert local_mounts([experiment(model="~/models/m")]) == (Mount(here / "models" / "m", "/tmp/models/m"),)


@pytest.mark.parametrize(
    "options", [{"dataset": "rows/train.jsonl"}, {"prompts": {"type": "huggingface", "dataset": "rows/train.jsonl"}}]
)
def test_a_local_data_set_is_mounted(here: Path, options: dict[str, Any]) -> None:
    (here / "rows").mkdir()
    (here / "rows" / "train.jsonl").write_text('{"prompt": "one"}\n')
    assert targets(experiment(**options)) == {str(here / "rows" / "train.jsonl"): True}
    assert targets(experiment(dataset="alpaca")) == {}


def test_a_snapshot_brings_the_files_that_its_links_lead_to(here: Path) -> None:
    blobs, snapshot = here / "hub" / "blobs", here / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "deep").mkdir(parents=True)
    (blobs / "1").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "deep" / "x").symlink_to("../../../blobs/1")
    (snapshot / "gone").symlink_to("nowhere")
    assert targets(experiment(model=str(snapshot))) == {str(snapshot): True, str(blobs): True}


def test_the_folder_of_an_external_meter_s_file_is_seen_at_its_place(here: Path) -> None:
    found = targets(experiment(measurement={"external_csv": "meter/watts.csv"}))
    assert found == {f"{here}/meter": True}
    assert targets(experiment(measurement={"external_csv": "~/meter/watts.csv"})) == {f"{CONTAINER_HOME}/meter": True}


OUTER, WRITTEN = Mount(Path("/a"), "/a"), Mount(Path("/a"), "/a", is_read_only=False)
INNER, WRITTEN_INNER, OTHER = Mount(Path("/a/b"), "/a/b"), Mount(Path("/a/b"), "/a/b", False), Mount(Path("/c"), "/a/b")


@pytest.mark.parametrize(
    ("mounts", "kept"),
    [
        ((INNER, OUTER, INNER), (OUTER,)),
        ((OUTER, WRITTEN_INNER), (OUTER, WRITTEN_INNER)),
        ((OUTER, OTHER), (OUTER, OTHER)),
        ((OUTER, WRITTEN), (WRITTEN,)),
        ((WRITTEN, OUTER), (WRITTEN,)),
    ],
)
def test_a_mount_that_another_one_covers_is_left_out(mounts: tuple[Mount, ...], kept: tuple[Mount, ...]) -> None:
    assert without_nested(mounts) == kept


@pytest.mark.parametrize("model", ["~nobody-of-this-name/model", "m" * 300, "gpt2", "/"])
def test_a_model_of_a_hub_and_the_root_are_not_mounted(here: Path, model: str) -> None:
    assert local_mounts([experiment(model=model)]) == ()
