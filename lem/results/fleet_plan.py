"""The stored plan of a campaign on several hosts: made once, read by every host and by the merge.

Schema history:
    1: first version.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem import durable
from lem.durable import reason_of, remedy_for
from lem.errors import UserError
from lem.jsontypes import build, build_from, typed_fields
from lem.results.attempt import is_name

__all__ = [
    "REPLICATE",
    "SHARD",
    "FleetPlan",
    "HostPart",
    "PlannedExperiment",
    "read_plan",
    "write_plan",
]

SCHEMA_VERSION = 1

SHARD, REPLICATE = MODES = ("shard", "replicate")


@dataclass(frozen=True)
class PlannedExperiment:
    """One configuration in one cycle, as a person and the matrix of a merge know it."""

    exp_id: str
    config_name: str
    config_hash: str
    cycle_index: int


@dataclass(frozen=True)
class HostPart:
    """What one host runs.

    Attributes:
        name: of the host, which its results carry.
        exp_ids: in the order of the campaign.
        expected_s: how long it is taken to measure; None where no earlier result tells.
    """

    name: str
    exp_ids: tuple[str, ...]
    expected_s: float | None = None


@dataclass(frozen=True)
class FleetPlan:
    """A campaign divided over hosts.

    Attributes:
        config_hash: of the campaign; a host refuses a plan made of another state of its file.
        run_id: of all hosts together, so that their results make one run.
        mode: `shard` (each configuration on one host) or `replicate` (all of them on every host).
        anchor: config_hash of the configuration that every host runs, by which hosts are compared; None without one.
    """

    campaign_id: str
    campaign_name: str
    config_hash: str
    run_id: str
    mode: str
    anchor: str | None
    experiments: tuple[PlannedExperiment, ...]
    hosts: tuple[HostPart, ...]

    def part(self, index: int) -> HostPart:
        """What the host of that number, from 1, runs.

        Raises:
            UserError: there is no such host.
        """
        if not 1 <= index <= len(self.hosts):
            raise UserError(f"the plan has {len(self.hosts)} parts, and none of number {index}")
        return self.hosts[index - 1]


def write_plan(path: Path, plan: FleetPlan) -> None:
    """Write the plan, whole or not at all, where none is: a stored plan is never changed.

    Raises:
        UserError: there is one, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} is there, and a stored plan is never changed", "name another file, or remove it")
    try:
        durable.write_json(path, {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(plan)})
    except OSError as error:
        raise UserError(f"plan {path}: {reason_of(error)}", remedy_for(error, "--write-plan")) from error


def read_plan(path: Path) -> FleetPlan:
    """The plan in a file.

    Raises:
        UserError: it cannot be read, or is no whole plan of this schema.
    """
    try:
        return _decode(durable.read_json(path))
    except OSError as error:
        raise UserError(f"plan {path}: {reason_of(error)}", "give the file that --write-plan stored") from error
    except ValueError as error:
        raise UserError(
            f"plan {path}: {error}", "make it again: lem campaign FILE --write-plan PLAN --hosts …"
        ) from error


def _decode(document: Any) -> FleetPlan:
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"not a plan of schema {SCHEMA_VERSION}")
    values = typed_fields(
        FleetPlan, {name: item for name, item in document.items() if name != "schema_version"}, "plan"
    )
    experiments = tuple(
        build_from(PlannedExperiment, item, f"experiments[{index}]") for index, item in enumerate(values["experiments"])
    )
    hosts = tuple(_host(item, f"hosts[{index}]") for index, item in enumerate(values["hosts"]))
    plan = FleetPlan(**{**values, "experiments": experiments, "hosts": hosts})
    _check(plan)
    return plan


def _host(item: Any, where: str) -> HostPart:
    values = typed_fields(HostPart, item, where)
    if not all(isinstance(exp_id, str) for exp_id in values["exp_ids"]):
        raise ValueError(f"{where}.exp_ids: a list of texts is due")
    return build(HostPart, [*{**values, "exp_ids": tuple(values["exp_ids"])}.values()])


def _check(plan: FleetPlan) -> None:
    known = {item.exp_id for item in plan.experiments}
    names = [host.name for host in plan.hosts]
    if plan.mode not in MODES:
        raise ValueError(f"mode {plan.mode!r} is none of {', '.join(MODES)}")
    for text in (plan.run_id, *names, *known):
        if not is_name(text):
            raise ValueError(f"{text!r} cannot name a folder")
    if len(set(names)) != len(names) or not names:
        raise ValueError("hosts: at least one, and each once")
    for host in plan.hosts:
        if strange := [exp_id for exp_id in host.exp_ids if exp_id not in known]:
            raise ValueError(f"host {host.name} is given {strange[0]!r}, which is no experiment of the plan")
    if not known <= {exp_id for host in plan.hosts for exp_id in host.exp_ids}:
        raise ValueError("an experiment is given to no host")
