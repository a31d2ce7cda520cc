"""A stored plan as a job array, on a Slurm of one node that the test starts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.campaign_rig import ROOT, CampaignRig, campaign_text
from tests.processes import wait_for

PATIENCE_S = 300
_CONFIGURATION = """\
ClusterName=lem
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
NodeName={node} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Commands of Slurm in the folder of a campaign."""

    def __init__(self, rig: CampaignRig, environ: Mapping[str, str]) -> None:
        self.rig = rig
        self._environ = dict(environ)

    def run(self, *words: str) -> str:
        ended = subprocess.run(
            words, cwd=self.rig.folder, env=self._environ, capture_output=True, text=True, check=False, timeout=60
        )
        assert ended.returncode == 0, f"{words}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def lem(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lem", *words]
        folder, environ = self.rig.folder, self._environ
        return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)

    def tasks(self) -> dict[str, str]:
        """The state of each job that is not over, by its ID."""
        return dict(line.split() for line in self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines())

    def wait(self, what: str, is_so: Callable[[dict[str, str]], bool]) -> None:
        try:
            wait_for(lambda: True if is_so(self.tasks()) else None, PATIENCE_S)
        except TimeoutError as error:
            raise AssertionError(f"no {what}: {self.tasks()}") from error


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    node = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(node=node, folder=folder, ports=_free_ports(2)))
    (tmp_path / "work").mkdir()
    rig = CampaignRig(tmp_path / "work", campaign_text(outputs=(4, 8, 12, 16), cycles=3))
    hold = {"at": "generate", "do": "shell", "command": f"while [ -e {rig.folder}/hold ]; do sleep 0.1; done"}
    found = Slurm(rig, {**rig.environ([hold]), "SLURM_CONF": str(configuration)})
    environ = {**os.environ, "SLURM_CONF": str(configuration)}
    daemons = [subprocess.Popen([name, "-D"], env=environ) for name in ("slurmctld", "slurmd")]
    try:
        idle = ["sinfo", "-h", "-t", "idle"]
        wait_for(lambda: subprocess.run(idle, env=environ, capture_output=True, check=False).stdout or None, PATIENCE_S)
        yield found
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)
        rig.marker.kill()


@pytest.mark.needs("slurm")
def test_an_array_whose_tasks_were_cancelled_and_requeued_ends_with_a_complete_merge(slurm: Slurm) -> None:
    rig, hold = slurm.rig, slurm.rig.folder / "hold"
    hold.touch()
    assert rig.run("--write-plan", "plan.json", "--parts", "4").code == 0
    script = slurm.lem("fleet", "slurm", "plan.json", "--python", sys.executable, "--sbatch=--cpus-per-task=1")
    assert script.returncode == 0, script.stderr
    (rig.folder / "job.sbatch").write_text(script.stdout)
    merging = slurm.run("bash", "job.sbatch").split()[-1]
    array = str(int(merging) - 1)
    slurm.wait("task", lambda tasks: all(tasks.get(f"{array}_{place}") == "RUNNING" for place in range(4)))
    begun = "results/demo/*/*/*/attempt-1/prompts.jsonl"
    wait_for(lambda: True if len(list(rig.folder.glob(begun))) == 4 else None, PATIENCE_S)
    assert slurm.tasks()[merging] == "PENDING"

    slurm.run("scancel", f"{array}_2")
    slurm.run("scontrol", "requeue", f"{array}_1")
    slurm.wait("requeue", lambda tasks: f"{array}_2" not in tasks and tasks.get(f"{array}_1") == "PENDING")
    statuses = {item["part"]: item["state"] for item in json.loads(slurm.lem("status", "demo", "--json").stdout)}
    assert statuses == {"part-1": "running", "part-2": "stopped", "part-3": "stopped", "part-4": "running"}
    slurm.run("scontrol", "update", f"JobId={array}_1", "StartTime=now")  # else two minutes later
    hold.unlink()
    again = slurm.run("sbatch", "--parsable", "--array=2", "job.sbatch").strip()  # SLURM_ARRAY_TASK_COUNT is 1 then
    slurm.wait("end", lambda tasks: f"{again}_2" not in tasks and merging not in tasks)

    # The merge waited for the array, but not for the part that was submitted again.
    merged = slurm.lem("merge", "results", "--output", "merged", "--plan", "plan.json", "--json")
    output = "".join(path.read_text() for path in rig.folder.glob("slurm-*.out"))
    assert merged.returncode in (0, 2), merged.stderr  # 2: the anchors of a busy machine differ
    found = slurm.lem("merge", "results", "--output", "all", "--plan", "plan.json", "--anchor-tolerance=1e9%", "--json")
    document = json.loads(found.stdout)
    assert (found.returncode, document["lacking"]) == (0, []), output
    interrupted = [(item["kind"], Path(item["path"]).parts[3]) for item in document["problems"]]
    assert interrupted == [("missing", "part-2"), ("missing", "part-3")]
    planned = json.loads((rig.folder / "plan.json").read_text())["hosts"]
    assert document["results"] == sum(len(host["exp_ids"]) for host in planned) == 21
    identities = [record.identity for record in rig.records()]
    assert len({(item.host, item.experiment_id) for item in identities}) == len(identities) == 21
    assert {item.host for item in identities} == {"part-1", "part-2", "part-3", "part-4"}


_STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""
# A machine that may not raise limits refuses those that podman sets. crun, the default, refuses a machine with cgroups
# of both versions, as the hosts of the lab leave it; runc comes with Docker.
_ENGINE = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
"""
_IMAGE = """\
FROM lem-lab-base
COPY doubles /opt/doubles
ENV PYTHONPATH=/opt/doubles
"""


