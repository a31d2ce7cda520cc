from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from lem.base.reasons import Reason
from lem.record import Record
from lem.results.metrics import (
    blocking_reason,
    differing_settings,
    find_obstacles,
    headline_settings,
    settings_of,
    shared_settings,
)
from tests.records import make_gpu, make_record
from tests.synthetic_campaign import Campaign, Configuration


def test_settings_are_those_of_the_heading_then_the_options_given() -> None:
    record = make_record(
        requested={
            "model": {"name": "m"},
            "backend": "pytorch",
            "fp_precision": "float16",
            "max_output_tokens": 32,
            "config_name": "x",
            "extra_metadata": {"note": "n"},
            "pytorch": {"batch_size": 1, "compile": {"enabled": True}, "devices": [0, 1], "none": None},
        }
    )
    assert settings_of(record) == {
        "backend": "pytorch",
        "model": "tiny-llama",
        "precision": "float16",
        "device": "cpu",
        "traffic": "closed batch",
        "engine": "transformers 5.23.0",
        "max_output_tokens": "32",
        "pytorch.batch_size": "1",
        "pytorch.compile.enabled": "true",
        "pytorch.devices": "0, 1",
        "pytorch.none": "null",
    }


def test_gpus_of_one_kind_are_counted_and_models_are_short() -> None:
    record = dataclasses.replace(make_record(), gpus=(make_gpu(), make_gpu()))
    assert settings_of(record)["GPU"] == "2 × H200"
    assert "GPU" not in settings_of(make_record())
    assert headline_settings(make_record(model="org/model"))["model"] == "org/model"
    assert headline_settings(make_record(model="./here/model"))["model"] == "model"


def test_what_all_have_is_shared_and_the_rest_differs() -> None:
    one, other = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}
    assert shared_settings([one, other]) == {"a": "1"}
    assert differing_settings([one, other]) == {"b": ("2", "9"), "c": ("3", None), "d": (None, "4")}
    assert shared_settings([]) == {}
    assert differing_settings([]) == {}


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


def test_over_an_anchor_cards_and_drivers_of_their_own_block_nothing_and_work_still_does() -> None:
    found = find_obstacles(records(), records(gpu_serial=5, driver="580.1", prompts="b" * 64), is_anchored=True)
    assert [(item.reason.code, item.is_blocking) for item in found] == [
        ("other_cards", False),
        ("other_driver", False),
        ("other_prompts", True),
    ]
    assert blocking_reason(found, "energy") == found[2].reason


def test_another_meter_blocks_energy_alone() -> None:
    other = records(configurations=(Configuration("one", energy_source="power_instant_integral"),))
    found = find_obstacles(records(), other)
    expected = Reason.of("other_meter", before="nvml_counter", after="power_instant_integral")
    assert blocking_reason(found, "energy") == expected
    assert blocking_reason(found, "throughput") is None


def test_another_cpu_is_no_obstacle_where_gpus_do_the_work() -> None:
    moved = [
        dataclasses.replace(item, environment=dataclasses.replace(item.environment, cpu="other")) for item in records()
    ]
    assert find_obstacles(records(), moved) == ()
