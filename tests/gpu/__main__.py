"""Everything that is to be found out on a machine with an NVIDIA GPU, in one call; README.md says how.

    python -m tests.gpu [--quick | --small] [--out FOLDER] [--only STEP]…
    python -m tests.gpu --rehearse      without a GPU, against the NVML double

Prints each figure as soon as it is known and keeps it, and prints the whole table last.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from lem import __version__
from lem.meters.machine import visible_gpus
from lem.meters.nvml import NvmlMeter, find_gpus, open_nvml
from lem.meters.samples import GpuHeader
from tests.gpu.bench import Bench, Step
from tests.gpu.engine_client import ROOT
from tests.gpu.extent import FULL, QUICK, REHEARSAL
from tests.gpu.finding import CUT_OFF, FAILED, LEFT_OUT, Section
from tests.gpu.registry import STEPS
from tests.gpu.rehearsed import Rehearsal
from tests.gpu.report import FIGURES, MARKDOWN, Head, read_sections, table, write
from tests.gpu.run import CutOff, cut_off_by_signals, run_steps
from tests.gpu.steps.options import CASES

# TERM's exit code by convention, whatever it was that ended the run.
CUT_OFF_CODE = 143


def main() -> int:
    """0 when no step failed, 1 when one did, 2 without a GPU, 143 when the run was cut off."""
    options = _parse()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rehearsal = Rehearsal.under_way()
    if options.rehearse and rehearsal is None:
        # The linker reads LD_LIBRARY_PATH when a program starts.
        environ = Rehearsal(out / "double").environ()
        os.execve(sys.executable, [sys.executable, "-m", "tests.gpu", *sys.argv[1:]], environ)  # noqa: S606
    gpu = _find_gpu()
    if isinstance(gpu, str):
        print(f"error: {gpu}", file=sys.stderr)
        return 2
    extent = REHEARSAL if rehearsal is not None else QUICK if options.quick else FULL
    if options.small:
        extent = extent.without_largest()
    cases = tuple(options.case) if options.case else extent.options
    extent = dataclasses.replace(extent, limit_s=options.limit_s or extent.limit_s, options=cases)
    bench = Bench(out, options.models.resolve(), extent, gpu.uuid, _environ(), rehearsal)
    text = "quick" if options.quick else "full"
    head = Head(gpu, f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", text, rehearsal is not None)
    return _run(bench, head, options.only or ())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter, and without the model of 8 B parameters")
    parser.add_argument("--small", action="store_true", help="without the model of 8 B parameters")
    parser.add_argument("--rehearse", action="store_true", help="against the NVML double and tiny models on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="what is kept (build/gpu)")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "build" / "gpu-models", help="20 GB of models (build/gpu-models)"
    )
    parser.add_argument("--only", action="append", choices=[step.name for step in STEPS], help="may be repeated")
    parser.add_argument("--case", action="append", choices=list(CASES), help="of the step options; may be repeated")
    parser.add_argument("--limit-s", type=float, help="begin no step after so many seconds (530)")
    return parser.parse_args()


def _find_gpu() -> GpuHeader | str:
    """The first visible GPU, which is 0 to PyTorch as well; else why there is none."""
    gpus = visible_gpus(find_gpus(), os.environ)
    with open_nvml() as nvml:
        if isinstance(nvml, str):
            return f"NVML is not available: {nvml}; --rehearse needs no GPU"
        if not gpus:
            return "NVML sees no GPU, or CUDA_VISIBLE_DEVICES hides it; --rehearse needs none"
        return NvmlMeter(nvml, gpus[0].uuid).header


def _environ() -> Mapping[str, str]:
    """The environment of programs that measure: this checkout's lem, GPUs counted as NVML does."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _run(bench: Bench, head: Head, only: Sequence[str], steps: Sequence[Step] = STEPS) -> int:
    # The engine and the samplers are started with what is set here.
    os.environ.update(_environ())
    kept = {section.step: section for section in read_sections(bench.out)}

    def now() -> tuple[Head, tuple[Section, ...]]:
        versions = {"lem": __version__, **bench.versions}
        return dataclasses.replace(head, versions=versions), tuple(kept[s.name] for s in steps if s.name in kept)

    def keep(section: Section) -> None:
        # What an earlier call found out is worth more than that there was no time for it in this one.
        if section.status != LEFT_OUT or section.step not in kept:
            kept[section.step] = section
        write(bench.out, *now())

    found: list[Section] = []
    try:
        with cut_off_by_signals():
            found = run_steps(steps, bench, keep, only)
    except CutOff as reason:
        print(f"\ncut off by {reason} between steps", flush=True)
    finally:
        bench.close_engine()
        print(table(*now()))
        print(f"kept: {bench.out / FIGURES}, {bench.out / MARKDOWN}", flush=True)
    statuses = {section.status for section in found}
    if not found or CUT_OFF in statuses:
        return CUT_OFF_CODE
    return 1 if FAILED in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
