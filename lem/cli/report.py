"""`lem report`."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from lem.base.dataclass import replace
from lem.base.doc import write_json
from lem.base.errors import UserError
from lem.base.measurement import POWER_CAP_BIT, SLOWDOWN_BITS
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S, fmean
from lem.cli import options, selection
from lem.meters import samples
from lem.meters.rapl import PACKAGE, distinct_zones, rapl_step_j
from lem.results.report import render_report
from lem.results.report.content import Phase, Series, Slowdown, Trace, compose, select_traced, union
from lem.results.run import Configuration, Run

_FILENAME = "report.html"


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "`lem report`: one campaign as a self-contained HTML file."
    parser.add_argument("campaign", metavar="CAMPAIGN", help="a campaign (its last run) or a run")
    text = f"the file to write, - for stdout (default: {_FILENAME} in the campaign's folder)"
    parser.add_argument("--output", "-o", metavar="FILE", help=text)
    text = "the configuration to compare with, as for `lem compare` (default: the first)"
    parser.add_argument("--baseline", metavar="NAME", help=text)
    selection.add_rates(parser)
    options.add_results_dir(parser)
    options.add_json(parser, "print the path and size as a JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    if args.json and args.output == "-":
        raise UserError("--json and --output - both write to stdout", "Write the page to a file: --output FILE.")
    chosen = selection.resolve_run(args.results_dir, args.campaign)
    results = chosen.read(reading=selection.reading_of(args))
    text = make_report(results, None if args.baseline is None else results.select(args.baseline))
    selection.list_problems(err, selection.damaged(results.problems), lead="left out: ", rest="the page lists them")
    if args.output == "-":
        out.write(text)
        return
    path = Path(args.output) if args.output else args.results_dir / chosen.campaign / _FILENAME
    options.write_file(path, text)
    if args.json:
        document = {
            "path": str(path),
            "bytes": len(text.encode("utf-8")),
            "campaign": chosen.campaign,
            "run_id": chosen.run_id,
            "problems": selection.problem_documents(results.problems),
        }
        write_json(out, document)
    else:
        out.write(f"{path}\n")


def make_report(run: Run, baseline: Configuration | None = None) -> str:
    report = compose(run, baseline)
    # As text: for 10,000 results, making a path takes longer than asking the file system.
    logs = {key: os.path.join(os.path.dirname(path), samples.FINISHED_FILENAME) for key, path in run.paths.items()}  # noqa: PTH118, PTH120
    with_log = [item for item in run.records if os.path.isfile(logs.get(item.identity.key, ""))]  # noqa: PTH113
    traces, unread = [], []
    for record in select_traced(report.entries, with_log):
        path = Path(logs[record.identity.key])
        try:
            log, marks = samples.read_finished(path)
        except (samples.SampleLogError, OSError) as error:
            unread.append("/".join(path.parts[-4:]) + ": " + str(error).removeprefix(f"{path}: "))
        else:
            traces.append((record, trace_of(log, marks)))
    return render_report(replace(report, traces=tuple(traces), unread=tuple(unread), n_logs=len(with_log)))


_BUCKETS, _LEAST_BUCKETS = 260, 60  # of time, of all lines and of each
_AT_POWER_LIMIT = "at the power limit"

_Points = list[tuple[float, float]]


def trace_of(log: samples.SampleLog, marks: Sequence[samples.Mark]) -> Trace:
    ordered = sorted(marks, key=lambda mark: (mark.opened_ns, mark.closed_ns))
    zero_ns = ordered[0].opened_ns if ordered else log.header.started_ns

    def seconds(at_ns: int) -> float:
        return (at_ns - zero_ns) / NS_PER_S

    def lines(read: Callable[[samples.GpuSample], float | None]) -> dict[str, _Points]:
        return {
            named(log.header.devices[place]): [
                (seconds(item.at_ns), value) for item in taken if (value := read(item)) is not None
            ]
            for place, taken in sorted(by_gpu.items())
        }

    def named(device: samples.GpuHeader) -> str:
        return device.label if device.name == device.uuid else f"{device.label} {device.name}"

    interval_s = log.header.interval_ms / 1000
    by_gpu: dict[int, list[samples.GpuSample]] = {}
    for sample in log.samples:
        by_gpu.setdefault(sample.gpu, []).append(sample)
    powers, packages = lines(lambda sample: sample.power_w), _package_powers(log, seconds)
    temperatures = lines(lambda sample: sample.temp_c)
    slowdowns = _slowdowns(by_gpu.values(), seconds, interval_s)
    counted = [*(powers if any(powers.values()) else packages).values()]
    degrees = list(itertools.chain.from_iterable(temperatures.values()))
    return Trace(
        phases=tuple(
            _phase(mark.name, seconds(mark.opened_ns), seconds(mark.closed_ns), counted, degrees, slowdowns)
            for mark in ordered
        ),
        power=(*_series(powers, interval_s), *_series(packages, samples.SLOW_PERIOD_S)),
        temperature=_series(temperatures, interval_s),
        slowdowns=slowdowns,
        interval_s=interval_s if by_gpu else samples.SLOW_PERIOD_S,
    )


def _series(lines: Mapping[str, _Points], interval_s: float) -> tuple[Series, ...]:
    buckets = max(_BUCKETS // max(len(lines), 1), _LEAST_BUCKETS)
    hole_s = samples.HOLE_PERIODS * interval_s
    return tuple(Series(label, thin(points, buckets, hole_s)) for label, points in lines.items() if points)


def thin(points: _Points, n_buckets: int, hole_s: float) -> tuple[tuple[float, float] | None, ...]:
    """At most twice `n_buckets` points and the holes: of each bucket of time the least and the greatest value."""
    # Peaks stay where they were, which a mean would flatten; a pause longer than `hole_s` becomes a None.
    if not points:
        return ()
    begin, end = points[0][0], points[-1][0]
    width = (end - begin) / n_buckets or 1.0
    found: list[tuple[float, float] | None] = []
    bucket: _Points = []
    number, before = 0, begin
    for point in points:
        is_hole = point[0] - before > hole_s
        current = int((point[0] - begin) / width)
        if bucket and (is_hole or current != number):
            found += _extremes(bucket)
            bucket = []
        if is_hole:
            found.append(None)
        bucket.append(point)
        number, before = current, point[0]
    return (*found, *_extremes(bucket))


def _extremes(bucket: _Points) -> _Points:
    low = min(bucket, key=lambda point: point[1])
    high = max(bucket, key=lambda point: point[1])
    return [low] if low[1] == high[1] else sorted((low, high))


def _package_powers(log: samples.SampleLog, seconds: Callable[[int], float]) -> dict[str, _Points]:
    found: dict[str, _Points] = {}
    before: dict[int, samples.RaplReading] = {}
    zones = enumerate(log.header.zones)
    shown = distinct_zones(log.rapl, {place: zone.name for place, zone in zones if zone.domain == PACKAGE})
    for reading in log.rapl:
        last = before.get(reading.zone)
        before[reading.zone] = reading
        zone = log.header.zones[reading.zone]
        if last is None or reading.zone not in shown or reading.at_ns <= last.at_ns:
            continue
        step_j = rapl_step_j(last, reading, zone.max_uj, zone.name, zone.limit_w)
        if not isinstance(step_j, Reason):
            power_w = step_j / (reading.at_ns - last.at_ns) * NS_PER_S
            found.setdefault(f"CPU {zone.name}", []).append((seconds(reading.at_ns), power_w))
    return found


def _slowdowns(
    gpus: Iterable[Sequence[samples.GpuSample]], seconds: Callable[[int], float], interval_s: float
) -> tuple[Slowdown, ...]:
    hole_s = samples.HOLE_PERIODS * interval_s
    found: list[Slowdown] = []
    for mask, reason in (*SLOWDOWN_BITS.items(), (POWER_CAP_BIT, _AT_POWER_LIMIT)):
        spans: list[tuple[float, float]] = []
        for taken in gpus:
            own = []
            for sample, following in itertools.zip_longest(taken, taken[1:]):
                if (sample.event_mask or 0) & mask:
                    at = seconds(sample.at_ns)
                    end = seconds(following.at_ns) if following else at + interval_s
                    own.append((at, min(end, at + hole_s)))
            spans += union(own, hole_s)
        found += [Slowdown(begin, end, mask in SLOWDOWN_BITS, reason) for begin, end in union(spans)]
    return tuple(sorted(found, key=lambda item: (item.begin_s, item.reason)))


def _phase(
    name: str, begin: float, end: float, powers: Sequence[_Points], temperatures: _Points, slowdowns: Iterable[Slowdown]
) -> Phase:
    inside = [[value for at, value in points if begin <= at < end] for points in powers]
    degrees = [value for at, value in temperatures if begin <= at < end]
    faults = union((slowdown.begin_s, slowdown.end_s) for slowdown in slowdowns if slowdown.is_fault)
    is_known = bool(inside) and all(inside)
    return Phase(
        name=name,
        begin_s=begin,
        end_s=end,
        power_mean_w=sum(map(fmean, inside)) if is_known else None,
        power_max_w=sum(map(max, inside)) if is_known else None,
        temp_min_c=min(degrees, default=None),
        temp_max_c=max(degrees, default=None),
        throttled_s=sum(max(0.0, min(end, b) - max(begin, a)) for a, b in faults) if is_known else None,
    )
