"""Options of the pytorch backend, each in an experiment of its own: most mean something on a GPU only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lem.orchestration.manifest import CampaignManifestEntry
from lem.record import Record
from tests.gpu.bench import Bench, Step
from tests.gpu.campaigning import INTERRUPTED, experiment, read_entries, read_records, run_campaign
from tests.gpu.extent import Extent
from tests.gpu.finding import Finding

CAMPAIGN = "options"
BATCH, INPUT_TOK, OUTPUT_TOK = 8, 64, 32
COMPILED = {"cache_implementation": "static"}
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}


class Case(NamedTuple):
    """An experiment, by what differs: in the section of the backend, and outside it."""

    pytorch: Mapping[str, Any]
    others: Mapping[str, Any]
    drafts: bool  # whether the model drafts for itself


def _case(pytorch: Mapping[str, Any] | None = None, *, drafts: bool = False, **others: Any) -> Case:
    return Case(pytorch or {}, others, drafts)


CASES: Mapping[str, Case] = {
    "plain": _case(),
    "float16": _case(fp_precision="float16"),
    "float32": _case(fp_precision="float32"),
    "eager attention": _case({"attn_implementation": "eager"}),
    "flash attention": _case({"attn_implementation": "flash_attention_2"}),
    "no cache": _case({"use_cache": False}),
    "static cache": _case(COMPILED),
    "compiled": _case({"torch_compile": "default", **COMPILED}),
    "CUDA graphs": _case({"torch_compile": "reduce-overhead", **COMPILED}),
    "8 bit": _case({"load_in_8bit": True}),
    "4 bit": _case({"load_in_4bit": True, **NF4}),
    "low memory": _case({"low_cpu_mem_usage": True}),
    "shared out": _case({"max_memory": {"0": "1GiB", "cpu": "20GiB"}}),
    "4 beams": _case({"beam_search": {"enabled": True, "num_beams": 4}}),
    "drafted": _case({"batch_size": 1}, drafts=True),
    "budget of tokens": _case({"batching_strategy": "sorted_dynamic", "max_tokens_per_batch": 384}),
    "sampled": _case({"min_p": 0.05, "no_repeat_ngram_size": 3}, decoder={"preset": "standard"}),
    "streamed": _case({"batch_size": 1}, streaming=True),
    "closed traffic": _case(traffic_simulation={"enabled": True, "mode": "closed", "concurrency": 4}),
    "phases": _case(measurement={"phases": True}),
}


class Options(Step):
    """One experiment an option: whether it runs, or what it is refused for; what it does to energy and throughput."""

    name = "options"
    title = "Options of the pytorch backend, one short window each"

    def run(self, bench: Bench) -> Iterator[Finding]:
        extent = bench.extent
        bench.close_engine()
        ended = run_campaign(bench, CAMPAIGN, document(extent, bench.models))
        entries = read_entries(bench.out, CAMPAIGN)
        if not entries:
            raise RuntimeError(f"nothing was run; the campaign ended with {ended}, see {bench.out / 'options.log'}")
        if ended == INTERRUPTED:
            yield Finding("cut short", None, "", "time was up: run again with --only options, and it is resumed")
        records = read_records(bench.out, CAMPAIGN)
        for entry in entries:
            yield _finding(entry, [record for record in records if record.identity.config_name == entry.config_name])


def document(extent: Extent, models: Path) -> dict[str, Any]:
    names = tuple(CASES) if extent.options is None else extent.options
    return {
        "campaign_name": CAMPAIGN,
        "model": str(models / extent.models[0]),
        "experiments": [_experiment(name, CASES[name], extent, models) for name in names],
        "execution": {"cycles": 1, "config_gap_seconds": 0},
    }


def _experiment(name: str, case: Case, extent: Extent, models: Path) -> dict[str, Any]:
    model = str(models / extent.models[0])
    drafting = {"assisted_generation": {"model": model, "num_tokens": 4}} if case.drafts else {}
    measurement = {"min_window_sec": extent.option_s, **case.others.get("measurement", {})}
    others = {**case.others, "measurement": measurement, "pytorch": {"batch_size": BATCH, **case.pytorch, **drafting}}
    warmup = {"convergence_detection": False, "min_prompts": 1}
    return experiment(name, INPUT_TOK, OUTPUT_TOK, BATCH, warmup=warmup, baseline={"enabled": False}, **others)


def _finding(entry: CampaignManifestEntry, records: Sequence[Record]) -> Finding:
    valid = [record for record in records if record.validity.valid]
    if not valid:
        reasons = [reason.text for record in records for reason in record.validity.invalid_reasons]
        return Finding(entry.config_name, None, "J/tok", f"{entry.status}: {entry.error or '; '.join(reasons)}")
    record = valid[-1]
    notes = [f"{record.throughput.output_tok_per_s or 0:.0f} tok/s", f"loaded in {record.window.load_s or 0:.1f} s"]
    if record.window.compile_s is not None:
        notes.append(f"compiled in {record.window.compile_s:.0f} s")
    if record.compute.peak_memory_b is not None:
        notes.append(f"{record.compute.peak_memory_b / 2**30:.1f} GiB at most")
    value = record.efficiency.energy_per_output_tok_j
    if value is None:
        notes.append(record.efficiency.why_none("energy_per_output_tok_j").text)
    return Finding(entry.config_name, value, "J/tok", ", ".join([*notes, *map(str, record.validity.warnings)]))
