"""Files of LLenergyMeasure become campaigns: what of them becomes what, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lem.base.errors import ConfigurationError
from lem.config.convert import convert
from tests.command_rig import run_lem
from tests.documentation import ROOT

FIRST_EXPERIMENT = """\
schema_version: "3.0.0"
config_name: short-answers
model_name: example/small-model
adapter: example/adapter
num_input_prompts: 20
max_input_tokens: 64
fp_precision: bfloat16
gpus: [0, 1]
query_rate: 2.0
decode_token_to_text: true
decoder: {temperature: 0.0, do_sample: true}
schedule: {enabled: false, at: "03:00"}
traffic_simulation: {enabled: true, mode: constant, target_qps: 3.0}
pytorch:
  batch_size: 4
  num_processes: 2
  torch_compile: inductor
  assisted_generation: null
  beam_search: {enabled: true, num_beams: 3, no_repeat_ngram_size: 2}
vllm: {max_num_seqs: 8}
"""

FIRST_CAMPAIGN = """\
campaign_name: two engines
model: example/small-model
dataset: aienergyscore
num_samples: 30
grid:
  backends: [pytorch, vllm]
  models: [example/a, example/b]
  axes: {batch_size: [1, 16]}
  shared: {fp_precision: [float16, bfloat16], max_new_tokens: [32]}
  backend_overrides:
    vllm: {enable_chunked_prefill: [true, false], gpu_memory_utilization: [0.2, 0.8]}
    pytorch: {num_processes: 2}
configs: [one.yaml]
experiments:
  - config: one.yaml
    overrides: {decoder.preset: factual, pytorch.batch_size: 2}
execution: {cycles: 4, structure: grouped, config_gap_seconds: 5}
schedule: {at: "03:00", days: [sat]}
group_by: [backend]
"""
ONE = "_extends: first-base.yaml\nconfig_name: one\nnum_input_prompts: 5\ndataset: {name: alpaca, sample_size: 3}\n"
BASE = "model_name: example/small-model\nbackend: pytorch\npytorch: {batch_size: 1}\n"

SECOND_EXPERIMENT = """\
model: example/small-model
backend: vllm
n: 12
dataset: {n: 40, input_len: 700, output_len: 50, seed: 7}
dataset_order: grouped
precision: fp32
max_input_tokens: 600
decoder: {min_new_tokens: 5, min_p: 0.1, do_sample: true}
warmup: {n_warmup: 3, thermal_floor_seconds: 45.0}
baseline: {duration_seconds: 10}
energy: {backend: zeus}
lora: {adapter_path: ./adapter, merge_weights: true}
output_dir: out
passthrough_kwargs: {seed: 3}
vllm:
  engine:
    block_size: 16
    speculative_model: example/draft
    num_speculative_tokens: 4
    kv_cache_memory_bytes: 4000000
    compilation_config: {level: 3}
    attention: {backend: FLASH_ATTN, flash_attn_version: 3, use_cudnn_prefill: true}
  sampling: {max_tokens: 99, ignore_eos: true, presence_penalty: 0.5, n: 2}
"""

STUDY = """\
name: batch and precision
base: base2.yaml
n: 8
random_seed: 1
pytorch: {attn_implementation: eager, trust_remote_code: true}
sweep:
  model: [example/a, example/b]
  precision: [bf16, fp32]
  decoder.temperature: [0.0, 0.7]
  pytorch.batch_size: [1, 4]
  pytorch.num_beams: [1, 4]
  pytorch.device_map: [auto]
experiments:
  - {model: example/c, dataset: aienergyscore, backend: vllm, vllm: {engine: {max_num_seqs: 9}}}
