"""Finding the run that an argument names, and output that commands share."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from lem.base.clock import describe_future, utc_now
from lem.base.dataclass import dataclass, replace
from lem.base.doc import printable
from lem.base.errors import UserError, did_you_mean
from lem.base.measurement import Section
from lem.base.units import some_of
from lem.cli.options import STATE_DIR, checked
from lem.config.option import declarations
from lem.config.sections import MeasurementConfig, SloConfig
from lem.orchestration.journal import find_fact
from lem.orchestration.status import (
    CampaignStatus,
    Viewpoint,
    digests_of,
    find_manifest,
    read_status,
    remainder_of,
    state_folders,
)
from lem.record import RATES, Record
from lem.results import store
from lem.results.axes import parse_settings
from lem.results.configurations import Reading
from lem.results.run import Run, read_run

_logger = logging.getLogger(__name__)

_PROBLEMS_SHOWN = 10
_DATE_LENGTH = 8  # of a run ID; a shorter number is that of a configuration

CONFIGURATION = """A configuration is named by its number in every table, by settings (axis=value, or several with
commas), or by a part of its name"""

T = TypeVar("T")
S = TypeVar("S", SloConfig, MeasurementConfig)


def add_rates(parser: argparse._ActionsContainer) -> None:
    for name in RATES:
        text = declarations(MeasurementConfig)[name].description.rstrip(".")
        text = f"{text[0].lower()}{text[1:]} (default: measurement.{name} of the campaign)"
        kind = functools.partial(checked, functools.partial(_rate, name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="NUMBER", help=text)

    text = "count good requests by these (ttft_ms=200,tpot_ms=50; default: traffic_simulation.slo of the campaign)"
    parser.add_argument("--slo", type=functools.partial(checked, _slo), metavar="LIMITS", help=text)


def _slo(text: str) -> SloConfig:
    settings = parse_settings(text)
    if settings is None or len(settings) <= text.count(","):
        raise ValueError(f"expected LIMIT=NUMBER,LIMIT=NUMBER with each limit once, got {text!r}")
    return _from_texts(SloConfig, settings)


def _rate(name: str, text: str) -> float:
    found: float = getattr(_from_texts(MeasurementConfig, {name: text}), name)
    return found


def _from_texts(kind: type[S], texts: Mapping[str, str]) -> S:
    """A section with these options, of which null is no value."""
    from lem.config.scalars import resolve_plain  # imported here to keep the start-up fast

    found = kind.from_dict({name: resolve_plain(text) for name, text in texts.items()})
    for name, text in texts.items():
        if getattr(found, name) is None:
            raise ValueError(f"{name}: expected a number, got {text or 'nothing'}")
    return found


def recount(result: Path, record: Record, slo: SloConfig) -> Mapping[str, Section]:
    from lem.meters.recompute import recount as count  # 14 modules that few commands need

    return count(result, record, slo)


def reading_of(args: argparse.Namespace) -> Reading:
    rates = {name: value for name in RATES if (value := getattr(args, name)) is not None}
    return Reading(rates, args.slo, recount)


@dataclass(frozen=True)
class SelectedRun:
    results_dir: Path
    campaign: str
    run_id: str

    def scan(self, state_dir: Path = STATE_DIR, *, reading: Reading | None = None) -> store.Scan:
        digests = _digests(self._statuses(state_dir))
        return store.Repository(self.results_dir, self.campaign).scan(self.run_id, digests=digests, reading=reading)

    def read(self, state_dir: Path = STATE_DIR, *, is_checked: bool = False, reading: Reading | None = None) -> Run:
        statuses = self._statuses(state_dir)
        digests = _digests(statuses)
        place = self.results_dir, self.campaign, self.run_id
        reading = reading or Reading(recount=recount)
        run = read_run(*place, is_checked=is_checked, digests=digests, reading=reading)
        if not statuses:
            return run
        whole = {record.identity.experiment_id for record in run.records}
        rests = [remainder_of(status, whole) for status in statuses]
        failed, left = Counter[str](), Counter[str]()
        for rest in rests:
            failed.update(rest.failed)
            left.update(rest.left)
        remedy = next((rest.remedy for rest in rests if rest.remedy), "")
        return replace(run, failed=failed, left=left, remedy=remedy)

    def _statuses(self, state_dir: Path) -> list[CampaignStatus]:
        found = []
        for folder in state_folders(state_dir / self.campaign):
            try:
                path = find_manifest(folder)
                # Of many runs one has the manifest, which may be long.
                if path is None or find_fact(path, "run_id") not in (None, self.run_id):
                    continue
                found.append(read_status(folder, Viewpoint(utc_now(), os.uname().nodename), path))
            except OSError:  # the state folder of another user
                continue
        return [item for item in found if item.manifest is not None and item.manifest.run_id == self.run_id]


def _digests(statuses: Iterable[CampaignStatus]) -> store.Digests:
    found: dict[store.DigestKey, str] = {}
    for status in statuses:
        found |= digests_of(status.manifest)
    return found


def list_runs(results_dir: Path) -> tuple[SelectedRun, ...]:
    return tuple(
        SelectedRun(results_dir, campaign, run_id)
        for campaign in store.folder_names(results_dir)
        for run_id in store.in_order(store.folder_names(results_dir / campaign))
    )


def _last(runs: Sequence[SelectedRun]) -> SelectedRun:
    future = describe_future(runs[-1].run_id, utc_now())
    if future:
        _logger.warning("%s", future)
    return runs[-1]


def find_run(runs: Sequence[SelectedRun], wanted: str) -> SelectedRun | None:
    of_campaign = [item for item in runs if item.campaign == wanted]
    if of_campaign:
        return _last(of_campaign)
    found = [item for item in runs if item.run_id == wanted]
    if wanted and not (wanted.isdecimal() and len(wanted) < _DATE_LENGTH):
        found = found or [item for item in runs if item.run_id.startswith(wanted)]
    if len(found) > 1:
        raise ambiguous(wanted, [item.run_id for item in found])
    return found[0] if found else None


def resolve_run(results_dir: Path, wanted: str, run_id: str | None = None) -> SelectedRun:
    """The run that `wanted` and `run_id` (or its beginning) name; UserError where there is none, or several."""
    runs = list_runs(results_dir)
    if run_id is not None:
        runs, wanted = tuple(item for item in runs if item.campaign == wanted), run_id
    found = find_run(runs, wanted)
    if found is None:
        raise no_such_name(wanted, runs, results_dir)
    return found


def resolve_experiments(results_dir: Path, wanted: str) -> tuple[SelectedRun, frozenset[str] | None]:
    """As `resolve_run`, with the experiments that `RUN/EXPERIMENT` or `RUN/CONFIGURATION` names; None for all."""
    runs = list_runs(results_dir)
    campaign_runs = [item for item in runs if item.campaign == wanted]
    if campaign_runs:
        return _last(campaign_runs), None
    candidates: list[tuple[str, SelectedRun, str | None]] = []
    for item in runs:
        candidates.append((item.run_id, item, None))
        for exp_id in store.experiment_names(results_dir / item.campaign / item.run_id):
            candidates += [(exp_id, item, exp_id), (f"{item.run_id}/{exp_id}", item, exp_id)]
    found = [candidate for candidate in candidates if candidate[0] == wanted]
    found = found or [candidate for candidate in candidates if wanted and candidate[0].startswith(wanted)]
    # `RUN/` is a prefix of each of its experiments, as `RUN` is: the run wins.
    runs_found = [candidate for candidate in found if candidate[2] is None]
    distinct = {(item, exp_id) for _, item, exp_id in (runs_found or found)}
    if len(distinct) > 1:
        names = (item.run_id if exp_id is None else f"{item.run_id}/{exp_id}" for item, exp_id in distinct)
        raise ambiguous(wanted, names)
    if distinct:
        run, only = distinct.pop()
        return run, None if only is None else frozenset({only})
    place, _, configuration = wanted.partition("/")
    where = find_run(runs, place) if configuration else None
    if where is None:
        raise no_such_name(wanted, runs, results_dir)
    records = where.read().select(configuration).records
    return where, frozenset(record.identity.experiment_id for record in records)


def no_such_name(wanted: str, runs: Sequence[SelectedRun], results_dir: Path) -> UserError:
    if not runs:
        return UserError(f"{wanted!r}: no results in {results_dir}", "set the folder with --results-dir")
    campaigns = list(dict.fromkeys(item.campaign for item in runs))
    meant = did_you_mean(wanted, [*campaigns, *(item.run_id for item in runs)])
    return UserError(f"no campaign, run or experiment {wanted!r} in {results_dir}{meant}", "see `lem results list`")


def ambiguous(wanted: str, names: Iterable[str]) -> UserError:
    return UserError(f"{wanted!r} is ambiguous: {some_of(sorted(names), 5)}", "use a full name")


def problem_documents(problems: Iterable[store.Problem]) -> list[dict[str, str]]:
    return [{"path": str(item.path), "kind": item.kind, "message": item.message} for item in problems]


def damaged(problems: Iterable[store.Problem]) -> list[store.Problem]:
    return [problem for problem in problems if problem.kind != "missing"]


def list_problems(
    err: TextIO, problems: Sequence[store.Problem], *, lead: str = "", rest: str = "--json lists all"
) -> None:
    texts = (f"{lead}{problem.kind}: {problem.path}: {problem.message}" for problem in problems[:_PROBLEMS_SHOWN])
    err.writelines(printable(text) + "\n" for text in texts)
    if len(problems) > _PROBLEMS_SHOWN:
        err.write(f"and {len(problems) - _PROBLEMS_SHOWN} more: {rest}\n")
