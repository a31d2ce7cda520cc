from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lem.base.doc import text_width
from lem.base.measurement import Measured
from lem.meters.samples import FINISHED_FILENAME
from lem.orchestration.manifest import (
    COMPLETED,
    Attempt,
    CampaignManifest,
    CampaignManifestEntry,
    ManifestManager,
)
from lem.record import read_with_digest
from lem.results.index import INDEX_FILE
from lem.results.store import Repository, StoredResult
from tests.command_rig import Output, run_lem
from tests.unit.cli.test_recompute import RUN, measured_record, store


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two results as a campaign leaves them: their digests in the index and in the manifest."""
    monkeypatch.chdir(tmp_path)
    entries = []
    for cycle in range(2):
        path = store(Path("results"), measured_record(cycle)) / "result.json"
        record, digest = read_with_digest(path)
        Repository(Path("results"), "demo").record_result(RUN, StoredResult(str(path), record, digest))
        identity, attempt = record.identity, Attempt(1, str(path), True, host="lab1", result_sha256=digest)
        entry = CampaignManifestEntry(identity.experiment_id, "small", "", identity.config_hash, "pytorch", None, cycle)
        entry.status, entry.result_path, entry.attempts = COMPLETED, str(path), (attempt,)
        entries.append(entry)
    at = "2026-07-14T10:00:00Z"
    manifest = CampaignManifest("fe01ce2a", "demo", at, at, "c" * 16, 2, entries, run_id=RUN)
    ManifestManager(Path(".state/demo/campaign_manifest.json")).save(manifest)
    return tmp_path


def verify(*words: str) -> Output:
    return run_lem("verify", *words)


def document(*words: str) -> Any:
    return json.loads(verify(*words, "--json").out)


def result_of(place: Path, cycle: int = 1) -> Path:
    (path,) = place.glob(f"results/demo/{RUN}/*-c{cycle}/attempt-1/result.json")
    return path


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize("wanted", ["demo", RUN, "results/demo", f"results/demo/{RUN}"])
def test_results_that_are_as_measured_and_agree_with_their_samples(place: Path, wanted: str) -> None:
    code, out, err = verify(wanted)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "2 of 2 results agree with digest and raw data."
    assert out.count("index and manifest") == 2
    assert max(map(text_width, out.splitlines())) <= 80
    found = document(wanted)
    assert found["counts"] == {"agrees": 2, "differs": 0, "not verified": 0}
    assert [item["digests"] for item in found["results"]] == [{"index": "agrees", "manifest": "agrees"}] * 2


def test_one_result_can_be_named_by_its_file_folders_or_name(place: Path) -> None:
    path = result_of(place)
    for wanted in (path, path.parent, path.parents[1], path.parents[1].name, f"{RUN}/{path.parents[1].name}"):
        assert [item["path"] for item in document(str(wanted))["results"]] in (
            [str(path)],
            [str(path.relative_to(place))],
        )


@pytest.mark.parametrize("levels", range(6))
def test_results_of_the_parts_of_a_plan_can_be_named_by_every_folder(place: Path, levels: int) -> None:
    run = place / "results" / "demo" / RUN
    experiments = []
    for number, experiment in enumerate(sorted(run.glob("*-c*")), 1):
        (run / f"part-{number}").mkdir()
        experiments.append(Path(shutil.move(experiment, run / f"part-{number}")))
    first = experiments[0]
    wanted = [first / "attempt-1" / "result.json", first / "attempt-1", first, first.parent, run, run.parent]
    found = document(str(wanted[levels]))
    assert (found["problems"], len(found["results"])) == ([], 1 if levels < 4 else 2)
    assert {item["verdict"] for item in found["results"]} == {"agrees"}


def test_a_throughput_edited_by_hand_is_found_by_its_digest(place: Path) -> None:
    path = result_of(place)
    document_before = json.loads(path.read_text(encoding="utf-8"))
    rate = document_before["throughput"]["output_tok_per_s"]
    # All that follows from it is edited, too, so that the record does not contradict itself.
    document_before["window"]["window_s"] /= 2
    for name in ("output_tok_per_s", "total_tok_per_s", "requests_per_s"):
        document_before["throughput"][name] *= 2
    path.write_text(json.dumps(document_before), encoding="utf-8")
    assert rate > 0
    code, out, err = verify("demo")
    assert code == 1
    assert f"altered: {path.relative_to(place)}: its SHA-256 is " in err
    assert out.splitlines()[-1] == "1 of 2 results agree with digest and raw data; 1 differ or are damaged."
    assert run_lem("check", "demo").code == 4
    (problem,) = document("demo")["problems"]
    assert problem["kind"] == "altered"


def test_the_manifest_knows_a_digest_where_the_index_is_gone(place: Path) -> None:
    path = result_of(place)
    (place / "results" / "demo" / RUN / INDEX_FILE).unlink()
    assert [item["digests"] for item in document("demo")["results"]] == [{"manifest": "agrees"}] * 2
    edit(path, lambda text: text + "\n")
    code, out, _ = verify("demo")
    assert code == 1
    assert "its SHA-256 is not the one in the manifest: it was changed after it was measured" in " ".join(out.split())
    assert verify("demo", "--state-dir", "elsewhere").code == 4


def test_an_edited_result_reaches_no_table_where_the_index_is_gone(place: Path) -> None:
    path = result_of(place)
    (place / "results" / "demo" / RUN / INDEX_FILE).unlink()
    edit(path, lambda text: text + "\n")
    for _ in range(2):  # the second time by the index that the first made
        assert json.loads(run_lem("results", "list", "--json").out)[0]["valid"] == 1
        assert len(run_lem("results", "export", "demo").out.splitlines()) == 2
        (damage,) = (
            item for item in json.loads(run_lem("check", "demo", "--json").out)["findings"] if item["kind"] == "damaged"
        )
        assert str(path.relative_to(place)) in damage["text"]
        assert json.loads(run_lem("results", "show", "demo", "--json").out)["problems"][0]["kind"] == "altered"


def test_a_result_without_a_recorded_digest_does_not_count_as_agreeing(place: Path) -> None:
    store(Path("results"), measured_record(2))
    code, out, _ = verify("demo")
    assert code == 4
    assert "1 result: no digest of it was recorded" in out
    assert out.splitlines()[-1] == "2 of 3 results agree with digest and raw data; 1 could not be verified."


def test_a_result_with_nothing_to_recompute_it_from_does_not_count_as_agreeing(place: Path) -> None:
    result_of(place).with_name(FINISHED_FILENAME).unlink()
    code, out, _ = verify("demo")
    assert code == 4
    assert "1 result: nothing was recomputed: no such file: samples.jsonl.gz" in " ".join(out.split())
    assert document("demo")["counts"] == {"agrees": 1, "differs": 0, "not verified": 1}


def test_a_result_without_its_output_ids_is_compared_with_its_samples_and_does_not_count_as_agreeing(
    place: Path,
) -> None:
    record = measured_record(2)
    record = dataclasses.replace(record, work=record.work.having(output_ids_sha256=Measured("0" * 64)))
    path = store(Path("results"), record) / "result.json"
    found, digest = read_with_digest(path)
    Repository(Path("results"), "demo").record_result(RUN, StoredResult(str(path), found, digest))
    code, out, _ = verify("demo")
    assert (code, "1 result: no such file: output_ids.jsonl.gz" in out) == (4, True)
    statuses = {item["figures"]["status"]: item["figures"]["compared"] for item in document("demo")["results"]}
    assert statuses["incomplete"] == statuses["agrees"] > 30
    assert document("demo")["counts"] == {"agrees": 2, "differs": 0, "not verified": 1}


def test_a_figure_that_does_not_follow_from_the_samples_differs_although_its_digest_agrees(place: Path) -> None:
    record = measured_record(2)
    record = dataclasses.replace(record, energy=dataclasses.replace(record.energy, counter_update_period_s=1.5))
    path = store(Path("results"), record) / "result.json"
    found, digest = read_with_digest(path)
    Repository(Path("results"), "demo").record_result(RUN, StoredResult(str(path), found, digest))
    code, out, _ = verify("demo")
    assert code == 1
    assert "energy.counter_update_period_s: recorded 1.5, recomputed 0.1" in " ".join(out.split())


@pytest.mark.parametrize("name", ["config.json", FINISHED_FILENAME])
def test_damaged_raw_data_are_said_and_nothing_is_called_recomputed(place: Path, name: str) -> None:
    path = result_of(place).with_name(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert verify("demo").code in (1, 4)
    assert document("demo")["counts"]["agrees"] == 1


@pytest.mark.parametrize("wanted", ["nothing", "."])
def test_nothing_to_verify_is_an_error(place: Path, wanted: str) -> None:
    assert place.exists()
    code, out, err = verify(wanted)
    assert (code, out) == (2, "")
    assert wanted in err
