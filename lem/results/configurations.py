"""The configurations of a run as its campaign last had them: their labels, rates of energy, and service levels.

A configuration is identified by its hash. Its name is only a label, and prices, carbon figures and service levels
change no measurement: all may change after a result was written. So a list of the current ones lies in the run's
folder, and results are read with it.
"""

from __future__ import annotations

import collections
import functools
import itertools
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.codec import complete, decode
from lem.base.dataclass import dataclass, field, replace
from lem.base.durable import make_folder
from lem.base.measurement import Section
from lem.base.reasons import Reason
from lem.config.kinds import ConfigProblems
from lem.config.sections import SloConfig
from lem.record import Identity, Record, ResultKey, carbon_of

ID_HASH_LENGTH = 12  # digits of a configuration's hash that the IDs of its experiments begin with
HOST_MARK = "+"  # in no exp_id, which is hex digits and a cycle
EXPERIMENT_NAME = re.compile(rf"[0-9a-f]{{1,{ID_HASH_LENGTH}}}-c[0-9]+(\{HOST_MARK}.*)?")
CONFIGURATIONS_FILE = "configurations.json"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ListedConfiguration:
    config_hash: str
    config_name: str
    rates: Mapping[str, float] = field(default_factory=dict)  # those of `RATES` that are set
    slo: Mapping[str, float | None] | None = None  # what is not a default; None in lists of an earlier lem


@dataclass(frozen=True)
class CampaignList:
    configurations: tuple[ListedConfiguration, ...]
    numbered: tuple[str, ...]  # hashes of all that it ever had, in the order of their numbers
    superseded: tuple[str, ...]  # `<experiment>/attempt-<n>` of cycles that started over, whatever came of that


Listing = Mapping[str, ListedConfiguration]
"""By hash, in the order of the campaign."""

Recount = Callable[[Path, Record, SloConfig], Mapping[str, Section]]
"""The sections that service levels change, of the record in a file; `lem.meters.recompute.recount`."""


@dataclass(frozen=True)
class Reading:
    """What results are read by besides what was measured; what is not given is the campaign's."""

    rates: Mapping[str, float] = field(default_factory=dict)
    slo: SloConfig | None = None
    recount: Recount | None = None  # without it service levels are those of the measurement


