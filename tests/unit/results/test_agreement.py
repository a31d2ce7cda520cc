"""Agreement of answers: figures against a count by hand and SciPy's intervals, and why there are none."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lem.base.answers import OUTPUT_IDS_FILE, Answer, request_digest, write_answers
from lem.base.measurement import Measured
from lem.base.reasons import Reason
from lem.results.agreement import Agreement, agreement_of, binomial_interval, repeatability_of
from lem.results.along import compare_along
from lem.results.bootstrap import bootstrap_ci
from lem.results.compare import compare, compare_configurations
from lem.results.comparison import comparison_document, render_markdown, render_text
from lem.results.run import Run, make_run
from tests.needs import Late
from tests.records import make_record

stats: Any = Late("scipy.stats")

# Output ids by prompt, in each cycle.
Outputs = Sequence[Mapping[int, Sequence[int]]]
SAME = {0: (1, 2, 3, 4), 1: (5, 6, 7, 8), 2: (9, 9, 9, 9), 3: (1, 1, 1, 1)}
OTHER = {**SAME, 1: (5, 6, 0, 0), 3: (0, 1, 1, 1)}

REASONS = {"off": Reason.of("agreement_off"), "without": Reason.of("ids_not_returned", engine="sglang")}


def write(path: Path, answers: Mapping[int, Sequence[int]], asked: str) -> str:
    rows = [Answer(prompt, request_digest(prompt, asked), tuple(ids)) for prompt, ids in answers.items()]
    return write_answers(path.with_name(OUTPUT_IDS_FILE), rows)


def run_of(
    folder: Path, *, requests: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None, **given: Any
) -> Run:
    """A run with the output ids of each configuration by its name, or a reason why a configuration has none."""
    # `requests` marks what a configuration was asked, for those that were asked something else than the others.
    records, paths = [], {}
    for place, (name, outputs) in enumerate(given.items()):
        for cycle, answers in enumerate(outputs if isinstance(outputs, (list, tuple)) else [outputs]):
            found = make_record(config_name=name, cycle=cycle, order=2 * cycle + place, **(options or {}).get(name, {}))
            path = folder / found.identity.experiment_id / "attempt-1" / "result.json"
            path.parent.mkdir(parents=True)
            digest: Measured[str] = (
                Measured(None, REASONS.get(answers))
                if isinstance(answers, str)
                else Measured(write(path, answers, (requests or {}).get(name, "")))
            )
            record = dataclasses.replace(found, work=found.work.having(output_ids_sha256=digest))
            records.append(record)
            paths[record.identity.key] = str(path)
    return make_run(records, folder=folder, paths=paths)


def agreement(run: Run) -> Agreement:
    found = agreement_of(*run.configurations)
    assert found is not None
    assert found.value is not None, found.null_reason
    return found.value


def test_equal_answers_agree_wholly_with_an_interval_all_the_same(tmp_path: Path) -> None:
    found = agreement(run_of(tmp_path, one=[SAME, SAME], two=[SAME, SAME]))
    assert (found.requests, found.answers, found.equal_ratio, found.prefix_tok, found.output_tok) == (
        4,
        8,
        1.0,
        4.0,
        4.0,
    )
    # The least share of which 4 of 4 still come with 2.5 %.
    assert found.equal_interval == pytest.approx((0.025**0.25, 1.0))
    assert found.prefix_interval.null_reason is not None
    assert found.prefix_interval.null_reason.code == "no_spread"


def test_share_and_prefix_of_answers_that_differ(tmp_path: Path) -> None:
    found = agreement(run_of(tmp_path, one=SAME, two=OTHER))
    assert (found.requests, found.answers, found.equal_ratio, found.prefix_tok) == (4, 4, 0.5, (4 + 2 + 4 + 0) / 4)
    by_prompt = zip([request_digest(prompt, "") for prompt in SAME], (4, 2, 4, 0), strict=True)
    expected = bootstrap_ci([length for _, length in sorted(by_prompt)])
    assert found.prefix_interval.value == (expected.ci_lower, expected.ci_upper)


def test_a_request_that_cycles_repeat_counts_once_by_its_mean(tmp_path: Path) -> None:
    found = agreement(run_of(tmp_path, one=[SAME] * 3, two=[SAME, OTHER, OTHER]))
    assert (found.requests, found.answers) == (4, 12)
    assert found.equal_ratio == pytest.approx((1 + 1 / 3 + 1 + 1 / 3) / 4)
    assert found.equal_interval == pytest.approx(binomial_interval(4 * found.equal_ratio, 4))


def test_answers_that_all_continue_past_the_end_of_a_text_are_compared(tmp_path: Path) -> None:
    options = {name: {"requested": {"ignore_eos": True}} for name in ("one", "two")}
    found = agreement(run_of(tmp_path, one=SAME, two=OTHER, options=options))
    assert (found.requests, found.equal_ratio) == (4, 0.5)


def test_a_longer_answer_is_not_equal_to_its_beginning(tmp_path: Path) -> None:
    found = agreement(run_of(tmp_path, one={0: (1, 2)}, two={0: (1, 2, 3)}))
    assert (found.equal_ratio, found.prefix_tok, found.output_tok) == (0.0, 2.0, 3.0)
    assert found.prefix_interval.null_reason is not None
    assert found.prefix_interval.null_reason.code == "one_request"


@pytest.mark.parametrize(("n", "k"), [(1, 0), (4, 4), (32, 31), (32, 16), (1000, 1), (20, 0)])
def test_the_interval_of_the_share_is_that_of_clopper_and_pearson(n: int, k: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(method="exact")
    assert binomial_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_of_many_requests_the_interval_of_the_prefix_is_the_t_interval(tmp_path: Path) -> None:
    rng = random.Random(1)
    lengths = [rng.randrange(8) for _ in range(1500)]
    other = {prompt: (*[1] * length, 0, *[1] * (7 - length)) for prompt, length in enumerate(lengths)}
    found = agreement(run_of(tmp_path, one={prompt: [1] * 8 for prompt in other}, two=other))
    expected = stats.t.interval(0.95, 1499, stats.tmean(lengths), stats.sem(lengths))
    assert found.prefix_interval.value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"one": SAME, "two": "without"}, "answers_missing"),
        ({"one": SAME, "two": "off"}, "answers_missing"),
        ({"one": [SAME, "off"], "two": [SAME, SAME]}, "answers_missing"),
        ({"one": SAME, "two": OTHER, "requests": {"two": "shorter"}}, "no_same_request"),
        ({"one": SAME, "two": SAME, "options": {"two": {"requested": {"ignore_eos": True}}}}, "no_same_request"),
    ],
)
def test_why_answers_are_not_compared(tmp_path: Path, given: dict[str, Any], code: str) -> None:
    run = run_of(tmp_path, **given)
    found = agreement_of(*run.configurations)
    assert found is not None
    assert (found.value, found.null_reason and found.null_reason.code) == (None, code)
    assert "answers not compared: " in render_text(compare(*run.configurations))


def test_a_changed_or_lost_file_is_named_and_not_compared(tmp_path: Path) -> None:
    run = run_of(tmp_path, one=SAME, two=OTHER)
    path = Path(next(iter(run.paths.values()))).with_name(OUTPUT_IDS_FILE)
    write_answers(path, [])
    for words in ("its SHA-256 is", "no such file"):
        found = agreement_of(*run.configurations)
        assert found is not None
        assert found.null_reason is not None
        assert found.null_reason.code == "answers_unread"
        assert words in found.null_reason.text
        path.unlink(missing_ok=True)


def test_nothing_is_said_where_answers_were_not_to_be_kept(tmp_path: Path) -> None:
    run = run_of(tmp_path, one="off", two="off")
    comparison = compare(*run.configurations)
    assert comparison.pairs[0].agreement is None
    assert comparison_document(comparison)["pairs"][0]["agreement"] is None
    assert "answers" not in render_text(comparison)


def test_a_comparison_says_which_answers_differ_in_every_form(tmp_path: Path) -> None:
    run = run_of(tmp_path, one=[SAME, SAME], two=[OTHER, OTHER], three=[SAME, SAME])
    comparison = compare_configurations(run, run.configurations[0], run.configurations[1:])
    text = " ".join(render_text(comparison).split())
    assert "answers differ (2 two): equal output ids for 50.0 % of 4 requests (95 %: 6.8–93.2 %)" in text
    assert "answers agree (3 three): equal output ids for 100.0 % of 4 requests (95 %: 39.8–100.0 %)" in text
    assert "1, in the next cycle 4 100.0 39.8–100.0 4.0 – 4.0" in text
    assert "2 4 50.0 6.8–93.2 2.5" in text
    assert "(Clopper and Pearson)" in text
    assert "| 2 | 4 | 50.0 | 6.8–93.2 | 2.5 |" in render_markdown(comparison)
    document = comparison_document(comparison)["pairs"][0]["agreement"]
    assert (document["equal_ratio"], document["prefix_tok"], document["null_reason"]) == (0.5, 2.5, None)
    assert [pair["agreement"]["equal_ratio"] for pair in comparison_document(comparison)["pairs"]] == [0.5, 1.0]


def test_answers_that_vary_from_cycle_to_cycle_show_as_such(tmp_path: Path) -> None:
    run = run_of(tmp_path, one=[SAME, OTHER, SAME], two=[SAME, SAME, SAME])
    found = repeatability_of(run.configurations[0])
    assert found is not None
    assert found.value is not None
    assert (found.value.equal_ratio, found.value.answers) == (0.5, 8)
    # Every cycle with prompts of its own has nothing to repeat.
    run = run_of(tmp_path / "drawn", one=[{0: (1,)}, {1: (1,)}], two=[{0: (1,)}, {1: (1,)}])
    assert repeatability_of(run.configurations[0]) is None


def test_along_an_axis_each_is_compared_with_its_counterpart(tmp_path: Path) -> None:
    options = {
        name: {"requested": {"fp_precision": precision, "pytorch": {"batch_size": size}}}
        for name, precision, size in (
            ("a", "float32", 1),
            ("b", "float32", 8),
            ("c", "bfloat16", 1),
            ("d", "bfloat16", 8),
        )
    }
    run = run_of(tmp_path, options=options, a=SAME, b=OTHER, c=OTHER, d=OTHER)
    (pair,) = compare_along(run, "precision", None).pairs
    assert pair.agreement is not None
    assert pair.agreement.value is not None
    assert (pair.agreement.value.equal_ratio, pair.agreement.value.answers) == (0.75, 8)
