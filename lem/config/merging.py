"""Layers of configuration laid over each other before they are validated: plain mappings in, plain mappings out.

A mapping over a mapping merges; anything else replaces what was there. A section that is written in short (`model:
gpt2`) replaces the whole section, since a revision or an adapter belongs to the model it was written for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lem.config.option import Section, declared
from lem.config.problems import Path


def canonical(section: type[Section] | None, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with aliases and short forms written out, in a copy; what is not declared stays as it is."""
    aliases = section.aliases if section is not None else {}
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        name = aliases.get(key, key)
        if name != key and name in mapping:
            name = key  # both names were given: left for validation to refuse
        nested = _section_at(section, name, value)
        if isinstance(value, Mapping):
            value = canonical(nested, value)
        elif nested is not None and nested.shorthand is not None and isinstance(value, str):
            value = {nested.shorthand: value}
        out[name] = value
    return out


def merge(section: type[Section] | None, base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`; both stay as they are."""
    out = canonical(section, base)
    for key, value in canonical(section, over).items():
        below = out.get(key)
        written = next((over[name] for name in _names_of(section, key) if name in over), None)
        if (
            isinstance(written, Mapping)
            and isinstance(below, Mapping)
            and not _is_other_variant(section, key, below, value)
        ):
            value = merge(_section_at(section, key, value), below, value)
        out[key] = value
    return out


def put(section: type[Section], mapping: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The mapping with the option of a dotted name set: `put(ExperimentConfig, c, "decoder.preset", "factual")`."""
    return merge(section, mapping, nest(key, value))


def nest(key: str, value: Any) -> dict[str, Any]:
    """`{"decoder": {"preset": value}}` for "decoder.preset"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value that is not a mapping with something in it, with its path."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif path:
        yield path, tree


def _names_of(section: type[Section] | None, name: str) -> tuple[str, ...]:
    aliases = section.aliases.items() if section is not None else ()
    return (name, *(alias for alias, target in aliases if target == name))


def _section_at(section: type[Section] | None, name: str, value: Any) -> type[Section] | None:
    item = declared(section).get(name) if section is not None else None
    if item is None or not item.sections:
        return None
    if len(item.sections) > 1 and isinstance(value, Mapping):
        kinds = {declared(candidate)["type"].option.default: candidate for candidate in item.sections}
        return kinds.get(value.get("type")) if isinstance(value.get("type"), str) else None
    return item.sections[0]


def _is_other_variant(
    section: type[Section] | None, key: str, below: Mapping[str, Any], value: Mapping[str, Any]
) -> bool:
    item = declared(section).get(key) if section is not None else None
    is_variant = item is not None and len(item.sections) > 1
    return is_variant and "type" in value and value["type"] != below.get("type")
