"""Results of several hosts as one campaign."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import statistics
import tarfile
import zlib
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from lem.base import durable
from lem.base.codec import decode
from lem.base.dataclass import asdict, dataclass, field, replace
from lem.base.durable import make_folder, reason_of, remedy_for
from lem.base.errors import UserError
from lem.base.units import ABSENT, plain, plural, some_of
from lem.record import RESULT_FILE, Record, ResultKey
from lem.results import store
from lem.results.configurations import bare_name, read_listing, read_numbered, write_listing
from lem.results.index import CopiedLines, Found
from lem.results.metrics import Metric
from lem.results.run import ENERGY, THROUGHPUT
from lem.results.stopping import read_stopping_rule, write_stopping_rule
from lem.results.store import Problem, Repository, StoredResult

SCHEMA_VERSION = 1

_SHOWN = 5

ARCHIVE = "results.tar.gz"

SHARD, REPLICATE = MODES = ("shard", "replicate")


@dataclass(frozen=True)
class PlannedExperiment:
    exp_id: str
    config_name: str
    config_hash: str
    cycle_index: int


@dataclass(frozen=True)
class HostPart:
    name: str  # of the host, as in its results
    exp_ids: tuple[str, ...]  # in the order of the campaign
    expected_s: float | None = None  # how long it is expected to take; None without earlier results


@dataclass(frozen=True)
class FleetPlan:
    campaign_id: str
    campaign_name: str
    config_hash: str  # of the campaign; a host refuses a plan made of another state of its file
    run_id: str  # of all hosts together, so that their results make one run
    mode: str  # `shard` (each configuration on one host) or `replicate` (all of them on every host)
    anchor: str | None  # config_hash of the configuration that every host runs, by which hosts are compared
    experiments: tuple[PlannedExperiment, ...]
    hosts: tuple[HostPart, ...]
    arguments: tuple[str, ...] = ()  # of `lem campaign`, as typed, that run it; () where unknown
    results_dir: str = "results"

    def part(self, index: int) -> HostPart:
        if not 1 <= index <= len(self.hosts):
            raise UserError(f"no part {index}: the plan has {len(self.hosts)} parts")
        return self.hosts[index - 1]


def write_plan(path: Path, plan: FleetPlan) -> None:
    if path.exists():
        raise UserError(f"{path} exists, and a plan is never overwritten", "name another file, or remove this one")
    try:
        durable.write_json(path, {"schema_version": SCHEMA_VERSION, **asdict(plan)})
    except OSError as error:
        raise UserError(f"plan {path}: {reason_of(error)}", remedy_for(error, "--write-plan")) from error


def read_plan(path: Path) -> FleetPlan:
    try:
        document = durable.read_json(path)
        if not isinstance(document, dict) or document.pop("schema_version", None) != SCHEMA_VERSION:
            raise ValueError(f"not a plan of schema {SCHEMA_VERSION}")
        plan = decode(FleetPlan, document, "plan")
        _check(plan)
    except OSError as error:
        raise UserError(f"plan {path}: {reason_of(error)}", "give the file that --write-plan stored") from error
    except ValueError as error:
        raise UserError(f"plan {path}: {error}", "create it again: lem campaign FILE --write-plan …") from error
    return plan


def _check(plan: FleetPlan) -> None:
    known = {item.exp_id for item in plan.experiments}
    names = [host.name for host in plan.hosts]
    if plan.mode not in MODES:
        raise ValueError(f"unknown mode {plan.mode!r}; known: {', '.join(MODES)}")
    for text in (plan.run_id, *names, *known):
        if not store.is_name(text):
            raise ValueError(f"{text!r} cannot be used as a folder name")
    if len(set(names)) != len(names) or not names:
        raise ValueError("expected at least one host, and each host once")
    for host in plan.hosts:
        if strange := [exp_id for exp_id in host.exp_ids if exp_id not in known]:
            raise ValueError(f"host {host.name}: unknown experiment {strange[0]!r}")
    if not known <= {exp_id for host in plan.hosts for exp_id in host.exp_ids}:
        raise ValueError("an experiment is assigned to no host")


@dataclass(frozen=True)
class Gathered:
    campaign: str  # the slug
    results: tuple[StoredResult, ...]  # each once
    problems: tuple[Problem, ...]  # attempts without a usable result
    foreign_runs: tuple[str, ...] = ()  # runs that do not belong to the plan; they are left out

    def without(self, hosts: Container[str]) -> Gathered:
        return replace(self, results=tuple(item for item in self.results if item.record.identity.host not in hosts))


def gather(folders: Sequence[Path], *, campaign: str | None = None, plan: FleetPlan | None = None) -> Gathered:
    results_dirs = _results_dirs(folders)
    slug = campaign or _only_campaign(results_dirs)
    scans = [Repository(folder, slug).scan(is_checked=True) for folder in results_dirs]
    stored = [(item.record.identity, item) for scan in scans for item in scan.results]
    own = [(identity, item) for identity, item in stored if plan is None or identity.run_id == plan.run_id]
    problems = [item for scan in scans for item in scan.problems if plan is None or item.run_id in ("", plan.run_id)]
    found: dict[ResultKey, StoredResult] = {}
    conflicts: list[str] = []
    for identity, item in own:
        known = found.setdefault(identity.key, item)
        if known.sha256 != item.sha256:
            conflicts.append(f"{known.path} and {item.path}")
        elif item.is_recorded and not known.is_recorded:
            found[identity.key] = replace(known, is_recorded=True)
    if conflicts:
        n_pairs = plural(len(conflicts), "pair")
        text = f"{n_pairs} of results with the same key but different content: {'; '.join(conflicts[:_SHOWN])}"
        raise UserError(text, "one of each pair was altered, or two hosts have the same name; nothing was merged")
    ordered = sorted(found.items(), key=lambda entry: (entry[1].record.identity.order_index, entry[0]))
    foreign = {identity.run_id for identity, _ in stored} - {identity.run_id for identity, _ in own}
    return Gathered(slug, tuple(item for _, item in ordered), tuple(problems), tuple(sorted(foreign)))


def _results_dirs(folders: Iterable[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder", "give the folder of each host: lem merge DIR… --output DIR")
        path = folder / "results" if (folder / "results").is_dir() else folder
        found.setdefault(path.resolve(), path)
    return list(found.values())


def _only_campaign(results_dirs: Iterable[Path]) -> str:
    names = sorted({name for folder in results_dirs for name in store.folder_names(folder)})
    if not names:
        raise UserError("no campaign in these folders", "expected [results/]<campaign>/<run>/… in each")
    if len(names) > 1:
        raise UserError(f"several campaigns: {', '.join(names[:_SHOWN])}", "choose one: --campaign NAME")
    return names[0]


@dataclass(frozen=True)
class AnchorCheck:
    metric: str = ""  # what was compared; empty where nothing could be
    unit: str = ""
    by_host: Mapping[str, float] = field(default_factory=dict)  # geometric mean over the valid results
    median: float | None = None  # of these means
    spread: float | None = None  # largest over smallest, less one; None with fewer than two hosts
    outliers: Mapping[str, float] = field(default_factory=dict)  # hosts too far from the median: their ratio to it


# Of two hosts that differ, neither is the outlier.
_HOSTS_FOR_MEDIAN = 3


def check_anchor(results: Sequence[StoredResult], anchor: str | None, tolerance: float) -> AnchorCheck:
    """How alike the hosts are in the configuration with the hash `anchor`; nothing is compared where that is None."""
    # A host whose ratio to the median differs from 1 by more than `tolerance` is an outlier. Each host is compared with
    # the median, not with the others, since the range over all of them grows with their number. Where that does not
    # tell who is the outlier (two hosts, or no majority within the tolerance), a difference is a UserError: results of
    # such hosts may not be in one table.
    anchors = (item.record for item in results if item.record.identity.config_hash == anchor)
    records = [record for record in anchors if record.validity.valid]
    for metric in (ENERGY, THROUGHPUT):
        by_host = _geometric_means(records, metric)
        if by_host is None:
            continue
        # Of the logarithms, so that J/token and tokens/J have the same outliers.
        median = math.exp(statistics.median(map(math.log, by_host.values())))
        spread = max(by_host.values()) / min(by_host.values()) - 1 if len(by_host) > 1 else None
        ratios = {host: value / median for host, value in by_host.items()}
        outliers = {host: ratio for host, ratio in ratios.items() if max(ratio, 1 / ratio) - 1 > tolerance}
        if len(by_host) < _HOSTS_FOR_MEDIAN:
            is_undecided = spread is not None and spread > tolerance
        else:
            is_undecided = 2 * len(outliers) >= len(by_host)
        if is_undecided and spread is not None:
            values = some_of([f"{host} {plain(value, '.4g')} {metric.unit}" for host, value in by_host.items()], _SHOWN)
            apart, most = f"{100 * spread:.1f} %", f"more than {100 * tolerance:g} %"
            text = f"the hosts differ by {apart} in {metric.name} of the anchor, {most}: {values}"
            raise UserError(text, "replicate the campaign on each host, or raise --anchor-tolerance")
        return AnchorCheck(metric.name, metric.unit, by_host, median, spread, outliers)
    return AnchorCheck()


def _geometric_means(records: Sequence[Record], metric: Metric) -> dict[str, float] | None:
    values: dict[str, list[float]] = {}
    for record in records:
        value, _ = metric.read(record)
        if value is None or value <= 0:
            return None
        values.setdefault(record.identity.host, []).append(math.log(value))
    return {host: math.exp(sum(logs) / len(logs)) for host, logs in sorted(values.items())} or None


@dataclass(frozen=True)
class Cell:
    planned: int
    present: int  # with a result
    valid: int  # with a valid result

    @property
    def text(self) -> str:
        odd = f" ({self.present - self.valid} not valid)" if self.present > self.valid else ""
        return f"{self.present}/{self.planned}{odd}" if self.planned else ABSENT


@dataclass(frozen=True)
class Matrix:
    hosts: tuple[str, ...]
    rows: Mapping[str, tuple[Cell, ...]]  # by configuration name, a cell for each host
    missing: tuple[tuple[str, str], ...]  # host and exp_id of each planned experiment without a result

    def without(self, hosts: Container[str]) -> Matrix:
        kept = [host not in hosts for host in self.hosts]
        rows = {name: tuple(itertools.compress(cells, kept)) for name, cells in self.rows.items()}
        missing = tuple((host, exp_id) for host, exp_id in self.missing if host not in hosts)
        return Matrix(tuple(itertools.compress(self.hosts, kept)), rows, missing)


def completeness(gathered: Gathered, plan: FleetPlan | None) -> Matrix:
    present: dict[tuple[str, str], bool] = {}
    planned: dict[tuple[str, str], str] = {}  # the name of the configuration, by host and exp_id
    for item in gathered.results:
        identity = item.record.identity
        key = (identity.host, identity.experiment_id)
        present[key] = present.get(key, False) or item.record.validity.valid
        planned[key] = bare_name(identity)
    if plan is not None:
        names = {item.exp_id: item.config_name for item in plan.experiments}
        planned = {(host.name, exp_id): names[exp_id] for host in plan.hosts for exp_id in host.exp_ids}
    hosts = tuple(dict.fromkeys(host for host, _ in planned))
    found: dict[str, dict[str, list[bool | None]]] = {}
    for (host, exp_id), name in planned.items():
        found.setdefault(name, {}).setdefault(host, []).append(present.get((host, exp_id)))
    rows = {name: tuple(_cell(by_host.get(host, ())) for host in hosts) for name, by_host in found.items()}
    return Matrix(hosts, rows, tuple(key for key in planned if key not in present))


def _cell(states: Sequence[bool | None]) -> Cell:
    """None: planned without a result; else whether the result is valid."""
    valid = [state for state in states if state is not None]
    return Cell(len(states), len(valid), sum(valid))


def write_merged(gathered: Gathered, output: Path) -> int:
    folder = Repository(output, gathered.campaign).folder
    try:
        new = _copy_attempts(gathered.results, folder)
        run_folders = dict.fromkeys((item.record.identity.run_id, item.path.parents[2]) for item in gathered.results)
        for run_id, run_folder in run_folders:
            rule = read_stopping_rule(run_folder)
            if rule is not None and read_stopping_rule(folder / run_id) != rule:
                write_stopping_rule(folder / run_id, rule)
        for run_id in dict.fromkeys(run_id for run_id, _ in run_folders):
            sources = [run_folder for of, run_folder in run_folders if of == run_id]
            listings = [read_listing(item) for item in sources]
            if None not in listings:  # else what the others have would look removed
                everything = {digest: item for listing in listings if listing for digest, item in listing.items()}
                numbered = [digest for item in sources for digest in read_numbered(item)]
                write_listing(folder / run_id, [*everything.values()], numbered)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {reason_of(error)}", remedy_for(error, "--output")) from error
    return new


def _copy_attempts(results: Iterable[StoredResult], folder: Path) -> int:
    """Copy the attempts that are missing in the campaign's folder, all or none; how many."""
    copies: dict[Path, Path] = {}
    lines = CopiedLines()
    make_folder(folder)
    with durable.scratch_folder(folder) as scratch:
        for item in results:
            if item.path.is_relative_to(folder):
                continue
            identity = item.record.identity
            run = folder / identity.run_id
            experiment = store.experiment_folder_name(identity.experiment_id, identity.host)
            target = run / experiment / item.path.parent.name
            if target.exists():
                continue
            copy = copies[target] = scratch / str(len(copies))
            _copy_attempt(item, copy)
            found = Found(item.record, item.sha256, item.is_recorded)
            lines.add((item.path.parents[2], item.path), copy / RESULT_FILE, (run, target / RESULT_FILE), found)
        for run in dict.fromkeys(target.parents[1] for target in copies):
            make_folder(run)
        experiments = dict.fromkeys(target.parent for target in copies)
        for path in experiments:
            path.mkdir(exist_ok=True)
        for run in dict.fromkeys(path.parent for path in experiments):
            durable.sync_folder(run)
        lines.write()  # first: a crash must not leave a result whose recorded digest is missing
        durable.name_folders(copies)
    return len(copies)


