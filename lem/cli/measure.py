"""`lem measure`: meter any program."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lem.base import log, process
from lem.base.clock import utc_now, utc_text
from lem.base.doc import screen_of, write_json
from lem.base.errors import ExitCode, Interrupted, MeterRefused, UserError
from lem.base.measurement import is_estimate
from lem.cli.config import add_flags, given_flags
from lem.cli.options import add_json, add_repeated, checked, folder_options
from lem.config.campaign_config import generate_campaign_id, slug_of
from lem.config.experiment import ProgramConfig
from lem.config.option import merge, nest
from lem.meters.hwmon import metered_gpus
from lem.meters.machine import named_gpus
from lem.meters.peers import KINDS, WorkSource
from lem.orchestration.grid import config_hash
from lem.orchestration.locks import Holder, gpu_locks, hold_locks
from lem.orchestration.program import Measurer
from lem.orchestration.resume import new_run_id
from lem.orchestration.schedule import StopRequest
from lem.orchestration.systemd import find_secrets
from lem.record import RATES, Record, encode_record
from lem.results.aggregation import run_document
from lem.results.configurations import ListedConfiguration, write_listing
from lem.results.detail import render_record
from lem.results.run import Run, make_run
from lem.results.store import Repository, StoredResult, stopping_campaign
from lem.results.table import render_run
from lem.worker.channel import redact

_FLAGS = {
    "gpus": ("--gpu", "a GPU to meter, by index or UUID; may be repeated (default: all that the program sees)"),
    "whole_machine": ("--whole-machine", "count what every process here does: for a server or container it works with"),
    "baseline.enabled": ("--idle", "measure power at rest before and after each run (default: yes)"),
    "baseline.duration_sec": ("--baseline", "length of each rest in seconds (default: 30)"),
    "measurement.energy": ("--energy", "the meter that counts (default: auto)"),
    "measurement.cpu_tdp_w": ("--cpu-tdp-w", "design power of all CPU packages in watts, for tdp_estimate"),
    "measurement.external_csv": ("--external-csv", "a file with readings of an external meter"),
    "measurement.max_wait_pct": ("--max-wait-pct", "most of its time that it may wait for a CPU (default: 20)"),
    "measurement.max_foreign_pct": ("--max-foreign-pct", "most CPU time of other programs (default: 20)"),
    "measurement.grid_g_per_kwh": ("--grid-g-per-kwh", "carbon intensity of the grid, for emissions"),
    "measurement.pue": ("--pue", "power usage effectiveness of the site, for emissions and cost"),
    "measurement.price_per_kwh": ("--price-per-kwh", "price of energy, for cost"),
    "timeseries.sample_interval_ms": ("--sample-interval-ms", "time between samples of a GPU (default: 100)"),
    "timeseries.save": ("--save-samples", "keep the samples beside the result (default: yes)"),
}
_SIGNALLED = 128


def add_measure_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lem measure [OPTION…] -- COMMAND…"
    parser.epilog = (
        "exit codes: the program's own, 128 + N if signal N killed it; of several runs that of the first that failed, "
        "after which none is started; 1 if it did not report its work as --work says; others as those of lem"
    )
    parser.add_argument("-r", "--runs", type=int, default=1, metavar="N", help="run it N times (default: 1)")
    text = f"a JSON file in which it reports its work; KIND is {', '.join(KINDS)}, or told by the name of the field"
    kind = functools.partial(checked, WorkSource.parse)
    add_repeated(parser, "--work", "[KIND=]FILE[:FIELD]", text, kind)
    parser.add_argument("--name", metavar="NAME", help="name of the results (default: the program's)")
    parser.add_argument("--results-dir", "-o", type=Path, default=Path("results"), metavar="DIR", help="results folder")
    add_flags(parser, ProgramConfig, _FLAGS)
    add_json(parser, "print one JSON document with the records; what the program prints goes to stderr")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the program and its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    _check(args, command)
    console, stop = log.Console(err), StopRequest()
    log.configure(console, verbosity=-1 if args.quiet else args.verbose)
    progress = _Progress(console, args.runs, is_quiet=args.quiet)
    measurer = _prepare(args, command, stop, progress)
    name, run_id = measurer.identity["campaign_name"], measurer.identity["run_id"]
    holder = Holder(os.getpid(), socket.gethostname(), name, utc_text(utc_now()))
    results: list[StoredResult] = []
    code, signum = 0, None
    try:
        with hold_locks(gpu_locks(measurer.config.gpus or (), os.environ), holder), stop.installed():
            _list_configuration(measurer)
            while len(results) < args.runs and not code:
                progress.number = len(results) + 1
                result, code = measurer.measure(len(results))
                results.append(result)
    except Interrupted as interrupted:
        signum = interrupted.signum
    except MeterRefused as error:
        raise UserError(error.message, error.hint) from error
    finally:
        console.close()
    problems = [] if signum or code else list(dict.fromkeys(why for item in results for why in _unread(item.record)))
    status = _status_of(code, signum, problems)
    found = make_run([item.record for item in results], campaign_name=name, run_id=run_id)
    _show(args, found, results, out if args.json else err, status)
    if results:
        args.next = ["results", "show", slug_of(name), *folder_options(args.results_dir)]
    for reason in problems:
        console.error(reason)
    return status


def _status_of(code: int, signum: int | None, problems: Sequence[str]) -> int:
    if signum is not None:
        return _SIGNALLED + signum
    if code:
        return code if code > 0 else _SIGNALLED - code
    return ExitCode.EXPERIMENT_FAILED if problems else ExitCode.OK


def _unread(record: Record) -> list[str]:
    return [reason.text for reason in record.work.null_reasons.values() if reason.code == "work_unreadable"]


def _check(args: argparse.Namespace, command: list[str]) -> None:
    if not command:
        raise UserError("expected a command", "for example: lem measure -r 3 -- python3 train.py")
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: no such program", "install it, or put its folder on PATH")
    if args.runs < 1:
        raise UserError(f"--runs {args.runs}: expected at least 1")
    counts = Counter(name for source in args.work for name in source.counted)
    if twice := [name for name, count in counts.items() if count > 1]:
        hint = "name the field of each file, and what it counts: KIND=FILE:FIELD"
        raise UserError(f"--work: {', '.join(twice)}: two files report it", hint)


def _prepare(args: argparse.Namespace, command: list[str], stop: StopRequest, reporter: _Progress) -> Measurer:
    secrets = find_secrets(os.environ).values()
    requested: dict[str, Any] = {"command": [redact(word, secrets) for word in command]}
    requested |= {"work": [str(source) for source in args.work]} if args.work else {}
    flags = dict(given_flags(args, _FLAGS))
    for key, value in flags.items():
        requested = merge(ProgramConfig, requested, nest(key, value))
    config = ProgramConfig.from_dict(requested)
    if config.whole_machine and is_estimate(config.measurement.energy):  # stored results of it are still read
        raise UserError("measurement.energy: tdp_estimate is the share of one program; not with whole_machine")
    is_idle = flags.get("baseline.enabled")
    if (is_idle or "baseline.duration_sec" in flags) and not (config.baseline.enabled and config.measurement.has_rest):
        off = f"--energy {config.measurement.energy}" if config.baseline.enabled else "--no-idle"
        raise UserError(f"{'--idle' if is_idle else '--baseline'}: has no effect with {off}")
    gpus = metered_gpus(os.environ)
    named = [gpu for gpu in gpus if gpu.is_default] if config.gpus is None else named_gpus(config.gpus, gpus)
    if len(named) < len(config.gpus or ()):
        raise UserError(f"--gpu {', '.join(config.gpus or ())}: no such GPU", "see `lem gpus`")
    name = args.name or Path(command[0]).name
    repository = Repository(args.results_dir, slug_of(name))
    repository.check_writable()
    run_id = new_run_id(repository, repository.folder / "none", utc_now())
    digest = config_hash(config, {})
    resolved = ProgramConfig.from_dict({**config.to_dict(), "gpus": [gpu.uuid for gpu in named]})
    # Several runs cannot share what is read from stdin; with --json, stdout has one document.
    streams = (process.DEVNULL if args.runs > 1 else 0, 2 if args.json else 1, 2)
    ids = {"campaign_id": generate_campaign_id(name), "run_id": run_id, "config_hash": digest}
    identity = {"campaign_name": name, "config_name": name, **ids}
    return Measurer(command, resolved, requested, args.work, identity, repository, streams, stop, reporter)


def _list_configuration(measurer: Measurer) -> None:
    identity, given = measurer.identity, measurer.config.measurement
    rates = {key: value for key in RATES if (value := getattr(given, key)) is not None}
    listed = ListedConfiguration(identity["config_hash"], identity["config_name"], rates)
    with stopping_campaign(measurer.repository.run_folder(identity["run_id"])) as folder:
        write_listing(folder, [listed])


class _Progress:
    """What goes on, on stderr; nothing while the program runs, which writes there, too."""

    def __init__(self, console: log.Console, runs: int, *, is_quiet: bool) -> None:
        self._console, self._runs, self._is_quiet, self.number = console, runs, is_quiet, 0

    def phase(self, name: str) -> None:
        self._console.close()
        if not self._is_quiet:
            what = {"idle": "at rest", "window": "the program runs", "cooldown": "at rest again"}[name]
            self._console.line(f"run {self.number} of {self._runs}: {what}")

    def progress(self, done: int, total: int | None, text: str) -> None:
        if not self._is_quiet:
            self._console.live(f"run {self.number} of {self._runs}: {done} of {total} {text}")


def _show(args: argparse.Namespace, found: Run, results: list[StoredResult], out: TextIO, status: int) -> None:
    if args.json:
        documents = [{"path": str(item.path), "record": encode_record(item.record)} for item in results]
        summary = run_document(found) if results else None
        write_json(out, {"run_id": found.run_id, "exit_code": int(status), "results": documents, "summary": summary})
    elif results:
        is_one = args.runs == 1
        text = render_record(results[0].record, **screen_of(out)) if is_one else render_run(found, **screen_of(out))
        out.write(text + "\n" + "".join(f"{item.path}\n" for item in results))
