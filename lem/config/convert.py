"""Files of other tools as campaigns for lem: those of LLenergyMeasure, in both of its forms, and of load generators.

The first form has campaigns and experiments, which lem's own resemble; the second has studies with a `sweep`. Names and
values are those of `lem.config.terms`; `_RULES` has what depends on more than a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from lem.base.errors import ConfigurationError
from lem.base.log import shorten
from lem.config import benchmarks
from lem.config.backends import BACKENDS
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.introspection import yaml_scalar
from lem.config.kinds import MAX_SHOWN_VALUE, ConfigProblems, MapKind, Problem, describe
from lem.config.kinds import Path as Keys
from lem.config.load import read_mapping
from lem.config.option import Section, canonical, check_partial, declared, find_option, leaves, merge, nest
from lem.config.sections import BUNDLED_INPUT_TOKENS, DATASET_ALIASES
from lem.config.terms import VALUES, find_term, squashed

Options = Mapping[str, Any]
Rule = Callable[[Any, Options], "Options | str"]

# By what the files are recognised, beside lem's own keys: those of the first form, and those of the second.
_FIRST = {
    *("schema_version", "config_name", "adapter", "fp_precision", "num_input_prompts", "max_new_tokens", "batch_size"),
    *("batching", "sharding", "quantization", "decode_token_to_text", "query_rate", "streaming_warmup_requests"),
    "group_by",
}
_STUDY = {"name", "sweep", "experiments", "execution", "runners", "base", "version"}
_SECOND = {*_STUDY, "n", "dataset_order", "precision", "energy", "lora", "passthrough_kwargs", "output_dir"}
_SUBJECTS = {"model", "campaign_name", "configs", "grid", "sweep", "experiments", "base"}

# Defaults of the second form that are not lem's.
_DEFAULTS: Options = {"precision": "bf16", "dataset": {"name": "aienergyscore"}, "n": 100}
_ALIASES = {squashed(alias): alias for alias in DATASET_ALIASES}
_METERS = {"zeus": "nvml", "codecarbon": "auto", None: "none"}


def _meter(value: Any) -> Any:
    return _METERS.get(value, value) if value is None or isinstance(value, str) else value


def _sample_size(value: Any, options: Options) -> Options:
    for source in ("prompts", "dataset"):
        if isinstance(options.get(source), Mapping):
            return {} if {"sample_size", "n"} & set(options[source]) else {f"{source}.sample_size": value}
    length = _shorter(BUNDLED_INPUT_TOKENS, options.get("max_input_tokens"))
    return {"prompts.type": "synthetic", "prompts.input_tokens": length, "prompts.sample_size": value}


def _shorter(length: Any, limit: Any) -> Any:
    return min(length, limit) if isinstance(length, int) and isinstance(limit, int) else length


def _synthetic(value: Any, options: Options) -> Options:
    dataset = _below(options, "dataset")
    out = {"prompts.type": "synthetic", "prompts.sample_size": value, "prompts.seed": dataset.get("seed", 42)}
    for name, default in (("input", 512), ("output", 128)):
        length = dataset.get(f"{name}_len", default)
        out[f"prompts.{name}_tokens"] = _shorter(length, options.get(f"max_{name}_tokens", default))
    return out


def _below(options: Options, key: str) -> Options:
    found = options.get(key)
    return found if isinstance(found, Mapping) else {}  # with dotted names


def _compile(value: Any, options: Options) -> Options:
    mode = _below(options, "pytorch").get("torch_compile_mode") or "default"
    return {"pytorch.torch_compile": mode if value is True else value}


def _beams(name: str) -> Rule:
    def rule(value: Any, options: Options) -> Options:
        has_beams = _below(options, "pytorch").get("num_beams", 1) != 1
        return {"pytorch.beam_search.enabled": True, f"pytorch.beam_search.{name}": value} if has_beams else {}

    return rule


# By dotted name: what a value becomes, given the options of its experiment; or what to do instead.
_RULES: Mapping[str, Rule] = {
    "n": _sample_size,
    "num_input_prompts": _sample_size,
    "dataset.n": _synthetic,
    **{f"dataset.{name}": lambda _, __: {} for name in ("seed", "input_len", "output_len")},
    "dataset.name": lambda value, _: {"dataset.name": _ALIASES.get(squashed(str(value)), value)},
    "adapter": lambda value, _: {"model.adapter": value},
    "decoder.do_sample": lambda value, _: {} if value is True else {"decoder.do_sample": value},
    "energy.backend": lambda value, _: {"measurement.energy": _meter(value)},
    "pytorch.revision": lambda value, _: {"model.revision": value},
    "pytorch.torch_compile": _compile,
    "pytorch.torch_compile_mode": lambda _, __: {},
    **{f"pytorch.{name}": _beams(name) for name in ("num_beams", "early_stopping", "length_penalty")},
    "pytorch.beam_search.no_repeat_ngram_size": lambda value, _: {"pytorch.no_repeat_ngram_size": value},
    "vllm.attention.backend": lambda value, _: {} if value == "auto" else {"vllm.attention.backend": value},
    "query_rate": lambda _, __: "see traffic_simulation",
    "schedule": lambda _, __: "see schedule and daemon of a campaign",
    "passthrough_kwargs": lambda _, options: f"see {options['backend']}.extra",
}


def convert(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A campaign as plain data, and a line for each key that has no counterpart; ConfigurationError for other files.

    The words are the path of a file, or a command line of a tool that loads servers.
    """
    path = Path(words[0])
    if (tool := benchmarks.tool_of(words)) is not None:
        options = dict(benchmarks.read_words(words))
        named = [options.pop(key) for key in benchmarks.FILES[tool] if key in options]
        return _benchmark(path, tool, options | ({"below": read_mapping(str(named[0]))} if named else {}))
    found = read_mapping(path)
    if (tool := benchmarks.tool_of_file(found)) is not None:
        return _benchmark(path, tool, found)
    # The first form began with `decoder_config` for `decoder`, and so on.
    options = {key.removesuffix("_config"): value for key, value in found.items()}
    known = {*declared(CampaignConfig), *declared(ExperimentConfig), *_FIRST, *_SECOND}
    unknown = [key for key in options if key not in known]
    if not _SUBJECTS & set(options) or 2 * len(unknown) > len(options):
        shown = ", ".join(map(repr, (unknown or list(options))[:5]))
        raise ConfigurationError(
            f"{path}: expected a file of LLenergyMeasure, AIPerf, guidellm or vLLM bench, got the keys {shown}",
            "give a campaign, study, experiment or scenario, or a command line of the last three",
        )
    converter = _Converter(path)
    if "campaign_name" in options:
        campaign = converter.campaign(options)
    elif _FIRST & set(options):
        experiment = converter.experiment(options)
        campaign = {"campaign_name": str(options.get("config_name", path.stem)), "experiments": [experiment]}
    else:
        campaign = converter.study(options)
    return converter.without_problems(CampaignConfig, campaign), list(dict.fromkeys(converter.notes))