runners: {pytorch: local}
execution: {n_cycles: 2, cycle_order: sequential, experiment_gap_seconds: 4, cycle_gap_seconds: null, shuffle_seed: 5}
"""
BASE2 = "name: ignored\nmax_output_tokens: 16\ndataset: alpaca\npytorch: {batch_size: 9}\n"


FILES = {
    "first.yaml": FIRST_EXPERIMENT,
    "campaign.yaml": FIRST_CAMPAIGN,
    "one.yaml": ONE,
    "first-base.yaml": BASE,
    "second.yaml": SECOND_EXPERIMENT,
    "study.yaml": STUDY,
    "base2.yaml": BASE2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_an_experiment_of_the_first_form(folder: Path) -> None:
    tree, notes = convert([str(folder / "first.yaml")])
    assert tree["campaign_name"] == "short-answers"
    assert tree["experiments"] == [
        {
            "config_name": "short-answers",
            "model": {"name": "example/small-model", "adapter": "example/adapter"},
            "prompts": {"type": "synthetic", "input_tokens": 64, "sample_size": 20},
            "max_input_tokens": 64,
            "fp_precision": "bfloat16",
            "decoder": {"temperature": 0.0},
            "traffic_simulation": {"enabled": True, "mode": "constant", "target_qps": 3.0},
            "pytorch": {"batch_size": 4, "torch_compile": "default", "no_repeat_ngram_size": 2},
            "backend": "pytorch",
        }
    ]
    left_out = {"vllm", "schema_version", "query_rate", "decode_token_to_text", "pytorch.num_processes", "gpus"}
    left_out |= {"pytorch.beam_search", "schedule.enabled", "schedule.at"}
    assert {note.partition(":")[0] for note in notes} == left_out
    assert "pytorch.num_processes: 2  (lem measures one copy of the model)" in notes
    assert "decode_token_to_text: true  (no counterpart)" in notes


def test_a_campaign_of_the_first_form(folder: Path) -> None:
    tree, notes = convert([str(folder / "campaign.yaml")])
    assert tree["dataset"] == {"name": "ai_energy_score"}
    assert tree["schedule"] == {"at": "03:00", "days": ["sat"]}
    assert tree["execution"] == {"cycles": 4, "structure": "grouped", "config_gap_seconds": 5}
    assert tree["grid"] == {
        "backends": ["pytorch", "vllm"],
        "models": ["example/a", "example/b"],
        "shared": {"fp_precision": ["float16", "bfloat16"], "max_output_tokens": [32]},
        "backend_overrides": {
            "pytorch": {"batch_size": [1, 16]},
            "vllm": {
                "max_num_seqs": [1, 16],
                "enable_chunked_prefill": [True, False],
                "gpu_memory_utilization": [0.8],
            },
        },
    }
    one = {
        "config_name": "one",
        "model": {"name": "example/small-model"},
        "backend": "pytorch",
        "pytorch": {"batch_size": 1},
        "dataset": {"name": "ai_energy_score", "sample_size": 30},
    }
    assert tree["experiments"] == [one, {**one, "pytorch": {"batch_size": 2}, "decoder": {"preset": "factual"}}]
    assert [note.partition(":")[0] for note in notes] == [
        "group_by",
        "vllm.gpu_memory_utilization",
        "pytorch.num_processes",
    ]


def test_an_experiment_of_the_second_form(folder: Path) -> None:
    tree, notes = convert([str(folder / "second.yaml")])
    assert tree["campaign_name"] == "second"
    assert tree["experiments"] == [
        {
            "fp_precision": "float32",
            "model": {"name": "example/small-model", "adapter": "./adapter"},
            "backend": "vllm",
            "max_input_tokens": 600,
            "min_output_tokens": 5,
            "warmup": {"min_prompts": 3},
            "baseline": {"duration_sec": 10},
            "measurement": {"energy": "nvml"},
            "io": {"results_dir": "out"},
            "max_output_tokens": 99,
            "ignore_eos": True,
            "prompts": {"type": "synthetic", "sample_size": 40, "seed": 7, "input_tokens": 600, "output_tokens": 50},
            "vllm": {
                "min_p": 0.1,
                "block_size": 16,
                "speculative": {"model": "example/draft", "num_tokens": 4},
                "attention": {"backend": "FLASH_ATTN", "flash_version": 3},
                "extra": {"kv_cache_memory_bytes": 4000000, "compilation_config": {"level": 3}},
            },
        }
    ]
    assert notes == [
        "dataset_order: grouped  (prompts keep the order of their source, unless prompts.shuffle is true)",
        "warmup.thermal_floor_seconds: 45.0  (see execution.config_gap_seconds)",
        "lora.merge_weights: true  (see model.adapter)",
        "passthrough_kwargs.seed: 3  (see vllm.extra)",
        "vllm.engine.attention.use_cudnn_prefill: true  (no counterpart)",
        "vllm.sampling.presence_penalty: 0.5  (lem has no such penalty, only decoder.repetition_penalty)",
        "vllm.sampling.n: 2  (lem generates one answer for each prompt)",
    ]


def test_a_study(folder: Path) -> None:
    tree, notes = convert([str(folder / "study.yaml")])
    assert tree["campaign_name"] == "batch and precision"
    assert (tree["dataset"], tree["num_samples"]) == ({"name": "alpaca"}, 8)
    assert tree["grid"] == {
        "backends": ["pytorch"],
        "models": [{"name": name, "trust_remote_code": True} for name in ("example/a", "example/b")],
        "shared": {
            "max_output_tokens": [16],
            "random_seed": [1],
            "fp_precision": ["bfloat16", "float32"],
            "decoder.temperature": [0.0, 0.7],
        },
        "backend_overrides": {"pytorch": {"attn_implementation": ["eager"], "batch_size": [1, 4]}},
    }
    (one,) = tree["experiments"]
    assert (one["model"], one["backend"], one["vllm"]) == ({"name": "example/c"}, "vllm", {"max_num_seqs": 9})
    assert one["dataset"] == {"name": "ai_energy_score", "sample_size": 8}
    assert tree["execution"] == {"cycles": 2, "structure": "grouped", "config_gap_seconds": 4, "seed": 5}
    assert [note.partition(":")[0] for note in notes] == [
        "pytorch.num_beams",
        "pytorch.device_map",
        "pytorch",
        "runners.pytorch",
    ]


def test_an_experiment_of_the_second_form_has_the_defaults_of_its_tool(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("model: example/a\nbackend: vllm\n", encoding="utf-8")
    (one,) = convert([str(tmp_path / "e.yaml")])[0]["experiments"]
    assert one["fp_precision"] == "bfloat16"
    assert one["dataset"] == {"name": "ai_energy_score", "sample_size": 100}


BEAMS = {"beam_search.enabled": [True], "beam_search.num_beams": [2, 4]}


@pytest.mark.parametrize(
    ("sweep", "backends", "overrides"),
    [
        ("{backend: [vllm, pytorch], n: [1]}", ["vllm", "pytorch"], {}),
        ("{vllm.engine.block_size: [8, 16]}", ["vllm"], {"vllm": {"block_size": [8, 16]}}),
        ("{pytorch.batch_size: 2, vllm.max_num_seqs: [4]}", ["pytorch", "vllm"], None),
        ("{pytorch.num_beams: [2, 4]}", ["pytorch"], {"pytorch": BEAMS}),
        ("{n: [5]}", ["pytorch"], {}),
    ],
)
def test_the_backends_of_a_sweep(tmp_path: Path, sweep: str, backends: list[str], overrides: Any) -> None:
    (tmp_path / "s.yaml").write_text(f"model: example/a\nsweep: {sweep}\n", encoding="utf-8")
    grid = convert([str(tmp_path / "s.yaml")])[0]["grid"]
    assert grid["backends"] == backends
    if overrides is not None:
        assert grid.get("backend_overrides", {}) == overrides


def test_of_two_keys_that_mean_the_same_one_wins_and_the_other_is_named(tmp_path: Path) -> None:
    text = "model: a\nbackend: vllm\nvllm: {sampling: {max_tokens: 9}}\nmax_output_tokens: 5\n"
    (tmp_path / "e.yaml").write_text(text, encoding="utf-8")
    tree, notes = convert([str(tmp_path / "e.yaml")])
    assert tree["experiments"][0]["max_output_tokens"] == 9
    assert notes == ["max_output_tokens: 5  (vllm.sampling.max_tokens wins)"]


@pytest.mark.parametrize(
    ("written", "option", "value"),
    [
        ("pytorch.torch_compile: true", ("pytorch", "torch_compile"), "default"),
        ("pytorch.num_beams: 4\npytorch: 5", ("model", "name"), "a"),
        ("dataset.n: 5", ("prompts", "sample_size"), 5),
    ],
)
def test_a_dotted_name_is_that_of_a_section(tmp_path: Path, written: str, option: Any, value: Any) -> None:
    (tmp_path / "e.yaml").write_text(f"model: a\nadapter: b\nbatch_size: 2\n{written}\n", encoding="utf-8")
    (experiment,) = convert([str(tmp_path / "e.yaml")])[0]["experiments"]
    assert experiment[option[0]][option[1]] == value


@pytest.mark.parametrize("name", ["first", "campaign", "second", "study"])
def test_what_is_converted_is_valid(folder: Path, name: str) -> None:
    code, out, err = run_lem("config", "convert", str(folder / f"{name}.yaml"))
    assert (code, err) == (0, "")
    converted = folder / "converted.yaml"
    converted.write_text(out, encoding="utf-8")
    assert run_lem("config", "validate", str(converted)).code == 0
    tree, notes = convert([str(folder / f"{name}.yaml")])
    assert yaml.safe_load(out) == tree
    assert [line.removeprefix("#   ") for line in out.splitlines() if line.startswith("#   ")] == notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "services: {vllm: {image: x}}\n",
            "expected a file of LLenergyMeasure, AIPerf, guidellm or vLLM bench, got the keys 'services'",
        ),
        ("model: a\nport: 8000\ndtype: half\nhost: b\n", "got the keys 'port', 'dtype', 'host'"),
        ("n: 5\nprecision: bf16\n", "got the keys 'n', 'precision'"),
        ("- model: a\n", "expected a mapping (key: value) at the top level, got a list"),
        ("", "the file is empty"),
        ("model: a\nsweep: [1]\n", "sweep: expected a mapping, got a list"),
        ("campaign_name: a\nexperiments: [x]\n", "experiments[0]: expected a mapping, got 'x'"),
        ("campaign_name: a\nconfigs: [missing.yaml]\n", "missing.yaml: no such file"),
        ("campaign_name: a\ngrid: {backends: [vllm]}\n", "no valid experiment is left"),
        ("campaign_name: a\nmodel: b\n", "nothing to run"),
        ("model: a\n<<: {n: 5}\n", "merge keys are not supported"),
    ],
)
def test_another_file_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    code, out, err = run_lem("config", "convert", str(file))
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("name", ["first.yaml", "campaign.yaml", "second.yaml", "study.yaml"])
def test_who_runs_such_a_file_is_told_how_to_convert_it(folder: Path, name: str) -> None:
    code, _, err = run_lem("config", "validate", str(folder / name))
    assert code == 2
    assert f"convert it: lem config convert {folder / name} > converted.yaml" in err


def test_one_name_of_another_tool_is_no_reason_to_convert_a_file(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("model: a\nprecision: fp16\n", encoding="utf-8")
    assert "convert" not in run_lem("config", "validate", str(tmp_path / "e.yaml")).err


RANDOM = "--dataset-name random --random-input-len 900 --random-output-len 50 --num-prompts 20"
CLOSED = {"enabled": True, "mode": "closed"}


def loads_of(*words: str) -> tuple[list[dict[str, Any]], list[str]]:
    tree, notes = convert(words)
    return tree["experiments"], notes


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", None),
        ("--request-rate inf", None),
        ("--request-rate 4", {"enabled": True, "mode": "poisson", "target_qps": 4}),
        ("--request-rate=4 --burstiness 0.5", {"enabled": True, "mode": "poisson", "target_qps": 4, "burstiness": 0.5}),
        ("--max-concurrency 8", {**CLOSED, "concurrency": 8}),
        (
            "--max-concurrency 8 --goodput ttft:200 e2el:900",
            {**CLOSED, "concurrency": 8, "slo": {"ttft_ms": 200, "e2e_ms": 900}},
        ),
        ("--request-rate Infinity", None),
        ("--request-rate inf --max-concurrency 8", {**CLOSED, "concurrency": 8}),
    ],
)
def test_the_traffic_of_vllm_bench(line: str, expected: Any) -> None:
    ((experiment,), notes) = loads_of(*f"vllm bench serve --model gpt2 {RANDOM} {line}".split())
    assert experiment.get("traffic_simulation") == expected
    assert notes == []
    assert experiment["server"] == {"url": "http://127.0.0.1:8000", "api": "completions", "engine": "vllm"}
    assert experiment["prompts"] == {"type": "synthetic", "input_tokens": 900, "sample_size": 20}
    assert (experiment["max_input_tokens"], experiment["max_output_tokens"]) == (900, 50)


@pytest.mark.parametrize(
    "words",
    [
        ("vllm", "bench", "serve", "--goodput", "ttft:200", "tpot:50"),
        ("vllm", "bench", "serve", "--goodput", "ttft:200 tpot:50"),
        ("vllm", "bench", "serve", "--goodput=ttft:200", "tpot:50"),
        ("vllm", "bench", "serve", "--goodput", "ttft:200", "tpot:50 e2el:900"),
        ("aiperf", "profile", "--goodput", "time_to_first_token:200 inter_token_latency:50"),
        ("aiperf", "profile", "--goodput", "time_to_first_token:200", "inter_token_latency:50"),
    ],
)
def test_service_levels_are_one_text_or_several(words: Sequence[str]) -> None:
    ((experiment,), notes) = loads_of(*words, "--model", "gpt2", "--request-rate", "4")
    found = experiment["traffic_simulation"]["slo"]
    assert (found.pop("e2e_ms", 900), found, notes) == (900, {"ttft_ms": 200, "tpot_ms": 50}, [])


@pytest.mark.parametrize(
    "words",
    [
        *(f"vllm bench serve --request-rate {rate}" for rate in ("0", "-1", "nan", "-inf", "fast", "true")),
        "vllm bench serve --max-concurrency 0",
        *(f"vllm bench serve --request-rate 4 --goodput ttft:{level}" for level in ("0", "-1", "200ms", "")),
        "aiperf profile --request-rate 4,0",
        "aiperf profile --concurrency -2",
        "aiperf profile --concurrency 1.5",
        "guidellm run --backend kind=openai_http,target=http://x --profile kind=concurrent",
        "guidellm run --backend kind=openai_http,target=http://x --profile kind=poisson,rate=0",
        "guidellm run --backend kind=openai_http,target=http://x --profile kind=constant",
        "guidellm run --backend kind=openai_http,target=http://x --profile kind=concurrent,streams=0",
    ],
)
def test_a_load_that_the_tool_cannot_make_is_an_error(words: str) -> None:
    with pytest.raises(ConfigurationError, match="above 0"):
        loads_of(*words.split(), "--model", "gpt2")


def test_what_lem_cannot_do_alike_is_named() -> None:
    line = "vllm bench serve --model gpt2 --request-rate 2 --max-concurrency 9 --goodput x:1 --ramp-up-strategy linear"
    ((experiment,), notes) = loads_of(*line.split())
    assert [note.split(":")[0] for note in notes] == ["goodput.x", "concurrency", "ramp_up_strategy"]
    assert experiment["traffic_simulation"]["target_qps"] == 2


def test_a_result_of_vllm_bench_becomes_the_benchmark_that_made_it() -> None:
    ((experiment,), _) = loads_of(str(ROOT / "tests/recorded/peers/vllm.json"))
    assert experiment["model"]["name"] == "tiny"
    assert experiment["prompts"] == {"type": "synthetic", "input_tokens": 26, "sample_size": 8}
    assert experiment["max_output_tokens"] == 16


def test_a_sweep_of_vllm_starts_a_server_for_each_set_of_options(tmp_path: Path) -> None:
    (tmp_path / "serve.json").write_text('[{"max_num_seqs": 8}, {"max_num_seqs": 64}]')
    (tmp_path / "bench.json").write_text('{"low": {"request_rate": 1}, "high": {"request_rate": 5}}')
    commands = ("--serve-cmd", "vllm serve gpt2 --dtype float16", "--bench-cmd", "vllm bench serve --model gpt2")
    files = ("--serve-params", str(tmp_path / "serve.json"), "--bench-params", str(tmp_path / "bench.json"))
    tree, notes = convert(["vllm", "bench", "sweep", "serve", *commands, *files, "--num-runs", "4"])
    assert notes == []
    assert tree["execution"] == {"cycles": 4}
    found = [
        (it["server"]["options"]["max_num_seqs"], it["traffic_simulation"]["target_qps"]) for it in tree["experiments"]
    ]
    assert found == [(8, 1), (8, 5), (64, 1), (64, 5)]
    assert tree["experiments"][0]["server"]["command"] == [
        "vllm",
        "serve",
        "gpt2",
        "--dtype",
        "float16",
        "--port",
        "{port}",
    ]


AIPERF = """\
schemaVersion: "2.0"
randomSeed: 5
multiRun: {numRuns: 4, cooldownSeconds: 7}
benchmark:
  model: gpt2
  endpoint: {url: "http://h:81/v1/chat/completions", type: chat, streaming: true}
  dataset: {type: synthetic, entries: 30, prompts: {isl: {mean: 300, stddev: 20}, osl: 40}}
  phases:
    - {name: warmup, type: concurrency, requests: 9, concurrency: 2, excludeFromResults: true}
    - {name: profiling, type: gamma, rate: 3.0, smoothness: 2.0, duration: 60}
  slos: {time_to_first_token: 150}
