"""A campaign as a person runs it, by `lem campaign` with the pytorch backend."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lem.base import process
from lem.record import Record
from lem.results.bootstrap import log_t_interval
from tests.gpu.bench import Bench, Step
from tests.gpu.campaigning import INTERRUPTED, experiment, lem, read_records, run_campaign
from tests.gpu.extent import Configuration, Extent
from tests.gpu.finding import Finding

CAMPAIGN = "gpu"
RECOMPUTE_S = 120.0
CUT_SHORT = "; time was up: run again with --only campaign, and it is resumed"
CROSSCHECK = "within 5 % of 1, else a warning"


class Campaign(Step):
    """Configurations × cycles; what a call has not got done, the next with the same folder resumes."""

    name = "campaign"
    title = "A campaign (pytorch backend, closed batches)"

    def run(self, bench: Bench) -> Iterator[Finding]:
        extent = bench.extent
        bench.close_engine()
        bench.rest(min(2.0, extent.settle_s))
        ended = run_campaign(bench, CAMPAIGN, document(extent, bench.models))
        records = read_records(bench.out, CAMPAIGN)
        if not records:
            raise RuntimeError(f"no result; the campaign ended with {ended}, see {bench.out / f'{CAMPAIGN}.log'}")
        planned = extent.cycles * len(extent.configurations)
        note = f"{len(records)} attempts; {planned} experiments planned" + (CUT_SHORT if ended == INTERRUPTED else "")
        yield Finding("lem campaign, exit code", float(ended), "", note, "0")
        for item in extent.configurations:
            yield from _figures(item.name, [r for r in records if r.identity.config_name == item.name], extent)
        yield from _at_rest(records)
        yield _agreement(bench)


def document(extent: Extent, models: Path) -> dict[str, Any]:
    return {
        "campaign_name": CAMPAIGN,
        "model": str(models / extent.models[0]),
        "experiments": [_experiment(item, extent, models) for item in extent.configurations],
        "execution": {
            "cycles": extent.cycles,
            "config_gap_seconds": min(5.0, extent.settle_s),
            "cycle_gap_seconds": min(5.0, extent.settle_s),
        },
    }


def _experiment(item: Configuration, extent: Extent, models: Path) -> dict[str, Any]:
    baseline = {"enabled": False} if extent.baseline_s is None else {"duration_sec": extent.baseline_s}
    return experiment(
        item.name,
        extent.input_tok,
        extent.output_tok,
        item.prompts,
        model=str(models / item.model),
        measurement={"min_window_sec": extent.window_s},
        warmup={"timeout_seconds": extent.warmup_s},
        baseline=baseline,
        pytorch={"batch_size": item.batch},
    )


def _figures(name: str, records: Sequence[Record], extent: Extent) -> Iterator[Finding]:
    valid = [record for record in records if record.validity.valid]
    reasons = sorted({reason.text for record in records for reason in record.validity.invalid_reasons})
    note = f"of {len(records)} attempts, {extent.cycles} cycles planned" + "".join(f"; {text}" for text in reasons)
    yield Finding(f"{name}: valid attempts", float(len(valid)), "", note)
    for text, unit, pick in (
        ("energy per output token", "J", lambda record: record.efficiency.energy_per_output_tok_j),
        ("output throughput", "tok/s", lambda record: record.throughput.output_tok_per_s),
        ("mean power", "W", lambda record: record.gpus[0].power_mean_w if record.gpus else None),
    ):
        yield _estimate(f"{name}: {text}", unit, valid, pick)
    ratios = [record.energy.energy_crosscheck_ratio for record in valid]
    told = [ratio for ratio in ratios if ratio is not None]
    text = f"{name}: integrated power over counter"
    if told:
        yield Finding(text, statistics.fmean(told), "", f"{min(told):.4f} to {max(told):.4f}", CROSSCHECK)
    else:
        yield Finding(text, None, "", _why(valid, "energy_crosscheck_ratio"))
    periods = [1e3 * item for record in valid if (item := record.energy.counter_update_period_s) is not None]
    if periods:
        yield Finding(f"{name}: counter update period", statistics.fmean(periods), "ms", "in the window")


def _estimate(name: str, unit: str, records: Sequence[Record], pick: Callable[[Record], float | None]) -> Finding:
    """The geometric mean over cycles with its t interval."""
    values = [value for record in records if (value := pick(record)) is not None]
    if not values:
        return Finding(name, None, unit, _why(records, "gpu_energy_j"))
    interval = log_t_interval(values)
    note = f"{len(values)} cycles"
    if interval.ci_lower is not None and interval.ci_upper is not None:
        note += f", 95 % t interval {interval.ci_lower:.4g} to {interval.ci_upper:.4g}"
    return Finding(name, interval.geometric_mean, unit, note, details={"values": values})


def _why(records: Sequence[Record], field: str) -> str:
    """The reason for a field that no record has."""
    reasons = {record.energy.why_none(field).text for record in records}
    return "; ".join(sorted(reasons)) or "no valid attempt"


def _at_rest(records: Sequence[Record]) -> Iterator[Finding]:
    """Power at rest as the campaign found it, by the experiments that looked themselves."""
    models = {Path(record.identity.model).name: record for record in reversed(records)}
    yield _rest("power at rest, bare", "idle_bare_power_w", records)
    for model in sorted(models):
        yield _rest(f"power at rest, {model} loaded", "idle_loaded_power_w", (models[model],))


def _rest(text: str, field: str, records: Sequence[Record]) -> Finding:
    found = [value for record in records if (value := getattr(record.idle, field)) is not None]
    reasons = {record.idle.why_none(field).text for record in records}
    note = "as the campaign found it" if found else "; ".join(sorted(reasons))
    return Finding(text, found[0] if found else None, "W", note)


def _agreement(bench: Bench) -> Finding:
    """Whether every figure follows from the samples."""
    ended = process.run(lem("results", "recompute", CAMPAIGN), timeout_s=RECOMPUTE_S, env=bench.environ, cwd=bench.out)
    said = [line.strip() for line in (ended.stdout or ended.stderr).splitlines() if line.strip()]
    return Finding("lem results recompute, exit code", float(ended.code), "", said[-1] if said else "", "0")
