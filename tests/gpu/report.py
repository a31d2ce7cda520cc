"""The table of what was found out: as text, as Markdown to be pasted, and as a file that a later call reads."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.meters.samples import GpuHeader
from tests.gpu.finding import DONE, Finding, Section

FIGURES, MARKDOWN = "figures.json", "figures.md"
NOTHING = "–"
REHEARSED = "REHEARSAL on the NVML double: no figure here says anything about a GPU"


@dataclass(frozen=True)
class Head:
    """Of what, and when."""

    gpu: GpuHeader
    utc: str
    extent: str
    is_rehearsal: bool
    versions: Mapping[str, str] = field(default_factory=dict)  # of lem and of the engine's packages

    def lines(self) -> list[str]:
        gpu = self.gpu
        limit = "unknown" if gpu.power_limit_w is None else f"{gpu.power_limit_w:g} W"
        vbios = gpu.vbios or "unknown"
        persistence = {True: "on", False: "off", None: "unknown"}[gpu.persistence_mode]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [REHEARSED] if self.is_rehearsal else []
        return [
            *lines,
            f"{gpu.name}, driver {gpu.driver}, VBIOS {vbios}, power limit {limit}, persistence mode {persistence}",
            f"{self.utc}, {self.extent}, Python {platform.python_version()}" + (f", {versions}" if versions else ""),
        ]


def shown(value: float | None) -> str:
    """A value with four significant digits, thousands whole."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def table(head: Head, sections: Sequence[Section]) -> str:
    lines = ["", *head.lines()]
    for section in sections:
        lines += ["", section.title + _status(section)]
        for item in section.findings:
            target = f"   [target: {item.target}]" if item.target else ""
            lines.append(f"  {item.name:<62} {shown(item.value):>9} {item.unit:<6} {item.note}{target}".rstrip())
    return "\n".join(lines) + "\n"


def markdown(head: Head, sections: Sequence[Section]) -> str:
    lines = [f"{line}  " for line in head.lines()]
    for section in sections:
        lines += ["", f"**{section.title}**{_status(section)}"]
        if section.findings:
            lines += ["", "| | | | |", "|---|---:|---|---|"]
        for item in section.findings:
            target = f" (target: {item.target})" if item.target else ""
            cells = (item.name, shown(item.value), item.unit, item.note + target)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _status(section: Section) -> str:
    if section.status == DONE:
        return ""
    return f" — {section.status}" + (f": {section.message}" if section.message else "")


def write(out: Path, head: Head, sections: Sequence[Section]) -> None:
    """Both files, each whole or not at all."""
    document = {"head": dataclasses.asdict(head), "sections": [dataclasses.asdict(item) for item in sections]}
    durable.write_json(out / FIGURES, document)
    durable.write_text(out / MARKDOWN, markdown(head, sections))


def read_sections(out: Path) -> tuple[Section, ...]:
    """What an earlier call found out; () where there was none."""
    try:
        document: Mapping[str, Any] = durable.read_json(out / FIGURES)
    except FileNotFoundError:
        return ()
    return tuple(
        Section(**{**item, "findings": tuple(Finding(**found) for found in item["findings"])})
        for item in document["sections"]
    )
