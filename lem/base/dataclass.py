"""Dataclasses as in the standard library, at a fraction of their cost: 15 µs a class instead of 280.

A command defines about a hundred of these classes, and creates no instance of most. The standard decorator compiles up
to six functions for each, and its module imports `inspect`; here only `__init__` is compiled, of a class that has many
instances. What no class of lem uses is left out: `order`, `InitVar`, `field(hash=…)`, and a standard dataclass that
derives from one of these. The functions of the standard library take these classes, too.
"""

from __future__ import annotations

import functools
import sys
from operator import attrgetter
from reprlib import recursive_repr
from types import MemberDescriptorType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from dataclasses import KW_ONLY as KW_ONLY  # noqa: PLC0414
    from dataclasses import MISSING as MISSING  # noqa: PLC0414
    from dataclasses import Field as Field  # noqa: PLC0414
    from dataclasses import asdict as asdict  # noqa: PLC0414
    from dataclasses import dataclass as dataclass  # noqa: PLC0414
    from dataclasses import field as field  # noqa: PLC0414
    from dataclasses import fields as fields  # noqa: PLC0414
    from dataclasses import is_dataclass as is_dataclass  # noqa: PLC0414
    from dataclasses import replace as replace  # noqa: PLC0414
    from typing import Any

    def has_field(kind: Any, name: str) -> bool: ...
    def types_of(kind: Any) -> Mapping[str, Any]: ...
