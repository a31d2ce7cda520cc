"""What may differ between two runs of the same thing, replaced by a word that says what it was.

A mask keeps what kind of value stood there: a number that becomes null, or null that becomes a number, still shows.
Recorded results are the same for both builds, so nothing in them is masked except this machine's temporary names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Of static commands and of recorded results, too.
ALWAYS = (
    (re.compile(r"^\d\d:\d\d:\d\d (?=\S)", re.MULTILINE), "<time> "),
    (re.compile(r"\bfree: [\d.]+ [KMGT]iB"), "free: <free>"),
    (re.compile(r"lem-bug-\w+\.log"), "lem-bug-<random>.log"),
    (re.compile(r"(?<![\w.])lem \d+\.\d+\.\d+(?:[.\w+-]*\w)?"), "lem <version>"),
)

# Of live runs: texts with times and measured values.
LIVE = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)?"), "<time>"),
    (re.compile(r"\b\d\d:\d\d(?::\d\d)?\b"), "<time>"),
    (re.compile(r"(?:(?<=\bload )|(?<=\bengine: ))[0-9a-f]{16}\b"), "<random>"),
    (re.compile(r"\b\d+(?:\.\d+)? ?(?:ms|s|min|h)\b"), "<duration>"),
    (re.compile(r"[-+±]?\b\d+(?:\.\d+)?(?: \d{3})* ?(?:tok/s|req/s|J|Wh|W|%)"), "<measured>"),
    (re.compile(r"\bpid \d+|process \d+"), "<process>"),
    (re.compile(r"[-+±]?\b\d+\.\d+\b"), "<measured>"),
)

_MEASURED_KEY = re.compile(
    r"(_s|_j|_w|_c|_hz|_utc|_ns|_per_s|_per_j|_ratio|_b|_at|_mhz|_until)$|^(mean|p50|p90|p95|p99|at|pid|time|elapsed)$"
)
_RANDOM_KEY = re.compile(r"^(engine_load_id|load_id|host|lem_version|started|ended|hostname|boot_id)$")
# Of an experiment's configuration nothing is measured: `min_window_sec` and the like must stay as they are.
_CONFIGURED = re.compile(r"\.(requested|resolved|config|engine_effective)\.")

# Warnings that come and go with what else a machine does: the meter of the CPU's load is read once a second.
_NOISY = re.compile(r"leaves .* in doubt|values are zero or negative")


def mask_text(text: str, is_live: bool) -> str:
    """A text for people, masked."""
    for pattern, word in (*ALWAYS, *(LIVE if is_live else ())):
        text = pattern.sub(word, text)
    # Columns are as wide as what was in them.
    return re.sub(r"[ \t]+", " ", text) if is_live else text


def mask_values(values: Mapping[str, Any], is_live: bool) -> dict[str, Any]:
    """The values of a document, masked by the last key of their path."""
    if not is_live:
        return {path: _mask(path, value, is_live) for path, value in values.items()}
    return {mask_text(path, is_live): _mask(path, value, is_live) for path, value in values.items()}


def without_noise(document: Any) -> Any:
    """A document of a live run without the warnings that one run has and the next has not."""
    if isinstance(document, dict):
        return {key: without_noise(item) for key, item in document.items() if not _is_noise(key)}
    if isinstance(document, list):
        return [without_noise(item) for item in document if not _is_noise(item)]
    return None if _is_noise(document) else document


def _is_noise(value: Any) -> bool:
    return isinstance(value, str) and bool(_NOISY.search(value))


def _mask(path: str, value: Any, is_live: bool) -> Any:
    if isinstance(value, str) and not is_live:
        return mask_text(value, is_live=False)
    if not is_live or value is None or _CONFIGURED.search(path):
        return value
    key = re.split(r"[.\[]", path.rstrip("]0123456789["))[-1]
    if (
        _RANDOM_KEY.search(key)
        or isinstance(value, float)
        or (_MEASURED_KEY.search(key) and not isinstance(value, (dict, list, bool)))
    ):
        return f"<{type(value).__name__}>"
    return mask_text(value, is_live=True) if isinstance(value, str) else value
