"""`dataclass` as in the standard library, at a fraction of its cost: 20 µs a class instead of 280.

A command defines about a hundred of these classes, and creates no instance of most. The standard decorator compiles up
to six functions for each; here only `__init__` is compiled, with the first instance. What no class of lem uses is left
out: `order`, `InitVar`, `field(hash=…)`, and a standard dataclass that derives from a frozen one of these.
"""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from reprlib import recursive_repr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass  # noqa: PLC0414 - exported
else:

    def dataclass(cls=None, /, *, frozen=False, eq=True, repr=True, slots=False):  # noqa: A002 - as in the standard library
        def decorated(cls):
            cls = _with_fields(cls, slots)
            fields = dataclasses.fields(cls)
            methods = {"__init__": _late_init(cls, fields, is_frozen=frozen), "__signature__": _Signature()}
            if repr:
                methods["__repr__"] = _repr
            if eq:
                methods |= _comparison([field.name for field in fields if field.compare], is_hashable=frozen)
                if cls.__dict__.get("__hash__", 0) is None and "__eq__" in cls.__dict__:
                    del cls.__hash__  # it is None because the class defines `__eq__`
            if frozen:
                methods |= _freeze(cls, frozenset(field.name for field in fields))
                if slots:
                    methods |= {"__getstate__": _pickled, "__setstate__": _unpickled}
            for name, method in methods.items():
                if name not in cls.__dict__:
                    setattr(cls, name, method)
            return cls

        return decorated if cls is None else decorated(cls)

    def _with_fields(cls, has_slots):
        # The standard decorator spends most of its time on making a docstring from the signature, and on patterns that
        # tell whether the text of an annotation names a ClassVar.
        text, annotations = cls.__doc__, cls.__annotations__
        cls.__doc__ = text or cls.__name__
        cls.__annotations__ = {
            name: it if not isinstance(it, str) or it.startswith(("ClassVar", "KW_ONLY", "InitVar")) else object
            for name, it in annotations.items()
        }
        cls = dataclasses.dataclass(init=False, repr=False, eq=False, slots=has_slots)(cls)
        cls.__doc__, cls.__annotations__ = text, annotations
        for field in dataclasses.fields(cls):
            field.type = annotations.get(field.name, field.type)
        return cls

    @recursive_repr()
    def _repr(self):
        shown = [f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr]
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
                raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
            super(cls, self).__setattr__(name, value)

        def delete(self, name):
            if type(self) is cls or name in names:
                raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
            super(cls, self).__delattr__(name)

        return {"__setattr__": assign, "__delattr__": delete}

    def _pickled(self):
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def _unpickled(self, state):
        for field, value in zip(dataclasses.fields(self), state, strict=True):
            object.__setattr__(self, field.name, value)

    def _late_init(cls, fields, *, is_frozen):
        def init(self, /, *args, **kwargs):
            if cls.__init__ is init:
                cls.__init__ = init.made()
            cls.__init__(self, *args, **kwargs)

        init.made = lambda: _init(cls, fields, is_frozen)
        return init

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
            if field.default_factory is not dataclasses.MISSING:
                names[f"_make_{name}"] = field.default_factory
                declared, value = f"{name}=_default", f"_make_{name}() if {name} is _default else {name}"
            elif field.default is not dataclasses.MISSING:
                names[f"_default_{name}"] = field.default
                declared = f"{name}=_default_{name}"
            if field.init:
                (keywords if field.kw_only else parameters).append(declared)
            elif field.default_factory is dataclasses.MISSING:
                continue  # the class has its value, if there is one
            else:
                value = f"_make_{name}()"
            body.append(f"_set(self, {name!r}, {value})" if is_frozen else f"self.{name} = {value}")
        if hasattr(cls, "__post_init__"):
            body.append("self.__post_init__()")
        signature = ", ".join([*parameters, *(["*"] if keywords else []), *keywords])
        exec(f"def __init__({signature}):\n " + "\n ".join(body or ["pass"]), names)  # noqa: S102 # nosec B102 - names of fields
        init = names["__init__"]
        init.__qualname__, init.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
        return init
