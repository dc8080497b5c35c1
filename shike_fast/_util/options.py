"""Options, each declared once: its name, type, default, help, range, and whether it may change on resume.

An option is a field of a dataclass::

    lr: float = option(0.1, "highest learning rate", check=positive)

The annotation gives the type: ``bool``, ``int``, ``float``, ``str``, ``Literal[...]`` (which names the choices), a
``tuple[..., ...]`` of one of them, and each of these ``| None``. Parsers, checks, ``--help`` and the table of the
documentation are made from the fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shike_fast.errors import ConfigError

_KEY = "option"  # of a field's metadata
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Check:
    """What a value must be: ``text`` completes "must be …", ``holds`` says whether it is."""

    text: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Check:
    """At least so much."""
    return Check(f"at least {least}", lambda value: value >= least)


def at_most(most: int) -> Check:
    """At most so much."""
    return Check(f"at most {most}", lambda value: value <= most)


positive = Check("a positive number", lambda value: math.isfinite(value) and value > 0)
not_negative = Check("a number of at least 0", lambda value: math.isfinite(value) and value >= 0)


def option(
    default: Any = dataclasses.MISSING,
    help: str | Callable[[], str] = "",
    *,
    group: str = "",
    flag: str | None = "",
    metavar: str | None = None,
    default_text: str = "",
    choices: Callable[[], Sequence[str]] | None = None,
    also: Callable[[str], bool] | None = None,
    check: Check | Sequence[Check] = (),
    changeable: bool = False,
    parser: Mapping[str, Any] | None = None,
) -> Any:
    """Declare an option: a field of a dataclass, whose annotation is the type of the value.

    Args:
        default: the value where nobody gives one; without it, recipes must have one.
        help: one line; a function where it depends on what is registered.
        group: its heading in ``--help``.
        flag: default ``--`` and the name; None for what only a recipe or a file sets. A switch that is on by default
            has a flag ``--no-…``, or gets both.
        metavar: what ``--help`` calls the value; default the choices, else the flag's name.
        default_text: what the default means, where its value does not say so.
        choices: a function that lists the texts that are allowed; ``Literal`` needs none.
        also: whether a text that is no choice is allowed too, as one of a family of names.
        check: what every value must be.
        changeable: a resumed run may change it, because it does not alter what is learned.
        parser: arguments of ``add_argument`` that the type does not give.
    """
    declared = {
        "help_of": help if callable(help) else lambda: help,
        "group": group,
        "flag": flag,
        "metavar": metavar,
        "default_text": default_text,
        "choices": choices,
        "also": also,
        "checks": (check,) if isinstance(check, Check) else tuple(check),
        "changeable": changeable,
        "parser": dict(parser or {}),
    }
    return dataclasses.field(default=default, metadata={_KEY: declared})


@dataclass(frozen=True)
class Option:
    """A declared option: the arguments of :func:`option`, and what the field says.

    Attributes:
        kind: type of the value, or of each value of a tuple.
        optional: None is a value.
        several: the value is a tuple.
        default: ``dataclasses.MISSING`` where a recipe must have one.
    """

    name: str
    kind: type
    optional: bool
    several: bool
    default: Any
    help_of: Callable[[], str]
    group: str
    flag: str | None
    metavar: str | None
    default_text: str
    choices: Callable[[], Sequence[str]] | None
    also: Callable[[str], bool] | None
    checks: tuple[Check, ...]
    changeable: bool
    parser: dict[str, Any]

    @property
    def label(self) -> str:
        """What errors call it."""
        return (self.flag or self.name).replace("--no-", "--")

    @property
    def has_default(self) -> bool:
        """Whether it has a default."""
        return self.default is not dataclasses.MISSING

    @property
    def shown_default(self) -> str:
        """The default as ``--help`` shows it; empty where there is nothing to say."""
        if self.default_text or self.kind is bool or self.default in (dataclasses.MISSING, None, ()):
            return self.default_text
        values = self.default if self.several else [self.default]
        return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)

    @property
    def is_both(self) -> bool:
        """Whether it is a switch with a flag for each of its positions."""
        return self.kind is bool and (self.optional or self.default is True) and self.label == self.flag

    def check(self, value: Any) -> Any:
        """The value: a list as a tuple, a whole number as a float where the type says so.

        Raises:
            ConfigError: if it has another type, is no choice or out of range.
        """
        if value is None and self.optional:
            return None
        if not self.several:
            return self._check_one(value)
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{self.label}: must be a list, each value {_KINDS[self.kind]}, got {value!r}")
        return tuple(map(self._check_one, value))

    def _check_one(self, value: Any) -> Any:
        if self.kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, self.kind) or (self.kind is not bool and isinstance(value, bool)):
            raise ConfigError(f"{self.label}: must be {_KINDS[self.kind]}, got {value!r}")
        is_member = self.also is not None and isinstance(value, str) and self.also(value)
        if self.choices is not None and not is_member and value not in (choices := self.choices()):
            raise ConfigError(f"{self.label}: must be one of {', '.join(choices)}, got '{value}'")
        for check in self.checks:
            if not check.holds(value):
                raise ConfigError(f"{self.label}: must be {check.text}, got {value}")
        return value

    def add_to(self, parser: argparse._ActionsContainer, note: str = "") -> None:
        """Add its flag to a parser, with a ``note`` after the help."""
        if self.flag is None:
            return
        default = f" (default {self.shown_default})" if self.shown_default else ""
        options: dict[str, Any] = {"dest": self.name, "help": f"{self.help_of()}{default}{note}".replace("%", "%%")}
        options["default"] = argparse.SUPPRESS  # what is not given does not appear
        if self.kind is not bool:
            options |= {"type": self.kind, "metavar": self.metavar} | ({"nargs": "+"} if self.several else {})
        elif self.is_both:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["action"] = "store_true" if self.label == self.flag else "store_false"
        parser.add_argument(self.flag, **options | self.parser)


def options_of(cls: type) -> dict[str, Option]:
    """The options of a dataclass by name, in the order of their declaration.

    Raises:
        TypeError: for a type that no option can have.
    """
    return _options_of(cls)


Owned = dict[str, list[tuple[str, Option]]]
"""Options by name, each with the names of those that have it."""


def collect_options(kind: str, owners: Mapping[str, type | None], taken: Mapping[str, Option] | None = None) -> Owned:
    """The options that methods, or data sets, declare beside the general ones.

    Args:
        kind: what an error calls an owner: "method", for example.
        owners: their dataclasses by name; None for one without options.
        taken: options of others, whose names and flags are not to be had.

    Raises:
        ConfigError: if one is called as another option is, or two of a name are of different types.
    """
    taken = taken or {}
    flags = {one.flag for one in taken.values()} | {"--plugin"}
    found: Owned = {}
    for owner, declaring in owners.items():
        for name, one in ({} if declaring is None else options_of(declaring)).items():
            others = found.setdefault(name, [])
            alike = not others or _form(one) == _form(others[0][1])
            if name in taken or one.flag in flags or not alike:
                raise ConfigError(f"{kind} '{owner}': another option is called {name} or {one.flag}; rename its own")
            others.append((owner, one))
    return found


def _form(one: Option) -> tuple[type, bool, str | None]:
    return one.kind, one.several, one.flag


def add_owned(parser: argparse._ActionsContainer, owned: Owned) -> None:
    """Add the flags of such options to a parser, each with a note on who has it."""
    for owners in owned.values():
        owners[0][1].add_to(parser, f" [{', '.join(owner for owner, _ in owners)}]")


@functools.cache
def _options_of(cls: type) -> dict[str, Option]:
    hints = get_type_hints(cls)
    return {
        field.name: _option(field, hints[field.name]) for field in dataclasses.fields(cls) if _KEY in field.metadata
    }


def _option(field: dataclasses.Field[Any], annotation: Any) -> Option:
    declared = dict(field.metadata[_KEY])
    kind, optional = annotation, False
    if get_origin(kind) in (Union, types.UnionType):
        parts = [part for part in get_args(kind) if part is not type(None)]
        kind, optional = (parts[0] if len(parts) == 1 else None), True
    several = get_origin(kind) is tuple
    if several:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        kind = str
        declared |= {"choices": lambda: choices, "metavar": declared["metavar"] or "|".join(choices)}
    if kind not in _KINDS:
        raise TypeError(
            f"option {field.name}: its type must be bool, int, float, str, Literal or a tuple of one of them"
        )
    if declared["flag"] == "":
        declared["flag"] = f"--{field.name.replace('_', '-')}"
    return Option(field.name, kind, optional, several, field.default, **declared)
