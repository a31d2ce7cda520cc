import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.base.measurement import known
from lem.base.reasons import Reason
from lem.record import encode_record
from lem.results.aggregation import run_document
from lem.results.export import FORMATS, render
from lem.results.rows import Table, make_table, summary_columns, with_columns, with_values
from lem.results.run import make_run
from lem.results.store import StoredResult
from tests.goldens import assert_golden
from tests.records import make_gpu, make_record, under_load


def _text(table: Table, form: str) -> str:
    return "".join(render(table, form))


def _exported(*records):
    return [
        StoredResult(f"demo/{item.identity.run_id}/{item.identity.experiment_id}/attempt-{item.identity.attempt}", item)
        for item in records
    ]


def _fixed():
    """Two configurations, one of them with a first attempt that was not valid and a GPU."""
    hot = ("GPU-1: thermal slowdown for 15.6 s of the window",)
    vllm: dict[str, Any] = {
        "config_name": "vllm-bfloat16",
        "config_hash": "f" * 16,
        "energy_per_output_tok_j": 0.25,
        "order": 1,
    }
    return [
        make_record(config_name="pytorch | bfloat16", warnings=("one", "another"), n_requests=25),
        dataclasses.replace(make_record(**vllm, is_valid=False, invalid_reasons=hot), gpus=(make_gpu(),)),
        dataclasses.replace(make_record(**vllm, attempt=2, ttft_p50_s=0.0625), gpus=(make_gpu(),)),
    ]


def test_fixed_results_as_json():
    assert_golden("export/all_attempts.json", _text(make_table(_exported(*_fixed()), is_every_attempt=True), "json"))


def test_a_value_of_two_parts_is_absent_with_the_reason_of_the_later_one():
    record = under_load(make_record(), 1.0, 3)
    assert record.throughput.good_requests_ratio == 3 / record.work.tried
    old = dataclasses.replace(record, work=record.work.having(requests_good=known(None, "not_recorded")))
    (row,) = make_table(_exported(old)).rows()
    assert row["good_requests_ratio"] == (None, Reason.of("not_recorded").text)


def test_markdown_has_a_few_columns_numbers_at_the_right():
    results = _exported(*_fixed())
    table = with_columns(make_table(results), summary_columns(results))
    head, rule, first, second = _text(table, "markdown").splitlines()
    assert head.startswith(r"| config\_name | cycle\_index | attempt | valid | output\_tok\_per\_s |")
    assert rule.startswith("| --- | ---: | ---: |")
    assert first.startswith("| pytorch \\| bfloat16 | 0 | 1 |")
    assert second.startswith("| vllm-bfloat16 | 0 | 2 |")


@pytest.mark.parametrize("form", FORMATS)
def test_the_order_in_which_results_are_found_does_not_matter(form):
    results = _exported(*_fixed())
    table = make_table(results)
    assert _text(table, form) == _text(make_table(results[::-1]), form)
    assert [json.loads(line) for line in _text(table, "jsonl").splitlines()] == json.loads(_text(table, "json"))


def test_a_csv_reads_back_to_the_very_numbers():
    record = make_record(output_tok_per_s=0.1 + 0.2, energy_per_output_tok_j=1e-17)
    (row,) = csv.DictReader(io.StringIO(_text(make_table(_exported(record)), "csv")))
    assert float(row["output_tok_per_s"]) == 0.1 + 0.2
    assert float(row["energy_per_output_tok_j"]) == 1e-17
    assert (row["valid"], row["cycle_index"], row["gpu_energy_net_j"]) == ("true", "0", "")


def test_json_says_why_a_value_is_missing():
    (row,) = json.loads(_text(make_table(_exported(make_record())), "json"))
    assert row["gpu_energy_j"] is None
    assert row["null_reasons"]["gpu_energy_j"] == "no energy meter was used"
    assert row["null_reasons"]["ttft_p50_s"] == "the engine gave no time for each token"
    assert row["null_reasons"]["e2e_p99_s"] == "needs requests with 500 different prompts, there are 8"
    missing = {name for name, value in row.items() if value is None}
    assert set(row["null_reasons"]) == missing
    assert all(row["null_reasons"].values())


