"""Energy of prefill and decode apart, by differenced runs: no timeline splits what a batching engine does at once."""

from __future__ import annotations

from lem import marks as names
from lem.meters.attempt_log import AttemptLog
from lem.meters.checks import slowdowns
from lem.meters.curve import NotMeasured, Span
from lem.meters.figures import Figures

__all__ = ["split_phases"]

_FIELDS = ("prefill_energy_j", "decode_energy_j", "phase_method")


def split_phases(energy: Figures, attempt: AttemptLog, primary: Figures, window_repeats: int) -> None:
    """Fill the fields of the phases.

    The same prompts are run for their prefill alone, in a window of its own with its own guards; its energy per pass,
    times the passes of the main window, is that of prefill, and the rest of the main window is decode.
    """
    phases = Figures()
    prefill_j = phases.work_out("prefill", lambda: _prefill_j(attempt, primary, window_repeats))
    if prefill_j is None:
        for field in _FIELDS:
            energy.leave_out(field, phases.reasons["prefill"])
        return
    energy.values["prefill_energy_j"] = prefill_j
    energy.values["decode_energy_j"] = primary.values["energy_j"] - prefill_j
    passes = _passes(attempt)
    energy.values["phase_method"] = (
        f"differenced runs: {passes} {'pass' if passes == 1 else 'passes'} of prefill alone, scaled to the "
        f"{window_repeats} of the window; decode is the rest"
    )


def _prefill_j(attempt: AttemptLog, primary: Figures, window_repeats: int) -> float:
    prefill = attempt.span(names.PREFILL)
    if prefill is None:
        raise NotMeasured("energy by phases was not asked for (measurement.phases)")
    if attempt.is_steady_mode:
        raise NotMeasured("under traffic prefill and decode of different requests run at once")
    whole_j = float(primary.need("energy_j"))
    for span, what in ((attempt.window, "window"), (prefill, "window of prefill alone")):
        slowed = next(slowdowns(attempt, span, what), None)
        if slowed is not None:
            raise NotMeasured(slowed.text)
    found_j = _window_j(attempt, prefill) * window_repeats / _passes(attempt)
    if not 0 < found_j < whole_j:
        raise NotMeasured(f"prefill alone took {found_j:.4g} J, which is no part of the window's {whole_j:.4g} J")
    return found_j


def _window_j(attempt: AttemptLog, span: Span) -> float:
    curves = attempt.primary_curves()
    guards = (names.PREFILL_GUARD_BEFORE, names.PREFILL_GUARD_AFTER)
    return sum(attempt.energy_j(curve, span, guards, 1 / len(curves)) for curve in curves)


def _passes(attempt: AttemptLog) -> int:
    return sum(mark.name == names.PREFILL for mark in attempt.marks)
