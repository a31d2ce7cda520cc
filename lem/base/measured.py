"""A value that may be absent, with the reason; and sections of documents whose fields may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Generic, TypeVar

from lem.base.measurement import is_estimate
from lem.base.reasons import Reason

# Until version 2 of the schema, observations were counted.
_OBSERVATIONS_NEEDED: Final[Mapping[str, int]] = {"p90": 10, "p95": 20, "p99": 100}
# A percentile is None for fewer requests with different prompts: one or two of them would decide it, and a prompt that
# is repeated says little new.
PROMPTS_NEEDED: Final[Mapping[str, int]] = {"p90": 10, "p95": 100, "p99": 500}

_NO_REASON = Reason.of("no_reason")
_NOT_RECORDED = Reason.of("not_recorded")

_Value = TypeVar("_Value")
_Section = TypeVar("_Section", bound="Section")


@dataclass(frozen=True)
class Measured(Generic[_Value]):
    """A value, or None with the reason why it is absent."""

    value: _Value | None
    null_reason: Reason | None = None
    source: str | None = None  # of an energy: the meter it comes from (`Energy.energy_source`)
    scope: str | None = None  # of an energy: what that meter covers

    @property
    def is_estimate(self) -> bool:
        return is_estimate(self.source)


def known(value: _Value | None, reason: Reason | str, /, **data: Any) -> Measured[_Value]:
    """The value; where it is None, absent for that reason, which may be a code with its data."""
    if value is not None:
        return Measured(value)
    return Measured(None, Reason.of(reason, **data) if isinstance(reason, str) else reason)


@dataclass(frozen=True)
class Section:
    """A part of the record in which fields can be absent."""

    null_reasons: Mapping[str, Reason] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls: type[_Section], **given: Any) -> _Section:
        """The section of these fields, each a value or `Measured`, whose reason is kept where it has no value."""
        found = {name: item if isinstance(item, Measured) else Measured(item) for name, item in given.items()}
        reasons = {name: item.null_reason for name, item in found.items() if item.null_reason is not None}
        return cls(**{name: item.value for name, item in found.items()}, null_reasons=reasons)

    @classmethod
    def absent(cls: type[_Section], reason: Reason) -> _Section:
        """A section of which nothing is known, for that reason."""
        return cls(null_reasons={item.name: reason for item in fields(cls) if item.name != "null_reasons"})

    def measured(self, name: str) -> Measured[Any]:
        return known(getattr(self, name), self.why_none(name))

    def why_none(self, name: str) -> Reason:
        """Why a field has no value."""
        return self.null_reasons.get(name, _NO_REASON)


@dataclass(frozen=True)
class Distribution:
    """Percentiles of one latency in seconds; None for fewer prompts than `PROMPTS_NEEDED`."""

    mean: float
    p50: float
    p90: float | None
    p95: float | None
    p99: float | None
    n: int
    n_prompts: int | None = None  # different prompts behind the observations; None in records before version 3

    @property
    def null_reasons(self) -> Mapping[str, Reason]:
        needed, code, n = PROMPTS_NEEDED, "too_few_prompts", self.n_prompts
        if n is None:
            needed, code, n = _OBSERVATIONS_NEEDED, "too_few_observations", self.n
        absent = {it: Reason.of(code, needed=least, n=n) for it, least in needed.items() if getattr(self, it) is None}
        return absent | ({"n_prompts": _NOT_RECORDED} if self.n_prompts is None else {})
