"""JUnit XML of check and gates, as junitparser reads it: it fails if, and only if, the command does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from lem.results.check import KINDS
from lem.results.junit import FAILURE, Case, render_junit
from tests.command_rig import Output, run_lem
from tests.synthetic_campaign import Campaign, Configuration

FAST = Configuration("fast", energy_per_output_tok_j=0.2, output_tok_per_s=2200)
SLOW = Configuration("slow", batch_size=8, energy_per_output_tok_j=0.3, output_tok_per_s=1500)
UNMETERED = Configuration("unmetered", batch_size=2, energy_per_output_tok_j=None)
FAILING = dataclasses.replace(SLOW, name="failing", batch_size=4, failed_cycles=(0, 1, 2, 3, 4))


def write(folder: Path, *configurations: Configuration, cycles: int = 5) -> Path:
    campaign = Campaign(configurations, load_sd=0.002, run_sd=0.001, structure="shuffled", has_samples=False)
    dataclasses.replace(campaign, cycles=cycles, name="demo").write(folder)
    return folder / "results"


def read(path: Path) -> dict[str, TestCase]:
    (suite,) = JUnitXml.fromfile(str(path))
    assert isinstance(suite, TestSuite)
    cases = list(suite)
    counts = [
        sum(isinstance(item, kind) for case in cases for item in case.result) for kind in (Failure, Error, Skipped)
    ]
    assert [suite.tests, suite.failures, suite.errors, suite.skipped] == [len(cases), *counts]
    return {case.name: case for case in cases}


def outcomes(path: Path) -> list[str]:
    return sorted(type(item).__name__ for case in read(path).values() for item in case.result)


@pytest.mark.parametrize(
    ("configurations", "cycles", "words", "code", "expected"),
    [
        ((SLOW, FAST), 5, ["--gate", "energy=3%"], 0, []),
        ((FAST, SLOW), 5, ["--gate", "energy=3%", "--gate", "throughput=3%"], 3, ["Failure", "Failure"]),
        ((FAST, SLOW), 1, ["--gate", "energy=3%"], 4, ["Failure"]),
        ((FAST, SLOW), 1, ["--gate", "energy=3%", "--lenient"], 0, ["Skipped"]),
        ((FAST, UNMETERED), 5, ["--gate", "energy=3%"], 2, ["Error"]),
        ((FAST, UNMETERED), 5, ["--gate", "energy=3%", "--lenient"], 2, ["Error"]),
        ((SLOW, FAST, FAILING), 5, ["--gate", "energy=3%"], 4, ["Failure"]),
        ((SLOW, FAST, FAILING), 5, ["--gate", "energy=3%", "--lenient"], 0, ["Skipped"]),
    ],
)
def test_a_gate_fails_as_the_command_does(
    tmp_path: Path,
    configurations: Sequence[Configuration],
    cycles: int,
    words: list[str],
    code: int,
    expected: list[str],
) -> None:
    results, path = write(tmp_path, *configurations, cycles=cycles), tmp_path / "gates.xml"
    words = [*words, "--baseline", configurations[0].name]
    found = run_lem("compare", "demo", "--results-dir", results, *words, "--junit", path)
    assert (found.code, outcomes(path)) == (code, expected)
    assert (code == 0) == (set(expected) <= {"Skipped"})


def test_a_gate_says_what_was_found(tmp_path: Path) -> None:
    results, path = write(tmp_path, FAST, SLOW), tmp_path / "gates.xml"
    words = ["--gate", "energy=3%", "--baseline", "fast", "--junit", str(path)]
    run_lem("compare", "demo", "--results-dir", results, *words)
    ((name, case),) = read(path).items()
    (failure,) = case.result
    assert (name, failure.type) == ("energy_per_output_tok_j=3%: slow against fast", "regression")
    assert "uses 1.5" in failure.message
    assert "Gate: worse." in failure.message


def test_junit_without_a_gate_is_refused(tmp_path: Path) -> None:
    results = write(tmp_path, FAST, SLOW)
    found = run_lem("compare", "demo", "--results-dir", results, "--junit", tmp_path / "gates.xml")
    assert (found.code, "--junit requires --gate" in found.err) == (2, True)
    assert not (tmp_path / "gates.xml").exists()


def check(folder: Path, *configurations: Configuration, cycles: int = 5) -> Output:
    return run_lem(
        *("check", "demo", "--results-dir", write(folder, *configurations, cycles=cycles)),
        *("--state-dir", folder / "state", "--junit", folder / "check.xml"),
    )


def test_check_has_a_case_for_each_kind_of_finding_and_those_that_are_weak_fail(tmp_path: Path) -> None:
    assert check(tmp_path, FAST, SLOW).code == 0
    assert list(read(tmp_path / "check.xml")) == list(KINDS)
    assert outcomes(tmp_path / "check.xml") == []
    weak = tmp_path / "weak"
    weak.mkdir()
    assert check(weak, FAST, dataclasses.replace(SLOW, is_steady=False), cycles=2).code == 4
    cases = read(weak / "check.xml")
    failed = {name: case.result[0] for name, case in cases.items() if case.result}
    assert {"unsteady", "few_cycles"} <= failed.keys()
    assert all(isinstance(item, Failure) for item in failed.values())
    assert "do: raise measurement.min_window_sec" in failed["unsteady"].text
    assert "(slow)" in failed["unsteady"].message


def test_a_file_that_cannot_be_written_is_an_error_with_the_option(tmp_path: Path) -> None:
    results = write(tmp_path, FAST, SLOW)
    found = run_lem("check", "demo", "--results-dir", results, "--junit", tmp_path / "missing" / "check.xml")
    assert found.code == 2
    assert "name another file with --junit" in found.err


def test_text_that_xml_cannot_hold_is_read_back_as_text(tmp_path: Path) -> None:
    path = tmp_path / "odd.xml"
    text = "a < b & \"c\" ]]> 'd' \x1b[31m\x00\udc80 größer"
    path.write_text(
        render_junit(f"s{text}", [Case(text, FAILURE, text, f"{text}\nmore")], {"run": text}), encoding="utf-8"
    )
    ((name, case),) = read(path).items()
    assert name == "a < b & \"c\" ]]> 'd' �[31m�� größer"
    assert case.result[0].text.splitlines()[1] == "more"
