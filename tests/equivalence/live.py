"""Campaigns that both builds really run, with the trivial engine of their own tree's tests/doubles.

Nothing of them is the same twice but what was planned, done and told, so they are compared masked (masks.py). Scenes
are made so that what happens does not depend on the speed of the machine: a signal is sent at an event, while the
engine hangs; a window has one pass over its prompts, which takes longer than the window has to last.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.equivalence.builds import Build
from tests.equivalence.recorded import RECORDED
from tests.equivalence.staging import Interruption, LiveScene, LiveStep

FRESH = ("campaign", "c.yaml", "--executor", "local", "--yes", "--json")
RESUME = (*FRESH, "--resume")
TEXT = ("campaign", "c.yaml", "--executor", "local", "--yes")

STATUS = LiveStep(("status", "--json"))
TABLE = LiveStep(("results", "show", "demo", "--json"))
LOOKS = (
    STATUS,
    TABLE,
    LiveStep(("status", "demo")),
    LiveStep(("results", "list", "--json")),
    LiveStep(("results", "show", "demo")),
    LiveStep(("results", "export", "--format", "json")),
    LiveStep(("results", "recompute", "demo", "--json")),
)

HANG = ({"at": "generate", "do": "hang", "when": {"max_output_tokens": 8}},)
BROKEN = ({"at": "load", "do": "fail", "text": "no such weights", "kind": "model", "permanent": True},)
# Long enough for a meter that is read once a second, and with a load for it to see.
BUSY = ({"at": "generate", "do": "shell", "command": "timeout 2.5 sh -c 'while :; do :; done' || true"},)
AT_WINDOW = {"event": "phase", "phase": "window", "done": 1}
AT_LOAD = {"event": "phase", "phase": "load"}


def live_scenes(_old: Build) -> Iterator[LiveScene]:
    """Every campaign that is run."""
    yield from _whole_scenes()
    yield from _failing_scenes()
    yield from _interrupted_scenes()
    yield from _fleet_scenes()
    yield from _experiment_scenes()


def _whole_scenes() -> Iterator[LiveScene]:
    """Campaigns that run to their end."""
    plain = {"c.yaml": campaign()}
    yield LiveScene("normal", (LiveStep(FRESH), *LOOKS, LiveStep(RESUME), LiveStep((*RESUME, "--cycles", "3"))), plain)
    yield LiveScene("text", (LiveStep(TEXT), LiveStep((*TEXT, "--fresh", "-q"))), plain)
    shuffled = {"c.yaml": campaign(structure="shuffled", seed=7, reuse="campaign")}
    yield LiveScene("shuffled", (LiveStep(FRESH), TABLE), shuffled)
    metered = {"measurement.energy": ["tdp_estimate"], "measurement.cpu_tdp_w": [65]}
    yield LiveScene("energy", (LiveStep(FRESH, BUSY), TABLE, *LOOKS[5:]), {"c.yaml": campaign((4,), options=metered)})
    until = LiveStep((*FRESH, "--until", "ci=90%:output_tok_per_s", "--max-cycles", "6"))
    yield LiveScene("until", (until, TABLE), {"c.yaml": campaign((4,))})
    slow = ({"at": "generate", "do": "sleep", "seconds": 2},)
    yield LiveScene("budget", (LiveStep((*FRESH, "--budget", "1s"), slow), STATUS), plain)


def _failing_scenes() -> Iterator[LiveScene]:
    plain = {"c.yaml": campaign()}
    many = {"c.yaml": campaign((1, 2, 3, 4, 5, 6), 1, reuse="none")}
    yield LiveScene("failing", (LiveStep(FRESH, _failures()), *LOOKS[:5], LiveStep(RESUME)), many)
    yield LiveScene("fail-fast", (LiveStep((*FRESH, "--fail-fast"), BROKEN), STATUS), plain)
    yield LiveScene("failed-text", (LiveStep(TEXT, BROKEN),), plain)
    bad_request = ({"failing_requests": [0]},)
    yield LiveScene("failing-requests", (LiveStep(FRESH, bad_request), TABLE), {"c.yaml": campaign((4,), 1)})


def _interrupted_scenes() -> Iterator[LiveScene]:
    """Campaigns that were stopped, and go on; by this build, and by this build after the old one."""
    plain = {"c.yaml": campaign()}
    for name in ("SIGINT", "SIGTERM", "SIGKILL"):
        for is_old in (False, True):
            stopped = LiveStep(FRESH, HANG, Interruption(signal.Signals[name], AT_WINDOW), is_old)
            steps = (stopped, STATUS, LiveStep(RESUME), TABLE)
            yield LiveScene(f"{name.lower()}{'-of-old' if is_old else ''}", steps, plain)
    hang = ({"at": "load", "do": "hang"},)
    loading = LiveStep(FRESH, hang, Interruption(signal.SIGTERM, AT_LOAD))
    yield LiveScene("sigterm-loading", (loading, LiveStep(TEXT[:-1])), plain)
    yield LiveScene("locked", (LiveStep(FRESH, HANG, Interruption(signal.SIGINT, AT_WINDOW), beside=FRESH),), plain)
    edited = LiveStep(("campaign", "d.yaml", *RESUME[2:]))
    files = {**plain, "d.yaml": campaign(outputs=(4, 16))}
    yield LiveScene("edited-of-old", (LiveStep(FRESH, is_old=True), edited, STATUS), files)
    recording = RECORDED / "interrupted"
    recorded = {
        "c.yaml": {"copy": str(recording / "interrupted.yaml")},
        ".state": {"copy": str(recording / "state")},
        "results": {"copy": str(recording / "results")},
    }
    allowed = LiveStep((*RESUME, "--allow-environment-change"), BUSY)
    table = LiveStep(("results", "show", "interrupted", "--json"))
    yield LiveScene("recorded", (LiveStep(TEXT[:-1]), LiveStep(RESUME, BUSY), allowed, table, STATUS), recorded)


def _fleet_scenes() -> Iterator[LiveScene]:
    """One plan, its parts, and their merge."""
    write = ("campaign", "c.yaml", "--write-plan", "plan.json", "--hosts", "one,two")
    first, second = ((*FRESH, "--plan", "plan.json", "--shard", f"{n}/2", "-o", f"host{n}") for n in (1, 2))
    merge = LiveStep(
        ("merge", "host1", "host2", "--output", "all", "--plan", "plan.json", "--anchor-tolerance", "1e9%", "--json")
    )
    table = LiveStep(("results", "show", "demo", "--results-dir", "all", "--json"))
    files = {"c.yaml": campaign((4, 8, 16), 1)}
    yield LiveScene("plan", (LiveStep(write), LiveStep(first), LiveStep(second), merge, table), files)
    of_old = (LiveStep(write, is_old=True), LiveStep(first, is_old=True), LiveStep(second), merge)
    yield LiveScene("plan-of-old", of_old, files)
    yield LiveScene("shard", (LiveStep((*FRESH, "--shard", "2/2")),), files)
    yield LiveScene("replicate", (LiveStep((*write, "--replicate")), LiveStep(second)), files)


def _experiment_scenes() -> Iterator[LiveScene]:
    one = ("experiment", "e.yaml", "--yes")
    files = {"e.yaml": experiment()}
    steps = (LiveStep(one), LiveStep((*one, "--json", "--cycles", "2")), LiveStep((*one, "--json"), BROKEN))
    yield LiveScene("experiment", steps, files)
    streaming = {"e.yaml": experiment("streaming: true\nsave_outputs: true\n")}
    yield LiveScene("experiment-streaming", (LiveStep((*one, "--json")),), streaming)
    traffic = "traffic_simulation: {enabled: true, mode: constant, target_qps: 20, seed: 3}\n"
    yield LiveScene("experiment-traffic", (LiveStep((*one, "--json")),), {"e.yaml": experiment(traffic)})


def _failures() -> list[dict[str, Any]]:
    """Each way in which an engine fails, told apart by the configuration's `max_output_tokens`."""

    def at(outputs: int, place: str, action: str, **more: Any) -> dict[str, Any]:
        return {"at": place, "do": action, "when": {"max_output_tokens": outputs}, **more}

    return [
        at(1, "load", "refuse", text="torch_compile is not for this engine"),
        at(2, "load", "fail", text="out of memory", kind="out_of_memory", permanent=True),
        at(3, "load", "crash", text="a library broke"),
        at(4, "generate", "crash", text="broke once", once="crashed"),
        at(5, "generate", "exit", code=7),
        at(6, "generate", "print", text='{"type": "result"} is printed by engines too'),
    ]


def campaign(
    outputs: Sequence[int] = (4, 8), cycles: int = 2, *, options: Mapping[str, Any] | None = None, **execution: Any
) -> str:
    """A campaign named demo that does as little as there can be."""
    shared = {
        "max_output_tokens": list(outputs),
        "warmup.enabled": [False],
        "measurement.min_window_sec": [0.01],
        "prompts": [{"type": "synthetic", "input_tokens": 3, "sample_size": 2}],
        "gpus": [[]],
        "ignore_eos": [True],
        **(options or {}),
    }
    chosen = {"cycles": cycles, "config_gap_seconds": 0, "cycle_gap_seconds": 0, **execution}
    grid = {"backends": ["pytorch"], "shared": shared}
    return json.dumps({"campaign_name": "demo", "model": "none", "grid": grid, "execution": chosen}, indent=1)


def experiment(more: str = "") -> str:
    """An experiment that does as little as there can be."""
    prompts = "prompts: {type: synthetic, input_tokens: 3, sample_size: 2}\n"
    least = (
        "model: none\nmax_output_tokens: 4\ngpus: []\nwarmup: {enabled: false}\nmeasurement: {min_window_sec: 0.01}\n"
    )
    return least + prompts + more
