"""Command lines and files of `vllm bench serve`, AIPerf and guidellm, which load a server, as campaigns for lem."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lem.base.durable import reason_of
from lem.base.errors import ConfigurationError
from lem.config.option import leaves
from lem.config.scalars import resolve_plain
from lem.config.sections import DATASET_ALIASES

Options = dict[str, Any]
Notes = list[tuple[str, Any, str]]  # what lem cannot do alike: the key, its value, and why

# Service levels of vLLM bench and of AIPerf, whose inter-token latency is one figure for each request.
_LEVELS = {
    "ttft": "ttft_ms",
    "tpot": "tpot_ms",
    "e2el": "e2e_ms",
    "time_to_first_token": "ttft_ms",
    "inter_token_latency": "tpot_ms",
    "request_latency": "e2e_ms",
}
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
_WORDS = {"vllm": ("bench", "sweep", "serve"), "aiperf": ("profile",), "guidellm": ("run", "benchmark")}
_ENGINES = {"vllm": "vllm", "sglang": "sglang", "tgi": "tgi", "tensorrt-llm": "tensorrt"}
_OF_RESULT = (
    *("model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness", "max_concurrency"),
    *("backend", "endpoint_type"),
)
# The option of a command line that names a file with others.
FILES = {"vllm": (), "aiperf": ("config", "f"), "guidellm": ("scenario", "config", "c")}
NO_COUNTERPART = "no counterpart"


class _Given:
    """Options of another tool; those that are understood are taken from it."""

    def __init__(self, tree: Options) -> None:
        self.left: Options = copy.deepcopy(tree)

    def take(self, *names: str, default: Any = None) -> Any:
        """The value under the first of these dotted names that is there; all of them are taken."""
        found = [value for name in names if (value := self._pop(name.split("."))) is not None]
        return found[0] if found else default

    def _pop(self, path: Sequence[str]) -> Any:
        node: Any = self.left
        for name in path[:-1]:
            node = node.get(name) if isinstance(node, dict) else None
        return node.pop(path[-1], None) if isinstance(node, dict) else None


def tool_of(words: Sequence[str]) -> str | None:
    """The tool that a command line starts; None for another program."""
    name = Path(words[0]).name if words else ""
    return name if name in _WORDS else None


def tool_of_file(options: Mapping[str, Any]) -> str | None:
    """The tool that reads a file, or wrote it as its result; None for another one."""
    if {"model_id", "request_rate", "num_prompts"} <= options.keys():
        return "vllm"
    if isinstance(options.get("benchmark"), Mapping):
        return "aiperf"
    return "guidellm" if "spec" in options or {"target", "rate_type"} <= options.keys() else None


def read_words(words: Sequence[str]) -> Options:
    """The options of a command line: true for a flag, a list for several values."""
    rest = list(words[1:])
    while rest and rest[0] in _WORDS[tool_of(words) or ""]:
        del rest[0]
    found: Options = {}
    name = ""
    for word in rest:
        if word.startswith("-") and not word[1:2].isdigit():
            name, sign, value = word.partition("=")
            name = name.lstrip("-").replace("-", "_")
            _add(found, name, value) if sign else found.setdefault(name, True)
        elif not name:
            raise ConfigurationError(f"unexpected argument {word!r}", "write the command line as you would run it")
        else:
            _add(found, name, word)
    return found


def _add(found: Options, name: str, text: str) -> None:
    try:
        value = json.loads(text) if text[:1] in ("{", "[") else resolve_plain(text)
    except ValueError:
        value = text
    before = found.get(name, True)
    found[name] = value if before is True else [*(before if isinstance(before, list) else [before]), value]


def convert_benchmark(tool: str, options: Options, name: str) -> tuple[Options, Notes]:
    given, notes = _Given(_of_result(options) if "completed" in options else options), Notes()
    sweep = _sweep(given)
    experiments, load = list[Options](), Options()
    for part in sweep or [given]:
        load = _READERS[tool](part, notes)
        load |= {key: part.take(key) for key in ("command", "options") if sweep}
        experiment = {**_work(load), "backend": "server", "server": _server(load)}
        axis = next((key for key in ("rate", "concurrency") if isinstance(load.get(key), list)), None)
        for value in load[axis] if axis else [None]:
            label = {} if axis is None else {"config_name": f"{axis}-{value}"}
            one = {**load, **({axis: value} if axis else {})}
            experiments.append({**label, **experiment, **_traffic(one, notes)})
        notes += [(key, value, NO_COUNTERPART) for key, value in part.left.items() if sweep]
    execution = _known(cycles=load.get("cycles"), config_gap_seconds=load.get("gap_s"))
    tree = {"campaign_name": name, "experiments": experiments, **({"execution": execution} if execution else {})}
    notes += [(".".join(map(str, path)), value, NO_COUNTERPART) for path, value in leaves(given.left) if value != {}]
    return tree, notes


def _known(**options: Any) -> Options:
    return {key: value for key, value in options.items() if value is not None}


def _of_result(result: Options) -> Options:
    """The options behind a result file of vLLM bench; the lengths are means."""
    requests, lengths = result["completed"], Options()
    for key in ("input", "output"):
        total = result.get(f"total_{key}_tokens")
        if isinstance(total, int) and isinstance(requests, int) and requests > 0:
            lengths[f"{key}_len"] = round(total / requests)
    return {**{key: result[key] for key in _OF_RESULT if key in result}, **lengths}


def _sweep(given: _Given) -> list[_Given]:
    """The benchmarks of `vllm bench sweep serve`, whose commands are texts and whose parameters are in JSON files."""
    serve, bench = given.take("serve_cmd"), given.take("bench_cmd")
    if not serve or not bench:
        return []
    command = [word for word in _split("--serve-cmd", serve)[1:] if word != "serve"]
    base = {**read_words(_split("--bench-cmd", bench)), "command": ["vllm", "serve", *command, "--port", "{port}"]}
    base |= {"cycles": given.take("num_runs", default=3)}
    sides = [_parameters(given.take(name)) for name in ("serve_params", "bench_params")]
    return [_Given({**base, **bench, "options": serve}) for serve in sides[0] for bench in sides[1]]


def _split(option: str, command: Any) -> list[str]:
    try:
        return shlex.split(str(command))
    except ValueError as error:
        raise ConfigurationError(f"{option}: {error}: {command}") from error


def _parameters(path: str | None) -> list[Options]:
    """The sets in such a file, a list or a mapping by name."""
    try:
        found = [{}] if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {reason_of(error)}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: expected JSON: {error}") from error
    return _mappings(list(found.values()) if isinstance(found, dict) else found)


def _mappings(found: Any) -> list[Options]:
    return [dict(item) for item in _each(found) if isinstance(item, Mapping)]


def _work(load: Options) -> Options:
    """The options of an experiment but for the server and the traffic."""
    source, output_tok, input_tok = load["source"], load["output_tok"], load["source"].get("input_tokens")
    has_eos, warmups = not load["ignore_eos"], load.get("warmups")
    # OpenAI's API has no top_k.
    decoder = {**({} if load.get("engine") else {"top_k": 0}), **load.get("decoder", {})}
    return {
        "model": _known(name=load["name"], tokenizer=load["tokenizer"]),
        "dataset" if "name" in source else "prompts": source,
        **_known(
            max_input_tokens=input_tok if isinstance(input_tok, int) and input_tok > 512 else None,  # else they are cut
            max_output_tokens=output_tok,
            min_output_tokens=None if has_eos else output_tok,
            ignore_eos=None if has_eos else True,
            random_seed=load["seed"],
            decoder=decoder or None,
            warmup={"min_prompts": warmups, "max_prompts": max(50, warmups)} if isinstance(warmups, int) else None,
            measurement=None if load.get("duration_s") is None else {"min_window_sec": load["duration_s"]},
        ),
    }


def _server(load: Options) -> Options:
    url, path = str(load.get("url") or "http://127.0.0.1:8000"), str(load.get("path") or "")
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
    except ValueError as error:
        raise ConfigurationError(f"{url}: expected a URL: {error}") from error
    is_chat = "chat" in f"{path} {parts.path} {load.get('api') or ''}"
    out: Options = {"url": f"{parts.scheme}://{parts.netloc}", "api": "chat" if is_chat else "completions"}
    if load.get("command"):
        out = {"command": load["command"], "options": load.get("options") or {}, "api": out["api"]}
    return out | _known(engine=load.get("engine"), served_name=load.get("served"), request=load.get("request") or None)


def _traffic(load: Options, notes: Notes) -> Options:
    rate, concurrency = (_positive(key, load.get(key)) for key in ("rate", "concurrency"))
    slo = {"slo": load["slo"]} if load.get("slo") else {}
    if rate is not None and rate != math.inf:
        if concurrency is not None:
            notes.append(("concurrency", concurrency, "requests that arrive at a rate have no such limit in lem"))
        mode, burstiness = load.get("arrival", "poisson"), load.get("burstiness")
        shape = {"burstiness": burstiness} if burstiness not in (None, 1.0) and mode == "poisson" else {}
        return {"traffic_simulation": {"enabled": True, "mode": mode, "target_qps": rate, **shape, **slo}}
    if concurrency is not None:
        return {"traffic_simulation": {"enabled": True, "mode": "closed", "concurrency": concurrency, **slo}}
    notes += [("goodput", load["slo"], "needs a rate or a concurrency")] if slo else []
    return {}


def _levels(found: Any, notes: Notes) -> Options:
    """Service levels from a mapping, or `ttft:200`, several in one text or in a list."""
    pairs = _pairs(found if isinstance(found, Mapping) else " ".join(map(str, _each(found))).split())
    notes += [(f"goodput.{key}", value, NO_COUNTERPART) for key, value in pairs.items() if key not in _LEVELS]
    return {_LEVELS[key]: _positive(f"goodput {key}", value or 0) for key, value in pairs.items() if key in _LEVELS}


def _positive(name: str, found: Any) -> float | None:
    """A number above 0, of which `inf` is one; a concurrency is a whole one. None of None."""
    if found is None:
        return None
    kind, is_whole = ("whole number", float.is_integer) if name == "concurrency" else ("number", bool)
    with contextlib.suppress(TypeError, ValueError):
        value = float(found)
        if value > 0 and is_whole(value) and not isinstance(found, bool):
            return int(value) if value.is_integer() else value
    raise ConfigurationError(f"{name}: expected a {kind} above 0, got {found}")


def _source(given: _Given, *, path: Any, count: Any, input_tok: Any, alias: Any = None, hub: Any = None) -> Options:
    size = _known(sample_size=count)
    named = str(alias or "").lower().replace("-", "_")
    if hub is not None:
        parts = _known(split=given.take("hf_split", "split"), subset=given.take("hf_subset", "subset"))
        return {"type": "huggingface", "dataset": str(hub), **parts, **size}
    if named in DATASET_ALIASES and (path is None or named == "sharegpt"):
        return {"name": named, **size}
    if path is not None:
        return {"type": "file", "path": str(path), **size}
    return {"type": "synthetic", **_known(input_tokens=input_tok), **size}


def _vllm(given: _Given, notes: Notes) -> Options:
    host, port = given.take("host", default="127.0.0.1"), given.take("port", default=8000)
    kind = str(given.take("backend", "endpoint_type", default="openai"))
    dataset, path = str(given.take("dataset_name", default="random")), given.take("dataset_path")
    is_random = dataset == "random"
    if dataset in DATASET_ALIASES and path is not None:
        notes.append(("dataset_path", path, f"{dataset} comes from the hub, or from LEM_DATASETS_DIR"))
    return {
        "cycles": given.take("cycles"),
        "name": given.take("model", "model_id", "m"),
        "tokenizer": given.take("tokenizer", "tokenizer_id"),
        "served": given.take("served_model_name"),
        "url": given.take("base_url") or f"http://{host}:{port}",
        "path": given.take("endpoint"),
        "api": kind,
        "engine": _ENGINES.get(kind, "vllm"),  # the client of vLLM
        "source": _source(
            given,
            path=None if dataset == "hf" else path,
            count=given.take("num_prompts", default=1000),
            input_tok=given.take("input_len", "random_input_len", default=1024) if is_random else None,
            alias=None if is_random else dataset,
            hub=path if dataset == "hf" else None,
        ),
        "output_tok": given.take("output_len", f"{dataset}_output_len", default=128 if is_random else None),
        "ignore_eos": given.take("ignore_eos"),
        "seed": given.take("seed", default=0),
        "decoder": _known(**{name: given.take(name) for name in _SAMPLING}),
        "rate": given.take("request_rate"),
        "burstiness": given.take("burstiness"),
        "concurrency": given.take("max_concurrency"),
        "slo": _levels(given.take("goodput"), notes),
        "warmups": given.take("num_warmups"),
        "request": given.take("extra_body"),
    }


def _aiperf(given: _Given, notes: Notes) -> Options:
    """Its command line, or its file, whose names are nested."""
    given.left = {**given.take("below", default={}), **given.left}
    for phase in _mappings(given.take("benchmark.phases")):
        is_warmup = phase.get("name") == "warmup" or phase.get("excludeFromResults")
        place = "warmup" if is_warmup else "profiling"
        if given.take(f"benchmark.{place}") is not None:
            notes.append((f"benchmark.{place}", "several phases", "only the last is converted"))
        given.left.setdefault("benchmark", {})[place] = {
            key: value for key, value in phase.items() if key not in ("name", "excludeFromResults")
        }
    lengths = [
        given.take(f"benchmark.dataset.prompts.{key}", f"benchmark.dataset.{key}", key, *more)
        for key, more in (
            ("isl", ("synthetic_input_tokens_mean", "prompt_input_tokens_mean")),
            ("osl", ("output_tokens_mean", "prompt_output_tokens_mean")),
        )
    ]
    means = [item.get("mean") if isinstance(item, Mapping) else item for item in lengths]
    for key, item in zip(("isl", "osl"), lengths, strict=True):
        if isinstance(item, Mapping) and item.get("stddev"):
            notes.append((f"{key}.stddev", item["stddev"], "see prompts.distribution"))
    kind = given.take("benchmark.profiling.type", "arrival_pattern", "request_rate_mode", default="poisson")
    extra = _pairs(given.take("extra_inputs", "benchmark.endpoint.extra"))
    swept = {key: given.take(f"sweep.parameters.{key}") for key in ("rate", "concurrency")}
    given.take("schemaVersion", "sweep.type", "benchmark.endpoint.streaming", "streaming")
    dataset = given.take("benchmark.dataset.type", default="synthetic")
    notes += [("dataset.type", dataset, NO_COUNTERPART)] if dataset not in ("synthetic", "file", "public") else []
    model = given.take("benchmark.model", "benchmark.models", "model", "model_names", "m")
    entries = given.take("benchmark.dataset.entries", "num_dataset_entries", "num_prompts")
    requests = given.take("benchmark.profiling.requests", "request_count", "num_requests")
    return {
        "name": _first("model", model, notes),
        "tokenizer": given.take("tokenizer", "benchmark.tokenizer.name"),
        "url": _first("url", given.take("benchmark.endpoint.url", "benchmark.endpoint.urls", "url", "u"), notes),
        "path": given.take("benchmark.endpoint.path", "endpoint", "custom_endpoint"),
        "api": given.take("benchmark.endpoint.type", "endpoint_type", default="chat"),
        "source": _source(
            given,
            path=given.take("benchmark.dataset.path", "input_file"),
            count=entries if entries is not None else requests,
            input_tok=means[0] if means[0] is not None else 550,
            alias=given.take("benchmark.dataset.name", "public_dataset"),
        ),
        "output_tok": means[1],
        "ignore_eos": extra.pop("ignore_eos", None),
        "seed": given.take("randomSeed", "random_seed"),
        "decoder": {name: extra.pop(name) for name in _SAMPLING if name in extra},
        "rate": swept["rate"] or _listed(given.take("benchmark.profiling.rate", "request_rate")),
        "arrival": "constant" if kind == "constant" else "poisson",
        "burstiness": given.take("benchmark.profiling.smoothness", "arrival_smoothness", "vllm_burstiness"),
        "concurrency": swept["concurrency"] or _listed(given.take("benchmark.profiling.concurrency", "concurrency")),
        "slo": _levels(given.take("benchmark.slos", "goodput"), notes),
        "warmups": given.take("benchmark.warmup.requests", "warmup_request_count", "num_warmup_requests"),
        "duration_s": given.take("benchmark.profiling.duration", "benchmark_duration"),
        "cycles": given.take("multiRun.numRuns", "num_profile_runs"),
        "gap_s": given.take("multiRun.cooldownSeconds", "profile_run_cooldown_seconds"),
        "request": extra,
    }


def _listed(value: Any) -> Any:
    """`1,2,4` as a list; a single value as it is."""
    if isinstance(value, str) and "," in value:
        return [resolve_plain(item) for item in value.split(",")]
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _first(key: str, found: Any, notes: Notes) -> Any:
    """The first of several, with a note about the others."""
    if not isinstance(found, list):
        return found
    notes += [(key, found[1:], "only the first is converted")] if found[1:] else []
    return found[0] if found else None


def _pairs(found: Any) -> Options:
    """`key:value`, several of these, or a mapping."""
    if isinstance(found, Mapping):
        return dict(found)
    words = found if isinstance(found, list) else [found] if found else []
    return {key: resolve_plain(value) for key, _, value in (str(word).partition(":") for word in words)}


def _guidellm(given: _Given, notes: Notes) -> Options:
    """Its scenario with `spec`, and the flat one of earlier versions, or the command lines of both."""
    below = given.take("below", default={})
    inner, own = _section(below.get("spec")), _section(given.left.pop("spec", None))
    spec = _Given({**below, **inner, **given.left, **own})
    given.left = spec.left
    spec.take("metadata", "spec")
    backend = {**_section(inner.get("backend")), **_section(_first("backend", spec.take("backend"), notes))}
    profile = _section(_first("profile", spec.take("profile"), notes))
    data = _section(_first("data", spec.take("data"), notes))
    limits = {str(item.pop("kind", "")): item for item in map(_section, _each(spec.take("constraints", "constraint")))}
    overrides = [item.get("profile.streams", item.get("profile.rate")) for item in _mappings(spec.take("benchmarks"))]
    kind = spec.take("rate_type", default=profile.pop("kind", "sweep"))
    level = overrides or _listed(spec.take("rate", default=profile.pop("streams", profile.pop("rate", 0))))
    is_rate = kind in ("constant", "poisson", "async")
    if kind not in ("constant", "poisson", "async", "concurrent", "synchronous", "throughput"):
        notes.append(("profile", kind, "write the loads: lists under traffic_simulation.target_qps or concurrency"))
    target = backend.pop("target", None) or spec.take("target")
    model = backend.pop("model", None) or spec.take("model")
    data_kind = str(data.pop("kind", "synthetic_text"))
    lengths = {key: data.pop(key, None) for key in ("prompt_tokens", "output_tokens")}
    seconds = (limits.pop("max_duration", {}) or {}).get("seconds")
    count = (limits.pop("max_requests", {}) or {}).get("count")
    path = data.pop("path", data.pop("source", data.pop("data", None)))
    backend.pop("kind", None)
    load = {
        "name": model,
        "tokenizer": spec.take("processor"),
        "url": target,
        "path": backend.pop("request_format", None),
        "api": spec.take("request_type"),
        "source": _source(
            spec,
            path=path if data_kind not in ("synthetic_text", "huggingface", "hf") else None,
            count=spec.take("max_requests", default=count),
            input_tok=lengths["prompt_tokens"],
            hub=path if data_kind in ("huggingface", "hf") else None,
        ),
        "output_tok": lengths["output_tokens"],
        "ignore_eos": lengths["output_tokens"] is not None or None,  # it asks for exactly as many
        "seed": spec.take("random_seed", default=_section(spec.take("seed")).get("seed")),
        "rate": level if is_rate else None,
        "arrival": "constant" if kind in ("constant", "async") else "poisson",
        "concurrency": None if is_rate or kind == "throughput" else level if kind == "concurrent" else 1,
        "duration_s": spec.take("max_seconds", default=seconds),
    }
    rest = {"backend": backend, "profile": profile, "data": data, "constraints": limits}
    spec.left |= {key: value for key, value in rest.items() if value}
    return load


def _each(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [] if found is None else [found]


def _section(found: Any) -> Options:
    """A mapping, or `kind=…,key=value`; commas without a key continue a list."""
    if isinstance(found, Mapping):
        return dict(found)
    out: Options = {}
    key = "kind"
    for part in str(found).split(",") if found else ():
        name, sign, value = part.partition("=")
        key = name if sign else key
        item = resolve_plain(value if sign else part)
        out[key] = item if sign or key not in out else [*_each(out[key]), item]
    return out


_READERS: Mapping[str, Callable[[_Given, Notes], Options]] = {
    "vllm": _vllm,
    "aiperf": _aiperf,
    "guidellm": _guidellm,
}
