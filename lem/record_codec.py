"""`result.json` from a record, and back.

A section is an object with its fields, and `<field>_null_reason` beside each null. A field of reasons holds their
sentences, for people; `<field>_coded` beside it holds what they are read from. What is written can be read back, and
what is read is whole: both directions check every name, type and reason, and refuse NaN and infinity.

Schema history:
    1: first version; warnings, reasons of invalid results and why a gap ended were sentences alone.
    2: `<field>_coded`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lem import durable
from lem.jsontypes import shown
from lem.reasons import Reason, recognise
from lem.record import Distribution, Gpu, Record

__all__ = ["SCHEMA_VERSION", "RecordError", "decode_record", "encode_record", "read_record", "write_record"]

SCHEMA_VERSION = 2

_REASON = "_null_reason"
_CODED = "_coded"


class RecordError(ValueError):
    """A document that is not a whole record of this schema."""


def encode_record(record: Record) -> dict[str, Any]:
    """The record as JSON values, `schema_version` first.

    Raises:
        RecordError: a value is None and its section gives no reason, a reason stands beside a value, or a value has
            another type than declared (NaN and infinity are no numbers here).
    """
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if item.name == "gpus":
            document["gpus"] = [_encode_section(gpu, f"gpus[{index}]") for index, gpu in enumerate(value)]
        elif dataclasses.is_dataclass(value):
            document[item.name] = _encode_section(value, item.name)
        else:
            document[item.name] = _plain(value, item.name)
    decode_record(document)  # The writer knows best what to do about a wrong type, so it meets it, not the reader.
    return document


def decode_record(document: Any) -> Record:
    """The record in a JSON document.

    Raises:
        RecordError: another schema version, a missing or unknown field, a null without a reason, or a value of the
            wrong type.
    """
    if not isinstance(document, dict):
        raise RecordError("a record is a JSON object")
    if document.get("schema_version") == 1:
        document = _from_version_1(document)
    if document.get("schema_version") != SCHEMA_VERSION:
        said = shown(document.get("schema_version"))
        raise RecordError(f"schema_version is {said}, this lem reads 1 to {SCHEMA_VERSION}")
    hints = _hints(Record)
    _check_names("record", set(document) - {"schema_version"}, set(hints))
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        value = document[name]
        if name == "gpus":
            if not isinstance(value, list):
                raise RecordError(f"gpus: a list is due, got {shown(value)}")
            values[name] = tuple(_decode_section(Gpu, gpu, f"gpus[{index}]") for index, gpu in enumerate(value))
        else:
            values[name] = _convert(hint, value, name)
    return Record(**values)


def write_record(path: Path, record: Record) -> None:
    """Write `result.json`, whole or not at all.

    Raises:
        RecordError: as `encode_record`.
        OSError: as `durable.write_bytes`.
    """
    durable.write_json(path, encode_record(record))


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        RecordError: the file is not a whole record.
        OSError: the file cannot be read.
    """
    try:
        document = durable.read_json(path)
    except ValueError as error:
        raise RecordError(f"not JSON: {error}") from error
    try:
        return decode_record(document)
    except RecursionError as error:
        raise RecordError("not a record: nested too deeply") from error


def _encode_section(section: Any, where: str) -> dict[str, Any]:
    reasons = dict(section.null_reasons)
    out: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        if item.name == "null_reasons":
            continue
        value = getattr(section, item.name)
        path = f"{where}.{item.name}"
        out[item.name] = _encode_section(value, path) if isinstance(value, Distribution) else _plain(value, path)
        if value is not None and item.name in _reason_fields(section.__class__):
            out[item.name + _CODED] = _codes(value, path)
        reason = reasons.pop(item.name, None)
        if value is None:
            out[item.name + _REASON] = reason
        elif reason is not None:
            raise RecordError(f"{path} has a value and a reason for having none: {shown(reason)}")
    if reasons:
        raise RecordError(f"{where}: reasons for unknown fields {', '.join(sorted(reasons))}")
    return out


