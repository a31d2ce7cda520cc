"""How long and how much, for a machine with a GPU and for rehearsals without one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    model: str  # a name in `tests.gpu.models.SHAPES`
    batch: int
    prompts: int  # so few that one pass over them takes seconds: a window ends with a whole pass

    @property
    def name(self) -> str:
        return f"{self.model}-batch{self.batch}"


@dataclass(frozen=True)
class Extent:
    """Lengths in seconds and numbers of everything."""

    configurations: tuple[Configuration, ...]
    cycles: int
    window_s: float
    warmup_s: float
    baseline_s: float | None  # power at rest within the campaign; None leaves it out
    input_tok: int
    output_tok: int
    settle_s: float  # until power is at rest after a change
    idle_s: float  # a look at power at rest
    probe_s: float  # a look at the meters every 2 ms
    guard_s: float  # idle around a window
    part_s: float  # so many windows of this length beside one as long as all of them
    parts: int
    edges: int  # so many beginnings and ends of a load
    waves: tuple[tuple[float, float], ...]  # (period, about how long) of each square wave
    pairs: int  # runs with and without a sampler, each so long
    pair_s: float
    beside_s: float  # the window that `zeus` reads as well
    options: tuple[str, ...] | None  # names of the cases of the step `options`; None for all of them
    option_s: float  # the window of each
    limit_s: float  # no step begins, and the campaign ends, when so much time has gone

    @property
    def models(self) -> tuple[str, ...]:
        """The models of the campaign, each once; the first is the one that other steps use."""
        return tuple(dict.fromkeys(item.model for item in self.configurations))

    def without_largest(self) -> Extent:
        """The same with the first model alone, which is the smallest."""
        return dataclasses.replace(
            self, configurations=tuple(item for item in self.configurations if item.model == self.models[0])
        )


_SMALL = (Configuration("llama-1b", 1, 2), Configuration("llama-1b", 16, 16))

# Meant for ten minutes a command, the campaign last: what it does not get done is resumed by a second call. What a
# GPU takes for all this was never measured.
FULL = Extent(
    configurations=(*_SMALL, Configuration("llama-8b", 16, 16)),
    cycles=3,
    window_s=10.0,
    warmup_s=8.0,
    baseline_s=3.0,
    input_tok=128,
    output_tok=64,
    settle_s=8.0,
    idle_s=8.0,
    probe_s=4.0,
    guard_s=1.5,
    part_s=10.0,
    parts=3,
    edges=6,
    waves=((0.05, 5.0), (0.1, 5.0), (0.25, 5.0), (1.0, 6.0), (4.0, 8.0)),
    pairs=6,
    pair_s=2.0,
    beside_s=10.0,
    options=None,
    option_s=3.0,
    limit_s=530.0,
)

QUICK = dataclasses.replace(
    FULL,
    configurations=_SMALL,
    cycles=2,
    window_s=5.0,
    warmup_s=4.0,
    baseline_s=1.0,
    input_tok=64,
    output_tok=32,
    settle_s=4.0,
    idle_s=4.0,
    probe_s=2.0,
    guard_s=1.0,
    part_s=3.0,
    edges=3,
    waves=((0.1, 2.0), (1.0, 3.0)),
    pairs=3,
    pair_s=1.5,
    beside_s=5.0,
    options=("plain", "float16", "8 bit"),
    option_s=2.0,
)

_TINY = (Configuration("tiny", 1, 2), Configuration("tiny", 4, 4))

# The same steps against the NVML double, whose meters are those of a GPU in real time.
REHEARSAL = dataclasses.replace(
    QUICK,
    configurations=_TINY,
    cycles=1,
    window_s=0.3,
    warmup_s=0.2,
    baseline_s=None,
    input_tok=8,
    output_tok=8,
    settle_s=0.2,
    idle_s=0.8,
    probe_s=0.6,
    guard_s=0.3,
    part_s=1.0,
    parts=2,
    edges=1,
    waves=((0.1, 1.0), (0.5, 1.0)),
    pairs=2,
    pair_s=0.2,
    beside_s=0.8,
    options=("plain", "8 bit"),
    option_s=0.2,
)
