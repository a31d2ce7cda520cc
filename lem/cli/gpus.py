"""`lem gpus`: the GPUs that can be seen from here, their memory and who holds it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, TextIO

from lem.errors import ExitCode

if TYPE_CHECKING:
    from lem.meters.gpu_state import GpuState

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_parser", "run"]

_GIB = 1024**3


def add_parser(subparsers: Subparsers) -> None:
    """Add `gpus` to the command line."""
    parser = subparsers.add_parser(
        "gpus", help="list the GPUs, their memory and who holds it", description="List the GPUs that NVML sees."
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - as every command is called
    """The exit code; 0 also where there is no GPU."""
    from lem.meters.gpu_state import read_gpus

    reading = read_gpus()
    if args.json:
        out.write(json.dumps({"schema_version": 1, **reading.to_dict()}) + "\n")
        return int(ExitCode.OK)
    out.writelines(_describe(gpu) for gpu in reading.gpus)
    if reading.error is not None:
        out.write(f"NVML: {reading.error}\n")
    elif not reading.gpus:
        out.write("no GPU\n")
    elif reading.driver:
        out.write(f"driver {reading.driver}\n")
    return int(ExitCode.OK)


def _describe(gpu: GpuState) -> str:
    used, total = gpu.memory_used_b / _GIB, gpu.memory_total_b / _GIB
    lines = [f"{gpu.index}  {gpu.name}  {gpu.uuid}  {used:.1f} of {total:.1f} GiB in use"]
    for item in gpu.processes:
        held = "" if item.memory_b is None else f", {item.memory_b / _GIB:.1f} GiB"
        lines.append(f"   process {item.pid}{held}")
    return "".join(f"{line}\n" for line in lines)
