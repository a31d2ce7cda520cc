"""The work of a program, as it reports it in a JSON file: fields that the user names, and files of known benchmarks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.dataclass import dataclass
from lem.base.errors import did_you_mean
from lem.base.measurement import Measured, known
from lem.base.reasons import Reason

# What can be counted, by its name before `=` in `--work`: the field of `Work`.
KINDS: Mapping[str, str] = {
    "output_tokens": "output_tok",
    "input_tokens": "input_tok",
    "requests": "requests_ok",
    "failed": "requests_failed",
}
_MOST = 2**53  # whole numbers up to it are exact as floats
_NOT_GIVEN, _DEPTH = Reason.of("work_not_given"), Reason.of("work_depth")


class WorkError(ValueError):
    """A file that does not say what it should."""


@dataclass(frozen=True)
class WorkSource:
    path: Path
    field: str = ""  # dotted; empty for a file of a known benchmark, which has several
    kind: str = ""  # of `KINDS`; empty for such a file

    @classmethod
    def parse(cls, text: str) -> WorkSource:
        """From `[KIND=]FILE[:FIELD]`; ValueError where the name of the field does not tell what it counts."""
        kind, sign, rest = text.partition("=")
        if sign and kind not in KINDS and re.fullmatch(r"\w*", kind):
            kinds = f"expected {', '.join(KINDS)}; for a file of that name write ./{text}"
            raise ValueError(f"unknown kind {kind!r}{did_you_mean(kind, [*KINDS])}; {kinds}")
        kind, text = (kind, rest) if sign and kind in KINDS else ("", text)
        file, colon, field = text.rpartition(":")
        if not colon or "/" in field:
            file, field = text, ""
        if not file or not (field or not kind):
            raise ValueError("expected FILE, FILE:FIELD or KIND=FILE:FIELD")
        kind = kind or (_kind_of(field) if field else "")
        if field and not kind:
            raise ValueError(f"does {field} count tokens or requests? write {'=…, '.join(KINDS)}=… before the file")
        return cls(Path(file).expanduser(), field, kind)

    def __str__(self) -> str:
        kind, field = f"{self.kind}=" if self.kind else "", f":{self.field}" if self.field else ""
        return f"{kind}{self.path}{field}"

    @property
    def counted(self) -> Sequence[str]:
        return (KINDS[self.kind],) if self.kind else tuple(KINDS.values())


def _kind_of(field: str) -> str:
    name = field.rpartition(".")[2].lower()
    if re.search("fail|error", name):
        return "failed"
    if "tok" in name:
        return "input_tokens" if re.search("input|prompt|prefill", name) else "output_tokens"
    return "requests" if re.search("request|completed|num_prompts", name) else ""


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when the file is written; () without it."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_work(sources: Sequence[WorkSource], before: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Fields of `Work`: counts, each absent with its reason where no file tells, and `prompt_source`.

    `before` are the stamps of the files when the program began: a file that it did not write tells nothing.
    """
    found: dict[str, Any] = {name: known(None, _NOT_GIVEN) for name in KINDS.values()}
    told = []
    for source, stamp in zip(sources, before, strict=True):
        counts, sha256 = _read(source, stamp)
        found |= counts
        told.append({"file": str(source.path), "field": source.field, "sha256": sha256})
    return {**found, "prompt_source": {"kind": "program", "work": told}}


def _read(source: WorkSource, stamp: tuple[int, ...]) -> tuple[Mapping[str, Any], str | None]:
    """The counts of a file, and its digest."""
    try:
        data = durable.read_bytes(source.path)
        if stamp_of(source.path) == stamp:
            raise WorkError("it was not written by this run")
        return _count_all(json.loads(data), source), hashlib.sha256(data).hexdigest()
    except (OSError, ValueError, RecursionError) as error:
        problem = durable.reason_of(error) if isinstance(error, OSError) else str(error)
        why = Reason.of("work_unreadable", file=str(source.path), problem=problem)
        return {name: known(None, why) for name in source.counted}, None


