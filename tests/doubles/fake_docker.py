"""A `docker` command without an engine: what it is asked goes to a file, and what it answers comes from one.

It stands where the real client stands, on PATH, so everything of lem runs as it is. Its texts and outputs are those
that Docker 20.10 and Compose 2.17, 2.26 and 5 print. `exec` runs lem on this machine, in the place of a container.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "FAKE_DOCKER_DIR"
PYZ = "/opt/lem/lem.pyz"

NO_DAEMON = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"
NO_RIGHTS = (
    "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: "
    'Get "http://%2Fvar%2Frun%2Fdocker.sock/v1.24/info": dial unix /var/run/docker.sock: connect: permission denied'
)
NO_PLUGIN = "docker: 'compose' is not a docker command.\nSee 'docker --help'"
NO_GPU = 'Error response from daemon: could not select device driver "nvidia" with capabilities: [[gpu]]'


DEVICE = {"driver": "nvidia", "count": -1, "capabilities": ["gpu"]}
WITH_GPU = {"image": "img", "deploy": {"resources": {"reservations": {"devices": [DEVICE]}}}}
UUID = "GPU-11111111-2222"
GIB = 1024**3


def reading(*processes: tuple[int, int | None], used_b: int = GIB, error: str | None = None) -> dict[str, Any]:
    """What lem's NVML inside a container tells of one GPU of 10 GiB; processes have a pid and their memory."""
    listed = [{"pid": pid, "memory_b": memory_b} for pid, memory_b in processes]
    memory = {"memory_total_b": 10 * GIB, "memory_used_b": used_b}
    gpu = {"index": 0, "uuid": UUID, "name": "Test GPU", "processes": listed, **memory}
    return {"gpus": [] if error else [gpu], "driver": "1", "error": error}


class FakeDocker:
    """The test's side: how the engine is, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def install(cls, folder: Path, **state: Any) -> FakeDocker:
        """A docker command in `folder`/bin whose engine has these traits beside the usual ones."""
        fake = cls(folder)
        (folder / "bin").mkdir(parents=True)
        command = folder / "bin" / "docker"
        # It is called hundreds of times: without site, with its bytecode, and with few imports.
        source = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import fake_docker as it"
        command.write_text(f"#!{sys.executable} -IS\n{source}; sys.exit(it.main())\n")
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        usual = {"services": {"pytorch": {"image": "img"}, "vllm": {"image": "img"}}, "images": ["img"]}
        fake.write({**usual, "containers": {}, "compose": "2.26.1-4", **state})
        return fake

    def environ(self, **more: str) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("COMPOSE_")}
        return {**kept, "PATH": path, FOLDER_VARIABLE: str(self.folder), **more}

    def read(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        temporary = self.folder / f"state.{os.getpid()}"
        temporary.write_text(json.dumps(state))
        temporary.replace(self.folder / "state.json")

    def change(self, **traits: Any) -> None:
        self.write({**self.read(), **traits})

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def compose_calls(self, word: str) -> list[list[str]]:
        """Calls of one sub-command of compose, from that word on."""
        found = [_split(call[1:])[1] for call in self.calls() if call[:1] == ["compose"]]
        return [words for words in found if words[:1] == [word]]


def _split(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The options of `docker compose`, each of which takes a value, and the rest."""
    options: dict[str, list[str]] = {}
    while words and words[0].startswith("--"):
        options.setdefault(words[0], []).append(words[1])
        words = words[2:]
    return options, words


