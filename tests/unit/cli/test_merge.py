from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lem.base.errors import UserError
from lem.record import Record, read_record, write_record
from lem.results.merge import FleetPlan, HostPart, PlannedExperiment, gather, write_merged, write_plan
from lem.results.stopping import StoppingRule, Target, read_stopping_rule, write_stopping_rule
from lem.results.store import Repository
from tests.command_rig import Output, run_lem
from tests.records import make_record

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 120
RUN = "20260714T100000Z-3fa1"
ANCHOR, OTHER = "a" * 16, "b" * 16


def store(folder: Path, record: Record) -> Path:
    attempt = Repository(folder / "results", "demo").prepare_attempt(
        record.identity.run_id, record.identity.experiment_id
    )
    (attempt.path / "log.txt").write_text(f"on {record.identity.host}\n")
    write_record(attempt.result_path, record)
    return attempt.result_path


def anchor(host: str, cycle: int = 0, **more: object) -> Record:
    return make_record(config_name="short", config_hash=ANCHOR, host=host, cycle=cycle, **more)


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[Path, Path]:
    """Two hosts that ran an anchor, and one of them another configuration."""
    for host in ("gpu1", "gpu2"):
        for cycle in (0, 1):
            store(tmp_path / host, anchor(host, cycle, output_tok_per_s=100.0 if host == "gpu1" else 102.0))
    store(tmp_path / "gpu2", make_record(config_name="long", config_hash=OTHER, host="gpu2"))
    return tmp_path / "gpu1", tmp_path / "gpu2"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    experiments = [PlannedExperiment(f"{ANCHOR[:12]}-c{cycle + 1}", "short", ANCHOR, cycle) for cycle in (0, 1)]
    experiments += [PlannedExperiment(f"{OTHER[:12]}-c{cycle + 1}", "long", OTHER, cycle) for cycle in (0, 1)]
    ids = tuple(item.exp_id for item in experiments)
    parts = (HostPart("gpu1", ids[:2]), HostPart("gpu2", ids))
    stored = FleetPlan("fe01ce2a", "demo", "c" * 16, RUN, "shard", ANCHOR, tuple(experiments), parts)
    write_plan(tmp_path / "plan.json", stored)
    return tmp_path / "plan.json"


@pytest.fixture
def merge(tmp_path: Path, hosts: tuple[Path, Path]) -> Callable[..., Output]:
    return lambda *words: run_lem("merge", *hosts, "--output", tmp_path / "all", *words)


def results_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("result.json"))


