"""The books of a steady window: which requests and tokens count between its edges, and whether it was steady."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lem.backends.protocol import Completion, TokenRequest
from lem.experiment.window import MeasuredWindow, Output, are_alike, padding_of, times_of
from lem.reasons import Reason

__all__ = ["Arrival", "SteadyBooks"]


@dataclass(frozen=True)
class Arrival:
    """A request that arrived; its `index` is a number of its own, `prompt_index` the prompt's."""

    request: TokenRequest
    prompt_index: int
    arrived_ns: int


@dataclass(frozen=True)
class SteadyBooks:
    """What counts in a window; an instant is in it after its opening and up to its closing."""

    mode: str
    is_open_loop: bool
    opened_ns: int
    closed_ns: int
    prompt_count: int

    def add_up(
        self,
        answered: Sequence[tuple[Arrival, Completion]],
        arrived_ns: Sequence[int],
        lost: Sequence[str],
        warnings: tuple[Reason, ...],
    ) -> MeasuredWindow:
        """The window.

        Args:
            answered: every request that was handed in, also before the opening and after the closing.
            arrived_ns: when each request arrived, also those that were never handed out.
            lost: an error for each request that the engine took and never handed in.
            warnings: what is known already.
        """
        finished = [pair for pair in answered if self._holds(pair[1].finished_ns)]
        good = [(arrival, item) for arrival, item in finished if item.error is None]
        prefilled = self._prefilled(answered)
        steady, reason = self._compare_halves(answered)
        return MeasuredWindow(
            traffic_mode=self.mode,
            opened_ns=self.opened_ns,
            closed_ns=self.closed_ns,
            repeats=len(finished) // self.prompt_count,
            requests=tuple(times_of(item, arrival.arrived_ns) for arrival, item in good),
            failures=(*(item.error for _, item in finished if item.error is not None), *lost),
            input_tok=sum(len(arrival.request.token_ids) for arrival, _ in prefilled),
            output_tok=sum(1 for time_ns in _token_times(answered) if self._holds(time_ns)),
            padding_tok=padding_of([item for _, item in prefilled]),
            steady=steady,
            steady_null_reason=reason,
            outputs=tuple(
                Output(arrival.prompt_index, len(arrival.request.token_ids), item.output_ids) for arrival, item in good
            ),
            warnings=(*warnings, *self._backlog_warning(arrived_ns, len(finished)), *_untimed_warning(answered)),
        )

    def _holds(self, time_ns: int) -> bool:
        return self.opened_ns < time_ns <= self.closed_ns

    def _prefilled(self, answered: Sequence[tuple[Arrival, Completion]]) -> list[tuple[Arrival, Completion]]:
        """The requests whose input counts: those whose first output token, the end of prefill, was in the window."""
        return [
            (arrival, item)
            for arrival, item in answered
            if item.error is None and self._holds(next(_times(item), item.finished_ns))
        ]

    def _compare_halves(self, answered: Sequence[tuple[Arrival, Completion]]) -> tuple[bool | None, str | None]:
        middle_ns = (self.opened_ns + self.closed_ns) // 2
        inside = [time_ns for time_ns in _token_times(answered) if self._holds(time_ns)]
        if not inside:
            return None, "no output tokens to compare"
        first = sum(1 for time_ns in inside if time_ns <= middle_ns)
        return are_alike(first, len(inside) - first), None

    def _backlog_warning(self, arrived_ns: Sequence[int], finished: int) -> tuple[Reason, ...]:
        """Whether arrivals exceed completions by more than a tenth, and than two deviations of a Poisson count."""
        arrived = sum(1 for time_ns in arrived_ns if self._holds(time_ns))
        growth = arrived - finished
        if not self.is_open_loop or growth <= max(0.1 * arrived, 2 * math.sqrt(arrived)):
            return ()
        return (Reason.of("load_too_high", arrived=arrived, finished=finished),)


def _times(completion: Completion) -> Iterator[int]:
    """When each output token was there; untimed tokens when the request was finished."""
    if completion.token_times_ns is not None:
        return iter(completion.token_times_ns)
    return itertools.repeat(completion.finished_ns, len(completion.output_ids))


def _token_times(answered: Sequence[tuple[Arrival, Completion]]) -> Iterator[int]:
    return (time_ns for _, item in answered if item.error is None for time_ns in _times(item))


def _untimed_warning(answered: Sequence[tuple[Arrival, Completion]]) -> tuple[Reason, ...]:
    if all(item.token_times_ns is not None for _, item in answered if item.error is None and item.output_ids):
        return ()
    return (Reason.of("tokens_untimed"),)
