"""What lies in the folders of results and state: records, sample logs, manifests, plans and small files of state."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lem.base.errors import UserError
from lem.config.experiment import ExperimentConfig
from lem.meters.samples import FINISHED_FILENAME, PartReader, SampleLogError, read_tail
from lem.orchestration.journal import Journal, sealed, snapshot_of
from lem.orchestration.locks import CAMPAIGN_LOCK_NAME
from lem.orchestration.manifest import ManifestManager
from lem.results.index import INDEX_FILE
from lem.results.merge import FleetPlan, HostPart, PlannedExperiment, read_plan
from lem.results.store import Repository
from tests.fuzz.mutation import bytes_near, gzipped, json_lines_near, json_near
from tests.fuzz.trial import Find, Outcome, Surface, replaced, run_lem
from tests.synthetic_campaign import Campaign, Configuration, Written

_CAMPAIGN = Campaign(
    configurations=(
        Configuration("one", backend="pytorch", ttft_s=0.05),
        Configuration("two", energy_per_output_tok_j=0.2, invalid_attempts={1: 1}),
    ),
    cycles=2,
    window_s=2.0,
)
_STOPPING = {
    "target": {"half_width": 0.02, "metric": None, "kind": "ratio"},
    "least_cycles": 5,
    "most_cycles": 20,
    "looks": [5, 6],
    "added": [3],
}
_ANY = (0, 1, 2, 3, 4)
_ALL = ("results", "show", "demo")
_HOSTILE_HTML = ("<script>alert(1)</script>", "<img src=x onerror", "</svg>=1+1")

_READERS: tuple[tuple[str, ...], ...] = (
    ("results", "list"),
    _ALL,
    ("results", "show", "demo", "--json"),
    ("results", "export"),
    ("results", "export", "--format", "json", "--attempts", "all"),
    ("results", "export", "--format", "markdown"),
    ("results", "recompute", "demo"),
    ("check", "demo"),
    ("compare", "demo"),
    ("compare", "demo", "--json", "--gate", "energy_per_output_tok_j=3%"),
    ("report", "demo", "-o", "report.html"),
    ("merge", "results", "--output", "merged", "--json"),
)  # fmt: skip


@functools.cache
def _write(folder: Path) -> Written:
    """The campaign, written once in a folder; what a trial changes in it, it puts back."""
    written = _CAMPAIGN.write(folder)
    (written.results_dir / "demo" / written.run_id / "stopping.json").write_text(json.dumps(_STOPPING))
    return written


@functools.cache
def _sample() -> tuple[Any, list[Any], Any]:
    """A record, the lines of its sample log, and the manifest, as plain data."""
    with tempfile.TemporaryDirectory() as name:
        written = _CAMPAIGN.write(Path(name))
        path = _results(written)[0]
        lines = gzip.decompress((path.parent / FINISHED_FILENAME).read_bytes()).splitlines()
        return json.loads(path.read_text()), _thinned(lines), json.loads(written.manifest_path.read_text())


def _thinned(lines: Sequence[bytes]) -> list[Any]:
    """Few enough rows that a change hits something else than the hundredth sample."""
    rows = [json.loads(line) for line in lines]
    head, kinds = rows[:2], sorted({row[0] for row in rows[2:]})
    return head + [row for kind in kinds for row in [item for item in rows[2:] if item[0] == kind][::12][:30]]


def _results(written: Written) -> list[Path]:
    return sorted((written.results_dir / "demo").glob("*/*/attempt-*/result.json"))


def _read_all(data: bytes, *, is_thorough: bool) -> None:
    """Have one of the commands that read results read them, or all of them."""
    for words in _READERS if is_thorough else (_READERS[zlib.crc32(data) % len(_READERS)],):
        run_lem(*words, expected=_ANY)
        if words[0] == "report" and Path("report.html").exists():
            _check_page(Path("report.html").read_text(encoding="utf-8"))


def _check_page(page: str) -> None:
    for text in _HOSTILE_HTML:
        if text in page:
            raise Find("escape", f"the report holds {text!r} as it was in a result")


def try_result(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A `result.json`; the damaged one is named, and the others are read."""
    written = _write(folder)
    path = _results(written)[0]
    with replaced(path, data), _nothing_written_elsewhere(folder):
        _read_all(data, is_thorough=is_thorough)
        problems = Repository(written.results_dir, "demo").scan().problems
    if any(problem.path == path and not problem.message for problem in problems):
        raise Find("place", "a problem without words")
    return Outcome.REFUSED if any(problem.path == path for problem in problems) else Outcome.ACCEPTED


