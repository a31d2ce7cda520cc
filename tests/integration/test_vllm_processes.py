"""The vllm backend as it runs by default: the engine compiles, in processes of its own, and leaves none of them."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from lem.base.errors import EngineError
from lem.engines.protocol import Completion, Engine
from lem.engines.vllm import load
from tests.integration.engine_answers import Arrivals, answers, outputs, prompts, served
from tests.integration.engine_answers import vllm_experiment as experiment
from tests.processes import wait_for

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("victim", "signum", "is_permanent"),
    [("Worker", signal.SIGILL, True), pytest.param("", signal.SIGKILL, False, marks=pytest.mark.long)],
)
def test_the_default_engine_compiles_in_processes_of_its_own_and_leaves_none(
    wide_tiny_model: Path, victim: str, signum: signal.Signals, is_permanent: bool
) -> None:
    """Nor sockets; and a token of the hub is found in none of them."""
    before = processes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        config = experiment(wide_tiny_model, {"enforce_eager": None})
        engine = load(config, {"HF_TOKEN": "hf_planted_in_a_test"})
        report = engine.report
        try:
            started = processes() - before
            assert any(read(pid, "environ") for pid in started)
            for pid in started:
                assert b"hf_planted_in_a_test" not in read(pid, "environ") + read(pid, "cmdline")
            sockets = {folder for pid in started if (folder := variable(pid, "VLLM_RPC_BASE_PATH"))}
            assert {any(item.is_socket() for item in Path(folder).iterdir()) for folder in sockets} == {True}
            assert report.effective["multiprocessing"] is True
            assert report.effective["vllm"]["enforce_eager"] is False
            assert report.effective["engine"]["compilation_config"]["mode"] != "NONE"
            assert {item.error for item in served(engine, prompts()[:2], prompts()[2:])} == {None}
            found = answers(engine, prompts(), observe_tokens=True)
            assert all(len(item.token_times_ns or ()) == len(item.output_ids) > 0 for item in found)
            assert [item.output_ids for item in found] == outputs(engine, prompts())
            victims = {pid for pid in started if victim.encode() in read(pid, "comm")}
            assert_told_at_once_when_killed(engine, victims, signum, is_permanent=is_permanent)
        finally:
            engine.close()
    wait_for(lambda: None if processes() - before else True)
    assert not any(Path(folder).exists() for folder in sockets)


def assert_told_at_once_when_killed(
    engine: Engine, victims: set[int], signum: signal.Signals, *, is_permanent: bool
) -> None:
    """An engine that is gone is no failure of single requests, nobody waits for it, and its signal is named."""
    assert victims

    class Killing(Arrivals):
        def complete(self, completion: Completion) -> None:
            super().complete(completion)
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)

    # vLLM names the process if its monitor reports the end; a fault handler's output has no name.
    words = rf"its process (\S+ )?was killed by {signum.name} while generating"
    with pytest.raises(EngineError, match=words) as caught:
        engine.serve(Killing(prompts()[:1], prompts()[1:]))
    assert (caught.value.kind, caught.value.is_permanent) == ("engine", is_permanent)
    with pytest.raises(EngineError, match=words):
        engine.generate(prompts(), observe_tokens=False)


def processes() -> set[int]:
    """The living processes that descend from this one, without Python's own helper, which stays until the end."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                is_helper = b"resource_tracker" in read(int(folder.name), "cmdline")
                if fields[0] != "Z" and not is_helper:
                    parents[int(folder.name)] = int(fields[1])
    found = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return found - {os.getpid()}


def read(pid: int, name: str) -> bytes:
    """What /proc tells of a process; nothing of one that has ended, as those that compile soon have."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def variable(pid: int, name: str) -> str:
    values = (
        item.partition(b"=")[2] for item in read(pid, "environ").split(b"\0") if item.startswith(f"{name}=".encode())
    )
    return next(values, b"").decode()


@pytest.mark.long
def test_a_failure_in_the_engines_process_is_told_with_its_cause(wide_tiny_model: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        config = experiment(
            wide_tiny_model, {"gpu_memory_utilization": 0.99, "extra": {"num_gpu_blocks_override": None}}
        )
        with pytest.raises(EngineError) as caught:
            load(config, {})
    assert (caught.value.kind, caught.value.is_permanent) == ("out_of_memory", True)
    assert "See root cause above" not in caught.value.message
