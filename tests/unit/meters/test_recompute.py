from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lem.base import measurement as names
from lem.base.reasons import Reason
from lem.meters.attempt import Baselines
from lem.meters.external import ExternalReadings
from lem.meters.recompute import RawData, has_energy, recompute
from lem.meters.samples import FINISHED_FILENAME, read_finished, write_finished
from lem.record import Record, decode_record, encode_record
from tests.doubles.nvml.traces import Counter, GpuProcess
from tests.doubles.powercap import Zone
from tests.records import make_record, with_measured
from tests.scripted_attempt import Attempt, at, config, cpu_attempt, gpu_attempt

OPTIONS = {"measurement": {"grid_g_per_kwh": 300, "pue": 1.2, "price_per_kwh": 0.25}}


def recorded(attempt: Attempt, options: dict[str, Any] = OPTIONS, **arguments: Any) -> Record:
    """The record of the attempt, as read back from JSON."""
    record = make_record()
    found = attempt.measured(options=options, window_repeats=record.window.window_repeats, **arguments)
    environment = dataclasses.replace(record.environment, gpu_uuids=attempt.uuids)
    whole = with_measured(record, found, config(**options).measurement)
    return decode_record(encode_record(dataclasses.replace(whole, environment=environment)))


def again(attempt: Attempt, folder: Path, options: dict[str, Any] = OPTIONS, **arguments: Any) -> Any:
    """The recorded attempt beside its log, both as read back from disk."""
    write_finished(folder / FINISHED_FILENAME, attempt.log, attempt.marks)
    log, marks = read_finished(folder / FINISHED_FILENAME)
    return recompute(recorded(attempt, options, **arguments), config(**options), RawData(log, marks))


@pytest.mark.parametrize(
    ("attempt", "least"),
    [
        (gpu_attempt(2, has_prefill=True), 55),
        (gpu_attempt(counter=None), 35),
        (gpu_attempt(counter=Counter(resets_s=(20.0,))), 25),
        (gpu_attempt(mig=True), 15),
        (cpu_attempt(Zone("intel-rapl:0", "package-0", ((0, 90.0),), begins_ns=at(-2))), 14),
        (cpu_attempt(), 1),  # how often the load of the CPU was read
    ],
    ids=["two GPUs", "no counter", "reset", "MIG", "RAPL", "no meter"],
)
def test_a_record_agrees_with_its_own_samples_and_only_figures_count(
    attempt: Attempt, least: int, tmp_path: Path
) -> None:
    found = again(attempt, tmp_path)
    assert (found.differences, found.notes) == ((), ())
    assert found.agrees
    assert least <= found.compared < 1.5 * least + 3, "what is absent on both sides is no figure"


def test_a_baseline_from_before_is_taken_from_the_record(tmp_path: Path) -> None:
    attempt = gpu_attempt().without(names.IDLE_BARE, names.IDLE_LOADED)
    assert again(attempt, tmp_path, baselines=Baselines(61.0, 71.0, 900.0)).agrees


def test_a_process_that_was_there_before_the_load_still_takes_the_energy_away(tmp_path: Path) -> None:
    attempt = gpu_attempt(processes=(GpuProcess(4711),))
    record = recorded(attempt.without(names.LOAD))
    found = recompute(record, config(**OPTIONS), RawData(attempt.log, attempt.marks))
    (difference,) = [item for item in found.differences if item.field == "energy.gpu_energy_j"]
    assert difference.recomputed is None


def test_a_figure_that_was_changed_is_named_with_both_values() -> None:
    attempt = gpu_attempt()
    record = recorded(attempt)
    energy = dataclasses.replace(record.energy, gpu_energy_j=2222.0)
    gpu = dataclasses.replace(record.gpus[0], temp_max_c=None, null_reasons={"temp_max_c": Reason.of("not_reported")})
    changed = dataclasses.replace(record, energy=energy, gpus=(gpu,))
    changed_j, lost_c = recompute(changed, config(**OPTIONS), RawData(attempt.log, attempt.marks)).differences
    assert (changed_j.field, changed_j.recorded) == ("energy.gpu_energy_j", 2222.0)
    assert changed_j.recomputed == pytest.approx(3000, rel=0.01)
    assert (lost_c.field, lost_c.recorded, lost_c.recomputed) == ("gpus[0].temp_max_c", None, 40.0)


def test_the_log_of_another_gpu_does_not_agree() -> None:
    record = recorded(gpu_attempt())
    other = gpu_attempt(uuid="GPU-other")
    assert not recompute(record, config(**OPTIONS), RawData(other.log, other.marks)).agrees


def test_what_a_lost_csv_said_is_left_out_and_told() -> None:
    options = {"measurement": {"external_csv": "plug.csv"}}
    readings = ExternalReadings("plug.csv", tuple(1767225600.0 + place / 10 for place in range(400)), (500.0,) * 400)
    for attempt, least in ((gpu_attempt(), 30), (cpu_attempt(), 1)):
        record = recorded(attempt, options, external=readings)
        assert record.energy.external_energy_j == pytest.approx(5000)
        found = recompute(record, config(**options), RawData(attempt.log, attempt.marks))
        assert found.agrees
        assert found.compared >= least
        assert "energy.external_energy_j" in found.notes[0]
        whole = recompute(record, config(**options), RawData(attempt.log, attempt.marks, readings))
        assert (whole.agrees, whole.notes) == (True, ())
        assert whole.compared > found.compared


def test_a_record_without_any_figure_of_a_meter_is_known() -> None:
    assert not has_energy(make_record())
    assert has_energy(recorded(gpu_attempt()))
