"""Campaign and experiment files, and `--set`: what a person writes."""

from __future__ import annotations

import functools
import json
import re
import zlib
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from lem.config import load
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from tests.fuzz.mutation import arguments_near, bytes_near, text_near, words_near, yaml_near
from tests.fuzz.trial import Find, Outcome, Surface, replaced, run_lem
from tests.unit.config.test_convert import FILES

ROOT = Path(__file__).resolve().parents[2]

_EXPERIMENT: dict[str, Any] = {
    "model": "gpt2",
    "backend": "pytorch",
    "max_output_tokens": 16,
    "prompts": {"type": "synthetic", "input_tokens": 8, "sample_size": 2},
}
_GRID: dict[str, Any] = {
    "campaign_name": "fuzz",
    "model": "gpt2",
    "grid": {
        "backends": ["pytorch", "vllm"],
        "models": ["gpt2", {"name": "a/b", "revision": "main"}],
        "shared": {
            "max_output_tokens": [8, 16],
            "decoder.preset": ["deterministic", None],
            "fp_precision": ["float16"],
        },
        "backend_overrides": {"pytorch": {"batch_size": [1, 4]}, "vllm": {"max_num_seqs": 8}},
    },
    "experiments": [{"config": "e.yaml", "overrides": {"max_output_tokens": 4}}, dict(_EXPERIMENT)],
    "configs": ["e.yaml"],
    "execution": {"cycles": 2, "structure": "shuffled"},
    "schedule": {"at": "02:30", "days": ["mon", "weekends"]},
    "daemon": {"enabled": True, "interval": "6h", "total_duration": "48h"},
    "notification": {"webhook_url": "${HOOK:-https://example.org/x}", "on": ["failure"]},
}
_POSITION = re.compile(r"\A((c|e|base)\.yaml|/\S+):\d+:\d+\Z")  # `_extends` may name any file
_COMMANDS = (
    ("campaign", "c.yaml", "--cycles", "3", "--seed", "7", "--budget", "8h", "--until", "ci=2%", "--max-cycles", "9"),
    ("campaign", "c.yaml", "--warmup-timeout", "1.5", "--config-gap", "0", "--cycle-gap", "3", "--warmup-prompts", "2"),
    ("campaign", "e.yaml", "base.yaml", "--campaign-name", "x", "--model", "gpt2", "--sample-size", "4", "--fresh"),
    ("campaign", "c.yaml", "--shard", "1/2", "--results-dir", "out", "--dataset", "gsm8k", "--preset", "benchmark"),
    ("results", "show", "demo", "--results-dir", "none"),
    ("results", "export", "demo", "--columns", "host,model", "--format", "csv", "--results-dir", "none"),
    ("compare", "a", "b", "--gate", "output_tok_per_s=3%", "--anchor-tolerance", "5%", "--metric", "ttft_p50_s"),
    ("merge", "none", "--output", "out", "--anchor-tolerance", "5%"),
    ("status", "demo", "--state-dir", "none"),
    ("presets", "benchmark"),
    ("config", "fields", "experiment", "--backend", "vllm"),
    ("config", "new", "experiment", "--backend", "vllm"),
    ("experiment", "e.yaml", "--preset", "benchmark", "--set", "streaming=true"),
)
_SETS = (
    "execution.cycles=5",
    "grid.shared.fp_precision=[float16]",
    "grid.backend_overrides.pytorch.batch_size=[1, 2]",
    "io.results_dir=out",
    "notification.webhook_url=${HOOK}",
    "daemon.interval=6h",
    "schedule.days=[mon, tue]",
    "campaign_name=x",
    "experiments=[{config: e.yaml}]",
    "model.name=gpt2",
    "decoder.temperature=0.5",
    "prompts={type: file, path: p.txt}",
    "extra_metadata.a.b=1",
    "pytorch.extra.x={y: 1}",
    "gpus=[]",
)


@functools.cache
def _experiments() -> tuple[dict[str, Any], ...]:
    """Every option there is, by backend, beside files as people write them."""
    full = []
    for backend in ("pytorch", "vllm", "tensorrt"):
        given = {**_EXPERIMENT, "backend": backend, backend: {}, "warmup": {"max_prompts": 20}, "gpus": [0]}
        full.append(json.loads(json.dumps(ExperimentConfig.from_dict(given).to_dict())))
    hub = {"model": {"name": "a/b", "adapter": "x"}, "dataset": {"name": "gsm8k", "sample_size": 3}}
    traffic = {**_EXPERIMENT, "traffic_simulation": {"enabled": True, "target_qps": 2}, "extra_metadata": {"a": [1]}}
    filed = {"model": "gpt2", "prompts": {"type": "file", "path": "p.txt", "sample_size": 1}, "streaming": True}
    return (_EXPERIMENT, hub, traffic, filed, {**_EXPERIMENT, "_extends": "base.yaml"}, *full)


@functools.cache
def _campaigns() -> tuple[dict[str, Any], ...]:
    grid = {"backends": ["pytorch"], "shared": {"max_output_tokens": [8]}}
    least = {"campaign_name": "fuzz", "model": "gpt2", "grid": grid}
    named = {"campaign_name": "fuzz", "experiments": list(_experiments()[:4])}
    whole = {**CampaignConfig.from_dict(least).to_dict(), "num_samples": 2}
    return _GRID, least, named, json.loads(json.dumps(whole))


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("*.yaml")))


