"""How an option is declared: a dataclass field whose metadata holds everything beside its type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lem.config.kinds import Bounds

__all__ = ["REQUIRED", "UNSET", "Option", "option", "option_of"]


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
