"""Checks the ledger's records against the installed vLLM, and wraps the functions that they name.

The running version, the parameters of every original and the attributes that the plugin uses are compared with the
records before anything is changed. A difference stops the process with one sentence: a half-applied plugin serves wrong
tokens. Applying the records again changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from dis import get_instructions
from importlib import import_module
from inspect import get_annotations, ismethod, signature, unwrap
from operator import attrgetter
from types import CodeType
from typing import Any

from icarus.errors import IcarusError

Original = Callable[..., Any]
"""A function of vLLM, which a wrapper takes."""

READ_ONCE = "with --read-kv-once"
"""In place of a model runner: workers have it only if they read K/V once on GPUs."""

MARK = "__icarus_patch__"
"""Attribute of a wrapped function: the target of the record that it was wrapped for."""


class PatchError(IcarusError):
    """vLLM differs from what the ledger was written against."""


@dataclass(frozen=True)
class Hook:
    """Something that vLLM does not offer."""

    until: str  # what vLLM offers when the changes that stand in for it can go
    why: str
    issue: str = ""  # of vLLM


@dataclass(frozen=True)
class Patch:
    """One change: a function of vLLM, and the wrapper that replaces it."""

    hook: Hook
    target: str  # module:function or module:Class.method
    parameters: str  # names of the original's parameters, in order, in the newest version that is served
    by: str  # module:function that takes the original and returns its replacement
    what: str
    why: str
    upstream: str  # file:line of the original in the newest tested version
    before: tuple[str, ...] = ()  # the original's parameters in older versions, where they differ
    runner: str = ""  # V1 or V2, for a change that goes with a model runner, or READ_ONCE

    def fits(self, parameters: list[str]) -> bool:
        """Whether an original with these parameters is one that the change was written for."""
        return " ".join(parameters) in (self.parameters, *self.before)


@dataclass(frozen=True)
class Override(Patch):
    """One method that a subclass of ours overrides. Nothing is set, but its parameters are checked like any other."""


@dataclass(frozen=True)
class Attributes:
    """Attributes of objects of vLLM that the plugin reads or writes."""

    of: str  # module:Class
    names: str  # separated by spaces
    runner: str = ""  # V1 or V2, where only one model runner has it, or READ_ONCE


def apply(
    ledger: Iterable[Patch],
    version: str,
    tested: Sequence[str],
    checked: Sequence[str] = (),
    attributes: Iterable[Attributes] = (),
) -> int:
    """Apply all records, or none.

    ``ICARUS_UNTESTED_VLLM=1`` accepts an untested version if all originals still have the same parameters. It is for
    running the test suite against that version (``make test-vllm VLLM=...``).

    Args:
        ledger: the records.
        version: of the installed vLLM.
        tested: versions that the records were tested with, the newest last.
        checked: versions that they were compared with by source.
        attributes: what the plugin uses of vLLM's objects.

    Returns:
        How many records had not been applied before.

    Raises:
        PatchError: the version is untested, an original is missing or has other parameters, or a class lacks an
            attribute.
    """
    known = (*tested, *checked)
    if release(version) not in known and os.environ.get("ICARUS_UNTESTED_VLLM") != "1":
        raise PatchError(
            f"ICaRus patches vLLM {', '.join(known)} and this is {version}: install one of those, or set "
            "VLLM_PLUGINS='' to serve without ICaRus."
        )
    pending = [(patch, place) for patch in ledger if (place := _locate(patch, version, tested[-1]))]
    for record in attributes if pending else ():
        _check(record, version, tested[-1])
    for patch, place in pending:
        if isinstance(patch, Override):
            setattr(_resolve(patch.by), MARK, patch.target)
            continue
        replacement = _resolve(patch.by)(place.original)
        setattr(replacement, MARK, patch.target)
        # A class method comes bound to its class, and so does what wraps it.
        bound = ismethod(place.original)
        setattr(place.owner, place.name, staticmethod(replacement) if bound else replacement)
    return len(pending)


def release(version: str) -> str:
    """Without the name of a build, as in 0.32.0+cpu."""
    return version.partition("+")[0]


@dataclass(frozen=True)
class _Place:
    """Where an original stands."""

    owner: Any  # a module or a class
    name: str
    original: Original


def _remedy(newest: str) -> str:
    return f"install vLLM {newest} as it was released, or set VLLM_PLUGINS='' to serve without ICaRus."


def _find(module: str, path: str, version: str, newest: str) -> tuple[Any, Any]:
    """What a module calls by this path, and the module or class that it stands in."""
    *owners, name = path.split(".")
    try:
        owner = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        return owner, getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise PatchError(f"vLLM {version} has no {module}:{path} ({error}): {_remedy(newest)}") from error


def _locate(patch: Patch, version: str, newest: str) -> _Place | None:
    """The place of a record's original, or None if the record has been applied."""
    module, _, path = patch.target.partition(":")
    owner, original = _find(module, path, version, newest)
    if getattr(original, MARK, None) == patch.target:
        return None
    actual = list(signature(original).parameters)
    if not patch.fits(actual):
        raise PatchError(
            f"{patch.target} of vLLM {version} takes {actual} and not {patch.parameters.split()}: {_remedy(newest)}"
        )
    return _Place(owner, path.rpartition(".")[2], original)


def _resolve(name: str) -> Callable[[Original], Original]:
    """The function that ``module:function`` or ``module:Class.method`` names."""
    module, _, path = name.partition(":")
    wrapper: Callable[[Original], Original] = attrgetter(path)(import_module(module))
    return wrapper


# --------------------------------------------------------------------------------------------------- attributes


def _check(record: Attributes, version: str, newest: str) -> None:
    """Raise PatchError if a class lacks an attribute of the record."""
    module, _, path = record.of.partition(":")
    _, kind = _find(module, path, version, newest)
    if missing := sorted(set(record.names.split()) - known_attributes(kind, record.names.split())):
        raise PatchError(f"{record.of} of vLLM {version} has no attribute {missing[0]!r}: {_remedy(newest)}")


def known_attributes(kind: type, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that a class defines or annotates, or that its methods assign."""
    wanted = set(names)
    defined = ({*vars(part), *get_annotations(part)} for part in kind.__mro__)  # ``dir`` leaves out what enums define
    known = wanted & set(dir(kind)).union(*defined)
    for part in kind.__mro__:
        for code in _codes(part):
            if (wanted - known).intersection(code.co_names):
                assigned = {step.argval for step in get_instructions(code) if step.opname == "STORE_ATTR"}
                known |= wanted & assigned
    return known


def _codes(kind: type) -> Iterator[CodeType]:
    """The code of a class's own methods, as vLLM has it."""
    for value in vars(kind).values():
        function = unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
        if isinstance(code := getattr(function, "__code__", None), CodeType):
            yield code
