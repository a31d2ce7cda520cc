"""Dividing a campaign over hosts. Pure.

All cycles of a configuration run on one host, so that no interval mixes cards. The longest goes first, to the host with
the least to do (Graham 1969: at most 4/3 of the optimum). One configuration, the cheapest, runs on every host: the
anchor, by which a merge checks whether the hosts are alike.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lem.base.dataclass import replace
from lem.base.durable import packaged_text
from lem.base.errors import UserError
from lem.base.units import plural
from lem.config.campaign_config import slug_of
from lem.orchestration.grid import campaign_config_hash
from lem.orchestration.plan import Experiment, Plan
from lem.results.configurations import EXPERIMENT_NAME
from lem.results.merge import REPLICATE, SHARD, FleetPlan, HostPart, PlannedExperiment
from lem.results.store import check_name


def parse_shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= count:
        raise UserError(f"--shard {text}: expected I/N, I from 1 to N", "--shard 2/3 is the second of three hosts")
    return index, count


def divide(costs: Mapping[str, float], count: int) -> tuple[str | None, tuple[frozenset[str], ...]]:
    if count == 1:
        return None, (frozenset(costs),)
    anchor = min(costs, key=lambda name: costs[name])
    parts: list[set[str]] = [{anchor} for _ in range(count)]
    _deal({name: cost for name, cost in costs.items() if name != anchor}, parts, [0.0] * count)
    return anchor, tuple(frozenset(part) for part in parts)


def _deal(costs: Mapping[str, float], parts: Sequence[set[str]], loads: list[float]) -> None:
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = loads.index(min(loads))
        parts[least].add(name)
        loads[least] += costs[name]


def make_fleet_plan(
    plan: Plan,
    hosts: Sequence[str],
    run_id: str,
    *,
    is_replicated: bool = False,
    measured_by_config: Mapping[str, float] | None = None,
) -> FleetPlan:
    _check_hosts(hosts)
    costs = costs_of(plan.configurations, measured_by_config or {})
    anchor, parts = (None, (frozenset(costs),) * len(hosts)) if is_replicated else divide(costs, len(hosts))
    return FleetPlan(
        campaign_id=plan.campaign.campaign_id,
        campaign_name=plan.campaign.campaign_name,
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
                sum(costs[digest] for digest in part) * plan.execution.cycles if measured_by_config else None,
            )
            for name, part in zip(hosts, parts, strict=True)
        ),
    )


def _check_hosts(hosts: Sequence[str]) -> None:
    if not hosts or len(set(hosts)) != len(hosts):
        raise UserError(f"hosts {', '.join(hosts) or '(none)'}: expected at least one, and each once")
    for name in hosts:
        check_name(name, "host")
        if EXPERIMENT_NAME.fullmatch(name):
            raise UserError(f"host {name!r} has a name like the folder of an experiment", "give it another name")


def replan(
    stored: FleetPlan,
    hosts: Sequence[str],
    present: Collection[tuple[str, str]],
    costs: Mapping[str, float] | None = None,
) -> FleetPlan:
    """A plan of the same run for these hosts, over which the missing results of all other hosts are divided."""
    # What a host has measured stays its own. A configuration that is incomplete on a host that is not one of these is
    # run by one of them in all its cycles, so that no interval mixes hosts. `present` holds host and exp_id of each
    # result, `costs` is by config_hash; without it all cost the same.
    _check_hosts(hosts)
    if stored.mode == REPLICATE:
        raise UserError("in a replicated campaign no host can take over another's part", "run the playbook again")
    hash_of = {item.exp_id: item.config_hash for item in stored.experiments}
    cost = {digest: (costs or {}).get(digest, 1.0) for digest in hash_of.values()}
    parts = {host.name: {hash_of[exp_id] for exp_id in host.exp_ids} for host in stored.hosts}
    lost: set[str] = set()
    for host in stored.hosts:
        if host.name not in hosts:
            missing = {hash_of[exp_id] for exp_id in host.exp_ids if (host.name, exp_id) not in present}
            lost |= missing - {stored.anchor}
            parts[host.name] -= missing
    anchors = {stored.anchor} if stored.anchor else set()
    chosen = {name: parts.get(name, set()) | anchors for name in hosts}
    loads = [
        sum(cost[digest] for exp_id, digest in hash_of.items() if digest in part and (name, exp_id) not in present)
        for name, part in chosen.items()
    ]
    digests = list(hash_of.values())
    _deal({digest: cost[digest] * digests.count(digest) for digest in sorted(lost)}, list(chosen.values()), loads)
    kept = {host.name: parts[host.name] for host in stored.hosts if host.name not in hosts}
    return replace(
        stored,
        hosts=tuple(
            HostPart(name, tuple(exp_id for exp_id in hash_of if hash_of[exp_id] in part))
            for name, part in [*chosen.items(), *kept.items()]
            if part or name in chosen
        ),
    )


def part_of_plan(plan: Plan, index: int, count: int, stored: FleetPlan | None = None) -> Plan:
    if stored is None:
        part = divide(costs_of(plan.configurations, {}), count)[1][index - 1]
        chosen = {item.exp_id for item in plan.experiments if item.config_hash in part}
    else:
        plan = matching(plan, stored)
        if count != len(stored.hosts):
            raise UserError(f"the stored plan is for {len(stored.hosts)} hosts, not for {count}")
        chosen = set(stored.part(index).exp_ids)
    return replace(plan, experiments=tuple(item for item in plan.experiments if item.exp_id in chosen))


def matching(plan: Plan, stored: FleetPlan) -> Plan:
    for one in (plan, plan.as_by_older_build()):
        if one.config_hash == stored.config_hash:
            return one
    first = plan.as_first_hashed()
    hashes = [item.config_hash for item in first.given]
    if stored.config_hash != campaign_config_hash(first.campaign, hashes, is_first=True):
        text = f"{stored.config_hash}, here {plan.config_hash}"
        hint = "use the campaign file, the files that it names and the options that the plan was made with"
        raise UserError(f"the stored plan is of another version of the campaign ({text})", hint)
    return first


def costs_of(configurations: Sequence[Experiment], measured: Mapping[str, float]) -> dict[str, float]:
    work = {item.config_hash: _work(item) for item in configurations}
    known = [measured[digest] / work[digest] for digest in work if digest in measured]
    scale = sum(known) / len(known) if known else 1.0
    return {digest: measured.get(digest, tokens * scale) for digest, tokens in work.items()}


def _work(item: Experiment) -> float:
    """Tokens to generate; reading one costs far less, and how much less depends on the engine."""
    return (item.n_prompts or 1) * (item.config.max_output_tokens + item.config.max_input_tokens / 32)


def container_command(runtime: str, image: str) -> list[str]:
    folder, name = '"$PWD"', shlex.quote(image)
    return {
        "apptainer": ["apptainer", "exec", "--nv", "--bind", folder, "--pwd", folder, name],
        # Unlike the others, it passes no variables, and knows no GPU unless CDI is set up.
        "podman": ["podman", "run", "--rm", "$([ ! -e /dev/nvidiactl ] || echo --device=nvidia.com/gpu=all)",
                   "--ipc=host", "--network=host", "--uts=host", "--env=HF_*", "--env=LEM_*", "--env=SLURM_*",
                   f"--volume={folder}:{folder}", f"--workdir={folder}", name],
        "pyxis": ["srun", f"--container-image={name}", f"--container-mounts={folder}:{folder}",
                  f"--container-workdir={folder}"],
    }[runtime]  # fmt: skip


def slurm_script(
    plan: FleetPlan, path: Path, lem: Sequence[str], container: Sequence[str], options: Sequence[str]
) -> str:
    merged = [*lem, "merge", plan.results_dir, "--output", "merged", "--plan", str(path)]
    words = [*lem, "campaign", *plan.arguments, "--plan", str(path), "--executor", "local", "--yes"]
    partition = "".join(f" {shlex.quote(option)}" for option in options if option.startswith("--partition="))
    return packaged_text("lem.orchestration", "slurm.txt").format(
        count=plural(len(plan.hosts), "part"),
        plan=path.name,
        name=f"lem-{slug_of(plan.campaign_name)}",
        last=len(plan.hosts) - 1,
        n_parts=len(plan.hosts),
        options="".join(f"#SBATCH {option}\n" for option in options),
        merge_options=partition,
        merge=shlex.quote(shlex.join(merged)),
        run=" ".join([*container, shlex.join(words)]),
    )
