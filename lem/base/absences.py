"""The sentences that say why a value of a record is absent; see `lem.base.reasons`."""

from __future__ import annotations

from collections.abc import Mapping

# Why a value of a record is absent. Older records have these sentences without their codes.
NULL_TEXTS: Mapping[str, str] = {
    "no_reason": "no reason given",
    "not_recorded": "not recorded by the version of lem that measured this",
    # The request, the host and the engine.
    "not_shuffled": "the order was not shuffled",
    "gap_not_reported": "the host reported no gap before this experiment",
    "engine_was_loaded": "the engine was loaded before (load {load_id})",
    "nothing_compiled": "nothing was compiled for this experiment",
    "warmup_off": "warm-up is disabled (warmup.enabled: false)",
    "convergence_off": "warmup.convergence_detection is off",
    "padding_not_reported": "the engine does not report its padding; the input never includes any",
    "parameters_not_reported": "the engine does not report the number of parameters",
    "peak_memory_not_reported": "the engine does not report its peak memory on {device}",
    "revision_not_reported": "the model is a local folder, or the engine does not report it",
    "weight_files_not_reported": "the engine does not report which weight files it read",
    "no_meminfo": "not in /proc/meminfo",
    "no_governor": "the kernel exposes no frequency governor, as in most virtual machines",
    "not_shown": "the kernel does not show it, as in many virtual machines and containers",
    "no_ambient_sensor": "the kernel shows no sensor of the temperature around the machine",
    "no_container": "not run in a container",
    "no_gpu_in_use": "no GPU in use",
    "own_processes_unknown": "the engine's own processes are unknown",
    "gpus_unseen": "the sampler does not see the GPUs in use",
    # A program that `lem measure` runs.
    "program_unseen": "a program is measured as a whole: lem does not see its requests",
    "work_not_given": "the program was not asked for it (lem measure --work)",
    "work_unreadable": "the work of the program is not in {file}: {problem}",
    # Throughput and latency.
    "window_too_short": "the window was too short for the clock",
    "one_pass": "one pass over the prompt set: nothing to compare it with",
    "no_tokens_to_compare": "no output tokens to compare",
    "no_request": "no request was completed in the window",
    "no_arrivals": "all requests of a closed batch are there at the start; there are no arrivals to wait from",
    "tokens_not_observed": "the engine did not time each token; set `streaming: true` or use traffic_simulation",
    "no_second_token": "no request has more than one output token",
    "no_token": "no request has an output token",
    "too_few_prompts": "needs requests with {needed:d} different prompts, there are {n:d}",
    "itl_replaced": "replaced by icl_s, the time between chunks: tokens of one step have no time between them",
    "no_second_step": "no request took a second step of the engine",
    "nothing_drafted": "no tokens are drafted (no speculative decoding is configured)",
    "drafts_vary": "the number of drafted tokens is not fixed (num_tokens is not given)",
    "steps_merged": "{tok:d} tokens came at one time, and a step brings at most {most:d}",
    "answers_too_short": "no answer is longer than one step with all its drafted tokens",
    "no_slo": "no service level is given (traffic_simulation.slo)",
    "requests_unread": "the service levels changed, and the requests cannot be counted again: {error}",
    "experts_uncounted": "the experts that a token uses cannot be counted in this model",
    "too_few_observations": "needs {needed:d} observations, there are {n:d}",
    # Which meters there are.
    "unknown_source": "energy_source is {source}, which this lem does not know",
    "energy_off": "energy is not measured (measurement.energy: none)",
    "on_cpu": "the experiment runs on the CPU",
    "other_meter_set": "another meter is set (measurement.energy: {energy})",
    "option_not_given": "{option} is not given",
    "mig_instance": "{missing} is not a GPU: {cut} is split into MIG instances, which have no meters",
    "mig_board": "{uuid} is split into MIG instances, and its meters are those of the whole board",
    "gpu_shared": "{uuid} is also used by another program (process {pids}); its energy cannot be separated",
    "gpu_unseen": "the sampler does not see it",
    "gpus_not_sampled": "no GPU is sampled",
    "power_not_sampled": (
        "the energy counter cannot be read: {errors}; power is not sampled (timeseries.enabled: false)"
    ),
    "gpu_unreadable": "the energy counter cannot be read: {counter_errors}; nor can power be read: {power_errors}",
    "no_package": "the kernel shows no package in /sys/class/powercap",
    "no_dram": "the kernel shows no energy counter of the memory",
    "dram_not_estimated": "the design power of a CPU does not include its memory",
    "foreign_cpu_energy": (
        "other programs used {share:.1%} of the busy CPU time, so this energy is not the engine's; "
        "measurement.max_foreign_pct allows {limit:g} %"
    ),
    "usage_not_read": "the use of the CPUs was not read in the window",
    "engine_not_watched": "the engine's processes are not visible to the sampler",
    "threads_not_read": "the kernel does not count how long threads wait for a CPU (/proc/PID/task/TID/schedstat)",
    "tdp_unknown": "the design power of this CPU is unknown",
    "counter_absent": "the energy counter cannot be read; energy is integrated power",
    "sampler_reports": "{error}",  # of a GPU or of the CPU, in the header of the sample log
    # What a meter read.
    "not_reported": "not reported by the driver",
    "power_not_read": "power cannot be read",
    "gpus_unwatched": "GPUs were not sampled in the window (timeseries.enabled: false)",
    "window_not_sampled": "nothing was sampled in the window",
    "meter_unreadable": "{what} cannot be read: {error}",
    "never_read_twice": "{what} was never read twice",
    "read_once": "{what} was read {times:d} times, two are needed{detail}",
    "read_late": "{what} was first read {late_s:.3f} s too late{detail}",
    "read_early": "{what} was last read {early_s:.3f} s too early{detail}",
    "edge_not_read": "{what} was not read for {gap_s:.2f} s around an edge of {span_s:.2f} s",
    "counter_reset": "{what} fell from {before_mj:d} to {after_mj:d} mJ: the driver was reloaded",
    "counter_still": "the energy counter did not change",
    "slowdowns_counted": "the driver counts for how long it was slowed, however short that was",
    "accuracy_unknown": "the accuracy of this meter is not specified",
    "lag_under_load": "the window opened and closed under load, where the lag of a counter cannot be seen",
    "lag_unseen": "{what}: power did not rise and fall at once where work began and ended, by which its lag is seen",
    "not_probed": "lem gpus --probe has not been run",
    "no_pulses": "no work could be put on the GPU, by which the lag is seen: {error}",
    "counter_slow": "the counter changed fewer than three times in the window",
    "power_hole": "{what} was not read for {gap_s:.2f} s, more than {periods:d} periods of {period_s:g} s",
    "zone_hole": "{what} was not read for {gap_s:.0f} s, in which it may have wrapped more than once",
    "mean_hole": "{what} was not read for {gap_s:.2f} s, of which it covers one",
    "crosscheck_failed": "{uuid}: power comes to {ratio:.3f} of the counter's energy: one of the two is wrong",
    "power_disputed": (
        "{uuid}: its means over a second come to {ratio:.3f} of its sampled power, whose sensor may see 25 of every "
        "100 ms: load with a rhythm near 10 Hz cannot be measured with it"
    ),
    "power_unconfirmed": (
        "{uuid}: its one power sensor may see 25 of every 100 ms, and nothing confirms what it does not see"
    ),
    "zone_still": "{what} did not change for {gap_s:.2f} s",
    "zone_leapt": "{what} rose by {step_j:.4g} J in {gap_s:.2f} s, more than {most_w:.4g} W would take",
    "zone_fell": "{what} fell from {before_j:.3f} to {after_j:.3f} J, which is not its wrap at {max_j:.3f} J",
    "read_too_rarely": (
        "{what} was read {seen:d} times in the window of {window_s:.2f} s, expected at least {least:d}: "
        "lower timeseries.sample_interval_ms, or raise measurement.min_window_sec"
    ),
    "no_energy_drawn": "{energy_j:.4g} J over {window_s:.3f} s is impossible: a GPU always draws power",
    "above_power_limit": (
        "{energy_j:.4g} J is impossible: the power limit allows {most_j:.4g} J "
        "({margin:g} x {limit_w:g} W x {window_s:.3f} s)"
    ),
    "too_short_to_crosscheck": "a window of {window_s:.2f} s is too short to compare counter and power",
    # Spans of the sample log.
    "span_empty": "{what}: the marked span is empty",
    "no_window_mark": "the sample log has no mark of the window",
    "nothing_loaded": "nothing was loaded for this experiment",
    "no_warmup": "there was no warm-up",
    "rest_not_measured": "power at rest was not measured",
    "bare_not_measured": "power at rest without an engine was not measured",
    "net_shifted": (
        "power at rest went from {before_w:.4g} W to {after_w:.4g} W: {shift_j:.3g} J in the window, with a net energy "
        "of {net_j:.3g} J"
    ),
    "post_not_measured": "power at rest was not measured after the window",
    "rest_age_unknown": "it is unknown when it was measured",
    "rest_temp_not_measured": "it was not measured at rest in this experiment",
    "rest_temp_not_read": "the temperature could not be read at rest",
    "phases_off": "energy by phases is off (measurement.phases)",
    "phases_overlap": "under traffic prefill and decode of different requests run at once",
    "prefill_not_part": "prefill alone took {alone_j:.4g} J, which is not part of the window's {whole_j:.4g} J",
    # The user's own meter.
    "external_unreadable": "{error}",
    "external_empty": "measurement.external_csv has no readings",
    "external_window_only": "an external meter covers only the window",
    "external_short": "{source} does not cover the window: {how}",
    "external_few": "{source} has {n:d} readings in the window, {needed:d} are needed",
    "external_unaligned": (
        "{source}: its readings do not follow the work that the meters of this machine saw: its clock is unknown"
    ),
    "external_clock": "{source}: its clock is more than {most_s:g} s off",
    "external_below_parts": "{source} comes to {energy_j:.4g} J, less than its parts: {parts_j:.4g} J",
    "external_hole": "{source} has a hole of {gap_s:.1f} s in the window",
    "no_utc": "the sample log has no UTC time to align with: {utc!r}",
    # What follows from energy and work.
    "no_work": "the window holds no {what}",
    "zero_energy": "the energy is zero",
    "pue_not_given": "measurement.pue is not given; 1 counts what was measured and nothing around it",
}
