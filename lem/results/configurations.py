"""The configurations of a run as its campaign last had them: their labels, and the rates of energy.

A configuration is identified by its hash. Its name is only a label, and prices and carbon figures change no
measurement: both may change after a result was written. So a list of the current ones lies in the run's folder, and
results are read with it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.codec import decode
from lem.base.durable import make_folder
from lem.record import Identity, Record, carbon_of

CONFIGURATIONS_FILE = "configurations.json"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ListedConfiguration:
    config_hash: str
    config_name: str
    rates: Mapping[str, float] = field(default_factory=dict)  # those of `RATES` that are set


@dataclass(frozen=True)
class _List:
    configurations: tuple[ListedConfiguration, ...]
    numbered: tuple[str, ...]  # hashes of all that it ever had, in the order of their numbers


Listing = Mapping[str, ListedConfiguration]
"""By hash, in the order of the campaign."""


def write_listing(run_folder: Path, listed: Sequence[ListedConfiguration], numbered: Sequence[str] = ()) -> None:
    """Keep the list, and the numbers of known configurations, with the results of the run; raises OSError."""
    known = _read(run_folder)
    every = (*(known.numbered if known else ()), *numbered, *(item.config_hash for item in listed))
    found = _List(tuple(listed), tuple(dict.fromkeys(every)))
    if known != found:
        make_folder(run_folder)
        document = {"schema_version": _SCHEMA_VERSION, **dataclasses.asdict(found)}
        durable.write_json(run_folder / CONFIGURATIONS_FILE, durable.seal(document))


def read_listing(run_folder: Path) -> Listing | None:
    found = _read(run_folder)
    return None if found is None else {item.config_hash: item for item in found.configurations}


def read_numbered(run_folder: Path) -> tuple[str, ...]:
    found = _read(run_folder)
    return () if found is None else found.numbered


def _read(run_folder: Path) -> _List | None:
    def decoded(found: Mapping[str, Any]) -> _List:
        return decode(_List, {name: found.get(name, []) for name in ("configurations", "numbered")}, "list")

    without = "names are those that the results were measured under"
    if (run_folder / CONFIGURATIONS_FILE).exists():
        return durable.read_if_whole(run_folder / CONFIGURATIONS_FILE, decoded, without)
    # The parts of a stored plan have a list each.
    paths = sorted(run_folder.glob(f"*/{CONFIGURATIONS_FILE}"))
    lists = [found for path in paths if (found := durable.read_if_whole(path, decoded, without)) is not None]
    if not lists:
        return None
    listed = {item.config_hash: item for found in lists for item in found.configurations}
    return _List(tuple(listed.values()), tuple(dict.fromkeys(digest for it in lists for digest in it.numbered)))


def numbers_of(numbered: Sequence[str], listing: Listing | None, known: Sequence[tuple[str, str]]) -> list[int]:
    by_hash = {digest: number for number, digest in enumerate(numbered, 1)}
    by_name = {item.config_name: by_hash.get(digest) for digest, item in (listing or {}).items()}
    following, found = itertools.count(len(numbered) + 1), list[int]()
    for digest, name in known:
        number = by_hash.get(digest) if digest else by_name.get(name)
        # Each host's part of a configuration that several ran is a configuration.
        found.append(next(following) if number is None or number in found else number)
    return found


def labels_of(identities: Iterable[Identity], listing: Listing | None) -> dict[tuple[str, str], str]:
    """The label of each configuration of a run, by hash and host; no two have the same."""
    # It is the current name, without a list the last one. One that the campaign has no more is named as removed, and
    # one that several hosts ran has a label for each host.
    last: dict[str, Identity] = {}
    hosts: dict[str, set[str]] = {}
    for identity in identities:
        if identity.start_utc >= last.setdefault(identity.config_hash, identity).start_utc:
            last[identity.config_hash] = identity
        hosts.setdefault(identity.config_hash, set()).add(identity.host)
    names = {digest: identity.config_name for digest, identity in last.items()}
    if listing is not None:
        names = {
            digest: listing[digest].config_name if digest in listing else f"{name} (removed)"
            for digest, name in names.items()
        }
    counts = collections.Counter(names.values())
    unique = {digest: name if counts[name] == 1 else f"{name} {digest[:8]}" for digest, name in names.items()}
    return {
        (digest, host): f"{unique[digest]} @ {host}" if len(them) > 1 else unique[digest]
        for digest, them in hosts.items()
        for host in them
    }


def group_of(identity: Identity) -> tuple[str, str]:
    return identity.config_hash, identity.host if identity.config_name.endswith(f" @ {identity.host}") else ""


def with_rates(record: Record, listing: Listing | None, own: Mapping[str, float]) -> Record:
    listed = listing.get(record.identity.config_hash) if listing else None
    given: dict[str, Any] = {**(listed.rates if listed else {}), **own}
    if all(getattr(record.carbon, name) == value for name, value in given.items()):
        return record
    rates = dataclasses.replace(record.carbon, **given)
    return record.with_sections(carbon=carbon_of(record.energy.primary_j, rates))
