"""The weathers: what is done to a campaign in its containers, and what lem has to say and to do."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.campaign_rig import Ended, Running
from tests.doubles.nvml.library import NvmlDouble
from tests.processes import wait_for
from tests.weather.proxy import EngineProxy
from tests.weather.rig import LOCAL_NVML, SERVICE, WeatherRig
from tests.weather.verdict import VICTIM, Case

MIB = 1024 * 1024

# The supervisor is the worker that is not the engine. Its own stdout leads elsewhere, since libraries print; the
# channel is among the pipes that it writes to.
GARBAGE = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        words = open(f"/proc/{pid}/cmdline").read().split(chr(0))
        if words[3:5] != ["worker", ""]:
            continue
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            flags = int(open(f"/proc/{pid}/fdinfo/{name}").read().split()[3], 8)
            if os.readlink(path).startswith("pipe:") and flags & os.O_ACCMODE == os.O_WRONLY:
                os.write(os.open(path, os.O_WRONLY), b"Welcome to this image!" + bytes([10]))
    except OSError:
        continue
"""


def _at(at: str, do: str, **more: Any) -> dict[str, Any]:
    """A rule for the experiment in the middle."""
    return {"at": at, "do": do, "when": {"max_output_tokens": VICTIM}, **more}


LITTLE_MEMORY: Mapping[str, Any] = {
    "deploy": {"resources": {"limits": {"memory": "192m"}}},
    "memswap_limit": "192m",  # without it, what swaps is not killed but slow
}


def _engine(*rules: Mapping[str, Any], once: bool = False, **options: Any) -> Callable[[WeatherRig], Ended]:
    def strike(rig: WeatherRig) -> Ended:
        rig.options.update(options)
        rig.be(
            *({**rule, "once": str(rig.shared / f"once-{index}")} if once else rule for index, rule in enumerate(rules))
        )
        return rig.run("--yes", "--json")

    return strike


def _measuring(act: Callable[[WeatherRig, Running], None], **options: Any) -> Callable[[WeatherRig], Ended]:
    """Something that happens while the experiment in the middle is measured, the first time."""

    def strike(rig: WeatherRig) -> Ended:
        rig.options.update(options)
        hung = rig.shared / "hung"
        rig.be(_at("generate", "hang", once=str(hung)))
        running = rig.start("--yes", "--json")
        running.wait_for_event("phase", phase="window", done=1)
        wait_for(lambda: hung.exists() or None)  # else the next attempt hangs, for the first time
        act(rig, running)
        return running.wait()

    return strike


def _stubborn(at: str, act: Callable[[WeatherRig, Running], None]) -> Callable[[WeatherRig], Ended]:
    """Something that happens while an engine loads or generates that neither hears TERM nor lets Python run.

    It has a child in a session of its own, too, as engines have.
    """

    def strike(rig: WeatherRig) -> Ended:
        phase = "load" if at == "load" else "window"
        child = _at(at, "spawn", own_session=True)
        rig.be(child, *(_at(at, do) for do in ("ignore_term", "hold_gil")))
        running = rig.start("--yes", "--json")
        running.wait_for_event("phase", phase=phase, done=1)
        act(rig, running)
        return running.wait()

    return strike


def _with(**variables: str) -> Callable[[WeatherRig], Ended]:
    def strike(rig: WeatherRig) -> Ended:
        rig.variables.update(variables)
        return rig.run("--yes", "--json")

    return strike


def _bad_file(rig: WeatherRig) -> Ended:
    rig.override.write_text(f"services:\n  {SERVICE}:\n    enviroment: {{}}\n", encoding="utf-8")
    return rig.run("--yes", "--json")


def _lose_engine(rig: WeatherRig) -> Ended:
    with tempfile.TemporaryDirectory(prefix="lem-") as folder:  # the path of a socket has to be short
        proxy = EngineProxy(Path(folder) / "docker.sock")
        rig.variables["DOCKER_HOST"] = proxy.host
        return _measuring(lambda _rig, _running: proxy.lose())(rig)


def _kill_container(rig: WeatherRig, _running: Running) -> None:
    rig.docker("kill", rig.container())


