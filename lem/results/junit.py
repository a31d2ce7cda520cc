"""Verdicts as JUnit XML, which CI systems show as tests."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence

from lem.base.dataclass import dataclass
from lem.base.doc import printable
from lem.results.check import KINDS, Finding
from lem.results.compare import Comparison, Pair, Row
from lem.results.comparison import sentence_of
from lem.results.run import Run
from lem.results.stats import Verdict
from lem.results.views import percent_text

PASSED, FAILURE, ERROR, SKIPPED = "passed", "failure", "error", "skipped"


@dataclass(frozen=True)
class Case:
    name: str
    outcome: str = PASSED
    kind: str = ""  # of a failure or an error
    text: str = ""  # the message of any other outcome than `PASSED`, for which it is output


def render_junit(suite: str, cases: Sequence[Case], properties: Mapping[str, str]) -> str:
    counts = {f"{outcome}s": sum(case.outcome == outcome for case in cases) for outcome in (FAILURE, ERROR)}
    counts["skipped"] = sum(case.outcome == SKIPPED for case in cases)
    head = _attributes(name=suite, tests=len(cases), **counts)
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuites>\n  <testsuite {head}>", "    <properties>"]
    lines += [f"      <property {_attributes(name=name, value=value)}/>" for name, value in properties.items()]
    lines += ["    </properties>", *(_case(suite, case) for case in cases), "  </testsuite>", "</testsuites>"]
    return "\n".join(lines) + "\n"


def _case(suite: str, case: Case) -> str:
    head = f"    <testcase {_attributes(classname=suite, name=case.name)}"
    if not case.text and case.outcome == PASSED:
        return f"{head}/>"
    if case.outcome == PASSED:
        inner = f"<system-out>{_escaped(case.text)}</system-out>"
    elif case.outcome == SKIPPED:
        inner = f"<skipped {_attributes(message=case.text)}/>"
    else:
        told = _attributes(message=case.text.partition("\n")[0], type=case.kind)
        inner = f"<{case.outcome} {told}>{_escaped(case.text)}</{case.outcome}>"
    return f"{head}>\n      {inner}\n    </testcase>"


def _attributes(**values: object) -> str:
    return " ".join(f'{name}="{_escaped(str(value))}"' for name, value in values.items())


def _escaped(text: str) -> str:
    """Without what XML cannot hold, such as the control characters that a name may have."""
    return html.escape("\n".join(map(printable, text.split("\n"))))


def junit_of_check(run: Run, findings: Sequence[Finding]) -> str:
    """A case for each kind of finding, whether or not there is one, so that CI can follow it from run to run."""
    cases = []
    for kind in KINDS:
        found = sorted((item for item in findings if item.kind == kind), key=lambda item: not item.is_weak)
        is_weak = any(item.is_weak for item in found)
        text = "\n".join(line for item in found for line in _lines(item))
        cases.append(Case(kind, FAILURE if is_weak else PASSED, "weak", text))
    return render_junit(f"lem.check.{run.campaign_name}", cases, {"run_id": run.run_id})


def _lines(item: Finding) -> Iterator[str]:
    whom = f" ({', '.join(item.configurations)})" if item.configurations else ""
    yield f"{item.text}{whom}"
    if item.remedy:
        yield f"do: {item.remedy}"


def junit_of_gates(comparison: Comparison, *, is_lenient: bool) -> str:
    """A case for each gate and pair. One of them fails if, and only if, the exit code of the comparison is not 0."""
    cases = [
        _gate_case(comparison, pair, row, is_lenient=is_lenient)
        for gate in comparison.gates
        for pair, row in comparison.rows(gate.metric)
    ]
    undecided = SKIPPED if is_lenient else FAILURE
    missing = comparison.missing or (() if cases else ("nothing to compare",))
    cases += [Case(text, undecided, Verdict.INCONCLUSIVE.value, text) for text in missing]
    campaigns = dict.fromkeys(run.campaign_name for run in comparison.runs)
    runs = {"run_id": ", ".join(run.run_id for run in comparison.runs)}
    return render_junit(f"lem.compare.{'.'.join(campaigns)}", cases, runs)


def _gate_case(comparison: Comparison, pair: Pair, row: Row, *, is_lenient: bool) -> Case:
    judgement = row.judgement
    if judgement is None:
        raise ValueError(f"{row.metric.name} has no gate")
    name = f"{row.metric.name}={percent_text(judgement.gate)}: {pair.other.name} against {pair.baseline.name}"
    text = sentence_of(comparison, pair, row)
    if row.reason is not None and row.reason.code == "not_measured":
        return Case(name, ERROR, "not measured", text)
    if judgement.verdict is Verdict.WORSE:
        return Case(name, FAILURE, "regression", text)
    if judgement.verdict is Verdict.INCONCLUSIVE:
        return Case(name, SKIPPED if is_lenient else FAILURE, judgement.verdict.value, text)
    return Case(name, PASSED, "", text)
