"""What two configurations should have in common besides what is compared, and what an environment consists of."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.reasons import Reason
from lem.base.units import fmean, plain
from lem.record import Record
from lem.results.metrics import by_cycle

# Lengths are whole tokens; what differs by less comes from a rare early end.
LENGTH_TOLERANCE = 0.01
_ID_SHOWN, _IMAGE_SHOWN = 12, len("sha256:") + 12
_ALL_GROUPS = ("energy", "throughput", "tokens", "latency")


@dataclass(frozen=True)
class Obstacle:
    reason: Reason
    is_blocking: bool = True  # it allows no verdict
    is_shared: bool = False  # each side is compared with an anchor that has it too
    groups: tuple[str, ...] = _ALL_GROUPS  # the groups of metrics it concerns

    @property
    def is_confounder(self) -> bool:
        """Whether there is a verdict, which may be due to this instead of the configurations."""
        return not self.is_blocking and not self.is_shared

    @property
    def document(self) -> dict[str, Any]:
        reason = {"code": self.reason.code, "text": self.reason.text}
        return {**reason, "is_blocking": self.is_blocking, "is_confounder": self.is_confounder}


Sides = tuple[Sequence[Record], Sequence[Record]]
Conditions = frozenset[tuple[Any, ...]]


Side = Sequence[Record]
_Differing = tuple[Any, Any] | None  # the two values where they differ


@dataclass(frozen=True)
class Circumstance:
    code: str  # of the reason where it differs
    against: Callable[[Side], Callable[[Side], _Differing]]  # what compares other records with these, which it reads
    label: str = ""  # of a part of the environment
    read: Callable[[Record], str | None] | None = None  # its value in a record
    is_blocking: bool = True  # a difference allows no verdict
    is_of_host: bool = False  # it acts on all that a host measures, so that it divides out if an anchor has it too
    is_of_work: bool = False  # it is not among the conditions of a record
    axes: tuple[str, ...] = ()  # the options that set it: where they differ, it is what is compared
    groups: tuple[str, ...] = _ALL_GROUPS


def find_obstacles(
    before: Sequence[Record], after: Sequence[Record], anchors: Sides | None = None
) -> tuple[Obstacle, ...]:
    """What differs between the used records of two configurations besides what is compared."""
    return obstacles_to(before, anchors)(after, conditions_of(after))


def obstacles_to(
    before: Sequence[Record], anchors: Sides | None = None
) -> Callable[[Sequence[Record], Conditions], tuple[Obstacle, ...]]:
    """`find_obstacles` for many, each with its conditions, that are compared with the same records."""
    # Work, meters, cards and machines that differ allow no verdict. A setting of the machine or the version of a
    # program is named beside the verdict. Where each side is compared with an anchor of its own run in which the same
    # differs (the sensor of a card, a driver, a power limit), that divides out: it is reported and blocks nothing.
    finds = [(item, item.against(before)) for item in CIRCUMSTANCES]
    known: dict[Conditions, dict[str, _Differing]] = {}

    def find(after: Sequence[Record], conditions: Conditions) -> tuple[Obstacle, ...]:
        if not before or not after:
            return ()
        found = []
        if conditions not in known:
            known[conditions] = {item.code: find(after) for item, find in finds if not item.is_of_work}
        for item, find in finds:
            values = find(after) if item.is_of_work else known[conditions][item.code]
            if values is not None and not any(_is_axis(option, before, after) for option in item.axes):
                reason = Reason.of(item.code, before=values[0], after=values[1])
                is_shared = anchors is not None and item.is_of_host and item.against(anchors[0])(anchors[1]) == values
                found.append(Obstacle(reason, item.is_blocking and not is_shared, is_shared, item.groups))
        return tuple(found)

    return find


_GPU_CONDITIONS = operator.attrgetter("name", "power_limit_w", "clocks_set", "sm_clock_app_hz")


def conditions_of(records: Iterable[Record]) -> Conditions:
    """All that `CIRCUMSTANCES` read of these records but for the work."""
    return frozenset(
        (
            *(id(record.environment), id(record.machine), record.window.traffic_mode, record.energy.energy_source),
            *map(_GPU_CONDITIONS, record.gpus),
        )
        for record in records
    )


def blocking_reason(obstacles: Iterable[Obstacle], group: str) -> Reason | None:
    return next((item.reason for item in obstacles if item.is_blocking and group in item.groups), None)


def environment_changes(records: Sequence[Record]) -> list[str]:
    """What of the environment differs between records of one configuration: `power limit (350 W, 700 W)`."""
    found = []
    for item in CIRCUMSTANCES:
        values = sorted({text for record in records if item.read and (text := item.read(record))})
        if item.label and len(values) > 1:
            found.append(f"{item.label} ({', '.join(values)})")
    return found


def facts_of(records: Sequence[Record]) -> dict[str, str]:
    """What records of one configuration ran on, by name: versions, model, image, meter, machine and its settings."""
    found: dict[str, set[str]] = {}
    for record in records:
        environment, identity = record.environment, record.identity
        named = [(item.label, item.read(record)) for item in CIRCUMSTANCES if item.read and item.label]
        if environment.engine_name in environment.versions:
            named = [(label, text) for label, text in named if label != "engine"]
        named += [*environment.versions.items(), ("lem", identity.lem_version), ("host", identity.machine)]
        named += [("image", environment.image and environment.image[:_IMAGE_SHOWN])]
        named += [("model revision", environment.model_revision and environment.model_revision[:_ID_SHOWN])]
        named += [("weights", environment.weights_sha256 and environment.weights_sha256[:_ID_SHOWN])]
        named += [("meter", record.energy.energy_source), ("clocks", _clocks(record)), ("cards", _card_ids([record]))]
        for name, text in named:
            if text:
                found.setdefault(name, set()).add(text)
    return {name: ", ".join(sorted(texts)) for name, texts in found.items()}


def _is_axis(option: str, *sides: Sequence[Record]) -> bool:
    left, right = ({repr(_requested(record, option)) for record in side} for side in sides)
    return left != right


def _requested(record: Record, option: str) -> Any:
    if option == "backend":
        return record.identity.backend  # also where it was not written
    value: Any = record.requested
    for name in option.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _one(code: str, label: str, read: Callable[[Record], str | None], **rest: Any) -> Circumstance:
    def against(before: Side) -> Callable[[Side], _Differing]:
        left = _texts(before, read)
        return lambda after: _differing(left, _texts(after, read))

    return Circumstance(code, against, label, read, **rest)


def _both(code: str, find: Callable[[Side, Side], _Differing], **rest: Any) -> Circumstance:
    return Circumstance(code, lambda before: functools.partial(find, before), **rest)


def _texts(side: Iterable[Record], read: Callable[[Record], str | None]) -> set[str]:
    return {text for item in side if (text := read(item))}


def _differing(left: set[str], right: set[str]) -> tuple[str, str] | None:
    if not left or not right or left == right:
        return None
    return ", ".join(sorted(left)), ", ".join(sorted(right))


def _cards(*sides: Side) -> _Differing:
    """Different cards. If one side has all cards of the other and more, that is a setting, not an obstacle."""
    left, right = ({uuid for item in side for uuid in item.environment.gpu_uuids} for side in sides)
    if not left or not right or left <= right or right <= left:
        return None
    return _card_ids(sides[0]), _card_ids(sides[1])


def _card_ids(records: Iterable[Record]) -> str:
    return ", ".join(sorted({uuid[:_ID_SHOWN] for item in records for uuid in item.environment.gpu_uuids}))


def _lengths_against(before: Side) -> Callable[[Side], _Differing]:
    left = _mean_answer_tok(before)

    def find(after: Side) -> _Differing:
        right = _mean_answer_tok(after)
        is_close = left is None or right is None or abs(left - right) <= LENGTH_TOLERANCE * max(left, right)
        return None if is_close else (left, right)

    return find


def _mean_answer_tok(records: Side) -> float | None:
    lengths = [length for record in records if (length := _answer_tok(record)) is not None]
    return fmean(lengths) if lengths else None


def _answer_tok(record: Record) -> float | None:
    work = record.work
    return work.output_tok / work.requests_ok if work.requests_ok and work.output_tok is not None else None


def _libraries(*sides: Side) -> _Differing:
    """The programs beside the engine that both sides have, in other versions."""
    found: list[dict[str, set[str]]] = [{}, {}]
    for versions, side in zip(found, sides, strict=True):
        for environment in {id(record.environment): record.environment for record in side}.values():
            for name, version in environment.versions.items():
                if name not in ("driver", environment.engine_name):
                    versions.setdefault(name, set()).add(version)
    names = [name for name, versions in found[0].items() if found[1].get(name, versions) != versions]
    before, after = (", ".join(f"{name} {'/'.join(sorted(item[name]))}" for name in names) for item in found)
    return (before, after) if names else None


def _clock_limits(*sides: Side) -> _Differing:
    """Clocks that a setting limited on one side alone, or application clocks that differ."""
    gpus = [[gpu for record in side for gpu in record.gpus] for side in sides]
    limited = [{gpu.clocks_set for gpu in side} - {None} for side in gpus]
    clocks = [sorted({gpu.sm_clock_app_hz for gpu in side if gpu.sm_clock_app_hz}) for side in gpus]
    if all(limited) and (True in limited[0]) != (True in limited[1]):
        texts = ["limited by a setting" if True in side else "not limited" for side in limited]
    elif all(clocks) and clocks[0] != clocks[1]:
        texts = [", ".join(f"{clock_hz / 1e6:.0f} MHz" for clock_hz in side) for side in clocks]
    else:
        return None
    return texts[0], texts[1]


def _clocks(record: Record) -> str:
    texts = {f"{gpu.sm_clock_app_hz / 1e6:.0f} MHz" for gpu in record.gpus if gpu.sm_clock_app_hz}
    is_limited = any(gpu.clocks_set for gpu in record.gpus)
    return ", ".join([*sorted(texts), *(["limited by a setting"] if is_limited else [])])


def _power_limit(record: Record) -> str:
    return ", ".join(sorted({f"{gpu.power_limit_w:.0f} W" for gpu in record.gpus if gpu.power_limit_w}))


def _cpu(record: Record) -> str:
    found = record.environment
    return f"{found.cpu} × {found.cpu_count}"


def _engine(record: Record) -> str:
    return f"{record.environment.engine_name} {record.environment.engine_version}"


def _cpu_settings(record: Record) -> str:
    governor, machine = record.environment.governor or record.machine.governor, record.machine
    switches = (("turbo", machine.turbo), ("SMT", machine.smt))
    parts = [f"governor {governor}"] if governor else []
    return ", ".join([*parts, *(f"{name} {'on' if is_on else 'off'}" for name, is_on in switches if is_on is not None)])


def _prompts_against(before: Side) -> Callable[[Side], _Differing]:
    """The prompts of a cycle that both sides have, if they differ: every cycle draws its own."""
    known = set(map(_prompts, before))

    def find(after: Side) -> _Differing:
        texts = known.union(map(_prompts, after))
        if len(texts) == 1 and "" not in texts:
            return None
        left, right = ({index: members for (_, _, index), members in by_cycle(it).items()} for it in (before, after))
        both = ([_texts(side[index], _prompts) for side in (left, right)] for index in left if index in right)
        return next(filter(None, itertools.starmap(_differing, both)), None)

    return find


def _prompts(record: Record) -> str:
    source = record.work.prompt_source
    digest = source.get("sha256")
    if isinstance(digest, str):
        return f"{source.get('name') or source.get('kind') or 'prompts'} {digest[:8]}"
    return str(source.get("name") or "")


_WORKLOAD = frozenset({"other_prompts", "other_output_lengths", "other_traffic"})


def share_workload(*sides: Sequence[Record]) -> bool:
    """Whether two configurations had the same prompts, output lengths and traffic, so that one can be the better."""
    # Prompts may be drawn for each cycle: of two configurations only common cycles have the same.
    common = set.intersection(*({record.identity.cycle_index for record in side} for side in sides))
    one, other = ([it for it in side if it.identity.cycle_index in common] or side for side in sides)
    finds = (item.against(one) for item in CIRCUMSTANCES if item.code in _WORKLOAD)
    return _load(one[0]) == _load(other[0]) and all(find(other) is None for find in finds)


def _load(record: Record) -> dict[str, Any]:
    options = record.requested.get("traffic_simulation")
    found = options if isinstance(options, Mapping) else {}
    return {name: found[name] for name in ("target_qps", "concurrency") if name in found}


def workload_of(record: Record) -> str:
    """The workload for a person: `poisson, target_qps 2, synthetic 1f3a09bc, 128 tokens per answer`."""
    load = [f"{name} {value}" for name, value in _load(record).items()]
    length_tok = _answer_tok(record)
    length = "" if length_tok is None else f"{plain(length_tok, '.3g')} tokens per answer"
    return ", ".join(filter(None, [record.window.traffic_mode.replace("_", " "), *load, _prompts(record), length]))


_OF_MACHINE: Mapping[str, Any] = {"is_blocking": False, "is_of_host": True}
_OF_SOFTWARE: Mapping[str, Any] = {"is_blocking": False, "axes": ("backend", "image")}

# In the order in which they are shown.
CIRCUMSTANCES: tuple[Circumstance, ...] = (
    _one("other_gpus", "GPU", lambda item: ", ".join(sorted({gpu.name for gpu in item.gpus}))),
    _both("other_cards", _cards, is_of_host=True),
    _one("other_driver", "driver", lambda item: item.environment.versions.get("driver"), is_of_host=True),
    _one("other_power_limit", "power limit", _power_limit, **_OF_MACHINE, axes=("gpu.power_limit_w",)),
    _both("other_clocks", _clock_limits, **_OF_MACHINE, axes=("gpu.lock_clock_mhz",)),
    _one("other_cpu", "CPU", lambda item: "" if item.environment.gpu_uuids else _cpu(item), is_of_host=True),
    _one("other_host_cpu", "CPU", lambda item: _cpu(item) if item.environment.gpu_uuids else "", **_OF_MACHINE),
    _one("other_cpu_settings", "CPU settings", _cpu_settings, **_OF_MACHINE),
    _one("other_kernel", "kernel", lambda item: item.environment.kernel, **_OF_MACHINE),
    _one("other_engine", "engine", _engine, **_OF_SOFTWARE),
    _both("other_libraries", _libraries, **_OF_SOFTWARE),
    Circumstance("other_prompts", _prompts_against, is_of_work=True),
    Circumstance("other_output_lengths", _lengths_against, is_of_work=True),
    _one("other_traffic", "", lambda item: item.window.traffic_mode.replace("_", " ")),
    _one("other_meter", "", lambda item: item.energy.energy_source, groups=("energy",)),
)
