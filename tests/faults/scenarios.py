"""The campaigns that faults are tried on: between them they pass through every kind of write and transition."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.config.campaign_config import generate_campaign_id
from lem.config.experiment import ExperimentConfig
from lem.config.option import put
from lem.orchestration.manifest import JOURNALED_FROM, SKIPPED, CampaignManifestEntry, ManifestManager
from tests.doubles import wall_clock
from tests.doubles.fault_injector import WALL_CLOCK_OFFSET
from tests.doubles.nvml.library import NvmlDouble, build_library
from tests.doubles.nvml.traces import Counter, GpuTrace, Load, Thermal, Trace

UUID = "GPU-11111111-2222-3333-4444-555555555555"
_NVML_SCRIPT, _LOAD_LOG, _CLOCK = "nvml", "load", "clock"
_HOUR_BACK = "".join(f"\\{byte:03o}" for byte in WALL_CLOCK_OFFSET.pack(-3600))


@dataclass(frozen=True)
class Tools:
    """What is built once for all campaigns."""

    program: Path  # a copy of lem and of the doubles
    clock: Path  # the library of the wall clock


@dataclass(frozen=True)
class Scenario:
    """A small campaign, the same each time it is run undisturbed."""

    name: str
    experiments: int  # how many it ends with
    cycles: int
    outputs: tuple[int, ...]
    experiment: Mapping[str, Any] = field(default_factory=dict)  # what all its experiments have in common
    options: tuple[str, ...] = ()  # of `lem campaign`
    is_metered: bool = False  # it runs beside a GPU, which is NVML's double, so samplers run
    is_stepping: bool = False  # the wall clock goes back by an hour within each window
    # so many experiments at its start write what those of PLAIN do; one fault is tried at a point there
    like_plain: int = 0
    # it continues a long manifest, and its names have so many letters: changes go to a journal, which is soon longer
    # than the manifest
    long_name: int = 0

    @property
    def opening(self) -> str:
        """How an undisturbed run begins."""
        return "--resume" if self.long_name else "--fresh"

    @property
    def processes(self) -> tuple[str, ...]:
        return ("host", "supervisor", "guardian", "engine", *(["sampler"] if self.is_metered else []))

    @property
    def campaign(self) -> str:
        """The campaign file. The trivial engine generates at once."""
        shared: dict[str, Any] = {
            "max_output_tokens": list(self.outputs),
            "prompts": [{"type": "file", "path": "prompts.txt"}],
            **{name: [value] for name, value in self.experiment.items()},
        }
        what: dict[str, Any] = {"grid": {"backends": ["pytorch"], "shared": shared}}
        if self.long_name:
            what = {"experiments": [self._named(number, shared) for number in self.outputs]}
        execution = {"cycles": self.cycles, "config_gap_seconds": 0, "cycle_gap_seconds": 0}
        return json.dumps({"campaign_name": "faults", "model": "trivial", **what, "execution": execution}, indent=2)

    def _named(self, number: int, shared: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        experiment: dict[str, Any] = {"config_name": f"{number}-{'x' * self.long_name}"}
        for name, (value, *_) in {**shared, "max_output_tokens": [number]}.items():
            experiment = put(ExperimentConfig, experiment, name, value)
        return experiment

    def prepare(self, work: Path, rig: Path, tools: Tools) -> dict[str, str]:
        """Write the campaign, and aside what it stands on; the environment in which it runs."""
        (work / "prompts.txt").write_text("one two three\nfour five\n", encoding="utf-8")
        (work / "faults.yaml").write_text(self.campaign, encoding="utf-8")
        if self.long_name and not (work / ".state").exists():
            _write_long_manifest(work / ".state" / "faults" / "campaign_manifest.json")
        environ = wall_clock.prepare(tools.clock, rig / _CLOCK)
        if self.is_stepping:
            # Written in place: a file that is cut short under a mapping is a SIGBUS for its readers.
            command = f"printf '{_HOUR_BACK}' | dd of={rig / _CLOCK} conv=notrunc status=none"
            script: dict[str, Any] = {"rules": [{"at": "generate", "do": "shell", "command": command}]}
            return {**environ, "LEMTEST_ENGINE_SCRIPT": json.dumps(script)}
        if not self.is_metered:
            return environ
        load_log = rig / _LOAD_LOG
        load_log.touch()
        trace = GpuTrace(
            uuid=UUID, load=Load(str(load_log), 80.0, 350.0), counter=Counter(period_s=0.02), thermal=Thermal(tau_s=1.0)
        )
        double = NvmlDouble(rig / _NVML_SCRIPT)
        double.say(*Trace(1, (trace,)).lines())
        script = {"gpus": [UUID], "load_log": str(load_log), "token_s": 0.01}
        return {**environ, **double.variables(), "LEMTEST_ENGINE_SCRIPT": json.dumps(script)}

    def build(self) -> None:
        """Build what `prepare` then finds, before several of them run at a time."""
        if self.is_metered:
            build_library()


def _write_long_manifest(path: Path) -> None:
    """The manifest of a campaign from which so many experiments were removed that it has a journal."""
    entries = [
        CampaignManifestEntry(f"{number:012x}-c1", "a", "a", "a", "pytorch", None, 0, status=SKIPPED)
        for number in range(JOURNALED_FROM)
    ]
    manager = ManifestManager(path)
    manifest = manager.create_manifest(generate_campaign_id("faults"), "faults", "", entries)
    manifest.run_id = "20260714T100000Z-1f3a"
    manager.save(manifest)


_AT_ONCE: dict[str, object] = {
    "warmup.enabled": False,
    "measurement.min_window_sec": 0.02,
    "measurement.max_wait_pct": None,
    "gpus": [],
}

PLAIN = Scenario("plain", experiments=4, cycles=2, outputs=(4, 8), experiment=_AT_ONCE)

STEPPING = Scenario("stepping", experiments=1, cycles=1, outputs=(4,), experiment=_AT_ONCE, is_stepping=True)

# No interval is ever that narrow, so a cycle is added, and the next one is the last that may be.
TOPPED_UP = Scenario(
    "top-up",
    experiments=6,
    cycles=5,
    outputs=(4,),
    experiment=_AT_ONCE,
    options=("--until", "ci=0.0001%:output_tok_per_s", "--max-cycles", "6"),
    like_plain=5,
)

METERED = Scenario(
    "metered",
    experiments=1,
    cycles=1,
    outputs=(4,),
    experiment={
        "measurement.min_window_sec": 0.2,
        "measurement.max_wait_pct": None,
        "gpus": ["0"],
        # Long enough to see how often the counter changes, which says how long a window has to be.
        "warmup": {"timeout_seconds": 0.5},
        "baseline.enabled": False,
        "save_outputs": True,
    },
    is_metered=True,
)

# The journal becomes longer than the manifest once half of the experiments are completed.
JOURNALED = Scenario("journal", experiments=4, cycles=2, outputs=(4, 8), experiment=_AT_ONCE, long_name=40_000)

SCENARIOS = (PLAIN, TOPPED_UP, METERED, JOURNALED)
