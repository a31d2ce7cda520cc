"""Options: the one declaration from which parsing, errors, flags and documentation follow."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from lem.config.kinds import (
    INVALID,
    AnyKind,
    BoolKind,
    Bounds,
    ChoiceKind,
    FloatKind,
    IntKind,
    Items,
    Kind,
    ListKind,
    MapKind,
    NullableKind,
    TextKind,
)
from lem.config.problems import Path, Problem, Sink, describe, dotted, nearest


class _Marker:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


REQUIRED: Any = _Marker("REQUIRED")
# The default of every field, so that what was given can be told from what was left out.
UNSET: Any = _Marker("UNSET")
_OPTION = "lem.option"


@dataclass(frozen=True)
class Option:
    """What is declared about an option beside its type.

    Attributes:
        default: REQUIRED, a value, or a `Section`.
        description: one or two sentences for people.
        bounds: limits of a number, or of each number in a list.
        choices: the only values there are; () when open.
        unit: of a number, as SI or words.
        backends: which backends honour it; None for all.
        is_reload: changing it needs another engine load.
        is_identity: it can change a measured number.
        is_secret: never shown or logged.
        check: says what is wrong with a text, or None.
        form: what a text must look like, in words ("HH:MM").
        takes_scalar, takes_integer: a single value is a list of one; an integer is taken as text.
        min_items, is_unique: of a list.
        dotted_after: so many keys into a mapping, keys are dotted names of options; None where they are plain.
    """

    default: Any
    description: str
    bounds: Bounds = Bounds()  # noqa: RUF009 - frozen
    choices: tuple[Any, ...] = ()
    unit: str | None = None
    backends: tuple[str, ...] | None = None
    is_reload: bool = False
    is_identity: bool = True
    is_secret: bool = False
    check: Callable[[str], str | None] | None = None
    form: str = ""
    takes_scalar: bool = False
    takes_integer: bool = False
    min_items: int = 0
    is_unique: bool = False
    dotted_after: int | None = None


def option(
    default: Any = REQUIRED,
    *,
    description: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[Any] = (),
    backends: Iterable[str] | None = None,
    reload: bool = False,
    identity: bool = True,
    secret: bool = False,
    **rest: Any,
) -> Any:
    """A dataclass field that declares an option; the rest is as in `Option`."""
    declaration = Option(
        default,
        description,
        Bounds(minimum, maximum, above, below),
        tuple(choices),
        backends=None if backends is None else tuple(backends),
        is_reload=reload,
        is_identity=identity,
        is_secret=secret,
        **rest,
    )
    return dataclasses.field(default=UNSET, metadata={_OPTION: declaration})


def option_of(field: dataclasses.Field[Any]) -> Option:
    """What is declared in a field that `option` made."""
    declaration: Option = field.metadata[_OPTION]
    return declaration


S = TypeVar("S", bound="Section")


_IDENTITY = "_identity"


class Section:
    """A mapping of options; subclasses are frozen dataclasses whose fields are made by `option`.

    Attributes:
        shorthand: the option that a single value stands for (`model: gpt2`); None where a mapping is due.
        aliases: other names of options, old or short.
        switch: a truth value that must be given where another option of the section is, since an option under a
            switch that is off by default would silently do nothing.
        alternative: another section whose options may be written in the place of this one's (see `rewrite`).
        stranger_remedy: where an option of `alternative` goes when it is written among this one's.
    """

    shorthand: ClassVar[str | None] = None
    aliases: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    switch: ClassVar[str | None] = None
    alternative: ClassVar[type[Section] | None] = None
    stranger_remedy: ClassVar[str] = ""

    def __post_init__(self) -> None:
        sink = Sink()
        given: dict[str, Any] = {}
        for item in declared(type(self)).values():
            value = self.__dict__[item.name]
            if value is not UNSET:
                given[item.name] = item.kind.read(value, (item.name,), sink)
            elif item.option.default is REQUIRED:
                sink.add((item.name,), "is required", is_about_key=True)
        _note_given(type(self), given, (), sink)
        if not sink.problems:
            _fill(self, given, (), sink)
        sink.raise_if_any()

    @classmethod
    def from_dict(cls: type[S], mapping: Mapping[str, Any]) -> S:
        """The section in a mapping of plain values.

        Raises:
            ConfigProblems: everything that is wrong with it.
        """
        sink = Sink()
        section: S = read_section(cls, mapping, (), sink)
        sink.raise_if_any()
        return section

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values, defaults included; `from_dict` gives an equal section back."""
        values = self.__dict__
        return {name: item.kind.dump(values[name]) for name, item in declared(type(self)).items()}

    def identity(self) -> Mapping[str, Any]:
        """The options that can change a measured number, as plain JSON values that nobody may change.

        Worked out once: thousands of experiments of a grid share the sections they leave alone.
        """
        known: Mapping[str, Any] | None = self.__dict__.get(_IDENTITY)
        if known is None:
            known = self.__dict__[_IDENTITY] = self.make_identity()
        return known

    def make_identity(self) -> dict[str, Any]:
        """As `identity`, every time anew."""
        values = self.__dict__
        return {
            name: item.kind.identity(values[name])
            for name, item in declared(type(self)).items()
            if item.option.is_identity
        }

    @classmethod
    def rewrite(cls, mapping: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """The mapping in the form that is read, for sections that can be written in more than one."""
        return mapping

    def derive(self, given: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """Values that follow from those given, which win over defaults."""
        return {}

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> Iterator[Problem]:  # noqa: ARG003
        """What is wrong with the options given that are right so far, whatever is wrong with others."""
        yield from ()

    def check(self) -> Iterator[Problem]:
        """What is wrong between options that are each right; paths are relative to the section."""
        yield from ()


class SectionKind(Kind):
    """A nested section."""

    name = "a mapping"
    label = "section"

    def __init__(self, section: type[Section]) -> None:
        self.section = section

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        return value if isinstance(value, self.section) else read_section(self.section, value, path, sink)

    def dump(self, value: Any) -> Any:
        return value.to_dict()

    def identity(self, value: Any) -> Any:
        return value.identity()

    def json_schema(self) -> dict[str, Any]:

        return section_schema(self.section)


class VariantKind(SectionKind):
    """One of several sections, told apart by their option `type`."""

    def __init__(self, sections: Iterable[type[Section]]) -> None:
        self.variants = {_variant_name(section): section for section in sections}
        super().__init__(next(iter(self.variants.values())))

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if isinstance(value, tuple(self.variants.values())):
            return value
        if not isinstance(value, Mapping):
            return self.due(value, path, sink)
        names = ", ".join(self.variants)
        if "type" not in value:
            if sink.is_partial:
                return self._read_untyped(value, path, sink)
            sink.add((*path, "type"), f"is required: one of {names}", is_about_key=True)
            return INVALID
        kind = value["type"]
        if not isinstance(kind, str) or str(kind) not in self.variants:
            got = repr(str(kind)) if isinstance(kind, str) else describe(kind)
            near = nearest(kind, list(self.variants)) if isinstance(kind, str) else None
            sink.add((*path, "type"), f"one of {names} is due, got {got}", near)
            return INVALID
        return read_section(self.variants[str(kind)], value, path, sink)

    def _read_untyped(self, value: Mapping[str, Any], path: Path, sink: Sink) -> Any:
        """Hold a part of a variant against every variant; the one with the fewest problems has the say."""
        sinks = []
        for section in self.variants.values():
            sinks.append(Sink(is_partial=True))
            read_section(section, value, path, sinks[-1])
        best = min(sinks, key=lambda tried: len(tried.problems))
        sink.problems.extend(best.problems)
        return INVALID if best.problems else dict(value)

    def json_schema(self) -> dict[str, Any]:

        return {"oneOf": [section_schema(section) for section in self.variants.values()]}


@dataclass(frozen=True)
class Declared:
    """An option as it stands in its section."""

    name: str
    option: Option
    kind: Kind

    def default(self) -> Any:
        """The default value; a fresh one where it could be changed."""
        value = self.option.default
        return dict(value) if isinstance(value, dict) else Items(value) if isinstance(value, (list, tuple)) else value

    @property
    def kind_of_value(self) -> Kind:
        """The kind of a value that is not null."""
        return self.kind.inner if isinstance(self.kind, NullableKind) else self.kind

    @property
    def sections(self) -> tuple[type[Section], ...]:
        """The sections this option nests: none, one, or its variants."""
        kind = self.kind
        while isinstance(kind, (NullableKind, ListKind)):
            kind = kind.inner
        if isinstance(kind, VariantKind):
            return tuple(kind.variants.values())
        return (kind.section,) if isinstance(kind, SectionKind) else ()


@dataclass(frozen=True)
class _Compiled:
    """What is asked of a section again and again, worked out once: a grid makes thousands of them."""

    options: Mapping[str, Declared]
    defaults: Mapping[str, Any]
    mutable: tuple[str, ...]
    required: tuple[str, ...]
    checks_given: bool


# By class, filled when a class is first used (functools.cache would do, but mypy takes the hash of a class for that of
# its instances).
_COMPILED: dict[Any, _Compiled] = {}


def declared(section: type[Section]) -> Mapping[str, Declared]:
    """The options of a section by name, in order."""
    return _compiled(section).options


def _compiled(section: type[Section]) -> _Compiled:
    known = _COMPILED.get(section)
    if known is not None:
        return known
    hints = typing.get_type_hints(section)
    options: dict[str, Declared] = {}
    for item in dataclasses.fields(typing.cast(Any, section)):
        declaration = option_of(item)
        options[item.name] = Declared(item.name, declaration, _kind_of(hints[item.name], declaration))
    defaults = {name: item.default() for name, item in options.items()}
    compiled = _Compiled(
        options=types.MappingProxyType(options),
        defaults=types.MappingProxyType(defaults),
        mutable=tuple(name for name, value in defaults.items() if isinstance(value, dict)),
        required=tuple(name for name, value in defaults.items() if value is REQUIRED),
        checks_given="check_given" in vars(section),
    )
    return _COMPILED.setdefault(section, compiled)


def read_section(section: type[Section], value: Any, path: Path, sink: Sink) -> Any:
    """The section in a mapping, or INVALID with the problems noted."""
    options = declared(section)
    if section.shorthand is not None and isinstance(value, str):
        value = {section.shorthand: value}
    if not isinstance(value, Mapping):
        wanted = "a mapping" if section.shorthand is None else f"a {section.shorthand} or a mapping"
        remedy = "; leave the line out to have the defaults" if value is None else ""
        sink.add(path, f"{wanted} is due, got {describe(value)}{remedy}")
        return INVALID
    before = len(sink.problems)
    given: dict[str, Any] = {}
    for key, item in section.rewrite(value).items():
        name = section.aliases.get(key, key) if isinstance(key, str) else key
        if name not in options:
            _note_unknown(section, key, path, sink)
        elif name in given:
            sink.add((*path, key), f"is given twice, since {key} is another name of {name}", is_about_key=True)
        else:
            given[name] = options[name].kind.read(item, (*path, key), sink)
    if sink.is_partial:
        return INVALID if len(sink.problems) > before else value
    _note_missing(section, given, path, sink)
    _note_given(section, given, path, sink)
    if len(sink.problems) > before:
        return INVALID
    instance = object.__new__(section)
    _fill(instance, given, path, sink)
    return instance if len(sink.problems) == before else INVALID


def check_partial(section: type[Section], mapping: Any, path: Path = ()) -> tuple[Problem, ...]:
    """What is wrong with a part of a section: unknown options and values, but nothing about what is missing."""
    sink = Sink(is_partial=True)
    read_section(section, mapping, path, sink)
    return tuple(sink.problems)


def find_option(section: type[Section], key: str) -> Declared | None:
    """The option with a dotted name, aliases included; None when there is none."""
    candidates: tuple[type[Section], ...] = (section,)
    found: Declared | None = None
    for part in key.split("."):
        found = None
        for candidate in candidates:
            found = declared(candidate).get(candidate.aliases.get(part, part))
            if found is not None:
                break
        if found is None:
            return None
        candidates = found.sections
    return found


def walk(
    section: type[Section], prefix: str = "", backends: tuple[str, ...] | None = None
) -> Iterator[tuple[str, Declared, type[Section]]]:
    """Every option that is not itself a section, with its dotted name and the section it stands in.

    An option without `backends` of its own has those of the option it is nested in.
    """
    for name, item in declared(section).items():
        key = f"{prefix}.{name}" if prefix else name
        honouring = item.option.backends or backends
        if not item.sections:
            declaration = dataclasses.replace(item.option, backends=honouring)
            yield key, dataclasses.replace(item, option=declaration), section
            continue
        inner = f"{key}[]" if isinstance(item.kind_of_value, ListKind) else key
        for nested in item.sections:
            yield from walk(nested, inner, honouring)


def _fill(instance: Section, given: Mapping[str, Any], path: Path, sink: Sink) -> None:
    """Give an instance its values, then hold them against each other."""
    compiled = _compiled(type(instance))
    values = instance.__dict__  # around the freeze: this is still its construction
    values.update(compiled.defaults)
    for name in compiled.mutable:
        values[name] = {}
    values.update(given)
    values.update(instance.derive(given))
    for problem in instance.check():
        sink.problems.append(dataclasses.replace(problem, path=(*path, *problem.path)))


def _note_given(section: type[Section], given: Mapping[str, Any], path: Path, sink: Sink) -> None:
    if not _compiled(section).checks_given:
        return
    valid = {name: value for name, value in given.items() if value is not INVALID}
    for problem in section.check_given(valid):
        sink.problems.append(dataclasses.replace(problem, path=(*path, *problem.path)))


def _note_unknown(section: type[Section], key: Any, path: Path, sink: Sink) -> None:
    if not isinstance(key, str):
        sink.add(path, f"a key must be text, got {describe(key)}")
        return
    if "." in key and find_option(section, key) is not None:
        message, near = f"unknown key; nest it: {' '.join(f'{part}:' for part in key.split('.'))} …", None
    elif section.alternative is not None and find_option(section.alternative, key) is not None:
        message, near = f"unknown key; {section.stranger_remedy}", None
    else:
        message = "unknown key"
        near = nearest(key, [*declared(section), *section.aliases]) or _elsewhere(section, key)
    sink.add((*path, key), message, near, is_about_key=True)


def _elsewhere(section: type[Section], key: str) -> str | None:
    """The dotted name of the option below a section that has this very name; None unless there is just one."""
    found = {name for name, _, _ in walk(section) if name.rpartition(".")[2] == key and "[]" not in name}
    return found.pop() if len(found) == 1 else None


def _note_missing(section: type[Section], given: Mapping[str, Any], path: Path, sink: Sink) -> None:
    for name in _compiled(section).required:
        if name not in given:
            sink.add((*path, name), "is required", is_about_key=True)
    switch = section.switch
    if switch is not None and given and switch not in given:
        where = dotted((*path, switch))
        sink.add((*path, next(iter(given))), f"has no effect while {where} is not given; add {switch}: true (or false)")


def _variant_name(section: type[Section]) -> str:
    return str(declared(section)["type"].option.default)


def _kind_of(hint: Any, declaration: Option) -> Kind:
    """The kind that an annotation and its declaration make."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    if type(None) in members:
        rest = tuple(member for member in members if member is not type(None))
        return NullableKind(_kind_of(typing.Union[rest], declaration))  # noqa: UP007
    if members and all(isinstance(member, type) and issubclass(member, Section) for member in members):
        return VariantKind(members)
    origin = typing.get_origin(hint)
    if origin is tuple:
        inner = _kind_of(typing.get_args(hint)[0], declaration)
        return ListKind(
            inner,
            min_items=declaration.min_items,
            is_scalar_taken=declaration.takes_scalar,
            is_unique=declaration.is_unique,
        )
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return MapKind(_kind_of(typing.get_args(hint)[1], declaration))
    if declaration.choices:
        return ChoiceKind(declaration.choices)
    if isinstance(hint, type) and issubclass(hint, Section):
        return SectionKind(hint)
    return _plain_kind(hint, declaration)


def _plain_kind(hint: Any, declaration: Option) -> Kind:
    if hint is bool:
        return BoolKind()
    if hint is int:
        return IntKind(declaration.bounds)
    if hint is float:
        return FloatKind(declaration.bounds)
    if hint is str:
        return TextKind(declaration.check, form=declaration.form, is_integer_text=declaration.takes_integer)
    if hint is Any:
        return AnyKind()
    raise TypeError(f"no option can have the type {hint}")


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