def _pause_container(rig: WeatherRig, _running: Running) -> None:
    rig.docker("pause", rig.container())


def _remove_container(rig: WeatherRig, _running: Running) -> None:
    rig.docker("rm", "--force", rig.container())


def _kill_in_gap(rig: WeatherRig) -> Ended:
    running = rig.start("--yes", "--json")
    running.wait_for_event("gap", gap="configuration")
    rig.docker("kill", rig.container())
    return running.wait()


def _interrupt_start(rig: WeatherRig) -> Ended:
    """Ctrl-C as soon as there is a container, which does not answer yet."""
    rig.be()
    running = rig.start("--yes", "--json")
    wait_for(lambda: rig.containers() or None)
    running.send(signal.SIGINT)
    ended = running.wait()
    assert rig.containers() == []
    return ended


def _kill_all(rig: WeatherRig, _running: Running) -> None:
    """As systemd does it: lem and every client of docker at one stroke."""
    rig.marker.kill()


def _send(*signums: int) -> Callable[[WeatherRig, Running], None]:
    """Signals to lem, each after it has said that it heard the one before."""

    def act(_rig: WeatherRig, running: Running) -> None:
        for number, signum in enumerate(signums):
            if number:
                running.wait_for_text("a second signal kills")
            running.send(signum)

    return act


def _garbage_at_start(rig: WeatherRig) -> Ended:
    folder = rig.shared / "garbage"
    folder.mkdir()
    text = (
        "import os, sys\n"
        "if 'worker' in sys.orig_argv and '--engine' not in sys.orig_argv:\n"
        "    os.write(1, b'Welcome to this image!\\n')\n"
    )
    (folder / "usercustomize.py").write_text(text, encoding="utf-8")
    rig.be(python_path=[str(folder)])
    return rig.run("--yes", "--json")


def _fill(rig: WeatherRig) -> Ended:
    results = rig.folder / "results"
    results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "weather", str(results)], check=True, timeout=10)
    filling = f"head -c 20000000 /dev/zero > {results}/filling 2>/dev/null || true"
    rig.be(_at("generate", "shell", command=filling))
    return rig.run("--yes", "--json")


def _empty(rig: WeatherRig) -> None:
    (rig.folder / "results" / "filling").unlink()


def _gpu(rule: Mapping[str, Any]) -> Callable[[WeatherRig], Ended]:
    """A container with a GPU, to which something happens that a new container cures."""

    def strike(rig: WeatherRig) -> Ended:
        rig.give_gpu(*NvmlDouble.gpu(used_b=2_000_000_000))
        rig.be(rule)
        return rig.run("--yes", "--json")

    return strike


def _once_inside(at: str, line: str, when: int) -> dict[str, Any]:
    command = f"[ -e {LOCAL_NVML}.once ] || echo {line} > {LOCAL_NVML}; touch {LOCAL_NVML}.once"
    return {"at": at, "do": "shell", "command": command, "when": {"max_output_tokens": when}}


def _for_good(line: str) -> Callable[[WeatherRig], Ended]:
    """A GPU to which something happens in the middle that no container cures."""

    def strike(rig: WeatherRig) -> Ended:
        rig.give_gpu(*NvmlDouble.gpu(used_b=2_000_000_000))
        rig.be(_at("generate", "shell", command=f"echo {line} >> {rig.nvml.script}"))
        return rig.run("--yes", "--json")

    return strike


def _mend_gpu(rig: WeatherRig) -> None:
    rig.nvml.say(*NvmlDouble.gpu(used_b=2_000_000_000))


ONE_RESTART = "health_check: {interval_experiments: 1, max_restarts: 1}\n"
CHECKED_OFTEN = "health_check: {interval_experiments: 1}\n"
AT_RESUME = r"Resuming: 2 remaining \(1 completed, 0 failed\)"
# Long enough for a worker to start while three other weathers keep the machine busy.
BRIEF = {"silence_timeout_seconds": 12}

