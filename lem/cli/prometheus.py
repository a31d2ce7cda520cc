"""The state and the results of a campaign as Prometheus text, for the textfile collector of node_exporter."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from lem.base import __version__, durable
from lem.base.dataclass import dataclass
from lem.base.errors import LemError, UserError
from lem.base.units import hash_label
from lem.orchestration.status import Event
from lem.results.metrics import METRIC_BY_NAME
from lem.results.run import Configuration, Run

SUFFIX = ".prom"  # of the files that the collector reads
_logger = logging.getLogger(__name__)
_EVERY_S = 5.0  # between changes of what is going on
_READING_SHARE = 0.02  # of the time may be spent on reading results during the campaign

# Metrics by the convention of Prometheus: base units in words, at the end.
_EXPORTED: Mapping[str, tuple[str, str]] = {
    "energy_per_output_tok_j": ("energy_per_output_token", "joules"),
    "gpu_energy_net_per_output_tok_j": ("gpu_energy_net_per_output_token", "joules"),
    "energy_per_request_j": ("energy_per_request", "joules"),
    "energy_per_good_request_j": ("energy_per_good_request", "joules"),
    "output_tok_per_s": ("output_tokens", "per_second"),
    "requests_per_s": ("requests", "per_second"),
    "good_requests_per_s": ("good_requests", "per_second"),
    "ttft_p50_s": ("ttft_p50", "seconds"),
    "tpot_p50_s": ("tpot_p50", "seconds"),
    "e2e_p50_s": ("e2e_p50", "seconds"),
}


def prometheus_path(text: str) -> Path:
    if not text.endswith(SUFFIX):
        raise ValueError(f"expected a name that ends in {SUFFIX}, as node_exporter reads no other file, got {text!r}")
    return Path(text)


_Labels = Mapping[str, str]


@dataclass(frozen=True)
class _Family:
    """A gauge with its samples."""

    name: str
    help: str
    samples: Sequence[tuple[_Labels, float]]

    def lines(self) -> Iterator[str]:
        if self.samples:
            yield f"# HELP {self.name} {_escaped(self.help)}"
            yield f"# TYPE {self.name} gauge"
        for labels, value in self.samples:
            pairs = ",".join(f'{name}="{_escaped(text, quote=True)}"' for name, text in labels.items())
            yield f"{self.name}{{{pairs}}} {value!r}" if pairs else f"{self.name} {value!r}"


def _escaped(text: str, *, quote: bool = False) -> str:
    text = durable.utf8(text).decode().replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


class PrometheusFile:
    """Follows the events of a campaign and keeps the file current; what cannot be written is warned about once."""

    def __init__(
        self, path: Path, campaign: str, read: Callable[[str], Run], now: Callable[[], float] = time.time
    ) -> None:
        """`read` gives the results of the run with an ID. UserError: the file cannot be written."""
        self._path, self._campaign, self._read, self._now = path, {"campaign": campaign}, read, now
        self._run_id = ""
        self._activity: dict[str, Any] = {}
        self._run: Run | None = None
        self._event = Event("starting")
        self._is_running = False
        self._began_s: float | None = None
        self._ended: tuple[float, int] | None = None
        self._next_read_s = self._next_write_s = 0.0
        self._has_failed = False
        try:
            self._write()
        except OSError as error:
            raise UserError(f"{path}: {durable.reason_of(error)}", "name another file with --prometheus") from error

    def __call__(self, event: Event) -> None:
        now_s = self._now()
        if self._is_running or event.kind == "campaign_started":  # a note between two runs of a daemon counts nothing
            self._event = event
        if event.kind == "campaign_started":
            self._is_running, self._run_id = True, str(event.data["run_id"])
            self._run, self._ended = None, None
            self._began_s, self._next_read_s = now_s, 0.0
        elif event.kind in ("experiment_started", "gap"):
            self._activity = {**event.data, "phase": "gap" if event.kind == "gap" else "starting"}
        elif event.kind == "phase":
            self._activity |= {**event.data, "power_w": None}
        elif event.kind == "progress":
            self._activity |= event.data
        # Results are read between experiments, where that disturbs no window.
        is_between = event.kind in ("campaign_started", "experiment_completed", "experiment_failed")
        if is_between and now_s >= self._next_read_s:
            self._read_results()
            self._next_read_s = self._now() + (self._now() - now_s) / _READING_SHARE
        if event.kind not in ("note", "tick", "progress") or now_s >= self._next_write_s:
            self._write_or_warn()

    def end(self, exit_code: int) -> None:
        """The run has ended with this code, and nothing else will be written to its results."""
        self._is_running, self._ended = False, (self._now(), exit_code)
        self._read_results()
        self._write_or_warn()

    def _read_results(self) -> None:
        if self._run_id:
            with contextlib.suppress(LemError):  # of a damaged index, which the commands that show results report
                self._run = self._read(self._run_id)

    def _write_or_warn(self) -> None:
        try:
            self._write()
        except OSError as error:
            if not self._has_failed:
                _logger.warning("%s: %s", self._path, durable.reason_of(error))
            self._has_failed = True

    def _write(self) -> None:
        self._next_write_s = self._now() + _EVERY_S
        text = "".join(f"{line}\n" for family in self._families() for line in family.lines())
        durable.write_bytes(self._path, durable.utf8(text), is_synced=False)

    def _families(self) -> Iterator[_Family]:
        # With the campaign, since the collector refuses a sample that two files have.
        yield _Family("lem_build_info", "The version of lem.", [({**self._campaign, "version": __version__}, 1)])
        yield from self._state()
        if self._run is not None:
            yield from _results(self._campaign, self._run.configurations)

    def _state(self) -> Iterator[_Family]:
        event, doing = self._event, self._activity

        def one(name: str, what: str, value: float | None, **labels: Any) -> _Family:
            every = {**self._campaign, **{key: str(text) for key, text in labels.items()}}
            found = [] if value is None else [(every, value)]
            return _Family(f"lem_campaign_{name}", what, found)

        ended_s, code = self._ended or (None, None)
        yield one("info", "The run of the campaign.", 1, run_id=self._run_id)
        yield one("running", "1 while the campaign runs.", int(self._is_running))
        known = bool(self._run_id)
        yield one("experiments_planned", "Experiments of the run.", event.total if known else None)
        yield one("experiments_ended", "Experiments that were completed or failed.", event.done if known else None)
        yield one("start_timestamp_seconds", "When the campaign began or was resumed.", self._began_s)
        yield one("update_timestamp_seconds", "When this was written.", self._now())
        yield one("end_timestamp_seconds", "When the campaign ended.", ended_s)
        yield one("exit_code", "The exit code of lem campaign.", code)
        if self._is_running:
            yield one("remaining_seconds", "Expected time to the end.", event.eta_s)
            yield one("power_watts", "Power in the window of the current experiment.", doing.get("power_w"))
            labels = {"configuration": "config_name", "backend": "backend", "phase": "phase"}
            found = {label: doing.get(name, "") for label, name in labels.items()}
            yield one("activity_info", "What the campaign is doing.", 1, **found)


def _results(campaign: _Labels, configurations: Sequence[Configuration]) -> Iterator[_Family]:
    labels = [{**campaign, "configuration": item.name} for item in configurations]
    known = list(zip(labels, configurations, strict=True))

    def counts(name: str, what: str, count: Callable[[Configuration], int]) -> _Family:
        return _Family(f"lem_configuration_{name}", what, [(own, count(item)) for own, item in known])

    described = []
    for own, item in known:
        facts = {"number": str(item.number), "config_hash": hash_label(item.config_hash)}
        identity = item.records[0].identity if item.records else None
        facts |= {"backend": identity.backend, "model": identity.model} if identity else {}
        facts |= {"energy_source": ", ".join(item.energy_sources)} if identity else {}  # which may be an estimate
        described.append(({**own, **facts}, 1.0))
    yield _Family("lem_configuration_info", "A configuration of the run.", described)
    yield counts("cycles", "Cycles with a valid result.", lambda item: item.n_cycles)
    yield counts("invalid_results", "Results that are not valid.", lambda item: item.n_invalid)
    yield counts("failed_experiments", "Experiments without a result.", lambda item: item.n_failed)
    for name, (stem, unit) in _EXPORTED.items():
        metric = METRIC_BY_NAME[name]
        found = [(own, item.estimate(metric)) for own, item in known]
        ends = {"": attrgetter("value"), "_ci_lower": attrgetter("low"), "_ci_upper": attrgetter("high")}
        for end, read in ends.items():
            what = "geometric mean over cycles" if not end else f"{end[4:]} end of the 95 % interval of the mean"
            values = [(own, value) for own, estimate in found if (value := read(estimate)) is not None]
            yield _Family(f"lem_{stem}{end}_{unit}", f"{metric.label}, {what}.", values)