def write_listing(
    run_folder: Path,
    listed: Sequence[ListedConfiguration],
    numbered: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> None:
    """Keep the list, the numbers of known configurations and the superseded attempts with the results of the run.

    Raises OSError.
    """
    known = read_list(run_folder)
    every = (*(known.numbered if known else ()), *numbered, *(item.config_hash for item in listed))
    gone = (*(known.superseded if known else ()), *left_out)
    found = CampaignList(tuple(listed), tuple(dict.fromkeys(every)), tuple(dict.fromkeys(gone)))
    if known != found:
        make_folder(run_folder)
        document = {"schema_version": _SCHEMA_VERSION, **vars(found)}
        document["configurations"] = [*map(vars, found.configurations)]
        durable.write_json(run_folder / CONFIGURATIONS_FILE, durable.seal(document))


def read_listing(run_folder: Path) -> Listing | None:
    return listing_of(read_list(run_folder))


def listing_of(found: CampaignList | None) -> Listing | None:
    return None if found is None else {item.config_hash: item for item in found.configurations}


def read_numbered(run_folder: Path) -> tuple[str, ...]:
    found = read_list(run_folder)
    return () if found is None else found.numbered


def read_list(run_folder: Path) -> CampaignList | None:
    def decoded(found: Mapping[str, Any]) -> CampaignList:
        document = {name: found.get(name, []) for name in ("configurations", "numbered", "superseded")}
        return decode(CampaignList, complete(CampaignList, document, Reason.of("not_recorded")), "list")

    without = "names are those that the results were measured under"
    if os.path.exists(run_folder / CONFIGURATIONS_FILE):  # noqa: PTH110 - false where permission is denied
        return durable.read_if_whole(run_folder / CONFIGURATIONS_FILE, decoded, without)
    # The parts of a stored plan have a list each; of experiments there may be thousands.
    try:
        names = [name for name in os.listdir(run_folder) if EXPERIMENT_NAME.fullmatch(name) is None]  # noqa: PTH208
    except OSError:
        return None
    paths = [path for name in sorted(names) if os.path.exists(path := run_folder / name / CONFIGURATIONS_FILE)]  # noqa: PTH110 - false where permission is denied
    lists = [found for path in paths if (found := durable.read_if_whole(path, decoded, without)) is not None]
    if not lists:
        return None
    listed = {item.config_hash: item for found in lists for item in found.configurations}
    numbered = dict.fromkeys(digest for found in lists for digest in found.numbered)
    return CampaignList(tuple(listed.values()), tuple(numbered), ())


def numbers_of(numbered: Sequence[str], listing: Listing | None, known: Sequence[tuple[str, str]]) -> list[int]:
    by_hash = {digest: number for number, digest in enumerate(numbered, 1)}
    by_name = {item.config_name: by_hash.get(digest) for digest, item in (listing or {}).items()}
    following, found = itertools.count(len(numbered) + 1), list[int]()
    for digest, name in known:
        number = by_hash.get(digest) if digest else by_name.get(name)
        # Each host's part of a configuration that several ran is a configuration.
        found.append(next(following) if number is None or number in found else number)
    return found


def superseded(results: Iterable[tuple[str, Identity]]) -> frozenset[ResultKey]:
    """Those that another node measured before the cycle started over on the node of the last attempt.

    Each is given with the folder of its experiment: a campaign without a plan has the host that it runs on, and the
    parts of a replicated one have the same experiments.
    """
    attempts: dict[str, list[Identity]] = {}
    for folder, identity in results:
        attempts.setdefault(folder, []).append(identity)
    if len({identity.machine for found in attempts.values() for identity in found}) < 2:
        return frozenset()
    last = {folder: max(found, key=lambda item: item.attempt).machine for folder, found in attempts.items()}
    return frozenset(item.key for folder, found in attempts.items() for item in found if item.machine != last[folder])


def labels_of(identities: Sequence[Identity], listing: Listing | None) -> dict[tuple[str, str], str]:
    """The label of each configuration of a run, by hash and machine; no two have the same."""
    last: dict[str, Identity] = {}
    for identity in identities:
        if identity.start_utc >= last.setdefault(identity.config_hash, identity).start_utc:
            last[identity.config_hash] = identity
    nodes: dict[str, set[str]] = {}
    hosts: dict[str, dict[str, str]] = {}
    places = set(map(operator.attrgetter("config_hash", "host", "machine"), identities))
    for _, host, machine in places:
        nodes.setdefault(host, set()).add(machine)
    for digest, host, machine in places:
        hosts.setdefault(digest, {})[machine] = host if len(nodes[host]) == 1 else machine
    names = {digest: identity.config_name for digest, identity in last.items()}
    if listing is not None:
        names = {
            digest: listing[digest].config_name if digest in listing else f"{name} (removed)"
            for digest, name in names.items()
        }
    counts = collections.Counter(names.values())
    unique = {digest: name if counts[name] == 1 else f"{name} {digest[:8]}" for digest, name in names.items()}
    return {
        (digest, machine): f"{unique[digest]} @ {place}" if len(them) > 1 else unique[digest]
        for digest, them in hosts.items()
        for machine, place in them.items()
    }


def bare_name(identity: Identity) -> str:
    """The name without the machine that `labels_of` added."""
    return identity.config_name.removesuffix(f" @ {identity.machine}").removesuffix(f" @ {identity.host}")


def group_of(identity: Identity) -> tuple[str, str]:
    return identity.config_hash, identity.machine if bare_name(identity) != identity.config_name else ""


def slo_of(record: Record) -> SloConfig | None:
    """The service levels that its good requests were counted by; None where they were written as `${VAR}`."""
    traffic = record.requested.get("traffic_simulation")
    found = traffic.get("slo") if isinstance(traffic, Mapping) else None
    options = found.items() if isinstance(found, Mapping) else ()
    return _slo(tuple((name, value) for name, value in options if isinstance(value, (int, float, str))))


@functools.lru_cache(64)  # few in thousands of records
def _slo(options: tuple[tuple[str, Any], ...]) -> SloConfig | None:
    try:
        return SloConfig.from_dict(dict(options))
    except ConfigProblems:
        return None


@functools.lru_cache(64)
def _listed_slo(options: tuple[tuple[str, Any], ...]) -> SloConfig:
    return SloConfig.from_dict(dict(options))


def as_read(file: str, record: Record, listed: ListedConfiguration | None, reading: Reading) -> Record:
    """The record in a file with the emissions, cost and goodput that it is read by."""
    slo: SloConfig | None = reading.slo
    given: Mapping[str, Any] = reading.rates
    if listed is not None:
        given = {**listed.rates, **given}
        if slo is None and listed.slo is not None:
            slo = _listed_slo(tuple(listed.slo.items()))
    if reading.recount is not None and slo is not None and slo != slo_of(record):
        record = _by_slo(Path(file), record, slo, reading.recount)
    if not given or all(getattr(record.carbon, name) == value for name, value in given.items()):
        return record
    rates = replace(record.carbon, **given)
    return record.with_sections(carbon=carbon_of(record.energy.primary_j, rates))


def _by_slo(path: Path, record: Record, slo: SloConfig, recount: Recount) -> Record:
    counted = functools.cache(lambda: recount(path, record, slo))  # when it is asked for: it reads every request
    before = slo_of(record)
    changed = () if before and before.limits_ms == slo.limits_ms else ("work", "throughput", "efficiency")
    traffic = record.requested.get("traffic_simulation")
    requested = {
        **record.requested,
        "traffic_simulation": {**(traffic if isinstance(traffic, Mapping) else {}), "slo": slo.changed()},
    }
    read = {"requested": requested}.get
    return Record.lazily(lambda name: counted()[name] if name in changed else read(name) or getattr(record, name))