def _count_all(document: Any, source: WorkSource) -> Mapping[str, Any]:
    if source.kind:
        return {KINDS[source.kind]: _whole(document, source.field)}
    if (counted := _llama_bench(document)) is not None:
        return counted
    for required, fields in _KNOWN if isinstance(document, dict) else ():
        if required <= document.keys():
            there = {name: field for name, field in fields.items() if field.partition(".")[0] in document}
            return {name: _whole(document, field) for name, field in there.items()}
    raise WorkError("no result file of vLLM bench, guidellm, AIPerf or llama-bench; name the field: FILE:FIELD")


def _whole(document: Any, field: str) -> int:
    """The sum of the numbers at a dotted path, which goes through every item of a list; WorkError without any."""
    values = list(_numbers(document, field.split("."), field))
    total = sum(values)
    if not values or total != round(total):
        raise WorkError(f"{field}: expected a count, got {total if values else 'an empty list'}")
    return round(total)


def _numbers(value: Any, path: Sequence[str], field: str) -> Iterator[float]:
    if isinstance(value, list) and not (path and path[0].isdecimal()):
        for item in value:
            yield from _numbers(item, path, field)
    elif path:
        key: Any = int(path[0]) if isinstance(value, list) else path[0]
        if not isinstance(value, (dict, list)) or (key not in value if isinstance(value, dict) else key >= len(value)):
            raise WorkError(f"there is no field {field}")
        yield from _numbers(value[key], path[1:], field)
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _MOST:
        raise WorkError(f"{field}: expected a count, got {value!s:.40}")
    else:
        yield value


# By what a file of a benchmark is recognised, and its fields. Only requests that were answered count, and their tokens.
_GUIDELLM = "benchmarks.metrics"
_KNOWN: Sequence[tuple[frozenset[str], Mapping[str, str]]] = (
    (frozenset({"num_requests", "total_num_tokens", "elapsed_time"}), {"requests_ok": "num_requests"}),
    (
        frozenset({"completed", "total_output_tokens", "total_input_tokens"}),
        {
            "requests_ok": "completed",
            "requests_failed": "failed",
            "input_tok": "total_input_tokens",
            "output_tok": "total_output_tokens",
        },
    ),
    (
        frozenset({"benchmarks"}),
        {
            "requests_ok": f"{_GUIDELLM}.request_totals.successful",
            "requests_failed": f"{_GUIDELLM}.request_totals.errored",
            "input_tok": f"{_GUIDELLM}.prompt_token_count.successful.total_sum",
            "output_tok": f"{_GUIDELLM}.output_token_count.successful.total_sum",
        },
    ),
    (
        frozenset({"request_count", "total_output_tokens"}),
        {
            "requests_ok": "request_count.avg",
            "requests_failed": "error_request_count.avg",
            "input_tok": "total_isl.avg",
            "output_tok": "total_output_tokens.avg",
        },
    ),
)


def _llama_bench(document: Any) -> Mapping[str, Any] | None:
    """The counts of a file that it wrote, a list of tests with their samples; None of other files."""
    rows = document if isinstance(document, list) else []
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("samples_ns"), list) for row in rows):
        return None

    def total(field: str) -> int:
        return sum(len(row["samples_ns"]) * _whole(row, field) for row in rows)

    # Before a sample it fills the cache with n_depth tokens (not in files of early builds), or restores them from the
    # sample or test before: which of the two depends on its build and on the options of both tests.
    has_depth = any("n_depth" in row and _whole(row, "n_depth") for row in rows)
    input_tok: Measured[int] | int = known(None, _DEPTH) if has_depth else total("n_prompt")
    samples = sum(len(row["samples_ns"]) for row in rows)
    return {"requests_ok": samples, "input_tok": input_tok, "output_tok": total("n_gen")}
