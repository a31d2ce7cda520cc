from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import EngineReport
from lem.worker.harness import ResidentEngine
from tests.doubles.trivial_engine import TrivialEngine

CONFIG = ExperimentConfig.from_dict({"model": "none"})


class Machine:
    """A device on which engines lie, and its clock, which only a load moves."""

    def __init__(self, load_s: float = 2.0, checks_s: float = 0.0) -> None:
        self.now_ns = 0
        self.load_s = load_s
        self.checks_s = checks_s
        self.on_device: list[TrackedEngine] = []
        self.rules: list[dict[str, object]] = []

    def monotonic_ns(self) -> int:
        return self.now_ns

    def utc_now(self) -> object:
        raise AssertionError("nobody asks for the time of day here")

    def sleep(self, duration_s: float) -> None:
        raise AssertionError("nobody sleeps here")

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> TrackedEngine:
        assert self.on_device == []
        self.now_ns += round(self.load_s * 1e9)
        engine = TrackedEngine(self, config)
        self.on_device.append(engine)
        return engine


class TrackedEngine(TrivialEngine):
    """A trivial engine that takes room on the device until it is closed."""

    def __init__(self, machine: Machine, config: ExperimentConfig) -> None:
        super().__init__({"rules": machine.rules}, config)
        self.machine = machine

    @property
    def report(self) -> EngineReport:
        return dataclasses.replace(super().report, checks_s=self.machine.checks_s)

    def close(self) -> None:
        super().close()
        self.machine.on_device.remove(self)


def resident(machine: Machine) -> ResidentEngine:
    numbers = itertools.count(1)
    return ResidentEngine(machine.load, machine, lambda: f"load-{next(numbers)}")  # type: ignore[arg-type]


def test_the_first_experiment_loads_the_engine():
    engine = resident(Machine(load_s=2.0))

    residence = engine.ensure(CONFIG, "key", {})

    assert (residence.is_reused, residence.load_s, residence.load_id) == (False, 2.0, "load-1")
    assert engine.is_resident("key")


def test_checks_of_what_was_loaded_are_no_part_of_the_load():
    engine = resident(Machine(load_s=2.0, checks_s=0.5))

    assert engine.ensure(CONFIG, "key", {}).load_s == 1.5


def test_the_same_key_reuses_the_engine_and_configures_it():
    machine = Machine()
    engine = resident(machine)
    first = engine.ensure(CONFIG, "key", {})
    other = ExperimentConfig.from_dict({"model": "none", "pytorch": {"batch_size": 4}})

    assert engine.is_resident("key")
    second = engine.ensure(other, "key", {})

    assert second.engine is first.engine
    assert (second.is_reused, second.load_s, second.load_id) == (True, None, "load-1")
    assert second.report.effective["pytorch"] == {"batch_size": 4}


def test_another_key_unloads_the_engine_before_it_loads_the_next():
    machine = Machine()
    engine = resident(machine)
    engine.ensure(CONFIG, "key", {})

    assert not engine.is_resident("other")
    second = engine.ensure(CONFIG, "other", {})

    assert (second.is_reused, second.load_id) == (False, "load-2")
    assert machine.on_device == [second.engine]


@pytest.mark.parametrize("do", ["fail", "crash"])
def test_nothing_is_resident_after_a_load_that_fails(do: str):
    machine = Machine()
    engine = resident(machine)
    machine.rules.append({"at": "load", "do": do})

    with pytest.raises((EngineError, RuntimeError)):
        engine.ensure(CONFIG, "key", {})

    assert not engine.is_resident("key")

    machine.rules.clear()
    assert engine.ensure(CONFIG, "key", {}).is_reused is False


def test_an_engine_that_refuses_an_experiment_stays_for_the_next():
    machine = Machine()
    engine = resident(machine)
    machine.rules.append({"at": "configure", "do": "refuse", "when": {"max_output_tokens": 8}})
    engine.ensure(CONFIG, "key", {})

    with pytest.raises(OptionRefused):
        engine.ensure(ExperimentConfig.from_dict({"model": "none", "max_output_tokens": 8}), "key", {})

    assert engine.ensure(CONFIG, "key", {}).is_reused is True


def test_nothing_counts_as_loaded_after_an_unload_that_fails():
    machine = Machine()
    engine = resident(machine)
    engine.ensure(CONFIG, "key", {})
    machine.rules.append({"at": "unload", "do": "crash"})

    with pytest.raises(RuntimeError):
        engine.unload()

    assert not engine.is_resident("key")
    engine.unload()  # nothing to do
