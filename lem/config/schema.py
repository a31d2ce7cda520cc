"""The options as JSON Schema (draft 7, which editors support best), for editors and other programs.

Rules between values are left to lem, except the few in `_RULES`. Every file that lem accepts satisfies the schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lem.config import kinds
from lem.config.backends import BACKENDS, SECTIONS
from lem.config.campaign_config import CampaignExplicitExperiment, CampaignGridConfig
from lem.config.experiment import ExperimentConfig
from lem.config.option import Section, SectionKind, VariantKind, declared, plain

Schema = Mapping[str, Any]

# lem expands a reference before it reads the value; it refuses one in quotes where text is not expected.
_REFERENCE = r"(^|[^$])\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}"
_FORMS = {"a duration": r"\s*([0-9]+(\.[0-9]+)?[smhdSMHD])+\s*", "a URL": r"[hH][tT][tT][pP][sS]?://\S+"}
_MAPPING: Schema = {"type": "object", "propertyNames": {"not": {"const": "<<"}}}
_NO_AXES = ("backend", "model", "model.name", "model_name", "model_name.name")


def document_schema(section: type[Section], kind: str) -> dict[str, Any]:
    builder = _Builder()
    top = builder.define(section)
    del builder.definitions[section.__name__]
    extends = {**_text_schema(), "description": "A file whose values this one inherits."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": f"urn:lem-energy:schema:{kind}",
        "title": f"lem {kind}",
        **top,
        "properties": {"_extends": extends, **top["properties"]},
        "if": {"required": ["_extends"]},
        "else": _requirements(section),
        "definitions": builder.definitions,
    }


class _Builder:
    def __init__(self) -> None:
        self.definitions: dict[str, dict[str, Any]] = {"reference": {"type": "string", "pattern": _REFERENCE}}

    def define(self, section: type[Section]) -> dict[str, Any]:
        if section.__name__ not in self.definitions:
            schema = self.definitions[section.__name__] = {**_MAPPING, "additionalProperties": False}
            properties = {name: self._option(section, item) for name, item in declared(section).items()}
            for alias, name in section.aliases.items():
                properties[alias] = {**properties[name], "description": f"Another name of {name}."}
            schema["properties"] = properties
            if section.aliases:
                schema["not"] = {"anyOf": [{"required": [alias, name]} for alias, name in section.aliases.items()]}
        return self.definitions[section.__name__]

    def _refer(self, section: type[Section], name: str = "") -> dict[str, Any]:
        self.define(section)
        return {"$ref": f"#/definitions/{section.__name__}{f'/properties/{name}' if name else ''}"}

    def _option(self, section: type[Section], item: kinds.Option) -> dict[str, Any]:
        notes = [item.description]
        if item.unit:
            notes.append(f"Unit: {item.unit}.")
        if item.backends is not None:
            notes.append(f"Honoured by {', '.join(item.backends)}.")
        value = self._of_experiments(section, item) or self._kind(item.kind)
        schema = {"description": " ".join(notes), **(_or_null(value) if item.takes_null else value)}
        is_empty_list = item.default == () and isinstance(item.kind, kinds.ListKind)
        if item.default is not kinds.REQUIRED and not isinstance(item.default, Section) and not is_empty_list:
            schema["default"] = plain(item.default)
        return schema

    def _of_experiments(self, section: type[Section], item: kinds.Option) -> dict[str, Any] | None:
        if section is CampaignGridConfig and item.name == "shared":
            return self._named(ExperimentConfig, is_axis=True)
        if section is CampaignGridConfig and item.name == "backend_overrides":
            axes = {backend: self._named(options, is_axis=True) for backend, options in SECTIONS.items()}
            return {**_MAPPING, "additionalProperties": False, "properties": axes}
        if section is CampaignGridConfig and item.name == "models":
            model = self._section(declared(ExperimentConfig)["model"].kind.sections[0])
            return _if("array", {"minItems": 1, "items": model}, _text_schema())
        if section is CampaignExplicitExperiment and item.name == "overrides":
            return self._named(ExperimentConfig, is_axis=False)
        if section is CampaignExplicitExperiment and item.name == "inline":
            return self._section(ExperimentConfig)
        return None

    def _named(self, section: type[Section], *, is_axis: bool) -> dict[str, Any]:
        schemas: dict[str, list[Schema]] = {}
        descriptions: dict[str, str] = {}
        patterns: dict[str, Any] = {}
        wrap = _axis if is_axis else lambda value: {"allOf": [value]}
        for key, owner, item in _nested(section):
            if not (is_axis and section is ExperimentConfig and key in _NO_AXES):
                schemas.setdefault(key, []).append(self._refer(owner, item.name))
                descriptions.setdefault(key, item.description)
                if isinstance(item.kind, kinds.MapKind):
                    rest = "" if isinstance(item.kind.inner, kinds.AnyKind) else "[^.]+$"
                    patterns[rf"^{re.escape(key)}\.{rest}"] = wrap(self._kind(item.kind.inner))
        properties = {
            key: {"description": descriptions[key], **wrap(found[0] if len(found) == 1 else {"anyOf": found})}
            for key, found in schemas.items()  # several where several variants have the option
        }
        return {**_MAPPING, "additionalProperties": False, "properties": properties, "patternProperties": patterns}

    def _kind(self, kind: kinds.Kind) -> dict[str, Any]:
        match kind:
            case kinds.BoolKind():
                return _or_reference({"type": "boolean"})
            case kinds.NumberKind():
                return _or_reference({"type": kind.label, **kind.item.bounds})
            case kinds.TextKind():
                return _text_schema(kind.item)
            case kinds.ChoiceKind():
                # The examples are what editors offer; they do not look behind `else`.
                choices = list(kind.item.choices)
                return {"examples": choices, **_or_reference({"enum": choices})}
            case kinds.ListKind():
                items = self._kind(kind.inner)
                limits = {"minItems": kind.item.min_items, "uniqueItems": kind.item.is_unique}
                schema = {"items": items, **{word: limit for word, limit in limits.items() if limit}}
                return _if("array", schema, items) if kind.item.takes_scalar else {"type": "array", **schema}
            case kinds.MapKind():
                return {**_MAPPING, "additionalProperties": self._kind(kind.inner)}
            case VariantKind():
                return _if("object", {"anyOf": [self._refer(section) for section in kind.sections]}, _text_schema())
            case SectionKind():
                return self._section(kind.sections[0])
        return {}

    def _section(self, section: type[Section]) -> dict[str, Any]:
        refer = self._refer(section)
        if section.alternative is not None:
            return {"type": "object", "if": _has_own(section), "then": refer, "else": self._refer(section.alternative)}
        return {"allOf": [refer]} if section.shorthand is None else _if("object", refer, _text_schema())


def _nested(section: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section], kinds.Option]]:
    options = declared(section)
    for name, option in [*options.items(), *((alias, options[of]) for alias, of in section.aliases.items())]:
        yield prefix + name, section, option
        for nested in option.kind.sections:
            yield from _nested(nested, f"{prefix}{name}.")


def _text_schema(item: kinds.Option | None = None) -> dict[str, Any]:
    form = getattr(item.check, "pattern", _FORMS.get(item.form)) if item is not None else None
    if item is None or form is None:
        return {"type": "string", "pattern": r"\S"}
    schema: dict[str, Any] = {"type": "string"}
    if item.takes_integer:
        schema = {"type": ["string", "integer"], "minimum": 0}
    return _or_reference({**schema, "pattern": f"^({form})$"})


# The forms with `if` have better messages than `anyOf`, of which a validator only says that nothing matches.


def _or_reference(schema: Schema) -> dict[str, Any]:
    return {"if": {"$ref": "#/definitions/reference"}, "else": schema}


def _if(kind: str, then: Schema, other: Schema) -> dict[str, Any]:
    return {"if": {"type": kind}, "then": then, "else": other}


def _axis(value: Schema) -> dict[str, Any]:
    return _if("array", {"minItems": 1, "items": value}, value)


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    match schema:
        case {"if": _, "else": other}:
            return {**schema, "else": _or_null(other)}
        case {"enum": [*choices]}:
            return {"enum": [*choices, None]}
        case {"type": kind}:
            return {**schema, "type": [*([kind] if isinstance(kind, str) else kind), "null"]}
    return {"if": {"type": "null"}, "else": schema}


# What must be given in a whole, and the rules between options


def _has_own(section: type[Section]) -> dict[str, Any]:
    return {"anyOf": [{"required": [name]} for name in declared(section)]}


def _given(name: str, kind: Any = ("array", "boolean", "number", "object", "string")) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"type": list(kind), "minItems": 1}}}


def _requirements(section: type[Section], without: tuple[str, ...] = ()) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: list[str] = []
    rules = list(_RULES.get(section.__name__, ()))
    for name, item in declared(section).items():
        names = [name, *(alias for alias, of in section.aliases.items() if of == name)]
        if name in without:
            continue
        if item.default is kinds.REQUIRED and len(names) > 1:
            rules.append({"anyOf": [{"required": [one]} for one in names]})
        elif item.default is kinds.REQUIRED:
            required.append(name)
        nested = _requirements_of(item.kind)
        properties.update({one: nested for one in names if nested})
    if section.switch is not None:
        rules.append({"if": {"minProperties": 1}, "then": {"required": [section.switch]}})
    found = {"required": required, "properties": properties, "allOf": rules}
    return {word: value for word, value in found.items() if value}


def _requirements_of(kind: kinds.Kind) -> dict[str, Any]:
    if isinstance(kind, VariantKind):
        by_type = ((name, _requirements(section)) for name, section in kind.variants.items())
        cases = [{"if": {"properties": {"type": {"const": name}}}, "then": found} for name, found in by_type if found]
        return {"required": ["type"], "allOf": cases}
    if not kind.sections:
        return {}
    section = kind.sections[0]
    found = _requirements(section)
    if section.alternative is not None:
        found = {"if": _has_own(section), "then": found, "else": {**_IN_CAMPAIGN, "minProperties": 1}}
    return {"items": found} if found and isinstance(kind, kinds.ListKind) else found


def _backend_rules() -> Iterator[dict[str, Any]]:
    for backend in BACKENDS:
        is_own = {"required": ["backend"], "properties": {"backend": {"const": backend}}}
        others = {other: {"type": "null"} for other in BACKENDS if other != backend}
        yield {"if": is_own, "then": {"properties": others}}


def _grid_rules() -> Iterator[dict[str, Any]]:
    for backend in BACKENDS:
        has = _if("array", {"contains": _or_reference({"const": backend})}, _or_reference({"const": backend}))
        has_only = _if("array", {"items": _or_reference({"const": backend})}, _or_reference({"const": backend}))
        overrides = {"required": ["backend_overrides"], "properties": {"backend_overrides": {"required": [backend]}}}
        yield {"if": overrides, "then": {"properties": {"backends": has}}}
        no_option = {"propertyNames": {"not": {"pattern": rf"^{backend}(\.|$)"}}}
        yield {"if": {"properties": {"shared": no_option}}, "else": {"properties": {"backends": has_only}}}


_RULES: Mapping[str, tuple[Schema, ...]] = {
    "CampaignConfig": ({"anyOf": [_given("configs"), _given("grid"), _given("experiments")]},),
    "CampaignGridConfig": tuple(_grid_rules()),
    "CampaignScheduleConfig": ({"required": ["at"], "properties": {"at": {"type": "string"}}},),
    "CampaignExplicitExperiment": ({"oneOf": [_given("config"), _given("inline")]},),
    "ExperimentConfig": (*_backend_rules(), {"not": {"allOf": [_given("dataset"), _given("prompts")]}}),
}
# The campaign may give an experiment its model and its dataset.
_IN_CAMPAIGN: Schema = _requirements(ExperimentConfig, without=("model", "dataset"))
