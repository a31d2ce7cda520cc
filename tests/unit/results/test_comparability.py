"""What two configurations should have in common, and what a difference in it does to the verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest

from lem.base.reasons import Reason
from lem.record import Gpu, Record
from lem.results.comparability import blocking_reason, environment_changes, find_obstacles
from lem.results.compare import compare_configurations, compare_runs
from lem.results.comparison import comparison_document, render_text
from lem.results.metrics import parse_metric
from lem.results.report import render_report
from lem.results.report.content import compose
from lem.results.run import make_run
from tests.records import make_record
from tests.synthetic_campaign import Campaign, Configuration

BASE = Campaign((Configuration("one"),), cycles=2, has_samples=False)


def records(**changes: Any) -> Sequence[Record]:
    return dataclasses.replace(BASE, **changes).records()


LESS = Configuration("one", output_tok_ratio=0.9)


def changed(name: str, **values: Any) -> list[Record]:
    record = make_record()
    return [dataclasses.replace(record, **{name: dataclasses.replace(getattr(record, name), **values)})]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (records(), records(seed=2), []),
        (records(), [], []),
        (records(), records(gpu_serial=5), ["other cards: GPU-00000001 against GPU-00000005; their sensors differ by"]),
        (records(), records(gpu_count=2), []),  # the same card and another is a setting
        (records(), records(configurations=(dataclasses.replace(LESS, output_tok_ratio=0.995),)), []),
        (records(), records(configurations=(LESS,)), ["other output lengths: 128 against 115.2 tokens a request"]),
        (
            [make_record()],
            changed("environment", cpu="other", cpu_count=4),
            ["other CPU: x86-64 × 2 against"],
        ),
        ([make_record()], changed("window", traffic_mode="poisson"), ["other traffic: closed batch against poisson"]),
    ],
)
def test_what_differs_is_an_obstacle_unless_it_is_a_setting(
    before: Sequence[Record], after: Sequence[Record], expected: list[str]
) -> None:
    found = [item.reason.text for item in find_obstacles(before, after)]
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == expected


def test_over_an_anchor_what_it_shares_blocks_nothing_and_work_still_does() -> None:
    moved = records(gpu_serial=5, driver="580.1", power_limit_w=350.0, prompts="b" * 64)
    found = find_obstacles(records(), moved, (records(), moved))
    assert [(item.reason.code, item.is_blocking, item.is_confounder) for item in found] == [
        ("other_cards", False, False),
        ("other_driver", False, False),
        ("other_power_limit", False, False),
        ("other_prompts", True, False),
    ]
    assert blocking_reason(found, "energy") == found[3].reason
    apart = find_obstacles(records(), moved, (records(), records(gpu_serial=5)))
    assert [(item.reason.code, item.is_blocking) for item in apart[:3]] == [
        ("other_cards", False),
        ("other_driver", True),
        ("other_power_limit", False),
    ]
    assert [item.is_confounder for item in apart[:3]] == [False, False, True]


def test_another_meter_blocks_energy_alone() -> None:
    other = records(configurations=(Configuration("one", energy_source="power_instant_integral"),))
    found = find_obstacles(records(), other)
    expected = Reason.of("other_meter", before="nvml_counter", after="power_instant_integral")
    assert blocking_reason(found, "energy") == expected
    assert blocking_reason(found, "throughput") is None


def with_gpus(given: Sequence[Record], **changes: Any) -> list[Record]:
    def changed_gpu(gpu: Gpu) -> Gpu:
        return dataclasses.replace(gpu, **changes)

    return [dataclasses.replace(item, gpus=tuple(map(changed_gpu, item.gpus))) for item in given]


def with_environment(given: Sequence[Record], **changes: Any) -> list[Record]:
    return [dataclasses.replace(it, environment=dataclasses.replace(it.environment, **changes)) for it in given]


def with_machine(given: Sequence[Record], **changes: Any) -> list[Record]:
    return [dataclasses.replace(item, machine=dataclasses.replace(item.machine, **changes)) for item in given]


def versions(**changes: str) -> dict[str, str]:
    return {**records()[0].environment.versions, **changes}


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (records(), records(power_limit_w=350.0), "other power limit: 700 W against 350 W"),
        (
            with_gpus(records(), sm_clock_app_hz=1.98e9),
            with_gpus(records(), sm_clock_app_hz=1.41e9),
            "other clocks: 1980 MHz against 1410 MHz",
        ),
        (
            with_gpus(records(), clocks_set=False),
            with_gpus(records(), clocks_set=True),
            "other clocks: not limited against limited by a setting",
        ),
        (records(), with_environment(records(), cpu="other"), "other CPU beside the GPU: x86-64 × 2 against other × 2"),
        (
            records(),
            with_environment(records(), governor="powersave"),
            "other CPU settings: governor performance against governor powersave",
        ),
        (
            with_machine(records(), turbo=True, smt=True),
            with_machine(records(), turbo=True, smt=False),
            "other CPU settings: governor performance, turbo on, SMT on against governor performance, turbo on, SMT o",
        ),
        (records(), with_environment(records(), kernel="6.12.0"), "other kernel: 6.1.0 against 6.12.0"),
        (records(), with_environment(records(), engine_version="0.33.0"), "other engine: vllm "),
        (
            records(),
            with_environment(records(), versions=versions(torch="2.14.0")),
            "other libraries: torch 2.13.0 against torch 2.14.0",
        ),
    ],
)
def test_a_setting_or_version_that_differs_is_named_beside_the_verdict(
    before: Sequence[Record], after: Sequence[Record], text: str
) -> None:
    (found,) = find_obstacles(before, after)
    assert found.reason.text[: len(text)] == text
    assert (found.is_blocking, found.is_confounder) == (False, True)


def test_what_is_compared_is_no_confounder() -> None:
    one, other = records(), records(configurations=(Configuration("one", backend="pytorch"),))
    assert find_obstacles(one, other) == ()
    limited = [
        dataclasses.replace(item, requested={**item.requested, "gpu": {"power_limit_w": 350}})
        for item in records(power_limit_w=350.0)
    ]
    assert find_obstacles(one, limited) == ()
    newer = Configuration("one", engine_version="0.33.0")
    assert [item.reason.code for item in find_obstacles(one, records(configurations=(newer,)))] == ["other_engine"]
    old, new = (
        records(configurations=(dataclasses.replace(item, options={"image": f"reg/{name}"}),))
        for name, item in (("old", Configuration("one")), ("new", newer))
    )
    assert find_obstacles(old, new) == ()


ENERGY = parse_metric("energy")
FAST, SLOW = (Configuration(name, energy_per_output_tok_j=joules) for name, joules in (("fast", 0.18), ("slow", 0.2)))
ANCHOR = Configuration("anchor", batch_size=64)
BOTH = dataclasses.replace(BASE, configurations=(SLOW, dataclasses.replace(FAST, batch_size=2)), cycles=5)


def at_350_w(given: Sequence[Record], *names: str) -> list[Record]:
    return [
        item if item.identity.config_name not in names else with_gpus([item], power_limit_w=350.0)[0] for item in given
    ]


def test_within_a_run_another_power_limit_is_named_in_the_answer_the_document_and_the_report() -> None:
    run = make_run(at_350_w(BOTH.records(), "fast"))
    comparison = compare_configurations(run, run.with_results[0], run.with_results[1:], metrics=(ENERGY,))
    limit = "other power limit: 700 W against 350 W"
    text = " ".join(render_text(comparison).split())
    assert text.startswith(f"confounded: {limit}")
    assert f"; confounded by {limit}." in text
    document = comparison_document(comparison)
    assert limit in document["sentence"]
    assert document["pairs"][0]["obstacles"] == [
        {"code": "other_power_limit", "text": limit, "is_blocking": False, "is_confounder": True}
    ]
    assert comparison.pairs[0].rows[0].is_found
    assert "other power limit: 700 W against 350 W" in render_report(compose(run)).replace("\u00a0", " ")
    assert json.dumps(document)


def test_between_runs_another_power_limit_gives_no_verdict_without_an_anchor() -> None:
    before = make_run(dataclasses.replace(BASE, configurations=(SLOW,), cycles=5).records())
    later = dataclasses.replace(BASE, configurations=(SLOW,), cycles=5, run_id="20260801T100000Z-0b0b")
    after = make_run(at_350_w(later.records(), "slow"))
    (pair,) = compare_runs(before, after, metrics=(ENERGY,)).pairs
    assert [item.reason.code for item in pair.obstacles if item.is_confounder] == ["other_power_limit"]
    assert pair.rows[0].p_adjusted is None


def test_an_environment_that_changed_between_cycles_is_named() -> None:
    mixed = [*records(), *with_gpus(with_environment(records(), kernel="6.12.0"), power_limit_w=350.0)]
    assert environment_changes(mixed) == ["power limit (350 W, 700 W)", "kernel (6.1.0, 6.12.0)"]
    assert environment_changes(records()) == []
