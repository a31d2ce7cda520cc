"""The NVML double answers as NVIDIA's library does, asked by NVIDIA's own Python module in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.doubles.nvml.library import NvmlDouble, build_library

pytestmark = pytest.mark.needs("gcc")

ASK = """
import json, sys
import pynvml

def ask(function, *arguments):
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        return f"{type(error).__name__}: {error}"

said = {"init": ask(pynvml.nvmlInit)}
said["driver"] = ask(pynvml.nvmlSystemGetDriverVersion)
said["cuda"] = ask(pynvml.nvmlSystemGetCudaDriverVersion)
said["count"] = ask(pynvml.nvmlDeviceGetCount)
said["gpus"] = []
for index in range(said["count"] if isinstance(said["count"], int) else 0):
    handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
    if isinstance(handle, str):
        said["gpus"].append(handle)
        continue
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    second = ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    processes = ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    uuid = ask(pynvml.nvmlDeviceGetUUID, handle)
    said["gpus"].append({
        "name": ask(pynvml.nvmlDeviceGetName, handle),
        "uuid": uuid,
        "index": ask(pynvml.nvmlDeviceGetIndex, ask(pynvml.nvmlDeviceGetHandleByUUID, uuid)),
        "capability": ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle),
        "memory": memory if isinstance(memory, str) else [memory.total, memory.used, memory.free],
        "memory_v2": second if isinstance(second, str) else [second.total, second.used, second.free],
        "processes": processes if isinstance(processes, str) else [[p.pid, p.usedGpuMemory] for p in processes],
    })
said["shutdown"] = ask(pynvml.nvmlShutdown)
said["after"] = ask(pynvml.nvmlDeviceGetCount)
json.dump(said, sys.stdout)
"""

LOST_MEANWHILE = """
import sys
import pynvml

pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
print(pynvml.nvmlDeviceGetMemoryInfo(handle).used, flush=True)
sys.stdin.readline()
try:
    print(pynvml.nvmlDeviceGetMemoryInfo(handle).used, flush=True)
except pynvml.NVMLError as error:
    print(error, flush=True)
"""


@pytest.fixture
def double(tmp_path):
    return NvmlDouble(tmp_path / "nvml")


def _run(double, program, *arguments):
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=double.environ(), capture_output=True, text=True, timeout=60, check=False)


def _ask(double):
    finished = _run(double, ASK)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_without_a_script_there_is_no_driver(double):
    assert _ask(double)["init"] == "NVMLError_DriverNotLoaded: Driver Not Loaded"


def test_gpus_are_as_the_script_says(double):
    double.say(
        "driver 999.1  # a comment",
        "cuda 13010",
        "count 2",
        "memory_used 2000000000",
        "",
        "gpu 1",
        "name NVIDIA H200 NVL",
        "uuid GPU-b",
        "capability 8 6",
        "memory_total 6000000000",
        "process 1234 5000000",
        "process 77 -",
    )
    said = _ask(double)
    assert (said["init"], said["driver"], said["cuda"], said["count"]) == (None, "999.1", 13010, 2)
    first, second = said["gpus"]
    assert (first["name"], first["capability"], first["processes"]) == ("NVIDIA Double", [9, 0], [])
    assert first["memory"] == first["memory_v2"] == [80_000_000_000, 2_000_000_000, 78_000_000_000]
    assert second == {
        "name": "NVIDIA H200 NVL",
        "uuid": "GPU-b",
        "index": 1,
        "capability": [8, 6],
        "memory": [6_000_000_000, 2_000_000_000, 4_000_000_000],
        "memory_v2": [6_000_000_000, 2_000_000_000, 4_000_000_000],
        "processes": [[1234, 5_000_000], [77, None]],
    }
    assert first["uuid"] != second["uuid"]
    assert (said["shutdown"], said["after"]) == (None, "NVMLError_Uninitialized: Uninitialized")


def test_a_machine_may_have_no_gpu(double):
    double.say("count 0")
    said = _ask(double)
    assert (said["init"], said["count"], said["gpus"]) == (None, 0, [])


def test_a_function_fails_as_told_and_the_others_do_not(double):
    double.say("fail nvmlDeviceGetMemoryInfo 999", "fail nvmlDeviceGetComputeRunningProcesses 4")
    (gpu,) = _ask(double)["gpus"]
    assert gpu["memory"] == gpu["memory_v2"] == "NVMLError_Unknown: Unknown Error"
    assert gpu["processes"] == "NVMLError_NoPermission: Insufficient Permissions"
    assert gpu["name"] == "NVIDIA Double"


def test_the_start_may_fail(double):
    double.say("fail nvmlInit 999")
    assert _ask(double)["init"] == "NVMLError_Unknown: Unknown Error"


def test_a_gpu_that_is_lost_fails_in_everything_and_its_neighbour_in_nothing(double):
    double.say("count 2", "gpu 0", "lost 0")
    lost, kept = _ask(double)["gpus"]
    assert lost == "NVMLError_GpuIsLost: GPU is lost"
    assert kept["memory"][0] == 80_000_000_000


def test_a_gpu_is_not_lost_before_its_time(double):
    double.say("lost 3600 999")
    (gpu,) = _ask(double)["gpus"]
    assert gpu["name"] == "NVIDIA Double"


def test_a_second_file_is_laid_over_the_first_where_it_is_there(tmp_path):
    double = NvmlDouble(tmp_path / "nvml", more=(str(tmp_path / "second"), str(tmp_path / "missing")))
    double.say("memory_used 5", "name First")
    assert _ask(double)["gpus"][0]["memory"][1] == 5
    (tmp_path / "second").write_text("memory_used 6\n")
    (gpu,) = _ask(double)["gpus"]
    assert (gpu["memory"][1], gpu["name"]) == (6, "First")
    (tmp_path / "second").write_text("lost 0 999\n")
    assert _ask(double)["gpus"] == ["NVMLError_Unknown: Unknown Error"]


def test_a_running_process_sees_what_the_script_says_now(double):
    double.say("memory_used 5")
    command = [sys.executable, "-c", LOST_MEANWHILE]
    with subprocess.Popen(
        command, env=double.environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "5\n"
        double.say("lost 0 999")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "Unknown Error\n"


def test_a_line_that_is_not_understood_is_told_and_fails_everything(double):
    double.say("memory_usd 5")
    finished = _run(double, ASK)
    assert "not understood: memory_usd 5" in finished.stderr
    assert json.loads(finished.stdout)["init"].startswith("NVMLError_InvalidArgument")


def test_lem_reads_it(double):
    double.say(*NvmlDouble.gpu(used_b=2_000_000_000, processes=[(1234, 5_000_000)]))
    finished = subprocess.run(
        [sys.executable, "-m", "lem", "gpus", "--json"],
        env=double.environ(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    reading = json.loads(finished.stdout)
    assert (reading["error"], reading["driver"]) == (None, "580.65.06")
    (gpu,) = reading["gpus"]
    assert (gpu["memory_used_b"], gpu["processes"]) == (2_000_000_000, [{"pid": 1234, "memory_b": 5_000_000}])


def test_the_library_is_built_once_for_each_source(tmp_path):
    folder = build_library(tmp_path)
    (library,) = folder.iterdir()
    before = library.stat()
    assert build_library(tmp_path) == folder
    assert library.stat() == before