def _copy_attempt(item: StoredResult, target: Path) -> None:
    target.mkdir()
    with os.scandir(item.path.parent) as found:
        names = [entry.name for entry in found if entry.is_file(follow_symlinks=False)]
    for name in sorted(names):
        if not name.startswith(durable.TEMPORARY_PREFIX):
            shutil.copyfile(item.path.with_name(name), target / name)
    if durable.sha256_of(target / RESULT_FILE) != item.sha256:
        raise UserError(f"{item.path}: it changed while it was copied", "merge again once nothing writes there")


@dataclass(frozen=True)
class Received:
    new: tuple[str, ...]  # hosts whose results are other ones than before
    refused: Mapping[str, str]  # why, by host; what arrived before stays


def receive(folder: Path, sums: Mapping[str, str]) -> Received:
    """Unpack `<host>/results.tar.gz` to `<host>/results` for each host whose archive has the SHA-256 in `sums`.

    An archive with a result that is not as it was measured is refused, too.
    """
    new, refused = [], {}
    for host, digest in sums.items():
        if not store.is_name(host):
            raise UserError(f"{host!r} cannot be used as a folder name")
        archive, stamp = folder / host / ARCHIVE, folder / host / "results.sha256"
        try:
            if (found := durable.sha256_of(archive)) != digest:
                raise ValueError(f"the SHA-256 of the archive that arrived is {found}, but the host sent {digest}")
            if stamp.is_file() and stamp.read_text(encoding="ascii") == digest and (folder / host / "results").is_dir():
                continue
            with durable.scratch_folder(folder / host) as scratch:
                _unpack(archive, scratch)
                if (problem := _altered(scratch / "results")) is not None:
                    path = problem.path.relative_to(scratch)
                    raise ValueError(f"the archive holds a result that was altered: {path}: {problem.message}")
                if (folder / host / "results").exists():
                    (folder / host / "results").rename(scratch / "before")
                (scratch / "results").rename(folder / host / "results")
            stamp.write_text(digest, encoding="ascii")
            new.append(host)
        except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
            refused[host] = str(error)
            with contextlib.suppress(OSError):
                archive.rename(archive.with_name(f"refused-{ARCHIVE}"))
    return Received(tuple(new), refused)


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if path.parts[:1] != ("results",) or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise ValueError(f"unexpected in the archive: {member.name}")
            content = members.extractfile(member)
            (target / path if content is None else (target / path).parent).mkdir(parents=True, exist_ok=True)
            if content is not None:
                with content, (target / path).open("xb") as stream:
                    shutil.copyfileobj(content, stream)


def _altered(results_dir: Path) -> Problem | None:
    scans = (Repository(results_dir, slug).scan(is_checked=True) for slug in store.folder_names(results_dir))
    return next((item for scan in scans for item in scan.problems if item.kind == "altered"), None)
