"""Options: the one declaration from which parsing, errors, flags and documentation follow."""

from __future__ import annotations

import functools
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from lem.base.dataclass import dataclass, field, fields, replace, types_of
from lem.base.errors import nearest
from lem.config import kinds
from lem.config.terms import meant

_METADATA = "lem.option"
_NAME = re.compile(r"[\w.-]+")


def option(
    default: Any,
    description: str,
    *,
    min: float | None = None,  # noqa: A002 - short, since it is in every second declaration
    max: float | None = None,  # noqa: A002
    **rest: Any,
) -> Any:
    limits = zip(kinds.LIMITS, (min, rest.pop("above", None), max, rest.pop("below", None)), strict=True)
    bounds = {word: limit for word, limit in limits if limit is not None}
    declaration = kinds.Option(default, description, bounds, **rest)
    return field(default=kinds.UNSET, metadata={_METADATA: declaration})


@dataclass(frozen=True)
class Matching:
    pattern: str  # a regular expression of both Python and JSON Schema
    wanted: str  # the same in words

    def __call__(self, text: str) -> str | None:
        return None if re.fullmatch(self.pattern, text) else f"expected {self.wanted}, got {text!r}"


S = TypeVar("S", bound="Section")
T = TypeVar("T")


class Section:
    """A mapping of options; subclasses are frozen dataclasses whose fields are made by `option`."""

    # The option that a single value stands for (`model: gpt2`); None where only a mapping is accepted.
    shorthand: ClassVar[str | None] = None
    # Other names of options, old or short.
    aliases: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    # A truth value that must be given beside any other option of the section, since an option under a switch that is
    # off by default would silently do nothing.
    switch: ClassVar[str | None] = None
    # Options of which one excludes the others: where layers merge, the one above replaces those below.
    exclusive: ClassVar[tuple[str, ...]] = ()
    # Whether a change of an option needs another engine load, unless the option declares it.
    reloads: ClassVar[bool] = False
    # Another section whose options may be written in place of this one's (see `rewrite`).
    alternative: ClassVar[type[Section] | None] = None

    def __init_subclass__(cls, **traits: Any) -> None:
        super().__init_subclass__()
        cls.__doc__ = cls.__doc__ or cls.__name__  # `dataclass` would spend a millisecond on making one
        for name, value in traits.items():
            assert hasattr(Section, name), name  # noqa: S101 - a typing error in a class
            setattr(cls, name, value)

    def __post_init__(self) -> None:
        sink = kinds.Sink(type(self))
        given = {name: value for name in declared(type(self)) if (value := self.__dict__[name]) is not kinds.UNSET}
        _complete(self, _read_given(type(self), given, (), sink), (), sink)
        sink.raise_if_any()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        _defaults(type(self))  # another process may not have them yet
        self.__dict__.update(state)

    @classmethod
    def from_dict(cls: type[S], mapping: Mapping[str, Any], known: kinds.KnownValues | None = None) -> S:
        """The section; ConfigProblems. With `known`, an option that has the same object as before is not read again."""
        sink = kinds.Sink(cls, functools.partial(_chosen, cls, mapping), known=known)
        section: S = cls.read(mapping, (), sink)
        sink.raise_if_any()
        return section

    @classmethod
    def read(cls, value: Any, path: kinds.Path, sink: kinds.Sink) -> Any:
        value = cls.written_out(value)
        if not isinstance(value, (dict, Mapping)):  # the first is much quicker to check
            wanted = "a mapping" if cls.shorthand is None else f"a {cls.shorthand} or a mapping"
            got = "" if value is not None and secrets_of(cls) else f", got {kinds.describe(value)}"
            return sink.add(path, f"expected {wanted}{got}")
        before = len(sink.problems)
        given = _read_given(cls, cls.rewrite(value), path, sink)
        if sink.is_partial:
            return kinds.INVALID if len(sink.problems) > before else value
        switch = cls.switch
        if switch is not None and given and switch not in given:
            where = kinds.dotted((*path, switch))
            remedy = f"add {switch}: true or {switch}: false"
            sink.add((*path, next(iter(given))), f"has no effect unless {where} is set; {remedy}")
        section = object.__new__(cls)
        _complete(section, given, path, sink, before)
        return section if len(sink.problems) == before else kinds.INVALID

    @classmethod
    def written_out(cls, value: Any) -> Any:
        if cls.shorthand is None or not isinstance(value, str):
            return value
        variant = declared(cls).get("type")
        return {**({} if variant is None else {"type": variant.default}), cls.shorthand: value}

    def to_dict(self) -> dict[str, Any]:
        return {name: plain(getattr(self, name)) for name in declared(type(self))}

    def is_given(self, name: str) -> bool:
        """Whether an option was written, also with the value of its default."""
        return name in self.__dict__.get("_given", self.__dict__)

    def changed(self) -> dict[str, Any]:
        return dict(_CHANGED(self))

    def identity(self, *, is_first: bool = False) -> dict[str, Any]:
        """The options that can change a measured number, as plain JSON values.

        With `is_first`, those that the first build counted among them.
        """
        given, defaults = self.__dict__, _defaults(type(self))[0]
        found = {name: (given.get(name, defaults[name]), option) for name, option in declared(type(self)).items()}
        return {
            name: plain(
                option.default if option.is_dropped and not is_first else value,
                lambda section: section.identity(is_first=is_first),
            )
            for name, (value, option) in found.items()
            if option.identity and not (option.is_added and value == option.default)
        }

    def identity_texts(self, *, is_first: bool = False) -> dict[str, str]:
        """`identity` as JSON without spaces, in the order of the names: of each option its name and its value."""
        # A grid has thousands of configurations that share most of their sections, and most options have defaults.
        found, given = {}, self.__dict__
        for name, default, text, item in _default_texts(typing.cast("Any", type(self)), is_first):
            value = given.get(name, default)
            if value is default or (item.is_dropped and not is_first):
                if not item.is_added:
                    found[name] = text
            elif not (item.is_added and value == default):
                found[name] = f'"{name}":{identity_text(value, is_first=is_first)}'
        return found

    @classmethod
    def rewrite(cls, mapping: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """The mapping in the form that is read, for sections that can be written in more than one."""
        return mapping

    @classmethod
    def elsewhere(cls, names: Sequence[str]) -> str | None:  # noqa: ARG003
        """Where to set options that this section does not lead to, by their dotted names; None if lem has none such."""
        return None

    def derive(self, given: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """Values that follow from those given, which win over defaults."""
        return {}

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> Iterator[kinds.Problem]:  # noqa: ARG003
        yield from ()

    def check(self) -> Iterator[kinds.Problem]:
        yield from ()


def plain(value: Any, of_section: Callable[[Section], Mapping[str, Any]] = Section.to_dict) -> Any:
    if isinstance(value, Section):
        return of_section(value)
    if isinstance(value, dict):
        return {key: plain(item, of_section) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, of_section) for item in value]
    return str(value) if isinstance(value, str) else value


class SectionKind(kinds.Kind):
    name = "a mapping"
    label = "section"
    holds_others = True

    def __init__(self, item: kinds.Option, *sections: type[Section]) -> None:
        super().__init__(item)
        self.sections = sections

    def read(self, value: Any, path: kinds.Path, sink: kinds.Sink) -> Any:
        return value if isinstance(value, self.sections) else self.sections[0].read(value, path, sink)


class VariantKind(SectionKind):
    def __init__(self, item: kinds.Option, variants: Mapping[str, type[Section]]) -> None:
        super().__init__(item, *variants.values())
        self.variants = variants

    def read(self, value: Any, path: kinds.Path, sink: kinds.Sink) -> Any:
        if isinstance(value, self.sections):
            return value
        value = next((short for item in self.sections if (short := item.written_out(value)) is not value), value)
        if not isinstance(value, Mapping):
            return self.refuse(value, path, sink)
        names = ", ".join(self.variants)
        if "type" not in value:
            if sink.is_partial:
                return self._read_untyped(value, path, sink)
            return sink.add((*path, "type"), f"is required: one of {names}", is_about_key=True)
        kind = value["type"]
        if not isinstance(kind, str) or str(kind) not in self.variants:
            near = nearest(kind, list(self.variants)) if isinstance(kind, str) else None
            return sink.add((*path, "type"), f"expected one of {names}, got {kinds.describe(kind)}", near)
        return self.variants[str(kind)].read(value, path, sink)

    def _read_untyped(self, value: Mapping[str, Any], path: kinds.Path, sink: kinds.Sink) -> Any:
        sinks = []
        for section in self.variants.values():
            sinks.append(kinds.Sink(sink.root, sink.chosen, is_partial=True))
            section.read(value, path, sinks[-1])
        best = min(sinks, key=lambda tried: len(tried.problems))
        sink.problems.extend(best.problems)
        return kinds.INVALID if best.problems else dict(value)


def of_class(function: Callable[[type[Any]], T]) -> Callable[[type[Any]], T]:
    # `functools.cache`, cast, since mypy takes the hash of a class for that of its instances.
    return typing.cast("Callable[[type[Any]], T]", functools.cache(function))


def declarations(section: type[Any]) -> dict[str, kinds.Option]:
    """The options of a section as they were declared, for what needs neither their kinds nor their sections."""
    return {field.name: field.metadata[_METADATA] for field in fields(section)}


@of_class
def declared(section: type[Any]) -> Mapping[str, kinds.Option]:
    hints = types_of(section)
    options: dict[str, kinds.Option] = {}
    for name, item in declarations(section).items():
        reload = section.reloads if item.reload is kinds.UNSET else item.reload
        members = typing.get_args(hints[name])
        is_nullable = types.NoneType in members
        others = tuple(member for member in members if member is not types.NoneType)
        kind = _kind_of(typing.Union[others] if is_nullable else hints[name], item)  # noqa: UP007
        of_field: dict[str, Any] = {"name": name, "kind": kind, "is_nullable": is_nullable, "reload": reload}
        options[name] = replace(item, **of_field)
    return options


def _read_given(
    section: type[Section], mapping: Mapping[Any, Any], path: kinds.Path, sink: kinds.Sink
) -> dict[str, Any]:
    options, known = declared(section), None if path else sink.known
    given: dict[str, Any] = {}
    for key, item in mapping.items():
        if known is not None and (found := known.get((key, id(item)))) is not None and found[0] not in given:
            given[found[0]] = found[1]
            continue
        name = section.aliases.get(key, key) if isinstance(key, str) else key
        if name not in options:
            _note_unknown(section, key, path, sink)
        elif name in given:
            other = name if key != name else next(other for other in mapping if section.aliases.get(other) == name)
            sink.add((*path, key), f"duplicate option: {key} is another name of {other}", is_about_key=True)
        else:
            declaration = options[name]
            if kinds.simple(item) is not None or not declaration.takes_null:
                before = len(sink.problems)
                given[name] = declaration.kind.read(item, (*path, key), sink)
                if known is not None and len(sink.problems) == before:
                    known[key, id(item)] = (name, given[name], item)
            elif declaration.is_nullable:
                given[name] = None  # else as if it was left out
    return given


def _complete(instance: Section, given: Mapping[str, Any], path: kinds.Path, sink: kinds.Sink, before: int = 0) -> None:
    required = _defaults(type(instance))[1]
    if missing := [name for name in required if name not in given]:
        misspelt = {problem.suggestion for problem in sink.problems if problem.path[:-1] == path}
        for name in missing:
            if name not in misspelt:
                sink.add((*path, name), "is required", is_about_key=True)
    valid = {name: value for name, value in given.items() if value is not kinds.INVALID}
    _note(instance.check_given(valid), path, sink)
    if len(sink.problems) > before:
        return
    values = instance.__dict__  # around the freeze
    values.clear()  # what is not given has its default in the class: thousands of sections would repeat it
    values.update(given)
    _add(instance, instance.derive(given))
    _note(instance.check(), path, sink)


def _add(section: Section, more: Mapping[str, Any]) -> None:
    """Give a section values that were not written."""
    if more:
        section.__dict__.setdefault("_given", _shared_names(frozenset(section.__dict__)))
        section.__dict__.update(more)


class _OwnMapping:
    """An empty mapping as a default: each section has its own from its first use, since a caller may fill it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, section: Section | None, _: type[Section]) -> Any:
        if section is None:
            return {}
        _add(section, {self._name: {}})
        return section.__dict__[self._name]


@functools.lru_cache(4096)
def _shared_names(names: frozenset[str]) -> frozenset[str]:
    return names


@of_class
def _defaults(section: type[Section]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Of each option its default, as it is in a section, and the names of those that are required.

    The class gets the defaults, which are those of all its sections.
    """
    found = {name: item.default for name, item in declared(section).items()}
    frozen = {name: kinds.Items(value) if isinstance(value, tuple) else value for name, value in found.items()}
    for name, value in frozen.items():
        setattr(section, name, _OwnMapping(name) if value == {} else value)
    return frozen, tuple(name for name, value in found.items() if value is kinds.REQUIRED)


@functools.cache
def _default_texts(section: Any, is_first: bool) -> Sequence[tuple[str, Any, str, kinds.Option]]:
    """Of each option of the identity its name, its default as it is in a section, and that as JSON."""
    defaults, options = _defaults(section)[0], declared(section)
    found = []
    for name, default in sorted(defaults.items()):
        text = "" if default is kinds.REQUIRED else f'"{name}":{identity_text(default, is_first=is_first)}'
        if options[name].identity:
            found.append((name, default, text, options[name]))
    return found


def identity_text(value: Any, *, is_first: bool = False) -> str:
    """A value of `Section.identity` as JSON."""
    if isinstance(value, Section):
        return _FIRST_TEXTS(value) if is_first else _TEXTS(value)
    if value is None or isinstance(value, (dict, list, tuple)):
        return canonical_text(plain(value, lambda item: item.identity(is_first=is_first)))
    return str(value) if type(value) is int else canonical_text(value)


def joined_texts(texts: Mapping[str, str]) -> str:
    """One JSON object of what `identity_texts` gives."""
    return f"{{{','.join(texts.values())}}}"


# One text for equal values; 1 and 1.0 differ.
canonical_text = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


class Memo(Generic[T]):
    """Remembers what a function makes of an object, by which object it is: sections are slow to compare."""

    def __init__(self, function: Callable[..., T], most: int = 256) -> None:
        self._function, self._most = function, most
        self._known: dict[Any, tuple[Any, T]] = {}  # with the object, whose number stays its own for as long

    def __call__(self, item: Any, *more: Any) -> T:
        key = (id(item), *more)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= self._most:
                self._known.clear()
            found = self._known[key] = (item, self._function(item, *more))
        return found[1]


def _changed(section: Section) -> dict[str, Any]:
    options = declared(type(section))
    return {name: it for name, it in section.to_dict().items() if getattr(section, name) != options[name].default}


_CHANGED = Memo[dict[str, Any]](_changed)
_TEXTS = Memo[str](lambda section: joined_texts(section.identity_texts()))
_FIRST_TEXTS = Memo[str](lambda section: joined_texts(section.identity_texts(is_first=True)))


def _note(problems: Iterable[kinds.Problem], path: kinds.Path, sink: kinds.Sink) -> None:
    for problem in problems:
        sink.problems.append(replace(problem, path=(*path, *problem.path)))


def _note_unknown(section: type[Section], key: Any, path: kinds.Path, sink: kinds.Sink) -> None:
    if not isinstance(key, str):
        sink.add(path, f"expected a text key, got {kinds.describe(key)}")
        return
    if "." in key and find_option(section, key) is not None:
        remedy, near = f"nest it: {' '.join(f'{part}:' for part in key.split('.'))} …", None
    elif len(sink.problems) >= kinds.MAX_SHOWN_PROBLEMS:
        remedy, near = "", None  # a file of another kind, and looking for what is meant takes milliseconds
    else:
        at = [part for part in path if isinstance(part, str)]
        own, known = [*declared(section), *section.aliases], _names(sink.root)
        remedy, near = meant(key, at, own, known, sink.chosen(), (section.elsewhere, sink.root.elsewhere))
    sink.add((*path, key), f"unknown key; {remedy}" if remedy else "unknown key", near, is_about_key=True)


def _chosen(section: type[Section], mapping: Any) -> set[str]:
    found = dict(mapping) if isinstance(mapping, Mapping) else {}
    backend = declared(section).get("backend")
    named = found.get("backend", backend.default if backend is not None else None)
    return {str(name) for name in (*found, named) if isinstance(name, str)}


@of_class
def _names(section: type[Section]) -> frozenset[str]:
    leaves = [name.split(".") for name, _, _ in walk(section)]
    return frozenset(".".join(parts[:end]) for parts in leaves for end in range(1, len(parts) + 1))


def check_partial(section: type[Section], mapping: Any, chosen: Collection[str] = ()) -> tuple[kinds.Problem, ...]:
    sink = kinds.Sink(section, lambda: chosen or _chosen(section, mapping), is_partial=True)
    section.read(mapping, (), sink)
    return tuple(sink.problems)


@of_class
def secrets_of(section: type[Section]) -> tuple[str, ...]:
    """The dotted names of the options that are never shown."""
    return tuple(name for name, item, _ in walk(section) if item.secret)


def is_secret(section: type[Section], path: kinds.Path) -> bool:
    """Whether a secret option is at a path or below it, or is meant by an unknown name beside it or like it."""
    key = ".".join(part for part in path if isinstance(part, str))
    secrets = secrets_of(section)
    if find_option(section, key) is None:
        key, _, name = key.rpartition(".")
        if nearest(name, [secret.rpartition(".")[2] for secret in secrets]) is not None:
            return True
    return any(name == key or name.startswith(f"{key}.") for name in secrets)


def redacted(section: type[Section], path: kinds.Path) -> kinds.Path:
    for length, part in enumerate(path):
        if isinstance(part, str) and is_secret(section, path[: length + 1]):
            above = find_option(section, ".".join(name for name in path[:length] if isinstance(name, str)))
            if not _NAME.fullmatch(part) or (above is not None and above.secret):
                return (*path[:length], "(hidden)")
    return path


def find_option(section: type[Section], key: str) -> kinds.Option | None:
    candidates: tuple[type[Section], ...] = (section,)
    found: kinds.Option | None = None
    for part in key.split("."):
        options = (declared(candidate).get(candidate.aliases.get(part, part)) for candidate in candidates)
        found = next((item for item in options if item is not None), None)
        if found is None:
            return None
        candidates = found.kind.sections
    return found


def walk(
    section: type[Section], prefix: str = "", backends: tuple[str, ...] | None = None
) -> Iterator[tuple[str, kinds.Option, type[Section]]]:
    """Every option that is no section, with its dotted name, its section, and its backends or those it is nested in."""
    for name, item in declared(section).items():
        key = f"{prefix}.{name}" if prefix else name
        honouring = item.backends or backends
        if not item.kind.sections:
            yield key, replace(item, backends=honouring), section
        for nested in item.kind.sections:
            yield from walk(nested, f"{key}[]" if isinstance(item.kind, kinds.ListKind) else key, honouring)


# Layers of configuration: plain mappings in, plain mappings out, before they are validated.


def nest(path: str | Sequence[str], value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".") if isinstance(path, str) else path):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def leaves(tree: Any, path: kinds.Path = ()) -> Iterator[tuple[kinds.Path, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif path:
        yield path, tree


def canonical(section: type[Section] | None, mapping: Mapping[str, Any]) -> dict[str, Any]:
    aliases = section.aliases if section is not None else {}
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        name = aliases.get(key, key)
        if name != key and name in mapping:
            name = key  # both names were given: left for validation to refuse
        nested = _section_at(section, name, value)
        if isinstance(value, Mapping):
            value = canonical(nested, value)
        elif nested is not None:
            value = nested.written_out(value)
        out[name] = value
    return out


def merge(section: type[Section] | None, base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`; neither is changed."""
    # A mapping over a mapping merges; anything else replaces what was there. A section in its short form (`model:
    # gpt2`) replaces the whole section, since a revision or an adapter belongs to the model it was written for.
    out = canonical(section, base)
    names = {value: key for key, value in section.aliases.items()} if section is not None else {}
    exclusive = section.exclusive if section is not None else ()
    if any(over.get(key) is not None for key in exclusive):
        out = {key: value for key, value in out.items() if key not in exclusive or key in over}
    for key, value in canonical(section, over).items():
        below, written = out.get(key), over.get(key, over.get(names.get(key, key)))
        if isinstance(written, Mapping) and isinstance(below, Mapping):
            nested = _section_at(section, key, value)
            if nested in (None, _section_at(section, key, below)):  # else another variant, which replaces it
                value = merge(nested, below, value)
        out[key] = value
    return out


def put(section: type[Section], mapping: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    return merge(section, mapping, nest(key, value))


def _section_at(section: type[Section] | None, name: str, value: Any) -> type[Section] | None:
    item = declared(section).get(name) if section is not None else None
    if item is None or not item.kind.sections:
        return None
    if isinstance(item.kind, VariantKind):
        if isinstance(value, str):
            return next((section for section in item.kind.sections if section.shorthand is not None), None)
        kind = value.get("type") if isinstance(value, Mapping) else None
        return item.kind.variants.get(kind) if isinstance(kind, str) else None
    return item.kind.sections[0]


def _kind_of(hint: Any, item: kinds.Option) -> kinds.Kind:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    members = arguments if origin in (typing.Union, types.UnionType) else ()
    if members and all(isinstance(member, type) and issubclass(member, Section) for member in members):
        return VariantKind(item, {str(declared(member)["type"].default): member for member in members})
    if origin is tuple:
        return kinds.ListKind(item, _kind_of(arguments[0], item))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return kinds.MapKind(item, _kind_of(arguments[1], item))
    if item.choices:
        return kinds.ChoiceKind(item)
    if isinstance(hint, type) and issubclass(hint, Section):
        return SectionKind(item, hint)
    if hint in (int, float):
        return kinds.NumberKind(item, hint)
    others: Mapping[Any, type[kinds.Kind]] = {bool: kinds.BoolKind, str: kinds.TextKind, Any: kinds.AnyKind}
    return others[hint](item)
