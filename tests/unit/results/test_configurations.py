"""The list of a run's configurations: how it is kept, merged, and read when it is broken."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from lem.record import write_record
from lem.results.configurations import (
    CONFIGURATIONS_FILE,
    ListedConfiguration,
    read_listing,
    write_listing,
)
from lem.results.merge import gather, write_merged
from lem.results.run import read_run
from lem.results.store import Repository
from tests.records import make_record

RUN = "20260714T100000Z-3fa1"
SMALL, LARGE = (make_record(config_name=name).identity.config_hash for name in ("small", "large"))


def host(folder: Path, name: str, **listed: str) -> Path:
    """The results of a host that ran the configuration `small`, with its list unless that is empty."""
    record = make_record(run_id=RUN, host=name, cycle=len(name))
    attempt = Repository(folder / name, "demo").prepare_attempt(RUN, record.identity.experiment_id)
    write_record(attempt.result_path, record)
    items = [ListedConfiguration(digest, label) for digest, label in ((SMALL, "tiny"), (LARGE, "huge"))]
    if listed:
        write_listing(folder / name / "demo" / RUN, [item for item in items if item.config_name in listed.values()])
    return folder / name


@pytest.mark.parametrize(
    ("lists", "merged", "labels"),
    [
        (({"a": "tiny"}, {"a": "tiny", "b": "huge"}), [SMALL, LARGE], {"tiny @ h1", "tiny @ h22"}),
        # A host whose lem kept no list: what it ran must not look removed.
        (({"b": "huge"}, {}), None, {"small @ h1", "small @ h22"}),
    ],
)
def test_the_lists_of_hosts_are_merged_where_all_have_one(
    tmp_path: Path, lists: tuple[dict[str, str], ...], merged: list[str] | None, labels: set[str]
) -> None:
    folders = [host(tmp_path, name, **listed) for name, listed in zip(("h1", "h22"), lists, strict=True)]
    write_merged(gather(folders), tmp_path / "all")
    listing = read_listing(tmp_path / "all" / "demo" / RUN)
    assert (None if listing is None else [*listing]) == merged
    run = read_run(tmp_path / "all", "demo", RUN)
    assert {item.name for item in run.configurations} == labels
    assert run.removed == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")
def test_a_folder_that_may_not_be_looked_into_has_no_list() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = host(Path(name), "h1", a="tiny") / "demo" / RUN
        (folder / CONFIGURATIONS_FILE).unlink()
        (folder / "private").mkdir(mode=0o700)
        for place in (Path(name), *folder.parents[:3], folder):
            place.chmod(0o755)
        os.seteuid(65534)
        try:
            assert read_listing(folder) is None
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("content", ["", "{", '{"configurations": 1}', '{"configurations": [{"config_hash": 5}]}'])
def test_a_broken_list_is_reported_and_names_are_those_of_the_results(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    folder = host(tmp_path, "h1", a="tiny")
    (folder / "demo" / RUN / CONFIGURATIONS_FILE).write_text(content)
    assert [item.name for item in read_run(folder, "demo", RUN).configurations] == ["small"]
    assert "is corrupt" in caplog.text
