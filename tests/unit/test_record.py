"""The record, and the record on disk: what is written can be read, and what is not whole is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lem.base.codec import recognise
from lem.record import (
    ITL_REPLACED,
    SCHEMA_VERSION,
    Energy,
    Gpu,
    Record,
    RecordError,
    decode_record,
    encode_record,
    read_record,
    write_record,
)
from lem.results import metrics
from tests.faulty_disk import failing
from tests.records import make_gpu, make_record


def full_record() -> Record:
    return dataclasses.replace(
        make_record(ttft_p50_s=0.01, energy_per_output_tok_j=0.5, n_requests=25), gpus=(make_gpu(), make_gpu())
    )


def test_the_key_tells_attempts_cycles_runs_and_hosts_apart() -> None:
    records = [
        make_record(),
        make_record(attempt=2),
        make_record(cycle=1),
        make_record(run_id="r2"),
        make_record(host="b"),
    ]
    assert len({record.identity.key for record in records}) == 5


@pytest.mark.parametrize("record", [make_record(), full_record()], ids=["cpu", "gpu"])
def test_a_record_round_trips_through_its_file(tmp_path: Path, record: Record) -> None:
    write_record(tmp_path / "result.json", record)
    assert read_record(tmp_path / "result.json") == record
    assert next(iter(json.loads((tmp_path / "result.json").read_bytes()).items())) == ("schema_version", SCHEMA_VERSION)


def test_every_null_of_a_measurement_has_a_reason_beside_it() -> None:
    document = encode_record(full_record())
    sections: list[Any] = [value for key, value in document.items() if key not in ("requested", "extra_metadata")]
    seen = 0
    while sections:
        section = sections.pop()
        if isinstance(section, list):
            sections += section
        elif isinstance(section, dict):
            for name, value in section.items():
                if value is None:
                    assert section[f"{name}_null_reason"]
                    seen += 1
            sections += section.values()
    assert seen > 20


def test_a_null_without_a_reason_is_not_written(tmp_path: Path) -> None:
    record = dataclasses.replace(make_record(), energy=Energy())
    with pytest.raises(RecordError, match=r"energy\.gpu_energy_j is null without a reason"):
        write_record(tmp_path / "result.json", record)
    assert list(tmp_path.iterdir()) == []


REASON = recognise("not counted")
EMPTY = {**make_record().energy.null_reasons, "gpu_energy_j": recognise("")}


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("energy", {"null_reasons": EMPTY}, "gpu_energy_j"),
        ("work", {"null_reasons": {"input_tok": REASON}}, r"work\.input_tok has a value"),
        ("work", {"null_reasons": {**make_record().work.null_reasons, "watts": REASON}}, r"work: .*watts"),
        ("work", {"input_tok": 512.5}, r"work\.input_tok: expected an integer, got 512.5"),
        ("window", {"window_s": float("nan")}, r"window\.window_s: expected a finite number"),
        ("window", {"window_s": -float("inf")}, r"window\.window_s: expected a finite number"),
        ("", {"gpus": (make_gpu(), Gpu(uuid="GPU-2", name="H200"))}, r"gpus\[1\]\.energy_j"),
        ("", {"requested": {"dtype": {"inner": object()}}}, r"requested\.dtype\.inner: object has no form in JSON"),
    ],
)
def test_what_breaks_the_schema_is_not_written(section: str, changes: dict[str, Any], said: str) -> None:
    record = make_record()
    if section:
        changes = {section: dataclasses.replace(getattr(record, section), **changes)}
    with pytest.raises(RecordError, match=said):
        encode_record(dataclasses.replace(record, **changes))


def test_a_failed_write_leaves_no_part_of_a_record(tmp_path: Path) -> None:
    with failing("lem.fsync"), pytest.raises(OSError, match="space"):
        write_record(tmp_path / "result.json", make_record())
    assert list(tmp_path.iterdir()) == []


def test_too_few_observations_are_the_reason_of_a_percentile() -> None:
    e2e = encode_record(make_record(n_requests=12))["latency"]["e2e_s"]
    assert e2e["p90"] is not None
    assert e2e["p95_null_reason"] == "needs requests with 100 different prompts, there are 12"


def _set(section: str, name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: document[section].__setitem__(name, value)


def _drop(section: str, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document[section].__delitem__(name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda document: document.update(schema_version=6), "schema_version is 6, this lem reads 1 to 5"),
        (lambda document: document.pop("schema_version"), "schema_version is None"),
        (lambda document: document.pop("window"), "record: missing window"),
        (lambda document: document.update(colour="red"), "record: unknown 'colour'"),
        (lambda document: document.update(work=[]), "work: expected an object, got \\[\\]"),
        (lambda document: document.update(gpus={}), "gpus: expected a list"),
        (lambda document: document.update(gpus=[1]), r"gpus\[0\]: expected an object"),
        (_drop("work", "output_tok"), "work: missing output_tok"),
        (_set("work", "output_tok", True), r"work\.output_tok: expected an integer, got True"),
        (_set("work", "output_tok", "12"), r"work\.output_tok: expected an integer, got '12'"),
        (_set("work", "output_tok", None), r"work\.output_tok is null without a reason"),
        (_set("identity", "run_id", 7), r"identity\.run_id: expected text, got 7"),
        (_set("identity", "run_id", None), r"identity\.run_id is null without a reason"),
        (_set("validity", "warnings", "one"), r"validity\.warnings: expected a list"),
        (_set("validity", "warnings", [1]), r"validity\.warnings\[0\]: expected text, got 1"),
        (_set("environment", "versions", {"torch": 2}), r"environment\.versions\.torch: expected text, got 2"),
        (_set("energy", "gpu_energy_j_null_reason", 5), r"energy\.gpu_energy_j is null without a reason"),
        (_set("window", "window_s_null_reason", "why"), "window: 'window_s_null_reason' has no null beside it"),
        (_set("window", "x_null_reason", "why"), "window: 'x_null_reason' has no null beside it"),
        (_set("latency", "e2e_s", {"mean": 1.0}), r"latency\.e2e_s: missing n, n_prompts, p50"),
        (_set("window", "window_s", float("nan")), r"window\.window_s: expected a finite number"),
        (_set("extra_metadata", "x", float("inf")), r"extra_metadata\.x: expected a finite number"),
    ],
)
def test_a_damaged_record_is_refused_with_its_place(damage: Callable[[dict[str, Any]], None], said: str) -> None:
    document = json.loads(json.dumps(encode_record(make_record())))
    damage(document)
    with pytest.raises(RecordError, match=said):
        decode_record(document)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\x00\xff\xfe", b"[" * 100_000, b'{"schema_version": 1}', b"null", b"[]", b"7", b'"record"'],
    ids=repr,
)
def test_a_file_that_is_no_record_is_a_record_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "result.json").write_bytes(data)
    with pytest.raises(RecordError):
        read_record(tmp_path / "result.json")


def test_a_record_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path / "result.json", make_record())
    whole = (tmp_path / "result.json").read_bytes()
    for length in range(0, len(whole) - 2, 97):
        (tmp_path / "result.json").write_bytes(whole[:length])
        with pytest.raises(RecordError):
            read_record(tmp_path / "result.json")


def _write_nested(path: Path, depth: int) -> None:
    text = json.dumps(encode_record(make_record()), ensure_ascii=False)
    path.write_text(text.replace('"Grüße"', '{"a":' * depth + "1" + "}" * depth), encoding="utf-8")


def test_values_nested_without_end_are_refused(tmp_path: Path) -> None:
    _write_nested(tmp_path / "result.json", 3000)
    with pytest.raises(RecordError, match="nested too deeply"):
        read_record(tmp_path / "result.json")


def test_values_nested_deeper_than_this_python_walks_are_refused_or_read(tmp_path: Path) -> None:
    """Where the decoder of JSON goes deeper than the check after it, or the other way round, differs by Python."""
    _write_nested(tmp_path / "result.json", 700)
    with contextlib.suppress(RecordError):
        assert read_record(tmp_path / "result.json").extra_metadata


def test_a_damaged_value_of_any_length_makes_a_short_message() -> None:
    document = encode_record(make_record())
    document["schema_version"] = "\x1b[2J" * 1000
    with pytest.raises(RecordError) as caught:
        decode_record(document)
    assert len(str(caught.value)) < 200
    assert "\x1b" not in str(caught.value)


RECORDED = Path(__file__).parents[1] / "recorded" / "h200" / "attempt" / "result.json"


def test_a_record_of_version_3_has_no_share_of_good_requests() -> None:
    document = json.loads(json.dumps({**encode_record(make_record()), "schema_version": 3}))
    for suffix in ("", "_null_reason", "_null_reason_coded"):
        document["throughput"].pop(f"good_requests_ratio{suffix}", None)
    throughput = decode_record(document).throughput
    assert throughput.good_requests_ratio is None
    assert throughput.null_reasons["good_requests_ratio"].code == "not_recorded"


def test_itl_of_older_records_is_read_and_no_longer_written() -> None:
    document = json.loads(RECORDED.read_bytes())
    assert document["schema_version"] == 1
    old = {"mean": 0.02, "p50": 0.0, "p90": 0.05, "p95": 0.06, "p99": None, "p99_null_reason": "too few", "n": 50}
    latency = {name: value for name, value in document["latency"].items() if not name.startswith("itl_s")}
    record = decode_record({**document, "latency": {**latency, "itl_s": old}})
    assert record.latency.itl_s is not None
    assert (record.latency.itl_s.p95, record.latency.itl_s.n_prompts) == (0.06, None)
    assert record.latency.itl_s.null_reasons["p99"].data == {"needed": 100, "n": 50}
    assert record.latency.null_reasons["icl_s"].code == "not_recorded"
    assert decode_record(encode_record(record)) == record
    assert metrics.parse_metric("itl").read(record) == (0.0, None)
    new = make_record()
    assert not [name for name in encode_record(new)["latency"] if name.startswith("itl")]
    assert metrics.parse_metric("itl").read(new)[1] == ITL_REPLACED
