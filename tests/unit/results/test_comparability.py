"""What stands between two sets of records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lem.base.reasons import Reason
from lem.record import Record
from lem.results.metrics import blocking_reason, find_obstacles
from tests.records import make_record
from tests.synthetic_campaign import Campaign, Configuration

BASE = Campaign((Configuration("one"),), cycles=2, has_samples=False)


def records(**changes: Any) -> Sequence[Record]:
    return dataclasses.replace(BASE, **changes).records()


def texts(before: Sequence[Record], after: Sequence[Record], **options: Any) -> list[str]:
    return [item.reason.text for item in find_obstacles(before, after, **options)]


def test_the_same_thing_twice_has_no_obstacle() -> None:
    assert find_obstacles(records(), records(seed=2)) == ()


def test_nothing_on_one_side_has_no_obstacle() -> None:
    assert find_obstacles(records(), []) == ()


def test_another_card_of_the_kind_is_an_obstacle() -> None:
    assert texts(records(), records(gpu_serial=5)) == [
        "other cards: GPU-00000001 against GPU-00000005; their sensors differ by up to ±5 %"
    ]


def test_more_cards_that_hold_the_others_are_a_setting() -> None:
    assert texts(records(), records(gpu_count=2)) == []


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


def test_lengths_that_differ_by_less_than_a_hundredth_are_the_same() -> None:
    near = records(configurations=(Configuration("one", output_tok_ratio=0.995),))
    far = records(configurations=(Configuration("one", output_tok_ratio=0.9),))
    assert texts(records(), near) == []
    assert texts(records(), far) == ["other output lengths: 128 against 115.2 tokens a request"]


def test_another_cpu_is_an_obstacle_where_it_does_the_work() -> None:
    one = make_record()
    other = dataclasses.replace(one, environment=dataclasses.replace(one.environment, cpu="other", cpu_count=4))
    assert texts([one], [other]) == ["other CPU: x86-64 × 2 against other × 4"]
    gpus = records()
    moved = [dataclasses.replace(item, environment=dataclasses.replace(item.environment, cpu="other")) for item in gpus]
    assert texts(gpus, moved) == []


def test_another_traffic_is_an_obstacle() -> None:
    one = make_record()
    other = dataclasses.replace(one, window=dataclasses.replace(one.window, traffic_mode="poisson"))
    assert texts([one], [other]) == ["other traffic: closed batch against poisson"]
