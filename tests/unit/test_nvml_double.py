"""The NVML double answers as NVIDIA's library does, asked by NVIDIA's own Python module in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import (
    NS_PER_S,
    Counter,
    Events,
    GpuProcess,
    GpuTrace,
    Level,
    Load,
    Point,
    PowerSignal,
    Ripple,
    Sensor,
    Thermal,
    Trace,
    random_trace,
)

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


def test_a_function_fails_as_told_and_the_others_do_not(double):
    double.say("fail nvmlDeviceGetMemoryInfo 999", "fail nvmlDeviceGetComputeRunningProcesses 4")
    (gpu,) = _ask(double)["gpus"]
    assert gpu["memory"] == gpu["memory_v2"] == "NVMLError_Unknown: Unknown Error"
    assert gpu["processes"] == "NVMLError_NoPermission: Insufficient Permissions"
    assert gpu["name"] == "NVIDIA Double"


def test_a_gpu_that_is_lost_fails_in_everything_and_its_neighbour_in_nothing(double):
    double.say("count 2", "gpu 0", "lost 0", "gpu 1", "lost 3600 999")
    lost, kept = _ask(double)["gpus"]
    assert lost == "NVMLError_GpuIsLost: GPU is lost"
    assert kept["memory"][0] == 80_000_000_000


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


METER = """
import ctypes, json, os, sys, time
import pynvml

pynvml.nvmlInit()

def ask(function, *arguments):
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        return str(error)

def field(handle, name, kind, scope=0):
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [(name, scope)])
    return ask(pynvml._nvmlCheckReturn, value.nvmlReturn) if value.nvmlReturn else getattr(value.value, kind)

def utilisation(handle):
    rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return rates.gpu

def stamped(function, *arguments):
    before_ns = time.monotonic_ns()
    said = ask(function, *arguments)
    return [before_ns, said, time.monotonic_ns()]

