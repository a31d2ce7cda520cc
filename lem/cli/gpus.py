"""`lem gpus`: the GPUs that can be seen from here, their memory, who holds it, and what energy can be measured."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from lem.cli.streams import terminal_width
from lem.errors import ExitCode
from lem.units import GIB

if TYPE_CHECKING:
    from lem.meters.capabilities import CpuCapability
    from lem.meters.gpu_state import GpuState

__all__ = ["add_arguments", "run"]

PROBE_S = 5.0
PROBE_CHANGES = 40

_WIDEST = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem gpus` takes."""
    parser.description = "List the GPUs that NVML sees, and which meters of GPUs and CPUs can be read."
    parser.add_argument(
        "--probe", action="store_true", help=f"look for up to {PROBE_S:g} s how often the energy counters change"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - as every command is called
    """The exit code; 0 also where there is no GPU."""
    from lem.clock import SystemClock
    from lem.meters.capabilities import find_capabilities
    from lem.meters.gpu_state import read_gpus
    from lem.meters.gpus import open_nvml

    probe_s = PROBE_S if args.probe else 0.0
    with open_nvml() as nvml:
        reading = read_gpus()
        found = find_capabilities(nvml, SystemClock(), probe_s=probe_s, enough=PROBE_CHANGES)
    if args.json:
        document = {"schema_version": 1, **reading.to_dict(), "energy": found.to_dict()}
        out.write(json.dumps(document) + "\n")
        return int(ExitCode.OK)
    energy = {gpu.meter.uuid: gpu.describe() for gpu in found.gpus}
    width = min(terminal_width(out), _WIDEST)
    out.writelines(_describe(gpu, energy.get(gpu.uuid, ()), width) for gpu in reading.gpus)
    if reading.error is not None:
        out.write(f"NVML: {reading.error}\n")
    elif not reading.gpus:
        out.write("no GPU\n")
    elif reading.driver:
        out.write(f"driver {reading.driver}\n")
    out.writelines(f"{line}\n" for line in _describe_cpu(found.cpu))
    return int(ExitCode.OK)


def _describe(gpu: GpuState, energy: tuple[str, ...], width: int) -> str:
    used, total = gpu.memory_used_b / GIB, gpu.memory_total_b / GIB
    lines = [f"{gpu.index}  {gpu.name}  {gpu.uuid}  {used:.1f} of {total:.1f} GiB in use"]
    for text in energy:
        lines += textwrap.wrap(text, width, initial_indent="   ", subsequent_indent="     ", break_on_hyphens=False)
    for item in gpu.processes:
        held = "" if item.memory_b is None else f", {item.memory_b / GIB:.1f} GiB"
        lines.append(f"   process {item.pid}{held}")
    return "".join(f"{line}\n" for line in lines)


def _describe_cpu(cpu: CpuCapability) -> Iterator[str]:
    if cpu.rapl_error is None:
        yield f"CPU energy by RAPL: {', '.join(cpu.zones)}"
        yield from (f"   cannot be read: {text}" for text in cpu.missing)
    else:
        yield f"no CPU energy: {cpu.rapl_error}"
        yield f"   → {cpu.rapl_remedy}"
    if cpu.tdp_w is not None:
        yield f"CPU design power: {cpu.tdp_w:g} W, by the {cpu.tdp_source}"
