"""Single bits that flip in the files of a campaign: `python -m tests.fuzz.flips [--flips N] [--seed S]`.

Each bit is flipped in its file, lem reads the file in every way it has, and the file is put back. Every second time
the file keeps its time and inode, as if the disk had done it. Every value that lem then takes from the file is compared
with the one before. A flip is *refused* if lem reports it; *without effect* if all values are as before (white space, a
header of gzip, a file that nothing reads or the index stands for); *wrong* if a value was accepted that is not the one
that was written. The exit code is 1 with any that is wrong, and with any exception that is no refusal.

Results of the first build have no digest. How many flips in one of them go unnoticed is shown last, and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.base.answers import OUTPUT_IDS_FILE, Answer, read_answers, write_answers
from lem.base.errors import UserError
from lem.base.units import NS_PER_MS, NS_PER_S
from lem.cli.verify import Verdict, recorded_digests, verify_result
from lem.meters.requestlog import REQUESTS_FILENAME, Request, RequestLog, read_requests, write_requests
from lem.meters.samples import FINISHED_FILENAME, write_finished
from lem.orchestration.manifest import (
    COMPLETED,
    JOURNALED_FROM,
    RUNNING,
    Attempt,
    CampaignManifestEntry,
    ManifestManager,
    encode_manifest,
)
from lem.orchestration.resume import forget_lost_results
from lem.record import PROMPTS_FILE, read_with_digest, write_record
from lem.results.configurations import CONFIGURATIONS_FILE, ListedConfiguration, read_listing, write_listing
from lem.results.index import INDEX_FILE
from lem.results.stopping import STOPPING_FILE, StoppingRule, Target, read_stopping_rule, write_stopping_rule
from lem.results.store import Problem, Repository, StoredResult, config_of_problem
from lem.worker.prompts import read_prompt_file, write_prompts
from lem.worker.shapes import Prompt
from tests.records import make_record, with_measured, with_requests
from tests.scripted_attempt import config, gpu_attempt

RUN = "20260714T100000Z-3fa1"
REFUSED = "refused"
_ATTEMPT = gpu_attempt()
PROMPTS = tuple(Prompt(f"prompt number {number}", output_tokens=32) for number in range(6))

ANSWERS = tuple(Answer(number, f"{number:016x}", tuple(range(number, number + 32))) for number in range(6))


def _request(prompt: int, start_ns: int) -> Request:
    """One with token times; each has gaps of its own."""
    times_ns = tuple(start_ns + (50 + 20 * place + prompt) * NS_PER_MS + place * 1_234 for place in range(32))
    return Request(prompt, 10 + prompt, 32, 2, None, start_ns, times_ns[-1] + 5_678, times_ns)


def _requests() -> RequestLog:
    """Ten passes over the prompts in a window of 10 s."""
    begins_ns = [place * NS_PER_S for place in range(10)]
    requests = tuple(_request(prompt, begin_ns) for begin_ns in begins_ns for prompt in range(len(PROMPTS)))
    passes_ns = tuple((begin_ns, begin_ns + NS_PER_S) for begin_ns in begins_ns)
    return RequestLog("closed_batch", 0, 10 * NS_PER_S, len(PROMPTS), requests, passes_ns)


REQUESTS = _requests()


@dataclass(frozen=True)
class Place:
    """A campaign of two results in a folder, with everything that lem writes beside them."""

    folder: Path

    @property
    def repository(self) -> Repository:
        return Repository(self.folder / "results", "demo")

    @property
    def manifest_path(self) -> Path:
        return self.folder / ".state" / "demo" / "campaign_manifest.json"

    @property
    def run_folder(self) -> Path:
        return self.folder / "results" / "demo" / RUN

    def attempt(self, cycle: int) -> Path:
        return self.run_folder / make_record(cycle=cycle).identity.experiment_id / "attempt-1"

    def write(self, *, has_digests: bool = True) -> None:
        manager = ManifestManager(self.manifest_path)
        entries = [_entry(cycle) for cycle in range(JOURNALED_FROM)]
        manifest = manager.create_manifest("fe01ce2a", "demo", "c" * 16, entries)
        manifest.run_id = RUN
        manager.save(manifest)
        for cycle, entry in enumerate(entries[:2]):
            entry.status = RUNNING
            manager.save_entry(manifest, entry)
            result = self._write_result(cycle)
            attempt = Attempt(1, str(result.path), True, host="lab1")
            if has_digests:
                self.repository.record_result(RUN, result)
                attempt = dataclasses.replace(attempt, result_sha256=result.sha256)
            entry.put_attempt(attempt)
            entry.status, entry.result_path = COMPLETED, str(result.path)
            manager.save_entry(manifest, entry)
        folder = self.repository.prepare_attempt(RUN, entries[2].exp_id)  # one that failed
        folder.write_config({"model": "tiny"}, {**config().to_dict(), "config_name": "failed"})
        write_stopping_rule(self.run_folder, StoppingRule(Target(0.02), 5, 20))
        write_listing(self.run_folder, [ListedConfiguration(entries[0].config_hash, "small", {"pue": 1.2})])

    def _write_result(self, cycle: int) -> StoredResult:
        folder = self.repository.prepare_attempt(RUN, make_record(cycle=cycle).identity.experiment_id)
        ids_digest = write_answers(folder.path / OUTPUT_IDS_FILE, ANSWERS)
        record = with_requests(make_record(run_id=RUN, cycle=cycle), REQUESTS, PROMPTS, config(), ids_digest)
        found = _ATTEMPT.measured(window_repeats=record.window.window_repeats)
        record = with_measured(record, found, config().measurement)
        folder.write_config({"model": "tiny"}, {**config().to_dict(), "config_name": "small"})
        write_prompts(folder.path, PROMPTS)
        write_requests(folder.path / REQUESTS_FILENAME, REQUESTS, str)
        (folder.path / "outputs.jsonl").write_text('{"index":0,"text":"three"}\n', encoding="utf-8")
        write_finished(folder.path / FINISHED_FILENAME, _ATTEMPT.log, _ATTEMPT.marks)
        write_record(folder.result_path, record)
        return StoredResult(str(folder.result_path), *read_with_digest(folder.result_path))


def _entry(cycle: int) -> CampaignManifestEntry:
    identity = make_record(cycle=cycle).identity
    return CampaignManifestEntry(identity.experiment_id, "small", "", identity.config_hash, "pytorch", None, cycle)


# What lem takes for the values of a campaign, by the way it reads them; REFUSED where it reports damage instead.
Values = Mapping[str, Any]


def _scanned(place: Place) -> Iterator[tuple[str, Any]]:
    """As `results list`, `show`, `export`, `compare` and `report` read results, and as `check` and `merge` do."""
    for way in (False, True):
        scan = place.repository.scan(RUN, is_checked=way)
        yield from ((f"{way} {item.path}", (item.record, item.sha256)) for item in scan.results)
        yield from ((f"{way} {item.path}", REFUSED) for item in scan.problems if item.kind != "missing")


def _verified(place: Place) -> Iterator[tuple[str, Any]]:
    """As `lem verify` reads results, manifests and raw data; those of an outcome that agrees are values."""
    recorded = recorded_digests([place.manifest_path.parent])
    for item in place.repository.scan(RUN, is_checked=True).results:
        found = verify_result(item, recorded)
        if found.verdict is Verdict.AGREES:
            prompts = read_prompt_file(item.path.with_name(PROMPTS_FILE))
            requests = read_requests(item.path.with_name(REQUESTS_FILENAME))
            answers = read_answers(item.path.with_name(OUTPUT_IDS_FILE), str(item.record.work.output_ids_sha256))
            yield f"verify {item.path}", (item.record, item.sha256, prompts, requests, answers)
        else:
            yield f"verify {item.path}", REFUSED


def _resumed(place: Place) -> Iterator[tuple[str, Any]]:
    """As a resume and the end of a campaign read the manifest and the results in it."""
    try:
        manifest = ManifestManager(place.manifest_path).load_strict()
    except UserError:
        manifest = None
    if manifest is None:
        yield "manifest", REFUSED
        return
    yield "manifest", b"".join(encode_manifest(manifest))
    for path in forget_lost_results(manifest):
        yield f"resume {path}", REFUSED


def _others(place: Place) -> Iterator[tuple[str, Any]]:
    """The rule by which a run ended, its configurations, and that of an experiment without a result."""
    yield "rule", read_stopping_rule(place.run_folder) or REFUSED
    yield "configurations", read_listing(place.run_folder) or REFUSED
    name, requested = config_of_problem(Problem(place.attempt(2), "missing", ""))
    yield "failed", REFUSED if name is None else (name, requested)


Reader = Callable[[Place], Iterator[tuple[str, Any]]]
ALL: tuple[Reader, ...] = (_scanned, _verified, _resumed, _others)

# Each file, and who reads it; the others do not open it.
FILES: Mapping[str, tuple[Callable[[Place], Path], tuple[Reader, ...]]] = {
    "result.json": (lambda place: place.attempt(0) / "result.json", (_scanned, _verified, _resumed)),
    "index.jsonl": (lambda place: place.run_folder / INDEX_FILE, (_scanned, _verified)),
    "manifest": (lambda place: place.manifest_path, (_verified, _resumed)),
    "journal": (lambda place: place.manifest_path.with_suffix(".journal"), (_verified, _resumed)),
    "samples.jsonl.gz": (lambda place: place.attempt(0) / FINISHED_FILENAME, (_verified,)),
    "requests.jsonl.gz": (lambda place: place.attempt(0) / REQUESTS_FILENAME, (_verified,)),
    "config.json": (lambda place: place.attempt(0) / "config.json", (_verified,)),
    "config.json, failed": (lambda place: place.attempt(2) / "config.json", (_others,)),
    "stopping.json": (lambda place: place.run_folder / STOPPING_FILE, (_others,)),
    "configurations.json": (lambda place: place.run_folder / CONFIGURATIONS_FILE, (_scanned, _others)),
    "prompts.jsonl": (lambda place: place.attempt(0) / PROMPTS_FILE, (_scanned, _verified)),
    OUTPUT_IDS_FILE: (lambda place: place.attempt(0) / OUTPUT_IDS_FILE, (_scanned, _verified)),
    "outputs.jsonl": (lambda place: place.attempt(0) / "outputs.jsonl", (_scanned, _verified)),
}


def values_of(place: Place, readers: tuple[Reader, ...]) -> Values:
    return {key: value for reader in readers for key, value in reader(place)}


def judge(before: Values, after: Values) -> str:
    """`wrong`, `refused` or `without effect`; what is missing after the flip was left out, and is no value."""
    for key, value in after.items():
        if value != REFUSED and value != before.get(key):
            return "wrong"
    return REFUSED if REFUSED in after.values() or before.keys() - after.keys() else "without effect"


@contextlib.contextmanager
def flipped(path: Path, bit: int, *, is_hidden: bool) -> Iterator[None]:
    """The file with one bit flipped in its place; what an index gained meanwhile is removed again, too."""
    found, data = path.stat(), bytearray(path.read_bytes())
    before = bytes(data)
    data[bit // 8] ^= 1 << bit % 8

    def put(content: bytes) -> None:
        with path.open("r+b") as file:
            file.write(content)
            file.truncate()
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

    put(bytes(data))
    if not is_hidden:
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    try:
        yield
    finally:
        put(before)


def flip(place: Place, name: str, count: int, rng: random.Random, *, is_told: bool = False) -> Counter[str]:
    """So many flips in a file, and what came of them; `is_told` names those that are finds."""
    find, readers = FILES[name]
    path, index = find(place), place.run_folder / INDEX_FILE
    whole = index.read_bytes() if index.exists() else b""
    before = values_of(place, readers)
    counts: Counter[str] = Counter()
    for number in range(count):
        bit = rng.randrange(path.stat().st_size * 8)
        with flipped(path, bit, is_hidden=number % 2 == 0):
            try:
                outcome = judge(before, values_of(place, readers))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
                outcome = "tracebacks"
                if is_told:
                    print(f"{name}, bit {bit}: {type(error).__name__}: {error}", file=sys.stderr)
            if outcome == "wrong" and is_told:
                print(f"{name}, bit {bit} (hidden: {number % 2 == 0}): wrong", file=sys.stderr)
        counts[outcome] += 1
        if path != index and index.read_bytes() != whole:
            index.write_bytes(whole)
    return counts


HEADS = (REFUSED, "without effect", "wrong", "tracebacks")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=4000, help="in each file (default: 4000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", choices=FILES, help="a file; may be repeated")
    args = parser.parse_args()
    logging.disable()
    print(f"{'file':24}{'flips':>8}" + "".join(f"{head:>16}" for head in HEADS), flush=True)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="lem-flips-") as folder:
        place = Place(Path(folder))
        place.write()
        for name in args.only or FILES:
            counts = flip(place, name, args.flips, random.Random(f"{args.seed} {name}"), is_told=True)
            total += counts
            print(_row(name, counts), flush=True)
        print(_row("all", total))
        first_build = Place(Path(folder, "first-build"))
        first_build.write(has_digests=False)
        counts = flip(first_build, "result.json", args.flips, random.Random(args.seed))
        print(_row("result.json, no digest", counts))
    return int(bool(total["wrong"] or total["tracebacks"]))


def _row(name: str, counts: Counter[str]) -> str:
    return f"{name:24}{sum(counts.values()):8d}" + "".join(f"{counts[head]:16d}" for head in HEADS)


if __name__ == "__main__":
    sys.exit(main())
