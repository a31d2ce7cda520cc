"""Which GPU an index means, when some are hidden from the engine."""

from __future__ import annotations

import pytest

from lem.meters.nvml import GpuFacts, visible_gpus

PRESENT = tuple(GpuFacts(index, f"GPU-{letter * 4}", "card", 2**34, (9, 0)) for index, letter in enumerate("abc"))


@pytest.mark.parametrize(
    ("value", "letters"),
    [
        (None, "abc"),
        ("0,1,2", "abc"),
        ("2", "c"),
        ("2,0", "ca"),
        (" 1 , 0 ", "ba"),
        ("GPU-bb", "b"),
        ("GPU-cccc,0", "ca"),
        ("", ""),
        ("-1", ""),
        ("0,7,1", "a"),  # as CUDA: what follows an entry that names no GPU is hidden too
        ("gpu-BB", "b"),
        ("GPU-,1", ""),  # stands for several
    ],
)
def test_an_index_counts_what_the_engine_sees(value: str | None, letters: str) -> None:
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [gpu.uuid for gpu in visible_gpus(PRESENT, environ)] == [f"GPU-{letter * 4}" for letter in letters]
