"""What was recorded on a real GPU (tests/recorded) comes to the figures that it came to there."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path

import pytest

from lem.config.experiment import ExperimentConfig
from lem.meters.curve import counter_curve, update_period_s
from lem.meters.recompute import RawData, recompute
from lem.meters.samples import FINISHED_FILENAME, PartReader, SampleLog, read_finished
from lem.record import read_record
from tests.gpu.load import Busy
from tests.gpu.windows import COUNTER, counted_j, naive_j, span_of

H200 = Path(__file__).parents[2] / "recorded" / "h200"
GUARD_S = 1.5


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> SampleLog:
    path = tmp_path_factory.mktemp("h200") / "samples.part"
    path.write_bytes(gzip.decompress((H200 / "additivity.jsonl.gz").read_bytes()))
    return PartReader(path).read()


@pytest.fixture(scope="module")
def windows() -> tuple[list[Busy], Busy]:
    """Three windows of 10 s, and the one of 30 s."""
    document = json.loads((H200 / "additivity.json").read_text(encoding="utf-8"))
    return [Busy(**part) for part in document["parts"]], Busy(**document["whole"])


def test_short_windows_add_up_to_a_long_one(log: SampleLog, windows: tuple[list[Busy], Busy]) -> None:
    parts, whole = windows

    def ratio(energies_j: list[float], whole_j: float) -> float:
        return sum(energies_j) / sum(part.seconds for part in parts) / (whole_j / whole.seconds)

    closed = ratio([counted_j(log, part, GUARD_S) for part in parts], counted_j(log, whole, GUARD_S))
    naive = ratio([naive_j(log, part) for part in parts], naive_j(log, whole))
    assert abs(closed - 1) < 0.001
    assert abs(naive - 1) > 2 * abs(closed - 1)


def test_a_real_counter_is_regular_enough_for_its_updates_to_be_placed(log: SampleLog) -> None:
    curve = counter_curve(log.counters, 0, COUNTER)
    bounds_ms = [(high - low) / 1e6 for low, high in zip(curve.earliest_ns, curve.latest_ns, strict=True)]
    assert statistics.median(bounds_ms) < 3
    polls_ms = [(row.at_ns - row.before_ns) / 1e6 for row in log.counters]
    assert statistics.median(polls_ms) > 18


def test_the_update_period_of_a_real_counter(log: SampleLog, windows: tuple[list[Busy], Busy]) -> None:
    assert update_period_s(log.counters, 0, span_of(windows[1])) == pytest.approx(0.1, rel=0.001)


def test_a_real_attempt_is_worked_out_alike_today() -> None:
    document = json.loads((H200 / "attempt" / "config.json").read_text(encoding="utf-8"))
    config = ExperimentConfig.from_dict(document["resolved"])
    log, marks = read_finished(H200 / "attempt" / FINISHED_FILENAME)
    found = recompute(read_record(H200 / "attempt" / "result.json"), config, RawData(log, marks))
    assert found.agrees, found.differences
