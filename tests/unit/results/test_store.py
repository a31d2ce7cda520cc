from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lem.base import durable
from lem.base.errors import InfrastructureError, UserError
from lem.record import Record, write_record
from lem.results.store import AttemptFolder, Repository, Scan, count_failed, folder_names
from tests.faulty_disk import failing
from tests.records import make_record

RUN = "20260714T100000Z-3fa1"
EXPERIMENT = "0123456789ab-c1"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "results", "demo")


def store(repository: Repository, record: Record) -> AttemptFolder:
    """A result where the worker would leave it; its attempt is the folder's number."""
    attempt = repository.prepare_attempt(record.identity.run_id, record.identity.experiment_id)
    write_record(attempt.result_path, record)
    return attempt


def kinds(scan: Scan) -> list[str]:
    return [problem.kind for problem in scan.problems]


def test_every_attempt_takes_the_next_number_and_changes_no_other(repository: Repository, tmp_path: Path) -> None:
    first = store(repository, make_record())
    assert first.path == tmp_path / "results" / "demo" / RUN / EXPERIMENT / "attempt-1"
    assert (first.result_path, first.log_path) == (first.path / "result.json", first.path / "log.txt")
    before = first.result_path.read_bytes()
    with failing("lem.fsync_dir"), pytest.raises(InfrastructureError):
        repository.prepare_attempt(RUN, EXPERIMENT)
    assert [repository.prepare_attempt(RUN, EXPERIMENT).number for _ in range(2)] == [3, 4]
    assert first.result_path.read_bytes() == before


def test_attempts_are_ordered_by_number_not_by_text(repository: Repository) -> None:
    for number in range(1, 12):
        store(repository, make_record(attempt=number))
    found = repository.find_attempts(RUN, EXPERIMENT)
    assert [item.record for item in found] == [make_record(attempt=number) for number in range(1, 12)]


