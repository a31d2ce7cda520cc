"""Whether a campaign can run here, looked at before anything is measured."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lem.config.campaign_config import CampaignConfig
from lem.errors import UserError
from lem.experiment.probe import missing_distributions
from lem.meters.gpus import find_gpus, named_gpus, visible_gpus
from lem.orchestration.grid import GridValidationIssue
from lem.orchestration.plan import CampaignExperiment, Plan
from lem.orchestration.session import Session
from lem.orchestration.workers import WorkerUnavailable
from lem.reasons import Reason

__all__ = ["check_supported", "find_environment", "gpus_of", "with_unused_options"]


def check_supported(campaign: CampaignConfig, executor_name: str) -> None:
    """Refuse what only containers can do, where there are none.

    Raises:
        UserError: the campaign asks for it.
    """
    if campaign.cold_start.restart_container and executor_name != "docker":
        raise UserError(
            "cold_start.restart_container needs the docker executor, and these experiments run in this Python",
            "use cold_start.force_cold_start, which starts a new worker for each experiment",
        )


def find_environment(session: Session, experiments: Sequence[CampaignExperiment]) -> dict[str, Any]:
    """What the workers of these experiments stand on, by name; they are started for it.

    Raises:
        UserError: a worker cannot be started, or lacks its engine.
        Interrupted: a stop was asked for.
    """
    found: dict[str, Any] = {}
    for backend in dict.fromkeys(item.backend for item in experiments):
        try:
            environment = session.open(backend)
        except WorkerUnavailable as error:  # nothing has run yet: this host is not fit, and no experiment has failed
            raise UserError(error.message, error.hint) from error
        missing = missing_distributions(backend, environment)
        if missing:
            raise _lacking(session, backend, missing, environment)
        found.update({f"{backend}.{name}": value for name, value in environment.items()})
    return found


def _lacking(session: Session, backend: str, missing: Sequence[str], environment: Mapping[str, Any]) -> UserError:
    """The error of a worker that lacks its engine."""
    lacks = f"Python ({environment.get('python')}) has no {' and no '.join(missing)}"
    if session.executor_name == "docker":
        return UserError(
            f"backend {backend} cannot run in service {backend}: its {lacks}",
            "name an image that has it in the compose file; lem compose prints one with images that do",
        )
    return UserError(
        f"backend {backend} cannot run here: this {lacks}",
        f"pip install {' '.join(missing)}, name a Python that has them with --python, or use a container (lem doctor)",
    )


def gpus_of(plan: Plan) -> tuple[str, ...]:
    """The UUIDs of the GPUs that a plan uses; a name that is not found here is the worker's to refuse."""
    visible = visible_gpus(find_gpus(), os.environ)
    chosen = {gpu.uuid for item in plan.configurations for gpu in named_gpus(item.config.gpus, visible)}
    return tuple(sorted(chosen))


def with_unused_options(plan: Plan) -> Plan:
    """The plan with a warning for each option that does nothing in a campaign."""
    issues = [issue for item in plan.configurations for issue in _unused_options(item)]
    return dataclasses.replace(plan, warnings=(*plan.warnings, *issues))


def _unused_options(item: CampaignExperiment) -> list[GridValidationIssue]:
    options = {
        "num_cycles": (item.config.num_cycles != 1, "execution.cycles"),
        "io.results_dir": (item.config.io.results_dir is not None, "the campaign's io.results_dir"),
    }
    unused = [
        Reason.of("campaign_decides", option=name, instead=instead)
        for name, (is_set, instead) in options.items()
        if is_set
    ]
    return [GridValidationIssue.of(item.config_name, reason, severity="warning") for reason in unused]
