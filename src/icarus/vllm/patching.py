"""Checks the ledger's records against the installed vLLM, and wraps the functions that they name.

The running version and the parameters of every original are compared with the records before anything is changed. A
difference stops the process with one sentence: a half-applied plugin serves wrong tokens. Applying the records
again changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import ismethod, signature
from operator import attrgetter
from typing import Any

from icarus.errors import IcarusError

Original = Callable[..., Any]
"""A function of vLLM, which a wrapper takes."""

_MARK = "__icarus_patch__"  # attribute of a wrapped function: the target of the record that it was wrapped for


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
    parameters: str  # names of the original's parameters, in order
    by: str  # module:function that takes the original and returns its replacement
    what: str
    why: str
    upstream: str  # file:line of the original in the newest tested version
    before: str = ""  # the original's parameters in an older tested version, where they differ
    runner: str = ""  # V1 or V2, for a change that goes with a model runner


@dataclass(frozen=True)
class Override(Patch):
    """One method that a subclass of ours overrides. Nothing is set, but its parameters are checked like any other."""


def apply(ledger: Iterable[Patch], version: str, tested: Sequence[str]) -> int:
    """Apply all records, or none.

    ``ICARUS_UNTESTED_VLLM=1`` accepts an untested version if all originals still have the same parameters. It is for
    running the test suite against that version (``make test-vllm VLLM=...``).

    Args:
        ledger: the records.
        version: of the installed vLLM.
        tested: versions that the records were tested with, the newest last.

    Returns:
        How many records had not been applied before.

    Raises:
        PatchError: the version is untested, or an original is missing or has other parameters.
    """
    if _release(version) not in tested and os.environ.get("ICARUS_UNTESTED_VLLM") != "1":
        raise PatchError(
            f"ICaRus patches vLLM {', '.join(tested)} and this is {version}: install one of those, or set "
            "VLLM_PLUGINS='' to serve without ICaRus."
        )
    pending = [(patch, place) for patch in ledger if (place := _locate(patch, version, tested[-1]))]
    for patch, place in pending:
        if isinstance(patch, Override):
            setattr(_resolve(patch.by), _MARK, patch.target)
            continue
        replacement = _resolve(patch.by)(place.original)
        setattr(replacement, _MARK, patch.target)
        # A class method comes bound to its class, and so does what wraps it.
        bound = ismethod(place.original)
        setattr(place.owner, place.name, staticmethod(replacement) if bound else replacement)
    return len(pending)


def _release(version: str) -> str:
    """Without the name of a build, as in 0.32.0+cpu."""
    return version.partition("+")[0]


@dataclass(frozen=True)
class _Place:
    """Where an original stands."""

    owner: Any  # a module or a class
    name: str
    original: Original


def _locate(patch: Patch, version: str, newest: str) -> _Place | None:
    """The place of a record's original, or None if the record has been applied."""
    remedy = f"install vLLM {newest} as it was released, or set VLLM_PLUGINS='' to serve without ICaRus."
    module, _, path = patch.target.partition(":")
    *owners, name = path.split(".")
    try:
        owner = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise PatchError(f"vLLM {version} has no {patch.target} ({error}): {remedy}") from error
    if getattr(original, _MARK, None) == patch.target:
        return None
    actual, expected = list(signature(original).parameters), patch.parameters.split()
    if actual not in (expected, patch.before.split()):
        raise PatchError(f"{patch.target} of vLLM {version} takes {actual} and not {expected}: {remedy}")
    return _Place(owner, name, original)


def _resolve(name: str) -> Callable[[Original], Original]:
    """The function that ``module:function`` or ``module:Class.method`` names."""
    module, _, path = name.partition(":")
    wrapper: Callable[[Original], Original] = attrgetter(path)(import_module(module))
    return wrapper
