"""JSON Schema 2020-12 of a section, for editors that complete and check YAML while it is written."""

from __future__ import annotations

from typing import Any

from lem.config.containers import ListKind
from lem.config.options import REQUIRED
from lem.config.schema import Declared, Section, declared

__all__ = ["document_schema", "section_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def document_schema(section: type[Section], title: str) -> dict[str, Any]:
    """The schema of a whole file, `_extends` included."""
    schema = section_schema(section)
    schema["properties"] = {
        "_extends": {"type": "string", "description": "A file whose values this one inherits."},
        **schema["properties"],
    }
    required = schema.pop("required", None)
    if required:  # the file it inherits from may give it
        schema["anyOf"] = [{"required": required}, {"required": ["_extends"]}]
    return {"$schema": DIALECT, "title": title, **schema}


def section_schema(section: type[Section]) -> dict[str, Any]:
    """The schema of a section; where it can be written in short, a single value is taken too."""
    properties = {name: _option_schema(item) for name, item in declared(section).items()}
    for alias, name in section.aliases.items():
        properties[alias] = {**properties[name], "description": f"Another name of {name}."}
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    # What an alias may give as well is not required under its own name.
    required = [
        name
        for name, item in declared(section).items()
        if item.option.default is REQUIRED and name not in section.aliases.values()
    ]
    if required:
        schema["required"] = required
    if section.alternative is not None:
        return {"anyOf": [schema, {**section_schema(section.alternative), "required": []}]}
    if section.shorthand is not None:
        return {"anyOf": [{"type": "string", "minLength": 1}, schema]}
    return schema


def _option_schema(item: Declared) -> dict[str, Any]:
    schema = item.kind.json_schema()
    notes = [item.option.description]
    if item.option.unit:
        notes.append(f"Unit: {item.option.unit}.")
    if item.option.backends is not None:
        notes.append(f"Honoured by {', '.join(item.option.backends)}.")
    schema = {"description": " ".join(notes), **schema}
    default = item.option.default
    kind = item.kind_of_value
    if (
        default is not REQUIRED
        and not isinstance(default, Section)
        and not (default == () and isinstance(kind, ListKind))
    ):
        schema["default"] = item.kind.dump(item.default())
    return schema
