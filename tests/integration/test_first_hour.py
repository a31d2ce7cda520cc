"""What people type in their first hour: models, prompts, compose files and terms as they have them, and what they get.

Each row is one small input. Those about prompts run on PyTorch in one campaign with a tiny model, since a prompt that
is accepted must also be measured; the others are commands that start no engine.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_rig import run_lem
from tests.processes import Marker

ROOT = Path(__file__).parents[2]
RUN_TIMEOUT_S = 560
pytestmark = pytest.mark.timeout(600)


def lines(*records: Any) -> str:
    """JSON Lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}


# Prompts


@dataclass(frozen=True)
class Shape:
    """A file or folder of prompts, and what is measured of it."""

    name: str
    files: Mapping[str, str]
    prompts: Any  # the value of `prompts`, or of `dataset` where is_dataset
    has: tuple[tuple[str, ...], ...]  # the words that each prompt contains, in order
    lacks: tuple[str, ...] = ()  # words that no prompt contains
    is_dataset: bool = False
    chat_template: str | None = None


def a_file(name: str, content: str, *has: tuple[str, ...], lacks: tuple[str, ...] = ()) -> Shape:
    return Shape(name, {name: content}, {"type": "file", "path": name}, has, lacks)


SHAPES = (
    a_file("lines.txt", "a river\na hill\n", ("a river",), ("a hill",)),
    a_file("windows.txt", "\ufeffa river\r\na hill\r\n", ("a river",), ("a hill",), lacks=("\\ufeff", "\\r")),
    a_file("prompt.jsonl", lines({"prompt": "a river"}, {"prompt": "a hill"}) + "\n", ("a river",), ("a hill",)),
    a_file("text.jsonl", lines({"text": "a river"}), ("a river",)),
    a_file("messages.jsonl", lines({"messages": [user("a river")]}), ("a river",)),
    a_file(
        "system.jsonl",
        lines({"messages": [{"role": "system", "content": "speak plainly"}, user("a river")]}),
        ("speak plainly", "a river"),
    ),
    a_file(
        "several-turns.jsonl",
        lines({"messages": [user("a river"), assistant("it flows"), user("a hill"), assistant("the answer")]}),
        ("a river", "it flows", "a hill"),
        lacks=("the answer",),
    ),
    a_file(
        "tools.jsonl",
        lines(
            {
                "messages": [
                    user("a river"),
                    assistant(None, tool_calls=[CALL]),
                    {"role": "tool", "tool_call_id": "c1", "content": "it rains"},
                ]
            }
        ),
        ("a river", "it rains"),
    ),
    a_file(
        "parts.jsonl",
        lines({"messages": [user([{"type": "text", "text": "a river"}, {"type": "text", "text": "a hill"}])]}),
        ("a river", "a hill"),
    ),
    a_file(
        "batch.jsonl",
        lines(
            {
                "custom_id": "one",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "some-model", "messages": [user("a river")], "max_tokens": 5},
            }
        ),
        ("a river",),
        lacks=("some-model",),
    ),
    a_file(
        "sharegpt.json",
        json.dumps(
            [
                {
                    "id": "x",
                    "conversations": [{"from": "human", "value": "a river"}, {"from": "gpt", "value": "the answer"}],
                }
            ]
        ),
        ("a river",),
        lacks=("the answer",),
    ),
    a_file(
        "lmsys.jsonl",
        lines(
            {"conversation_id": "x", "model": "some-model", "conversation": [user("a river"), assistant("the answer")]}
        ),
        ("a river",),
        lacks=("the answer", "some-model"),
    ),
    a_file(
        "wildchat.jsonl",
        lines(
            {
                "conversation_hash": "x",
                "conversation": [
                    {**user("a river"), "language": "English", "toxic": False},
                    {**assistant("the answer"), "language": "English", "toxic": False},
                ],
            }
        ),
        ("a river",),
        lacks=("the answer", "English"),
    ),
    a_file("mt-bench.jsonl", lines({"question_id": 81, "turns": ["a river", "a hill"]}), ("a river",)),
    a_file(
        "instruction.jsonl",
        lines({"instruction": "name it", "input": "a river", "output": "the answer"}),
        ("name it", "a river"),
        lacks=("the answer",),
    ),
    a_file("lines.json", lines({"prompt": "a river"}, {"prompt": "a hill"}), ("a river",), ("a hill",)),
    a_file("list.json", json.dumps([{"prompt": "a river"}]), ("a river",)),
    a_file("packed.jsonl.gz", lines({"prompt": "a river"}), ("a river",)),
    Shape(
        "a file with a size",
        {"three.txt": "a river\na hill\na lake\n"},
        {"type": "file", "path": "three.txt", "sample_size": 2},
        (("a river",), ("a hill",)),
        ("a lake",),
    ),
    Shape("the short form", {"short.txt": "a river\n"}, "short.txt", (("a river",),)),
    Shape("the short form of a folder", {"in/a/folder.txt": "a river\n"}, "in/a/folder.txt", (("a river",),)),
    Shape(
        "a copy of a hub repository with a licence",
        {"copy/LICENSE.txt": "Permission is hereby\n", "copy/data/train.jsonl": lines({"prompt": "a river"})},
        {"name": "copy"},
        (("a river",),),
        ("Permission",),
        is_dataset=True,
    ),
    Shape(
        "instruction, input and output",
        {"recipes/train.jsonl": lines({"instruction": "name it", "input": "a river", "output": "the answer"})},
        {"name": "recipes"},
        (("name it", "a river"),),
        ("the answer",),
        is_dataset=True,
    ),
    Shape(
        "turns of a tree of messages",
        {
            "tree/train.jsonl": lines(
                {"message_id": "1", "parent_id": None, "role": "prompter", "text": "a river"},
                {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "the answer"},
            )
        },
        {"name": "tree"},
        (("a river",),),
        ("the answer",),
        is_dataset=True,
    ),
    Shape(
        "a chat template in a file",
        {
            "talk.jsonl": lines({"messages": [{"role": "system", "content": "speak plainly"}, user("a river")]}),
            "talk.jinja": "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
        },
        {"type": "file", "path": "talk.jsonl"},
        (("speak plainly", "a river"),),
        chat_template="talk.jinja",
    ),
    Shape(
        "a slice of a split",
        {"sliced/train.jsonl": lines(*({"prompt": text} for text in ("a river", "a hill", "a lake")))},
        {"name": "sliced", "split": "train[:2]"},
        (("a river",), ("a hill",)),
        ("a lake",),
        is_dataset=True,
    ),
)

