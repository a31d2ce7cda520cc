"""`lem results recompute`: every energy figure worked out again from the samples, and whether it agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lem.durable import reason_of
from lem.units import format_quantity

if TYPE_CHECKING:
    from lem.config.experiment_config import ExperimentConfig
    from lem.meters.external import ExternalReadings
    from lem.meters.recompute import Recomputed
    from lem.results.repository import StoredResult

__all__ = ["Outcome", "document_of", "recompute_result", "write_outcomes"]


@dataclass(frozen=True)
class Outcome:
    """What recomputing one result came to.

    Attributes:
        status: `agrees`, `differs`, `unmeasured` (the record holds no energy and there are no samples) or
            `impossible`.
        message: why it is impossible, or what is to be known; empty when there is nothing to say.
    """

    result: StoredResult
    status: str
    message: str = ""
    recomputed: Recomputed | None = None

    @property
    def is_good(self) -> bool:
        """Whether nothing speaks against the record."""
        return self.status in ("agrees", "unmeasured")


def recompute_result(result: StoredResult) -> Outcome:
    """The record of one attempt beside what its samples say."""
    from lem.meters.recompute import has_energy, recompute
    from lem.meters.refusal import MeterRefused
    from lem.meters.samples import FINISHED_FILENAME, read_finished

    folder = result.path.parent
    try:
        log, marks = read_finished(folder / FINISHED_FILENAME)
        config = _read_config(folder)
    except FileNotFoundError as error:
        name = Path(error.filename).name
        if name == FINISHED_FILENAME and not has_energy(result.record):
            return Outcome(result, "unmeasured", "no energy was measured, and nothing was sampled")
        return Outcome(result, "impossible", f"there is no {name} (samples are kept unless timeseries.save is false)")
    except OSError as error:
        return Outcome(result, "impossible", f"{error.filename}: {reason_of(error)}")
    except ValueError as error:
        return Outcome(result, "impossible", str(error))
    external = _read_external(config.measurement.external_csv)
    try:
        found = recompute(result.record, config, log, marks, external)
    except MeterRefused as error:
        return Outcome(result, "impossible", error.message)
    return Outcome(result, "agrees" if found.agrees else "differs", "; ".join(found.notes), found)


def document_of(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON values."""
    identity, found = outcome.result.record.identity, outcome.recomputed
    differences = found.differences if found else ()
    return {
        "experiment_id": identity.experiment_id,
        "config_name": identity.config_name,
        "attempt": identity.attempt,
        "path": str(outcome.result.path),
        "status": outcome.status,
        "message": outcome.message,
        "compared": found.compared if found else 0,
        "differences": [
            {"field": item.field, "recorded": item.recorded, "recomputed": item.recomputed} for item in differences
        ],
    }


def write_outcomes(out: TextIO, outcomes: Sequence[Outcome]) -> None:
    """A line for each result, its differences below it, and a sentence at the end."""
    from lem.results.layout import printable

    for outcome in outcomes:
        identity, found = outcome.result.record.identity, outcome.recomputed
        name = f"{identity.experiment_id} attempt {identity.attempt} ({identity.config_name})"
        said = f"{outcome.status}, {found.compared} figures" if found else outcome.status
        told = f": {outcome.message}" if outcome.message else ""
        out.write(printable(f"{name}: {said}{told}") + "\n")
        for item in found.differences if found else ():
            was, now = _shown(item.recorded), _shown(item.recomputed)
            out.write(printable(f"  {item.field}: recorded {was}, the samples say {now}") + "\n")
    good = sum(outcome.is_good for outcome in outcomes)
    out.write(f"{good} of {len(outcomes)} results agree with their samples\n")


def _read_config(folder: Path) -> ExperimentConfig:
    """The resolved configuration of an attempt.

    Raises:
        OSError: its file cannot be read.
        ValueError: it holds something else.
    """
    from lem import durable
    from lem.config.experiment_config import ExperimentConfig
    from lem.record import CONFIG_FILE

    document = durable.read_json(folder / CONFIG_FILE)
    resolved = document.get("resolved") if isinstance(document, dict) else None
    if not isinstance(resolved, dict):
        raise ValueError(f"{folder / CONFIG_FILE}: it does not hold the resolved configuration")
    return ExperimentConfig.from_dict(resolved)


def _read_external(path: str | None) -> ExternalReadings | None:
    """The readings of the user's own meter; None where they cannot be read any more, which the outcome tells."""
    from lem.meters.external import read_external
    from lem.meters.refusal import MeterRefused

    try:
        return None if path is None else read_external(Path(path))
    except MeterRefused:
        return None


def _shown(value: Any) -> str:
    return format_quantity(value, digits=9) if isinstance(value, float) else "nothing" if value is None else str(value)