def test_every_number_of_a_record_is_in_its_row():
    record = dataclasses.replace(make_record(energy_per_output_tok_j=0.5, ttft_p50_s=0.1), gpus=(make_gpu(),))
    (row,) = json.loads(_text(make_table(_exported(record)), "json"))
    document = encode_record(record)
    for section in ("identity", "validity", "window", "energy", "idle", "work", "throughput", "efficiency", "carbon"):
        for name, value in document[section].items():
            if not name.endswith(("_null_reason", "_coded", "prompt_source")):
                assert row[name] == (f"h{value}" if name in ("config_hash", "campaign_id", "engine_load_id") else value)
    assert row["ttft_mean_s"] == document["latency"]["ttft_s"]["mean"]
    assert row["ttft_n"] == document["latency"]["ttft_s"]["n"]
    assert row["ttft_n_prompts"] == document["latency"]["ttft_s"]["n_prompts"]
    assert row["output_tok_per_request"] == document["work"]["output_tok"] / document["work"]["requests_ok"]
    assert row["null_reasons"]["co2e_per_request_g"] == document["carbon"]["co2e_g_null_reason"]
    assert row["gpu0_power_mean_w"] == 412.5
    assert row["requested.max_output_tokens"] == 32
    assert row["extra_metadata.note"] == "Grüße"
    assert (row["versions.python"], row["versions.torch"]) == ("3.11.7", "2.13.0")
    assert row["prompt_source.count"] == document["work"]["prompt_source"]["count"]


@pytest.mark.parametrize(
    ("are_valid", "attempt", "is_used"), [((False, True, False), 2, True), ((False, False), 2, False)]
)
def test_an_experiment_is_one_row_its_last_valid_attempt_or_else_its_last(are_valid, attempt, is_used):
    records = [make_record(attempt=number, is_valid=is_valid) for number, is_valid in enumerate(are_valid, 1)]
    (row,) = make_table(_exported(*records)).rows()
    assert (row["attempt"][0], row["valid"][0], row["used"][0]) == (attempt, is_used, is_used)


def test_a_wider_result_adds_columns_at_the_end_alone():
    narrow = make_record()
    wide = dataclasses.replace(
        make_record(cycle=1, requested={"fp_precision": "float16", "vllm": {"max_num_seqs": 8}}), gpus=(make_gpu(),)
    )
    before, after = make_table(_exported(narrow)).columns, make_table(_exported(narrow, wide)).columns
    fixed = [name for name in before if "." not in name]
    assert list(after[: len(fixed)]) == fixed
    rest = after[len(fixed) :]
    assert rest[0] == "gpu0_uuid"
    assert [name for name in rest if "." in name] == sorted(name for name in rest if "." in name)


def test_what_one_result_has_and_another_has_not_is_empty_and_says_so():
    other = make_record(cycle=1, requested={"fp_precision": "float16", "vllm": {"max_num_seqs": 8}})
    table = make_table(_exported(make_record(), other))
    first, second = table.rows()
    assert first["requested.vllm.max_num_seqs"] == (None, "not given for this experiment")
    assert second["requested.vllm.max_num_seqs"][0] == 8


@pytest.mark.parametrize("is_mixed", [False, True])
def test_json_is_indented_as_python_does(is_mixed):
    text = _text(make_table(_mixed() if is_mixed else _exported(*_fixed())), "json")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


def test_rows_come_in_parts_that_do_not_grow_with_their_number():
    table = make_table(_exported(*(make_record(cycle=cycle) for cycle in range(40))))
    for form in ("json", "jsonl"):
        parts = list(render(table, form))
        assert len(parts) > 2
        assert max(map(len, parts)) < len("".join(parts)) / 2


def test_no_results_are_an_empty_table():
    table = make_table([])
    assert [_text(table, form) for form in FORMATS] == ["\n", "[]\n", "", ""]


def test_columns_are_those_named_in_that_order():
    table = make_table(_exported(make_record()))
    assert _text(with_columns(table, ["valid", "config_name"]), "csv") == "valid,config_name\ntrue,small\n"
    assert _text(with_columns(table, ["valid", "config_name", "valid"]), "csv").splitlines()[1] == "true,small,true"
    with pytest.raises(UserError) as caught:
        with_columns(table, ["output_tok_pers"])
    assert str(caught.value) == "unknown column 'output_tok_pers' (did you mean 'output_tok_per_s'?)"


