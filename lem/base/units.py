"""Quantities and counts as people read them, and durations as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

# Shown for a missing number.
ABSENT = "–"
SIGNIFICANT_DIGITS = 4

# Patterns that few commands need are compiled when they do: that takes up to half a millisecond.
_DURATION = r"(?:\d+(?:\.\d+)?[smhd])+"
_DURATION_PART = r"\+?(\d+(?:\.\d+)?)([smhd])"
_SECONDS_PER = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PERCENTAGE = r"(?ai)\+?(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d+)?\s*(%?)"

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
NS_PER_US = 1_000
JOULES_PER_WATT_HOUR = 3600.0

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# A hundred years, the longest that anything here waits: beyond 292 years the system's timers overflow.
LONGEST_S = 36_500 * 86_400.0


def fmean(values: Iterable[float]) -> float:
    """As in `statistics`, whose import takes milliseconds."""
    found = list(values)
    return math.fsum(found) / len(found)


def parse_duration(text: str) -> float:
    """The seconds in `90s`, `30m`, `6h`, `2d` or `1h30m`; ValueError for another text, zero, or over `LONGEST_S`."""
    stripped = text.strip().lower()
    if not re.fullmatch(_DURATION, stripped):
        raise ValueError(f"{text!r} is not a duration; write it like 90s, 30m, 6h, 2d or 1h30m")
    seconds = sum(float(number) * _SECONDS_PER[unit] for number, unit in re.findall(_DURATION_PART, stripped))
    if seconds <= 0:
        raise ValueError(f"{text!r}: the duration must be positive")
    if seconds > LONGEST_S:
        raise ValueError(f"{text!r} is over a hundred years")
    return seconds


def parse_percentage(text: str) -> float:
    match, remedy = re.fullmatch(_PERCENTAGE, text.strip()), ""
    if match is not None:
        number, exponent, sign = match.groups(default="")
        value = float(number + exponent) / 100
        if sign and math.isfinite(value):
            return value
        remedy = "" if sign else "; add the % sign"
    raise ValueError(f"expected a percentage such as 5%, got {text!r}{remedy}")


def format_duration(seconds: float) -> str:
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def plain(value: float, spec: str) -> str:
    """As `format` with a spec such as `.3g` or `+.2g`, but without an exponent: 130, where `.2g` gives 1.3e+02."""
    text = format(value, spec)
    if "e" not in text or not 1e-9 < abs(value) < 1e15:
        return text
    sign = "+" if spec.startswith("+") else ""
    from decimal import Decimal

    return format(value, f"{sign}.0f") if abs(value) >= 1 else format(Decimal(text), f"{sign}f")


def fixed(value: float, decimals: int, sign: str = "", widest: float = 1e5) -> str:
    """With so many decimals; from `widest` on, where a bound of two cycles may be, as `2.4e+80`."""
    return f"{value:{sign}.1e}" if abs(value) >= widest else f"{value:{sign}.{decimals}f}"


def hash_label(digits: str) -> str:
    return f"h{digits}" if digits else ""


def format_quantity(value: float | None, unit: str = "", digits: int = SIGNIFICANT_DIGITS) -> str:
    """`value` to `digits` significant digits without thousands separators; an en dash for None."""
    if value is None:
        return ABSENT
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-4 <= abs(value) < 1e15:
        text = f"{value:.0f}"
    return f"{text} {unit}" if unit else text


def format_energy(energy_j: float | None) -> str:
    if energy_j is None or abs(energy_j) < 10_000:
        return format_quantity(energy_j, "J")
    return format_quantity(energy_j / JOULES_PER_WATT_HOUR, "Wh")


def format_power(power_w: float | None) -> str:
    return format_quantity(power_w, "W")


def format_rate(per_s: float | None) -> str:
    return format_quantity(per_s, "tok/s")


def format_latency(latency_s: float | None) -> str:
    """Four digits in microseconds, milliseconds or seconds, whichever gives a number of at least 1."""
    if latency_s is None:
        return format_quantity(None)
    size = abs(latency_s)
    factor, unit = (1.0, "s") if size >= 1 else (1e3, "ms") if size >= 1e-3 else (1e6, "µs")
    value = latency_s * factor
    digits = f"{value:#.4g}" if 0 < abs(value) < 9999.5 else f"{value:.0f}"
    return f"{digits.rstrip('.')} {unit}"


def format_bytes(size_b: float | None) -> str:
    if size_b is None:
        return ABSENT
    for prefix in ("", "Ki", "Mi", "Gi"):
        if abs(size_b) < 1024:
            return f"{size_b:.0f} B" if not prefix else f"{size_b:.1f} {prefix}B"
        size_b /= 1024
    return f"{size_b:.1f} TiB"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def percent(share: float) -> str:
    return f"{plain(100 * share, '.2g')} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"


def with_decimals(value: float, decimals: int | None) -> str:
    return format_quantity(value) if decimals is None else fixed(value, decimals, widest=1e9)


def some_of(texts: Sequence[str], at_most: int, separator: str = ", ") -> str:
    left = len(texts) - at_most
    return separator.join(texts[:at_most]) + (f" and {left} more" if left > 0 else "")