CASES: tuple[Case, ...] = (
    Case(
        "daemon down",
        _with(DOCKER_HOST="unix:///nowhere/docker.sock"),
        "^error: .*Docker engine does not answer",
        2,
        None,
    ),
    Case("daemon lost in the middle", _lose_engine, "Docker engine does not answer", 1, "pending", stops=True),
    Case(
        "image missing",
        _with(LEM_PYTORCH_IMAGE="lem-no-such-image:1"),
        "^error: image lem-no-such-image:1 .* is missing",
        2,
        None,
    ),
    Case("compose file invalid", _bad_file, "^error: .*enviroment", 2, None),
    Case("container killed", _measuring(_kill_container), "its container exited with code 137", 0, "completed"),
    Case("container removed", _measuring(_remove_container), "it has no container", 0, "completed"),
    Case(
        "container killed in a gap",
        _kill_in_gap,
        "the worker ended between two experiments",
        0,
        "completed",
        execution={"config_gap_seconds": 2},
    ),
    Case("container paused", _measuring(_pause_container), "reported no progress", 0, "completed", execution=BRIEF),
    Case(
        "container out of memory",
        _engine(_at("generate", "allocate", bytes=600 * MIB), **LITTLE_MEMORY),
        "ran out of memory",
        1,
        "failed",
    ),
    Case(
        "container out of memory at load",
        _engine(_at("load", "allocate", bytes=600 * MIB), **LITTLE_MEMORY),
        "ran out of memory",
        1,
        "failed",
        execution={"reuse": "none"},
    ),
    Case("engine raises in the middle", _engine(_at("generate", "crash", text="broke")), "broke", 1, "failed"),
    Case(
        "worker falls silent",
        _engine(_at("generate", "hold_gil"), once=True),
        "reported no progress",
        0,
        "completed",
        execution=BRIEF,
    ),
    Case(
        "worker prints garbage",
        _engine(_at("generate", "shell", command=f"python3 -c '{GARBAGE}'; sleep 10"), once=True),
        "sent an invalid message",
        0,
        "completed",
    ),
    Case("worker prints garbage at its start", _garbage_at_start, "Welcome to this image", 2, None),
    Case(
        "host killed while the engine loads",
        _stubborn("load", _send(signal.SIGKILL)),
        AT_RESUME,
        -9,
        "running",
        stops=True,
        execution={"reuse": "none"},
    ),
    Case(
        "host killed while it generates",
        _stubborn("generate", _send(signal.SIGKILL)),
        AT_RESUME,
        -9,
        "running",
        stops=True,
    ),
    Case(
        "host and its docker clients killed",
        _stubborn("generate", _kill_all),
        AT_RESUME,
        -9,
        "running",
        stops=True,
    ),
    Case("Ctrl-C", _measuring(_send(signal.SIGINT)), "stopped; resume with", 130, "pending", stops=True),
    Case("Ctrl-C while containers start", _interrupt_start, "interrupted|stopped", 130, None),
    Case(
        "Ctrl-C twice",
        _stubborn("generate", _send(signal.SIGINT, signal.SIGINT)),
        "stopped; resume with",
        130,
        "pending",
        stops=True,
    ),
    Case("disk full in the results", _fill, "(?i)no space left on device", 1, "pending", stops=True, clear=_empty),
    Case(
        "GPU lost in a running container",
        _gpu(_once_inside("generate", "lost 0 999", VICTIM)),
        "the GPU is lost: NVML says Unknown Error",
        0,
        "completed",
        top=CHECKED_OFTEN,
    ),
    Case(
        "GPU memory held by others",
        _gpu(_once_inside("generate", "memory_used 79000000000", 4)),
        "unhealthy and will be restarted: 99 % of the memory of GPU 0",
        0,
        "completed",
        top=CHECKED_OFTEN,
    ),
    Case(
        "GPU lost for good",
        _for_good("lost 0"),
        "still unhealthy after 1 restart: the GPU is lost: NVML says GPU is lost",
        1,
        "pending",
        stops=True,
        clear=_mend_gpu,
        top=ONE_RESTART,
    ),
    Case(
        "GPU memory held by others for good",
        _for_good("memory_used 79000000000"),
        "still unhealthy after 1 restart: 99 % of the memory",
        1,
        "completed",
        stops=True,
        clear=_mend_gpu,
        top=ONE_RESTART,
    ),
)
