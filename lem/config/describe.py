"""The options described: reference page and commented template."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lem.base.log import WIDTH
from lem.config.backends import BACKENDS, WIDTH_OPTIONS, PyTorchConfig, TensorRTConfig, VllmConfig
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.introspection import describe, get_campaign_params, get_experiment_params
from lem.config.kinds import Bounds, ListKind, resolve_plain
from lem.config.option import Declared, Section, declared
from lem.config.sources import PRESETS

Entry = Mapping[str, Any]


def _describe_default(entry: Entry) -> str:
    """The default as YAML writes it, or that there is none."""
    return "required" if entry["required"] else f"default {_plain_word(entry['default'])}"


def describe_bounds(entry: Entry) -> str:
    """Limits, choices and unit in a few words; '' without any."""
    parts = []
    if entry["bounds"]:
        limits = entry["bounds"]
        bounds = Bounds(
            limits.get("minimum"), limits.get("maximum"), limits.get("exclusiveMinimum"), limits.get("exclusiveMaximum")
        )
        parts.append(str(bounds))
    if entry["choices"]:
        parts.append(" | ".join(_plain_word(choice) for choice in entry["choices"]))
    if entry["unit"]:
        parts.append(entry["unit"])
    return ", ".join(parts)


def _plain_word(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return json.dumps(value)


def wrap(text: str, indent: str) -> list[str]:
    """Lines of at most 80 columns, each after the indent; a sign stays with its number."""
    whole = re.sub(r"([≥≤<>]) (?=[0-9])", r"\1\0", text)
    lines = textwrap.wrap(whole, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def render_text(params: Mapping[str, Entry]) -> str:
    """Options for a terminal of 80 columns: name and facts, then what it does."""
    blocks = []
    for name, entry in params.items():
        facts = "; ".join(part for part in (entry["type"], _describe_default(entry), describe_bounds(entry)) if part)
        notes = _notes(name, entry)
        text = " ".join([entry["description"], *notes])
        head = [f"{name}  {facts}"] if len(name) + len(facts) + 2 <= WIDTH else [name, *wrap(facts, "      ")]
        blocks.append("\n".join([*head, *wrap(text, "    "), ""]))
    return "\n".join(blocks)


def render_page() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration reference",
        "",
        "<!-- Written by `lem config fields --markdown`; edit the declarations in lem/config instead. -->",
        "",
        "A campaign or an experiment is a YAML file. Command line wins over file, file over preset, preset over",
        "default. A key that is not listed here, a value out of bounds and a key written twice are errors. `${VAR}`",
        "and `${VAR:-default}` expand in text; `_extends: base.yaml` inherits another file.",
        "",
        "## Campaign",
        "",
        *_table(get_campaign_params()),
        "",
        "## Experiment",
        "",
        "`model: gpt2`, `model: {name: gpt2}` and `model_name: gpt2` mean the same.",
        "",
        *_table(
            {key: entry for key, entry in get_experiment_params().items() if key.partition(".")[0] not in BACKENDS}
        ),
    ]
    sections: dict[str, type[Section]] = {"pytorch": PyTorchConfig, "vllm": VllmConfig, "tensorrt": TensorRTConfig}
    for backend, section in sections.items():
        own = {key: entry for key, entry in get_experiment_params().items() if key.startswith(f"{backend}.")}
        lines += ["", f"## {backend}", "", f"{section.__doc__} Those without a default are left to the engine.", ""]
        lines += _table(own)
    lines += ["", "## Presets", "", "| preset | what for | values |", "|---|---|---|"]
    for preset in PRESETS.values():
        lines.append(f"| {preset.name} | {preset.description} | `{json.dumps(dict(preset.values))}` |")
    return "\n".join(lines) + "\n"


def _table(params: Mapping[str, Entry]) -> Iterator[str]:
    yield "| option | type | default | constraint | what it does |"
    yield "|---|---|---|---|---|"
    for name, entry in params.items():
        default = "required" if entry["required"] else f"`{_plain_word(entry['default'])}`"
        text = " ".join([entry["description"], *_notes(name, entry)])
        cells = (f"`{name}`", entry["type"], default, describe_bounds(entry), text)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _notes(name: str, entry: Entry) -> list[str]:
    notes = []
    if entry["variants"]:
        notes.append(f"With type {' or '.join(entry['variants'])}.")
    if entry["backends"] and name.partition(".")[0] not in BACKENDS:
        notes.append(f"Honoured by {', '.join(entry['backends'])}.")
    if entry["reload"]:
        notes.append("Changing it reloads the engine.")
    return notes


MAX_COMMENT_COLUMN = 48

# Words that YAML 1.1 readers take for something else are quoted, although lem itself would read them as text.
_PLAIN_TEXT = re.compile(r"[A-Za-z./_][A-Za-z0-9 ./_+@=-]*")
_OLD_WORDS = frozenset({"y", "n", "yes", "no", "on", "off"})

_CAMPAIGN_EXAMPLE: Mapping[str, Any] = {
    "campaign_name": "my-campaign",
    "model": "gpt2",
    "grid": {"backends": ["pytorch"], "shared": {"max_output_tokens": [64, 128]}},
    "execution": {"cycles": 3},
}
_AXES: Mapping[str, Mapping[str, Any]] = {
    "pytorch": {WIDTH_OPTIONS["pytorch"]: [1, 8]},
    "vllm": {WIDTH_OPTIONS["vllm"]: [64, 256]},
    "tensorrt": {WIDTH_OPTIONS["tensorrt"]: [8, 32]},
}


def campaign_template(backend: str = "pytorch") -> str:
    """A campaign to start from: a small grid, everything else as a comment with its default."""
    grid = {
        "backends": [backend],
        "shared": {"max_output_tokens": [64, 128]},
        "backend_overrides": {backend: _AXES[backend]},
    }
    head = "A campaign for lem. What is commented out shows the default."
    return _template(CampaignConfig, {**_CAMPAIGN_EXAMPLE, "grid": grid}, head, frozenset())


def experiment_template(backend: str = "pytorch") -> str:
    """An experiment to start from."""
    example = {"model": "gpt2", "backend": backend, "max_output_tokens": 128}
    head = "An experiment for lem. What is commented out shows the default."
    return _template(ExperimentConfig, example, head, frozenset(BACKENDS) - {backend})


def render_yaml(tree: Mapping[str, Any], comments: Mapping[tuple[str, ...], str]) -> str:
    """Plain data as YAML, with a comment at the end of the line where there is one."""
    lines = list(_lines(tree, comments, ()))
    widest = max((len(text) for text, comment in lines if comment and len(text) <= MAX_COMMENT_COLUMN), default=0)
    return "".join(f"{text.ljust(widest)}  # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


def yaml_scalar(value: Any) -> str:
    """A value on one line of YAML, which every reader reads alike."""
    if isinstance(value, str):
        is_plain = _PLAIN_TEXT.fullmatch(value) and value == value.strip() and isinstance(resolve_plain(value), str)
        return value if is_plain and value.lower() not in _OLD_WORDS else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{yaml_scalar(key)}: {yaml_scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(yaml_scalar(item) for item in value) + "]"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{value:.1f}"
    return json.dumps(value)


def _lines(
    tree: Mapping[str, Any], comments: Mapping[tuple[str, ...], str], path: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    indent = "  " * len(path)
    for key, value in tree.items():
        where = (*path, key)
        if isinstance(value, Mapping) and value and where not in comments:
            yield f"{indent}{yaml_scalar(key)}:", ""
            yield from _lines(value, comments, where)
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            yield f"{indent}{yaml_scalar(key)}:", comments.get(where, "")
            for item in value:
                yield f"{indent}  - {yaml_scalar(item)}", ""
        else:
            yield f"{indent}{yaml_scalar(key)}: {yaml_scalar(value)}", comments.get(where, "")


def _template(section: type[Section], example: Mapping[str, Any], head: str, left_out: frozenset[str]) -> str:
    lines = [f"# {head}", "# Check it with: lem config validate FILE", ""]
    for name, item in declared(section).items():
        if name not in left_out:
            lines += [*_option_lines(name, item, example.get(name), 0), ""]
    return "\n".join(lines)


def _option_lines(name: str, item: Declared, example: Any, depth: int, *, is_out: bool = False) -> Iterator[str]:
    """An option with what it does above it; commented out, `#name: value`, unless the example has a value for it."""
    is_out = is_out or example is None
    indent = "  " * depth
    head = f"{indent}{'#' if is_out else ''}{name}:"
    yield from wrap(_told(item), f"{indent}# ")
    is_list = isinstance(item.kind_of_value, ListKind)
    section = item.sections[0] if len(item.sections) == 1 and not is_list else None
    if section is not None and section.shorthand is None:
        yield head
        for key, inner in declared(section).items():
            yield from _option_lines(key, inner, (example or {}).get(key), depth + 1, is_out=is_out)
    elif isinstance(example, Mapping):
        yield head
        yield from (text for text, _ in _lines(example, {}, ("",) * (depth + 1)))
    else:
        yield f"{head} {yaml_scalar(example if example is not None else describe(item)['default'])}"


def _told(item: Declared) -> str:
    limits = "" if item.sections else describe_bounds(describe(item))
    return f"{item.option.description} [{limits}]" if limits else item.option.description