# One experiment of as little as there can be.
SMALL: Mapping[str, Any] = {
    "gpus": [],
    "fp_precision": "float32",
    "max_output_tokens": 2,
    "warmup": {"enabled": False},
    "baseline": {"enabled": False},
    "measurement": {"min_window_sec": 0.01, "max_wait_pct": None, "max_foreign_pct": None},
}
NO_GAPS = {"cycles": 1, "config_gap_seconds": 0, "cycle_gap_seconds": 0}


def put(folder: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def run_in(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; it leaves none behind."""
    marker = Marker()
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LEM")},
        **marker.environ(),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "LEM_LOCK_DIR": str(folder / "locks"),
        "LEM_CACHE_DIR": str(folder / "cache"),
    }
    try:
        return subprocess.run(
            [sys.executable, "-m", "lem", *shlex.split(command)],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
    finally:
        marker.kill()


def shape_fields(shape: Shape) -> dict[str, Any]:
    template = {} if shape.chat_template is None else {"chat_template": shape.chat_template}
    return {**template, "dataset" if shape.is_dataset else "prompts": shape.prompts}


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The prompts of each shape, as the results of one campaign keep them."""
    folder = tmp_path_factory.mktemp("first-hour")
    experiments = []
    for index, shape in enumerate(SHAPES):
        # Prompts of their own, since equal prompts are one experiment, however they are written down.
        put(folder, {name: content.replace("a river", f"a river {index}") for name, content in shape.files.items()})
        experiments.append({"config_name": f"shape-{index}", **SMALL, **shape_fields(shape)})
    campaign = {
        "campaign_name": "shapes", "model": str(tiny_model), "execution": NO_GAPS, "experiments": experiments,
    }  # fmt: skip
    put(folder, {"c.yaml": yaml.safe_dump(campaign)})
    ended = run_in(folder, "campaign c.yaml --executor local --yes")
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    found = {}
    for path in (folder / "results").rglob("result.json"):
        name = json.loads(path.read_text())["identity"]["config_name"]
        found[name] = (path.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return found


@pytest.mark.needs("torch", "transformers")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_prompts_are_measured_in_the_shape_they_have(shape: Shape, measured: dict[str, list[str]]) -> None:
    prompts = measured.get(f"shape-{SHAPES.index(shape)}", [])
    assert len(prompts) == len(shape.has)
    for prompt, words in zip(prompts, shape.has, strict=True):
        places = [prompt.find(word) for word in words]
        assert -1 not in places, prompt
        assert places == sorted(places), prompt
    assert [word for word in shape.lacks if any(word in prompt for prompt in prompts)] == []


# Commands


@dataclass(frozen=True)
class Row:
    """A command in a folder with these files, and how it ends."""

    name: str
    command: str  # without the name of the program
    files: Mapping[str, str] = field(default_factory=dict)
    code: int = 0
    has: tuple[str, ...] = ()  # texts in what it writes, white space collapsed
    lacks: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


def campaign(*shared: str, more: str = "", backend: str = "pytorch") -> dict[str, str]:
    """c.yaml, a grid with these axes from line 6 on."""
    axes = "".join(f"    {line}\n" for line in shared)
    return {"c.yaml": f"campaign_name: c\nmodel: gpt2\ngrid:\n  backends: [{backend}]\n  shared:\n{axes}{more}"}


def experiment(*more: str) -> dict[str, str]:
    """e.yaml, an experiment with these lines from line 2 on."""
    return {"e.yaml": "model: gpt2\n" + "".join(f"{line}\n" for line in more)}


def unknown(line: str, where: str, *has: str, lacks: tuple[str, ...] = ()) -> Row:
    """An experiment with one line of another tool's vocabulary."""
    return Row(f"experiment: {line}", "config validate e.yaml", experiment(line), 2, (f"e.yaml:{where}", *has), lacks)


TERMS = (
    unknown("max_new_tokens: 64", "2:1", "max_output_tokens", lacks=("max_input_tokens",)),
    unknown("max_tokens: 64", "2:1", "max_output_tokens", lacks=("max_input_tokens",)),
    unknown("dtype: float16", "2:1", "fp_precision"),
    unknown("torch_dtype: float16", "2:1", "fp_precision"),
    unknown("precision: fp16", "2:1", "fp_precision"),
    unknown("tensor_parallel_size: 2", "2:1", "vllm.tensor_parallel_size"),
    unknown("concurrency: 4", "2:1", "traffic_simulation.concurrency"),
    unknown("num_input_prompts: 10", "2:1", "sample_size"),
    unknown("batch_size: 8", "2:1", "pytorch.batch_size"),
    unknown("fp_precison: float16", "2:1", "'fp_precision'"),
    unknown("seed: 1", "2:1", "random_seed"),
    unknown("temperature: 0", "2:1", "decoder.temperature"),
    unknown("gpu_memory_utilization: 0.8", "2:1", "vllm.gpu_memory_utilization"),
    Row(
        "axis: max_new_tokens",
        "config validate c.yaml",
        campaign("max_new_tokens: [64]"),
        2,
        ("c.yaml:6:5", "max_output_tokens"),
        ("max_input_tokens",),
    ),
    Row(
        "axis: batchsize",
        "config validate c.yaml",
        campaign("batchsize: [1, 8]"),
        2,
        ("c.yaml:6:5", "batch_size"),
    ),
    Row(
        "axis: a wrong value in a flow list",
        "config validate c.yaml",
        campaign("max_output_tokens: [16, many]"),
        2,
        ("c.yaml:6:29", "expected an integer, got 'many'"),
    ),
    Row(
        "axis: a wrong value in a block list",
        "config validate c.yaml",
        campaign("fp_precision:", "- float16", "- float8"),
        2,
        ("c.yaml:8:7", "float8"),
    ),
    Row(
        "axis: a wrong value in a nested axis",
        "config validate c.yaml",
        campaign("decoder:", "- {preset: deterministic}", "- {temperatur: 0.5}"),
        2,
        ("c.yaml:8:8", "temperature"),
    ),
    Row(
        "all problems at once",
        "config validate c.yaml",
        campaign("max_new_tokens: [64]", "fp_precison: [float16]", more="execution: {cycels: 3}\n"),
        2,
        ("3 problems", "c.yaml:6:5", "c.yaml:7:5", "c.yaml:8:13", "'cycles'"),
    ),
    Row(
        "a campaign key in an experiment file",
        "config validate e.yaml",
        experiment("max_output_tokens: 8", 'schedule: {at: "22:00"}'),
        2,
        ("e.yaml:3:1", "schedule", "campaign"),
        ("campaign_name: is required",),
    ),
    Row(
        "a campaign without a name",
        "config validate c.yaml",
        {"c.yaml": "model: gpt2\ngrid:\n  backends: [pytorch]\n"},
        2,
        ("campaign_name",),
        ("grid: unknown key",),
    ),
    Row("a duplicate key", "config validate e.yaml", experiment("gpus: []", "gpus: [0]"), 2, ("e.yaml:3:1", "line 2")),
    Row("a section of null", "config validate e.yaml", experiment("warmup:", "pytorch: null")),
    Row("a null axis section", "config validate c.yaml", campaign("max_output_tokens: [8]", more="execution:\n")),
    Row("no is text", "config validate e.yaml", experiment("streaming: no"), 2, ("e.yaml:2:12", "no")),
    Row(
        "a variable in a flow list",
        "config show c.yaml",
        campaign("max_output_tokens: [${LEM_TEST_N:-16}, 32]"),
        0,
        ("16",),
    ),
    Row(
        "a variable that is not set",
        "config validate e.yaml",
        {"e.yaml": "model: ${LEM_TEST_NO_SUCH_MODEL}\n"},
        2,
        ("e.yaml:1:8", "LEM_TEST_NO_SUCH_MODEL"),
    ),
    Row(
        "an option of every experiment by --set",
        "config show c.yaml --set measurement.min_window_sec=3 --json",
        campaign("max_output_tokens: [8, 16]"),
        0,
        ("min_window_sec",),
    ),
    Row(
        "a section of another backend",
        "config validate e.yaml",
        experiment("backend: vllm", "pytorch: {batch_size: 8}"),
        2,
        ("e.yaml:3:1", "vllm"),
    ),
    Row("an empty file", "config validate e.yaml", {"e.yaml": ""}, 2, ("e.yaml",)),
    Row("a tab", "config validate e.yaml", {"e.yaml": "model: gpt2\npytorch:\n\tbatch_size: 8\n"}, 2, ("e.yaml:3:1",)),
    Row(
        "an experiment without a model",
        "experiment e.yaml --dry-run",
        {"e.yaml": "max_output_tokens: 8\n"},
        2,
        ("model",),
    ),
    Row(
        "two experiment files without a name",
        "campaign a.yaml b.yaml --dry-run",
        {"a.yaml": "model: gpt2\n", "b.yaml": "model: distilgpt2\n"},
        2,
        ("--campaign-name",),
    ),
    Row(
        "two experiment files with a name",
        "campaign a.yaml b.yaml --campaign-name both --dry-run --executor local",
        {"a.yaml": "model: gpt2\n", "b.yaml": "model: distilgpt2\n"},
        0,
        ("both",),
    ),
)

PROGRAM = (
    Row("nothing", "", has=("campaign", "experiment")),
    Row("help", "help", has=("campaign", "experiment")),
    Row("help of a command", "help campaign", has=("usage: lem campaign",)),
    Row("a misspelt command", "campain c.yaml", code=2, has=("campaign",)),
    Row("a file that is not there", "campaign nowhere.yaml", code=2, has=("nowhere.yaml",)),
    Row("a folder in place of a file", "campaign .", code=2),
    Row("no file, a model", "experiment --model gpt2 --set max_output_tokens=8 --dry-run", has=("gpt2",)),
    Row("no file, no model", "experiment --dry-run", code=2, has=("--model",)),
    Row(
        "-o is the results folder of an experiment", "experiment e.yaml -o there --dry-run", experiment(), 0, ("there",)
    ),
    Row(
        "-o is the results folder of a campaign",
        "campaign c.yaml -o there --dry-run",
        campaign("max_output_tokens: [8]"),
        0,
        ("there",),
    ),
    Row("-o does not exist in compare", "compare c -o there", code=2, has=("-o",)),
    Row("status without any campaign", "status", has=("no campaign",)),
    Row("compare without results", "compare nowhere", code=2, has=("nowhere",)),
    Row(
        "an option that does not exist",
        "campaign c.yaml --cycels 3",
        campaign("max_output_tokens: [8]"),
        2,
        ("--cycels",),
    ),
    Row("too many cycles", "campaign c.yaml --cycles 99 --dry-run", campaign("max_output_tokens: [8]"), 2, ("20",)),
    Row("a sample size", "campaign c.yaml --sample-size 4 --dry-run", campaign("max_output_tokens: [8]")),
    Row(
        "a blank last line",
        "campaign c.yaml --dry-run --executor local",
        {**campaign("prompts: [{type: file, path: a.txt}]"), "a.txt": "a river\na hill\n\n"},
    ),
    Row("num_samples", "config validate c.yaml", campaign("max_output_tokens: [8]", more="num_samples: 4\n")),
)

# Inputs that no engine can measure.
GOOD = {"good.txt": "a river\n"}


def refused(name: str, fields: Mapping[str, Any], files: Mapping[str, str], *has: str) -> Row:
    """One experiment with these fields, which are wrong whatever the model."""
    text = yaml.safe_dump({"campaign_name": "c", "model": "gpt2", "experiments": [{**SMALL, **fields}]})
    return Row(name, "campaign c.yaml --executor local --dry-run", {"c.yaml": text, **files}, 2, has, ("unknown",))


REFUSED = (
    refused("a prompt file that is not there", {"prompts": {"type": "file", "path": "nowhere.txt"}}, {}, "nowhere.txt"),
    refused("an empty prompt file", {"prompts": {"type": "file", "path": "b.txt"}}, {"b.txt": "\n\n"}, "b.txt"),
    refused(
        "a line that is no JSON",
        {"prompts": {"type": "file", "path": "b.jsonl"}},
        {"b.jsonl": '{"prompt": "a"}\n{"prompt": \n'},
        "b.jsonl:2",
    ),
    refused(
        "a line without a prompt",
        {"prompts": {"type": "file", "path": "b.jsonl"}},
        {"b.jsonl": lines({"title": "x"})},
        "b.jsonl:1",
        "prompt",
    ),
    refused(
        "an image in a message",
        {"prompts": {"type": "file", "path": "b.jsonl"}},
        {"b.jsonl": lines({"messages": [user([{"type": "image_url", "image_url": {"url": "x.png"}}])]})},
        "b.jsonl:1",
        "image_url",
    ),
    refused("data set and prompts", {"dataset": "gsm8k", "prompts": {"type": "synthetic"}}, {}, "prompts", "dataset"),
    refused("a template that is not there", {"chat_template": "nowhere.jinja"}, {}, "nowhere.jinja"),
)


STUDY = """\
name: precisions
model: gpt2
n: 20
sweep:
  precision: [fp16, bf16]
  pytorch.batch_size: [1, 8]
execution:
  n_cycles: 4
  cycle_order: interleaved
"""
EARLIER = """\
config_name: first
model_name: gpt2
max_output_tokens: 32
fp_precision: bfloat16
num_input_prompts: 10
batching: {batch_size: 4}
decoder: {temperature: 0.0}
cloud_sync: true
"""
CONVERTED = (
    Row(
        "convert: a study",
        "config convert s.yaml",
        {"s.yaml": STUDY},
        0,
        ("fp_precision: [float16, bfloat16]", "batch_size: [1, 8]", "cycles: 4", "structure: interleaved"),
    ),
    Row(
        "convert: an experiment of the earlier form",
        "config convert x.yaml",
        {"x.yaml": EARLIER},
        0,
        ("max_output_tokens: 32", "batch_size: 4", "sample_size: 10", "# cloud_sync: true"),
    ),
    Row("convert: a file of neither tool", "config convert x.yaml", {"x.yaml": "colour: red\n"}, 2, ("x.yaml",)),
    Row("convert: a file that is not there", "config convert nowhere.yaml", {}, 2, ("nowhere.yaml",)),
)


SERVICE = "services:\n  pytorch: {image: some-image, command: [sleep, inf]}\n"


def composed(name: str, files: Mapping[str, str], *has: str, options: str = "", code: int = 0, **environ: str) -> Row:
    """The plan of a campaign in containers, in a folder with these compose files."""
    command = f"campaign c.yaml --executor docker --dry-run {options}"
    return Row(name, command, {**campaign("max_output_tokens: [8]"), **files}, code, has, (), environ)


COMPOSE = (
    composed("compose.yaml", {"compose.yaml": SERVICE}, "compose.yaml", "some-image"),
    composed(
        "docker-compose.yml with an override",
        {
            "docker-compose.yml": SERVICE,
            "docker-compose.override.yml": "services:\n  pytorch: {mem_limit: 3g, image: another-image}\n",
        },
        "docker-compose.override.yml",
        "another-image",
    ),
    composed(
        "COMPOSE_FILE with two files",
        {"a.yml": SERVICE, "b.yml": "services:\n  pytorch: {image: another-image}\n"},
        "a.yml",
        "b.yml",
        "another-image",
        COMPOSE_FILE="a.yml:b.yml",
    ),
    composed(
        "two files on the command line",
        {"a.yml": SERVICE, "b.yml": "services:\n  pytorch: {image: another-image}\n"},
        "another-image",
        options="--compose-file a.yml --compose-file b.yml",
    ),
    composed(
        "a service with a profile",
        {"compose.yaml": "services:\n  pytorch: {image: some-image, profiles: [gpu]}\n"},
        "some-image",
    ),
    composed(
        "an include",
        {"compose.yaml": "include: [parts/engine.yaml]\n", "parts/engine.yaml": SERVICE},
        "some-image",
    ),
    composed("COMPOSE_FILE names no file", {}, "nowhere.yml", "COMPOSE_FILE", code=2, COMPOSE_FILE="nowhere.yml"),
    composed(
        "no service of that name", {"compose.yaml": "services:\n  web: {image: x}\n"}, "no service pytorch", "web"
    ),
    composed("a misspelt compose file", {"compose.yaml": "servces: {}\n"}, "servces"),
    composed(
        "an engine elsewhere",
        {"compose.yaml": SERVICE},
        "another machine",
        "DOCKER_HOST",
        DOCKER_HOST="tcp://192.0.2.1:2375",
    ),
    composed("a context that is not there", {"compose.yaml": SERVICE}, "no-such", DOCKER_CONTEXT="no-such"),
)


def in_words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def ends_as_expected(row: Row, code: int, text: str) -> None:
    shown = in_words(text)
    assert code == row.code, text
    assert [word for word in row.has if in_words(word) not in shown] == [], text
    assert [word for word in row.lacks if word in shown] == [], text
    assert "Traceback" not in text


@pytest.mark.parametrize("row", [*TERMS, *PROGRAM, *REFUSED, *CONVERTED], ids=lambda row: row.name)
def test_a_command_ends_with_a_result_or_says_what_to_do(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, row.files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    ended = run_lem(*shlex.split(row.command))
    ends_as_expected(row, ended.code, ended.out + ended.err)


@pytest.mark.needs("docker")
@pytest.mark.parametrize("row", COMPOSE, ids=lambda row: row.name)
def test_compose_files_are_used_as_people_have_them_or_refused_by_name(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, row.files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("COMPOSE_FILE", "COMPOSE_PROFILES", "COMPOSE_PROJECT_NAME", "DOCKER_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in row.environ.items():
        monkeypatch.setenv(name, value)
    ended = run_lem(*shlex.split(row.command))
    ends_as_expected(row, ended.code, ended.out + ended.err)


@pytest.mark.parametrize("text", [STUDY, EARLIER], ids=["study", "earlier form"])
def test_a_converted_file_is_a_valid_campaign(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"theirs.yaml": text})
    put(tmp_path, {"ours.yaml": run_lem("config", "convert", "theirs.yaml").out})
    ended = run_lem("config", "validate", "ours.yaml")
    assert ended.code == 0, ended.err


# Before the first cycle


@dataclass(frozen=True)
class Faulty:
    """An experiment that is found to be wrong only where the engine is, before anything is measured."""

    name: str
    fields: Mapping[str, Any]
    files: Mapping[str, str]
    has: tuple[str, ...]


FAULTY = (
    Faulty("a folder with a licence only", {"dataset": "lic"}, {"lic/LICENSE.txt": "Permission\n"}, ("lic",)),
    Faulty(
        "a split that is not there",
        {"dataset": {"name": "spl", "split": "testing"}},
        {"spl/train.jsonl": lines({"prompt": "a river"})},
        ("spl", "testing", "train"),
    ),
    Faulty(
        "a subset that is not there",
        {"prompts": {"type": "huggingface", "dataset": "sub", "subset": "elsewhere"}},
        {"sub/train.jsonl": lines({"prompt": "a river"})},
        ("sub", "elsewhere"),
    ),
    Faulty(
        "two files for one split",
        {"dataset": "two"},
        {"two/train.jsonl": lines({"prompt": "a river"}), "two/train.csv": "prompt\na hill\n"},
        ("train.csv", "train.jsonl"),
    ),
    Faulty(
        "one part of two",
        {"dataset": "par"},
        {"par/data/train-00000-of-00002.jsonl": lines({"prompt": "a river"})},
        ("00002",),
    ),
    Faulty("a model folder that is not there", {"model": "./no-model", **SMALL}, {}, ("no-model",)),
)


@pytest.fixture(scope="module")
def preflight(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a campaign says in which every experiment is wrong."""
    folder = tmp_path_factory.mktemp("faulty")
    experiments = []
    for index, item in enumerate(FAULTY):
        put(folder, item.files)
        experiments.append({"config_name": f"faulty-{index}", **SMALL, **item.fields})
    campaign = {
        "campaign_name": "faulty", "model": str(tiny_model), "execution": NO_GAPS, "experiments": experiments,
    }  # fmt: skip
    put(folder, {"c.yaml": yaml.safe_dump(campaign)})
    ended = run_in(folder, "campaign c.yaml --executor local --yes")
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert list(folder.rglob("result.json")) == []
    return in_words(ended.stderr)


@pytest.mark.needs("torch", "transformers")
@pytest.mark.parametrize("item", FAULTY, ids=lambda item: item.name)
def test_everything_that_cannot_be_measured_is_reported_at_once_before_the_first_cycle(
    item: Faulty, preflight: str
) -> None:
    assert [word for word in item.has if word not in preflight] == [], preflight
