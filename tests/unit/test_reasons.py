"""Reasons: codes with data, their sentences, and the sentences of records without codes."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import pytest

from lem.base.codec import recognise
from lem.base.reasons import NULL_TEXTS, TEXTS, V1_TEXTS, Reason, alike
from lem.record import Record, RecordError, decode_record, encode_record, read_record
from lem.results.check import check_run
from lem.results.run import make_run
from tests.records import codes, make_record

TESTS = Path(__file__).parents[1]
RECORDED = TESTS / "recorded" / "h200" / "attempt" / "result.json"

# Sentences as commit 524ec81 wrote them into records, by the codes that they stand for.
WRITTEN: dict[str, str] = json.loads((TESTS / "recorded" / "sentences-v1.json").read_text(encoding="utf-8"))


def sample(code: str) -> Reason:
    """The reason of a code with some data."""
    values: dict[str, Any] = {"": "text 1", "d": 7, "#x": 0x40}
    fields = string.Formatter().parse(TEXTS[code])
    return Reason.of(code, **{name: values.get(spec or "", 0.123456789) for _, name, spec, _ in fields if name})


def with_reasons(*reasons: Reason) -> Record:
    record = make_record(is_valid=False)
    validity = dataclasses.replace(record.validity, warnings=reasons, invalid_reasons=reasons[:1])
    window = dataclasses.replace(record.window, gap_end_reason=reasons[-1])
    absent = {**record.idle.null_reasons, "idle_bare_power_w": reasons[0]}
    idle = dataclasses.replace(record.idle, idle_bare_power_w=None, null_reasons=absent)
    return dataclasses.replace(record, validity=validity, window=window, idle=idle)


def without_null_codes(value: Any) -> Any:
    """A document as it was written before reasons of absent values had codes."""
    if isinstance(value, dict):
        return {
            name: without_null_codes(item) for name, item in value.items() if not name.endswith("_null_reason_coded")
        }
    return [without_null_codes(item) for item in value] if isinstance(value, list) else value


def as_version_1(record: Record) -> dict[str, Any]:
    document = json.loads(json.dumps(encode_record(record)))
    document["schema_version"] = 1
    fields = (
        ("validity", "invalid_reasons"),
        ("validity", "warnings"),
        ("window", "gap_end_reason"),
        ("idle", "idle_bare_power_w_null_reason"),
    )
    for section, name in fields:
        coded = document[section].pop(f"{name}_coded")
        reasons = [Reason.of(item["code"], **item["data"]) for item in (coded if isinstance(coded, list) else [coded])]
        texts = [reason.worded(V1_TEXTS) for reason in reasons]
        document[section][name] = texts if isinstance(coded, list) else texts[0]
    return dict(without_null_codes(document))


# Codes and sentences


def test_data_that_does_not_fit_the_sentence_is_refused() -> None:
    with pytest.raises(ValueError, match="requests_failed takes failed, total, first, got failed"):
        Reason.of("requests_failed", failed=1)
    with pytest.raises(ValueError, match="takes no data, got failed"):
        Reason.of("no_output", failed=1)
    with pytest.raises(ValueError, match="expected a number, got str"):
        Reason.of("requests_failed", failed="one", total=8, first="x")
    with pytest.raises(ValueError, match="expected text or a reason, got list"):
        Reason.of("verbatim", text=["one"])
    with pytest.raises(ValueError, match="unknown code"):
        Reason.of("no_such_code")


def test_floats_that_read_the_same_are_the_same() -> None:
    assert Reason.of("crosscheck", ratio=1.08004) == Reason.of("crosscheck", ratio=1.0799)
    assert Reason.of("crosscheck", ratio=1.08) != Reason.of("crosscheck", ratio=1.09)


def test_reasons_of_one_kind_differ_in_numbers_alone() -> None:
    cut = [Reason.of("prompts_cut", cut=number, total=8, limit=3) for number in (1, 2)]
    other = Reason.of("outputs_bounded", bounded=1, total=8, limit=3)
    failed = [Reason.of("meter_failed", meter=f"gpu{number}.power", error="lost") for number in (0, 1)]
    timeout = Reason.of("meter_failed", meter="gpu0.power", error="timeout")
    groups = alike(zip([cut[0], other, cut[1], *failed, timeout], range(6), strict=True))
    assert [[number for _, number in group] for group in groups] == [[0, 2], [1], [3, 4], [5]]


def test_a_reason_within_another_is_worded_with_it() -> None:
    inner = Reason.of("shared_load")
    assert Reason.of("no_interval", why=inner).text == f"{inner.text}: no interval"


# Records


@pytest.mark.parametrize("code", TEXTS)
def test_a_record_with_any_code_reads_back_equal(code: str) -> None:
    record = with_reasons(sample(code))
    document = json.loads(json.dumps(encode_record(record)))
    assert decode_record(document) == record
    assert document["validity"]["warnings"] == [sample(code).text]
    assert document["window"]["gap_end_reason_coded"]["code"] == code
    assert document["idle"]["idle_bare_power_w_null_reason"] == sample(code).text
    assert document["idle"]["idle_bare_power_w_null_reason_coded"]["code"] == code


def test_rewording_every_sentence_changes_nothing_but_sentences() -> None:
    """A record in whose file all sentences read otherwise is the same record, with the same findings and counts."""
    altered = {code: f"reworded 5 %: {template}!" for code, template in TEXTS.items()}
    reasons = [sample(code) for code in TEXTS]
    record = with_reasons(*reasons)
    document = json.loads(json.dumps(encode_record(record)))
    for name, known in (("warnings", reasons), ("invalid_reasons", reasons[:1])):
        document["validity"][name] = [reason.worded(altered) for reason in known]
    document["window"]["gap_end_reason"] = reasons[-1].worded(altered)
    document["idle"]["idle_bare_power_w_null_reason"] = reasons[0].worded(altered)
    read = decode_record(document)
    assert read == record
    assert [reason.kind for reason in read.validity.warnings] == [reason.kind for reason in reasons]
    assert check_run(make_run([read])) == check_run(make_run([record]))
    assert make_run([read]).configurations[0].warnings == dict.fromkeys(reasons, 1)


def test_a_code_of_a_newer_lem_is_known_by_its_sentence() -> None:
    document = json.loads(json.dumps(encode_record(with_reasons(sample("no_output")))))
    for coded in ({"code": "from_the_future", "data": {"x": 1}}, {"code": "crosscheck", "data": {"ratio": "much"}}):
        damaged = copy.deepcopy(document)
        damaged["validity"]["warnings_coded"] = [coded]
        assert decode_record(damaged).validity.warnings == (Reason.of("verbatim", text=sample("no_output").text),)


@pytest.mark.parametrize(
    ("name", "coded", "said"),
    [
        ("warnings_coded", [], r"validity\.warnings: expected codes of 1 sentences, got \[\]"),
        ("warnings_coded", [{"code": "no_output"}], r"validity\.warnings: expected code and data"),
        ("warnings_coded", [{"code": 7, "data": {}}], r"validity\.warnings: expected text, got 7"),
        ("warnings_coded", ["no_output"], r"validity\.warnings: expected code and data"),
        ("steady_coded", {"code": "no_output", "data": {}}, "validity: unexpected 'steady_coded'"),
    ],
)
def test_damaged_codes_are_refused_with_their_place(name: str, coded: Any, said: str) -> None:
    document = json.loads(json.dumps(encode_record(with_reasons(sample("no_output")))))
    document["validity"][name] = coded
    with pytest.raises(RecordError, match=said):
        decode_record(document)


# Every code has a sentence and a use

# The argument that is a code, if it is a literal.
PLACES_OF_CODES = {"Reason.of": 0, "NotMeasured": 0, "known": 1}


def test_every_code_of_the_program_has_a_sentence_and_every_sentence_a_use() -> None:
    literals = set()
    for path in (TESTS.parent / "lem").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "reasons.py":
                literals.add(node.value)
            if isinstance(node, ast.Call) and (place := PLACES_OF_CODES.get(ast.unparse(node.func))) is not None:
                code = node.args[place]
                assert not isinstance(code, ast.Constant) or code.value in TEXTS, f"{path}:{node.lineno}"
    assert sorted(TEXTS.keys() - literals - {"verbatim"}) == []


# Records without codes


@pytest.mark.parametrize("code", NULL_TEXTS)
def test_a_reason_without_its_code_is_read_with_the_same_sentence(code: str) -> None:
    document = without_null_codes(json.loads(json.dumps(encode_record(with_reasons(sample(code))))))
    read = decode_record(document).idle.null_reasons["idle_bare_power_w"]
    assert read.text == sample(code).text
    no_sentence_of_its_own = {"sampler_reports": "verbatim", "external_unreadable": "verbatim", "no_utc": "verbatim"}
    assert read.code == no_sentence_of_its_own.get(code, code)


@pytest.mark.parametrize("path", sorted((TESTS / "recorded").rglob("result.json")), ids=lambda path: path.parent.name)
def test_recorded_reasons_of_absent_values_keep_their_sentences(path: Path) -> None:
    written, read = json.loads(path.read_text(encoding="utf-8")), encode_record(read_record(path))
    for name, section in written.items():
        pairs = zip(section, read[name], strict=True) if isinstance(section, list) else [(section, read[name])]
        for before, after in pairs:
            if name not in ("requested", "extra_metadata", "schema_version"):
                reasons = {key: text for key, text in before.items() if key.endswith("_null_reason")}
                assert reasons == {key: after.get(key) for key in reasons}


@pytest.mark.parametrize("code", V1_TEXTS)
def test_a_sentence_of_version_1_is_read_as_its_code(code: str) -> None:
    reason = recognise(WRITTEN[code])
    assert reason.code == code
    assert reason.worded(V1_TEXTS) == WRITTEN[code]


@pytest.mark.parametrize("code", V1_TEXTS)
def test_a_record_of_version_1_is_the_one_of_today(code: str) -> None:
    record = with_reasons(sample(code))
    assert decode_record(as_version_1(record)) == record


def test_a_sentence_that_lem_never_wrote_is_kept_as_it_is() -> None:
    digits = f"{'9' * 5000} of 3 requests failed, the first with: x"  # more than Python takes for a number
    null = "The generation flag top_p is not given"  # the words of another program, like those of a null reason
    for sentence in ("", "one", "3 of many requests failed, the first with: x", digits, null):
        assert recognise(sentence) == Reason.of("verbatim", text=sentence)
    short = f"{'9' * 5000} of the counter were read"
    assert recognise(short, is_null=True) == Reason.of("verbatim", text=short)


def test_the_recorded_attempt_of_version_1_is_read_with_its_codes() -> None:
    record = read_record(RECORDED)
    assert codes(record.validity.warnings) == ["warmup_unsettled", "unsteady"]
    assert record.validity.warnings[0].data == {"prompts": 112, "variation": 0.051, "threshold": 0.05}
    assert record.window.gap_end_reason == Reason.of("gap_recovered")
    written = json.loads(RECORDED.read_text(encoding="utf-8"))["validity"]["warnings"]
    assert [reason.worded(V1_TEXTS) for reason in record.validity.warnings] == written
    assert record.carbon.null_reasons["co2e_g"].code == "pue_not_given"
    assert record.environment.null_reasons["governor"].code == "verbatim"  # reworded since


def test_a_damaged_record_of_version_1_is_refused_with_its_place() -> None:
    document = as_version_1(with_reasons(sample("no_output")))
    document["validity"]["warnings"] = [1]
    with pytest.raises(RecordError, match=r"validity\.warnings\[0\]: expected text, got 1"):
        decode_record(document)
