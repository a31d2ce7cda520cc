"""Commands about this host and this program: doctor, gpus, compose, datasets, presets."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from lem.base import log, process
from lem.base.clock import Clock, utc_now, utc_text
from lem.base.dataclass import asdict, replace
from lem.base.doc import Column, columns, terminal_width, wrapped, write_json
from lem.base.errors import EngineError, ExitCode, LockedError, UserError
from lem.base.launch import own_command
from lem.base.log import paint
from lem.base.units import GIB
from lem.base.variables import GPU_VARIABLE
from lem.cli.options import add_json, add_repeated, add_results_dir
from lem.config.backends import PRESETS, find_preset
from lem.config.introspection import render_yaml
from lem.config.load import load_campaign
from lem.config.sections import DATASET_ALIASES
from lem.meters.capabilities import (
    PULSE_S,
    Capabilities,
    CpuCapability,
    Pulses,
    describe_power,
    find_capabilities,
)
from lem.meters.curve import NotMeasured, Span
from lem.meters.hwmon import hwmon_gpus
from lem.meters.machine import keep_lag
from lem.meters.nvml import GpuReading, GpuState, open_nvml, read_gpus
from lem.meters.usage import HERE, Roots
from lem.orchestration import doctor
from lem.orchestration.compose import packaged_compose_file
from lem.orchestration.doctor import FAILED, OK, SKIPPED, WARNING, Host, Verdict, examine
from lem.orchestration.gpu_control import left_by_others, restore_left
from lem.orchestration.locks import Holder, gpu_locks, hold_locks
from lem.orchestration.plan import plan_campaign
from lem.worker.datasets import DatasetChoice, choice_of_name, find_files, is_in_hub_cache

_WIDEST_DOCTOR = 100
_STATUS_WIDTH = 9
_STYLES = {OK: "bold", WARNING: "yellow", FAILED: "red", SKIPPED: "dim"}


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check that this host can run campaigns in containers. Exit code 0 if it can, else 2; the last line"
        " says whether --executor local works."
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="campaign whose services and servers must be available")
    add_repeated(parser, "--backend", "NAME", "backend that must be available")
    add_repeated(parser, "--compose-file", "FILE", "compose file")
    parser.add_argument("--env-file", type=Path, metavar="FILE", help="environment file for compose")
    text = "restore the GPU settings that a killed campaign left in force, and nothing else; exit code 2 if that fails"
    parser.add_argument("--restore", action="store_true", help=text)
    add_results_dir(parser)
    add_json(parser)
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace, out: TextIO, _err: TextIO) -> int:
    if args.restore:
        return _restore(args, out)
    host = Host(Path.cwd(), tuple(args.compose_file), args.env_file, tuple(args.backend), args.results_dir)
    names, what = None, "campaigns in containers"
    if args.file is not None:
        given, what = host, "this campaign"
        host = doctor.host_of(plan_campaign(load_campaign(args.file)))
        files, env_file = given.compose_files or host.compose_files, given.env_file or host.env_file
        host = replace(host, compose_files=files, env_file=env_file)
        names = doctor.CHECKS if host.backends else doctor.CHECKS.keys() - doctor.FOR_CONTAINERS
    verdict = examine(host, names)
    if args.json:
        checks = [{"name": name, **asdict(item)} for name, item in verdict.findings.items()]
        executors = list(verdict.executors)
        write_json(out, {"schema_version": 1, "ok": not verdict.failed, "executors": executors, "checks": checks})
    else:
        width = min(terminal_width(out), _WIDEST_DOCTOR)
        out.write(_as_text(verdict, what, is_colour=log.is_colour_wanted(out), width=width))
        args.next = ["config", "new", ">", "campaign.yaml"] if verdict.executors else ()
    return ExitCode.USAGE if verdict.failed else ExitCode.OK


def _restore(args: argparse.Namespace, out: TextIO) -> int:
    if args.file is not None or args.backend or args.compose_file or args.env_file is not None:
        raise UserError("--restore cannot be combined with a campaign or a check", "run lem doctor without --restore")
    found = [*restore_left(os.environ)]
    # What a campaign that runs holds was not left: it restores that itself.
    failed = [item for item in found if item.error is not None and not isinstance(item.error, LockedError)]
    others, is_ok = [*left_by_others(os.environ)], not failed
    if args.json:
        items = [{"settings": item.what, "error": item.error and str(item.error)} for item in found]
        write_json(out, {"schema_version": 1, "ok": is_ok, "restored": items, "of_other_users": others})
        return ExitCode.OK if is_ok else ExitCode.USAGE
    for item in found:
        if item.error is None:
            out.write(f"restored {item.what}\n")
        elif isinstance(item.error, LockedError):
            out.write(f"in use: {item.error}\n")
        else:
            out.write(f"not restored: {item.error}\n" + (f"   → {item.error.hint}\n" if item.error.hint else ""))
    out.writelines(f"{text}\n" for text in (others or ([] if found else ["no GPU settings to restore"])))
    return ExitCode.OK if is_ok else ExitCode.USAGE


def _as_text(verdict: Verdict, what: str, *, is_colour: bool, width: int) -> str:
    name_width = max(map(len, verdict.findings)) + 2
    indent = " " * (name_width + _STATUS_WIDTH)
    lines = []
    for name, item in verdict.findings.items():
        status = f"{item.status:<{_STATUS_WIDTH}}"
        first, *rest = wrapped(item.message, width, f"{name:<{name_width}}{status}")
        lines += [first.replace(status, paint(status, _STYLES[item.status], is_colour=is_colour), 1), *rest]
        if item.remedy and item.status != "ok":
            lines += wrapped(item.remedy, width, f"{indent}→ ")
    failed, conclusion = ", ".join(verdict.failed), f"this host can run {what}"
    if failed:
        conclusion = f"cannot run campaigns: {failed}"
        if verdict.executors:
            conclusion = f"cannot run campaigns in containers: {failed}; --executor local works"
    return "\n".join([*lines, "", *wrapped(conclusion, width)]) + "\n"


PROBE_S = 5.0
PROBE_CHANGES = 40

_WIDEST_GPUS = 110


def add_gpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the GPUs that NVML and hwmon show, and the meters of GPUs, CPUs, module and machine that can be read."
    )
    text = (
        f"watch for up to {PROBE_S:g} s how often the energy counters change, then put work on idle GPUs for some"
        " seconds to see how late the counters are; later campaigns on this host use that"
    )
    parser.add_argument("--probe", action="store_true", help=text)
    parser.add_argument("--python", metavar="PROGRAM", help="Python interpreter with PyTorch, for --probe")
    add_json(parser)
    parser.set_defaults(run=run_gpus)


def run_gpus(args: argparse.Namespace, out: TextIO, _err: TextIO, roots: Roots = HERE) -> None:
    if args.python is not None and not args.probe:
        raise UserError("--python without --probe", "add --probe: only the probe runs PyTorch")
    with open_nvml() as nvml:
        reading = read_gpus()
        reading = replace(reading, gpus=(*reading.gpus, *hwmon_gpus(len(reading.gpus), roots.sys)))
        if args.probe:
            found = _probe(nvml, args.python or sys.executable, reading, roots)
        else:
            found = find_capabilities(nvml, Clock(), roots=roots)
    if args.json:
        out.write(json.dumps({"schema_version": 1, **asdict(reading), "energy": found.to_dict()}) + "\n")
        return
    energy = {gpu.meter.uuid: gpu.describe() for gpu in found.gpus}
    width = min(terminal_width(out), _WIDEST_GPUS)
    out.writelines(_describe(gpu, energy.get(gpu.uuid, ()), width) for gpu in reading.gpus)
    if reading.error is not None:
        out.write(f"NVML: {reading.error}\n")
    elif not reading.gpus:
        out.write("no GPU\n")
    elif reading.driver:
        out.write(f"driver {reading.driver}\n")
    out.writelines(f"{line}\n" for line in _describe_cpu(found.cpu))
    for sensor in found.sensors:
        text = f"cannot be used: {sensor.power_error}" if sensor.power_error else describe_power(sensor)
        out.writelines(f"{line}\n" for line in wrapped(f"covers {sensor.energy_scope}: {text}", width, "power that "))


_PULSES_S = 180.0  # at most: PyTorch may come from a slow disk


def _probe(nvml: Any, python: str, reading: GpuReading, roots: Roots) -> Capabilities:
    in_use = {gpu.uuid: ", ".join(str(item.pid) for item in gpu.processes) for gpu in reading.gpus if gpu.processes}
    holder = Holder(os.getpid(), socket.gethostname(), "lem gpus --probe", utc_text(utc_now()))
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(max(1, len(reading.gpus))))

        def start(uuid: str) -> Pulses:
            if uuid in in_use:
                raise NotMeasured("gpu_shared", uuid=uuid, pids=in_use[uuid])
            try:
                stack.enter_context(hold_locks(gpu_locks([uuid], os.environ), holder))
            except UserError as error:
                raise NotMeasured("no_pulses", error=error.message) from error
            return pool.submit(_pulse, python, uuid)

        found = find_capabilities(nvml, Clock(), probe_s=PROBE_S, enough=PROBE_CHANGES, start=start, roots=roots)
    for gpu in found.gpus:
        if gpu.counter_lag_s is not None:
            keep_lag(gpu.meter.uuid, gpu.meter.driver, gpu.counter_lag_s)
    return found


def _pulse(python: str, uuid: str) -> Sequence[Span]:
    command = (*own_command(python), "worker", "--pulse", repr(PULSE_S))
    try:
        done = process.run(command, timeout_s=_PULSES_S, env={**os.environ, GPU_VARIABLE: uuid})
    except UserError as error:
        raise NotMeasured("no_pulses", error=error.message) from error
    if done.code != 0:
        last = (done.stderr.strip().splitlines() or [process.describe_exit(done.code)])[-1]
        raise NotMeasured("no_pulses", error=f"{python}: {last}")
    return [Span(*json.loads(line)) for line in done.stdout.splitlines()]


def _describe(gpu: GpuState, energy: tuple[str, ...], width: int) -> str:
    memory = "memory shared with the machine"
    if gpu.memory_used_b is not None and gpu.memory_total_b is not None:
        memory = f"{gpu.memory_used_b / GIB:.1f} of {gpu.memory_total_b / GIB:.1f} GiB in use"
    lines = [f"{gpu.index}  {gpu.name}  {gpu.uuid}  {memory}"]
    for text in energy:
        lines += textwrap.wrap(text, width, initial_indent="   ", subsequent_indent="     ", break_on_hyphens=False)
    for item in gpu.processes:
        held = "" if item.memory_b is None else f", {item.memory_b / GIB:.1f} GiB"
        lines.append(f"   process {item.pid}{held}")
    return "".join(f"{line}\n" for line in lines)


def _describe_cpu(cpu: CpuCapability) -> Iterator[str]:
    if cpu.rapl_error is None:
        yield f"CPU energy from RAPL: {', '.join(cpu.zones)}"
        yield from (f"   cannot be read: {text}" for text in cpu.missing)
    else:
        yield f"no CPU energy: {cpu.rapl_error}"
        yield f"   → {cpu.rapl_remedy}"
    if cpu.tdp_w is not None:
        yield f"CPU design power: {cpu.tdp_w:g} W, from the {cpu.tdp_source}"


def add_compose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the compose file that campaigns use by default: lem compose > docker-compose.yml"
    parser.set_defaults(run=run_compose)


def run_compose(_args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    out.write(packaged_compose_file())


def add_datasets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "`lem datasets`: list the data sets that have a short name, and where they are."
    parser.epilog = (
        "LEM_DATASETS_DIR names a folder that is searched first: ALIAS.jsonl (or .json, .csv, .txt, .parquet), or "
        "a folder ALIAS with one file per split. Other data sets come from the hub, through the Python package "
        "`datasets`."
    )
    add_json(parser)
    parser.set_defaults(run=run_datasets)


def run_datasets(args: argparse.Namespace, out: TextIO, err: TextIO, environ: Mapping[str, str] = os.environ) -> None:
    lines: list[dict[str, Any]] = []
    for choice in map(choice_of_name, DATASET_ALIASES):
        facts = {"alias": choice.name, "name": choice.hub_name, "subset": choice.subset, "split": choice.split}
        place, detail = _place_of(choice, environ)
        lines.append({**facts, "column": ", ".join(choice.columns), "place": place, "detail": detail})
    if args.json:
        write_json(out, lines)
        return
    cells = {
        "data set": [f"{it['name']} ({it['subset']})" if it["subset"] else it["name"] for it in lines],
        "split": [it["split"] for it in lines],
        "prompts in": [it["column"] for it in lines],
        "found": [f"{it['place']}: {it['detail']}" if it["detail"] else it["place"] for it in lines],
    }
    table = [Column(heading, tuple(texts), is_text=True) for heading, texts in cells.items()]
    aliases = [it["alias"] for it in lines]
    out.writelines(f"{line}\n" for line in columns("alias", aliases, table, terminal_width(out)))
    if any(line["place"] == "hub" for line in lines):
        err.write("hub: not on this machine; downloaded on first use\n")


def _place_of(choice: DatasetChoice, environ: Mapping[str, str]) -> tuple[str, str]:
    try:
        files = find_files(choice, environ)
    except EngineError as error:
        return "unusable", error.message
    if files:
        return "folder", str(files[0] if len(files) == 1 else files[0].parent)
    return ("cache", "") if is_in_hub_cache(choice, environ) else ("hub", "")


def add_presets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "List presets (--preset NAME), or show one."
    parser.add_argument("name", nargs="?", metavar="NAME", help="show the values of this preset")
    add_json(parser)
    parser.set_defaults(run=run_presets)


def run_presets(args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    chosen = [*PRESETS.values()] if args.name is None else [find_preset(args.name)]
    if args.json:
        found = {item.name: {"description": item.description, "values": dict(item.values)} for item in chosen}
        write_json(out, found)
    elif args.name is not None:
        (preset,) = chosen
        out.write(f"# {preset.name}: {preset.description}\n{render_yaml(preset.values, {})}")
    else:
        width = max(len(name) for name in PRESETS) + 2
        for preset in chosen:
            tokens = f"{preset.values['max_input_tokens']}/{preset.values['max_output_tokens']}"
            text = f"{preset.name:<{width}}{tokens:<10}{preset.description}"
            out.write(textwrap.fill(text, terminal_width(out), subsequent_indent=" " * (width + 10)) + "\n")
        out.write("\nTokens: maximum input/output. All decode greedily. `lem presets NAME` shows one.\n")