def look(index):
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return {
        "counter": stamped(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle),
        "energy": stamped(field, handle, pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, "ullVal"),
        "instant": stamped(field, handle, pynvml.NVML_FI_DEV_POWER_INSTANT, "uiVal"),
        "average": stamped(pynvml.nvmlDeviceGetPowerUsage, handle),
        "field_average": stamped(field, handle, pynvml.NVML_FI_DEV_POWER_AVERAGE, "uiVal"),
        "temp": stamped(pynvml.nvmlDeviceGetTemperatureV, handle, pynvml.NVML_TEMPERATURE_GPU),
        "events": stamped(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
        "sm_clock": stamped(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "utilisation": stamped(utilisation, handle),
        "pids": stamped(lambda: [item.pid for item in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]),
    }
"""

AT_TIMES = (
    METER
    + """
looks = []
for now_ns in json.loads(sys.argv[2]):
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(f"now {now_ns}\\n")
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    looks.append([look(index) for index in range(pynvml.nvmlDeviceGetCount())])
json.dump(looks, sys.stdout)
"""
)


# Real time, with an engine of its own that works meanwhile.
WORKING = (
    METER
    + """
def be(state):
    with open(sys.argv[1], "a") as file:
        file.write(f"{time.monotonic_ns()} {state}\\n")

looks = []
for number in range(300):
    if number in (50, 150):
        be(1)
    if number in (100, 250):
        be(0)
    looks.append([look(0)])
json.dump(looks, sys.stdout)
"""
)

ORIGIN_NS = 7_000 * NS_PER_S
EVERYTHING = PowerSignal(
    points=(Point(1.0, 80.0), Point(2.0, 120.0), Point(2.0, 30.0), Point(9.0, 60.0)),
    levels=(Level(0.5, 90.0), Level(2.0, 400.0, 0.05), Level(5.0, 300.0, 0.0), Level(8.0, 95.0, 1.5)),
    ripples=(Ripple(2.0, 8.0, 40.0, 10.0, 0.3), Ripple(2.5, 7.0, 15.0, 20.0, 1.1)),
)
RICH = GpuTrace(
    uuid="GPU-rich",
    name="NVIDIA H200 NVL",
    signal=EVERYTHING,
    counter=Counter(0.1, 0.03, 0.017, lag_s=0.02, offset_mj=123_456_789_012, gain=1.02, seed=77, resets_s=(6.21,)),
    instant=Sensor(0.025, 0.1, jitter_s=0.01, phase_s=0.03, lag_s=0.015, quantum_w=0.5, noise_w=3.0, seed=5),
    thermal=Thermal(27.0, 0.09, 1.5),
    events=(Events(3.0, 4.0, 0x40), Events(3.5, 6.0, 0x4)),
    sm_clocks_mhz=((0.0, 1980), (3.0, 1410)),
    utilisation_percent=((0.0, 0), (2.0, 97), (8.0, 3)),
    processes=(GpuProcess(11, 5_000), GpuProcess(12, 6_000, 2.0, 8.0)),
    power_limit_w=600.0,
    more=("enforced_limit 550",),
)
COARSE = GpuTrace(
    signal=PowerSignal(points=(Point(0.0, 200.0),)),
    counter=Counter(0.5, resolution_mj=1_000),
    instant=Sensor(0.1, 0.1),
    temp_c=61,
    persistence=False,
)
SCRIPTED = Trace(ORIGIN_NS, (RICH, COARSE))


def _look_at(tmp_path, trace, times_ns):
    now = tmp_path / "now"
    double = NvmlDouble(tmp_path / "nvml", more=(str(now),))
    double.say(*trace.lines())
    finished = _run(double, AT_TIMES, str(now), json.dumps(list(times_ns)))
    assert finished.stderr == ""
    return [[{key: said for key, (_, said, _) in gpu.items()} for gpu in gpus] for gpus in json.loads(finished.stdout)]


def test_the_library_says_what_its_twin_says_at_every_time(tmp_path):
    times_ns = [ORIGIN_NS + 47_000_001 * number for number in range(-40, 260)]
    for at_ns, looks in zip(times_ns, _look_at(tmp_path, SCRIPTED, times_ns), strict=True):
        for gpu, look in enumerate(looks):
            assert look["counter"] == look["energy"] == SCRIPTED.counter_mj(at_ns, gpu)
            assert look["instant"] == round(1000 * SCRIPTED.instant_w(at_ns, gpu))
            assert look["average"] == look["field_average"] == round(1000 * SCRIPTED.average_w(at_ns, gpu))
            assert look["temp"] == SCRIPTED.temp_c(at_ns, gpu)
            assert look["events"] == SCRIPTED.event_mask(at_ns, gpu)
            assert look["sm_clock"] == SCRIPTED.sm_clock_mhz(at_ns, gpu)
            assert look["utilisation"] == SCRIPTED.utilisation_percent(at_ns, gpu)
            assert look["pids"] == list(SCRIPTED.pids(at_ns, gpu))


@pytest.mark.parametrize("mode", ["closed", "steady"])
def test_the_library_replays_random_traces(tmp_path, mode):
    window = (ORIGIN_NS, ORIGIN_NS + 10 * NS_PER_S)
    times_ns = [ORIGIN_NS + 173_000_001 * number for number in range(-40, 100)]
    for seed in range(3):
        trace = random_trace(seed, 0.1, with_window=window, mode=mode)
        for at_ns, (look,) in zip(times_ns, _look_at(tmp_path, trace, times_ns), strict=True):
            assert look["counter"] == trace.counter_mj(at_ns)
            assert look["instant"] == round(1000 * trace.instant_w(at_ns))
            assert look["temp"] == trace.temp_c(at_ns)


def test_the_library_follows_the_log_of_an_engine(tmp_path):
    states = [(0.2, 0), (1.0, 1), (1.02, 1), (2.5, 0.4), (2.6, 0), (4.0, 1), (7.0, 0)]
    text = "".join(f"{ORIGIN_NS + round(at * NS_PER_S)} {state}\n" for at, state in states)
    log = tmp_path / "load"
    load = Load(str(log), 85.0, 410.0, 0.05, 0.3, ripples=((30.0, 10.0, 0.2), (12.0, 20.0, 0.0)), events=0x4)
    trace = Trace(ORIGIN_NS, (GpuTrace(load=load, counter=Counter(0.1, 0.02, seed=3), thermal=Thermal(tau_s=0.3)),))
    log.write_text(f"{text}{ORIGIN_NS + 8 * NS_PER_S} 1")  # a line that is still being written
    times_ns = [ORIGIN_NS + 31_000_001 * number for number in range(-10, 290)]
    worked = trace.after_load({0: text})
    for at_ns, (look,) in zip(times_ns, _look_at(tmp_path, trace, times_ns), strict=True):
        assert look["counter"] == worked.counter_mj(at_ns)
        assert look["instant"] == round(1000 * worked.instant_w(at_ns))
        assert look["temp"] == worked.temp_c(at_ns)
        assert look["events"] == worked.event_mask(at_ns)
        assert look["utilisation"] == worked.utilisation_percent(at_ns)


def test_in_real_time_it_follows_an_engine_and_its_counter_never_falls(tmp_path):
    load = Load(str(tmp_path / "load"), 80.0, 400.0, 0.005, 0.01)
    trace = Trace(time.monotonic_ns(), (GpuTrace(load=load, counter=Counter(0.001)),))
    double = NvmlDouble(tmp_path / "nvml")
    double.say(*trace.lines())
    counts = [gpu["counter"] for (gpu,) in json.loads(_run(double, WORKING, load.path).stdout)]
    values = [said for _, said, _ in counts]
    assert values == sorted(values)
    states = [line.split()[1] for line in (tmp_path / "load").read_text().splitlines()]
    assert states == ["1", "0", "1", "0"]
    worked = trace.after_load()
    for before_ns, said, after_ns in counts:
        assert worked.counter_mj(before_ns) - 1 <= said <= worked.counter_mj(after_ns) + 1


def test_a_failure_is_of_one_gpu_and_of_its_time(tmp_path):
    denied = dataclasses.replace(COARSE, more=("fail nvmlDeviceGetTotalEnergyConsumption 4 10 20", "fail_field 186 3"))
    trace = Trace(ORIGIN_NS, (denied, COARSE))
    times_ns = [ORIGIN_NS + seconds * NS_PER_S for seconds in (9, 10, 20)]
    looks = _look_at(tmp_path, trace, times_ns)
    assert [isinstance(gpus[0]["counter"], int) for gpus in looks] == [True, False, True]
    assert looks[1][0]["counter"] == "Insufficient Permissions"
    assert [gpu["instant"] for gpu in looks[0]] == ["Not Supported", 200_000]
    assert all(isinstance(gpus[1]["counter"], int) for gpus in looks)


COUNT = "print(*(pynvml.nvmlDeviceGetVirtualizationMode(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in (0, 1)))"
DEPRECATED = """
print(pynvml.nvmlDeviceGetTemperature(handle, 0))
print(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
"""
BEYOND = """
for index in (2, 8, 9, 4_000_000_000):
    print(error_of(pynvml.nvmlDeviceGetHandleByIndex, index))
"""
INSTANCE = """
handle = pynvml.nvmlDeviceGetHandleByUUID("MIG-b")
print(pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetIndex(handle))
print(error_of(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle), error_of(pynvml.nvmlDeviceGetMigMode, handle))
print(error_of(pynvml.nvmlDeviceGetHandleByUUID, "MIG-c"))
"""
VERSIONS = """
temperature = pynvml.c_nvmlTemperature_v1_t(version=pynvml.nvmlTemperature_v1, sensorType=0)
call = pynvml.nvmlLib.nvmlDeviceGetTemperatureV
print(call(handle, ctypes.byref(temperature)), temperature.temperature)
temperature.version = 0x0200000C
print(call(handle, ctypes.byref(temperature)))
"""
FIELDS = """
values = pynvml.nvmlDeviceGetFieldValues(handle, [186, (185, 0), 83, 1])
print([(value.fieldId, value.nvmlReturn, value.valueType) for value in values], values[1].value.uiVal)
"""
CUT = Trace(ORIGIN_NS, (COARSE, GpuTrace(signal=EVERYTHING, mig=True, instances=("MIG-a", "MIG-b"))))


@pytest.mark.parametrize(
    ("script", "program", "said"),
    [
        (("count 1", "temperature 44", "events -1 1e9 0x44"), DEPRECATED, "44 68"),
        (("count 2", "gpu 1", "virtualization 2"), COUNT, "0 2"),
        (("count 2",), BEYOND, " ".join(["Invalid Argument"] * 4)),
        (CUT.lines(), INSTANCE, "MIG-b 1 Not Supported Not Supported Not Found"),
        (NvmlDouble.gpu(), VERSIONS, "0 30 25"),
        (
            ("count 1", "point 0 100", "fail_field 186 4"),
            FIELDS,
            "[(186, 4, 0), (185, 0, 1), (83, 0, 3), (1, 3, 1)] 100000",
        ),
    ],
    ids=["deprecated names", "virtual", "beyond the last", "MIG instance", "structure versions", "fields"],
)
def test_what_a_program_asks(double, script, program, said):
    begin = """
import ctypes, pynvml
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
def error_of(function, *arguments):
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        return error
"""
    double.say(*script)
    assert _run(double, begin + program).stdout.split() == said.split()


@pytest.mark.parametrize(
    "lines",
    [
        ("point 1",),
        ("level 5 1 1 x",),
        ("counter perod 0.1",),
        ("counter period 0",),
        ("load /tmp/a 1 2 3",),
        ("fail nvmlDeviceGetPowerUsage",),
        ("point 2 1", "point 1 1"),
    ],
    ids=" ".join,
)
def test_a_line_with_other_values_is_not_understood(double, lines):
    double.say("count 1", *lines)
    assert f"not understood: {lines[-1]}" in _run(double, "import pynvml; pynvml.nvmlInit()").stderr
