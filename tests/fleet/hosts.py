"""Hosts for Ansible: containers with systemd as PID 1, sshd, and a Docker Engine of their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import processes
from tests.container_rig import docker
from tests.lab.places import BASE_IMAGE, PACKAGES_TARGET, Places

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPOSE_PLUGIN = Path("/usr/local/lib/docker/cli-plugins/docker-compose")
LABEL = "lem.fleet.recipe"
# Of their own, so that nobody else's containers are on it.
NETWORK = f"lem-fleet-{os.getpid()}"

# What a host sees of this machine, read-only: the engine's packages, a tiny model, and the trivial engine.
DOUBLES = "/opt/lem-doubles"
MODEL = "/opt/lem-models/tiny"

# Nothing is measured by it: it ends a test that would never end.
PATIENCE_S = 240.0

# What an installation is to leave behind, and what a host does by itself all the time.
LEFT = re.compile(
    r"/(var/(log|tmp|lib/(systemd|docker|containerd|sudo|private)|cache/(apt|ldconfig|debconf))|etc/[g-]?(passwd|group|shadow|gshadow)-?"
    r"|etc/(gshadow|sub[ug]id)-?|home/deployer/\.(ansible|ssh)|root|var/lib/lem-hold)(/|$)"
)

CAPABILITIES = ("SYS_ADMIN", "NET_ADMIN", "SYS_NICE", "SYS_PTRACE", "MKNOD")


def wait_for(what: str, look: Callable[[], bool]) -> None:
    """Return once it is so."""
    try:
        processes.wait_for(lambda: look() or None, PATIENCE_S)
    except TimeoutError as error:
        raise AssertionError(f"not within {PATIENCE_S:.0f} s: {what}") from error


def host_image() -> str:
    """The image of a host, made on the lab's base image when it is not there."""
    base = docker("image", "inspect", BASE_IMAGE, "--format", "{{.Id}}").strip()
    recipe = hashlib.sha256((HERE / "Dockerfile").read_bytes() + base.encode()).hexdigest()[:16]
    name = f"lem-lab-host:{recipe}"
    if docker("images", "--quiet", name):
        return name
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / "Dockerfile", folder)
        shutil.copy(COMPOSE_PLUGIN, folder)
        docker("build", "--network", "host", "--label", f"{LABEL}={recipe}", "--tag", name, folder, timeout_s=1200)
    return name


@dataclass(frozen=True)
class Host:
    """A host of the fleet."""

    name: str  # in the inventory
    container: str  # its name in the engine of the lab
    has_network: bool  # whether anything but `docker exec` reaches it

    def run(self, *words: str, stdin: bytes = b"") -> str:
        return docker("exec", "--interactive", self.container, *words, stdin=stdin)

    def answers(self, *words: str) -> bool:
        command = ["docker", "exec", self.container, *words]
        return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0

    def read(self, path: str) -> str:
        return self.run("cat", path)

    def show(self, unit: str, prop: str) -> str:
        return self.run("systemctl", "show", "--value", f"--property={prop}", unit).strip()

    def results(self, campaign: str) -> dict[str, str]:
        """Every `result.json` of a campaign by its path, with its checksum and when it was written."""
        folder = f"/var/lib/lem/{campaign}/results"
        script = (
            f"cd {folder} 2>/dev/null && find . -name result.json -printf '%p %T@ ' -exec sha256sum {{}} ';' || true"
        )
        lines = self.run("sh", "-c", script).splitlines()
        return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}

    def entries(self, campaign: str, part: str = "") -> dict[str, str]:
        """The status of each experiment in its manifest; {} where there is none yet."""
        path = f"/var/lib/lem/{campaign}/.state/{campaign}/{part}/campaign_manifest.json"
        text = self.run("sh", "-c", f"cat {path} 2>/dev/null || true")
        return {} if not text else {item["exp_id"]: item["status"] for item in json.loads(text)["experiments"]}

    def lasting(self) -> dict[str, str]:
        """Its files, except those that change by themselves or by a connection."""
        return {path: text for path, text in self.files().items() if not LEFT.match(path)}

    def files(self) -> dict[str, str]:
        """Every file and folder that the host itself has, with its mode and size, and where links lead."""
        lines = self.run("find", "/", "-xdev", "-printf", r"%p\t%y %m %u %l\n").splitlines()
        return dict(line.split("\t", 1) for line in lines)

    def variables(self, key: Path, known_hosts: Path) -> dict[str, object]:
        """What the inventory says of it."""
        options = (
            f"-o StrictHostKeyChecking=no -o UserKnownHostsFile={known_hosts} -o ControlPath={known_hosts.parent}/%C"
        )
        found: dict[str, object] = {"ansible_user": "deployer", "ansible_ssh_private_key_file": str(key)}
        if self.has_network:
            found |= {"ansible_host": "127.0.0.1", "ansible_port": self._port()}
        else:
            # A host without network still has a stdin: sshd speaks over it, and nothing else comes in.
            options += f" -o ProxyCommand='docker exec -i {self.container} /usr/sbin/sshd -i'"
        return {**found, "ansible_ssh_common_args": options}

    def _port(self) -> int:
        return int(docker("port", self.container, "22/tcp").split(":")[1])

    def kill(self) -> None:
        docker("kill", self.container)

    def start(self) -> None:
        docker("start", self.container)
        self.wait_until_up()

    def wait_until_up(self) -> None:
        wait_for(f"{self.name} is up", lambda: self.answers("systemctl", "is-system-running", "--wait"))

    def freeze(self) -> None:
        """Stop every process; its kernel still accepts connections."""
        docker("pause", self.container)

    def thaw(self) -> None:
        docker("unpause", self.container)

    def remove(self) -> None:
        docker("rm", "--force", "--volumes", self.container)


def start_host(name: str, key: Path, *, has_network: bool = True, more: Sequence[str] = ()) -> Host:
    """A bare host that lets the key's owner in."""
    places = Places.of()
    container = f"lem-fleet-{os.getpid()}-{name}"
    words = ["run", "--detach", "--name", container, "--hostname", name, "--cgroupns=host"]
    words += ["--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw", "--volume", "/var/lib/docker"]
    words += ["--tmpfs", "/run", "--tmpfs", "/tmp:exec"]
    words += [word for name in CAPABILITIES for word in ("--cap-add", name)]
    words += ["--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"]
    words += ["--volume", f"{places.packages('pytorch')}:{PACKAGES_TARGET}:ro"]
    words += ["--volume", f"{places.models / 'tiny'}:{MODEL}:ro", "--volume", f"{ROOT / 'tests/doubles'}:{DOUBLES}:ro"]
    words += ["--network", NETWORK, "--publish", "127.0.0.1::22"] if has_network else ["--network", "none"]
    host = Host(name, container, has_network)
    script = "cat > ~deployer/.ssh/authorized_keys && chown deployer: ~deployer/.ssh/authorized_keys"
    try:
        docker(*words, *more, host_image())
        host.wait_until_up()
        host.run("bash", "-c", script, stdin=key.with_suffix(".pub").read_bytes())
    except BaseException:
        host.remove()
        raise
    return host


def inventory(hosts: Sequence[Host], key: Path, folder: Path) -> str:
    named = {host.name: host.variables(key, folder / "known_hosts") for host in hosts}
    return json.dumps({"lem": {"hosts": named}}, indent=2)
