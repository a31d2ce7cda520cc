"""Dividing a campaign over hosts. Pure.

All cycles of a configuration run on one host, so that cards are never mixed in one interval. Longest first on the host
that has least to do (Graham 1969: at most 4/3 of the best possible). One configuration, the cheapest, runs on every
host: the anchor, by which a merge sees whether the hosts are alike.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

from lem.base.errors import UserError
from lem.config.experiment import ExperimentConfig
from lem.orchestration.plan import CampaignExperiment, Plan
from lem.results.merge import REPLICATE, SHARD, FleetPlan, HostPart, PlannedExperiment

_SHARD = re.compile(r"([0-9]{1,5})/([0-9]{1,5})")


def parse_shard(text: str) -> tuple[int, int]:
    """Which part of how many, from 1: `2/3`.

    Raises:
        UserError: it is not that.
    """
    found = _SHARD.fullmatch(text)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= count:
        raise UserError(f"--shard {text}: I/N is due, with I from 1 to N", "the second of three hosts: --shard 2/3")
    return index, count


def divide(costs: Mapping[str, float], count: int) -> tuple[str | None, tuple[frozenset[str], ...]]:
    """The anchor, and the configurations of each host, the anchor among them.

    Args:
        costs: by config_hash, how long a configuration takes; equal ones in the order of the mapping.
        count: of hosts; a single one has all and no anchor.
    """
    if count == 1:
        return None, (frozenset(costs),)
    anchor = min(costs, key=lambda name: costs[name])
    parts: list[set[str]] = [{anchor} for _ in range(count)]
    loads = [0.0] * count
    for name in sorted(costs, key=lambda name: -costs[name]):
        if name != anchor:
            least = loads.index(min(loads))
            parts[least].add(name)
            loads[least] += costs[name]
    return anchor, tuple(frozenset(part) for part in parts)


def make_fleet_plan(
    plan: Plan,
    hosts: Sequence[str],
    *,
    campaign_id: str,
    campaign_name: str,
    run_id: str,
    is_replicated: bool = False,
    measured_by_config: Mapping[str, float] | None = None,
) -> FleetPlan:
    """The plan divided over the hosts.

    Args:
        is_replicated: every host runs all of it.
        measured_by_config: seconds of an experiment by config_hash, from earlier results.

    Raises:
        UserError: no host, or one twice.
    """
    if not hosts or len(set(hosts)) != len(hosts):
        raise UserError(f"hosts {', '.join(hosts) or '(none)'}: at least one is due, and each once")
    costs = costs_of(plan.configurations, measured_by_config or {})
    anchor, parts = (None, (frozenset(costs),) * len(hosts)) if is_replicated else divide(costs, len(hosts))
    cycles = plan.execution.cycles
    is_measured = bool(measured_by_config)
    return FleetPlan(
        campaign_id=campaign_id,
        campaign_name=campaign_name,
        config_hash=plan.config_hash,
        run_id=run_id,
        mode=REPLICATE if is_replicated else SHARD,
        anchor=anchor,
        experiments=tuple(
            PlannedExperiment(item.exp_id, item.config_name, item.config_hash, item.cycle_index)
            for item in plan.experiments
        ),
        hosts=tuple(
            HostPart(
                name,
                tuple(item.exp_id for item in plan.experiments if item.config_hash in part),
                sum(costs[digest] for digest in part) * cycles if is_measured else None,
            )
            for name, part in zip(hosts, parts, strict=True)
        ),
    )


def plan_anew(
    stored: FleetPlan,
    hosts: Sequence[str],
    present: Collection[tuple[str, str]],
    costs: Mapping[str, float] | None = None,
) -> FleetPlan:
    """A plan of the same run for these hosts, in which what lacks and was another host's is divided among them.

    What a host has measured stays its own. A configuration of which anything lacks on a host that is not among these
    is run by one of them in all its cycles, so that no interval mixes hosts.

    Args:
        present: host and exp_id of each experiment that has a result.
        costs: by config_hash, how long a configuration takes; all the same when not given.

    Raises:
        UserError: no host, one twice, or every host runs everything.
    """
    if not hosts or len(set(hosts)) != len(hosts):
        raise UserError(f"hosts {', '.join(hosts) or '(none)'}: at least one is due, and each once")
    if stored.mode == REPLICATE:
        raise UserError("in a replicated campaign nobody can do another host's part", "call the playbook again instead")
    hash_of = {item.exp_id: item.config_hash for item in stored.experiments}
    parts = {host.name: {hash_of[exp_id] for exp_id in host.exp_ids} for host in stored.hosts}
    lost: set[str] = set()
    for host in stored.hosts:
        if host.name not in hosts:
            lacking = {hash_of[exp_id] for exp_id in host.exp_ids if (host.name, exp_id) not in present}
            lost |= lacking - {stored.anchor}
            parts[host.name] -= lacking
    chosen = {name: parts.get(name, set()) | ({stored.anchor} if stored.anchor else set()) for name in hosts}
    cost = {digest: (costs or {}).get(digest, 1.0) for digest in hash_of.values()}
    loads = {
        name: sum(
            cost[hash_of[exp_id]] for exp_id in hash_of if hash_of[exp_id] in part and (name, exp_id) not in present
        )
        for name, part in chosen.items()
    }
    cycles = {digest: sum(other == digest for other in hash_of.values()) for digest in lost}
    for digest in sorted(lost, key=lambda item: (-cost[item], item)):
        least = min(chosen, key=lambda name: loads[name])
        chosen[least].add(digest)
        loads[least] += cost[digest] * cycles[digest]
    kept = {host.name: parts[host.name] for host in stored.hosts if host.name not in hosts}
    return dataclasses.replace(
        stored,
        hosts=tuple(
            HostPart(name, tuple(exp_id for exp_id in hash_of if hash_of[exp_id] in part))
            for name, part in [*chosen.items(), *kept.items()]
            if part or name in chosen
        ),
    )


def part_of_plan(plan: Plan, index: int, count: int) -> Plan:
    """The part of a plan that needs no stored one: every host that knows the campaign divides it the same way."""
    _, parts = divide(costs_of(plan.configurations, {}), count)
    return _reduced(plan, [item for item in plan.experiments if item.config_hash in parts[index - 1]])


def take_part(plan: Plan, fleet_plan: FleetPlan, index: int, count: int | None) -> Plan:
    """The part of a plan that a stored one gives to the host of that number, from 1.

    Raises:
        UserError: the stored plan is not of this campaign, or not for so many hosts.
    """
    check_same(plan, fleet_plan)
    if count is not None and count != len(fleet_plan.hosts):
        raise UserError(f"the stored plan is for {len(fleet_plan.hosts)} hosts, not for {count}")
    chosen = set(fleet_plan.part(index).exp_ids)
    return _reduced(plan, [item for item in plan.experiments if item.exp_id in chosen])


def check_same(plan: Plan, stored: FleetPlan) -> None:
    """See that a stored plan is of this campaign.

    Raises:
        UserError: it is not.
    """
    if stored.config_hash != plan.config_hash:
        raise UserError(
            f"the stored plan is of another state of the campaign ({stored.config_hash}, here {plan.config_hash})",
            "the campaign file, the files that it names and the options must be those that the plan was made with",
        )


def _reduced(plan: Plan, experiments: Sequence[CampaignExperiment]) -> Plan:
    return dataclasses.replace(plan, experiments=tuple(experiments))


def costs_of(configurations: Sequence[CampaignExperiment], measured: Mapping[str, float]) -> dict[str, float]:
    """By config_hash, what each configuration costs: in seconds where earlier results tell of some, else in tokens."""
    work = {item.config_hash: _work(item.config) for item in configurations}
    known = [measured[digest] / work[digest] for digest in work if digest in measured]
    scale = sum(known) / len(known) if known else 1.0
    return {digest: measured.get(digest, tokens * scale) for digest, tokens in work.items()}


def _work(config: ExperimentConfig) -> float:
    """Tokens to make; reading one costs far less than making one, and how much less is the engine's affair."""
    source = config.dataset or config.prompts
    count = getattr(source, "sample_size", None) or 1
    return float(count * (config.max_output_tokens + config.max_input_tokens / 32))
