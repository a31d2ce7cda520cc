"""`lem worker`, and the other commands that lem itself starts."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from lem.base import process
from lem.base.errors import ExitCode, UserError
from lem.base.launch import own_command
from lem.base.units import KIB
from lem.worker.guardian import end_marked, start_guarded


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "`lem worker`: the side of lem next to the engine; started by `lem campaign`, not by people."
    add = parser.add_argument
    add("--engine", action="store_true", help="run as the engine process of a worker")
    add("--control-fd", type=int, metavar="N", help="descriptor of the control pipe (--engine, --program)")
    add("--message-fd", type=int, metavar="N", help="descriptor of the message pipe (--engine, --program)")
    add("--end-marked", metavar="MARK", help="kill what is left of the worker with this mark")
    add("--sampler", action="store_true", help="run as the process that samples the meters")
    add("--output", type=Path, metavar="FILE", help="the log to create (--sampler)")
    add(
        "--gpu",
        action="append",
        default=[],
        metavar="UUID",
        help="a GPU; repeatable (--sampler, --hold)",
    )
    add("--interval-ms", type=int, default=100, metavar="N", help="sampling interval; 0: none (--sampler)")
    add("--energy", default="auto", metavar="METER", help="measurement.energy of the experiment (--sampler)")
    add("--tdp", type=float, metavar="W", help="design power of all CPU packages (--sampler)")
    add("--hold", type=Path, metavar="FOLDER", help="hold settings of GPUs until stdin is closed; notes go to FOLDER")
    add("--settings", metavar="JSON", help="the section gpu of an experiment (--hold)")
    add("--campaign", default="", metavar="NAME", help="for whom (--hold)")
    add("--pulse", type=float, metavar="S", help="put pulses of work of S seconds on the first GPU")
    add("--tether", nargs=argparse.REMAINDER, metavar="WORD", help="run this lem command until stdin is closed")
    add("--service", nargs=argparse.REMAINDER, metavar="WORD", help="run a compose service as if it were this process")
    add("--end-containers", metavar="MARK", help="once stdin is closed, remove the containers with this mark")
    add("--program", nargs=argparse.REMAINDER, metavar="WORD", help="run this program until the control pipe hangs up")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    if args.pulse is not None:
        from lem.engines.pytorch import pulse

        out.writelines(f"{json.dumps(edges)}\n" for edges in pulse(args.pulse))
        return ExitCode.OK
    if args.sampler:
        return _run_sampler(args, err)
    if args.hold is not None:
        from lem.config.sections import GpuConfig
        from lem.meters.control import hold

        wanted = GpuConfig.from_dict(json.loads(args.settings))
        return hold(args.gpu, wanted, args.hold, args.campaign, out, err)
    if args.end_marked is not None:
        return ExitCode.EXPERIMENT_FAILED if end_marked(args.end_marked) else ExitCode.OK
    if args.tether is not None:
        return run_tethered(args.tether)
    if args.service is not None or args.end_containers is not None:
        from lem.orchestration import served

        return served.run_service(args.service) if args.service else served.end_containers(args.end_containers)
    if args.program is not None:
        return run_guarded(args.control_fd, args.message_fd, args.program)
    if not args.engine:
        from lem.worker.supervisor import supervise

        return supervise()
    if args.control_fd is None or args.message_fd is None:
        raise UserError("worker --engine needs --control-fd and --message-fd", "run `lem worker`, which passes them")
    start_guarded(args.control_fd, args.message_fd)
    # Imported after the fork: the guardian stays small.
    from lem.worker.engine import serve_pipes

    return serve_pipes(args.control_fd, args.message_fd)


def _run_sampler(args: argparse.Namespace, err: TextIO) -> int:
    from lem.meters import sampler

    if args.output is None:
        raise UserError("worker --sampler needs --output", "give the path of the log")
    if not sampler.is_interval(args.interval_ms):
        shortest, longest = sampler.SHORTEST_INTERVAL_MS, sampler.LONGEST_INTERVAL_MS
        expected = f"expected 0, or between {shortest} and {longest}"
        raise UserError(f"--interval-ms {args.interval_ms}: {expected}", "the default is 100")
    options = sampler.SamplerOptions(args.output, tuple(args.gpu), args.interval_ms, args.tdp, args.energy)
    return sampler.run_sampler_process(options, err)


_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # as shells have it


def run_guarded(control_fd: int, message_fd: int | None, words: Sequence[str]) -> int:
    """Run a program under a guardian once a byte has come from the control pipe; the guardian ends as it does.

    One byte goes through the message pipe, if there is one, when both are there; it is closed when the guardian ends.
    """
    start_guarded(control_fd)
    if message_fd is not None:
        os.set_inheritable(message_fd, False)
        os.write(message_fd, b"!")
    if not os.read(control_fd, 1):
        return ExitCode.OK
    os.set_inheritable(control_fd, False)
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_DFL)  # Python ignores them, and programs inherit that
    try:
        os.execvp(words[0], [*words])  # noqa: S606 - without a shell
    except OSError as error:
        os.write(2, f"lem: {words[0]}: {error.strerror}\n".encode())
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE


GRACE_S = 20.0
_READ_B = 64 * KIB
_POLL_S = 0.5


def run_tethered(arguments: Sequence[str]) -> int:
    """The exit code of `lem ARGUMENTS`, which ends with stdin, and whose variables are the first line, in JSON."""
    command = (*own_command(sys.executable), *arguments)
    env = {**os.environ, **_read_variables()}
    child = process.spawn(command, env=env, streams=(process.DEVNULL, 1, 2))
    try:
        while child.poll() is None:
            readable, _, _ = select.select([0], [], [], _POLL_S)
            if readable and not os.read(0, _READ_B):
                break
    finally:
        _end(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _read_variables() -> Mapping[str, str]:
    line = b""
    while not line.endswith(b"\n"):
        # One byte at a time: nothing that comes after the line is taken.
        byte = os.read(0, 1)
        if not byte or len(line) > _READ_B:
            raise UserError("expected a JSON object of environment variables in the first line of stdin")
        line += byte
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"the first line of stdin is not a JSON object of environment variables: {error}") from error
    if not isinstance(found, dict):
        raise UserError("the first line of stdin is not a JSON object of environment variables")
    return {str(name): str(value) for name, value in found.items()}


def _end(child: process.Child[bytes]) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(GRACE_S)
        except process.TimeoutExpired:
            process.kill_group(child.pid)
            child.wait()
