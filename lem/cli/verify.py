"""`lem verify`: whether results are as they were measured, and agree with their raw data."""

from __future__ import annotations

import argparse
import contextlib
import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lem.base import durable
from lem.base.answers import OUTPUT_IDS_FILE
from lem.base.clock import run_time
from lem.base.dataclass import asdict, dataclass, replace
from lem.base.doc import Column, Doc, Table, terminal_width, write_json
from lem.base.errors import ExitCode, MeterRefused, UserError
from lem.base.units import format_quantity, plural, some_of
from lem.cli import options, selection
from lem.config.campaign_config import slug_of
from lem.config.experiment import ExperimentConfig, MeteredConfig, ProgramConfig
from lem.meters.external import read_external
from lem.meters.recompute import Difference, RawData, Recomputed, has_energy, has_requests, recompute
from lem.meters.requestlog import REQUESTS_FILENAME, read_requests
from lem.meters.samples import FINISHED_FILENAME, read_finished
from lem.orchestration.manifest import ManifestManager
from lem.orchestration.status import digests_of, find_manifest, state_folders
from lem.record import CONFIG_FILE, PROMPTS_FILE, RESULT_FILE
from lem.results.store import DigestKey, Digests, Problem, Repository, Scan, StoredResult, digest_key
from lem.worker.prompts import PromptError, fingerprint, read_prompt_file

SCHEMA_VERSION = 1

# What the folder of an attempt, experiment, run (or part of one) and campaign hold, in this order.
_BELOW = (RESULT_FILE, "attempt-*/", "*/attempt-*/", "*/*/attempt-*/", "*/*/*/attempt-*/")
_SHOWN = 5  # differences of a result in the text


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare results with the digests that were recorded when they were measured, and recompute every figure that "
        "their raw data allow."
    )
    parser.epilog = (
        "exit codes: 0 all agree, 1 a result is damaged or differs, 2 no such result, 4 nothing differs, but a result "
        "has no recorded digest or nothing to recompute it from"
    )
    text = f"a {RESULT_FILE}, the folder of an attempt, run or campaign, or a name as for `lem results show`"
    parser.add_argument("results", nargs="+", metavar="RESULT", help=text)
    options.add_results_dir(parser)
    options.add_state_dir(parser)
    options.add_json(parser)
    parser.set_defaults(run=run)


class Verdict(enum.Enum):
    AGREES = "agrees"
    DIFFERS = "differs"
    UNVERIFIED = "not verified"


@dataclass(frozen=True)
class Outcome:
    result: StoredResult
    # agrees, differs, incomplete (all that is there agrees), unmeasured (nothing to recompute it from) or impossible
    status: str
    message: str = ""  # why it is incomplete or impossible, or a note
    recomputed: Recomputed | None = None

    @property
    def is_good(self) -> bool:
        return self.status in ("agrees", "unmeasured")

    @property
    def differences(self) -> tuple[Difference, ...]:
        return self.recomputed.differences if self.recomputed else ()

    @property
    def compared(self) -> int:
        return self.recomputed.compared if self.recomputed else 0

    @property
    def which(self) -> dict[str, Any]:
        identity = self.result.record.identity
        named = {name: getattr(identity, name) for name in ("experiment_id", "config_name", "attempt")}
        return {**named, "path": str(self.result.path)}

    @property
    def document(self) -> dict[str, Any]:
        figures = {"compared": self.compared, "differences": [asdict(item) for item in self.differences]}
        return {"status": self.status, "message": self.message, **figures}


@dataclass(frozen=True)
class Verified:
    outcome: Outcome
    digests: Mapping[str, bool]  # by the file that records one, whether the result has it

    @property
    def verdict(self) -> Verdict:
        if self.outcome.status == "differs" or not all(self.digests.values()):
            return Verdict.DIFFERS
        return Verdict.AGREES if self.digests and self.outcome.status == "agrees" else Verdict.UNVERIFIED

    @property
    def remarks(self) -> Iterator[str]:
        for name, is_same in self.digests.items():
            if not is_same:
                yield f"its SHA-256 is not the one in the {name}: it was changed after it was measured"
        if not self.digests:
            yield "no digest of it was recorded"
        for item in self.outcome.differences[:_SHOWN]:
            yield f"{item.field}: recorded {shown(item.recorded)}, recomputed {shown(item.recomputed)}"
        if (more := len(self.outcome.differences) - _SHOWN) > 0:
            yield f"and {plural(more, 'figure')} more: --json lists all"
        if self.outcome.status in ("unmeasured", "impossible"):
            yield f"nothing was recomputed: {self.outcome.message}"
        elif self.outcome.message:
            yield self.outcome.message


