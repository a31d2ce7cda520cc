"""Warm-up: work of the measured kind until its speed has settled, on prompts that are not measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lem.base.clock import Clock, seconds_between
from lem.base.reasons import Reason
from lem.config.experiment import WarmupConfig
from lem.engines.protocol import Completion, TokenRequest
from lem.worker.requests import DisjointRequests


@dataclass(frozen=True)
class WarmupOutcome:
    """What warm-up did.

    Attributes:
        elapsed_s: None when it is disabled.
        converged: None when that was not asked.
        null_reason: why `elapsed_s` or `converged` is None.
        step_s: duration of the last step; None without one.
    """

    prompts: int
    elapsed_s: float | None
    converged: bool | None
    null_reason: str | None
    step_s: float | None = None
    warnings: tuple[Reason, ...] = ()


def skipped_warmup() -> WarmupOutcome:
    """The outcome of no warm-up."""
    return WarmupOutcome(0, None, None, "warm-up is disabled (warmup.enabled: false)")


def warm_up(
    source: DisjointRequests,
    width: int,
    settings: WarmupConfig,
    run_step: Callable[[Sequence[TokenRequest]], Sequence[Completion]],
    clock: Clock,
    report: Callable[[int], None],
) -> WarmupOutcome:
    """The outcome of warming up in steps of `width` requests at once, the concurrency of the measurement.

    First come at least `min_prompts` and twice the width, of the measured shapes in their order. Then come steps of the
    same typical shapes each, until the seconds for each output token have settled over the last `window_size` of them:
    only steps of equal shapes can be compared. The caps are the time (0 is none) and `max_prompts`, the latter never
    before `window_size` typical steps were run, else a wide batch could never be said to have settled. At a cap
    `converged` is False.

    Args:
        run_step: runs requests as the measurement will and gives their completions.
        report: told the number of prompts run so far.
    """
    limits = _Limits.of(settings, width)
    steps = _Steps()
    begin_ns = clock.monotonic_ns()
    converged = False
    while True:
        requests = source.take(width) if steps.prompts < limits.floor else source.take_typical(width)
        step_ns = clock.monotonic_ns()
        completions = run_step(requests)
        now_ns = clock.monotonic_ns()
        steps.add(width, completions, seconds_between(step_ns, now_ns), is_comparable=source.is_typical(requests))
        report(steps.prompts)
        if steps.prompts >= limits.floor:
            converged = settings.convergence_detection and has_settled(steps.costs, settings)
            if converged or steps.prompts + width > limits.cap:
                break
        if settings.timeout_seconds and seconds_between(begin_ns, now_ns) >= settings.timeout_seconds:
            break
    return WarmupOutcome(
        prompts=steps.prompts,
        elapsed_s=seconds_between(begin_ns, now_ns),
        converged=converged if settings.convergence_detection else None,
        null_reason=None if settings.convergence_detection else "warmup.convergence_detection is off",
        step_s=steps.last_s,
        warnings=(*_convergence_warning(converged, steps, settings), *steps.warnings(source.is_disjoint, limits.floor)),
    )


def has_settled(costs: Sequence[float], settings: WarmupConfig) -> bool:
    """Whether the last `window_size` values vary by less than `cv_threshold` (standard deviation / mean)."""
    variation = _variation(costs, settings)
    return variation is not None and variation < settings.cv_threshold


def _variation(costs: Sequence[float], settings: WarmupConfig) -> float | None:
    last = costs[-settings.window_size :]
    mean = statistics.fmean(last) if last else 0.0
    if len(last) < settings.window_size or mean == 0:
        return None
    return statistics.stdev(last) / mean


@dataclass(frozen=True)
class _Limits:
    floor: int
    cap: int

    @classmethod
    def of(cls, settings: WarmupConfig, width: int) -> _Limits:
        floor = max(settings.min_prompts, 2 * width)
        if not settings.convergence_detection:
            return cls(floor, floor)
        return cls(floor, max(settings.max_prompts, floor + settings.window_size * width))


@dataclass
class _Steps:
    costs: list[float] = field(default_factory=list)
    prompts: int = 0
    last_s: float | None = None
    failures: list[str] = field(default_factory=list)

    def add(self, prompts: int, completions: Sequence[Completion], elapsed_s: float, *, is_comparable: bool) -> None:
        self.prompts += prompts
        self.last_s = elapsed_s
        self.failures += [item.error for item in completions if item.error is not None]
        if is_comparable:
            # For each token, since free output lengths make steps of unequal work.
            self.costs.append(elapsed_s / max(1, sum(len(item.output_ids) for item in completions)))

    def warnings(self, is_disjoint: bool, floor: int) -> tuple[Reason, ...]:
        found = []
        if self.failures:
            failed, first = len(self.failures), self.failures[0]
            found.append(Reason.of("warmup_requests_failed", failed=failed, total=self.prompts, first=first))
        if self.prompts < floor:
            found.append(Reason.of("warmup_timed_out", prompts=self.prompts, floor=floor))
        if not is_disjoint:
            found.append(Reason.of("warmup_overlaps"))
        return tuple(found)


def _convergence_warning(converged: bool, steps: _Steps, settings: WarmupConfig) -> tuple[Reason, ...]:
    if converged or not settings.convergence_detection:
        return ()
    variation = _variation(steps.costs, settings)
    if variation is None:
        return (Reason.of("warmup_too_few_steps", prompts=steps.prompts),)
    threshold = settings.cv_threshold
    return (Reason.of("warmup_unsettled", prompts=steps.prompts, variation=variation, threshold=threshold),)