def files_below(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_results_keep_their_bytes_and_a_host_is_a_block_for_every_reader(
    tmp_path: Path, hosts: tuple[Path, Path], merge: Callable[..., Output]
) -> None:
    rule = StoppingRule(Target(0.02, None), 5, 20)
    write_stopping_rule(hosts[1] / "results" / "demo" / RUN, rule)
    (hosts[0] / "results" / "demo" / RUN / f"{ANCHOR[:12]}-c1" / "attempt-1" / "link").symlink_to("/etc/hostname")
    code, out, _ = merge()
    assert (code, "5 results of 2 hosts" in out) == (0, True)
    folder = tmp_path / "all" / "demo" / RUN
    assert read_stopping_rule(folder) == rule
    assert results_below(folder) == [
        f"{ANCHOR[:12]}-c1+gpu1/attempt-1/result.json",
        f"{ANCHOR[:12]}-c1+gpu2/attempt-1/result.json",
        f"{ANCHOR[:12]}-c2+gpu1/attempt-1/result.json",
        f"{ANCHOR[:12]}-c2+gpu2/attempt-1/result.json",
        f"{OTHER[:12]}-c1+gpu2/attempt-1/result.json",
    ]
    source = files_below(hosts[1] / "results" / "demo" / RUN / f"{OTHER[:12]}-c1" / "attempt-1")
    target = files_below(folder / f"{OTHER[:12]}-c1+gpu2" / "attempt-1")
    assert {name: content for name, (content, _) in target.items()} == {name: it for name, (it, _) in source.items()}
    assert {path.name for path in folder.rglob("*") if path.parent.name == "attempt-1"} == {"result.json", "log.txt"}
    document = json.loads(run_lem("results", "show", "demo", "--results-dir", tmp_path / "all", "--json").out)
    found = {item["config_name"]: item["n_cycles"] for item in document["configurations"]}
    assert found == {"short @ gpu1": 2, "short @ gpu2": 2, "long": 1}


def test_merging_again_changes_nothing_and_identical_results_count_once(
    tmp_path: Path, hosts: tuple[Path, Path], merge: Callable[..., Output]
) -> None:
    merge()
    before = files_below(tmp_path / "all")
    code, out, _ = run_lem("merge", *hosts, hosts[0], "--output", tmp_path / "all")
    assert (code, "0 of them new" in out, files_below(tmp_path / "all") == before) == (0, True, True)


def test_merged_results_have_a_line_each_and_are_not_opened_again(
    tmp_path: Path, hosts: tuple[Path, Path], merge: Callable[..., Output]
) -> None:
    Repository(hosts[0] / "results", "demo").scan()  # one host has an index, the other has none
    merge()
    repository = Repository(tmp_path / "all", "demo")
    paths = sorted((tmp_path / "all").rglob("result.json"))
    records = {path: read_record(path) for path in paths}
    for path in paths:
        stamp = path.stat()
        path.write_bytes(bytes(stamp.st_size))
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    found = repository.scan()
    assert found.problems == ()
    by_path = {item.path: item.record for item in found.results}
    assert by_path.keys() == records.keys()
    assert all(by_path[path].energy == records[path].energy for path in paths)


def test_a_merge_that_ends_early_is_completed_by_the_next_with_all_recorded_digests(
    tmp_path: Path, hosts: tuple[Path, Path], merge: Callable[..., Output]
) -> None:
    for host in hosts:
        repository = Repository(host / "results", "demo")
        for item in repository.scan().results:
            repository.record_result(RUN, item)
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
seen = []
def end_at_third(name, arguments):
    if name == "lem.rename" and arguments[0].endswith("attempt-1"):
        seen.append(arguments)
        if len(seen) == 3:
            os._exit(9)
sys.addaudithook(end_at_third)
from lem.cli.main import main
main(sys.argv[1:])
"""
    words = [sys.executable, "-c", program, "merge", *map(str, hosts), "--output", str(tmp_path / "all")]
    assert subprocess.run(words, check=False, timeout=TIMEOUT_S).returncode == 9
    assert len(results_below(tmp_path / "all" / "demo" / RUN)) >= 2
    assert merge()[0] == 0
    found = Repository(tmp_path / "all", "demo").scan(is_checked=True)
    assert [item.is_recorded for item in found.results] == [True] * 5


def test_results_of_another_host_join_those_of_this_one(hosts: tuple[Path, Path]) -> None:
    own = hosts[0] / "results"
    before = results_below(own)
    code, out, err = run_lem("merge", own, hosts[1], "--output", own)
    following = f"next: lem check demo --results-dir {own}\n"
    assert (code, err, "5 results of 2 hosts" in out, "3 of them new" in out) == (0, following, True, True)
    assert set(before) < set(results_below(own))
    assert len(results_below(own)) == 5


@pytest.mark.parametrize(
    ("one", "two", "words", "complaint"),
    [
        (
            anchor("localhost", output_tok_per_s=100.0),
            anchor("localhost", output_tok_per_s=101.0),
            (),
            "same key but different content",
        ),
        (
            anchor("gpu1", output_tok_per_s=100.0),
            anchor("gpu2", output_tok_per_s=102.0),
            ("--anchor-tolerance", "1.5%"),
            "differ by 2.0 % in output_tok_per_s",
        ),
        (  # energy is compared before speed
            anchor("gpu1", energy_per_output_tok_j=1.0),
            anchor("gpu2", energy_per_output_tok_j=1.2),
            (),
            "20.0 % in energy_per_output_tok_j",
        ),
    ],
)
def test_results_that_contradict_each_other_are_refused_and_nothing_is_written(
    tmp_path: Path, plan: Path, one: Record, two: Record, words: tuple[str, ...], complaint: str
) -> None:
    store(tmp_path / "one", one)
    store(tmp_path / "two", two)
    words = ("--output", str(tmp_path / "all"), "--plan", str(plan), *words)
    code, _, err = run_lem("merge", tmp_path / "one", tmp_path / "two", *words)
    assert (code, complaint in err, (tmp_path / "all").exists()) == (2, True, False)


def test_damaged_results_and_other_runs_are_named_and_left_out(
    tmp_path: Path, hosts: tuple[Path, Path], plan: Path, merge: Callable[..., Output]
) -> None:
    broken = hosts[0] / "results" / "demo" / RUN / f"{ANCHOR[:12]}-c1" / "attempt-1" / "result.json"
    broken.write_bytes(broken.read_bytes()[:-40])
    store(hosts[0], anchor("gpu1", run_id="20260101T000000Z-aaaa"))
    _, out, err = merge("--plan", plan)
    assert "4 results" in out
    assert f"left out: corrupt: {broken}" in err
    assert "not in the run of the plan: 20260101T000000Z-aaaa" in out
    assert len(results_below(tmp_path / "all")) == 4


@pytest.mark.parametrize("damage", ["cut off", "text", "of another run", "folder"])
@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_damaged_result_is_exit_code_1_also_without_a_plan(
    hosts: tuple[Path, Path], merge: Callable[..., Output], damage: str, words: tuple[str, ...]
) -> None:
    broken = hosts[0] / "results" / "demo" / RUN / f"{ANCHOR[:12]}-c1" / "attempt-1" / "result.json"
    content = broken.read_bytes()
    broken.unlink()
    if damage == "folder":
        broken.mkdir()
    else:
        changed = {
            "cut off": content[:-40],
            "text": b"x",
            "of another run": content.replace(RUN.encode(), b"20260101T1"),
        }
        broken.write_bytes(changed[damage])
    assert merge(*words).code == 1


@pytest.mark.parametrize("text", ["{}", "{"])
def test_a_result_that_changes_while_it_is_merged_is_not_written(
    tmp_path: Path, hosts: tuple[Path, Path], text: str
) -> None:
    gathered = gather([hosts[0]])
    gathered.results[0].path.write_text(text)
    with pytest.raises(UserError, match="it changed while it was copied"):
        write_merged(gathered, tmp_path / "all")
    assert results_below(tmp_path / "all") == []


def test_an_experiment_that_failed_is_no_damage(hosts: tuple[Path, Path], merge: Callable[..., Output]) -> None:
    Repository(hosts[0] / "results", "demo").prepare_attempt(RUN, f"{OTHER[:12]}-c3")
    assert merge().code == 0


def test_planned_results_without_measurement_are_missing(
    tmp_path: Path, hosts: tuple[Path, Path], plan: Path, merge: Callable[..., Output]
) -> None:
    code, out, _ = merge("--plan", plan, "--json")
    document = json.loads(out)
    assert (code, document["lacking"]) == (1, [{"host": "gpu2", "exp_id": f"{OTHER[:12]}-c2"}])
    assert document["configurations"]["long"] == {"gpu2": {"planned": 2, "present": 1, "valid": 1}}
    assert document["anchor"]["spread"] == pytest.approx(0.02)
    table = merge("--plan", plan).out
    assert ["long", "–", "1/2"] in [line.split() for line in table.splitlines()]
    assert f"missing: {OTHER[:12]}-c2 (gpu2)" in table
    code, out, _ = run_lem("merge", hosts[0], "--output", tmp_path / "half", "--plan", plan)
    assert (code, "hosts cannot be compared" in out) == (1, True)
    assert ["short", "2/2", "0/2"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "no such folder"),
        (["empty"], "no campaign"),
        (["two"], "several campaigns: demo, other"),
        (["two", "--campaign", "third"], "no complete result of campaign third"),
        (["two", "--anchor-tolerance", "much"], "expected a percentage"),
        (["two", "--anchor-tolerance", "0.05"], "add the % sign"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, words: list[str], expected: str) -> None:
    (tmp_path / "empty").mkdir()
    for campaign in ("demo", "other"):
        record = make_record()
        attempt = Repository(tmp_path / "two", campaign).prepare_attempt(RUN, record.identity.experiment_id)
        write_record(attempt.result_path, record)
    words = [str(tmp_path / words[0]), *words[1:]]
    code, _, err = run_lem("merge", *words, "--output", tmp_path / "all")
    assert (code, expected in err, (tmp_path / "all").exists()) == (2, True, False)


def store_fleet(folder: Path, tok_per_s: Mapping[str, float]) -> tuple[str, ...]:
    """The anchor on every host, and its plan; the words of `lem merge`."""
    for host, value in tok_per_s.items():
        store(folder / host, anchor(host, output_tok_per_s=value))
    experiment = PlannedExperiment(f"{ANCHOR[:12]}-c1", "short", ANCHOR, 0)
    parts = tuple(HostPart(host, (experiment.exp_id,)) for host in tok_per_s)
    write_plan(folder / "p.json", FleetPlan("fe01ce2a", "demo", "c" * 16, RUN, "shard", ANCHOR, (experiment,), parts))
    hosts = [str(folder / host) for host in tok_per_s]
    return ("merge", *hosts, "--output", str(folder / "all"), "--plan", str(folder / "p.json"))


def test_a_host_far_from_the_median_is_left_out_and_named_and_the_others_are_merged(tmp_path: Path) -> None:
    words = store_fleet(tmp_path, {"a": 98.0, "b": 100.0, "c": 102.0, "d": 87.0, "e": 101.0})
    code, out, _ = run_lem(*words, "--json")
    document = json.loads(out)
    assert (code, document["hosts"], document["results"]) == (1, ["a", "b", "c", "e"], 4)
    assert document["anchor"]["median"] == pytest.approx(100)
    assert document["anchor"]["outliers"] == {"d": pytest.approx(0.87)}
    assert "left out: d, -13.0 % from the median in output_tok_per_s" in run_lem(*words).out
    assert [path for path in results_below(tmp_path / "all") if path.endswith("+d/attempt-1/result.json")] == []


@pytest.mark.parametrize("values", [(100.0, 100.0, 120.0, 120.0), (80.0, 100.0, 125.0)])
def test_hosts_without_a_majority_near_the_median_are_refused(tmp_path: Path, values: tuple[float, ...]) -> None:
    words = store_fleet(tmp_path, {f"h{place}": value for place, value in enumerate(values)})
    code, _, err = run_lem(*words)
    assert (code, "the hosts differ by" in err, (tmp_path / "all").exists()) == (2, True, False)


def test_a_hundred_hosts_whose_anchors_scatter_by_one_percent_are_merged_in_a_table_of_80_columns(
    tmp_path: Path,
) -> None:
    normal = statistics.NormalDist(math.log(100), 0.01)
    spread = [math.exp(normal.inv_cdf((place + 0.5) / 100)) for place in range(100)]
    assert max(spread) / min(spread) > 1.05
    words = store_fleet(tmp_path, {f"gpu-node-{place:03}": value for place, value in enumerate(spread)})
    code, out, _ = run_lem(*words)
    assert (code, "100 results of 100 hosts" in out) == (0, True)
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
    assert ["gpu-node-042", "1", "1/1"] in [line.split() for line in out.splitlines()]