_COUNTED = ((Verdict.DIFFERS, "differ or are damaged"), (Verdict.UNVERIFIED, "could not be verified"))


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    results, problems = _chosen(args)
    digests = recorded_digests(args.state_dir / slug_of(item.record.identity.campaign_name) for item in results)
    found = [verify_result(item, digests) for item in results]
    counts = Counter(item.verdict for item in found)
    counts[Verdict.DIFFERS] += len(problems)
    if args.json:
        write_json(out, _document(found, problems, counts))
    else:
        _write(out, found, counts)
        selection.list_problems(err, problems)
    if counts[Verdict.DIFFERS]:
        return ExitCode.EXPERIMENT_FAILED
    return ExitCode.INCONCLUSIVE if counts[Verdict.UNVERIFIED] else ExitCode.OK


# The results that an argument names


def _chosen(args: argparse.Namespace) -> tuple[list[StoredResult], list[Problem]]:
    results: dict[Path, StoredResult] = {}
    problems: dict[Path, Problem] = {}
    for wanted in args.results:
        for scan in _by_path(Path(wanted)) if Path(wanted).exists() else _by_name(args.results_dir, wanted):
            results |= {item.path: item for item in scan.results}
            problems |= {item.path: item for item in selection.damaged(scan.problems)}
    if not results and not problems:
        raise UserError(f"no complete result in {some_of(args.results, 3)}", "see `lem results list`")
    return list(results.values()), list(problems.values())


def _by_name(results_dir: Path, wanted: str) -> Iterator[Scan]:
    item, exp_ids = selection.resolve_experiments(results_dir, wanted)
    repository = Repository(results_dir, item.campaign)
    if exp_ids is None:
        yield repository.scan(item.run_id, is_checked=True)
    else:
        yield from (repository.check(item.run_id, exp_id) for exp_id in sorted(exp_ids))


def _by_path(path: Path) -> Iterator[Scan]:
    folder = (path if path.is_dir() else path.parent).resolve()
    first = next((found for pattern in _BELOW for found in folder.glob(pattern)), None)
    experiment = (folder if first is None or first.name == RESULT_FILE else first).parent
    run = experiment.parent
    if run_time(run.name) is None and run_time(run.parent.name) is not None:  # the folder of a part
        run = run.parent
    if first is None or len(run.parts) < len(("/", "campaign", "run")) or folder in run.parent.parents:
        known = f"a {RESULT_FILE}, or the folder of an attempt, experiment, run or campaign"
        raise UserError(f"{path}: no results in it", f"name {known}")
    repository = Repository(run.parents[1], run.parent.name)
    if folder in (experiment, *experiment.glob("attempt-*/")):
        scan = repository.check(run.name, experiment.name)
    else:
        scan = repository.scan(None if folder == run.parent else run.name, is_checked=True)
    yield replace(
        scan,
        results=tuple(item for item in scan.results if item.path.is_relative_to(folder)),
        problems=tuple(item for item in scan.problems if item.path.is_relative_to(folder)),
    )


# Digests and figures


def verify_result(result: StoredResult, recorded: Digests) -> Verified:
    digests = {"index": True} if result.is_recorded else {}
    if (digest := recorded.get(digest_key(result.record.identity))) is not None:
        digests["manifest"] = digest == result.sha256
    return Verified(recompute_result(result), digests)


def recorded_digests(folders: Iterable[Path]) -> Digests:
    found: dict[DigestKey, str] = {}
    for folder in (it for campaign in dict.fromkeys(folders) for it in state_folders(campaign)):
        if (usual := find_manifest(folder)) is not None:
            for path in (usual, *sorted(folder.glob(f"{usual.stem}.*{usual.suffix}"))):
                found |= digests_of(ManifestManager(path).load())
    return found


