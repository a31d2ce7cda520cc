"""The work that programs report: what `--work` names, and the result files of known benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lem.meters.peers import WorkSource, read_work, stamp_of
from tests.documentation import ROOT

RECORDED = ROOT / "tests" / "recorded" / "peers"
COUNTS = ("requests_ok", "requests_failed", "input_tok", "output_tok")


def counts_of(path: Path, *fields: str) -> dict[str, Any]:
    sources = [WorkSource.parse(f"{field}" if field else str(path)) for field in fields or ("",)]
    found = read_work(sources, [() for _ in sources])
    return {name: value for name in COUNTS if isinstance(value := found[name], int)}


@pytest.mark.parametrize(
    ("text", "path", "field", "kind"),
    [
        ("out.json", "out.json", "", ""),
        ("a/b.json:total_output_tokens", "a/b.json", "total_output_tokens", "output_tokens"),
        ("b.json:total_input_tokens", "b.json", "total_input_tokens", "input_tokens"),
        ("b.json:usage.prompt_tokens", "b.json", "usage.prompt_tokens", "input_tokens"),
        ("b.json:completed", "b.json", "completed", "requests"),
        ("b.json:n_requests", "b.json", "n_requests", "requests"),
        ("b.json:failed_requests", "b.json", "failed_requests", "failed"),
        ("requests=b.json:images", "b.json", "images", "requests"),
        ("./x=y.json", "x=y.json", "", ""),
        ("requests=x=y.json:n", "x=y.json", "n", "requests"),
        ("a:b/c.json", "a:b/c.json", "", ""),
    ],
)
def test_the_name_of_a_field_tells_what_it_counts(text: str, path: str, field: str, kind: str) -> None:
    assert WorkSource.parse(text) == WorkSource(Path(path), field, kind)


@pytest.mark.parametrize("kind", ["outptu_tokens", "Requests", "tokens", ""])
def test_a_mistyped_kind_is_no_part_of_the_name_of_the_file(kind: str) -> None:
    with pytest.raises(ValueError, match=f"unknown kind '{kind}'.*write ./{kind}=out.json:tokens"):
        WorkSource.parse(f"{kind}=out.json:tokens")


@pytest.mark.parametrize("text", ["b.json:images", ":tokens", "", "requests=b.json", "requests=:n"])
def test_what_does_not_tell_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the wording is free
        WorkSource.parse(text)


@pytest.mark.parametrize(
    ("document", "field", "expected"),
    [
        ({"a": {"tokens": 7}}, "a.tokens", 7),
        ({"runs": [{"tokens": 3}, {"tokens": 4.0}]}, "runs.tokens", 7),
        ({"runs": [{"tokens": 3}, {"tokens": 4}]}, "runs.1.tokens", 4),
        ({"tokens": [1, 2, 3]}, "tokens", 6),
        ({"tokens": 0}, "tokens", 0),
        ({"tokens": 1.5}, "tokens", None),
        ({"tokens": -1}, "tokens", None),
        ({"tokens": True}, "tokens", None),
        ({"tokens": "7"}, "tokens", None),
        ({"tokens": []}, "tokens", None),
        ({"other": 7}, "tokens", None),
        ([1, 2], "5.tokens", None),
        ({"tokens": 1e400}, "tokens", None),
        ({"tokens": 10**400}, "tokens", None),
        ({"tokens": [1e308, 1e308]}, "tokens", None),
    ],
)
def test_a_field_is_the_sum_of_its_whole_numbers(
    tmp_path: Path, document: Any, field: str, expected: int | None
) -> None:
    path = tmp_path / "out.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    found = counts_of(path, f"output_tokens={path}:{field}")
    assert found == ({} if expected is None else {"output_tok": expected})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vllm.json", {"requests_ok": 8, "requests_failed": 0, "input_tok": 211, "output_tok": 128}),
        ("guidellm.json", {"requests_ok": 6, "requests_failed": 0, "input_tok": 125, "output_tok": 96}),
        ("aiperf.json", {"requests_ok": 32, "input_tok": 1053, "output_tok": 640}),
    ],
)
def test_result_files_that_benchmarks_wrote_are_recognised(name: str, expected: dict[str, int]) -> None:
    assert counts_of(RECORDED / name) == expected


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            [
                {"n_prompt": 512, "n_gen": 0, "samples_ns": [1, 2, 3]},
                {"n_prompt": 0, "n_gen": 128, "samples_ns": [1, 2]},
            ],
            {"requests_ok": 5, "input_tok": 1536, "output_tok": 256},
        ),
        (
            [
                {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "samples_ns": [1, 2]},
                {"n_prompt": 0, "n_gen": 128, "n_depth": 0, "samples_ns": [1, 2]},
            ],
            {"requests_ok": 4, "input_tok": 1024, "output_tok": 256},
        ),
        (
            [
                {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "samples_ns": [1, 2]},
                {"n_prompt": 0, "n_gen": 128, "n_depth": 4096, "samples_ns": [1, 2]},
            ],
            {"requests_ok": 4, "output_tok": 256},
        ),
        ([{"n_prompt": 512, "n_gen": 0, "n_depth": "x", "samples_ns": [1]}], {}),
        ({"elapsed_time": 2.0, "num_requests": 9, "total_num_tokens": 90}, {"requests_ok": 9}),
        ({"tokens": 9}, {}),
        ([{"n_prompt": 512, "n_gen": 0, "samples_ns": 7}], {}),
        ([{"samples_ns": [7]}], {}),
        ({"benchmarks": "x"}, {}),
        ([], {}),
        ("text", {}),
    ],
)
def test_other_shapes_are_known_or_tell_nothing(tmp_path: Path, document: Any, expected: dict[str, int]) -> None:
    path = tmp_path / "out.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert counts_of(path) == expected


def test_a_file_that_is_as_before_tells_nothing_and_one_written_again_does(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text('{"tokens": 5}', encoding="utf-8")
    source, before = WorkSource.parse(f"{path}:tokens"), stamp_of(path)
    assert read_work([source], [before])["output_tok"].null_reason.code == "work_unreadable"
    fresh = tmp_path / "fresh.json"
    fresh.write_text('{"tokens": 5}', encoding="utf-8")
    fresh.replace(path)
    found = read_work([source], [before])
    assert found["output_tok"] == 5
    assert found["requests_ok"].null_reason.code == "work_not_given"
