"""Every figure of a record that follows from the requests of its window, and whether they make it unfit."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, pvariance
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.measurement import PROMPTS_NEEDED, Distribution, Measured, known
from lem.base.reasons import Reason
from lem.base.units import NS_PER_MS, NS_PER_S
from lem.config.experiment import ExperimentConfig
from lem.config.sections import SloConfig
from lem.meters.requestlog import OPEN_LOOP, Request, RequestLog
from lem.record import ITL_REPLACED, Latency, Throughput

# With fewer requests than this share of its peak, the engine is filling up or draining.
_FULL = 0.9


@dataclass(frozen=True)
class WorkFindings:
    window: Mapping[str, Any]  # fields of `Window`, as for `Section.of`
    work: Mapping[str, Any]  # fields of `Work`
    throughput: Throughput
    latency: Latency


def describe_work(log: RequestLog, config: ExperimentConfig) -> WorkFindings:
    good = count_good(log, config.traffic_simulation.slo)
    return WorkFindings(
        window={
            "traffic_mode": log.traffic_mode,
            "window_s": log.window_s,
            "window_repeats": log.repeats,
            **_in_flight(log),
        },
        work={
            "requests_ok": len(log.completed),
            "requests_failed": len(log.failures),
            "input_tok": log.input_tok,
            "output_tok": log.output_tok,
            "padding_tok": known(log.padding_tok, "padding_not_reported"),
            "requests_good": good,
        },
        throughput=Throughput.of(
            output_tok_per_s=_rate(log, log.output_tok),
            total_tok_per_s=_rate(log, log.input_tok + log.output_tok),
            requests_per_s=_rate(log, len(log.completed)),
            **goodput_of(good, len(log.completed) + len(log.failures), log.window_s),
            **_steps(log, config),
        ),
        latency=latency_of(log.completed),
    )


def _rate(log: RequestLog, amount: int) -> Measured[float]:
    return known(amount / log.window_s if log.window_s > 0 else None, "window_too_short")


# --- latency


def percentile(sorted_values: Sequence[float], fraction: float) -> float:
    """The percentile by linear interpolation between closest ranks, rank = fraction x (n - 1)."""
    # Hyndman and Fan (1996), definition 7: what numpy, R and spreadsheets give by default.
    rank = fraction * (len(sorted_values) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(sorted_values) - 1)
    return sorted_values[below] + (rank - below) * (sorted_values[above] - sorted_values[below])


def distribute(observed: Sequence[tuple[int, float]]) -> Distribution | None:
    """Mean and percentiles of values in nanoseconds, each with the prompt that it is of; None of none."""
    if not observed:
        return None
    ordered = sorted(value_ns / NS_PER_S for _, value_ns in observed)
    n, prompts = len(ordered), len({prompt for prompt, _ in observed})
    high = {
        name: percentile(ordered, fraction) if prompts >= PROMPTS_NEEDED[name] else None
        for name, fraction in (("p90", 0.90), ("p95", 0.95), ("p99", 0.99))
    }
    return Distribution(mean=math.fsum(ordered) / n, p50=percentile(ordered, 0.50), n=n, n_prompts=prompts, **high)


def latency_of(requests: Sequence[Request]) -> Latency:
    """The latency section over completed requests; None with its reason for what was not observed."""
    # A request without output counts towards end-to-end and queue times only. One request whose tokens were not timed
    # voids TTFT, TPOT and ICL for all: the rest would be a sample chosen by the engine.
    with_output = [item for item in requests if item.output_tok > 0]
    is_timed = all(item.token_times_ns for item in with_output)
    timed = with_output if is_timed else []
    why_not = "no_token" if is_timed else "tokens_not_observed"
    queued = ((item.prompt, item.arrived_ns, item.started_ns) for item in requests)
    gaps = ((item.prompt, pair) for item in timed for pair in itertools.pairwise(at_ns for at_ns, _ in item.chunks))
    values: dict[str, tuple[list[tuple[int, float]], str]] = {
        "ttft_s": ([(item.prompt, item.ttft_ns) for item in timed], why_not),
        "tpot_s": (
            [(item.prompt, tpot_ns) for item in timed if (tpot_ns := item.tpot_ns) is not None],
            "no_second_token" if timed else why_not,
        ),
        "icl_s": (
            [(prompt, after_ns - before_ns) for prompt, (before_ns, after_ns) in gaps],
            "no_second_step" if timed else why_not,
        ),
        "e2e_s": ([(item.prompt, item.e2e_ns) for item in requests], "no_request"),
        "queue_s": (
            [(prompt, (start or 0) - arrived) for prompt, arrived, start in queued if arrived is not None],
            "no_arrivals",
        ),
    }
    found = ((name, distribute(observed), why) for name, (observed, why) in values.items())
    known_values = {name: known(value, why if requests else "no_request") for name, value, why in found}
    return Latency.of(itl_s=known(None, ITL_REPLACED), **known_values)


# --- goodput


def goodput_of(good: Measured[int], tried: int, window_s: float) -> dict[str, Measured[float]]:
    """Goodput, and the share of good requests among all, failed ones included: fields of `Throughput`."""
    if good.value is None:
        return dict.fromkeys(
            ("good_requests_per_s", "good_requests_ratio"), known(None, good.null_reason or "no_reason")
        )
    return {
        "good_requests_per_s": known(good.value / window_s if window_s > 0 else None, "window_too_short"),
        "good_requests_ratio": known(good.value / tried if tried else None, "no_request"),
    }


def count_good(log: RequestLog, slo: SloConfig) -> Measured[int]:
    """The completed requests that met every given limit; TPOT is met by a request of one token, which has none."""
    if not slo.limits_ms:
        return known(None, "no_slo")
    needs_times = slo.limits_ms.keys() != {"e2e_ms"}
    if needs_times and any(item.output_tok and item.token_times_ns is None for item in log.completed):
        return known(None, "tokens_not_observed")
    return Measured(sum(_is_within(item, slo) for item in log.completed))


def _is_within(item: Request, slo: SloConfig) -> bool:
    found_ns: dict[str, float] = {"e2e_ms": item.e2e_ns}
    if item.token_times_ns:
        found_ns |= {"ttft_ms": item.ttft_ns, "tpot_ms": item.tpot_ns or 0}
    # A request without any token never had a first one.
    return all(found_ns.get(name, math.inf) <= limit * NS_PER_MS for name, limit in slo.limits_ms.items())


# --- steps of the engine


def _steps(log: RequestLog, config: ExperimentConfig) -> dict[str, Measured[float]]:
    """Tokens per step and draft acceptance, from the tokens that share a timestamp."""
    # The first step of a request, its prefill, is left out. Near the end of an answer an engine proposes fewer drafts,
    # or accepts some beyond the end (vLLM counts those as accepted): acceptance leaves out steps that start with no
    # more tokens left than one step can produce. Drafts that were never proposed, as where no n-gram matches, count as
    # not accepted, since token times do not show them.
    timed = [item for item in log.completed if item.token_times_ns]
    if not timed:
        unseen: Measured[float] = known(None, "tokens_not_observed" if log.output_tok else "no_tokens_to_compare")
        return {"tok_per_step": unseen, "draft_accepted_ratio": unseen}
    steps = [tok for item in timed for _, tok in item.chunks[1:]]
    per_step: Measured[float] = known(sum(steps) / len(steps) if steps else None, "no_second_step")
    return {"tok_per_step": per_step, "draft_accepted_ratio": _accepted_ratio(timed, config)}


def _accepted_ratio(timed: Iterable[Request], config: ExperimentConfig) -> Measured[float]:
    drafted_tok = config.drafted_tok
    if not config.is_speculative or drafted_tok is None:
        return known(None, "drafts_vary" if config.is_speculative else "nothing_drafted")
    accepted = steps = 0
    for item in timed:
        left = item.output_tok
        for place, (_, tok) in enumerate(item.chunks):
            if place and left > drafted_tok:
                if tok > drafted_tok + 1:
                    return known(None, "steps_merged", tok=tok, most=drafted_tok + 1)
                accepted, steps = accepted + tok - 1, steps + 1
            left -= tok
    return known(accepted / (drafted_tok * steps) if steps else None, "answers_too_short")


# --- requests at once


def _in_flight(log: RequestLog) -> dict[str, Any]:
    names = ("in_flight_mean", "in_flight_peak", "fill_drain_ratio")
    changes: Counter[int] = Counter()
    for item in log.requests:
        if item.started_ns is not None:
            end_ns = log.closed_ns if item.finished_ns is None else min(item.finished_ns, log.closed_ns)
            begin_ns = max(item.started_ns, log.opened_ns)
            if begin_ns < end_ns:
                changes[begin_ns] += 1
                changes[end_ns] -= 1
    lasted_ns: Counter[int] = Counter()
    level = 0
    for begin_ns, end_ns in itertools.pairwise(sorted({log.opened_ns, log.closed_ns, *changes})):
        level += changes[begin_ns]
        lasted_ns[level] += end_ns - begin_ns
    total_ns = log.closed_ns - log.opened_ns
    peak = max(lasted_ns, default=0)
    if total_ns <= 0 or not peak:
        return dict.fromkeys(names, known(None, "no_request" if total_ns > 0 else "window_too_short"))
    mean = sum(number * ns for number, ns in lasted_ns.items()) / total_ns
    thin_ns = sum(ns for number, ns in lasted_ns.items() if number < _FULL * peak)
    return dict(zip(names, (mean, peak, thin_ns / total_ns), strict=True))


# --- fitness


def unfit_reasons(log: RequestLog, *, allows_overload: bool) -> tuple[Reason, ...]:
    """Why the window does not measure serving: nothing was completed, or the queue grew from its start to its end."""
    if not log.completed:
        return () if log.failures else (Reason.of("none_completed", arrived=log.arrived),)
    grown = _growth(log)
    return () if allows_overload or grown is None else (Reason.of("queue_grew", before=grown[0], after=grown[1]),)


def load_warnings(log: RequestLog) -> tuple[Reason, ...]:
    """That more was offered than the engine could do."""
    # By more than a tenth and than by chance, or by so much that the queue grew throughout the window.
    arrived, finished = log.arrived, len(log.finished)
    is_above = arrived - finished > max(0.1 * arrived, _chance(log)) or _growth(log) is not None
    if log.traffic_mode in OPEN_LOOP and is_above:
        return (Reason.of("load_too_high", arrived=arrived, finished=finished),)
    return ()


def _chance(log: RequestLog) -> float:
    """By how many requests arrivals may exceed completions by chance: two standard deviations."""
    # Their number varies, and so does the work that each brings; each edge of the window may cut one off.
    lengths = [item.output_tok for item in log.completed if item.output_tok]
    spread = pvariance(lengths) / fmean(lengths) ** 2 if lengths else 0.0
    return 2 * math.sqrt((log.arrival_variance + spread) * log.arrived) + 2


def _growth(log: RequestLog) -> tuple[int, int] | None:
    """The unfinished requests at both edges, if their number grew throughout the window; None if it did not."""
    # The queue is sampled at completions only, because an engine that takes requests in batches lets them pile up
    # between batches. The shortest queue in each third of the window must grow, and the growth over the whole window
    # must exceed that of chance. With fewer than three completions, the queues at the two edges must differ by more
    # than the requests that were in the engine.
    if log.traffic_mode not in OPEN_LOOP:
        return None
    arrived_ns = sorted(item.arrived_ns for item in log.requests if item.arrived_ns is not None)
    finished_ns = sorted(item.finished_ns for item in log.requests if item.finished_ns is not None)

    def unfinished(at_ns: int) -> int:
        return bisect_right(arrived_ns, at_ns) - bisect_right(finished_ns, at_ns)

    edges = unfinished(log.opened_ns), unfinished(log.closed_ns)
    noise = _chance(log)
    moments = [unfinished(at_ns) for at_ns in finished_ns if log.is_inside(at_ns)]
    if len(moments) < 3:
        return edges if edges[1] - edges[0] > max(noise, _in_flight(log)["in_flight_peak"]) else None
    bounds = [len(moments) * third // 3 for third in range(4)]
    low, middle, high = (min(moments[begin:end]) for begin, end in itertools.pairwise(bounds))
    return edges if low < middle < high and 1.5 * (high - low) > noise else None