def recompute_result(result: StoredResult) -> Outcome:
    record, folder = result.record, result.path.parent
    kept = {
        FINISHED_FILENAME: has_energy(record),
        REQUESTS_FILENAME: has_requests(record),
        PROMPTS_FILE: has_requests(record),
        OUTPUT_IDS_FILE: record.work.output_ids_sha256 is not None,
    }
    try:
        config = _read_config(folder)
        there = {name for name in kept if (folder / name).exists()}
        is_counted = kept[REQUESTS_FILENAME] and REQUESTS_FILENAME in there
        requests = read_requests(folder / REQUESTS_FILENAME) if is_counted else None
        log, marks = read_finished(folder / FINISHED_FILENAME) if FINISHED_FILENAME in there else (None, ())
        digest = fingerprint(read_prompt_file(folder / PROMPTS_FILE)) if PROMPTS_FILE in there else None
        ids_digest = durable.sha256_of(folder / OUTPUT_IDS_FILE) if OUTPUT_IDS_FILE in there else None
    except PromptError as error:
        return Outcome(result, "impossible", error.message)
    except OSError as error:
        return Outcome(result, "impossible", f"{error.filename}: {durable.reason_of(error)}")
    except ValueError as error:
        return Outcome(result, "impossible", str(error))
    external = None
    if config.measurement.external_csv is not None:
        with contextlib.suppress(MeterRefused):  # which the outcome reports
            external = read_external(Path(config.measurement.external_csv), config.measurement.external_unit)
    try:
        found = recompute(record, config, RawData(log, marks, external, requests, digest, ids_digest))
    except MeterRefused as error:
        return Outcome(result, "impossible", error.message)
    missing = [name for name, is_kept in kept.items() if is_kept and name not in there]
    if missing:
        why = " (samples are kept unless timeseries.save is false)" if FINISHED_FILENAME in missing else ""
        text = f"no such file: {', '.join(missing)}{why}"
        if not found.compared:
            return Outcome(result, "impossible", text)
        found = replace(found, notes=(*found.notes, text))
    if not found.compared:
        return Outcome(result, "unmeasured", "no energy was measured, and requests were not kept")
    status = "differs" if not found.agrees else "incomplete" if missing else "agrees"
    return Outcome(result, status, "; ".join(found.notes), found)


def _read_config(folder: Path) -> MeteredConfig:
    resolved = durable.read_sealed(folder / CONFIG_FILE).get("resolved")
    if not isinstance(resolved, dict):
        raise ValueError(f"{folder / CONFIG_FILE}: no resolved configuration in it")
    return (ProgramConfig if "command" in resolved else ExperimentConfig).from_dict(resolved)


# Output


def shown(value: Any) -> str:
    return format_quantity(value, digits=9) if isinstance(value, float) else "none" if value is None else str(value)


def _document(found: Sequence[Verified], problems: Sequence[Problem], counts: Counter[Verdict]) -> dict[str, Any]:
    results = [
        {
            **item.outcome.which,
            "verdict": item.verdict.value,
            "sha256": item.outcome.result.sha256,
            "digests": {name: "agrees" if is_same else "differs" for name, is_same in item.digests.items()},
            "figures": item.outcome.document,
        }
        for item in found
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "counts": {verdict.value: counts[verdict] for verdict in Verdict},
        "results": results,
        "problems": selection.problem_documents(problems),
    }


def _write(out: TextIO, found: Sequence[Verified], counts: Counter[Verdict]) -> None:
    doc = Doc(terminal_width(out))
    if found:
        names = tuple(item.outcome.result.record.identity.config_name for item in found)
        doc.table(Table("configuration", names, tuple(_columns(found))))
    doc.block()
    for item in found:
        if item.verdict is Verdict.DIFFERS:
            for text in item.remarks:
                doc.text(f"{_id(item)}: {text}")
    missing = Counter(text for item in found if item.verdict is Verdict.UNVERIFIED for text in item.remarks)
    for text, count in missing.items():
        doc.text(f"{plural(count, 'result')}: {text}")
    doc.block()
    total = sum(counts.values())
    parts = [f"{counts[Verdict.AGREES]} of {plural(total, 'result')} agree with digest and raw data"]
    parts += [f"{counts[verdict]} {what}" for verdict, what in _COUNTED if counts[verdict]]
    doc.text("; ".join(parts) + ".")
    out.write(doc.render())


def _id(item: Verified) -> str:
    identity = item.outcome.result.record.identity
    return f"{identity.experiment_id}/{identity.attempt}"


def _columns(found: Sequence[Verified]) -> Iterator[Column]:
    yield Column("result", tuple(map(_id, found)))
    digests = (
        "differs" if not all(item.digests.values()) else " and ".join(item.digests) or "none recorded" for item in found
    )
    yield Column("digest", tuple(digests))
    yield Column("figures", tuple(_figures(item.outcome) for item in found))


def _figures(outcome: Outcome) -> str:
    if outcome.recomputed is None:
        return "not recomputed"
    differing = len(outcome.differences)
    return f"{differing} of {outcome.compared} differ" if differing else f"{outcome.compared} agree"
