"""`lem report`."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lem.base.doc import write_json
from lem.base.errors import ExitCode, UserError
from lem.base.measurement import POWER_CAP_BIT, SLOWDOWN_BITS
from lem.base.units import NS_PER_S
from lem.cli.selection import problem_documents, resolve_run, tell_problems, write_file
from lem.meters.curve import HOLE_PERIODS, may_have_wrapped_twice
from lem.meters.rapl import PACKAGE
from lem.meters.samples import (
    FINISHED_FILENAME,
    SLOW_PERIOD_S,
    GpuSample,
    Mark,
    RaplReading,
    SampleLog,
    SampleLogError,
    read_finished,
)
from lem.results.report.content import POWER, TEMPERATURE, Band, Phase, Series, Spell, Trace, slowed_s

if TYPE_CHECKING:
    from lem.results.report.content import Report
    from lem.results.run import Run


_FILENAME = "report.html"


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem report` takes."""
    parser.description = "`lem report`: one campaign as one HTML file that needs nothing beside itself."
    parser.add_argument("campaign", metavar="CAMPAIGN", help="a campaign (its last run), or a run")
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help=f"where to write it, - for stdout (default: {_FILENAME} in the campaign's folder)",
    )
    parser.add_argument("--results-dir", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument("--json", action="store_true", help="what was written as one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    """The exit code; 0 also where results are damaged, which the page and stderr tell."""
    from lem.results.report import render_report

    if args.json and args.output == "-":
        raise UserError("--json and --output - both want stdout", "name a file for the page")
    chosen = resolve_run(args.results_dir, args.campaign)
    campaign, run_id = chosen.campaign, chosen.run_id
    results = chosen.read()
    text = render_report(_compose(results, args.results_dir))
    damaged = [problem for problem in results.problems if problem.kind != "missing"]
    tell_problems(err, damaged, lead="left out: ", rest="the page names them")
    if args.output == "-":
        out.write(text)
        return int(ExitCode.OK)
    path = Path(args.output) if args.output else args.results_dir / campaign / _FILENAME
    write_file(path, text)
    if args.json:
        document = {
            "path": str(path),
            "bytes": len(text.encode("utf-8")),
            "campaign": campaign,
            "run_id": run_id,
            "problems": problem_documents(results.problems),
        }
        write_json(out, document)
    else:
        out.write(f"{path}\n")
    return int(ExitCode.OK)


def _compose(run: Run, results_dir: Path) -> Report:
    """The content of the page; a sample log that cannot be used is named and left out."""
    from lem.results.report.content import compose, select_traced

    report = compose(run)
    logs = {key: results_dir / path.parent / FINISHED_FILENAME for key, path in run.paths.items()}
    with_log = [record for record in run.records if logs[record.identity.key].is_file()]
    traces, unread = [], []
    for record in select_traced(report.entries, with_log):
        path = logs[record.identity.key]
        try:
            log, marks = read_finished(path)
        except (SampleLogError, OSError) as error:
            unread.append("/".join(path.parts[-4:]) + ": " + str(error).removeprefix(f"{path}: "))
        else:
            traces.append((record, trace_of(log, marks)))
    return dataclasses.replace(report, traces=tuple(traces), unread=tuple(unread), n_logs=len(with_log))


_BUCKETS = 260
_AT_POWER_LIMIT = "at the power limit"

_Points = list[tuple[float, float]]


def trace_of(log: SampleLog, marks: Sequence[Mark]) -> Trace:
    """What a sample log shows over time, in seconds from its first mark."""
    ordered = sorted(marks, key=lambda mark: (mark.opened_ns, mark.closed_ns))
    zero_ns = ordered[0].opened_ns if ordered else log.header.started_ns

    def seconds(at_ns: int) -> float:
        return (at_ns - zero_ns) / NS_PER_S

    interval_s = log.header.interval_ms / 1000
    by_gpu: dict[int, list[GpuSample]] = {}
    for sample in log.samples:
        by_gpu.setdefault(sample.gpu, []).append(sample)
    names = [f"{gpu.label} {gpu.name}" for gpu in log.header.gpus]
    powers: list[_Points] = []
    series: list[Series] = []
    for gpu, samples in sorted(by_gpu.items()):
        power = [(seconds(item.at_ns), item.power_w) for item in samples if item.power_w is not None]
        powers.append(power)
        series.append(_series(names[gpu], POWER, power, interval_s, len(by_gpu)))
    packages = _package_powers(log, seconds)
    for name, power in packages.items():
        series.append(_series(name, POWER, power, SLOW_PERIOD_S, len(packages)))
    temperatures: _Points = []
    for gpu, samples in sorted(by_gpu.items()):
        temperature = [(seconds(item.at_ns), item.temp_c) for item in samples if item.temp_c is not None]
        temperatures += temperature
        series.append(_series(names[gpu], TEMPERATURE, temperature, interval_s, len(by_gpu)))
    spells = _together(spell for samples in by_gpu.values() for spell in _spells(samples, seconds, interval_s))
    counted = powers if any(powers) else list(packages.values())
    return Trace(
        bands=tuple(Band(mark.name, seconds(mark.opened_ns), seconds(mark.closed_ns)) for mark in ordered),
        series=tuple(item for item in series if any(item.points)),
        spells=tuple(spells),
        phases=tuple(_phase(mark, seconds, counted, temperatures, spells) for mark in ordered),
        interval_s=interval_s if by_gpu else SLOW_PERIOD_S,
    )


def _series(label: str, quantity: str, points: _Points, interval_s: float, n_lines: int) -> Series:
    buckets = max(_BUCKETS // max(n_lines, 1), 60)
    return Series(label, quantity, thin(points, buckets, HOLE_PERIODS * interval_s))


def thin(
    points: Sequence[tuple[float, float]], n_buckets: int, hole_s: float
) -> tuple[tuple[float, float] | None, ...]:
    """At most twice `n_buckets` points and the holes: of each bucket of time the least and the greatest value.

    Peaks stay where they were, which a mean would flatten; a pause longer than `hole_s` becomes a None.
    """
    if not points:
        return ()
    begin, end = points[0][0], points[-1][0]
    width = (end - begin) / n_buckets or 1.0
    found: list[tuple[float, float] | None] = []
    bucket: list[tuple[float, float]] = []
    number = 0
    before: float | None = None
    for point in points:
        is_hole = before is not None and point[0] - before > hole_s
        current = int((point[0] - begin) / width)
        if bucket and (is_hole or current != number):
            found += _extremes(bucket)
            bucket = []
        if is_hole:
            found.append(None)
        bucket.append(point)
        number, before = current, point[0]
    return (*found, *_extremes(bucket))


def _extremes(bucket: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    low = min(bucket, key=lambda point: point[1])
    high = max(bucket, key=lambda point: point[1])
    return [low] if low[1] == high[1] else sorted((low, high))


def _package_powers(log: SampleLog, seconds: Callable[[int], float]) -> dict[str, _Points]:
    """Mean power of each CPU package between two readings of its counter, which may have wrapped between them."""
    found: dict[str, _Points] = {}
    before: dict[int, RaplReading] = {}
    for reading in log.rapl:
        last = before.get(reading.zone)
        before[reading.zone] = reading
        zone = log.header.zones[reading.zone]
        if last is None or zone.domain != PACKAGE or reading.at_ns <= last.at_ns:
            continue
        length_s = (reading.at_ns - last.at_ns) / NS_PER_S
        if may_have_wrapped_twice(length_s, zone.max_uj):
            continue
        rise_uj = reading.energy_uj - last.energy_uj
        rise_uj += zone.max_uj if rise_uj < 0 else 0
        power_w = rise_uj * 1e-6 / length_s
        found.setdefault(f"CPU {zone.name}", []).append((seconds(reading.at_ns), power_w))
    return found


def _spells(samples: Sequence[GpuSample], seconds: Callable[[int], float], interval_s: float) -> Iterable[Spell]:
    """The times in which a bit was set, each until the next sample; pauses of a few samples are bridged."""
    for mask, reason in (*SLOWDOWN_BITS.items(), (POWER_CAP_BIT, _AT_POWER_LIMIT)):
        begin: float | None = None
        end = 0.0
        for index, sample in enumerate(samples):
            if not (sample.event_mask or 0) & mask:
                continue
            at = seconds(sample.at_ns)
            if begin is not None and at - end > HOLE_PERIODS * interval_s:
                yield Spell(begin, end, mask in SLOWDOWN_BITS, reason)
                begin = None
            begin = at if begin is None else begin
            following = seconds(samples[index + 1].at_ns) if index + 1 < len(samples) else at + interval_s
            end = min(following, at + HOLE_PERIODS * interval_s)
        if begin is not None:
            yield Spell(begin, end, mask in SLOWDOWN_BITS, reason)


def _together(spells: Iterable[Spell]) -> list[Spell]:
    """The spells of all GPUs, each kind once where they overlap: time is counted once, however many were slowed."""
    found: list[Spell] = []
    for spell in sorted(spells, key=lambda item: (item.reason, item.begin_s)):
        last = found[-1] if found else None
        if last is not None and last.reason == spell.reason and spell.begin_s <= last.end_s:
            found[-1] = dataclasses.replace(last, end_s=max(last.end_s, spell.end_s))
        else:
            found.append(spell)
    return sorted(found, key=lambda item: (item.begin_s, item.reason))


def _phase(
    mark: Mark,
    seconds: Callable[[int], float],
    powers: Sequence[_Points],
    temperatures: _Points,
    spells: Sequence[Spell],
) -> Phase:
    """One phase in numbers; power is the sum over the devices."""
    begin, end = seconds(mark.opened_ns), seconds(mark.closed_ns)
    inside = [[value for at, value in points if begin <= at < end] for points in powers]
    is_known = bool(inside) and all(inside)
    degrees = [value for at, value in temperatures if begin <= at < end]
    throttled = sum(max(0.0, min(end, until) - max(begin, since)) for since, until in slowed_s(spells))
    return Phase(
        name=mark.name,
        begin_s=begin,
        length_s=end - begin,
        power_mean_w=sum(map(statistics.fmean, inside)) if is_known else None,
        power_max_w=sum(map(max, inside)) if is_known else None,
        temp_min_c=min(degrees, default=None),
        temp_max_c=max(degrees, default=None),
        throttled_s=throttled if is_known else None,
    )