def _benchmark(path: Path, tool: str, options: Options) -> tuple[dict[str, Any], list[str]]:
    converter = _Converter(path)
    campaign, notes = benchmarks.convert_benchmark(tool, dict(options), path.stem)
    for note in notes:
        converter.note(*note)
    campaign["experiments"] = [converter.without_problems(ExperimentConfig, it) for it in campaign["experiments"]]
    return converter.without_problems(CampaignConfig, campaign), list(dict.fromkeys(converter.notes))


class _Converter:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []

    def note(self, key: str, value: Any, reason: str) -> None:
        text = f"{yaml_scalar(key)}: {shorten(yaml_scalar(value), MAX_SHOWN_VALUE)}  ({reason})"
        self.notes.append(" ".join(text.splitlines()))

    def section(self, options: Options, key: str) -> Options:
        found = options.get(key)
        if not isinstance(found, (Mapping, NoneType)):
            raise ConfigurationError(f"{self.path}: {key}: expected a mapping, got {describe(found)}")
        return found or {}

    def sections(self, options: Options, key: str) -> list[Options]:
        found = _listed(options.get(key) or [])
        return [self.section({f"{key}[{index}]": item}, f"{key}[{index}]") for index, item in enumerate(found)]

    # The two forms

    def campaign(self, options: Options) -> dict[str, Any]:
        """A campaign of the first form; the files that it names become part of it."""
        of_experiments = ("grid", "configs", "experiments")
        tree = self.translated(CampaignConfig, {k: v for k, v in options.items() if k not in of_experiments})
        grid = self.section(options, "grid")
        if grid:
            axes = {**self.section(grid, "axes"), **self.section(grid, "shared")}
            overrides = self.section(grid, "backend_overrides")
            for backend in overrides:
                found = self.section(overrides, backend)
                axes.update({f"{backend}.{key}": value for key, value in found.items()})
            around = {"backend": grid.get("backends"), "model": grid.get("models")}
            axes.update({key: value for key, value in around.items() if value is not None})
            tree.update(self.grid(axes, {"dataset": options["dataset"]} if options.get("dataset") else {}))
        listed = [{"config": name} for name in _listed(options.get("configs") or [])]
        experiments = [self.named(entry, options) for entry in (*listed, *self.sections(options, "experiments"))]
        return {**tree, "experiments": experiments} if experiments else tree

    def named(self, entry: Options, campaign: Options) -> dict[str, Any]:
        """The experiment that an entry of a campaign names by its file."""
        if not isinstance(entry.get("config"), str):
            return self.experiment(entry)
        file = self.path.parent / entry["config"]
        options = read_mapping(file if file.is_file() else Path(entry["config"]))
        for key, value in self.section(entry, "overrides").items():
            options = merge(ExperimentConfig, options, nest(key, value))
        if campaign.get("dataset") is not None:  # which wins over those of its experiments
            options = {key: value for key, value in options.items() if key not in ("dataset", "prompts")}
            options["dataset"] = campaign["dataset"]
        if campaign.get("num_samples") is not None:
            options["num_input_prompts"] = campaign["num_samples"]
        return self.experiment({"config_name": file.stem, **options})

    def study(self, options: Options) -> dict[str, Any]:
        """A study or an experiment of the second form, whose defaults are written out."""
        if "base" in options:
            below = read_mapping(self.path.parent / str(options["base"]))
            options = {**{key: value for key, value in below.items() if key not in _STUDY}, **options}
        fixed = {**_DEFAULTS, **{key: value for key, value in options.items() if key not in _STUDY}}
        tree: dict[str, Any] = {"campaign_name": str(options.get("name") or self.path.stem)}
        sweep = dict(self.section(options, "sweep"))
        if isinstance(fixed.get("backend"), list):
            sweep.setdefault("backend", fixed.pop("backend"))
        if sweep:
            tree.update(self.grid(sweep, fixed))
        listed = self.sections(options, "experiments") or ([] if sweep else [{}])
        if listed:
            tree["experiments"] = [self.experiment({**fixed, **entry}) for entry in listed]
        around = {key: options[key] for key in ("execution", "runners", "version") if key in options}
        return {**tree, **self.translated(CampaignConfig, around)}

    def grid(self, sweep: Options, fixed: Options) -> dict[str, Any]:
        scoped = [backend for backend in BACKENDS if any(key.startswith(f"{backend}.") for key in sweep)]
        backends = sweep.get("backend") or scoped or fixed.get("backend") or BACKENDS[0]
        grid: dict[str, Any] = {"backends": _listed(backends)}
        if "model" in sweep:
            grid["models"] = _listed(sweep["model"])
        fixed = {key: value for key, value in _prepared(fixed).items() if key not in {*sweep, "backend"}}
        for path, value in leaves(fixed):
            self.add_axis(grid, ".".join(map(str, path)), [value], fixed)
        for key, values in sweep.items():
            if key not in ("model", "backend"):
                self.add_axis(grid, "dataset.name" if key == "dataset" else key, values, fixed)
        # What all experiments have is where a campaign has it.
        tree: dict[str, Any] = {}
        shared = grid.get("shared", {})
        for name in list(shared):
            head, _, last = name.partition(".")
            target = "num_samples" if last == "sample_size" else name if head in ("model", "dataset", "io") else None
            if target is not None and len(shared[name]) == 1:
                tree = merge(CampaignConfig, tree, nest(target, shared.pop(name)[0]))
        if "model" in tree and "models" in grid:
            model = tree.pop("model")
            grid["models"] = [{"name": name, **model} for name in grid["models"]]
        return {**tree, "grid": grid}

    def add_axis(self, grid: dict[str, Any], key: str, values: Any, fixed: Options) -> None:
        own = key.partition(".")[0]
        backends = [one for one in grid["backends"] if own not in BACKENDS or one == own]
        if not backends:
            self.note(key, values, f"the grid does not have {own}")
        for backend in backends:
            rows = []
            for value in _listed(values):
                options = {**merge(None, fixed, nest(key, value)), "backend": backend}
                row = self.translate(ExperimentConfig, key, value, options)
                rows += [] if row is None else [row]
            columns = {target: [row.get(target) for row in rows] for row in rows[:1] for target in row}
            columns = {target: column[: len(column) if _varies(column) else 1] for target, column in columns.items()}
            if sum(map(_varies, columns.values())) > 1 or len({frozenset(row) for row in rows}) > 1:
                self.note(key, values, "not an axis in lem; write an experiment for each value")
                continue
            for target, column in columns.items():
                head, _, rest = target.partition(".")
                axes = grid.setdefault("backend_overrides" if head in BACKENDS else "shared", {})
                if head in BACKENDS:
                    axes, target = axes.setdefault(head, {}), rest
                axes[target] = column

    # What both have

    def experiment(self, options: Options) -> dict[str, Any]:
        options = _prepared(options)
        backend = str(options.get("backend", BACKENDS[0]))
        backend = VALUES["backend"].get(backend, backend)
        for other in [key for key in options if key in BACKENDS and key != backend]:
            self.note(other, options.pop(other), f"the backend is {backend}")
        tree = self.translated(ExperimentConfig, {**options, "backend": backend})
        return self.without_problems(ExperimentConfig, tree)

    def translated(self, section: type[Section], options: Options) -> dict[str, Any]:
        """The options of lem; where two keys mean the same, that of the other tool wins over lem's own name."""
        given: dict[str, Any] = {}
        named = [(".".join(map(str, path)), value) for path, value in leaves(options)]
        for key, value in sorted(named, key=lambda item: find_option(section, item[0]) is None):
            for target, found in (self.translate(section, key, value, options) or {}).items():
                if given.get(target, found) != found:
                    self.note(target, given[target], f"{key} wins")
                given[target] = found
        tree: dict[str, Any] = {}
        for target, found in given.items():
            tree = merge(section, tree, nest(target, found))
        return tree

    def translate(self, section: type[Section], written: str, value: Any, options: Options) -> dict[str, Any] | None:
        """What a value becomes, by dotted names; None, with a note, where lem has no counterpart or refuses it."""
        key = written
        rest = key.removeprefix("vllm.").partition(".")[2]
        if key.startswith("vllm.engine."):
            key = f"vllm.{rest}"
        elif key.startswith("vllm.sampling."):
            key = rest if find_option(section, rest) is not None else f"vllm.{rest}"
        name = rest.partition(".")[0]
        is_known = find_option(section, f"vllm.{name}") is not None or find_term(name, "vllm") is not None
        if written.startswith("vllm.engine.") and not is_known:  # vLLM gets it as it is
            found: Options | str = {f"vllm.extra.{rest}": value}
        else:
            found = self._targets(section, key, value, options)
        if isinstance(found, str):
            self.note(written, value, found or "no counterpart")
            return None
        out: dict[str, Any] = {}
        for target, item in found.items():
            values: Options = VALUES.get(target, {})
            item = values.get(str(item).lower(), item)
            option = find_option(section, target)
            if item is None and option is not None and (option.default is None or not option.is_nullable):
                continue  # the default of both
            problems = check_partial(section, nest(target, item))
            if problems:
                self.note(written, value, problems[0].message)
                return None
            out[target] = item
        return out

    def _targets(self, section: type[Section], key: str, value: Any, options: Options) -> Options | str:
        """The options of lem that a value is for, with their values; else what to do instead, or ""."""
        parts = key.split(".")
        above = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        rule = next((name for name in above if name in _RULES), None)
        if rule is not None and (section is ExperimentConfig or rule == "dataset.name"):
            return _RULES[rule](value, options)
        for name in above:
            option = find_option(section, name)
            if option is not None and (name == key or isinstance(option.kind, MapKind)):
                return {key: value}
        for name in above:
            upper, _, last = name.rpartition(".")
            term = find_term(last, upper.rpartition(".")[2])
            if term is None or find_option(section, name) is not None:
                continue
            backend = options.get("backend")
            known = [one for one in term.options if find_option(section, one) is not None]
            fitting = [one for one in known if one.partition(".")[0] == backend]
            fitting += [one for one in known if one.partition(".")[0] not in BACKENDS]
            if fitting and name == key:
                return {fitting[0]: value}
            return term.advice or f"see {' or '.join(fitting or term.options)}"
        return ""

    def without_problems(self, section: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
        """The tree without what lem refuses in it, each with a note."""
        placeholder = {"model": "none"} if section is ExperimentConfig else {}
        before: dict[str, Any] = {}
        while tree != before:
            before = tree
            for problem in _problems(section, {**placeholder, **tree}):
                is_about_gpus = problem.reason is not None and problem.reason.code == "gpus_not_named"
                tree = self._without(tree, ("gpus",) if is_about_gpus else problem.path, problem.message)
        return tree

    def _without(self, tree: dict[str, Any], path: Keys, reason: str, above: str = "") -> dict[str, Any]:
        """The tree without the value at a path, or without the last part of the path that is there."""
        if not path or path[0] not in tree:
            return tree
        first, *rest = map(str, path)
        below = tree[first]
        if rest and isinstance(below, dict) and rest[0] in below:
            return {**tree, first: self._without(below, tuple(rest), reason, f"{above}{first}.")}
        self.note(f"{above}{first}", below, reason)
        return {key: value for key, value in tree.items() if key != first}


def _problems(section: type[Section], mapping: Options) -> Sequence[Problem]:
    try:
        section.from_dict(mapping)
    except ConfigProblems as error:
        return error.problems
    return ()


def _varies(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _prepared(options: Options) -> dict[str, Any]:
    """The options of an experiment in their long form, without null."""
    out = canonical(ExperimentConfig, options)
    return {key: value for key, value in out.items() if value is not None or key == "random_seed"}