def try_config(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A `config.json` beside a result."""
    path = _results(_write(folder))[0].with_name("config.json")
    with replaced(path, data):
        ran = run_lem("results", "recompute", "demo", "--json", expected=_ANY)
        if is_thorough or zlib.crc32(data) % 3 == 0:
            run_lem(*_ALL)
            run_lem("report", "demo", "-o", "report.html")
    first = json.loads(ran.out)["results"][0]
    return Outcome.REFUSED if first["status"] == "impossible" else Outcome.ACCEPTED


def try_samples(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A finished sample log."""
    written = _write(folder)
    path = _results(written)[0].with_name(FINISHED_FILENAME)
    with replaced(path, data):
        ran = run_lem("results", "recompute", "demo", "--json", expected=(0, 1))
        if is_thorough or zlib.crc32(data) % 2:
            run_lem("report", "demo", "-o", "report.html")
    first = json.loads(ran.out)["results"][0]
    if first["status"] == "impossible" and not first["message"]:
        raise Find("place", "impossible, without words")
    return Outcome.REFUSED if first["status"] == "impossible" else Outcome.ACCEPTED


def try_part(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A sample log that is still being written."""
    del is_thorough
    path = folder / "samples.part"
    path.write_bytes(data)
    read_tail(path)
    try:
        list(PartReader(path).read().rows())
    except SampleLogError:
        return Outcome.REFUSED
    return Outcome.ACCEPTED


def try_manifest(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A manifest, as `lem status` and a resume read it."""
    written = _write(folder)
    with replaced(written.manifest_path, data):
        return _try_state_of_campaign(written, data, is_thorough=is_thorough)


def try_journal(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """The journal of a manifest: each line a change, with the right check before it or, for a first byte `!`, as is."""
    written = _write(folder)
    lines, check = data, b""
    if not data.startswith(b"!"):
        lines = b""
        first = json.dumps({"snapshot": snapshot_of(written.manifest_path.read_bytes())}).encode()
        for text in [first, *data.split(b"\n")]:
            check = hashlib.sha256(check + text).hexdigest()[:16].encode()
            lines += check + b" " + text + b"\n"
    with replaced(Journal(written.manifest_path).path, lines):
        return _try_state_of_campaign(written, data, is_thorough=is_thorough)


def _try_state_of_campaign(written: Written, data: bytes, *, is_thorough: bool) -> Outcome:
    Path("c.yaml").write_text(json.dumps(_RESUMED))
    ways = (
        ("status",),
        ("status", "demo"),
        ("status", "--json"),
        ("check", "demo"),
        ("results", "list"),
        ("campaign", "c.yaml", "--resume", "--dry-run"),
    )
    for words in ways if is_thorough else (ways[zlib.crc32(data) % len(ways)],):
        more = ("--executor", "local") if words[0] == "campaign" else ()
        run_lem(*words, *more, expected=_ANY)
    try:
        ManifestManager(written.manifest_path).load_strict()
    except UserError as error:
        if str(written.manifest_path) not in error.message:
            raise Find("place", error.message) from error
        return Outcome.REFUSED
    return Outcome.ACCEPTED


def try_index(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """The index of a run, each line with the right check: it is a cache, so that it is never a reason to refuse."""
    written = _write(folder)
    lines = b""
    for text in data.split(b"\n"):
        rest = text[1:] + b"\n"
        lines += b'{"check":"' + hashlib.sha256(rest).hexdigest()[:16].encode() + b'",' + rest
    with replaced(written.results_dir / "demo" / written.run_id / INDEX_FILE, lines):
        _read_all(data, is_thorough=is_thorough)
    return Outcome.ACCEPTED


_RESUMED = {
    "campaign_name": "demo",
    "model": "gpt2",
    "grid": {"backends": ["pytorch"], "shared": {"max_output_tokens": [8]}},
    "execution": {"cycles": 2},
}
_PLAN = FleetPlan(
    "fe01ce2a",
    "demo",
    "c" * 16,
    _CAMPAIGN.run_id,
    "shard",
    "a" * 16,
    tuple(PlannedExperiment(f"{'a' * 12}-c{cycle + 1}", "short", "a" * 16, cycle) for cycle in (0, 1)),
    (HostPart("gpu1", (f"{'a' * 12}-c1",), 60.0), HostPart("lab1", (f"{'a' * 12}-c1", f"{'a' * 12}-c2"))),
)


def try_plan(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A stored plan of a fleet, as a host and the merge read it."""
    _write(folder)
    path = Path("plan.json")
    (folder / "c.yaml").write_text(json.dumps(_RESUMED))
    path.write_bytes(data)
    ways = (
        ("merge", "results", "--output", "merged", "--plan", "plan.json"),
        ("campaign", "c.yaml", "--plan", "plan.json", "--shard", "1/2", "--dry-run", "--executor", "local", "--fresh"),
    )
    with _nothing_written_elsewhere(folder):
        for words in ways if is_thorough else (ways[zlib.crc32(data) % 2],):
            run_lem(*words, expected=_ANY)
    try:
        read_plan(path)
    except UserError as error:
        if str(path) not in error.message:
            raise Find("place", error.message) from error
        return Outcome.REFUSED
    return Outcome.ACCEPTED


def try_state(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """Small files of state: what the campaign does, who holds its lock, by which rule it ended."""
    written = _write(folder)
    state, run_folder = written.manifest_path.parent, written.results_dir / "demo" / written.run_id
    files = (state / "campaign.activity", state / CAMPAIGN_LOCK_NAME, run_folder / "stopping.json")
    for path in files if is_thorough else (files[zlib.crc32(data) % 3],):
        ways = (_ALL, ("check", "demo")) if path.parent == run_folder else (("status",), ("status", "demo", "--json"))
        with replaced(path, data):
            for words in ways:
                run_lem(*words, expected=_ANY)
    return Outcome.ACCEPTED


@contextlib.contextmanager
def _nothing_written_elsewhere(folder: Path) -> Iterator[None]:
    """See that nothing appears in the folder, or above it, that these commands do not write; and clear what they do."""

    def names() -> set[str]:
        above = {f"../{path.name}" for path in folder.parent.iterdir()}
        return above | {f"./{path.name}" for path in folder.iterdir()}

    before = names()
    try:
        yield
        appeared = names() - before - {"./merged", "./report.html", "./plan.json"}
        if appeared:
            raise Find("escape", f"written outside: {appeared}")
    finally:
        shutil.rmtree(folder / "merged", ignore_errors=True)


@st.composite
def _manifests(draw: st.DrawFn) -> bytes:
    """A manifest with the right checksum, one of the first build, which had none, or one that is damaged."""
    is_old = draw(st.booleans())
    document = {name: value for name, value in _sample()[2].items() if name not in ("schema_version", "sha256")}
    data = draw(json_near({"schema_version": 1, **document} if is_old else document))
    return b"".join(sealed(lambda: [b"  " + data[1:]])) if data[:1] == b"{" and not is_old else data


def _journal_lines() -> st.SearchStrategy[bytes]:
    entries = _sample()[2]["experiments"]
    changes = [{"at": "2026-07-14T10:00:00.000000Z", "entry": {**entry, "status": "running"}} for entry in entries[:3]]
    return json_lines_near(changes, [{**changes[0], "extra": 1}], [{"snapshot": "x"}]) | bytes_near(b"!0123 {}\n")


@functools.cache
def _index_lines() -> list[Any]:
    with tempfile.TemporaryDirectory() as name:
        written = _CAMPAIGN.write(Path(name))
        Repository(written.results_dir, "demo").scan(written.run_id)
        text = (written.results_dir / "demo" / written.run_id / INDEX_FILE).read_text(encoding="utf-8")
    documents = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in item.items() if key != "check"} for item in documents]


def _state_documents() -> tuple[dict[str, Any], ...]:
    activity = {
        "schema_version": 1, "run_id": _CAMPAIGN.run_id, "pid": 1, "host": "lab1", "started_at": "2026-07-14T10:00:00Z",
        "updated_at": "2026-07-14T10:00:00.000000Z", "go_on": "lem campaign", "cwd": "/tmp", "doing": "experiment",
        "since": "2026-07-14T10:00:00Z", "exp_id": "a-c1", "config_name": "one", "phase": "window", "phase_done": 1,
        "phase_total": 9, "gap_ends_in_s": 3.0, "eta_s": 60.0, "stopped": None, "message": "",
    }  # fmt: skip
    holder = {"pid": 1, "host": "lab1", "campaign": "demo", "since": "2026-07-14T10:00:00Z"}
    ended = {**activity, "doing": "ended", "stopped": "signal"}
    return activity, {**activity, "doing": "gap"}, ended, holder, _STOPPING


def _plan_document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps({"schema_version": 1, **dataclasses.asdict(_PLAN)}))
    return document


def _config_document() -> Any:
    requested = {"model": "gpt2", "backend": "pytorch"}
    resolved = ExperimentConfig.from_dict({**requested, "timeseries": {"save": True}}).to_dict()
    return json.loads(json.dumps({"schema_version": 1, "requested": requested, "resolved": resolved}))


def _part_bytes() -> st.SearchStrategy[bytes]:
    lines = _sample()[1][1:]
    return json_lines_near(lines) | bytes_near(b"".join(json.dumps(line).encode() + b"\n" for line in lines[:20]))


SURFACES = (
    Surface("result", lambda: json_near(_sample()[0]), try_result, share=4, in_suite=100),
    Surface("config-json", lambda: json_near(_config_document()), try_config, in_suite=30),
    Surface("samples", lambda: gzipped(json_lines_near(_sample()[1])), try_samples, share=2, in_suite=40),
    Surface("samples-part", _part_bytes, try_part, share=2),
    Surface("manifest", _manifests, try_manifest, share=4, in_suite=100),
    Surface("journal", _journal_lines, try_journal, share=2, in_suite=60),
    Surface("index", lambda: json_lines_near(_index_lines()), try_index, share=2, in_suite=40),
    Surface("plan", lambda: json_near(_plan_document()), try_plan, share=2, in_suite=100),
    Surface("state", lambda: json_near(*_state_documents()), try_state, share=2, in_suite=60),
)
