"""One result as a person reads it."""

from __future__ import annotations

import dataclasses
import re

import pytest

from lem.base.doc import text_width
from lem.record import Record
from lem.results.table import render_record
from tests.goldens import assert_golden
from tests.records import make_record


def invalid_record() -> Record:
    record = make_record(
        is_valid=False, invalid_reasons=("5 of 10 requests failed",), warnings=("warm-up did not converge",)
    )
    return dataclasses.replace(
        record,
        validity=dataclasses.replace(record.validity, warmup_converged=False, engine_reused=True),
        window=dataclasses.replace(
            record.window, load_s=None, window_repeats=1, null_reasons={"load_s": "the engine was reused"}
        ),
        throughput=make_record(output_tok_per_s=None).throughput,
    )


RECORDS = {
    "detail_cpu": make_record(n_requests=25, ttft_p50_s=0.0123),
    "detail_invalid": invalid_record(),
    "detail_energy": make_record(energy_per_output_tok_j=0.5),
    "detail_estimate": make_record(energy_per_output_tok_j=0.5, energy_source="tdp_estimate"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_text_is_the_golden_one_and_fits_80_columns(name: str) -> None:
    text = render_record(RECORDS[name])
    assert_golden(f"results/{name}.txt", text)
    assert max(map(text_width, text.splitlines())) <= 80


def test_colour_changes_nothing_but_colour() -> None:
    coloured = render_record(RECORDS["detail_invalid"], is_colour=True)
    assert coloured != render_record(RECORDS["detail_invalid"])
    assert re.sub(r"\x1b\[[0-9]*m", "", coloured) == render_record(RECORDS["detail_invalid"])


@pytest.mark.parametrize(("repeats", "said"), [(0, "not every prompt once"), (1, "all prompts once"), (2, "2 times")])
def test_the_window_says_how_often_the_prompts_were_run_and_that_it_was_not_steady(repeats: int, said: str) -> None:
    record = make_record()
    record = dataclasses.replace(
        record,
        window=dataclasses.replace(record.window, window_repeats=repeats),
        validity=dataclasses.replace(record.validity, steady=False),
    )
    (line,) = (text for text in render_record(record).splitlines() if text.startswith("window"))
    assert line.endswith(f"{said}, not steady")


def test_an_estimate_is_called_one() -> None:
    assert "(an estimate)" in render_record(RECORDS["detail_estimate"])
    assert "estimate" not in render_record(RECORDS["detail_energy"])


def test_what_was_not_measured_says_why() -> None:
    text = render_record(RECORDS["detail_cpu"])
    assert "energy      not measured: no energy meter was used" in text
    assert "itl, queue: not measured: the engine gave no time for each token" in text