"""


def test_a_file_of_aiperf(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(AIPERF)
    tree, notes = convert([str(tmp_path / "a.yaml")])
    (experiment,) = tree["experiments"]
    assert experiment["server"] == {"url": "http://h:81", "api": "chat"}
    assert experiment["prompts"] == {"type": "synthetic", "input_tokens": 300, "sample_size": 30}
    traffic = {"enabled": True, "mode": "poisson", "target_qps": 3.0, "burstiness": 2.0, "slo": {"ttft_ms": 150}}
    assert experiment["traffic_simulation"] == traffic
    assert experiment["warmup"]["min_prompts"] == 9
    assert experiment["measurement"] == {"min_window_sec": 60}
    assert (experiment["random_seed"], experiment["max_output_tokens"]) == (5, 40)
    assert tree["execution"] == {"cycles": 4, "config_gap_seconds": 7}
    assert [note.split(":")[0] for note in notes] == [
        "isl.stddev",
        "benchmark.warmup.type",
        "benchmark.warmup.concurrency",
    ]


def test_a_command_line_of_aiperf_with_several_concurrencies() -> None:
    line = (
        "aiperf profile -m gpt2 -u h:9 --endpoint-type completions --concurrency 1,8 --isl 30 --osl 6 --num-requests 64"
    )
    experiments, notes = loads_of(*line.split())
    assert [it["traffic_simulation"] for it in experiments] == [
        {**CLOSED, "concurrency": 1},
        {**CLOSED, "concurrency": 8},
    ]
    assert [it["config_name"] for it in experiments] == ["concurrency-1", "concurrency-8"]
    assert experiments[0]["server"] == {"url": "http://h:9", "api": "completions"}
    assert experiments[0]["prompts"]["sample_size"] == 64
    assert notes == []


SCENARIO = {
    "spec": {
        "backend": {"kind": "openai_http", "request_format": "/v1/chat/completions"},
        "profile": {"kind": "concurrent"},
        "data": [{"kind": "synthetic_text", "prompt_tokens": 700, "output_tokens": 80, "turns": 3}],
        "constraints": [{"kind": "max_duration", "seconds": 45}],
    },
    "benchmarks": [{"profile.streams": 2}, {"profile.streams": 20}],
}


def test_a_scenario_of_guidellm_with_the_server_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(SCENARIO))
    backend = "kind=openai_http,target=http://h:7,model=gpt2"
    experiments, notes = loads_of("guidellm", "run", "--scenario", str(tmp_path / "s.json"), "--backend", backend)
    assert [it["traffic_simulation"]["concurrency"] for it in experiments] == [2, 20]
    first = experiments[0]
    assert (first["model"], first["server"]) == ({"name": "gpt2"}, {"url": "http://h:7", "api": "chat"})
    assert (first["max_input_tokens"], first["max_output_tokens"]) == (700, 80)
    assert first["measurement"] == {"min_window_sec": 45}
    assert notes[0].startswith("data.turns: 3")


GUIDELLM_NOW = """\
guidellm run --backend kind=openai_http,target=h:7,model=gpt2 --profile kind=constant,rate=1,2.5
--data kind=synthetic_text,prompt_tokens=20,output_tokens=5 --constraint kind=max_requests,count=9
"""
GUIDELLM_BEFORE = """\
guidellm benchmark --target h:7 --model gpt2 --rate-type constant --rate 1,2.5 --max-requests 9
--data prompt_tokens=20,output_tokens=5
"""


@pytest.mark.parametrize("line", [GUIDELLM_NOW, GUIDELLM_BEFORE])
def test_command_lines_of_guidellm_of_now_and_before(line: str) -> None:
    experiments, _ = loads_of(*line.split())
    traffic = {"enabled": True, "mode": "constant"}
    assert [it["traffic_simulation"] for it in experiments] == [{**traffic, "target_qps": rate} for rate in (1, 2.5)]
    assert experiments[0]["prompts"] == {"type": "synthetic", "input_tokens": 20, "sample_size": 9}


def test_converted_loads_are_valid_campaigns(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(AIPERF)
    lines = [f"vllm bench serve --model gpt2 {RANDOM} --ignore-eos".split(), [str(tmp_path / "a.yaml")]]
    for number, words in enumerate(lines):
        code, out, err = run_lem("config", "convert", *words)
        assert code == 0, err
        converted = tmp_path / f"{number}.yaml"
        converted.write_text(out, encoding="utf-8")
        assert run_lem("config", "validate", converted).code == 0


@pytest.mark.parametrize(
    "words",
    [
        "vllm bench serve --model gpt2 --base-url http://[x",
        "vllm bench serve gpt2",
        "vllm bench sweep serve --serve-cmd x --bench-cmd vllm --serve-params /nowhere.json",
        "vllm bench sweep serve --serve-cmd vllm' --bench-cmd vllm",
        "vllm bench sweep serve --serve-cmd vllm --bench-cmd vllm'",
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(words: str) -> None:
    code, out, err = run_lem("config", "convert", *words.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
