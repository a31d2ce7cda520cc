"""The metrics: what they are called where."""

from __future__ import annotations

import pytest

from lem.results.metrics import METRICS


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("energy_per_output_tok_j", "energy per output token"),
        ("gpu_energy_j", "GPU energy"),
        ("output_tok_per_s", "output throughput"),
    ],
)
def test_within_a_sentence_an_abbreviation_keeps_its_capitals(name: str, label: str) -> None:
    (metric,) = (metric for metric in METRICS if metric.name == name)
    assert metric.lower_label.startswith(label)
