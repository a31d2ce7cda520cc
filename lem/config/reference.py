"""The reference of all options, in words: for the terminal, and as the page docs/configuration.md."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lem.config.backend_config import BACKENDS, PyTorchConfig, TensorRTConfig, VllmConfig
from lem.config.introspection import get_campaign_params, get_experiment_params
from lem.config.kinds import Bounds
from lem.config.presets import PRESETS
from lem.config.schema import Section
from lem.log import WIDTH

__all__ = ["describe_bounds", "render_page", "render_text", "wrap"]

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
