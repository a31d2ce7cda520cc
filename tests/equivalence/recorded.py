"""What both builds are made to do with results that are there: every figure must be the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tests.equivalence.builds import ROOT, Build
from tests.equivalence.scenes import Scene
from tests.equivalence.synthetic import FOLDERS, synthetic_folder

RECORDED = ROOT / "tests" / "recorded"


def recorded_scenes(old: Build) -> Iterator[Scene]:
    """Scenes on the recordings of this repository, and on results that the old test tools made up."""
    attempt = RECORDED / "h200" / "attempt"
    identity = json.loads((attempt / "result.json").read_text(encoding="utf-8"))["identity"]
    place = "/".join(("results", identity["campaign_name"], identity["run_id"], identity["experiment_id"], "attempt-1"))
    yield from _scenes_of("h200", {place: {"copy": str(attempt)}}, identity["campaign_name"], old)
    for name in ("demo", "two-backends", "interrupted"):
        folder = RECORDED / name
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: the recordings belong to this repository")
        files = {path.name: {"copy": str(path)} for path in sorted(folder.iterdir()) if path.is_dir()}
        yield from _scenes_of(name, _state_shown(files), _campaign_in(folder / "results"), old)
    made_up = synthetic_folder(old)
    for name in FOLDERS:
        files = {path.name: {"copy": str(path)} for path in sorted((made_up / name).iterdir())}
        yield from _scenes_of(f"synthetic-{name}", files, _campaign_in(made_up / name / "results"), old)
    yield from _merge_scenes(made_up)


def _state_shown(files: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The recordings hold `state`, since a folder with a dot is easily overlooked; lem looks for `.state`."""
    return {(".state" if name == "state" else name): content for name, content in files.items()}


def _campaign_in(results: Path) -> str:
    return min(path.name for path in results.iterdir() if path.is_dir())


def _scenes_of(name: str, files: dict[str, dict[str, str]], campaign: str, old: Build) -> Iterator[Scene]:
    experiments, runs, configurations = _contents(files)
    steps = [("results", "list"), ("results", "list", "--json"), ("status",), ("status", "--json")]
    steps += [("status", campaign), ("status", campaign, "--json"), ("check", campaign), ("check", campaign, "--json")]
    for run in runs:
        steps += [("results", "show", run), ("results", "show", run, "--json"), ("check", run)]
    steps += [("results", "recompute", campaign), ("results", "recompute", campaign, "--json")]
    for experiment in experiments[:6]:
        steps += [("results", "show", experiment), ("results", "show", experiment, "--json")]
        steps += [("results", "recompute", experiment)]
    yield Scene(f"{name}/results", tuple(steps), files)
    yield Scene(f"{name}/export", tuple(_export_steps(campaign)), files)
    yield Scene(f"{name}/compare", tuple(_compare_steps(campaign, runs, configurations)), files)
    report = (
        ("report", campaign),
        ("report", campaign, "--output", "-"),
        ("report", campaign, "--json", "-o", "r.html"),
    )
    yield Scene(f"{name}/report", report, files)


def _contents(files: dict[str, dict[str, str]]) -> tuple[list[str], list[str], list[str]]:
    """Experiments (as RUN/EXPERIMENT), runs and configurations below the results folders of a scene."""
    experiments: set[str] = set()
    configurations: dict[str, None] = {}
    for content in files.values():
        for path in sorted(Path(content["copy"]).rglob("result.json")):
            identity = json.loads(path.read_text(encoding="utf-8"))["identity"]
            experiments.add(f"{identity['run_id']}/{identity['experiment_id']}")
            configurations[identity["config_name"]] = None
    return sorted(experiments), sorted({item.split("/")[0] for item in experiments}), list(configurations)


def _export_steps(campaign: str) -> Iterator[tuple[str, ...]]:
    for form in ("csv", "json", "jsonl", "markdown"):
        yield ("results", "export", "--format", form)
        yield ("results", "export", campaign, "--format", form, "--attempts", "all")
        yield ("results", "export", campaign, "--output", f"out.{'md' if form == 'markdown' else form}")
    yield ("results", "export", "--columns", "host,model,cycle_index,output_tok_per_s,energy_per_output_tok_j")
    yield ("results", "export", "--columns", "none")


def _compare_steps(campaign: str, runs: list[str], configurations: list[str]) -> Iterator[tuple[str, ...]]:
    gates = ("output_tok_per_s=3%", "energy_per_output_tok_j=2%", "throughput=0.1%", "ttft_p50_s=5%", "none=3%", "x")
    for form in ((), ("--json",), ("--markdown",)):
        yield ("compare", campaign, *form)
        yield ("compare", campaign, "--gate", gates[0], *form)
        if len(configurations) > 1:
            yield ("compare", campaign, configurations[1], configurations[0], *form)
            yield ("compare", campaign, "--baseline", configurations[-1], "--metric", "energy_per_output_tok_j", *form)
        if len(runs) > 1:
            yield ("compare", *runs[:2], *form)
            yield ("compare", *runs[:2], "--anchor", configurations[0], "--anchor-tolerance", "20%", *form)
            yield ("compare", *runs[:2], "--anchor", configurations[0], "--anchor-tolerance", "0.1%", *form)
            yield ("compare", *runs[:2], "--gate", gates[0], "--strict", *form)
    for gate in gates:
        yield ("compare", campaign, "--gate", gate, "--strict")
        if len(configurations) > 1:
            yield ("compare", campaign, configurations[0], configurations[1], "--gate", gate)
    yield ("compare", campaign, "--gate", gates[0], "--gate", gates[1])
    yield ("compare", campaign, "--baseline", "none")
    yield ("compare", campaign, "--metric", "ttft_p50_s", "--metric", "total_tok_per_s")


def _merge_scenes(made_up: Path) -> Iterator[Scene]:
    files = {name: {"copy": str(made_up / name)} for name in ("host1", "host2", "sweep")}
    files["demo"] = {"copy": str(RECORDED / "demo")}
    steps = (
        ("merge", "host1", "host2", "--output", "all"),
        ("merge", "host1", "host2", "host1/results", "--output", "all", "--json"),
        ("results", "show", "demo", "--results-dir", "all"),
        ("results", "show", "demo", "--results-dir", "all", "--json"),
        ("compare", "demo", "--results-dir", "all"),
        ("check", "demo", "--results-dir", "all"),
        ("results", "export", "--results-dir", "all"),
        ("report", "demo", "--results-dir", "all", "--output", "-"),
        ("merge", "host1", "sweep", "--output", "other"),
        ("merge", "host1", "sweep", "--output", "other", "--campaign", "sweep"),
        ("merge", "host1", "none", "--output", "third"),
        ("merge", "demo", "host1", "--output", "fourth"),
        ("merge", "demo", "--output", "fifth", "--anchor-tolerance", "x"),
        ("merge", "demo", "--output", "fifth", "--anchor-tolerance", "1%", "--json"),
    )
    yield Scene("merge", steps, files)
