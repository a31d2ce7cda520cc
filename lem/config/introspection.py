"""The options described: for programs by dotted name, as a reference, and as commented templates."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lem.base.durable import packaged_text
from lem.base.errors import ConfigurationError
from lem.base.log import WIDTH
from lem.config import kinds
from lem.config.backends import BACKENDS, PRESETS, SECTIONS, WIDTH_OPTIONS
from lem.config.campaign_config import CampaignConfig, CampaignGridConfig, CampaignHealthCheckConfig
from lem.config.experiment import ExperimentConfig
from lem.config.option import Section, declared, plain, walk
from lem.config.scalars import resolve_plain

__all__ = [
    "get_campaign_grid_params",
    "get_campaign_health_check_params",
    "get_campaign_params",
    "get_experiment_params",
]

Entry = Mapping[str, Any]


def get_campaign_params() -> dict[str, dict[str, Any]]:
    """Every option of a campaign by dotted name (`execution.cycles`).

    Each is a dict of `type`, `default`, `required`, `bounds` (in the words of JSON Schema, None without any),
    `choices`, `unit`, `description`, `backends`, `reload`, `variants`.
    """
    return _describe_all(CampaignConfig)


def get_campaign_grid_params() -> dict[str, dict[str, Any]]:
    """Every option of a grid by dotted name (`grid.backends`), as `get_campaign_params`."""
    return _describe_all(CampaignGridConfig, "grid")


def get_campaign_health_check_params() -> dict[str, dict[str, Any]]:
    """Every option of the health check by dotted name, as `get_campaign_params`."""
    return _describe_all(CampaignHealthCheckConfig, "health_check")


def get_experiment_params(backend: str | None = None) -> dict[str, dict[str, Any]]:
    """Every option of an experiment by dotted name, as `get_campaign_params`.

    Args:
        backend: leave out options that this backend does not honour; None keeps the options of all.

    Raises:
        ConfigurationError: the backend is unknown.
    """
    if backend is not None and backend not in BACKENDS:
        raise ConfigurationError(f"unknown backend {backend!r}", f"one of: {', '.join(BACKENDS)}")
    found = _describe_all(ExperimentConfig)
    return {key: entry for key, entry in found.items() if not backend or backend in (entry["backends"] or BACKENDS)}


def _describe_all(section: type[Section], prefix: str = "") -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for key, item, owner in walk(section, prefix):
        variant = declared(owner).get("type")
        entry = {**_describe(item), "variants": None if variant is None else [variant.default]}
        known = out.setdefault(key, entry)
        if known is not entry:  # several variants have the option, such as `prompts.sample_size`
            known["variants"] += entry["variants"]
            if known["choices"]:  # `type` itself, which distinguishes the variants
                known.update(choices=known["choices"] + entry["choices"], default=None, required=True)
            if entry["description"] not in known["description"]:
                known["description"] += f" {entry['variants'][0]}: {entry['description']}"
    return out


def _describe(item: kinds.Option) -> dict[str, Any]:
    is_required = item.default is kinds.REQUIRED
    return {
        "type": item.kind.label,
        "default": None if is_required else plain(item.default),
        "required": is_required,
        "bounds": dict(item.bounds) or None,
        "choices": list(item.choices) or None,
        "unit": item.unit,
        "description": item.description,
        "backends": None if item.backends is None else list(item.backends),
        "reload": item.reload,
    }


# Reference


def _constraint(entry: Entry) -> str:
    choices = " | ".join(map(_plain_word, entry["choices"] or ()))
    return ", ".join(filter(None, (kinds.bounds_text(entry["bounds"] or {}), choices, entry["unit"])))


def _plain_word(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return json.dumps(value)


def wrap(text: str, indent: str) -> list[str]:
    whole = re.sub(r"([≥≤<>]) (?=[0-9])", r"\1\0", text)
    lines = textwrap.wrap(whole, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def render_text(params: Mapping[str, Entry]) -> str:
    blocks = []
    for name, entry in params.items():
        default = "required" if entry["required"] else f"default {_plain_word(entry['default'])}"
        facts = "; ".join(part for part in (entry["type"], default, _constraint(entry)) if part)
        head = [f"{name}  {facts}"] if len(name) + len(facts) + 2 <= WIDTH else [name, *wrap(facts, "      ")]
        blocks.append("\n".join([*head, *wrap(_text(name, entry), "    "), ""]))
    return "\n".join(blocks)


def render_page() -> str:
    params = get_experiment_params()
    lines = [
        packaged_text("lem.config", "configuration.md"),
        *_table(get_campaign_params()),
        "\n## Experiment\n\n`model: gpt2`, `model: {name: gpt2}` and `model_name: gpt2` mean the same.\n",
        *_table({key: entry for key, entry in params.items() if key.partition(".")[0] not in BACKENDS}),
    ]
    for backend, section in SECTIONS.items():
        lines += ["", f"## {backend}", "", f"{section.__doc__} Those without a default are left to the engine.", ""]
        lines += _table({key: entry for key, entry in params.items() if key.startswith(f"{backend}.")})
    lines += ["", "## Presets", "", "| preset | what for | values |", "|---|---|---|"]
    for preset in PRESETS.values():
        lines.append(f"| {preset.name} | {preset.description} | `{json.dumps(dict(preset.values))}` |")
    return "\n".join(lines) + "\n"


def _table(params: Mapping[str, Entry]) -> Iterator[str]:
    yield "| option | type | default | constraint | what it does |"
    yield "|---|---|---|---|---|"
    for name, entry in params.items():
        default = "required" if entry["required"] else f"`{_plain_word(entry['default'])}`"
        cells = (f"`{name}`", entry["type"], default, _constraint(entry), _text(name, entry))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(name: str, entry: Entry) -> str:
    notes = [entry["description"]]
    if entry["variants"]:
        notes.append(f"With type {' or '.join(entry['variants'])}.")
    if entry["backends"] and name.partition(".")[0] not in BACKENDS:
        notes.append(f"Honoured by {', '.join(entry['backends'])}.")
    if entry["reload"]:
        notes.append("Changing it reloads the engine.")
    return " ".join(notes)


MAX_COMMENT_COLUMN = 48
_SERVE = ["vllm", "serve", "{model}", "--port", "{port}"]

# Words that YAML 1.1 readers take for something else are quoted, although lem itself would read them as text.
_PLAIN_TEXT = re.compile(r"[A-Za-z./_][A-Za-z0-9 ./_+@=-]*")
_OLD_WORDS = frozenset({"y", "n", "yes", "no", "on", "off"})


def template(kind: str, backend: str = "pytorch") -> str:
    section: type[Section]
    if kind == "campaign":
        widths = {"pytorch": [1, 8], "vllm": [64, 256], "tensorrt": [8, 32], "server": [64, 256]}
        overrides: dict[str, Any] = {backend: {WIDTH_OPTIONS.get(backend, "options.max_num_seqs"): widths[backend]}}
        if backend == "server":
            overrides["server"] |= {"engine": "vllm", "command": [_SERVE]}
        grid = {"backends": [backend], "shared": {"max_output_tokens": [64, 128]}, "backend_overrides": overrides}
        example: dict[str, Any] = {"campaign_name": "my-campaign", "model": "gpt2", "grid": grid}
        example["execution"] = {"cycles": 3}
        section, left_out, head = CampaignConfig, set(), "A campaign"
    else:
        example = {"model": "gpt2", "backend": backend, "max_output_tokens": 128}
        example |= {"server": {"engine": "vllm", "command": _SERVE}} if backend == "server" else {}
        section, left_out, head = ExperimentConfig, {*BACKENDS} - {backend}, "An experiment"
    lines = [f"# {head} for lem. What is commented out shows the default.\n# Check it with: lem config validate FILE\n"]
    for name, item in declared(section).items():
        if name not in left_out:
            lines += [*_option_lines(name, item, example.get(name), 0), ""]
    return "\n".join(lines)


def render_yaml(tree: Mapping[str, Any], comments: Mapping[tuple[str, ...], str]) -> str:
    lines = list(_lines(tree, comments, ()))
    widest = max((len(text) for text, comment in lines if comment and len(text) <= MAX_COMMENT_COLUMN), default=0)
    return "".join(f"{text.ljust(widest)}  # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


def yaml_scalar(value: Any) -> str:
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
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) and item for item in value):
            yield f"{indent}{yaml_scalar(key)}:", comments.get(where, "")
            for item in value:
                if not isinstance(item, Mapping) or not item:
                    yield f"{indent}  - {yaml_scalar(item)}", ""
                    continue
                for number, (text, _) in enumerate(_lines(item, {}, (*where, "-"))):
                    yield f"{text[: len(indent) + 2]}- {text[len(indent) + 4 :]}" if number == 0 else text, ""
        else:
            yield f"{indent}{yaml_scalar(key)}: {yaml_scalar(value)}", comments.get(where, "")


def _option_lines(name: str, item: kinds.Option, example: Any, depth: int, *, is_out: bool = False) -> Iterator[str]:
    is_out = is_out or example is None
    indent = "  " * depth
    head = f"{indent}{'#' if is_out else ''}{name}:"
    limits = "" if item.kind.sections else _constraint(_describe(item))
    yield from wrap(f"{item.description} [{limits}]" if limits else item.description, f"{indent}# ")
    is_list = isinstance(item.kind, kinds.ListKind)
    section = item.kind.sections[0] if len(item.kind.sections) == 1 and not is_list else None
    if section is not None and section.shorthand is None:
        yield head
        for key, inner in declared(section).items():
            yield from _option_lines(key, inner, (example or {}).get(key), depth + 1, is_out=is_out)
    elif isinstance(example, Mapping):
        yield head
        yield from (text for text, _ in _lines(example, {}, ("",) * (depth + 1)))
    else:
        yield f"{head} {yaml_scalar(example if example is not None else _describe(item)['default'])}"
