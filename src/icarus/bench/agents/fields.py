"""Settings as frozen dataclasses: what a field takes and means is declared once, for flags, YAML and checks alike."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from icarus.errors import InputError

Settings = TypeVar("Settings")

_PREFIX = "settings."


@dataclass(frozen=True)
class Kind:
    """What values a field takes; a tuple in its place is of one or more such values, none of them twice."""

    of: type  # of a word of the command line
    wanted: str  # "it must be ..."
    takes: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def integer(least: int | None, wanted: str) -> Kind:
    """Integers from ``least`` on."""
    return Kind(int, wanted, lambda value: type(value) is int and (least is None or value >= least))


def choice(*choices: str) -> Kind:
    """One of these."""
    return Kind(str, f"one of {', '.join(choices)}", choices.__contains__, choices)


COUNT = integer(1, "a positive integer")
POSITIVE = Kind(float, "a number above 0", lambda value: type(value) in (int, float) and 0 < value < float("inf"))
TEXT = Kind(str, "text", lambda value: isinstance(value, str))
WORDS = Kind(tuple, "a list of words", TEXT.takes)
"""Any words, which a flag gets as one and splits as a shell does."""


def setting(default: Any, help: str, kind: Kind = COUNT, *, flag: str = "") -> Any:
    """A field of a dataclass of settings; its flag is its name if not given, and None is taken as a default only."""
    return field(default=default, metadata={"help": help, "kind": kind, "flag": flag})


def _declared(owner: Any, prefix: str = _PREFIX) -> Iterator[tuple[str, str, Any, Mapping[str, Any]]]:
    """Place, flag, default and declaration of each setting, those of inner dataclasses among them."""
    for entry in fields(owner):
        if entry.metadata:
            flag = f"--{entry.metadata['flag'] or entry.name.replace('_', '-')}"
            yield prefix + entry.name, flag, entry.default, entry.metadata
        else:
            yield from _declared(getattr(owner, entry.name), f"{prefix}{entry.name}.")


def check(settings: Any) -> None:
    """For ``__post_init__``.

    Raises:
        InputError: a value that its field does not take, naming its flag.
    """
    for place, flag, default, declared in _declared(settings):
        name = place.removeprefix(_PREFIX)
        if "." in name or (value := getattr(settings, name)) is default:
            continue
        kind, many = declared["kind"], isinstance(default, tuple)
        values = value if many and isinstance(value, tuple) else (value,)
        if wrong := [one for one in values if not kind.takes(one)]:
            raise InputError(f"{flag} must be {kind.wanted}, not {wrong[0]!r}.")
        if many and kind is not WORDS and not 0 < len(values) == len(set(values)):
            raise InputError(f"{flag} is empty or names one twice; give one or more, and each once.")


def changed(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """With other values, as JSON, YAML and flags have them: lists for tuples, mappings for inner dataclasses.

    Raises:
        InputError: a name that is no setting, or a value that is not taken.
    """
    owner: Any = settings
    names = [entry.name for entry in fields(owner)]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            raise InputError(f"There is no setting {name!r}; take one of {', '.join(names)}.")
        inner: Any = getattr(settings, name)
        if is_dataclass(inner) and not isinstance(value, Mapping):
            raise InputError(f"{name} must be a mapping of settings, not {value!r}.")
        plain = tuple(value) if isinstance(value, list) else value
        changes[name] = changed(inner, value) if is_dataclass(inner) else plain
    after: Settings = replace(owner, **changes)
    return after


def add_flags(parser: argparse.ArgumentParser, settings: Any) -> None:
    """A flag for each setting; ``given`` collects those that were given."""
    for place, flag, default, declared in _declared(settings):
        kind = declared["kind"]
        parser.add_argument(
            flag,
            dest=place,
            default=argparse.SUPPRESS,
            type=shlex.split if kind is WORDS else kind.of,
            nargs="+" if isinstance(default, tuple) and kind is not WORDS else None,
            choices=kind.choices or None,
            metavar=None if kind.choices else flag.rpartition("-")[2].upper(),
            help=declared["help"],
        )


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, as ``changed`` takes them."""
    values: dict[str, Any] = {}
    for place, value in vars(options).items():
        if place.startswith(_PREFIX):
            *groups, name = place.removeprefix(_PREFIX).split(".")
            inner = values
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[name] = value
    return values
