"""`lem worker`: the side of lem that runs next to the engine; started by `lem campaign`, not by people."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TextIO

from lem.errors import ExitCode, UserError

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem worker` takes."""
    parser.description = __doc__
    parser.add_argument("--engine", action="store_true", help="be the engine process of a worker")
    parser.add_argument("--control-fd", type=int, metavar="N", help="descriptor to read orders from")
    parser.add_argument("--message-fd", type=int, metavar="N", help="descriptor to write messages to")
    parser.add_argument("--end-marked", metavar="MARK", help="end what is left of the worker that bears this mark")
    parser.add_argument("--sampler", action="store_true", help="be the process that samples the meters")
    parser.add_argument("--output", type=Path, metavar="FILE", help="of --sampler: the log, which must not be there")
    parser.add_argument("--gpu", action="append", default=[], metavar="UUID", help="of --sampler; may be repeated")
    parser.add_argument("--interval-ms", type=int, default=100, metavar="N", help="of --sampler: between two looks")
    parser.add_argument("--tdp", type=float, metavar="W", help="of --sampler: design power of all CPU packages")
    parser.add_argument("--tether", nargs=argparse.REMAINDER, metavar="WORD", help="run this command until stdin ends")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - as every command is called
    """The exit code of a worker, of its engine process or of a sampler."""
    if args.sampler:
        return _run_sampler(args, err)
    from lem.experiment.worker import run_engine_process, run_supervisor

    if args.end_marked is not None:
        from lem.experiment.leftovers import end_marked

        return int(ExitCode.EXPERIMENT_FAILED if end_marked(args.end_marked) else ExitCode.OK)
    if args.tether is not None:
        from lem.experiment.tether import run_tethered

        return run_tethered(args.tether)
    if not args.engine:
        return run_supervisor()
    if args.control_fd is None or args.message_fd is None:
        raise UserError("worker --engine needs --control-fd and --message-fd", "start `lem worker`, which gives them")
    return run_engine_process(args.control_fd, args.message_fd)


def _run_sampler(args: argparse.Namespace, err: TextIO) -> int:
    from lem.meters.sampler import LONGEST_INTERVAL_MS, SHORTEST_INTERVAL_MS, SamplerOptions, is_interval
    from lem.meters.sampler_owner import run_sampler_process

    if args.output is None:
        raise UserError("worker --sampler needs --output", "name the log that it is to write")
    if not is_interval(args.interval_ms):
        raise UserError(
            f"--interval-ms {args.interval_ms}: neither 0 nor from {SHORTEST_INTERVAL_MS} to {LONGEST_INTERVAL_MS}",
            "100 is usual",
        )
    return run_sampler_process(SamplerOptions(args.output, tuple(args.gpu), args.interval_ms, args.tdp), err)