def test_config_is_written_whole(repository: Repository) -> None:
    attempt = repository.prepare_attempt(RUN, EXPERIMENT)
    config = attempt.write_config({"model": "${MODEL}"}, {"model": {"name": "tiny"}})
    assert durable.read_sealed(config) == {
        "schema_version": 1,
        "requested": {"model": "${MODEL}"},
        "resolved": {"model": {"name": "tiny"}},
    }
    config.write_bytes(config.read_bytes().replace(b"tiny", b"tinz"))
    with pytest.raises(ValueError, match="does not match its checksum"):
        durable.read_sealed(config)
    assert [item.name for item in attempt.path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("event", ["lem.write", "lem.fsync", "lem.rename", "lem.fsync_dir"])
def test_a_disk_that_is_full_in_the_middle_stops_the_campaign_with_the_remedy(
    repository: Repository, event: str
) -> None:
    attempt = repository.prepare_attempt(RUN, EXPERIMENT)
    with failing(event, errno.ENOSPC):
        with pytest.raises(InfrastructureError, match="no space left on device") as caught:
            attempt.write_config({}, {})
        assert "--resume" in caught.value.hint


def test_a_folder_that_cannot_be_made_in_the_middle_stops_the_campaign(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(InfrastructureError, match="expected a folder, found a file"):
        repository.prepare_attempt(RUN, EXPERIMENT)


@pytest.mark.parametrize("where", ["results", "results/demo"])
def test_a_file_in_place_of_the_results_folder_is_told_before_the_start(
    repository: Repository, tmp_path: Path, where: str
) -> None:
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("in the way")
    with pytest.raises(UserError, match="expected a folder, found a file") as caught:
        repository.check_writable()
    assert "--results-dir" in caught.value.hint


@pytest.mark.parametrize(
    ("code", "said", "remedy"), [(errno.ENOSPC, "no space", "free"), (errno.EROFS, "read-only", "writable")]
)
def test_a_folder_that_is_full_or_read_only_is_told_before_the_start(
    repository: Repository, code: int, said: str, remedy: str
) -> None:
    with failing("lem.write", code), pytest.raises(UserError, match=said) as caught:
        repository.check_writable()
    assert remedy in caught.value.hint
    repository.check_writable()
    assert list(repository.folder.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        make_record(run_id="another-run"),
        make_record(cycle=1),
        make_record(config_hash="f" * 16),
        make_record(attempt=2),
    ],
    ids=["run", "cycle", "configuration", "attempt"],
)
def test_the_record_of_another_experiment_is_foreign_and_never_adopted(repository: Repository, other: Record) -> None:
    write_record(repository.prepare_attempt(RUN, EXPERIMENT).result_path, other)
    assert repository.find_attempts(RUN, EXPERIMENT) == ()
    scan = repository.scan(RUN)
    assert (scan.results, kinds(scan)) == ((), ["foreign"])


@pytest.mark.parametrize("data", [b"", b"{", b"\x00\xff\xfe\x80", b"[" * 100_000, b"{}", b'"text"'], ids=repr)
def test_a_result_that_is_no_record_is_corrupt_and_never_raised(repository: Repository, data: bytes) -> None:
    attempt = repository.prepare_attempt(RUN, EXPERIMENT)
    attempt.result_path.write_bytes(data)
    assert repository.find_attempts(RUN, EXPERIMENT) == ()
    problem = repository.scan().problems[0]
    assert (problem.kind, problem.path) == ("corrupt", attempt.result_path)
    assert (problem.run_id, problem.exp_id) == (RUN, EXPERIMENT)


def test_a_truncated_result_is_corrupt_and_an_earlier_one_still_counts(repository: Repository) -> None:
    store(repository, make_record())
    second = store(repository, make_record(attempt=2))
    whole = second.result_path.read_bytes()
    second.result_path.write_bytes(whole[: len(whole) // 2])
    assert [found.record.identity.attempt for found in repository.find_attempts(RUN, EXPERIMENT)] == [1]
    assert kinds(repository.scan()) == ["corrupt"]


def test_what_is_in_the_place_of_a_result_has_a_name(repository: Repository) -> None:
    repository.prepare_attempt(RUN, EXPERIMENT).write_config({}, {})
    cut_off = repository.prepare_attempt(RUN, EXPERIMENT)
    (cut_off.path / ".lem-tmp-abc").write_bytes(b'{"schema')
    folder = repository.prepare_attempt(RUN, EXPERIMENT)
    folder.result_path.mkdir()
    (folder.path.parent / "attempt-4").write_text("no folder")
    assert kinds(repository.scan()) == ["missing", "half-written", "unreadable", "unreadable"]
    assert repository.find_attempts(RUN, EXPERIMENT) == ()


def test_a_file_in_place_of_the_campaign_is_a_problem_of_the_scan(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("no folder")
    assert kinds(Repository(tmp_path, "demo").scan()) == ["unreadable"]
    assert kinds(Repository(tmp_path, "demo").scan(RUN)) == ["unreadable"]
    with pytest.raises(UserError, match="expected a folder, found a file"):
        folder_names(tmp_path / "demo")
    assert folder_names(tmp_path / "nowhere") == ()


def test_a_scan_sees_every_run_and_a_scan_of_a_run_only_that(repository: Repository) -> None:
    for run_id in ("run-a", "run-b"):
        for cycle in (0, 1):
            store(repository, make_record(run_id=run_id, cycle=cycle))
    assert folder_names(repository.folder) == ("run-a", "run-b")
    assert folder_names(repository.folder / "run-a") == ("0123456789ab-c1", "0123456789ab-c2")
    assert len(repository.scan().results) == 4
    assert {result.record.identity.run_id for result in repository.scan("run-b").results} == {"run-b"}


def test_a_link_in_a_run_that_leads_back_to_it_counts_no_result_twice(repository: Repository) -> None:
    part = Repository(repository.folder.parent, "demo", "part-1")
    store(part, make_record(run_id=RUN))
    for name in ("loop", "part-1/loop"):
        (repository.run_folder(RUN) / name).symlink_to(repository.run_folder(RUN))
    assert [item.path.parents[2].name for item in repository.scan(RUN).results] == ["part-1"]


def test_experiments_without_a_whole_result_are_counted_by_configuration(repository: Repository) -> None:
    store(repository, make_record(config_name="small"))
    repository.prepare_attempt(RUN, EXPERIMENT)  # failed once more: it has a result all the same
    repository.prepare_attempt(RUN, "0123456789ab-c2")  # another cycle of `small`
    repository.prepare_attempt(RUN, "0123456789ab-c2")
    repository.prepare_attempt(RUN, "ffffffffffff-c1").write_config({}, {"config_name": "large"})
    for cycle in (1, 2):
        repository.prepare_attempt(RUN, f"eeeeeeeeeeee-c{cycle}")  # nothing tells its name
    assert count_failed(repository.scan()) == {"small": 1, "large": 1, "eeeeeeeeeeee": 2}


@pytest.mark.parametrize("data", [b"", b"[]", b'{"resolved": 5}', b'{"resolved": {"config_name": null}}', b"\xff"])
def test_a_damaged_configuration_leaves_the_name_of_the_experiments_folder(repository: Repository, data: bytes) -> None:
    (repository.prepare_attempt(RUN, EXPERIMENT).path / "config.json").write_bytes(data)
    assert count_failed(repository.scan()) == {EXPERIMENT.removesuffix("-c1"): 1}
