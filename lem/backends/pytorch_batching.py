"""Which requests run together, the rectangle they make, and what of its output counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from lem.backends.protocol import TokenRequest

__all__ = ["BATCHING_STRATEGIES", "BatchRules", "cut_output", "pad_left", "plan_batches"]

BATCHING_STRATEGIES = ("static", "dynamic", "sorted_static", "sorted_dynamic")

Batch = tuple[TokenRequest, ...]


@dataclass(frozen=True)
class BatchRules:
    """How requests are put together.

    Attributes:
        strategy: one of `BATCHING_STRATEGIES`. `static` takes requests as they come, `dynamic` as many as the token
            budget holds, `sorted_…` takes the longest prompts first, so that neighbours differ little.
        batch_size: the most requests in a batch, under every strategy.
        max_tokens: the budget of a dynamic batch in positions, padding and room for output included:
            rows × (longest prompt + longest output).
        has_one_bound: all requests of a batch must have the same bounds on their output.
    """

    strategy: str
    batch_size: int
    max_tokens: int | None = None
    has_one_bound: bool = False

    @property
    def is_sorted(self) -> bool:
        """Whether requests are ordered by length first."""
        return self.strategy.startswith("sorted_")

    @property
    def budget(self) -> int | None:
        """The budget where it holds, else None."""
        return self.max_tokens if self.strategy.endswith("dynamic") else None


def plan_batches(requests: Sequence[TokenRequest], rules: BatchRules) -> tuple[Batch, ...]:
    """The requests in batches, each request in exactly one; a request larger than the budget runs alone."""
    # Python's sort is stable: equal prompts keep their order, so a plan depends on the requests alone.
    ordered = sorted(requests, key=lambda request: -len(request.token_ids)) if rules.is_sorted else list(requests)
    groups = _by_bounds(ordered) if rules.has_one_bound else [ordered]
    return tuple(batch for group in groups for batch in _fill(group, rules))


def _by_bounds(requests: Iterable[TokenRequest]) -> list[list[TokenRequest]]:
    groups: dict[tuple[int, int], list[TokenRequest]] = {}
    for request in requests:
        groups.setdefault((request.max_output_tokens, request.min_output_tokens), []).append(request)
    return list(groups.values())


def _fill(requests: Iterable[TokenRequest], rules: BatchRules) -> Iterable[Batch]:
    batch: list[TokenRequest] = []
    for request in requests:
        grown = [*batch, request]
        is_too_large = rules.budget is not None and positions(grown) > rules.budget
        if batch and (len(grown) > rules.batch_size or is_too_large):
            yield tuple(batch)
            batch = [request]
        else:
            batch = grown
    if batch:
        yield tuple(batch)


def positions(batch: Sequence[TokenRequest]) -> int:
    """Positions a batch can come to take: its rows times its longest prompt and longest output."""
    return len(batch) * (
        max(len(request.token_ids) for request in batch) + max(request.max_output_tokens for request in batch)
    )


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """The rows filled up in front to the longest, and the mask: 1 where a token is, 0 where padding is.

    A decoder goes on from the last position, so the padding must stand in front.
    """
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return ids, mask


def cut_output(generated: Sequence[int], max_tokens: int, end_ids: Set[int]) -> tuple[int, ...]:
    """What counts of a row of a batch: up to and including the first id that ends it, and never beyond its bound.

    A row that ended before the batch did is filled up with padding, or was generated further where nothing ends it.

    Args:
        end_ids: ids that end a sequence; none where they are ignored.
    """
    for index, token in enumerate(generated[:max_tokens]):
        if token in end_ids:
            return tuple(generated[: index + 1])
    return tuple(generated[:max_tokens])
