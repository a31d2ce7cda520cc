"""The sampler beside an experiment whose host cannot read the meters."""

from __future__ import annotations

from pathlib import Path

from lem.config.experiment import ExperimentConfig
from lem.meters.samples import ClockPair, read_tail
from lem.worker.channel import RunRequest
from lem.worker.sampling import WorkerSampler
from tests.processes import wait_for


def request(path: Path) -> RunRequest:
    config = ExperimentConfig.from_dict({"model": "any", "gpus": []}).to_dict()
    return RunRequest(
        config, {"experiment_id": "e"}, str(path.parent), "key", True, samples_path=str(path), is_sampler_due=True
    )


def test_a_sampler_that_ends_by_itself_says_how(tmp_path: Path) -> None:
    sampler = WorkerSampler()
    sampler.begin(request(tmp_path / "nowhere" / "samples.part"))
    told = wait_for(sampler.reap)
    assert "exit code 1" in told
    assert "cannot be written: No such file or directory" in told
    assert sampler.reap() is None


def test_a_sampler_that_was_told_to_end_is_reaped_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "samples.part"
    sampler = WorkerSampler()
    sampler.begin(request(path))
    wait_for(lambda: path.exists() or None)
    sampler.end()
    wait_for(lambda: any(isinstance(row, ClockPair) for row in read_tail(path)) or None)
    assert sampler.reap() is None
    sampler.kill()
