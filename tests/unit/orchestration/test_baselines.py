from __future__ import annotations

import dataclasses
from typing import Any

from lem.base.measurement import EnergySource
from lem.meters.sources import Baselines
from lem.orchestration.host_meters import BARE, BaselineBook, Reference
from lem.record import Idle, Record
from tests.records import make_record

KEY, GPUS = "key-1", ("GPU-a",)


def record(*, reused: bool = False, source: str | None = "nvml_counter", **idle: Any) -> Record:
    """A record of that power at rest; what is not given was not measured."""
    base = make_record()
    fields = [item.name for item in dataclasses.fields(Idle) if item.name != "null_reasons"]
    reasons = {name: "not measured" for name in fields if idle.get(name) is None}
    return dataclasses.replace(
        base,
        idle=Idle(**idle, null_reasons=reasons),
        energy=dataclasses.replace(base.energy, energy_source=source),
        environment=dataclasses.replace(base.environment, gpu_uuids=GPUS),
        validity=dataclasses.replace(base.validity, engine_reused=reused),
    )


MEASURED = record(
    idle_bare_power_w=70.0,
    idle_bare_temp_c=35.0,
    idle_loaded_power_w=95.0,
    idle_loaded_temp_c=41.0,
    baseline_age_s=0.0,
)


def test_what_was_measured_is_known_until_it_is_too_old():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    assert book.known(GPUS, KEY, ttl_s=60, now_s=130.0) == {EnergySource.COUNTER: Baselines(70.0, 95.0, 30.0)}
    assert book.known(GPUS, KEY, ttl_s=60, now_s=161.0) == {}


def test_another_engine_has_the_bare_baseline_alone():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    assert book.known(GPUS, "key-2", ttl_s=60, now_s=100.0) == {EnergySource.COUNTER: Baselines(bare_power_w=70.0)}
    assert book.known(("GPU-b",), KEY, ttl_s=60, now_s=100.0) == {}


def test_a_baseline_that_was_handed_on_does_not_become_young_again():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    book.note(record(idle_bare_power_w=70.0, idle_loaded_power_w=95.0, baseline_age_s=50.0), KEY, now_s=150.0)
    assert book.known(GPUS, KEY, ttl_s=60, now_s=170.0) == {}


def test_what_one_meter_told_is_not_known_of_another():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    book.note(record(source="rapl", idle_loaded_power_w=40.0, baseline_age_s=0.0), KEY, now_s=110.0)
    known = book.known(GPUS, KEY, ttl_s=60, now_s=110.0)
    assert known == {EnergySource.COUNTER: Baselines(70.0, 95.0, 10.0), "rapl": Baselines(None, 40.0, 0.0)}


def test_what_a_cpu_takes_is_no_reference_for_gpus():
    book = BaselineBook()
    book.note(dataclasses.replace(MEASURED, energy=record(source="rapl").energy), KEY, now_s=100.0)
    assert book.reference(GPUS, KEY) is None


def test_nothing_is_learned_where_nothing_was_measured():
    book = BaselineBook()
    book.note(record(source=None), KEY, now_s=0.0)
    assert book.known(GPUS, KEY, ttl_s=60, now_s=0.0) == {}


def test_the_reference_is_the_first_baseline_of_a_state():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    warmer = dataclasses.replace(MEASURED.idle, idle_loaded_temp_c=55.0, idle_loaded_power_w=110.0)
    book.note(dataclasses.replace(MEASURED, idle=warmer), KEY, now_s=200.0)
    assert book.reference(GPUS, KEY) == Reference(95.0, 41.0)
    assert book.reference(GPUS, BARE) == Reference(70.0, 35.0)
    assert book.reference(GPUS, "key-2") is None
