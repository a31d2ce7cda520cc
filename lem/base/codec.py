"""One codec between JSON and dataclasses: the declared types are the schema.

A file comes from a disk, another host or another version, and everything behind the codec relies on what it checked.

A section is a dataclass whose `null_reasons` say why fields are None. In JSON, a field that is None has its reason
beside it (`<field>_null_reason`), and reasons have their codes and data (`<name>_coded`) beside their texts.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import string
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from lem.base.dataclass import MISSING, Field, fields, has_field, is_dataclass, types_of
from lem.base.log import shorten
from lem.base.reasons import NULL_TEXTS, V1_TEXTS, Reason, formats_of, parsed

T = TypeVar("T")

# The field of a section that says why others are None, and what it adds to their names in JSON.
_REASONS = "null_reasons"
# No meter and no clock counts so far; beyond it, sums would leave the range of floating point.
MOST = 2.0**64

_REASON = "_null_reason"
CODED = "_coded"

_UNIONS = (types.UnionType, typing.Union)
_DATA = (str, int, float)  # of a reason
_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}

# A kind of rows with types that were found good for it, and the places of numbers: there are few of them, and hundreds
# of thousands of rows in a log.
_GOOD_ROWS: dict[tuple[type, ...], Sequence[int]] = {}


class DecodeError(ValueError):
    """A value that is not what its type says, or that JSON cannot hold; the message starts with its place."""


def encode(value: Any, where: str) -> Any:
    """`value` as JSON values, at the place `where`; DecodeError for what JSON cannot hold, such as NaN and infinity."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return _finite(value, where)
    if is_dataclass(value):
        if _keeps_reasons(type(value)):
            return _encode_section(value, where)
        return {item.name: encode(getattr(value, item.name), _at(where, item.name)) for item in _fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item, _at(where, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{where}[{place}]") for place, item in enumerate(value)]
    raise DecodeError(f"{where}: {type(value).__name__} has no form in JSON")


def decode(kind: type[T], value: Any, where: str) -> T:
    decoded: T = decode_hint(kind, value, where)
    return decoded


def decode_hint(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return (_decode_section if _keeps_reasons(hint) else _decode_object)(hint, value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        (other,) = (item for item in inner if item is not types.NoneType)
        return None if value is None else decode_hint(other, value, where)
    if hint is Any:
        return encode(value, where)
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise DecodeError(f"{where}: expected a list, got {shown(value)}")
        return origin([decode_hint(inner[0], item, f"{where}[{at}]") for at, item in enumerate(value)])
    if origin is not None:
        pairs = _object(value, where).items()
        return {key: decode_hint(inner[1], item, _at(where, key)) for key, item in pairs}
    return _scalar(hint, value, where)


def decode_fields(kind: Any, document: Any, where: str) -> dict[str, Any]:
    """The values of a dataclass that keeps no reasons, checked as by `decode`, but not by the class itself."""
    hints = hints_of(kind)
    if _object(document, where).keys() != hints.keys():
        _check_names(where or kind.__name__.lower(), document, hints)
    return _decode_values(kind, document, where)


def _decode_values(kind: Any, document: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints, values = hints_of(kind), dict(document)
    for name, is_number in _not_plain(kind, tuple(map(type, map(document.__getitem__, hints)))):
        if not is_number or not math.isfinite(values[name]):
            values[name] = decode_hint(hints[name], values[name], _at(where, name))
    return values


@functools.lru_cache(4096)  # thousands of objects of a kind have values of the same types
def _not_plain(kind: Any, found: Sequence[type]) -> Sequence[tuple[str, bool]]:
    """The fields whose values are not simply taken: True for numbers that must be finite, False for all to decode."""
    pairs = zip(_plain_types(kind).items(), found, strict=True)
    return [(name, item in kinds) for (name, kinds), item in pairs if item not in kinds or item is float]


def complete(kind: Any, document: Any, why: Reason) -> Any:
    """A document of an older version with the fields it does not have: null for that reason, or their defaults."""
    if not isinstance(document, dict):
        return document
    out, hints = dict(document), hints_of(kind)
    for item in _fields(kind):
        name, hint = item.name, hints[item.name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) in (tuple, *_UNIONS) else hint
        is_new = name not in out and not (item.default is item.default_factory is MISSING)
        if is_dataclass(inner) and inner is not Reason:
            if inner is not hint and isinstance(out.get(name), list):
                out[name] = [complete(inner, entry, why) for entry in out[name]]
            elif inner is not hint and isinstance(out.get(name), dict):
                out[name] = complete(inner, out[name], why)
            elif inner is hint and (is_new or name in out):
                out[name] = complete(inner, out.get(name, {}), why)
        if is_new and name not in out:
            is_absent = _keeps_reasons(kind) and item.default is None
            default = item.default if item.default_factory is MISSING else item.default_factory()
            out[name] = encode(default, name)
            out |= {name + _REASON: why.text, name + _REASON + CODED: _codes(why, name)} if is_absent else {}
    return out


def _is_good(value: Any, kinds: Collection[type]) -> bool:
    return type(value) in kinds and (type(value) is not float or math.isfinite(value))


def decode_row(kind: type[T], values: Sequence[Any]) -> T:
    found = (kind, *map(type, values))
    numbers = _GOOD_ROWS.get(found)
    if numbers is None:
        declared: Any = kind
        hints, plain, name = hints_of(declared), _plain_types(declared), kind.__name__
        if len(values) != len(hints):
            raise DecodeError(f"{name}: expected {len(hints)} values, got {len(values)}")
        allowed = (kinds | {int} if float in kinds else kinds for kinds in plain.values())
        is_good = all(type(item) in kinds for item, kinds in zip(values, allowed, strict=True))
        if not is_good:
            pairs = zip(hints, values, strict=True)
            values = [decode_hint(hints[field], item, f"{name}.{field}") for field, item in pairs]
        numbers = [at for at, value in enumerate(values) if type(value) is int or type(value) is float]
        if is_good:
            _GOOD_ROWS[found] = numbers
    for at in numbers:
        if not -MOST < values[at] < MOST:
            raise DecodeError(f"{kind.__name__}: {shown(values[at])} is out of range")
    return kind(*values)


def pack(value: Any) -> Any:
    if isinstance(value, Reason):
        return _codes(value, "")
    if is_dataclass(value):
        packed = [pack(getattr(value, item.name)) for item in _fields(value)]
        return [*packed, pack(getattr(value, _REASONS))] if has_field(value, _REASONS) else packed
    if isinstance(value, Mapping):
        return {name: pack(item) for name, item in value.items()}
    return [pack(item) for item in value] if isinstance(value, (list, tuple)) else value


def unpack(hint: Any, value: Any) -> Any:
    if hint is Reason:
        code, data = (value.get("code"), value.get("data")) if isinstance(value, dict) else (None, None)
        if isinstance(code, str) and isinstance(data, dict) and all(type(item) in _DATA for item in data.values()):
            with contextlib.suppress(ValueError):
                return _unpack_reason(code, tuple(data), *data.values())
        raise DecodeError(f"expected a reason, got {shown(value)}")
    if is_dataclass(hint):
        return _unpack_object(hint, value)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        (other,) = (item for item in inner if item is not types.NoneType)
        return None if value is None else unpack(other, value)
    if origin is tuple and isinstance(value, list):
        return tuple(unpack(inner[0], item) for item in value)
    return decode_hint(hint, value, "packed")


def _unpack_object(kind: Any, value: Any) -> Any:
    hints, plain, has_reasons = hints_of(kind), _plain_types(kind), has_field(kind, _REASONS)
    if not isinstance(value, list) or len(value) != len(hints) + has_reasons:
        raise DecodeError(f"{kind.__name__}: expected {len(hints)} values, got {shown(value)}")
    pairs = zip(hints, value, strict=False)
    values = [item if _is_good(item, plain[name]) else unpack(hints[name], item) for name, item in pairs]
    if not has_reasons:
        return kind(*values)
    return kind(*values, null_reasons={name: unpack(Reason, item) for name, item in _object(value[-1], "").items()})


@functools.lru_cache(4096, typed=True)  # 1 and 1.0 read differently
def _unpack_reason(code: str, names: tuple[str, ...], *values: Any) -> Reason:
    return Reason.of(code, **dict(zip(names, values, strict=True)))


def _encode_section(section: Any, where: str) -> dict[str, Any]:
    kind: Any = type(section)
    reasons, out = dict(section.null_reasons), {}
    for name in hints_of(kind):
        value, path = getattr(section, name), _at(where, name)
        if value is not None and name in _reason_fields(kind):
            texts = value.text if isinstance(value, Reason) else [item.text for item in value]
            out[name], out[name + CODED] = texts, _codes(value, path)
        else:
            out[name] = encode(value, path)
        reason = reasons.pop(name, None)
        if value is not None and reason is not None:
            raise DecodeError(f"{path} has a value and a reason for having none: {shown(reason.text)}")
        if value is None and reason is None:
            raise DecodeError(f"{path} is null without a reason")
        if reason is not None:
            out[name + _REASON], out[name + _REASON + CODED] = reason.text, _codes(reason, path)
    if reasons:
        raise DecodeError(f"{where}: reasons for unknown fields {', '.join(sorted(reasons))}")
    return out


def _decode_section(kind: Any, value: Any, where: str) -> Any:
    value = _object(value, where)
    texts = {key.removesuffix(_REASON): text for key, text in value.items() if key.endswith(_REASON)}
    coded = {key.removesuffix(CODED): item for key, item in value.items() if key.endswith(CODED)}
    plain = {key: item for key, item in value.items() if not key.endswith((_REASON, CODED))}
    _check_names(where, plain, hints_of(kind))
    for name, item in plain.items():
        if item is None and not (isinstance(texts.get(name), str) and texts[name]):
            raise DecodeError(f"{where}.{name} is null without a reason")
    reasons = {}
    for name, text in texts.items():
        if plain.get(name, name) is not None:
            raise DecodeError(f"{where}: {shown(name + _REASON)} has no null beside it")
        reasons[name] = _decode_reason(text, coded.pop(name + _REASON, None), where, is_null=True)
    for name, hint in _reason_fields(kind).items():
        if plain[name] is not None:
            sentences = decode_hint(hint, plain[name], _at(where, name))
            plain[name] = _decode_reasons(sentences, coded.pop(name, None), _at(where, name))
    if coded:
        raise DecodeError(f"{where}: unexpected {shown(next(iter(coded)) + CODED)}: the field holds no reasons")
    fields = _decode_values(kind, plain, where)
    return kind(**fields, null_reasons=reasons) if has_field(kind, _REASONS) else kind(**fields)


@functools.cache
def _reason_fields(kind: Any) -> Mapping[str, Any]:
    texts = {Reason | None: str, tuple[Reason, ...]: tuple[str, ...]}
    return {name: texts[hint] for name, hint in hints_of(kind).items() if hint in texts}


def _codes(value: Any, where: str) -> Any:
    if not isinstance(value, Reason):
        return [_codes(item, where) for item in value]
    data = {name: item.text if isinstance(item, Reason) else item for name, item in value.data.items()}
    return {"code": value.code, "data": encode(data, f"{where}.data")}


def _decode_reasons(sentences: str | tuple[str, ...], coded: Any, where: str) -> Reason | list[Reason]:
    if isinstance(sentences, str):
        return _decode_reason(sentences, coded, where)
    codes = [None] * len(sentences) if coded is None else coded
    if not isinstance(codes, list) or len(codes) != len(sentences):
        raise DecodeError(f"{where}: expected codes of {len(sentences)} sentences, got {shown(coded)}")
    return [_decode_reason(sentence, code, where) for sentence, code in zip(sentences, codes, strict=True)]


def _decode_reason(sentence: str, coded: Any, where: str, *, is_null: bool = False) -> Reason:
    """The reason; without a code (in older records), or with one of a newer lem, its sentence is all there is."""
    if coded is None:
        return recognise(sentence, is_null=is_null)
    if not isinstance(coded, dict) or coded.keys() != {"code", "data"} or not isinstance(coded["data"], dict):
        raise DecodeError(f"{where}: expected code and data, got {shown(coded)}")
    code, data = decode(str, coded["code"], where), encode(coded["data"], f"{where}.data")
    try:
        return Reason.of(code, **data)
    except ValueError:
        return Reason.of("verbatim", text=sentence)


# A value is null for reasons of its own, or for one that is also a warning.
_RECORDED = {**V1_TEXTS, **NULL_TEXTS}
# Sentences of nothing but other words, which would match any.
_OF_OTHERS = {"verbatim", "sampler_reports", "external_unreadable"}
# How data look in a sentence, by format; other formats are of floats.
_SHAPES = {"": ".*?", "d": "-?[0-9]+", "#x": "0x[0-9a-f]+"}
_FLOAT = "-?[0-9]+(?:[.][0-9]+)?(?:e[-+]?[0-9]+)?%?"


@functools.lru_cache(4096)
def recognise(text: str, *, is_null: bool = False) -> Reason:
    """The reason for a sentence that was recorded without a code, why a value is null or any other; else `verbatim`."""
    for code, template, formats in _patterns(is_null):
        match = template.fullmatch(text)
        if match is None:
            continue
        try:
            reason = Reason.of(code, **{name: parsed(match[name], formats[name]) for name in formats})
        except ValueError:  # a number with too many digits for Python
            continue
        if reason.worded(_RECORDED) == text:
            return reason
    return Reason.of("verbatim", text=text)


@functools.cache
def _patterns(is_null: bool) -> Sequence[tuple[str, re.Pattern[str], Mapping[str, str]]]:
    patterns = []
    for code, template in (_RECORDED if is_null else V1_TEXTS).items():
        if code in _OF_OTHERS:
            continue
        parts = [
            re.escape(literal) + (f"(?P<{name}>{_SHAPES.get(spec or '', _FLOAT)})" if name else "")
            for literal, name, spec, _ in string.Formatter().parse(template)
        ]
        patterns.append((code, re.compile("".join(parts), re.DOTALL), formats_of(template)))
    return patterns


def _check_names(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if found.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        parts = [f"missing {', '.join(missing)}"] * bool(missing)
        parts += [f"unknown {', '.join(map(shown, unknown[:5]))}"] * bool(unknown)
        raise DecodeError(f"{where}: {'; '.join(parts)}")


@functools.cache
def hints_of(kind: Any) -> Mapping[str, Any]:
    return {name: hint for name, hint in types_of(kind).items() if name != _REASONS}


def shown(value: Any) -> str:
    """`value` in a message: a damaged file can hold anything, of any length, that does anything to a terminal."""
    return shorten(repr(value), 80)


def _at(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


def _keeps_reasons(kind: Any) -> bool:
    return has_field(kind, _REASONS) or hasattr(kind, _REASONS)


def _decode_object(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, kind):  # a reason, decoded before the rest of its section
        return value
    fields = decode_fields(kind, value, where)
    try:
        return kind(**fields)
    except ValueError as error:  # a rule of the dataclass itself
        raise DecodeError(f"{where}: {error}") from error


def _fields(kind: Any) -> list[Field[Any]]:
    return [item for item in fields(kind) if item.name != _REASONS]


@functools.cache
def _plain_types(kind: Any) -> Mapping[str, frozenset[type]]:
    scalars = {*_NAMES, types.NoneType}
    return {
        name: frozenset(scalars.intersection(typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)))
        for name, hint in hints_of(kind).items()
    }


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DecodeError(f"{where}: expected an object, got {shown(value)}")
    return value


def _scalar(kind: type[Any], value: Any, where: str) -> Any:
    if kind is float and type(value) is int:  # JSON from elsewhere writes 3.0 as 3
        with contextlib.suppress(OverflowError):
            return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DecodeError(f"{where}: expected {_NAMES[kind]}, got {shown(value)}")
    return _finite(value, where) if kind is float else value


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise DecodeError(f"{where}: expected a finite number, got {value}")
    return value