MIXED = (
    {"vllm": {"gpu_memory_utilization": 0.9, "flags": ["a"], "limits": {"image": 1}, "odd": [1, "two"]}},
    {"vllm": {"gpu_memory_utilization": "auto", "flags": [], "limits": {}, "odd": [[1, 2], [3]]}},
    {"vllm": {"gpu_memory_utilization": None, "flags": [1], "limits": None}},
)


def _mixed() -> Any:
    """Results whose options have values of several kinds, and one of which lacks nothing that can be empty."""
    return _exported(*(make_record(cycle=cycle, requested=requested) for cycle, requested in enumerate(MIXED)))


@pytest.mark.needs("datasets")  # which brings pandas and pyarrow
def test_a_csv_has_no_cell_of_json_and_no_column_without_a_value():
    table = with_values(make_table(_mixed()))
    rows = [*csv.DictReader(io.StringIO(_text(table, "csv")))]
    assert [cell for row in rows for cell in row.values() if cell.startswith(("{", "["))] == []
    assert [name for name in rows[0] if not any(row[name] for row in rows)] == []
    assert [row["requested.vllm.gpu_memory_utilization"] for row in rows] == ["0.9", "auto", ""]
    assert [row["requested.vllm.odd"] for row in rows] == ["1; two", "", ""]
    assert rows[1]["requested.vllm.odd.0"] == "1; 2"
    import pandas as pd

    frame = pd.read_csv(io.StringIO(_text(table, "csv")))
    assert not frame.isna().all().any()


@pytest.mark.needs("datasets")
@pytest.mark.parametrize("columns", [None, ["config_hash", "valid", "gpu_uuids"]])
def test_lines_of_json_convert_to_parquet_and_back(columns: list[str] | None, tmp_path: Path) -> None:
    import pandas as pd
    from pyarrow import json as arrow_json
    from pyarrow import parquet

    table = make_table([*_mixed(), *_exported(*_fixed())], is_every_attempt=True)
    table = table if columns is None else with_columns(table, columns)
    text = _text(table, "jsonl")
    read = arrow_json.read_json(io.BytesIO(text.encode()))
    parquet.write_table(read, tmp_path / "all.parquet")
    found = parquet.read_table(tmp_path / "all.parquet")
    assert found.num_rows == len(table)
    for name in table.columns:
        assert found[name].to_pylist() == [row[name][0] for row in table.rows()]
    pd.DataFrame(map(json.loads, text.splitlines())).to_parquet(tmp_path / "frame.parquet")


@pytest.mark.needs("datasets")
@pytest.mark.parametrize("digits", ["123e456789012345", "1234567890123456", "00012e4567890123"])
def test_no_hash_is_read_as_a_number(digits: str) -> None:
    import pandas as pd

    record = make_record(config_hash=digits)
    record = dataclasses.replace(
        record,
        identity=dataclasses.replace(record.identity, campaign_id=digits[:8]),
        validity=dataclasses.replace(record.validity, engine_load_id=digits),
        environment=dataclasses.replace(record.environment, fingerprint=digits),
    )
    table = make_table(_exported(record))
    names = ["config_hash", "campaign_id", "engine_load_id", "fingerprint", "experiment_id"]
    (of_csv,) = pd.read_csv(io.StringIO(_text(table, "csv")))[names].to_dict("records")
    (of_json,) = pd.read_json(io.StringIO(_text(table, "json")))[names].to_dict("records")
    assert of_csv == of_json
    assert all(isinstance(value, str) for value in of_csv.values())
    assert of_csv["config_hash"] == f"h{digits}"
    found = make_run([record, make_record(config_name="other")])
    assert {found.select(text).config_hash for text in (digits, f"h{digits}", f"h{digits[:6]}")} == {digits}
    assert run_document(found)["configurations"][0]["config_hash"] == f"h{digits}"


@pytest.mark.parametrize("form", FORMATS)
def test_columns_of_no_results_are_no_rows(form):
    table = with_columns(make_table([]), ["config_name", "valid"])
    assert len(_text(table, form).splitlines()) == {"csv": 1, "json": 1, "jsonl": 0, "markdown": 2}[form]