@pytest.mark.long
@pytest.mark.needs("lab", "podman")
def test_a_part_runs_in_an_image_with_podman(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    rig = CampaignRig(tmp_path / "work", campaign_text(outputs=(4, 8), cycles=2))
    storage, engine = tmp_path / "storage.conf", tmp_path / "containers.conf"
    storage.write_text(_STORAGE.format(folder=tmp_path))
    engine.write_text(_ENGINE)
    environ = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage), "CONTAINERS_CONF": str(engine)}

    def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=rig.folder, env=environ, text=True, capture_output=True, check=True, **more)

    try:
        base = subprocess.run(["docker", "save", "lem-lab-base"], capture_output=True, check=True).stdout
        subprocess.run(["podman", "load"], env=environ, input=base, capture_output=True, check=True)
        (tmp_path / "image").mkdir()
        shutil.copytree(ROOT / "tests/doubles", tmp_path / "image/doubles")
        for name in ("torch", "transformers"):  # lem looks for them before it begins
            (tmp_path / f"image/doubles/{name}-1.dist-info").mkdir()
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
            (tmp_path / f"image/doubles/{name}-1.dist-info/METADATA").write_text(metadata)
        (tmp_path / "image/Containerfile").write_text(_IMAGE)
        run("podman", "build", "--tag", "engine", str(tmp_path / "image"))
        run(sys.executable, str(ROOT / "lem.pyz-build/build.py"), "--output", "lem.pyz")
        run(sys.executable, "lem.pyz", "campaign", "c.yaml", "--write-plan", "plan.json", "--parts", "2")
        words = ("fleet", "slurm", "plan.json", "--container", "podman", "--image", "localhost/engine")
        (rig.folder / "job.sbatch").write_text(run(sys.executable, "lem.pyz", *words).stdout)
        for task in ("0", "1"):  # as Slurm runs them
            subprocess.run(
                ["bash", "job.sbatch"], cwd=rig.folder, env={**environ, "SLURM_ARRAY_TASK_ID": task}, check=True
            )
        merge = ("merge", "results", "--output", "merged", "--plan", "plan.json", "--anchor-tolerance=1e9%", "--json")
        document = json.loads(run(sys.executable, "lem.pyz", *merge).stdout)
        assert document["lacking"] == []
        identities = [record.identity for record in rig.records()]
        assert {(item.host, item.node) for item in identities} == {
            ("part-1", socket.gethostname()),
            ("part-2", socket.gethostname()),
        }
        assert {record.environment.versions["python"] for record in rig.records()} == {"3.11.2"}
    finally:
        subprocess.run(["podman", "system", "reset", "--force"], env=environ, capture_output=True, check=False)
