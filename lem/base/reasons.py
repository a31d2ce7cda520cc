"""Warnings, findings, reasons of invalid results, of filters and of absent values: a code with data.

Programs use `code` and `data`; people read `text`, which comes from the tables here and in `absences` alone, so that a
sentence can be reworded without a change of behaviour.

The format in a template gives the type of its data: `{n:d}` an integer, `{x:.3f}` a float, `{name}` text or a reason.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lem.base.absences import NULL_TEXTS
from lem.base.units import plain

_Thing = TypeVar("_Thing")

# The sentences of schema version 1, which recorded nothing else: records of version 1 are read by them, and the first
# match counts. They must not change; to reword one, give its code another text in `_NEW_TEXTS`.
V1_TEXTS: Mapping[str, str] = {
    # Why a result is invalid.
    "requests_failed": "{failed:d} of {total:d} requests failed, the first with: {first}",
    "no_output": "the engine made no output tokens",
    "slowdown": "{uuid}: {name} ({bit:#x}) in {seen:d} of {samples:d} samples of the {span}",
    "foreign_process": "{uuid}: another program computed (process {pids})",
    "gpu_unplugged": (
        "the GPU is lost: NVML says {error} in the container (systemctl daemon-reload on the host takes GPUs from "
        "containers that got them by the legacy hook; with CDI (nvidia-ctk cdi generate) it does not)"
    ),
    "gpu_lost": "the GPU is lost: NVML says {error} in the container",
    "gpu_gone": "the GPU is lost: NVML sees none in the container",
    # Warnings of the meters.
    "clocks_unwatched": "nobody looked whether clocks were slowed down (timeseries.enabled: false)",
    "energy_estimated": "energy is an estimate from the CPU's design power and its load, not a measurement",
    "energy_of_module": "energy is that of the whole module, GPU and CPU together",
    "crosscheck": "integrated power is {ratio:.3f} of the counter's energy, more than 5 % apart",
    "rest_power_rose": (
        "power at rest with the engine loaded went from {before_w:.4g} W to {after_w:.4g} W (+{change_percent:.1f} %): "
        "the net energy is uncertain"
    ),
    "rest_power_fell": (
        "power at rest with the engine loaded went from {before_w:.4g} W to {after_w:.4g} W (-{change_percent:.1f} %): "
        "the net energy is uncertain"
    ),
    "meter_failed": "{meter} could not be read in the window: {error}",
    "samples_missing": (
        "nothing was sampled for {gap_s:.2f} s of the window, more than {periods:d} periods of {period_s:g} s: "
        "integrated power and the cross-check are void"
    ),
    "guard_short": ("a guard of {guard_s:.2f} s is too short for the lag of the power sensor: {least_s:.2f} s is due"),
    "edge_unread": "{what} was not read for {spacing_s:.2f} s around an edge of the window",
    "edge_doubtful": "{what}: how the window ended leaves {doubt_j:.3g} J in doubt; a longer window would tell",
    # Warnings of warm-up and window.
    "unsteady": "the halves of the window differ by 2 % or more in {what}",
    "warmup_requests_failed": "{failed:d} of {total:d} warm-up requests failed, the first with: {first}",
    "warmup_timed_out": (
        "warm-up ran out of time after {prompts:d} of at least {floor:d} prompts; raise warmup.timeout_seconds"
    ),
    "warmup_overlaps": "some warm-up prompts equal measured ones: the measured ones leave no others of their lengths",
    "warmup_too_few_steps": (
        "warm-up did not settle in {prompts:d} prompts (too few steps to tell); "
        "raise warmup.max_prompts or warmup.timeout_seconds"
    ),
    "warmup_unsettled": (
        "warm-up did not settle in {prompts:d} prompts (variation {variation:.1%}, due below {threshold:.1%}); "
        "raise warmup.max_prompts or warmup.timeout_seconds"
    ),
    "load_too_high": (
        "the offered load is above what the engine can do: {arrived:d} requests arrived, {finished:d} were completed "
        "in the window, so queue times grow with its length; lower traffic_simulation.target_qps"
    ),
    "tokens_untimed": "the engine gave no time for each token: tokens count when their request was finished",
    "ramp_cut_short": (
        "the window opened after {ramp_s:.1f} s of ramp, before as many requests were completed as were there at once: "
        "it may hold the start of the load"
    ),
    # Warnings about prompts.
    "prompts_cut": "{cut:d} of {total:d} prompts were cut to max_input_tokens ({limit:d}); raise it to run them whole",
    "outputs_bounded": (
        "{bounded:d} of {total:d} prompts ask for more output than max_output_tokens ({limit:d}) allows; "
        "raise it to let them have it"
    ),
    "rows_skipped": "data set {name}: {skipped:d} rows without text were skipped",
    "dataset_too_small": "data set {name}: {wanted:d} prompts were asked for and there are {found:d}",
    "prompt_file_too_small": "{path}: {wanted:d} prompts were asked for and there are {found:d}",
    # Warnings of the engines.
    "min_p_unused": "{backend}.min_p has no effect under greedy decoding",
    "vllm_seeded": (
        "random_seed gives each request a random generator of its own, with which vLLM samples more slowly than "
        "without; random_seed: null measures the engine as it is usually run"
    ),
    "tensorrt_no_reuse": "tensorrt.enable_kv_cache_reuse is off, so that repeated prompts are computed again",
    "gpu_unusable": (
        "this machine has a GPU that this PyTorch cannot use (a CPU build, or no driver): the CPU is measured"
    ),
    "weights_missing": "{count:d} weights are not in {model} and were made up at random, among them {first}",
    # Why the gap before an experiment ended.
    "gap_recovered": "device back at its reference temperature and power",
    "gap_cap_reached": "cap reached before the device was back at its reference",
    "gap_no_sensors": "whole gap: no sensor, or no power at rest from before, tells when the device is back",
    "gap_none": "no gap configured",
    "gap_interrupted": "interrupted",
    # Words of other programs, and sentences that no other entry has.
    "verbatim": "{text}",
}

_NEW_TEXTS: Mapping[str, str] = {
    "unsteady": "the halves of the window differ in {what} by 2 % or more, and under traffic by more than chance gives",
    "no_meter_uncertainty": "only energies have a stated uncertainty of their meter",
    "rest_unchecked": (
        "power at rest was not measured after the window; if it moved by {tolerance:.0%}, the net energy is off by "
        "{share:.0%}"
    ),
    "slowdown_counted": "{uuid}: heat or a power brake slowed it for {slowed_s:.3g} s of the {span}, by its own count",
    "external_corrected": (
        "{source}: its clock is {ahead_s:.1f} s ahead, and a reading is the mean of {mean_s:.1f} s: both are corrected"
    ),
    "counter_frozen": "{uuid}: {error}; energy is integrated power",
    # Sentences of version 1 in other words.
    "clocks_unwatched": "clock throttling was not monitored (timeseries.enabled: false)",
    "foreign_process": "{uuid}: used by another program (process {pids})",
    "guard_short": (
        "a guard of {guard_s:.2f} s is too short for the lag of the power sensor, which takes {least_s:.2f} s"
    ),
    "edge_doubtful": "{what}: the end of the window leaves {doubt_j:.3g} J uncertain; use a longer window",
    "warmup_overlaps": "some warm-up prompts are also measured: no others have their lengths",
    "warmup_unsettled": (
        "warm-up did not settle in {prompts:d} prompts (variation {variation:.1%}, expected below {threshold:.1%}); "
        "raise warmup.max_prompts or warmup.timeout_seconds"
    ),
    "load_too_high": (
        "the offered load exceeds the engine's capacity: {arrived:d} requests arrived, {finished:d} were completed in"
        " the window, so queue times grow with its length; lower traffic_simulation.target_qps"
    ),
    "tokens_untimed": "the engine gave no time for each token: tokens count when their request finished",
    "ramp_cut_short": (
        "the window opened after {ramp_s:.1f} s of ramp, before a full set of concurrent requests was completed: it "
        "may include the start of the load"
    ),
    "outputs_bounded": (
        "{bounded:d} of {total:d} prompts ask for more output than max_output_tokens ({limit:d}) allows; raise it to "
        "run them whole"
    ),
    "template_longer": (
        "{longer:d} of {total:d} prompts are longer than input_tokens: the chat template alone takes as many tokens"
    ),
    "rows_skipped": "data set {name}: {skipped:d} rows without a prompt were skipped",
    "dataset_too_small": "data set {name}: expected {wanted:d} prompts, found {found:d}",
    "prompt_file_too_small": "{path}: expected {wanted:d} prompts, found {found:d}",
    "weights_missing": "{count:d} weights are not in {model} and were initialised at random, among them {first}",
    "gap_no_sensors": "whole gap: no sensor, or no earlier power at rest, shows when the device is back",
    # What kept the engine from the CPU; a warning without `_too_long`.
    "engine_waited": "the engine's threads waited {share:.1%} of their time for a CPU: {causes}",
    "engine_waited_too_long": (
        "the engine's threads waited {share:.1%} of their time for a CPU: {causes}; "
        "measurement.max_wait_pct allows {limit:g} %"
    ),
    "threads_compete": "the engine's threads waited {share:.1%} of their time for each other; use fewer of them",
    "foreign_cpu": "other programs used {share:.1%} of the busy CPU time",
    "engine_stopped": "a process of the engine was stopped for {stopped_s:.1f} s (a signal, a debugger, docker pause)",
    "engine_starved": "the engine was ready to run for {starved_s:.1f} s and got no CPU",
    "host_suspended": "the machine was suspended for {suspended_s:.1f} s",
    "sampler_starved": (
        "the sampler did not run for {pause_s:.1f} s in the window or at its edge, expected at most {most_s:.1f} s"
    ),
    "program_failed": "the program {how}",
    # Why a request to a server failed, and what is said of one that did not.
    "server_unreachable": "cannot connect: {error}",
    "server_refused": "the server answered with HTTP {status:d}: {message}",
    "server_busy": "the server answered with HTTP {status:d}, and asks to retry after {wait}: {message}",
    "server_redirects": "the server answered with HTTP {status:d} and names another URL: {location}",
    "server_not_http": "the server does not speak HTTP/1.1: {found}",
    "server_other_type": "the server answered with {kind} instead of text/event-stream: {message}",
    "server_reset": "the connection broke: {error}",
    "server_closed": "the server closed the connection before the end of its answer, after {received:d} bytes",
    "server_hung": "the server sent nothing for {silence_s:g} s",
    "server_too_slow": "the answer was not complete after {total_s:g} s",
    "server_too_long": "the server sent more than an answer may have: {found}",
    "server_bad_event": "an event of the stream is not a JSON object: {found}",
    "server_error_event": "the server reported an error in the stream: {message}",
    "server_no_end": "the stream ended without data: [DONE]",
    "server_no_usage": "the stream ended without usage, so its tokens cannot be counted",
    "server_empty": "the answer has no tokens",
    "server_cut": "the server cut the answer at {found:d} of {most:d} tokens, as at the context limit",
    "server_other_length": "the answer has {found:d} tokens, expected {least:d} to {most:d}",
    "server_usage_differs": "the answer has {ids:d} tokens by their ids, and {usage:d} by its usage",
    "server_cached": "{cached:d} tokens of the prompt were served from the prefix cache",
    # How well the load client kept up.
    "client_bound": "the load client was the bottleneck: {why}",
    "client_shared_reads": "{share:.1%} of the events with tokens waited for the same read as the one before",
    "client_busy": "it was busy for {share:.0%} of the window",
    "client_concurrency": "it kept {reached:.4g} of {asked:.4g} requests in flight",
    "client_late": "it sent requests {late_ms:.3g} ms after their time",
    "client_waited": "it waited for a CPU for {share:.1%} of the window, and times of tokens include that",
    "client_user_stamps": (
        "the kernel gives no arrival times (TLS, or no SO_TIMESTAMPNS): tokens were stamped when they were read"
    ),
    "client_clock_set": "the time of day was set during the load: tokens were stamped when they were read",
    # What makes a window's work unfit.
    "none_completed": "no request was completed in the window; {arrived:d} arrived",
    "queue_grew": (
        "requests arrived faster than they were completed throughout the window: {before:d} were unfinished at its "
        "start, {after:d} at its end; lower traffic_simulation.target_qps, or set allow_overload: true"
    ),
    # Results under one name.
    "mixed_configurations": "results of {count:d} configurations under one name: the estimate mixes them",
    "mixed_hosts": (
        "results of {count:d} hosts under one name: cycles of one host are similar, so intervals are too narrow"
    ),
    "mixed_runs": (
        "results of {count:d} runs under one name: cycles of one run are similar, so intervals are too narrow"
    ),
    # What separates two configurations.
    "other_gpus": "other GPUs: {before} against {after}",
    "other_cards": "other cards: {before} against {after}; their sensors differ by up to ±5 %",
    "other_driver": "other driver: {before} against {after}",
    "other_power_limit": "other power limit: {before} against {after}",
    "other_clocks": "other clocks: {before} against {after}",
    "other_cpu": "other CPU: {before} against {after}",
    "other_host_cpu": "other CPU beside the GPU: {before} against {after}",
    "other_cpu_settings": "other CPU settings: {before} against {after}",
    "other_kernel": "other kernel: {before} against {after}",
    "other_engine": "other engine: {before} against {after}",
    "other_libraries": "other libraries: {before} against {after}",
    "other_prompts": "other prompts: {before} against {after}",
    "other_output_lengths": "other output lengths: {before:.4g} against {after:.4g} tokens a request",
    "other_traffic": "other traffic: {before} against {after}",
    "other_meter": "other energy meter: {before} against {after}",
    # Why there is no effect, no interval or no verdict.
    "unequal_exclusions": "the configurations lost different shares of their cycles: {causes}",
    "shared_load": "cycles share an engine load (reuse: campaign), so they are not independent",
    "no_interval": "{why}: no interval",
    "one_cycle": "one cycle has no interval: use --cycles 3+",
    "no_ratio": "a value is zero or negative, which has no ratio",
    "ratios_dropped": (
        "{count:d} of {total:d} cycles have no ratio, because a value is zero or negative ({cycles}); what is left is "
        "a selection"
    ),
    "one_sample": "1 sample: no interval",
    "no_logs": "{count:d} of {total:d} values are zero or negative: no geometric mean, no interval on logs",
    "not_asked": "not among the metrics that were compared: for a verdict, name it with --metric",
    "out_of_range": "beyond the range of floating-point numbers",
    "not_measured": "not measured for {name}: {why}",
    "never_valid": "no value for {name}: {why}",
    "no_common_cycle": "no cycle has a valid result of both",
    "nothing_to_compare": "there is nothing to compare",
    "own_anchor": "it is the only configuration that both runs measured unchanged, and cannot be its own anchor",
    "no_anchor": (
        "no unchanged configuration is common to both runs, so a difference between days cannot be separated from one"
        " between configurations; measure one that did not change in both"
    ),
    "anchor_moved": (
        "the anchor {name} itself changed to {ratio:.3g} ×, more than {most_percent:g} %: something other than the "
        "configurations changed"
    ),
    # Findings of `lem check`.
    "interfered": "{count:d} of {total:d} results, at worst: {worst}",
    "no_results": "there is no complete result",
    "results_damaged": "damaged results are left out: {named}",
    "results_left": "{experiments} not measured yet",
    "results_missing": "{experiments} without a complete result",
    "cycles_added": "cycles were added {rule}: {correction}",
    "no_overall_verdict": "no verdict between all configurations: {why}",
    "results_invalid": "{count:d} of {total:d} results are invalid and left out: {why}",
    "no_valid_result": "no valid result at all",
    "some_results": "{what} in {count:d} of {total:d} results",
    "window_moved": (
        "throughput or power moved by 2 % or more within the window (under traffic, also by more than chance does in "
        "1 of 1,000 windows)"
    ),
    "warmup_did_not_settle": "warm-up did not settle",
    "window_short": "a window under {least_s:g} s or {updates:d} updates of the energy counter",
    "filled_and_drained": (
        "requests in flight were under 90 % of their peak for up to {share} of a window: a closed batch fills and "
        "drains in every pass, at more energy per token"
    ),
    "none_good": "no request met its service levels",
    "few_requests_failed": "requests failed (1 % or less of a window)",
    "throttled": "the GPU was slowed down by heat or hardware in {count:d} of {total:d} results",
    "throttled_for": (
        "the GPU was slowed down by heat or hardware in {count:d} of {total:d} results, for up to {longest_s:.3g} s "
        "of a window"
    ),
    "power_capped": "the GPU ran at its power limit for up to {share} of a window",
    "gap_ended_at_cap": "the gap before it ended at its cap, before the device was back at rest",
    "others_on_gpu": "other programs were on the GPU",
    "meters_apart": "counter and integrated power are more than {tolerance} apart",
    "rest_power_changed": (
        "power at rest changed in the experiment by over {tolerance} of its net energy, which is therefore uncertain"
    ),
    "estimate_only": "energy is an estimate from the CPU's design power, not a measurement",
    "power_integrated": "energy is integrated from power samples, since there is no energy counter",
    "baselines_apart": "power at rest with the engine loaded differs by up to {spread} between cycles",
    "replayed_arrivals": (
        "every cycle replayed the same random arrivals, so the interval does not cover what other arrivals would give: "
        "in simulations it covered the long-run latency and throughput in 2 to 11 % of campaigns"
    ),
    "shared_loads": "{why}, and there is no interval",
    "free_lengths_differ": "output lengths are free and differ: {low:.4g} to {high:.4g} tokens a request",
    "lengths_differ": "output lengths differ: {low:.4g} to {high:.4g} tokens a request",
    "free_lengths": "output lengths are free, though they came out equal",
    "not_comparable": "not fully comparable with {name}: {why}",
    "environment_changed": "cycles of one configuration were measured in different environments: {what}",
    "drift": (
        "{metric} {moved} from the first experiment to the last ({interval}; found in at most {rate} of campaigns "
        "without drift)"
    ),
    "autocorrelation": (
        "{metric}: autocorrelation of {lag_1:.2f} from cycle to cycle ({n:d} cycles; the test is wrong in {rate} of "
        "campaigns and finds {sought:g} in {power})"
    ),
    "blocks": "the cycles of one all ran before those of another, so a drift looks like a difference",
    "same_order": (
        "the order is the same in every cycle, so an effect of the place looks like a difference: 1 % at the second "
        "place is found in 67 % of campaigns of 5 cycles"
    ),
    "order_effect": (
        "{metric} {moved} from the first place within a cycle to the last ({interval}; found in at most {rate} of "
        "campaigns in which the place has no effect)"
    ),
    "removed": "no longer in the campaign: {names}; shown, but not compared",
    "only_one_cycle": "one cycle has no interval",
    "only_two_cycles": "an interval of two cycles is 13 standard errors wide",
    "wide_interval": "the interval of {metric} is up to ±{width} wide",
    "more_pairs": "{count:d} more pairs of neighbours cannot be separated",
    "pair_open": (
        "{more} has {difference} more {metric} than {less} (95 % {low} to {high} %), which {cycles:d} cycles cannot "
        "separate from none"
    ),
    # Rules across the options of an experiment; most follow the option (`at_option`).
    "at_option": "{option}: {what}",
    "above_limit": "{value:d} is above {limit_name}, {limit:d}",
    "other_backend": "has no effect: the backend is {backend}",
    "tensorrt_precision": "tensorrt needs float16 or bfloat16",
    "tensorrt_gpu": "tensorrt needs a GPU",
    "pytorch_one_gpu": "pytorch runs on one GPU, got {count:d}",
    "beams_untimed": "conflicts with streaming and traffic: beams have no token times",
    "gpus_not_named": "needs {needed:d} GPUs, gpus has {named:d}",
    "phases_under_traffic": "needs a closed batch: under traffic prefill and decode run at the same time",
    "needs_energy": "needs energy, and measurement.energy is none",
    "needs_baseline": "needs baseline.enabled",
    "tdp_unused": "has no effect with measurement.energy: {energy}",
    "two_prompt_sources": "conflicts with dataset: remove one of them",
    "needs_gpus": "needs {needed:d} GPUs",
    "host_has_fewer_gpus": "needs {needed:d} GPUs, this host has {there:d}",
    "no_dataset_alias": "unknown dataset alias {name!r}; did you mean {near!r}?",
    "greedy_ignores_one": "{options} has no effect under greedy decoding",
    "greedy_ignores_several": "{options} have no effect under greedy decoding",
    "sampling_compounds": "temperature and top_p are both set; vary one of them, since their effects compound",
    "no_server": "expected one of server.command, server.url and server.service",
    "server_templates": "with server.api: chat the server applies its own template; set model",
    "server_decides": "has no effect: the command of the server decides; set server.command or server.options",
    "dialect_lacks": "not supported by {server}",
    "server_streams": "has no effect: a server always streams",
    "other_traffic_mode": "has no effect with mode: {mode}",
    "static_cache": "a static cache is sized for the longest sequence and costs its memory and a compilation first",
    "dynamic_batch_of_one": "a dynamic batch of 1 is not a batch; raise it",
    "memory_tight": "{share:g} leaves little room on the GPU; out of memory is likely",
    "cached_repeats": (
        "prompts are repeated until the window is long enough, and repeats are then served from the cache"
    ),
    "needs_quantized_checkpoint": "{quantization} needs a checkpoint with this quantization",
    "needs_capability": "{what} needs compute capability {needed}, {gpu} has {found}",
    "memory_short": (
        "judging by its name, {billions:.3g} billion weights need {needed_gb:.3g} GB; {gpu} has {memory_gb:.3g} GB"
    ),
    # Configurations of a campaign.
    "no_model": "no model: name one in the experiment, the grid or the campaign",
    "width_unreached": "{width:d} acts as {most:d}, since there are never more requests at once",
    "cannot_differ": "measures the same as another configuration: it differs only in {options}, without effect here",
    "repeated_experiment": "is the same experiment as {name}, and runs once",
    "campaign_decides": "{option} is for lem experiment; in a campaign, {instead} decides",
}

TEXTS: Mapping[str, str] = {**V1_TEXTS, **_NEW_TEXTS, **NULL_TEXTS}

_NUMBER = re.compile(r"[0-9]+(?:[.][0-9]+)?")


class _Plain(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        return plain(value, format_spec) if isinstance(value, float) else format(value, format_spec)


_PLAIN = _Plain()


@dataclass(frozen=True)
class Reason:
    code: str  # a key of `TEXTS`
    # Fills the sentence. Floats have as many digits as it shows, so that reasons that read the same are the same.
    data: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, code: str, /, **data: Any) -> Reason:
        """The reason; ValueError for an unknown code, or data that does not fit its sentence."""
        if code not in TEXTS:
            raise ValueError(f"unknown code {code!r}")
        formats = formats_of(TEXTS[code])
        if formats.keys() != data.keys():
            raise ValueError(f"{code} takes {', '.join(formats) or 'no data'}, got {', '.join(data) or 'none'}")
        return cls(code, {name: _as_shown(value, formats[name]) for name, value in data.items()})

    @property
    def text(self) -> str:
        return _PLAIN.format(TEXTS[self.code], **self.data)

    @property
    def kind(self) -> Hashable:
        texts = ((name, _NUMBER.sub("#", value)) for name, value in self.data.items() if isinstance(value, str))
        return (self.code, *sorted(texts))

    def worded(self, texts: Mapping[str, str]) -> str:
        return texts[self.code].format(**self.data)

    def __str__(self) -> str:
        return self.text

    def __hash__(self) -> int:
        return hash((self.code, frozenset(self.data.items())))


def alike(found: Iterable[tuple[Reason, _Thing]]) -> list[list[tuple[Reason, _Thing]]]:
    groups: dict[Hashable, list[tuple[Reason, _Thing]]] = {}
    for reason, thing in found:
        groups.setdefault(reason.kind, []).append((reason, thing))
    return list(groups.values())


@functools.cache
def formats_of(template: str) -> Mapping[str, str]:
    return {name: spec or "" for _, name, spec, _ in string.Formatter().parse(template) if name}


def _as_shown(value: Any, spec: str) -> Any:
    if not spec and not isinstance(value, (str, Reason)):
        raise ValueError(f"expected text or a reason, got {type(value).__name__}")
    if spec and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"expected a number, got {type(value).__name__}")
    try:
        shown = format(value, spec)
    except OverflowError as error:  # an integer too large for a float
        raise ValueError(str(error)) from error
    return parsed(shown, spec) if isinstance(value, float) and spec else value


def parsed(shown: str, spec: str) -> Any:
    if not spec:
        return shown
    if spec == "d":
        return int(shown)
    if spec == "#x":
        return int(shown, 16)
    return float(shown.removesuffix("%")) / 100 if spec.endswith("%") else float(shown)
