"""Energy of experiments in real containers whose host cannot read the meters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lem.base import measurement
from lem.meters.samples import FINISHED_FILENAME, PART_FILENAME, read_finished
from tests.doubles.nvml.traces import Counter, GpuTrace, Load, Trace
from tests.weather.rig import WeatherRig

pytestmark = [pytest.mark.needs("lab", "gcc"), pytest.mark.timeout(300)]

UUID = "GPU-11111111-2222-3333-4444-555555555555"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[WeatherRig]:
    with WeatherRig(tmp_path, outputs=(8,)).cleaned() as rig:
        text = (rig.folder / "c.yaml").read_text()
        text = text.replace("gpus: [[]]", "gpus: [['0']]\n    baseline.enabled: [false]")
        rig.write(text.replace("min_window_sec: [0.01]", "min_window_sec: [1.0]"))
        load_log = rig.shared / "load"
        load_log.touch()
        rig.give_gpu(*trace(rig).lines())
        rig.be(token_s=0.01, gpus=[UUID], load_log=str(load_log))
        yield rig


def trace(rig: WeatherRig) -> Trace:
    load = Load(str(rig.shared / "load"), idle_w=80.0, busy_w=350.0)
    return Trace(1, (GpuTrace(uuid=UUID, load=load, counter=Counter(period_s=0.02)),))


def test_a_worker_in_a_container_samples_what_its_host_cannot_see(rig: WeatherRig) -> None:
    ended = rig.run("--yes", "-v")
    assert ended.code == 0, ended.err
    assert "worker --sampler" not in ended.err, "the commands that the host runs are told"
    (record,) = rig.records()
    assert record.energy.energy_source == "nvml_counter", record.energy.null_reasons
    (path,) = (rig.folder / "results").rglob(FINISHED_FILENAME)
    log, found = read_finished(path)
    assert log.header.host != record.identity.host, "a container has a host name of its own"
    (window,) = (mark for mark in found if mark.name == measurement.WINDOW)
    true = trace(rig).after_load({0: (rig.shared / "load").read_text()})
    assert record.energy.gpu_energy_j == pytest.approx(true.energy_j(window.opened_ns, window.closed_ns), rel=0.02)
    assert not list((rig.folder / "results").rglob(PART_FILENAME))
    assert rig.workers_left() == ()
