"""What a finding of `lem check` is, and what to do about it, by its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lem.base.measurement import SHORT_WINDOW_S
from lem.base.reasons import Reason
from lem.results.stopping import MOST_CYCLES

SAME_WORK = "set ignore_eos: true and min_output_tokens = max_output_tokens, so that all do the same work"
NO_EFFECT = "ignore_eos was set but had no effect: the log.txt of the experiment may show why"

_ALONE = (
    "end the other programs (lem doctor names them) or raise the CPU limit, and reserve the machine while it measures"
)
_STOPPED = "do not stop or pause the engine while it is measured: signals, debuggers, docker pause"
_SUSPENDED = "keep the machine from suspending, as with systemd-inhibit"
# What kept an engine from its work, as warnings and invalid results have it, with what to do about it.
INTERFERENCE: Mapping[str, str] = {
    "engine_waited_too_long": _ALONE,
    "engine_waited": _ALONE,
    "foreign_cpu": _ALONE,
    "engine_starved": _ALONE,
    "sampler_starved": _ALONE,
    "engine_stopped": _STOPPED,
    "host_suspended": _SUSPENDED,
}

NO_RESUME = "no manifest in the state folder (--state-dir) continues this run: a new run measures all of it"

# What to do about a finding, by its kind. Findings that make numbers or verdicts unreliable:
WEAK: Mapping[str, str] = {
    "interference": "",
    "damaged": "restore them from a backup, or measure again",
    "failed": "lem status shows why each one failed, and its log",
    "unfinished": "",
    "no_results": "run the campaign; lem status shows its state",
    "unequal_exclusions": (
        "find the cause and measure again: what always throttles or fails is a finding, not an outlier"
    ),
    "no_valid_result": "remove the cause, then measure again (--fresh)",
    "unsteady": "raise measurement.min_window_sec, warm up longer, and check what else runs on the machine",
    "warmup": "raise warmup.max_prompts or warmup.timeout_seconds",
    "throttled": "improve cooling, lower the power limit, or raise execution.config_gap_seconds",
    "foreign_processes": "stop them (lem doctor lists them), or reserve the machine while it measures",
    "crosscheck": (
        "the sensors of A100 and H100 sample only part of the time: trust the counter; elsewhere see sample_gap_max_s"
    ),
    "estimate": "make RAPL readable (lem doctor shows how), or use an external meter (measurement.external_csv)",
    "shared_loads": "set execution.reuse: cycle, which reloads engines in every cycle; server.command for server.url",
    "replayed": "measure again (--fresh): every cycle then draws arrivals of its own",
    "output_lengths": SAME_WORK,
    "not_comparable": "measure them the same way, or compare only those measured the same way",
    "environment_changed": "measure again in one environment (--fresh)",
    "drift": "lengthen the gaps, use structure: balanced, and check what warms up; ratios within cycles suffer least",
    "grouped": "use structure: balanced",
    "order_effect": "raise execution.config_gap_seconds, so that the previous experiment has no effect",
    "autocorrelation": "lengthen execution.cycle_gap_seconds, and find out what lasts from one cycle to the next",
    "few_cycles": "use --cycles 5, or --until ci=2%",
    "wide_interval": "add cycles: lem campaign … --resume --until each=2%; or find out why cycles differ",
    "too_few_cycles": "",
}
# Findings that are something to know about the numbers:
NOTES: Mapping[str, str] = {
    "invalid": "remove the cause; lem results show RUN/EXPERIMENT shows what was measured",
    "short_window": f"set measurement.min_window_sec to {SHORT_WINDOW_S:g} or more, or use more prompts",
    "fill_drain": "use more prompts, or traffic_simulation with mode: closed for figures to publish",
    "none_good": "lower the load, or see in requests.jsonl.gz which limit was missed",
    "failed_requests": "the log.txt of the experiment shows why; failed requests cost energy and give no tokens",
    "power_capped": "normal under load; compare only at the same limit (power_limit_w in the record)",
    "gap_too_short": "raise execution.config_gap_seconds and execution.cycle_gap_seconds",
    "baseline_drift": "lengthen the gaps, and check what else draws power; gross energy is unaffected",
    "baselines_apart": "net energies are not comparable; compare gross energy, and check what else draws power",
    "integrated_power": (
        "a sensor that samples only part of the time is wrong under a periodic load: raise measurement.min_window_sec"
    ),
    "warning": "",
    "same_order": "use structure: balanced, so that no place in the order belongs to one configuration",
    "indistinguishable": f"{MOST_CYCLES} cycles would not separate them: treat them as equal",
    "removed": "nothing, unless they are to be compared: name them in lem compare, or add them to the campaign again",
    "stopping": "use --until from the start: cycles that are added without a plan cost more",
}


@dataclass(frozen=True)
class Finding:
    kind: str  # a short stable word
    is_weak: bool  # numbers or verdicts are unreliable because of it; else it is something to know about them
    reason: Reason
    remedy: str
    configurations: tuple[str, ...] = ()  # those it concerns; () for the campaign as a whole

    @property
    def text(self) -> str:
        """In words; those of other programs, which warnings pass on, may end in a full stop."""
        return self.reason.text.rstrip(".") if self.kind == "warning" else self.reason.text
