"""The rule by which cycles are added to a run, kept with its results."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from lem.base import durable
from lem.base.codec import decode
from lem.base.durable import make_folder, reason_of
from lem.base.units import percent
from lem.results.store import stopping_campaign

_logger = logging.getLogger(__name__)

# With fewer cycles a rule never stops: three that happen to lie together say nothing about the next one.
LEAST_CYCLES = 5
MOST_CYCLES = 20

# Stopping once an interval is narrow favours the cycles that happen to lie together. Simulated by
# tests/bench/stopping.py (log-normal cycles, 5 to 20 of them): 92 % where the standard deviation between cycles is
# twice the half width asked for, 95 % where it is a quarter or five times it.
UNACCOUNTED = "the intervals do not account for that; in simulations they covered 92 to 95 % instead of 95 %"

STOPPING_FILE = "stopping.json"
_STOPPING_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Target:
    """How narrow the interval of every configuration should become."""

    half_width: float  # of the 95 % interval over the mean: 0.02 is ±2 %
    metric: str | None = None  # None: energy per output token where it is measured, else the output throughput

    def describe(self) -> str:
        return f"±{percent(self.half_width)}"


@dataclass(frozen=True)
class StoppingRule:
    """The rule by which cycles were added to a run; it is kept with its results."""

    target: Target
    least_cycles: int
    most_cycles: int

    def describe(self) -> str:
        """`until every interval of output_tok_per_s is within ±2 % (5 cycles at least, 20 at most)`."""
        metric = "" if self.target.metric is None else f" of {self.target.metric}"
        bounds = f"({self.least_cycles} cycles at least, {self.most_cycles} at most)"
        return f"until every interval{metric} is within {self.target.describe()} {bounds}"


def write_stopping_rule(run_folder: Path, rule: StoppingRule) -> None:
    """Keep the rule with the results of the run; InfrastructureError where it cannot be written."""
    with stopping_campaign(run_folder / STOPPING_FILE) as path:
        make_folder(run_folder)
        durable.write_json(path, durable.seal({"schema_version": _STOPPING_SCHEMA_VERSION, **dataclasses.asdict(rule)}))


def read_stopping_rule(run_folder: Path) -> StoppingRule | None:
    """The rule by which a run ended; None where its number of cycles was fixed. A broken file is logged."""
    path = run_folder / STOPPING_FILE
    try:
        found = durable.read_sealed(path)
        document = {name: found.get(name) for name in ("target", "least_cycles", "most_cycles")}
        return decode(StoppingRule, document, "rule")
    except FileNotFoundError:
        return None
    except OSError as error:
        _logger.warning("%s: %s: unknown whether the number of cycles was fixed", path, reason_of(error))
    except ValueError:
        _logger.warning("%s is corrupt: unknown whether the number of cycles was fixed", path)
    return None