def try_file(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A campaign or experiment file: checked, and where it is valid shown, planned and read back."""
    _write_neighbours(folder)
    (folder / "c.yaml").write_bytes(data)
    ran = run_lem("config", "validate", "--json", "c.yaml")
    (report,) = json.loads(ran.out)
    if not report["valid"]:
        for problem in report["problems"]:
            _demand_place(problem)
        return Outcome.REFUSED
    if is_thorough or zlib.crc32(data) % 4 == 0:
        run_lem("config", "show", "c.yaml")
        run_lem("config", "show", "--json", "c.yaml")
    if report["kind"] == "experiment":
        config = load.load_experiment("c.yaml").config
        again = ExperimentConfig.from_dict(config.to_dict())
        if again != config or again.engine_key() != config.engine_key():
            raise Find("traceback", "the resolved configuration does not read back as it is")
        json.dumps(config.identity(), allow_nan=False)
    elif is_thorough or zlib.crc32(data) % 4 == 1:
        run_lem("campaign", "c.yaml", "--dry-run", "--executor", "local", "--no-resume")
    return Outcome.ACCEPTED


def try_neighbour(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A file that a valid one names: an experiment of a campaign, or what an experiment extends."""
    name = ("e.yaml", "base.yaml")[zlib.crc32(data) % 2]
    _write_neighbours(folder)
    main_file = {"e.yaml": {"campaign_name": "x", "configs": ["e.yaml"]}, "base.yaml": {"_extends": "base.yaml"}}[name]
    (folder / "c.yaml").write_text(json.dumps(main_file))
    del is_thorough
    with replaced(folder / name, data):
        ran = run_lem("config", "validate", "--json", "c.yaml")
    (report,) = json.loads(ran.out)
    for problem in report.get("problems", ()):
        _demand_place(problem)
    return Outcome.ACCEPTED if report["valid"] else Outcome.REFUSED


def try_sets(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """`--set` words over a valid campaign and a valid experiment."""
    _write_neighbours(folder)
    words = tuple(data.decode("utf-8", "surrogateescape").split("\n"))
    (folder / "c.yaml").write_text(json.dumps(_GRID))
    is_campaign = zlib.crc32(data) % 2 == 0
    outcomes = {_try_words("c.yaml", words)} if is_campaign or is_thorough else set()
    if not is_campaign or is_thorough:
        outcomes.add(_try_words("e.yaml", words))
    return Outcome.ACCEPTED if Outcome.ACCEPTED in outcomes else Outcome.REFUSED


def _try_words(file: str, words: tuple[str, ...]) -> Outcome:
    arguments = [f"--set={word}" for word in words]  # one that begins with - is a value too
    ran = run_lem("config", "validate", "--json", *arguments, file)
    (report,) = json.loads(ran.out)
    if report["valid"]:
        return Outcome.ACCEPTED
    for problem in report["problems"]:
        at = problem.get("at") or problem["message"]
        if not at.startswith("--set") and problem.get("line") is None:
            raise Find("place", f"neither the word nor a place in the file: {problem}")
    return Outcome.REFUSED


def try_arguments(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """The words of a command line that runs nothing."""
    del is_thorough
    _write_neighbours(folder)
    (folder / "c.yaml").write_text(json.dumps(_GRID))
    words = data.decode("utf-8", "surrogateescape").split("\n")
    words += {"campaign": ["--dry-run", "--executor", "local"], "experiment": ["--dry-run"]}.get(words[0], [])
    ran = run_lem(*words)
    return Outcome.ACCEPTED if ran.code == 0 else Outcome.REFUSED


def try_foreign(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A file of another tool: what is made of it is valid."""
    del is_thorough
    _write_neighbours(folder)
    (folder / "c.yaml").write_bytes(data)
    ran = run_lem("config", "convert", "c.yaml")
    if ran.code != 0:
        return Outcome.REFUSED
    (folder / "converted.yaml").write_text(ran.out, encoding="utf-8")
    checked = run_lem("config", "validate", "converted.yaml")
    if checked.code != 0:
        raise Find("place", f"the result is not valid: {checked.err}\n{ran.out}")
    return Outcome.ACCEPTED


@functools.cache
def _foreign() -> tuple[dict[str, Any], ...]:
    return tuple(yaml.safe_load(text) for text in FILES.values())


def _demand_place(problem: dict[str, Any]) -> None:
    """See that a problem says which line and column of which file it is about."""
    at = f"{problem.get('at')}:{problem.get('line')}:{problem.get('column')}"
    if not _POSITION.match(at):
        raise Find("place", f"no file:line:column: {problem}")


def _write_neighbours(folder: Path) -> None:
    if (folder / "e.yaml").exists():
        return
    (folder / "e.yaml").write_text(json.dumps(_EXPERIMENT))
    (folder / "base.yaml").write_text(json.dumps({"model": "gpt2", "max_input_tokens": 32}))
    (folder / "p.txt").write_text("one\ntwo\n")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")


def _encoded(documents: tuple[dict[str, Any], ...]) -> list[bytes]:
    return [json.dumps(item, indent=1).encode() for item in documents] + [text.encode() for text in _texts()]


SURFACES = (
    Surface("campaign-yaml", lambda: yaml_near(*_campaigns()), try_file, share=4),
    Surface("experiment-yaml", lambda: yaml_near(*_experiments()), try_file, share=4),
    Surface("yaml-text", lambda: text_near(*_texts()), try_file, share=2),
    Surface("yaml-bytes", lambda: bytes_near(*_encoded((*_campaigns(), *_experiments()))), try_file, share=2),
    Surface("named-yaml", lambda: yaml_near(*_experiments()) | st.binary(max_size=40), try_neighbour),
    Surface("set", lambda: words_near(*_SETS), try_sets, share=3),
    Surface("foreign-yaml", lambda: yaml_near(*_foreign()), try_foreign, in_suite=100),
    Surface("arguments", lambda: arguments_near(*_COMMANDS), try_arguments, share=2, in_suite=100),
)