def _decode_section(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecordError(f"{where}: an object is due, got {shown(value)}")
    hints = dict(_hints(kind))
    keeps_reasons = hints.pop("null_reasons", None) is not None
    reasons = {key[: -len(_REASON)]: text for key, text in value.items() if key.endswith(_REASON)}
    coded = {key[: -len(_CODED)]: item for key, item in value.items() if key.endswith(_CODED)}
    plain = {key: item for key, item in value.items() if not key.endswith((_REASON, _CODED))}
    _check_names(where, set(plain), set(hints))
    for name, item in plain.items():
        if item is None and not (isinstance(reasons.get(name), str) and reasons[name]):
            raise RecordError(f"{where}.{name} is null without a reason")
    for name in reasons:
        if plain.get(name, name) is not None:
            raise RecordError(f"{where}: {shown(name + _REASON)} stands beside a value, or beside nothing")
    for name in _reason_fields(kind):
        plain[name] = _decode_reasons(hints[name], plain[name], coded.pop(name, None), f"{where}.{name}")
    if coded:
        raise RecordError(f"{where}: unexpected {shown(next(iter(coded)) + _CODED)}: the field holds no reasons")
    scalars = _scalars(kind)
    out = {
        name: plain[name]
        if name in _reason_fields(kind) or (type(plain[name]) in scalars[name] and _is_finite(plain[name]))
        else _convert(hint, plain[name], f"{where}.{name}")
        for name, hint in hints.items()
    }
    return kind(**out, null_reasons=reasons) if keeps_reasons else kind(**out)


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    """Names and types of the fields; resolving annotations costs more than all the rest of decoding."""
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


@functools.cache
def _reason_fields(kind: Any) -> tuple[str, ...]:
    reasons = (Reason | None, tuple[Reason, ...])
    return tuple(name for name, hint in _hints(kind).items() if hint in reasons)


def _codes(value: Any, where: str) -> Any:
    if isinstance(value, Reason):
        return {"code": value.code, "data": _plain(value.data, f"{where}.data")}
    return [_codes(item, where) for item in value]


def _decode_reasons(hint: Any, sentences: Any, coded: Any, where: str) -> Any:
    """The reasons of a field, from its sentences and their codes."""
    if typing.get_origin(hint) is not tuple:
        said = _convert(str | None, sentences, where)
        return None if said is None and coded is None else _decode_reason(said, coded, where)
    sentences = _convert(tuple[str, ...], sentences, where)
    if not isinstance(coded, list) or len(coded) != len(sentences):
        raise RecordError(f"{where}: expected codes of {len(sentences)} sentences, got {shown(coded)}")
    return tuple(_decode_reason(said, code, where) for said, code in zip(sentences, coded, strict=True))


def _decode_reason(sentence: str, coded: Any, where: str) -> Reason:
    """The reason; that of a newer lem with the same schema is known by its sentence alone."""
    if isinstance(coded, Reason):  # of a record of version 1
        return coded
    if not isinstance(coded, dict) or coded.keys() != {"code", "data"} or not isinstance(coded["data"], dict):
        raise RecordError(f"{where}: expected code and data, got {shown(coded)}")
    code, data = _scalar(str, coded["code"], where), _plain(coded["data"], f"{where}.data")
    try:
        return Reason.of(code, **data)
    except (KeyError, TypeError, ValueError, OverflowError):
        return Reason.of("said", text=sentence)


def _from_version_1(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as version 2 has it; what is wrong with it stays for the reader to find."""
    document = {**document, "schema_version": 2}
    for section, name in (("validity", "invalid_reasons"), ("validity", "warnings"), ("window", "gap_end_reason")):
        values = document.get(section)
        if isinstance(values, dict) and values.get(name) is not None:
            document[section] = {**values, name + _CODED: _recognised(values[name])}
    return document


def _recognised(sentences: Any) -> Any:
    if isinstance(sentences, list):
        return [_recognised(item) for item in sentences]
    return recognise(sentences if isinstance(sentences, str) else "")


@functools.cache
def _scalars(kind: Any) -> Mapping[str, tuple[type[Any], ...]]:
    """Per field the types of values that are as they should be; the rest is looked at closely."""
    return {name: _scalars_of(hint) for name, hint in _hints(kind).items()}


def _scalars_of(hint: Any) -> tuple[type[Any], ...]:
    is_optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if is_optional else (hint,)
    return tuple(kind for kind in kinds if kind in (str, bool, int, float, types.NoneType))


def _is_finite(value: Any) -> bool:
    return type(value) is not float or math.isfinite(value)


def _check_names(where: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        parts = [f"missing {', '.join(sorted(expected - found))}"] * bool(expected - found)
        parts += [f"unknown {', '.join(map(shown, sorted(found - expected)[:5]))}"] * bool(found - expected)
        raise RecordError(f"{where}: {'; '.join(parts)}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the declared type `hint` wants it."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:
        if value is None:
            return None
        (inner,) = (item for item in typing.get_args(hint) if item is not type(None))
        return _convert(inner, value, where)
    if dataclasses.is_dataclass(hint):
        return _decode_section(hint, value, where)
    if hint is Any:
        return _plain(value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise RecordError(f"{where}: a list is due, got {shown(value)}")
        return tuple(_convert(typing.get_args(hint)[0], item, where) for item in value)
    if origin is not None:  # Mapping[…]
        if not isinstance(value, dict):
            raise RecordError(f"{where}: an object is due, got {shown(value)}")
        inner = typing.get_args(hint)[1]
        return {key: _convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    return _scalar(hint, value, where)


def _scalar(kind: type[Any], value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise RecordError(f"{where}: a finite number is due, got {shown(value)}") from error
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecordError(f"{where}: {kind.__name__} is due, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{where}: a finite number is due, got {value}")
    return value


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON values."""
    if isinstance(value, Reason):
        return value.text
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"{where}: a finite number is due, got {value}")
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RecordError(f"{where}: {type(value).__name__} has no form in JSON")