class Refused(Exception):
    """What the command says before it fails."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


class Command:
    def __init__(self, fake: FakeDocker) -> None:
        self.fake = fake
        self.state = fake.read()

    def run(self, words: list[str]) -> int:
        with (self.fake.folder / "calls.jsonl").open("a") as stream:
            stream.write(json.dumps(words) + "\n")
        if words[0] == "compose":
            if self.state["compose"] is None:
                raise Refused(NO_PLUGIN)
            return self.compose(words[1:])
        if words[0] != "context":
            self.need_engine()
        return int(getattr(self, words[0])(words[1:]) or 0)

    def need_engine(self) -> None:
        if self.state.get("daemon") == "down":
            raise Refused(NO_DAEMON)
        if self.state.get("daemon") == "forbidden":
            raise Refused(NO_RIGHTS)

    def info(self, words: list[str]) -> None:
        found = {"ServerVersion": "20.10.24", "Runtimes": self.state.get("runtimes", {"runc": {}})}
        print(json.dumps({**found, "DockerRootDir": str(self.fake.folder), "MemTotal": 10**11, **self.traits()}))

    def traits(self) -> dict[str, Any]:
        return {"SecurityOptions": self.state.get("security"), "MemoryLimit": self.state.get("limits_memory", True)}

    def context(self, words: list[str]) -> None:
        print("default", self.state.get("endpoint", "unix:///var/run/docker.sock"))

    def ps(self, words: list[str]) -> None:
        print(*self.state.get("others", []), sep="\n")

    def rm(self, words: list[str]) -> None:
        self.fake.change(containers={})

    def volume(self, words: list[str]) -> None:
        if words[-1] not in self.state.get("volumes", []):
            raise Refused(f"Error response from daemon: get {words[-1]}: no such volume")

    def image(self, words: list[str]) -> None:
        if words[-1] not in self.state["images"]:
            raise Refused(f"Error response from daemon: No such image: {words[-1]}:latest")
        print(f"sha256:{words[-1]}")

    def top(self, words: list[str]) -> None:
        print("PID", *self.state.get("pids", {}).get(words[0], []), sep="\n")

    def events(self, words: list[str]) -> None:
        since_s, until_s = (float(words[words.index(name) + 1]) for name in ("--since", "--until"))
        wanted = words[words.index("--filter") + 1].partition("=")[2]
        for container, at_s in self.state.get("out_of_memory", []):
            if container == wanted and (at_s is None or since_s <= at_s <= until_s):
                print("oom")

    def compose(self, words: list[str]) -> int:
        options, (name, *rest) = _split(words)
        if name == "version":
            print(self.state["compose"])
            return 0
        for file in options.get("--file", []):
            if not Path(file).is_file():
                raise Refused(f"open {file}: no such file or directory", 14)
        if self.state.get("invalid"):
            raise Refused(self.state["invalid"], 15)
        if name != "config":
            self.need_engine()
        return int(getattr(self, f"compose_{name}")([word for word in rest if word != "--"]) or 0)

    def compose_config(self, words: list[str]) -> None:
        enabled = set(os.environ.get("COMPOSE_PROFILES", "").split(","))
        services = self.state["services"]
        if isinstance(services, dict):
            off = {name for name, item in services.items() if item and item.get("profiles")}
            off = {name for name in off if not enabled & {"*", *services[name]["profiles"]}}
            services = {name: item for name, item in services.items() if name not in off}
        if self.state.get("unnamed") and "--project-name" not in sys.argv:
            raise Refused("project name must not be empty", 15)
        if isinstance(services, dict):
            services = {name: item and {**item, **self.image_of(name)} for name, item in services.items()}
        print(json.dumps({"name": "p", "services": services, "volumes": self.volumes(sys.argv)}, indent=2))

    def image_of(self, service: str) -> dict[str, Any]:
        """The image that lem's own file gives a service."""
        files = [Path(word) for word in sys.argv if word.endswith("docker-compose.images.yml")]
        found = [json.loads(file.read_text().partition("\n")[2])["services"].get(service, {}) for file in files]
        return found[-1] if found else {}

    def volumes(self, words: list[str]) -> dict[str, Any]:
        project = words[words.index("--project-name") + 1] if "--project-name" in words else "user"
        declared = self.state.get("declared", {}).items()
        return {key: {"name": f"{project}_{key}", **(item or {})} for key, item in declared}

    def compose_ps(self, words: list[str]) -> None:
        found = [self.describe(name, item) for name, item in self.state["containers"].items()]
        if self.state["compose"].lstrip("v").startswith(("2.17", "2.18", "2.19", "2.20")):
            print(json.dumps(found))
        else:
            print(*map(json.dumps, found), sep="\n")

    def describe(self, name: str, item: Mapping[str, Any]) -> dict[str, Any]:
        known = {"ID": f"id-{name}", "Name": f"p-{name}-1", "Command": '"sleep infinity"', "Service": name}
        return {**known, "Publishers": None, **item}

    def compose_up(self, words: list[str]) -> None:
        names = [word for word in words if word in self.state["services"]]
        if self.state.get("no_gpu_runtime") and any("deploy" in self.state["services"][name] for name in names):
            print(" Container p-vllm-1  Starting", file=sys.stderr)
            raise Refused(NO_GPU)
        self.put(names, self.state.get("after_up", "running"))

    def compose_restart(self, words: list[str]) -> None:
        if self.state.get("restart_fails"):
            raise Refused("Error response from daemon: Cannot restart container: it hangs")
        self.put(words[-1:], self.state.get("after_restart", "running"))

    def compose_kill(self, words: list[str]) -> None:
        self.put(words[-1:], "exited")

    def compose_down(self, words: list[str]) -> None:
        self.fake.change(containers={})

    def compose_logs(self, words: list[str]) -> None:
        print(self.state.get("logs", ""))

    def put(self, names: list[str], state: str) -> None:
        item = {"State": state, "ExitCode": 137 if state == "exited" else 0, "Health": ""}
        self.fake.change(containers={**self.state["containers"], **dict.fromkeys(names, item)})
        if state == "running":
            self.fake.change(silent=[name for name in self.state.get("silent", []) if name not in names])

    def compose_exec(self, words: list[str]) -> int:
        variables = {}
        words = [word for word in words if word != "-T"]
        while words[0] == "--env":
            name, _, value = words[1].partition("=")
            variables[name], words = value, words[2:]
        service, program, arguments = words[0], words[1:4], words[4:]
        if self.state["containers"].get(service, {}).get("State") != "running":
            raise Refused(f'service "{service}" is not running')
        if program != ["python3", "-u", PYZ]:
            raise Refused(f"{program}: not there", 127)
        if service in self.state.get("silent", []):
            raise Refused("OCI runtime exec failed: exec failed", 126)
        if arguments[:1] == ["gpus"]:
            nothing: dict[str, Any] = {"gpus": [], "driver": None, "error": "NVML Shared Library Not Found"}
            print(json.dumps(self.state.get("gpus", {}).get(service, nothing)))
            return 0
        import subprocess

        launch = Path(__file__).parents[2] / "lem" / "base" / "launch.py"
        # A session of its own: killing the client of the real one reaches nothing inside either.
        return subprocess.call(
            [sys.executable, "-u", str(launch), *arguments],
            env={**os.environ, **variables, **self.worker_environ()},
            start_new_session=True,
        )

    def worker_environ(self) -> dict[str, str]:
        """The trivial engine stands in for every real one."""
        return {"PYTHONPATH": str(Path(__file__).parent)}


def main() -> int:
    try:
        return Command(FakeDocker(Path(os.environ[FOLDER_VARIABLE]))).run(sys.argv[1:])
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return refusal.code