else:
    KW_ONLY = MISSING = object()
    _FEW = 30  # instances of a class that take less time than to compile its `__init__`
    _FIELDS = "__lem_fields__"  # a class has its fields there, by name
    _GIVEN = ("default", "default_factory", "init", "repr", "compare", "metadata", "kw_only")

    class Field:
        __slots__ = (*_GIVEN, "module", "name", "type")

        def __init__(
            self,
            *,
            default=MISSING,
            default_factory=MISSING,
            init=True,
            repr=True,  # noqa: A002 - as in the standard library
            compare=True,
            metadata=None,
            kw_only=False,
        ):
            self.default, self.default_factory = default, default_factory
            self.init, self.repr, self.compare, self.kw_only = init, repr, compare, kw_only
            self.metadata = metadata or {}

    field = Field

    def fields(kind):
        return tuple(getattr(kind, _FIELDS).values())

    def has_field(kind, name):
        return name in getattr(kind, _FIELDS)

    def types_of(kind):
        """The type of each field; `typing.get_type_hints` takes ten times as long."""
        return {item.name: _evaluated(item.type, item.module) for item in fields(kind)}

    @functools.cache
    def _evaluated(text, module):
        return eval(text, vars(sys.modules[module]))  # noqa: S307 # nosec B307 - an annotation of lem

    def is_dataclass(kind):
        return hasattr(kind, _FIELDS)

    def replace(instance, /, **changes):
        kept = {it.name: getattr(instance, it.name) for it in fields(instance) if it.init and it.name not in changes}
        return type(instance)(**kept, **changes)

    def asdict(value):
        if is_dataclass(value):
            return {item.name: asdict(getattr(value, item.name)) for item in fields(value)}
        if isinstance(value, dict):
            return {name: asdict(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = map(asdict, value)
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def dataclass(cls=None, /, *, frozen=False, eq=True, repr=True, slots=False):  # noqa: A002 - as in the standard library
        def decorated(cls):
            own = _take_fields(cls)
            cls = _with_slots(cls, own) if slots else cls
            inherited = {
                name: item for base in cls.__mro__[:0:-1] for name, item in vars(base).get(_FIELDS, {}).items()
            }
            fields = {**inherited, **own}
            methods = {"__init__": _late_init(cls, fields.values(), is_frozen=frozen), "__signature__": _Signature()}
            if repr:
                methods["__repr__"] = _repr
            if eq:
                compared = [name for name, item in fields.items() if item.compare]
                methods |= _comparison(compared, is_hashable=frozen)
                if cls.__dict__.get("__hash__", 0) is None and "__eq__" in cls.__dict__:
                    del cls.__hash__  # it is None because the class defines `__eq__`
            if frozen:
                methods |= _freeze(cls, fields)
                if slots:
                    methods |= {"__getstate__": _pickled, "__setstate__": _unpickled}
            methods["__match_args__"] = tuple(it.name for it in fields.values() if it.init and not it.kw_only)
            methods |= {name: _Standard(name) for name in ("__dataclass_fields__", "__dataclass_params__")}
            for name, method in methods.items():
                if name not in cls.__dict__:
                    setattr(cls, name, method)
            setattr(cls, _FIELDS, fields)
            return cls

        return decorated if cls is None else decorated(cls)

    def _take_fields(cls):
        """The fields that the class itself declares; their defaults stay in it."""
        found, is_keyword = {}, False
        for name, kind in cls.__annotations__.items():
            if kind == "KW_ONLY":
                is_keyword = True
            elif not kind.startswith("ClassVar"):
                item = getattr(cls, name, MISSING)
                if not isinstance(item, Field):
                    item = Field(default=MISSING if isinstance(item, MemberDescriptorType) else item)
                elif item.default is MISSING:
                    delattr(cls, name)
                else:
                    setattr(cls, name, item.default)
                if item.default.__class__.__hash__ is None:
                    raise ValueError(f"{cls.__name__}.{name}: all instances would share this default")
                item.name, item.type, item.module = name, kind, cls.__module__
                item.kw_only = item.kw_only or is_keyword
                found[name] = item
        return found

    def _with_slots(cls, names):
        body = {name: it for name, it in vars(cls).items() if name not in {*names, "__dict__", "__weakref__"}}
        made = type(cls)(cls.__name__, cls.__bases__, {**body, "__slots__": tuple(names)})
        made.__qualname__ = cls.__qualname__
        return made

    class _Standard:
        """What the functions of the standard library know a dataclass by."""

        def __init__(self, name):
            self._name = name

        def __get__(self, instance, owner):
            import dataclasses

            made = []
            for item in fields(owner):
                given = {name: value for name in _GIVEN if (value := getattr(item, name)) is not MISSING}
                made.append((item.name, item.type, dataclasses.field(**given)))
            found = getattr(dataclasses.make_dataclass(owner.__name__, made, repr=False, eq=False), self._name)
            setattr(owner, self._name, found)  # made once: it takes half a millisecond
            return found

    @recursive_repr()
    def _repr(self):
        shown = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if field.repr]
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def _comparison(names, *, is_hashable):
        values = attrgetter(*names) if names else lambda _: ()

        def equal(self, other):
            return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

        def hashed(self):
            return hash(values(self))

        return {"__eq__": equal, "__hash__": hashed if is_hashable else None}

    def _freeze(cls, names):
        def assign(self, name, value):
            if type(self) is cls or name in names:
                raise _frozen_error(f"cannot assign to field {name!r}")
            super(cls, self).__setattr__(name, value)

        def delete(self, name):
            if type(self) is cls or name in names:
                raise _frozen_error(f"cannot delete field {name!r}")
            super(cls, self).__delattr__(name)

        return {"__setattr__": assign, "__delattr__": delete}

    def _frozen_error(message):
        from dataclasses import FrozenInstanceError

        return FrozenInstanceError(message)

    def _pickled(self):
        return [getattr(self, field.name) for field in fields(self)]

    def _unpickled(self, state):
        for field, value in zip(fields(self), state, strict=True):
            object.__setattr__(self, field.name, value)

    def _late_init(cls, fields, *, is_frozen):
        left, assign = _FEW, object.__setattr__ if is_frozen else setattr

        def init(self, /, *args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0 or not _is_filled(self, cls, fields, args, kwargs, assign):
                if cls.__init__ is init:
                    cls.__init__ = init.made()
                cls.__init__(self, *args, **kwargs)
            elif hasattr(cls, "__post_init__"):
                self.__post_init__()

        init.made = lambda: _named(_init(cls, fields, is_frozen), cls)
        return _named(init, cls)

    def _named(init, cls):
        init.__qualname__, init.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
        return init

    def _is_filled(instance, cls, fields, args, kwargs, assign):
        """Give an instance its values. False if the arguments do not fit: compiled code says why."""
        given = dict(zip(cls.__match_args__, args)) | kwargs  # noqa: B905 - there can be too many
        if len(given) < len(args) + len(kwargs):
            return False
        for field in fields:
            if field.init and field.name in given:
                value = given.pop(field.name)
            elif field.default_factory is not MISSING:
                value = field.default_factory()
            elif not field.init:
                continue  # the class has its value, if there is one
            elif field.default is not MISSING:
                value = field.default
            else:
                return False
            assign(instance, field.name, value)
        return not given

    class _Signature:
        """What `inspect.signature` and `help` show of a class, also before its first instance."""

        def __get__(self, instance, owner):
            import inspect

            init = owner.__init__
            found = inspect.signature(init.made() if hasattr(init, "made") else init)
            return found.replace(parameters=[*found.parameters.values()][1:])

    def _init(cls, fields, is_frozen):
        names = {"_set": object.__setattr__, "_default": object()}
        parameters, keywords, body = ["self"], [], []
        for field in fields:
            name = value = field.name
            declared = name
            if field.default_factory is not MISSING:
                names[f"_make_{name}"] = field.default_factory
                declared, value = f"{name}=_default", f"_make_{name}() if {name} is _default else {name}"
            elif field.default is not MISSING:
                names[f"_default_{name}"] = field.default
                declared = f"{name}=_default_{name}"
            if field.init:
                (keywords if field.kw_only else parameters).append(declared)
            elif field.default_factory is MISSING:
                continue  # the class has its value, if there is one
            else:
                value = f"_make_{name}()"
            body.append(f"_set(self, {name!r}, {value})" if is_frozen else f"self.{name} = {value}")
        if hasattr(cls, "__post_init__"):
            body.append("self.__post_init__()")
        signature = ", ".join([*parameters, *(["*"] if keywords else []), *keywords])
        exec(f"def __init__({signature}):\n " + "\n ".join(body or ["pass"]), names)  # noqa: S102 # nosec B102 - names of fields
        return names["__init__"]
