"""`lem doctor`, `lem compose` and `lem gpus`: what they print, and the exit code."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lem.meters.capabilities import Capabilities, CpuCapability, GpuCapability
from lem.meters.control import Note, note_path
from lem.meters.nvml import GpuProcess, GpuReading, GpuState
from lem.meters.samples import GpuHeader
from lem.meters.usage import Roots
from lem.orchestration.compose import packaged_compose_file
from lem.orchestration.doctor import CHECKS, Finding, Host, check_cpu_energy, check_gpu_energy, examine
from lem.orchestration.locks import Holder, gpu_locks, hold_locks
from tests.command_rig import run_lem
from tests.doubles.fake_docker import WITH_GPU, FakeDocker
from tests.doubles.machine import Machine, Process
from tests.doubles.powercap import Powercap
from tests.unit.meters.nvml_stand_in import FakeClock


@pytest.fixture
def fake(fake: FakeDocker) -> FakeDocker:
    fake.change(services={"pytorch": {"image": "img"}})
    return fake


def host(fake: FakeDocker, **more: Any) -> Host:
    (fake.folder / "dev").mkdir(exist_ok=True)
    environ = fake.environ(LEM_CACHE_DIR=str(fake.folder / "cache"))
    dev, powercap = fake.folder / "dev", fake.folder / "powercap"
    roots = Roots(sys=fake.folder / "sys", powercap=powercap)
    more = {"clock": FakeClock(), "roots": roots, **more}  # no test waits to see what else runs here
    return Host(folder=fake.folder, environ=environ, device_folder=dev, **more)


def look(found: Host) -> dict[str, Finding]:
    return dict(examine(found).findings)


def with_gpu(fake: FakeDocker, *pids: int, error: str | None = None) -> Host:
    """A machine with one GPU, as the kernel and NVML show it."""
    found = host(fake)
    (fake.folder / "dev" / "nvidia0").touch()
    processes = tuple(GpuProcess(pid, None) for pid in pids)
    gpus = () if error else (GpuState(0, "GPU-1", "Test GPU", 100, 1, processes),)
    found.__dict__["gpus"] = GpuReading(gpus, None if error else "580.1", error)
    return found


def test_a_machine_is_fit_if_no_check_fails(fake: FakeDocker) -> None:
    findings = look(host(fake))
    assert list(findings) == list(CHECKS)
    assert {item.status for item in findings.values()} <= {"ok", "skipped", "warning"}
    assert "20.10.24" in findings["engine"].message
    assert "2.26.1" in findings["compose"].message
    assert "pytorch" in findings["compose_file"].message
    assert "no RAPL package" in findings["cpu_energy"].message
    Powercap.server(fake.folder / "powercap").make(0)
    assert "package-1/dram" in look(host(fake))["cpu_energy"].message


@pytest.mark.parametrize(
    ("state", "name", "remedy"),
    [
        ({"daemon": "down"}, "engine", "systemctl start docker"),
        ({"compose": None}, "compose", "install"),
        ({"invalid": "yaml: line 2: did not find expected node content"}, "compose_file", "correct the file"),
        ({"images": []}, "images", "pull"),
        ({"services": {"pytorch": WITH_GPU}}, "gpu_runtime", "docker-compose.cpu.yml"),
    ],
)
def test_what_is_missing_is_told_with_its_remedy(
    fake: FakeDocker, state: dict[str, Any], name: str, remedy: str
) -> None:
    fake.change(**state)
    finding = look(host(fake))[name]
    assert finding.status == "failed"
    assert remedy in finding.remedy
    assert examine(host(fake)).failed


def test_a_problem_of_several_checks_is_reported_by_the_first(fake: FakeDocker, tmp_path: Path) -> None:
    without_docker = look(Host(folder=tmp_path, environ={"PATH": str(tmp_path)}))
    assert "install Docker" in without_docker["engine"].remedy
    assert without_docker["disk"].status in ("ok", "warning")
    fake.change(daemon="down")
    without_engine = look(host(fake))
    fake.change(daemon="up", compose=None)
    without_compose = look(host(fake))
    for findings, first, others in (
        (without_docker, "engine", ("compose", "compose_file", "images", "gpu_runtime")),
        (without_engine, "engine", ("images",)),
        (without_compose, "compose", ("compose_file", "images", "gpu_runtime")),
    ):
        assert [name for name, item in findings.items() if item.status == "failed"] == [first]
        assert {findings[name] for name in others} == {Finding("skipped", f"not checked, see {first}")}


def test_the_local_executor_works_without_containers(fake: FakeDocker) -> None:
    assert examine(host(fake)).executors == ("docker", "local")
    fake.change(daemon="down")
    assert examine(host(fake)).executors == ("local",)
    (fake.folder / "results").write_text("")
    assert examine(host(fake)).executors == ()
    assert look(host(fake))["rights"].status == "failed"


def test_an_image_of_an_unnamed_backend_is_a_warning_while_another_is_there(fake: FakeDocker) -> None:
    fake.change(services={"pytorch": {"image": "img"}, "vllm": {"image": "huge"}})
    assert look(host(fake))["images"].status == "warning"
    assert look(host(fake, backends=("pytorch",)))["images"].status == "ok"
    finding = look(host(fake, backends=("vllm",)))["images"]
    assert (finding.status, "huge (vllm)" in finding.message) == ("failed", True)
    assert "no service tensorrt" in look(host(fake, backends=("tensorrt",)))["compose_file"].message


@pytest.mark.parametrize(("engine", "status"), [({}, "failed"), ({"runtimes": {"nvidia": {}}}, "ok")])
def test_a_gpu_needs_a_runtime(fake: FakeDocker, engine: dict[str, Any], status: str) -> None:
    fake.change(services={"pytorch": WITH_GPU}, **engine)
    finding = look(with_gpu(fake))["gpu_runtime"]
    assert finding.status == status
    assert ("NVIDIA Container Toolkit" in finding.remedy) is (status == "failed")


def test_the_driver_and_the_processes_on_its_gpus_are_checked(fake: FakeDocker) -> None:
    idle, busy = look(with_gpu(fake)), look(with_gpu(fake, 4711))["gpu_processes"]
    assert "580.1" in idle["driver"].message
    assert idle["gpu_processes"].status == "ok"
    assert (busy.status, "4711 on GPU 0" in busy.message) == ("warning", True)
    finding = look(with_gpu(fake, error="Driver/library version mismatch"))["driver"]
    assert (finding.status, "mismatch" in finding.message, "reboot" in finding.remedy) == ("failed", True, True)


# The commands


@pytest.fixture
def here(fake: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> FakeDocker:
    for name, value in fake.environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("COMPOSE_FILE", raising=False)
    monkeypatch.chdir(fake.folder)
    return fake


def test_the_document_says_ok_and_lists_the_checks(here: FakeDocker) -> None:
    code, out, _ = run_lem("doctor", "--json")
    document = json.loads(out)
    assert (code, document["ok"], document["executors"]) == (0, True, ["docker", "local"])
    assert [item["name"] for item in document["checks"]] == list(CHECKS)
    assert set(document["checks"][0]) == {"name", "status", "message", "remedy"}
    here.change(daemon="down")
    code, out, _ = run_lem("doctor", "--json")
    assert (code, json.loads(out)["ok"]) == (2, False)


def test_gpu_settings_that_a_killed_campaign_left_are_a_warning_and_restored_or_kept(
    here: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEM_LOCK_DIR", str(here.folder / "locks"))
    assert run_lem("doctor", "--restore")[:2] == (0, "no GPU settings to restore\n")
    (here.folder / "locks").mkdir()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    note = Note("GPU-1", "demo\x1b[2J", boot_id, 650.0, is_clock_locked=False)
    path = note_path(here.folder / "locks", "GPU-1")
    path.write_text(json.dumps(dataclasses.asdict(note)), encoding="utf-8")
    found = json.loads(run_lem("doctor", "--json")[1])["checks"]
    (check,) = [item for item in found if item["name"] == "gpu_settings"]
    assert (check["status"], path.name in check["message"]) == ("warning", True)
    code, out, _ = run_lem("doctor", "--restore")  # without a driver
    assert code == 2
    assert out.startswith("not restored: GPU-1 cannot be restored: ")
    assert path.exists()
    document = json.loads(run_lem("doctor", "--restore", "--json")[1])
    assert (document["ok"], document["restored"][0]["settings"]) == (
        False,
        "GPU-1: power limit 650 W, as before campaign demo�[2J",
    )
    assert run_lem("doctor", "--restore", "--backend", "vllm")[0] == 2
    # What a campaign that runs holds is no failure: the unit of another one would end as failed (ExecStopPost=).
    with hold_locks(gpu_locks(["GPU-1"], os.environ), Holder(1, "node", "other", "now")):
        code, out, _ = run_lem("doctor", "--restore")
        assert (code, out.startswith("in use: GPU GPU-1 is locked by pid 1 on node, campaign other")) == (0, True)
        assert json.loads(run_lem("doctor", "--restore", "--json")[1])["ok"] is True
    assert path.exists()


def test_the_text_says_what_to_do_and_nothing_is_left_behind(here: FakeDocker) -> None:
    before = sorted(here.folder.rglob("*"))
    code, out, _ = run_lem("doctor")
    assert code == 0
    assert [path for path in sorted(here.folder.rglob("*")) if path not in before] == [here.folder / "calls.jsonl"]
    assert out.endswith("this host can run campaigns in containers\n")
    here.change(images=[])
    code, out, _ = run_lem("doctor", "--backend", "pytorch")
    assert code == 2
    assert "→ run `docker pull" in " ".join(out.split())
    assert out.endswith("cannot run campaigns in containers: images; --executor local works\n")
    assert max(map(len, out.splitlines())) <= 100
    (here.folder / "results").write_text("")
    assert run_lem("doctor", "--backend", "pytorch")[1].endswith("cannot run campaigns: images, rights\n")


def test_the_compose_file_is_printed_as_it_is() -> None:
    assert run_lem("compose") == (0, packaged_compose_file(), "")


def test_what_the_gpus_are_doing_can_be_read_back() -> None:
    code, out, _ = run_lem("gpus", "--json")
    reading = json.loads(out)
    assert code == 0
    assert reading.pop("schema_version") == 1
    assert set(reading.pop("energy")) == {"gpus", "gpu_error", "cpu", "sensors"}
    assert json.loads(json.dumps(dataclasses.asdict(GpuReading.from_dict(reading)))) == reading
    assert run_lem("gpus")[0] == 0


# Interference


@dataclasses.dataclass
class Passing(FakeClock):
    """A clock on which something happens while it sleeps."""

    happens: Callable[[float], None] = lambda _: None

    def sleep(self, duration_s: float) -> None:
        super().sleep(duration_s)
        self.happens(duration_s)


@pytest.mark.parametrize(
    ("others", "stolen", "quota", "status", "said"),
    [
        (0.05, 0.0, "max", "ok", "other programs use 0.05 of 2 CPUs"),
        (0.9, 0.0, "max", "warning", "other programs use 0.9 of 2 CPUs: ffmpeg (99) 0.90"),
        (0.0, 0.2, "max", "warning", "the hypervisor gives 0.2 of 2 CPUs to other machines (steal)"),
        (0.0, 0.0, "150000", "warning", "a cgroup limits lem to 1.5 of 2 CPUs"),
        (0.0, 0.0, "400000", "ok", "other programs use 0.00 of 2 CPUs"),
    ],
)
def test_what_would_disturb_an_engine_is_named_before_a_run(
    fake: FakeDocker, tmp_path: Path, others: float, stolen: float, quota: str, status: str, said: str
) -> None:
    own = os.getpid()
    machine = Machine(tmp_path, processes={own: Process(1), 99: Process(1, name="ffmpeg")})
    machine.files["lem.slice/engine/cpu.max"] = f"{quota} 100000\n"
    machine.write()

    def pass_time(elapsed_s: float) -> None:
        machine.processes[own].cpu_s += 0.1 * elapsed_s  # lem's own is no interference
        machine.processes[99].cpu_s += others * elapsed_s
        machine.busy_s += (0.1 + others) * elapsed_s
        machine.steal_s += stolen * elapsed_s
        machine.idle_s += (1.9 - others - stolen) * elapsed_s
        machine.write()

    found = look(host(fake, roots=machine.roots, clock=Passing(happens=pass_time)))["interference"]
    assert (found.status, said in found.message) == (status, True)
    assert bool(found.remedy) is (status == "warning")


def test_a_machine_that_does_not_show_its_cpus_is_not_judged(fake: FakeDocker, tmp_path: Path) -> None:
    assert look(host(fake, roots=Machine(tmp_path).roots))["interference"].status == "skipped"


# Energy meters

COUNTED = GpuCapability(GpuHeader(0, "GPU-a", "Test", "580.1", power_source="instant"), 0.1)
INTEGRATED = GpuCapability(GpuHeader(1, "GPU-b", "Test", "580.1", power_source="average", counter_error="too old"))
COVERED = GpuCapability(
    GpuHeader(1, "0000:06:00.0", "MI250", "amdgpu", counter_error="none", power_error="second", covered_by="GPU-a")
)
DARK = GpuCapability(GpuHeader(2, "GPU-c", "Test", "580.1", counter_error="MIG is on", power_error="MIG is on"))


@pytest.mark.parametrize(
    ("gpus", "status", "message", "remedy"),
    [
        ((COUNTED,), "ok", "every 100 ms", ""),
        ((COUNTED, COVERED), "ok", "GPU 0: energy counter, updated every 100 ms", ""),
        ((INTEGRATED, COVERED), "warning", "GPU 1: too old", "integrated from power and labelled so"),
        ((COUNTED, INTEGRATED), "warning", "GPU 1: too old", "integrated from power and labelled so"),
        ((COUNTED, INTEGRATED, DARK), "warning", "GPU 2: MIG is on", "null in the records"),
        ((), "skipped", "NVML sees no GPU", ""),
    ],
)
def test_what_the_gpus_can_tell(gpus: tuple[GpuCapability, ...], status: str, message: str, remedy: str) -> None:
    finding = check_gpu_energy(Capabilities(CpuCapability(), gpus, None if gpus else "NVML sees no GPU"))
    assert finding.status == status
    assert message in finding.message
    assert remedy in finding.remedy
    assert bool(finding.remedy) is bool(remedy)


@pytest.mark.parametrize(
    ("cpu", "status", "message", "remedy"),
    [
        (CpuCapability(("package-0", "package-0/dram")), "ok", "package-0/dram", ""),
        (CpuCapability(("package-0",), missing=("psys: gone",)), "warning", "not psys: gone", ""),
        (CpuCapability(rapl_error="may not be read", rapl_remedy="chmod"), "warning", "may not be read", "chmod"),
        (CpuCapability(rapl_error="none", rapl_remedy="x", tdp_w=205.0), "warning", "would use 205 W", "x"),
    ],
)
def test_what_the_cpus_can_tell(cpu: CpuCapability, status: str, message: str, remedy: str) -> None:
    finding = check_cpu_energy(cpu)
    assert (finding.status, finding.remedy) == (status, remedy)
    assert message in finding.message
